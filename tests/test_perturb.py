"""The fused sweep: what it computes, and that every backend computes the same bits."""

import functools
import random

import pytest
import torch

import zokern
from tests.same_bits import same_bits
from zokern import noise, ops

DIRECTIONS = [name for name, law in noise.LAWS.items() if law.is_direction]
STORAGES = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "bf16-split": (torch.bfloat16, torch.int16),
    "bf16-split8": (torch.bfloat16, torch.int8),
    "fp16-split": (torch.float16, torch.float16),
}
SPECIAL_VALUES = [
    *(float("nan"), float("inf"), -float("inf"), 0.0, -0.0),
    # float32 denormals; float16 denormals, their halves and ties; the largest of each format.
    *(1e-40, -3e-39, 6e-8, 3e-8, 2.98023223876953125e-8, 2.9e-8, 6.1e-5),
    *(65504.0, 65519.0, 65520.0, 70000.0, 3.38e38, 3.3961775e38, 3.4028235e38),
]


def make_operands(storage: str) -> tuple[list, list, list]:
    """Tensors of awkward shapes, their residuals and their shards."""
    dtype, residual_dtype = STORAGES[storage]
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    shapes = [
        (randn(7, 3), None),
        (randn(0), None),
        (randn(1), None),
        (randn(()), None),
        (randn(3, 4099), None),
        (randn(33, 65), (5, 33 * 65, 33 * 65)),
        (randn(2, 3, 5, 4).to(memory_format=torch.channels_last), None),
        (randn(6, 10).t(), (1003, 6, 100)),
        (randn(6, 10), (3, 10, 17)),
        (randn(40, 1), (2, 1, 129)),
        (randn(300)[3:], (8, 297, 297)),
        (torch.tensor(SPECIAL_VALUES), None),
    ]
    params = []
    for tensor, _ in shapes:
        base = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype)
        params.append(base.copy_(tensor))
    # A view that begins at an odd place of its storage.
    params[10] = torch.empty(300, dtype=dtype)[3:].copy_(shapes[10][0])

    def residual(param):
        if residual_dtype is None:
            return None
        if residual_dtype == torch.float16:
            noise = torch.randn(param.shape, generator=generator) * 1e-3
            return torch.empty_like(param).copy_(torch.where(param.isfinite(), noise, 0))
        info = torch.iinfo(residual_dtype)
        numbers = torch.randint(info.min, info.max + 1, param.shape, generator=generator)
        numbers = torch.where(param.isfinite(), numbers, 0)
        return torch.empty_like(param, dtype=residual_dtype).copy_(numbers)

    return params, [residual(param) for param in params], [shard for _, shard in shapes]


def clone(tensors):
    """Copies with the same strides."""
    return [None if t is None else torch.empty_like(t).copy_(t) for t in tensors]


@pytest.mark.parametrize("k", [1, 2, 3, 16])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("law", DIRECTIONS)
def test_backends_agree(native_backend, law, storage, k):
    check_agreement(law, storage, k)


# Its storages, laws and directions are in test_triton_perturb.py, in blocks that take less.
@pytest.mark.parametrize(
    ("law", "storage", "k"),
    [
        ("gauss16", "fp32", 1),
        ("gauss32", "bf16-split", 2),
        ("rademacher", "fp16-split", 3),
        ("normal", "bf16-split8", 1),
    ],
)
def test_triton_agrees(monkeypatch, law, storage, k):
    # Others import this file where Triton must not be interpreted.
    from tests.conftest import choose

    choose("triton", monkeypatch)
    check_agreement(law, storage, k)


def check_agreement(law: str, storage: str, k: int) -> None:
    got, wanted = swept(law, storage, k), swept_by_the_reference(law, storage, k)
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert a is b or same_bits(a, b), f"operand {i}"


@functools.cache
def swept_by_the_reference(law: str, storage: str, k: int) -> list[torch.Tensor | None]:
    with zokern.use_backend("reference"):
        return swept(law, storage, k)


def swept(law: str, storage: str, k: int) -> list[torch.Tensor | None]:
    """The parameters, then their residuals."""
    choice = random.Random(f"{law}{storage}{k}")
    params, residuals, shards = make_operands(storage)
    arguments = {
        "draws": [choice.getrandbits(32) for _ in range(k)],
        "coeffs": [[choice.uniform(-0.1, 0.1) for _ in range(k)] for _ in params],
        "scales": [[choice.choice([1.0, 0.9]) for _ in range(k)] for _ in params],
        "seed": choice.getrandbits(64),
        "law": law,
        "tensor_ids": [choice.getrandbits(56) for _ in params],
        "shards": shards,
    }
    ops.perturb_(params, residuals=residuals, **arguments)
    return [*params, *residuals]


