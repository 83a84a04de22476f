"""The bodies and the launch plans of the CUDA kernels, run over a simulated grid without a GPU."""

import random

import pytest
import torch

import zokern
from tests import test_perturb
from tests.same_bits import same_bits
from zokern import noise, ops

_C = pytest.importorskip("zokern._C", reason="zokern was built without the native core")

BLOCK = 4 * 256 * 8  # elements that a block moves where there is little to do
LAST = (8 << 32) - 40_000  # close to the last element that gauss16 counts


@pytest.fixture(autouse=True)
def _simulated_grid(monkeypatch):
    """What the native backend runs on the CPU goes to the simulated grid."""
    monkeypatch.setattr(_C, "cpu_sweep", lambda sweep, *_: _C.host_grid_sweep(sweep))
    monkeypatch.setattr(_C, "cpu_sample", lambda *arguments: _C.host_grid_sample(*arguments[:7]))
    monkeypatch.setenv("ZOKERN_BACKEND", "native")


def operands(storage: str, layout: list) -> tuple[list, list, list]:
    """Memory, and in it parameters and residuals of (elements, first element in the memory)."""
    dtype, residual_dtype = test_perturb.STORAGES[storage]
    generator = torch.Generator().manual_seed(0)
    memory, params, residuals = [], [], []
    for numel, start in layout:
        value = torch.randn(start + numel + 9, generator=generator)
        memory.append(value.to(dtype))
        params.append(memory[-1][start : start + numel])
        residuals.append(None)
        if residual_dtype is not None:
            memory.append((30 * value).to(residual_dtype))
            residuals[-1] = memory[-1][start : start + numel]
    return memory, params, residuals


def check(storage: str, layout: list, draws: list, coeffs: list, **arguments) -> None:
    """The simulated grid and the reference agree, and spare the memory around the operands."""
    results = []
    for backend in ("native", "reference"):
        memory, params, residuals = operands(storage, layout)
        with zokern.use_backend(backend):
            ops.perturb_(params, draws, coeffs, residuals=residuals, seed=2**64 - 3, **arguments)
        results.append(memory)
    for i, (got, wanted) in enumerate(zip(*results, strict=True)):
        assert same_bits(got, wanted), f"memory {i}"


@pytest.mark.parametrize("k", [1, 2, 3, 16])
@pytest.mark.parametrize("storage", test_perturb.STORAGES)
@pytest.mark.parametrize("law", test_perturb.DIRECTIONS)
def test_awkward_operands_and_special_values(law, storage, k):
    test_perturb.test_backends_agree("host grid", law, storage, k)


@pytest.mark.parametrize("k", [1, 2, 3, 16])
@pytest.mark.parametrize("storage", test_perturb.STORAGES)
@pytest.mark.parametrize("law", test_perturb.DIRECTIONS)
def test_whole_blocks(law, storage, k):
    coeffs = [0.1 + 0.01 * i for i in range(k)]
    check(storage, [(2 * BLOCK, 0)], list(range(k)), coeffs, law=law)
    check(
        storage, [(2 * BLOCK, 0)], list(range(k)), coeffs, law=law, scales=[0.9, *[1.0] * (k - 1)]
    )


@pytest.mark.parametrize("storage", test_perturb.STORAGES)
@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 2047, 2049, BLOCK - 1, BLOCK + 1, 3 * BLOCK + 5])
def test_lengths(storage, numel):
    check(storage, [(numel, 0)], [5], [0.1])


@pytest.mark.parametrize("storage", test_perturb.STORAGES)
@pytest.mark.parametrize("offset", [3, 8, 13, LAST], ids=str)
@pytest.mark.parametrize("start", [0, 1, 3, 4, 8], ids=lambda start: f"start{start}")
def test_offsets_and_alignments(storage, offset, start):
    numel = 2 * BLOCK + 10
    check(storage, [(numel, start)], [5, 6], [0.1, 0.2], shards=[(offset, numel, numel)])


