"""Triton's sweep where its shape matters: many small blocks, and every path through the kernel.

That it agrees with the reference in ordinary blocks too is in test_perturb.py.
"""

import random

import pytest
import torch

import zokern
from tests import test_sweep_forms
from tests.conftest import choose
from tests.same_bits import same_bits
from zokern import ops
from zokern.backends.reference import storage as reference
from zokern.laws import LAWS
from zokern.sweep import Shard

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from zokern.backends.triton import launch, perturb, products, storage, tiles, update  # noqa: E402

DIRECTIONS = [name for name, law in LAWS.items() if law.is_direction]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STORAGES = {name: dtypes for dtypes, name in storage.STORAGES.items()}
SPECIAL_VALUES = [
    *(float("nan"), float("inf"), -float("inf"), 0.0, -0.0),
    *(1e-40, -3e-39, 6e-8, 3e-8, 2.98023223876953125e-8, 6.1e-5),
    *(65504.0, 65519.0, 65520.0, 3.38e38, 3.3961775e38, 3.4028235e38),
]


@pytest.fixture(autouse=True)
def _needs_triton(monkeypatch):
    choose("triton", monkeypatch, DEVICE)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of two tiles of 128 elements, so that small tensors have several of both."""
    if DEVICE != "cpu":
        pytest.skip("a GPU's tiles are as large as its vectors ask")
    for module in (perturb, update):
        monkeypatch.setattr(module, "_tile", lambda storage, octets: (16, 1))
        monkeypatch.setattr(module, "MAX_TILES", 2)
        monkeypatch.setattr(module, "BLOCKS", 1)
    monkeypatch.setattr(products, "_tile", lambda octets: 16)
    monkeypatch.setattr(products, "BLOCKS", 2)


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that begins one element after an aligned place."""
    flat = tensor.new_empty(tensor.numel() + 1)
    return flat[1:].view(tensor.shape).copy_(tensor)


def operands(name: str) -> tuple[list, list, list]:
    """Parameters, residuals and shards: a tensor for each way through the kernel."""
    dtype, residual_dtype = STORAGES[name]
    generator = torch.Generator().manual_seed(0)
    shapes_and_shards = [
        ((3, 131), None),
        ((256,), (1 << 20, 256, 256)),
        ((0,), None),
        ((1,), None),
        ((140,), (4093, 140, 140)),
        ((140,), None),
        ((140,), None),
        ((5, 32), (24, 32, 40)),
        ((11, 7), (3, 7, 9)),
        ((len(SPECIAL_VALUES),), None),
    ]
    params = [torch.randn(shape, generator=generator) for shape, _ in shapes_and_shards]
    params[-1].copy_(torch.tensor(SPECIAL_VALUES))
    params = [param.to(dtype) for param in params]
    residuals: list = [None] * len(params)
    if residual_dtype is not None:
        for i, param in enumerate(params):
            numbers = torch.randint(-128, 128, param.shape, generator=generator)
            if residual_dtype == torch.float16:
                numbers = numbers * 1e-5
            residuals[i] = torch.where(param.isfinite(), numbers, 0).to(residual_dtype)
    return params, residuals, [shard for _, shard in shapes_and_shards]


def swept_by(backend: str, params: list, residuals: list, **arguments) -> list:
    """Copies of the operands, swept by that backend."""
    params = [param.to(DEVICE, copy=True) for param in params]
    residuals = [None if r is None else r.to(DEVICE, copy=True) for r in residuals]
    params[5] = misaligned(params[5])
    if residuals[6] is not None:
        residuals[6] = misaligned(residuals[6])
    with zokern.use_backend(backend):
        ops.perturb_(params, residuals=residuals, **arguments)
    return [*params, *(r for r in residuals if r is not None)]


