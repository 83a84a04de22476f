"""The CUDA kernels of the merging optimizers' steps, over a simulated grid without a GPU."""

import random
from dataclasses import replace
from itertools import product

import pytest
import torch

from tests.merging_cases import FLOATS, Case, check, make_step
from tests.same_bits import same_bits
from tests.test_perturb import STORAGES
from zokern import ops
from zokern.laws import LAWS
from zokern.merging import METHODS, SparseTau

_C = pytest.importorskip("zokern._C", reason="zokern was built without the native core")

BLOCK = 4 * 256 * 8  # elements that a block takes where there is little to do
LAST = LAWS["uniform32"].max_elements - 40_000
FORMS = [(storage, False) for storage in STORAGES] + [
    (storage, True) for storage in ("fp32", "bf16", "fp16")
]


@pytest.fixture(autouse=True)
def _simulated_grid(monkeypatch):
    """What the native backend runs on the CPU goes to the simulated grid."""
    monkeypatch.setattr(_C, "cpu_merge_step", lambda step, *_: _C.host_grid_merge_step(step))


@pytest.mark.parametrize("steps_k", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("storage", "master"), FORMS)
def test_storages_and_methods(storage, master, method, steps_k):
    if steps_k and method == "ema":
        pytest.skip("ema caches nothing")
    dtype = STORAGES[storage][0]
    case = Case(method, storage=storage, master=master, steps_k=steps_k, grad=dtype, tau=dtype)
    check(case, "native")
    check(replace(case, state=torch.bfloat16, starts=(1, 0, 3)), "native")
    if method != "ema":
        check(replace(case, tau=None), "native")


@pytest.mark.parametrize(("grad", "state", "tau"), [*product(FLOATS, repeat=3)], ids=str)
def test_dtypes(grad, state, tau):
    for sparse in (False, True):
        check(Case(storage="bf16", grad=grad, state=state, tau=tau, sparse=sparse), "native")


@pytest.mark.parametrize("method", ["dare", "dare_paper", "ties_paper"])
@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 2047, 2049, BLOCK - 1, BLOCK + 1, 3 * BLOCK + 5])
def test_lengths(method, numel):
    check(Case(method, sizes=[numel], storage="bf16"), "native")


@pytest.mark.parametrize("method", ["dare_paper", "ties"])
@pytest.mark.parametrize(("storage", "master"), FORMS)
@pytest.mark.parametrize("offset", [0, 3, 8, LAST], ids=str)
@pytest.mark.parametrize("starts", [(0,), (3,), (5,), (8, 1, 0, 0, 4)], ids=str)
def test_offsets_and_alignments(method, storage, master, offset, starts):
    numel = BLOCK + 10
    shards = [(offset, numel, numel)]
    case = Case(method, [numel], storage, master, steps_k=True, shards=shards, starts=starts)
    check(case, "native")


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("method", ["dare_paper", "ties"])
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
def test_row_shards(method, sparse, offset, rows, length, stride):
    shards = [(offset, length, stride)] * 3
    case = Case(method, [rows * length] * 3, "bf16", sparse=sparse, shards=shards)
    check(case, "native")
    check(replace(case, starts=(offset % 8,)), "native")


@pytest.mark.parametrize("method", ["ties_paper", "ema"])
@pytest.mark.parametrize("shard", [(0, 70_001, 70_001), (3, 70_001, 70_001), (5, 35_003, 40_000)])
def test_sparse_octets_that_straddle_two_buckets(method, shard):
    numel = 70_001 if shard[1] == 70_001 else 4 * 35_003
    check(Case(method, [numel, numel], sparse=True, shards=[shard] * 2), "native")


def test_sparse_without_elements():
    case = Case(sizes=[100, 70_000], sparse=True)

    def emptied(step):
        taus = [SparseTau(tau.starts.zero_(), tau.places[:0], tau.values[:0]) for tau in step.taus]
        return replace(step, taus=taus)

    check(case, "native", change=emptied)


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("method", ["dare", "ties"])
def test_more_tensors_than_a_launch_takes(method, master):
    choose = random.Random(0)
    sizes = [choose.choice([0, 1, 8, 100, 257]) for _ in range(400)]
    check(Case(method, sizes, "bf16", master, steps_k=True, starts=(0, 1)), "native")


@pytest.mark.parametrize("grid", [True, False])
def test_ema_pulls_on_every_step(grid, monkeypatch):
    if not grid:
        monkeypatch.undo()

    def between_merges(step):
        merges = torch.zeros_like(step.steps.merges)
        return replace(step, steps=replace(step.steps, merges=merges))

    check(Case("ema"), "native", change=between_merges)


def test_what_is_kept_at_random_takes_no_thresholds():
    step = make_step(Case("ties"))
    before = [param.clone() for param in step.params]
    with pytest.raises(ValueError, match="dare masks at random: it takes no thresholds"):
        ops.merge_step_(replace(step, method="dare"))
    assert all(map(same_bits, step.params, before))
