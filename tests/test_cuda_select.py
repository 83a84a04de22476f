"""The CUDA kernels of selections and L1 sums over a simulated grid, without a GPU."""

import pytest
import torch

import zokern
from tests import test_selection
from tests.same_bits import same_bits
from tests.test_selection import DTYPES, adam_steps, check_same, randn
from zokern import ops
from zokern.merging import Differences

_C = pytest.importorskip("zokern._C", reason="zokern was built without the native core")

# Of a block: an H100's, and too little for a first digit of 15 bits.
SHARED_BYTES = [227 << 10, 99 << 10]
# From so many elements on the digits have 15 and 16 bits, 11 and 10, before that 8.
LARGE, MIDDLE = 1 << 19, 1 << 14


@pytest.fixture(autouse=True, params=SHARED_BYTES, ids=lambda b: f"{b >> 10}KB")
def _simulated_grid(monkeypatch, request):
    """What the native backend runs on the CPU goes to the simulated grid."""

    def select(selection, thresholds, cuts, largest, capability, threads):
        _C.host_grid_select(selection, thresholds, cuts, largest, request.param)

    monkeypatch.setattr(_C, "cpu_select", select)
    monkeypatch.setattr(_C, "cpu_l1_sums", lambda sums, out, *_: _C.host_grid_l1_sums(sums, out))
    monkeypatch.setenv("ZOKERN_BACKEND", "native")


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_awkward_tensors(dtype, joined):
    test_selection.test_backends_agree("host grid", dtype, joined)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [MIDDLE - 1, MIDDLE, MIDDLE + 9, LARGE - 1, LARGE, LARGE + 17])
def test_every_width_of_digits(dtype, numel):
    value = randn(numel)
    tied = (3 * value).round()
    for tensor in (value, tied, torch.full((numel,), 0.3)):
        for k in (1, numel // 3, numel - 1):
            check_same(ops.magnitude_threshold, [tensor.to(dtype)], k)


def test_tensors_of_every_width_in_one_call():
    tensors = [randn(LARGE), randn(3), torch.empty(0), (2 * randn(MIDDLE)).round().bfloat16()]
    for k in (1, 2, 1000, 10_000):
        check_same(ops.magnitude_threshold, tensors, k)
        check_same(ops.magnitude_threshold, tensors, k, joined=True)


def test_ties_across_blocks_and_tensors():
    tensors = [torch.ones(70_000), torch.ones(30_001, dtype=torch.bfloat16), torch.ones(9)]
    for k in (1, 69_999, 70_000, 70_001, 100_001, 100_009):
        check_same(ops.magnitude_threshold, tensors, k, joined=True)


def test_more_tensors_than_a_launch_takes():
    tensors = [randn(1 + i % 40, seed=i) for i in range(1100)]
    k = [i % 7 for i in range(1100)]
    check_same(ops.magnitude_threshold, tensors, k)
    check_same(ops.magnitude_threshold, tensors, 5000, joined=True)
    mask = test_selection.random_mask(tensors)
    got = ops.l1_sums(Differences(tensors), mask)
    with zokern.use_backend("reference"):
        assert same_bits(got, ops.l1_sums(Differences(tensors), mask))


@pytest.mark.parametrize("start", [0, 1, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alignments(dtype, start):
    value, base = randn(20_009).to(dtype)[start:], randn(20_010, seed=1).to(dtype)[1 + start :]
    check_same(ops.magnitude_threshold, [value], 777, bases=[base])


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_differences(dtype, rounded):
    for base_dtype in DTYPES:
        test_selection.test_differences("host grid", dtype, base_dtype, rounded)


@pytest.mark.parametrize("state", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_of_adam(dtype, state):
    for cached in (False, True):
        steps = adam_steps(dtype, state, cached)
        for k in (0, 1, 300, 900, 5000):
            check_same(ops.adam_threshold, steps, k)


def test_nan_is_seen():
    test_selection.test_nan_is_an_error_that_names_the_tensor("host grid", 0x7F800001, False)
    test_selection.test_a_step_that_is_nan_counts_as_largest("host grid")


def test_sums():
    test_selection.test_sums_by_threshold_are_exact("host grid")
    test_selection.test_sums_at_random_are_exact("host grid")
    for dtype in DTYPES:
        test_selection.test_sums_agree("host grid", dtype)
    value = randn(3_000_001)
    mask = test_selection.random_mask([value, value, value])
    got = ops.l1_sums(Differences([value] * 3), mask)
    assert same_bits(got[0, 0], test_selection.exact_sum(value))