def check(name: str, law: str, k: int) -> None:
    """A sweep with everything different from tensor to tensor has the reference's bits."""
    params, residuals, shards = operands(name)
    choice = random.Random(f"{name}{law}{k}")
    arguments = {
        "draws": [choice.getrandbits(32) for _ in range(k)],
        "coeffs": [[choice.uniform(-0.1, 0.1) for _ in range(k)] for _ in params],
        "scales": [[choice.choice([1.0, 0.9]) for _ in range(k)] for _ in params],
        "seed": choice.getrandbits(63) + (1 << 63),
        "law": law,
        "tensor_ids": [choice.getrandbits(56) for _ in params],
        "shards": shards,
    }
    got = swept_by("triton", params, residuals, **arguments)
    wanted = swept_by("reference", params, residuals, **arguments)
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert same_bits(a, b), f"operand {i}"


# One, two and four directions, and any number of them, go different ways.
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("name", STORAGES)
def test_every_storage(small_blocks, name, k):
    check(name, "gauss16", k)


@pytest.mark.parametrize(("name", "k"), [("fp32", 1), ("bf16", 3)])
@pytest.mark.parametrize("law", ["gauss32", "rademacher", "normal"])
def test_every_law(small_blocks, law, name, k):
    check(name, law, k)


def test_sixteen_directions(small_blocks):
    check("bf16", "gauss16", 16)


@pytest.mark.parametrize(
    "law", [name for name, law in zokern.noise.LAWS.items() if law.is_direction]
)
def test_the_last_elements_that_a_law_counts(small_blocks, law):
    numel = 403
    shard = (LAWS[law].max_elements - numel, numel, numel)
    tensor = torch.zeros(numel, device=DEVICE)
    wanted = tensor.clone()
    ops.perturb_([tensor], [7], [0.5], seed=1, law=law, shards=[shard])
    with zokern.use_backend("reference"):
        ops.perturb_([wanted], [7], [0.5], seed=1, law=law, shards=[shard])
    assert same_bits(tensor, wanted)


def test_one_sweep_over_every_storage(small_blocks):
    params, residuals = [], []
    for name in STORAGES:
        some_params, some_residuals, _ = operands(name)
        params += some_params[:2]
        residuals += some_residuals[:2]
    params.append(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    residuals.append(None)
    arguments = {"draws": [1, 2], "coeffs": [0.1, 0.2], "seed": 3}
    got = swept_by("triton", params, residuals, **arguments)
    wanted = swept_by("reference", params, residuals, **arguments)
    assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True))


FORMS = [
    ("gauss16", "fp16_fp16", "dense"),
    ("gauss16", "bf16", "master evaluates"),
    ("gauss16", "fp16", "master updates"),
    ("gauss16", "fp32", "master stays"),
    ("gauss16", "fp32", "momentum"),
    ("gauss16", "bf16_int16", "momentum, all"),
    ("gauss16", "fp16_fp16", "sign"),
    ("gauss16", "bf16_int8", "signed momentum"),
    ("gauss16", "bf16", "everything"),
    ("gauss32", "bf16", "everything"),
    ("rademacher", "fp32", "momentum"),
    ("normal", "bf16", "momentum"),
    ("gauss16", "bf16_int16", "outs"),
    ("gauss16", "fp32", "outs"),
    ("gauss16", "fp16", "outs, dense"),
    ("gauss16", "bf16", "rows"),
    ("gauss16", "bf16_int8", "rows, dense"),
    ("gauss16", "fp16", "rounding"),
    ("gauss16", "bf16_int8", "rounding"),
    ("gauss16", "bf16_int16", "rounding, outs"),
    ("gauss16", "fp16", "one evaluates"),
    ("gauss16", "bf16", "one updates"),
    ("gauss16", "bf16_int8", "one, rounding"),
    ("gauss16", "fp32", "one dense"),
]


