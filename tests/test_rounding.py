"""Stochastic rounding: right on average, and the same bits on every backend."""

import pytest
import torch
from torch import Tensor

import zokern
from tests.same_bits import same_bits
from tests.test_perturb import SPECIAL_VALUES
from zokern import noise, ops
from zokern.backends.reference import storage

STORAGES = {
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "bf16-split8": (torch.bfloat16, torch.int8),
}
ALL_BITS = torch.arange(1 << 16)
# The spacing of what is kept, where the exponent says it and below.
SPACINGS = {"bf16": (2.0**-7, 2.0**-133), "fp16": (2.0**-10, 2.0**-24)}
SPACINGS["bf16-split8"] = (2.0**-15, 2.0**-141)


def rounded(name: str, random: Tensor, value: Tensor) -> Tensor:
    """What the reference keeps of a value, as float32."""
    dtype, residual_dtype = STORAGES[name]
    value = storage.round_by(random, value, dtype, residual_dtype is not None)
    return storage.load(*storage.split(value, dtype, residual_dtype))


def patterns() -> Tensor:
    """Every upper half of a float32, with lower halves around those at which rounding turns."""
    lows = torch.tensor([0, 1, 0x80, 0xFFF, 0x1000, 0x1FFF, 0x8000, 0xFFFF])
    bits = (torch.arange(1 << 16) << 16)[:, None] + lows
    values = bits.flatten().to(torch.int32).view(torch.float32)
    return torch.cat([values, torch.tensor(SPECIAL_VALUES)])


@pytest.mark.parametrize("name", STORAGES)
@pytest.mark.parametrize("value", [1 / 3, -1.0 - 2**-9, 700.3, 6.2e-5, -5.9e-8, 2.9e-8, 1e-40, 0.0])
def test_over_all_bits_it_is_right_on_average(name, value):
    exact = torch.full((1 << 16,), value)
    got = rounded(name, ALL_BITS, exact).double()
    relative, smallest = SPACINGS[name]
    power = 2.0 ** torch.frexp(exact[0])[1].item() / 2
    spacing = max(power * relative, smallest)
    assert got.unique().numel() <= 2
    assert ((got - exact.double()).abs() <= spacing).all()
    assert abs(got.mean() - exact[0].double()) <= spacing * 2.0**-16


@pytest.mark.parametrize("name", STORAGES)
def test_over_many_draws_it_is_right_on_average(backend, name):
    value, count = torch.tensor(0.1 + 2.0**-20), 4096
    total = torch.zeros((), dtype=torch.float64)
    for draw in range(8):
        got, residuals = swept(value.expand(count).contiguous(), name, rounding=draw)
        total += storage.load(got, residuals).double().sum()
    spacing = 2.0**-4 * SPACINGS[name][0]
    assert abs(total / (8 * count) - value.double()) < 4 * spacing / (8 * count) ** 0.5


def swept(values: Tensor, name: str, **arguments) -> tuple[Tensor, Tensor | None]:
    """What a sweep that makes these values keeps of them."""
    dtype, residual_dtype = STORAGES[name]
    # Adding -0 leaves every value's bits.
    param = torch.full(values.shape, -0.0, dtype=dtype)
    residual = None
    if residual_dtype is not None:
        residual = torch.zeros(values.shape, dtype=residual_dtype)
    forms = {"dense": [[values]], "residuals": [residual], "seed": 2**63 + 5} | arguments
    ops.perturb_([param], [~0], [1.0], **forms)
    return param, residual


@pytest.mark.parametrize("name", STORAGES)
def test_every_backend_rounds_as_the_reference(kernel_backend, name):
    values = patterns()
    got = swept(values, name, rounding=2**32 - 3, tensor_ids=[2**56 - 1])
    with zokern.use_backend("reference"):
        wanted = swept(values, name, rounding=2**32 - 3, tensor_ids=[2**56 - 1])
    for a, b in zip(got, wanted, strict=True):
        assert a is b or same_bits(a, b)


@pytest.mark.parametrize("name", STORAGES)
def test_the_bits_are_those_of_the_element(backend, name):
    """Those of rounding16, under every sharding and where rows are picked, also out of place."""
    values, key = torch.randn(40, 24), {"seed": 7, "tensor_id": 9}
    bits = noise.sample("rounding16", 960, draw=4, **key).view(40, 24)
    wanted = rounded(name, bits, values)
    arguments = {"rounding": 4, "seed": 7, "tensor_ids": [9]}
    assert torch.equal(storage.load(*swept(values, name, **arguments)), wanted)
    part = values[:, 3:8].contiguous()
    got = swept(part, name, shards=[(3, 5, 24)], **arguments)
    assert torch.equal(storage.load(*got), wanted[:, 3:8])
    rows = torch.tensor([39, 2, 2])
    arguments |= {"shards": [(0, 24, 24)], "rows": [rows]}
    assert torch.equal(storage.load(*swept(values[rows], name, **arguments)), wanted[rows])
    if name != "bf16-split8":
        out = torch.empty(3, 24, dtype=STORAGES[name][0])
        swept(values[rows], name, outs=[out], **arguments)
        assert torch.equal(out.float(), wanted[rows])


@pytest.mark.parametrize("name", STORAGES)
def test_what_needs_no_rounding_stays(backend, name):
    """All that there is in half precision, infinities, both zeros and NaN among it."""
    dtype = STORAGES[name][0]
    values = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    got, residual = swept(values.float(), name, rounding=0)
    assert same_bits(got, values)
    assert residual is None or not residual.any()


def test_the_largest_numbers_become_infinite_with_their_chance(backend):
    values = torch.full((512,), 65520.0)
    got = swept(values, "fp16", rounding=1)[0].float()
    assert 200 < (got == 65504).sum() < 312
    assert 200 < got.isinf().sum() < 312
    assert swept(torch.full((512,), -65536.0), "fp16", rounding=1)[0].isinf().all()


@pytest.mark.parametrize(
    ("dtype", "residual_dtype"),
    [
        (torch.float32, None),
        (torch.bfloat16, torch.int16),
        (torch.float16, torch.float16),
    ],
)
def test_nothing_else_is_rounded_stochastically(dtype, residual_dtype):
    param = torch.zeros(4, dtype=dtype)
    residual = None if residual_dtype is None else torch.zeros(4, dtype=residual_dtype)
    message = r"params\[0\].*bfloat16 or float16 alone, or bfloat16 with an int8 residual"
    with pytest.raises(ValueError, match=message):
        ops.perturb_([param], [0], [1.0], seed=0, residuals=[residual], rounding=0)
    assert not param.any()
