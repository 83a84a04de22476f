"""``ops.merge_step_``: the backends against the reference, bit for bit; what it refuses."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from tests.merging_cases import FLOATS, Case, check, make_step
from tests.same_bits import same_bits
from tests.test_perturb import STORAGES
from zokern import ops
from zokern.merging import METHODS, SparseTau, dense_tau, sparse_tau
from zokern.ops import steps

FORMS = [(storage, False) for storage in STORAGES] + [
    (storage, True) for storage in ("fp32", "bf16", "fp16")
]
CAPABILITIES = ("portable", "avx2", "avx512")


@pytest.fixture(params=CAPABILITIES)
def native(request, monkeypatch) -> str:
    """The native backend with each instruction set."""
    from tests.conftest import choose

    choose(f"native-{request.param}", monkeypatch)
    return "native"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("storage", "master"), FORMS)
def test_storages_and_methods(storage, master, method, native):
    dtype = STORAGES[storage][0]
    case = Case(method, storage=storage, master=master, grad=dtype, tau=dtype)
    check(case, native)
    check(replace(case, state=torch.bfloat16, starts=(1, 0, 3)), native)
    if method != "ema":
        check(replace(case, tau=None), native)
        check(replace(case, steps_k=True, sparse=True), native)


@pytest.mark.parametrize(("grad", "state", "tau"), [*product(FLOATS, repeat=3)], ids=str)
def test_dtypes(grad, state, tau, native):
    for sparse in (False, True):
        check(Case(storage="bf16", grad=grad, state=state, tau=tau, sparse=sparse), native)


@pytest.mark.parametrize("method", ["dare", "dare_paper", "ties"])
@pytest.mark.parametrize("numel", [0, 1, 5, 127, 128, 129, 4097, (1 << 16) + 130])
def test_lengths_and_sparse_buckets(method, numel, native):
    check(Case(method, sizes=[numel], sparse=True), native)


@pytest.mark.parametrize("method", ["dare", "dare_paper"])
@pytest.mark.parametrize("shard", [(0, 30, 100), (3, 7, 11), (1 << 33, 1, 5), (5, 210, 210)])
def test_shards_take_their_part_of_the_mask(method, shard, native):
    check(Case(method, sizes=[210], shards=[shard]), native)


def test_several_threads_give_the_same_bits(native):
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        check(Case(sizes=[70_001, 5, 40_000], sparse=True), native)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("numel", [0, 1, 1 << 16, (1 << 16) + 1, 200_000])
def test_a_sparse_tau_is_the_dense_one(numel):
    generator = torch.Generator().manual_seed(0)
    tau = torch.randn(numel, generator=generator)
    tau *= torch.rand(numel, generator=generator) < 0.01
    assert same_bits(dense_tau(sparse_tau(tau), tau.shape), tau + 0.0)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_it_passes_opcheck(method, sparse):
    step = make_step(Case(method, sizes=[40, 7], sparse=sparse, storage="bf16"))
    arguments = steps._flat(step, [0, 1])
    torch.library.opcheck(torch.ops.zokern.merge_step_, arguments)


def test_version_counters_go_up(backend):
    step = make_step(Case(sizes=[40], steps_k=True))
    before = {name: tensor._version for name, _, tensor in step.written()}
    ops.merge_step_(step)
    assert all(tensor._version > before[name] for name, _, tensor in step.written())


def test_operands_that_do_not_fit_are_named_and_nothing_is_written(backend):
    good = make_step(Case(sizes=[40, 7], steps_k=True))
    steps, mask = good.steps, good.mask
    long = torch.zeros(41)
    sparse = sparse_tau(torch.zeros(1 << 17))
    bad = [
        (replace(good, method="mean"), "method must be one of dare"),
        (replace(good, method="ties", mask=replace(mask, thresholds=None, cuts=None)), "magnitude"),
        (replace(good, method="ema"), "ema pulls towards a reference"),
        (replace(good, steps=replace(steps, grads=steps.grads[:1])), "grads must have 2 entries"),
        (
            replace(good, steps=replace(steps, grads=[long, steps.grads[1]])),
            r"grads\[0\].*must have the shape \(40,\)",
        ),
        (
            replace(good, steps=replace(steps, exp_avgs=[steps.exp_avgs[0].double(), long])),
            r"exp_avgs\[0\].*float64",
        ),
        (
            replace(good, steps=replace(steps, numbers=steps.numbers[:, :3])),
            "numbers must be torch.float32 of shape",
        ),
        (replace(good, mask=replace(mask, draws=mask.draws.int())), "draws must be torch.int64"),
        (replace(good, taus=[sparse, good.taus[1]]), r"taus\[0\].*not a sparse tensor of 40"),
        (
            replace(good, steps=replace(steps, cached=[steps.exp_avgs[0], steps.cached[1]])),
            "share memory",
        ),
    ]
    before = [tensor.clone() for _, _, tensor in good.written()]
    for step, message in bad:
        with pytest.raises((TypeError, ValueError), match=message):
            ops.merge_step_(step)
    assert all(same_bits(a, b) for a, (_, _, b) in zip(before, good.written(), strict=True))


def test_taus_may_be_dense_for_some_and_sparse_for_others(backend):
    case = Case(sizes=[400, 300])
    dense, mixed = make_step(case), make_step(case)
    mixed = replace(mixed, taus=[sparse_tau(mixed.taus[0]), mixed.taus[1] + 0.0])
    assert isinstance(mixed.taus[0], SparseTau)
    for step in (dense, mixed):
        ops.merge_step_(step)
    for (_, _, a), (_, _, b) in zip(dense.written(), mixed.written(), strict=True):
        assert same_bits(a, b)