def test_it_is_what_the_formula_says(backend):
    theta = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    z = [noise.sample("gauss16", 1000, seed=5, draw=d, tensor_id=9).double() for d in (3, 8)]
    wanted = 0.5 * theta.double() + 0.1 * z[0] - 0.2 * z[1]
    ops.perturb_([theta], [3, 8], [0.1, -0.2], seed=5, scales=[0.5, 1.0], tensor_ids=[9])
    torch.testing.assert_close(theta.double(), wanted, rtol=1e-6, atol=1e-7)


def test_the_products_are_fused(backend):
    # 1 + c·z rounds differently with a product that is rounded first, for some of the elements.
    z = noise.sample("gauss16", 4096, seed=0, draw=0).double()
    coeff = torch.tensor(1 / 3).item()
    theta = torch.ones(4096)
    ops.perturb_([theta], [0], [coeff], seed=0)
    fused = (1 + coeff * z).float()
    unfused = 1 + (coeff * z).float()
    assert not torch.equal(fused, unfused)
    assert torch.equal(theta, fused)


def test_positions_are_the_default_ids(backend):
    tensors = [torch.zeros(20), torch.zeros(20)]
    ops.perturb_(tensors, [4], [1.0], seed=1)
    for position, tensor in enumerate(tensors):
        wanted = noise.sample("gauss16", 20, seed=1, draw=4, tensor_id=position)
        assert torch.equal(tensor, wanted)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_shards_get_their_slice_of_the_noise(backend, dim):
    full = torch.zeros(6, 5, 9)
    ops.perturb_([full], [0], [1.0], seed=3)
    start, length = 1, 3
    local = torch.zeros_like(full).narrow(dim, start, length).contiguous()
    inner = full[(0,) * (dim + 1)].numel()
    rows_of = full.shape[dim] * inner
    shard = (start * inner, length * inner, rows_of)
    ops.perturb_([local], [0], [1.0], seed=3, shards=[shard])
    assert torch.equal(local, full.narrow(dim, start, length))


@pytest.mark.parametrize("columns", [24, 7])
def test_picked_rows_get_the_noise_of_their_rows(backend, columns):
    """In place and out of place; of whole rows, of columns of them, and of a single row."""
    full = torch.zeros(50, columns)
    ops.perturb_([full], [0], [1.0], seed=3)
    for picked in ([3, 49, 0, 3], [41]):
        rows = torch.tensor(picked)
        for offset, length in ((0, columns), (2, 5)):
            local, out = torch.zeros(len(picked), length), torch.ones(len(picked), length)
            arguments = {"seed": 3, "shards": [(offset, length, columns)], "rows": [rows]}
            ops.perturb_([local], [0], [1.0], outs=[out], **arguments)
            assert not local.any()
            ops.perturb_([local], [0], [1.0], **arguments)
            assert torch.equal(local, full[rows, offset : offset + length])
            assert torch.equal(out, local)


def test_picked_rows_may_be_far_away(backend):
    far = (1 << 33) // 16 - 1
    local = torch.zeros(2, 16)
    ops.perturb_(
        [local], [0], [1.0], seed=3, shards=[(0, 16, 16)], rows=[torch.tensor([far, far + 1])]
    )
    wanted = noise.sample("gauss16", 32, seed=3, draw=0, offset=far * 16)
    assert torch.equal(local.flatten(), wanted)


def test_elements_past_two_to_the_33(backend):
    offset = (1 << 33) + 5
    local = torch.zeros(100)
    ops.perturb_([local], [0], [1.0], seed=3, shards=[(offset, 100, 100)])
    assert torch.equal(local, noise.sample("gauss16", 100, seed=3, draw=0, offset=offset))


def test_many_tensors_and_many_directions(backend):
    # Triton's interpreter is slow.
    count, k = {"triton": (12, 17), "reference": (40, 20)}.get(backend, (700, 40))
    tensors = [torch.zeros(1 + i % 37) for i in range(count)]
    coeffs = [0.5**d for d in range(k)]
    ops.perturb_(tensors, range(k), coeffs, seed=3)
    last = noise.sample("gauss16", tensors[-1].numel(), seed=3, draw=0, tensor_id=count - 1) * 0
    for draw in range(k):
        z = noise.sample("gauss16", last.numel(), seed=3, draw=draw, tensor_id=count - 1).double()
        last = (last.double() + coeffs[draw] * z).float()
    assert torch.equal(tensors[-1], last)


def test_repeated_runs_give_the_same_bits(backend):
    results = []
    for _ in range(3):
        tensor = torch.ones(100_003)
        ops.perturb_([tensor], [0, 1], [0.1, 0.2], seed=3, law="gauss32")
        results.append(tensor)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_no_tensors_at_all(backend):
    ops.perturb_([], [0], [1.0], seed=0)


def test_moving_there_and_back_is_exact_where_rounding_is_not_needed(backend):
    tensor = torch.zeros(64)
    ops.perturb_([tensor], [0], [1.0], seed=0)
    ops.perturb_([tensor], [0], [-1.0], seed=0)
    assert torch.equal(tensor, torch.zeros(64))