@pytest.mark.parametrize(("law", "name", "form"), FORMS)
def test_every_form(small_blocks, monkeypatch, law, name, form):
    monkeypatch.setattr(test_sweep_forms, "make_operands", operands)
    case = test_sweep_forms.make_case(law, name, test_sweep_forms.FORMS[form])
    for vectors in case.arguments["dense"]:
        vectors[5] = misaligned(vectors[5])
    got = case.run()
    with zokern.use_backend("reference"):
        wanted = case.run()
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert same_bits(a, b), f"operand {i}"


@pytest.mark.parametrize("dense", [0, 1])
def test_picked_rows_in_whole_tiles(small_blocks, dense):
    param = torch.randn(40, 32, device=DEVICE).bfloat16()
    rows, shard = torch.randint(1000, (40,), device=DEVICE), Shard(8, 32, 40)
    assert tiles.place_of((param,), shard, 0, picked=True).unmasked == param.numel() // 8
    arguments = {"dense": [[torch.randn_like(param)]] * dense, "shards": [shard], "rows": [rows]}
    results = []
    for backend in ("triton", "reference"):
        moved, out = param.clone(), torch.empty_like(param)
        with zokern.use_backend(backend):
            ops.perturb_([moved], [5, *[~0] * dense], [0.1] * (1 + dense), seed=1, **arguments)
            ops.perturb_(
                [param], [5, *[~0] * dense], [0.1] * (1 + dense), seed=1, outs=[out], **arguments
            )
        assert same_bits(out, moved)
        results.append(out)
    assert same_bits(*results)


