"""Residuals: the value of a parameter and its residual is kept exactly."""

import pytest
import torch

from tests.conftest import choose
from tests.same_bits import same_bits
from zokern import ops
from zokern.backends.reference import storage


def stay(params, residuals, law="gauss16"):
    """A sweep that moves nothing: every value is loaded and stored again."""
    ops.perturb_(params, [0], [0.0], seed=0, law=law, residuals=residuals)


def test_split_keeps_all_bit_patterns(monkeypatch):
    """All 2^32 pairs of a bfloat16 and an int16, which are all float32 bit patterns, once each."""
    choose("native", monkeypatch)
    highs = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    # Beside these a residual can make a NaN or an infinity; all others give finite values only.
    exponent = highs.int() & 0x7F80
    delicate = torch.nonzero((exponent == 0x7F80) | (highs & 0x7FFF == 0)).flatten()

    # Low halves that are consecutive, for every high half.
    first = torch.arange(-(1 << 15), (1 << 8) - (1 << 15)).to(torch.int16)[:, None]
    params = highs.expand(1 << 8, 1 << 16).contiguous()
    residuals = first.expand_as(params).contiguous()
    wanted = [params.clone(), residuals.clone()]
    for _ in range(1 << 8):
        stay([params.view(torch.bfloat16)], [residuals], law="rademacher")  # the fastest
        lows = wanted[1][:, :1]
        check_delicate(highs[delicate], lows, params[:, delicate], residuals[:, delicate])
        for got, before in zip((params, residuals), wanted, strict=True):
            got[:, delicate] = before[:, delicate]
            # Four of them in a word, which takes a quarter of the time.
            assert torch.equal(got.view(torch.int64), before.view(torch.int64))
        for tensor in (residuals, wanted[1]):
            tensor += 1 << 8
    # They have wrapped around.
    assert torch.equal(lows, first)


def check_delicate(highs, lows, params, residuals):
    bits = (highs.int() << 16) + lows.int()
    finite = bits & 0x7F800000 != 0x7F800000
    assert ((params == highs) & (residuals == lows))[finite].all()
    # Infinities and NaN are kept by the parameter alone.
    assert not residuals[~finite].any()
    kept = params.contiguous().view(torch.bfloat16)[~finite].float()
    assert same_bits(kept, bits[~finite].view(torch.float32))


def patterns() -> torch.Tensor:
    """Every high half with low halves at and around the places where rounding turns."""
    lows = [0, 1, 0x7F, 0x80, 0x81, 0x17F, 0x7F7F, 0x7F80, 0x7FFF, 0x8000, 0x8001, 0xFF7F, 0xFF80]
    highs = torch.arange(1 << 16, dtype=torch.int64) << 16
    bits = highs[:, None] + torch.tensor([*lows, 0xFFFF])
    return bits.flatten().to(torch.int32).view(torch.float32)


def test_reference_split_is_exact():
    value = patterns()
    param, residual = storage.split(value, torch.bfloat16, torch.int16)
    assert same_bits(storage.load(param, residual), value)


def test_reference_split8_is_exact_to_sixteen_bits():
    value = patterns()
    param, residual = storage.split(value, torch.bfloat16, torch.int8)
    kept = storage.load(param, residual)
    assert same_bits(kept.isnan(), value.isnan())
    bits, kept_bits = value.view(torch.int32).long(), kept.view(torch.int32).long()
    finite = value.isfinite()
    assert (kept_bits[finite] % 256 == 0).all()
    assert ((kept_bits - bits)[finite].abs() <= 128).all()
    assert torch.equal(kept[value.isinf()], value[value.isinf()])


def test_reference_split_of_float16_keeps_22_bits():
    value = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)) * 0.02
    param, residual = storage.split(value, torch.float16, torch.float16)
    assert torch.equal(param, value.half())
    error = (storage.load(param, residual) - value).abs()
    assert (error <= value.abs() * 2.0**-22 + 2.0**-36).all()


@pytest.mark.parametrize("residual_dtype", [torch.int16, torch.int8], ids=["split", "split8"])
def test_stored_values_are_those_of_the_reference(kernel_backend, residual_dtype):
    param, residual = storage.split(patterns(), torch.bfloat16, residual_dtype)
    got, got_residual = param.clone(), residual.clone()
    stay([got], [got_residual])
    assert same_bits(got, param)
    assert torch.equal(got_residual, residual)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 1.5, 0.75, 1 + 2.0**-8, 1 - 2.0**-16, 2.0**100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_all_halves_are_rounded_to_nearest(kernel_backend, dtype, scale, directions):
    """Every pattern, times a scale: 1.5 and 0.75 give ties, the largest infinities."""
    param = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    wanted = (param.float() * scale).to(dtype)
    coeffs, scales = [0.0] * directions, [1.0] * (directions - 1) + [scale]
    ops.perturb_([param], list(range(directions)), coeffs, seed=0, scales=scales)
    # An infinity is met by 0 · z, which changes nothing; -0 becomes +0 where 0 is added.
    assert torch.equal(param.isnan(), wanted.isnan())
    assert torch.equal(param[~param.isnan()], wanted[~wanted.isnan()])


def test_stored_values():
    values = torch.randn(50)
    assert torch.equal(ops.stored_value(values), values)
    param = torch.zeros(50, dtype=torch.bfloat16)
    residual = torch.zeros(50, dtype=torch.int16)
    ops.perturb_([param], [-1], [1.0], seed=0, residuals=[residual], dense=[[values]])
    assert torch.equal(ops.stored_value(param, residual), values)
    with pytest.raises(TypeError, match=r"takes torch\.int16 or torch\.int8 beside it"):
        ops.stored_value(param, residual.float())
