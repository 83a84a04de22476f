"""A merging step in Triton: many small blocks, and every path through the kernel."""

from dataclasses import replace

import pytest
import torch

from tests.conftest import choose
from tests.merging_cases import FLOATS, Case, check
from tests.test_perturb import STORAGES
from zokern.laws import LAWS
from zokern.merging import METHODS, SparseTau

pytest.importorskip("triton")

from zokern.backends.triton import merging

# The interpreter computes with NumPy, which warns of what is not finite.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A tensor of whole octets, one that begins in an octet, one of rows of whole octets, and of others.
SIZES = (3 * 131, 256, 0, 1, 140, 5 * 32, 11 * 7, 300)
SHARDS = (
    (0, 3 * 131, 3 * 131),
    (1 << 20, 256, 256),
    (0, 1, 1),
    (0, 1, 1),
    (4093, 140, 140),
    (24, 32, 40),
    (3, 7, 9),
    (LAWS["uniform32"].max_elements - 300, 300, 300),
)
MANY = Case(sizes=SIZES, shards=SHARDS)


@pytest.fixture(autouse=True)
def _needs_triton(monkeypatch):
    choose("triton", monkeypatch, DEVICE)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of two tiles of 128 elements, so that small tensors have several of both."""
    if DEVICE != "cpu":
        pytest.skip("a GPU's tiles are as large as its vectors ask")
    monkeypatch.setattr(merging, "_tile", lambda octets: (16, 1))
    monkeypatch.setattr(merging, "MAX_TILES", 2)
    monkeypatch.setattr(merging, "BLOCKS", 1)


# An average caches nothing.
@pytest.mark.parametrize(
    ("method", "steps_k"),
    [(method, k) for method in METHODS for k in (False, True) if not (k and method == "ema")],
)
def test_every_method(small_blocks, method, steps_k):
    case = replace(MANY, method=method, steps_k=steps_k)
    check(case, "triton", DEVICE)
    check(replace(case, storage="bf16", starts=(1, 0, 3)), "triton", DEVICE)


@pytest.mark.parametrize("storage", STORAGES)
def test_every_storage(small_blocks, storage):
    check(replace(MANY, storage=storage, method="dare_paper"), "triton", DEVICE)


@pytest.mark.parametrize("storage", ["fp32", "bf16", "fp16"])
def test_masters(small_blocks, storage):
    case = replace(MANY, storage=storage, master=True, method="ties", steps_k=True)
    check(case, "triton", DEVICE)
    check(replace(case, starts=(0, 0, 1)), "triton", DEVICE)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_dtype_of_what_is_read(small_blocks, dtype, sparse):
    others = dict(zip(FLOATS, FLOATS[1:] + FLOATS[:1], strict=True))
    case = replace(MANY, grad=dtype, state=others[dtype], tau=others[others[dtype]], sparse=sparse)
    check(case, "triton", DEVICE)


@pytest.mark.parametrize("method", ["dare", "ties_paper"])
def test_without_tau(small_blocks, method):
    check(replace(MANY, method=method, tau=None), "triton", DEVICE)


@pytest.mark.parametrize("method", ["dare_paper", "ties"])
@pytest.mark.parametrize("offset", [0, 3])
def test_sparse_tensors_of_several_buckets(method, offset):
    numel = (2 << 16) + 77
    case = Case(method, [numel, 5], sparse=True, shards=[(offset, numel, numel), (0, 5, 5)])
    check(case, "triton", DEVICE)


def test_sparse_buckets_that_are_full_or_empty():
    numel = (2 << 16) + 77
    places = torch.arange(1 << 16).to(torch.uint16).view(torch.int16)
    values = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))

    def change(step):
        device = step.params[0].device
        starts = torch.tensor([0, 1 << 16, 1 << 16, 1 << 16])
        full = SparseTau(*(tensor.to(device) for tensor in (starts, places, values)))
        none = SparseTau(torch.zeros_like(full.starts), full.places[:0], full.values[:0])
        return replace(step, taus=[full, none])

    check(Case(sizes=[numel, numel]), "triton", DEVICE, change)


def test_ema_pulls_on_every_step():
    def between_merges(step):
        merges = torch.zeros_like(step.steps.merges)
        return replace(step, steps=replace(step.steps, merges=merges))

    check(Case("ema"), "triton", DEVICE, between_merges)


def test_numbers_that_are_zeros():
    """A zero has the sign that it has in the reference."""

    def change(step):
        numbers = step.steps.numbers.clone()
        numbers[:, [6, 8, 12]] = 0.0  # step, alpha, clip
        grads = [torch.zeros_like(grad) for grad in step.steps.grads]
        for param in step.params:
            param.fill_(-0.0)
        return replace(step, steps=replace(step.steps, numbers=numbers, grads=grads))

    for method in METHODS:
        check(Case(method, steps_k=method != "ema"), "triton", DEVICE, change)