@pytest.mark.parametrize("storage", test_perturb.STORAGES)
@pytest.mark.parametrize(
    ("offset", "rows", "length", "stride"),
    [
        (0, 9, 1024, 2048),
        (16, 9, 1024, 4088),
        (3, 9, 1024, 1027),
        (0, 40, 7, 9),
        (5, 1000, 1, 8),
        (5, 1000, 3, 3),
        (1, 2, 9000, 9001),
    ],
)
def test_row_shards(storage, offset, rows, length, stride):
    for start in (0, offset % 8):
        layout = [(rows * length, start), (rows * length, 0)]
        check(storage, layout, [5], [0.1], shards=[(offset, length, stride)] * 2)


@pytest.mark.parametrize(("count", "k"), [(600, 1), (300, 5), (70, 16)])
def test_more_tensors_than_a_launch_takes(count, k):
    choose = random.Random(0)
    layout = [(choose.choice([0, 1, 8, 100, 257]), choose.choice([0, 0, 1])) for _ in range(count)]
    draws = [choose.getrandbits(32) for _ in range(k)]
    ids = [choose.getrandbits(56) for _ in range(count)]
    coeffs = [[choose.uniform(-1, 1) for _ in range(k)] for _ in range(count)]
    scales = [[choose.choice([1.0, 0.5]) for _ in range(k)] for _ in range(count)]
    check("bf16", layout, draws, coeffs, scales=scales, tensor_ids=ids)
    check("bf16", layout, draws, coeffs[0], tensor_ids=ids)


def test_storages_mixed_in_one_call():
    def params():
        generator = torch.Generator().manual_seed(0)
        dtypes = [torch.float32, torch.bfloat16, torch.float16] * 3
        return [torch.randn(100, generator=generator).to(dtype) for dtype in dtypes]

    got, wanted = params(), params()
    ops.perturb_(got, [0], [0.1], seed=1)
    with zokern.use_backend("reference"):
        ops.perturb_(wanted, [0], [0.1], seed=1)
    assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True))


def test_long_blocks():
    """Where there is much to do, blocks are longer; the edges and a middle are checked."""
    numel = 4096 * 2 * BLOCK + 2 * BLOCK + 77
    moved = torch.zeros(numel, dtype=torch.bfloat16)
    ops.perturb_([moved], [7], [1.0], seed=1, law="rademacher")
    for begin in (0, 2 * BLOCK - 500, numel // 2, numel - 1000):
        z = noise.sample("rademacher", 1000, seed=1, draw=7, offset=begin)
        assert torch.equal(moved[begin : begin + 1000].float(), z)
    assert bool((moved.abs() == 1).all())


def test_the_bound_of_directions():
    tensor, wanted = torch.ones(20), torch.ones(20)
    ops.perturb_([tensor], range(1024), [1e-3] * 1024, seed=1)
    with zokern.use_backend("reference"):
        ops.perturb_([wanted], range(1024), [1e-3] * 1024, seed=1)
    assert same_bits(tensor, wanted)
    with pytest.raises(RuntimeError, match=r"1025 directions.* 1024 at most"):
        ops.perturb_([tensor], range(1025), [1e-3] * 1025, seed=1)
    assert same_bits(tensor, wanted)


def test_no_tensors_at_all():
    ops.perturb_([], [0], [1.0], seed=0)
    ops.perturb_([torch.empty(0), torch.empty(0, 3)], [0], [1.0], seed=0)


@pytest.mark.parametrize("law", noise.LAWS)
@pytest.mark.parametrize("offset", [0, 3, 8, 125, -3000], ids=str)
@pytest.mark.parametrize("numel", [0, 1, 8, 13, 3000], ids=str)
def test_samples(law, offset, numel):
    offset %= noise.LAWS[law].max_elements
    for start in (0, 1):
        memory = torch.full((numel + start + 2,), 77, dtype=noise.LAWS[law].dtype)
        out = memory[start : start + numel]
        _C.host_grid_sample(noise.LAWS[law].code, numel, 2**63, 5, 6, offset, out.data_ptr())
        with zokern.use_backend("reference"):
            wanted = noise.sample(law, numel, seed=2**63, draw=5, tensor_id=6, offset=offset)
        assert same_bits(out, wanted)
        assert memory[start + numel :].tolist() == [77, 77]
        assert memory[:start].tolist() == [77] * start
