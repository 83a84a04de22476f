"""The fused merge: every backend against the reference, and the reference against plain words."""

import pytest
import torch

import zokern
from tests.conftest import choose
from tests.same_bits import same_bits
from zokern import noise, ops
from zokern.deltas import COMBINE, VOTES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(), (0,), (1,), (3, 131), (5000,), (1023,), (8, 2, 16)]
SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, -3e-39, 6e-8, 65504.0, 3e38]


def tensors(seed: int, dtype: torch.dtype, near: list | None = None) -> list[torch.Tensor]:
    """A tensor of each shape, of coarse values so that many are equal, and special ones."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for i, shape in enumerate([*SHAPES, (len(SPECIAL),)]):
        value = torch.randint(-9, 10, shape, generator=generator) / 8
        if near is not None:
            value = near[i].float() + value / 16
        result.append(value.to(dtype))
    turned = SPECIAL[seed % len(SPECIAL) :] + SPECIAL[: seed % len(SPECIAL)]
    result[-1].copy_(torch.tensor(turned))
    # In another memory format, and one element off its boundary.
    result[-2] = result[-2].to(memory_format=torch.contiguous_format).transpose(0, 2)
    result[-2] = result[-2].contiguous().transpose(0, 2)
    result[4] = torch.cat([result[4].new_zeros(1), result[4]])[1:]
    return result


def arguments(models: int, masks: str) -> dict:
    count = len(SHAPES) + 1
    weights = [0.7, -0.25, 1.0, 1.3, 0.1][:models]
    given: dict = {"weights": weights, "seed": 2**64 - 3, "tensor_ids": range(5, 5 + count)}
    ratios = torch.linspace(0.5, 1.5, models * count).reshape(models, count)
    ratios[0] = 1.0
    if masks == "random":
        given |= {"limits": [1 << 31, (1 << 32) - 1, 1 << 32, 0, 77][:models], "ratios": ratios}
    if masks == "magnitude":
        thresholds = torch.full((models, count), 1 / 32)
        thresholds[-1] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
        cuts = torch.arange(models * count).reshape(models, count) * 37
        given |= {"thresholds": thresholds, "cuts": cuts, "ratios": ratios}
    return given


def run(
    dtypes: tuple, models: int, with_base: bool = True, device: str = "cpu", **given
) -> list[torch.Tensor]:
    bases = tensors(0, dtypes[0])
    own = [tensors(m + 1, dtypes[m % len(dtypes)], bases) for m in range(models)]
    outs = [torch.full(base.shape, 7.0, dtype=dtypes[0], device=device) for base in bases]
    own = [[tensor.to(device) for tensor in model] for model in own]
    bases = [base.to(device) for base in bases]
    for name in ("ratios", "thresholds", "cuts"):
        if name in given:
            given[name] = given[name].to(device)
    ops.merge_deltas(outs, own, bases=bases if with_base else None, **given)
    return [out.cpu() for out in outs]


def agree(backend: str, dtypes: tuple, models: int, device: str = "cpu", **given) -> None:
    got = run(dtypes, models, device=device, **given)
    with zokern.use_backend("reference"):
        wanted = run(dtypes, models, **given)
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert same_bits(a, b), f"{backend}: tensor {i}"


RULES = [("none", "sum"), *((v, c) for v in VOTES[1:] for c in COMBINE)]


@pytest.mark.parametrize("masks", ["none", "random", "magnitude"])
@pytest.mark.parametrize(("votes", "combine"), RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backends_agree(native_backend, dtype, votes, combine, masks):
    check_rules(native_backend, "cpu", dtype, votes, combine, masks)


# Triton's interpreter takes its time: here are all rules, and masks with all dtypes.
IN_TRITON = [
    *(("magnitude", rule, torch.float32) for rule in RULES),
    *(("none", RULES[0], dtype) for dtype in DTYPES),
    *(("random", ("weighted", "mean"), dtype) for dtype in DTYPES),
    *(("magnitude", ("frequency", "sum"), dtype) for dtype in DTYPES[1:]),
]


@pytest.mark.parametrize(("masks", "rule", "dtype"), IN_TRITON, ids=str)
def test_triton_agrees(monkeypatch, masks, rule, dtype):
    choose("triton", monkeypatch)
    check_rules("triton", "cpu", dtype, *rule, masks)


def check_rules(backend: str, device: str, dtype, votes: str, combine: str, masks: str) -> None:
    given = arguments(3, masks) | {"votes": votes, "combine": combine, "scale": 0.9}
    if votes == "none":
        given["divisor"] = 1.45
    for rounded in {False, dtype != torch.float32}:
        given |= {"rounded": rounded, "zero_up": not rounded}
        agree(backend, (dtype,), 3, device, **given)


@pytest.mark.parametrize("models", [1, 2, 5])
def test_backends_agree_on_mixed_dtypes_and_without_a_base(kernel_backend, models):
    given = arguments(models, "random") | {"votes": "weighted", "combine": "mean"}
    agree(kernel_backend, DTYPES, models, rounded=True, **given)
    agree(kernel_backend, DTYPES[::-1], models, with_base=False, **given)


def test_sixty_four_models(kernel_backend):
    base = [torch.randn(100)]
    models = [[base[0] + torch.randn(100) / 10] for _ in range(64)]
    results = []
    for name in (None, "reference"):
        with zokern.use_backend(name) if name else zokern.use_backend(None):
            out = [torch.empty(100)]
            ops.merge_deltas(out, models, bases=base, votes="total", combine="mean")
        results.append(out[0])
    assert same_bits(*results)
    with pytest.raises(ValueError, match="1 to 64 models, not 65"):
        ops.merge_deltas([torch.empty(100)], [*models, models[0]], bases=base)


def test_words_as_noise_sample_gives_them(backend):
    model, out = torch.ones(1000), torch.empty(1000)
    limits = [int(0.3 * 2**32)]
    ops.merge_deltas([out], [[model]], limits=limits, draws=[4], seed=9, tensor_ids=[123])
    words = noise.sample("uniform32", 1000, seed=9, draw=4, tensor_id=123)
    assert torch.equal(out, (words < limits[0]).float())


def test_an_election(backend):
    base = torch.tensor([10.0, 10.0, 10.0, 10.0])
    models = [
        [base + torch.tensor(d)] for d in ([3.0, -1, 1, 0], [1.0, -2, -1, 0], [-1.0, 1, 0, 0])
    ]
    out = torch.empty(4)

    def merged(**given) -> list:
        ops.merge_deltas([out], models, bases=[base], **given)
        return out.tolist()

    assert merged() == [13, 8, 10, 10]
    assert merged(divisor=2, scale=3) == [14.5, 7, 10, 10]
    assert merged(votes="total", combine="sum") == [14, 7, 11, 10]
    assert merged(votes="total", combine="mean") == [12, 8.5, 11, 10]
    assert merged(votes="total", combine="mean", zero_up=False) == [12, 8.5, 9, 10]
    assert merged(votes="total", combine="max") == [13, 8, 11, 10]
    assert merged(votes="weighted", combine="mean", weights=[1, 1, 8]) == [9, 11, 11, 10]
    assert merged(votes="total", combine="mean", weights=[1, 1, 8]) == [12, 8.5, 11, 10]
    assert merged(votes="frequency", combine="sum") == [14, 7, 11, 10]
    ops.merge_deltas([out], models, votes="total", combine="sign")
    assert out.tolist() == [1, 1, 1, 1]


def test_bad_arguments_are_named_before_anything_is_written(backend):
    def merged(*changes, **given):
        out, base, model = [torch.full((4,), 7.0)], [torch.zeros(4)], [torch.ones(4)]
        named = {"outs": out, "bases": base, "models": [model]} | given
        try:
            ops.merge_deltas(named.pop("outs"), named.pop("models"), **named)
        finally:
            assert out[0].tolist() == [7.0] * 4

    half = torch.full((1, 1), 0.5)
    shared = torch.zeros(4)
    for message, error, given in [
        ("1 to 64 models, not 0", ValueError, {"models": []}),
        (r"models\[0\] must have 1 entries", ValueError, {"models": [[]]}),
        (r"bases\[0\].*shape \(4,\) of its output", ValueError, {"bases": [torch.zeros(5)]}),
        (r"models\[0\]\[0\].*float32, bfloat16", TypeError, {"models": [[torch.zeros(4).long()]]}),
        ("weights must be finite", ValueError, {"weights": [float("nan")]}),
        ("limits must have 1 entries", ValueError, {"limits": [1, 2]}),
        ("limits must be between 0 and", ValueError, {"limits": [-1]}),
        ("votes must be one of", ValueError, {"votes": "all"}),
        ("combine must be one of", ValueError, {"combine": "all"}),
        ("combine='mean' needs votes", ValueError, {"combine": "mean"}),
        ("divisor must not be 0", ValueError, {"divisor": 0.0}),
        ("give both or neither", ValueError, {"thresholds": half}),
        (r"cuts must be torch.int64", ValueError, {"thresholds": half, "cuts": half}),
        (r"ratios must be torch.float32", ValueError, {"ratios": torch.zeros(2, 1)}),
        ("share memory", ValueError, {"outs": [shared], "models": [[shared]]}),
        ("an output is contiguous", ValueError, {"outs": [torch.zeros(8)[::2]]}),
    ]:
        with pytest.raises(error, match=message):
            merged(**given)


def test_it_is_an_operator_that_torch_knows(backend):
    model, base, out = torch.randn(40), torch.randn(40), torch.empty(40)
    arguments = ([out], [base], [model, 2 * model], [1.0, 0.5], torch.ones(2, 1), None, None)
    rules = ([1 << 31, 1 << 32], [0, 1], 3, [7], True, "total", False, "mean", 1.0, 0.5)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.zokern.merge_deltas, (*arguments, *rules), test_utils=tests)
