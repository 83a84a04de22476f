"""On a GPU: selections and L1 sums by the native and Triton kernels against the CPU's reference."""

from dataclasses import replace

import pytest
import torch

import zokern
from tests.same_bits import same_bits
from tests.test_selection import DTYPES, adam_steps, randn, random_mask, tensors_of_all_kinds
from zokern import ops
from zokern.merging import AdamSteps, Differences

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["native", "triton", "reference"])
def gpu_backend(request, monkeypatch):
    reason = zokern.backends.load(request.param).why_not(torch.device("cuda"))
    assert reason is None, reason
    monkeypatch.setenv("ZOKERN_BACKEND", request.param)
    return request.param


def steps_on_gpu(steps: AdamSteps) -> AdamSteps:
    assert steps.cached is not None
    return replace(
        steps,
        grads=[t.cuda() for t in steps.grads],
        exp_avgs=[t.cuda() for t in steps.exp_avgs],
        exp_avg_sqs=[t.cuda() for t in steps.exp_avg_sqs],
        cached=[t.cuda() for t in steps.cached],
    )


def check(got: tuple, wanted: tuple) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert a.is_cuda
        assert same_bits(a.cpu(), b)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thresholds(gpu_backend, dtype, joined):
    large = randn(1 << 21)
    tensors = [*tensors_of_all_kinds(dtype), large.to(dtype), (2 * large).round().to(dtype)]
    for k in (0, 1, 1000, 300_000, 5_000_000):
        got = ops.magnitude_threshold([t.cuda() for t in tensors], k, joined=joined)
        with zokern.use_backend("reference"):
            check(got, ops.magnitude_threshold(tensors, k, joined=joined))


@pytest.mark.parametrize("state", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_of_adam(gpu_backend, dtype, state):
    steps = adam_steps(dtype, state)
    got = ops.adam_threshold(steps_on_gpu(steps), 300)
    sums = ops.l1_sums(steps_on_gpu(steps), random_mask(steps.grads))
    with zokern.use_backend("reference"):
        check(got, ops.adam_threshold(steps, 300))
        check((sums,), (ops.l1_sums(steps, random_mask(steps.grads)),))


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_differences(gpu_backend, dtype, rounded):
    tensor, base = randn(300_001).to(dtype), randn(300_001, seed=1)
    on_gpu = Differences([tensor.cuda()], [base.cuda()], rounded)
    got = ops.difference_threshold(on_gpu, 10_000)
    sums = ops.l1_sums(on_gpu, random_mask([tensor]))
    with zokern.use_backend("reference"):
        values = Differences([tensor], [base], rounded)
        check(got, ops.difference_threshold(values, 10_000))
        check((sums,), (ops.l1_sums(values, random_mask([tensor])),))