def test_an_update_steps_by_the_sign_of_numbers_alone(small_blocks):
    """NaN and both zeros have the sign 0."""
    momentum = torch.tensor([float("nan"), 0.0, -0.0, 1e-45, -1e-45, float("inf"), -2.0])
    param = torch.zeros(7)
    update = ops.Update([0.0], 1.0, 1.0, [momentum], sign=True)
    ops.perturb_([param], [0], [0.0], seed=1, update=update)
    assert param.tolist() == [0, 0, 0, 1, -1, 1, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inner_products_of_many_blocks(small_blocks, dtype):
    vectors, _, shards = operands("fp32")
    vectors = [vector.to(dtype) for vector in vectors[:-1]]
    vectors[5] = misaligned(vectors[5])
    got = ops.inner_products(vectors, 1, seed=2, shards=shards[:-1])
    with zokern.use_backend("reference"):
        wanted = ops.inner_products(vectors, 1, seed=2, shards=shards[:-1])
    assert torch.allclose(got, wanted, rtol=1e-15, atol=0)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_inner_products_of_what_is_not_finite_are_not(value):
    vector = torch.full((20_000,), value, device=DEVICE)
    vv, vz, zz = ops.inner_products([vector], 1, seed=2)[0]
    assert not vv.isfinite()
    assert vz.isnan()
    assert zz.isfinite()


@triton.jit
def find_kernel(first_blocks, tensors, blocks, out):
    program = tl.program_id(0)
    found = tiles.find(first_blocks, tensors, tl.load(blocks + program))
    tl.store(out + program, found)


@pytest.mark.parametrize("tensors", [1, 2, 31, 32, 33, 1024, 1025, 3000])
def test_a_block_finds_its_tensor(tensors):
    choice = random.Random(tensors)
    first_blocks = [0]
    while len(first_blocks) < tensors:
        first_blocks.append(first_blocks[-1] + choice.choice([1, 2, 1000]))
    wanted = sorted({0, tensors - 1, *(choice.randrange(tensors) for _ in range(6))})
    starts = torch.tensor(first_blocks)
    # The first block of a tensor, and the last.
    ends = torch.cat([starts[1:] - 1, starts[-1:] + 5])
    blocks = torch.stack([starts[wanted], ends[wanted]]).flatten().to(DEVICE)
    out = torch.full_like(blocks, -1)
    find_kernel[(len(blocks),)](starts.to(DEVICE), tensors, blocks, out, **launch.OPTIONS)
    assert out.tolist() == wanted * 2


@pytest.mark.parametrize(
    ("shape", "shard", "start", "unmasked", "octets_per_row"),
    [
        ((100,), (0, 100, 100), 0, 12, 13),
        ((100,), (8, 100, 100), 0, 12, 13),
        ((100,), (9, 100, 100), 0, 0, 14),
        ((100,), (0, 100, 100), 1, 0, 13),
        ((4, 16), (8, 16, 40), 0, 8, 2),
        ((4, 16), (8, 16, 41), 0, 0, 3),
        ((4, 15), (8, 15, 40), 0, 0, 3),
        ((40, 1), (0, 1, 8), 0, 0, 1),
    ],
    ids=["whole", "offset", "mid-octet", "misaligned", "rows", "odd-stride", "odd-rows", "columns"],
)
def test_what_goes_without_masks(shape, shard, start, unmasked, octets_per_row):
    numel = torch.Size(shape).numel()
    param = torch.zeros(numel + start)[start:].view(shape)
    place = tiles.place_of((param, None), Shard(*shard), 0)
    assert place.unmasked == unmasked
    assert place.octets_per_row == octets_per_row


@triton.jit
def store_kernel(values, param: tl.int64, residual: tl.int64, STORAGE: tl.constexpr,
                 OCTETS: tl.constexpr):  # fmt: skip
    at = tl.program_id(0) * OCTETS * 8 + tl.arange(0, OCTETS * 8)
    # The interpreter takes a low address for 32 bits.
    param, residual = param.to(tl.int64), residual.to(tl.int64)
    storage.store(STORAGE, param, residual, at, None, tl.load(values + at), 1)


@triton.jit
def load_kernel(values, param: tl.int64, residual: tl.int64, STORAGE: tl.constexpr,
                ALIGNED: tl.constexpr, OCTETS: tl.constexpr):  # fmt: skip
    octet = tl.program_id(0).to(tl.int64) * OCTETS
    at = octet * 8 + tl.arange(0, OCTETS * 8)
    param, residual = param.to(tl.int64), residual.to(tl.int64)
    if ALIGNED:
        value = storage.load_aligned(STORAGE, param, residual, octet, OCTETS)
    else:
        value = storage.load(STORAGE, param, residual, at, None)
    tl.store(values + at, value)


def all_upper_halves() -> torch.Tensor:
    """Every upper half of a float32, with lower halves around those at which rounding turns."""
    lows = [0, 1, 0x7F, 0x80, 0x81, 0xFFF, 0x1000, 0x1001]
    lows += [0x2FFF, 0x3000, 0x7F7F, 0x7F80, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    bits = (torch.arange(1 << 16) << 16)[:, None] + torch.tensor(lows)
    values = bits.flatten().to(torch.int32).view(torch.float32)
    # What arithmetic gives: a quiet NaN.
    return torch.where(values.isnan(), torch.nan, values)


@pytest.mark.parametrize("name", STORAGES)
def test_values_are_stored_and_loaded_as_in_the_reference(name):
    dtypes = STORAGES[name]
    values = all_upper_halves()
    wanted_param, wanted_residual = reference.split(values, *dtypes)
    param = torch.empty_like(wanted_param, device=DEVICE)
    residual = torch.empty_like(param, dtype=dtypes[1] or torch.int8)
    addresses = (param.data_ptr(), residual.data_ptr())
    octets = 1 << 15 if DEVICE == "cpu" else 128
    grid = (len(values) // (8 * octets),)
    store_kernel[grid](values.to(DEVICE), *addresses, name, octets, **launch.OPTIONS)
    assert same_bits(param.cpu(), wanted_param)
    if wanted_residual is None:
        residual = None
    else:
        assert same_bits(residual.cpu(), wanted_residual)
    wanted = reference.load(param, residual)
    for aligned in (False, True):
        got = torch.empty_like(wanted)
        load_kernel[grid](got, *addresses, name, aligned, octets, **launch.OPTIONS)
        assert same_bits(got, wanted)
