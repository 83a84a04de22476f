"""Triton's selections and L1 sums in many small blocks.

That they agree with the reference in ordinary blocks too is in test_selection.py.
"""

import pytest
import torch

import zokern
from tests.conftest import choose
from tests.test_selection import (
    DATA,
    DTYPES,
    adam_steps,
    check_same,
    mask_by_threshold,
    randn,
    random_mask,
)
from zokern import ops
from zokern.merging import Differences

pytest.importorskip("triton")

from zokern.backends.triton import values

# Rows of a larger tensor, an element, none, and the one at its first step.
SMALL = [(20, 15), (1,), (0,), (140,)]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks of a few tiles of 128 elements, so that small tensors have several of both."""
    choose("triton", monkeypatch)
    monkeypatch.setattr(values, "interpreted_tile", lambda octets: 16)
    monkeypatch.setattr(values, "BLOCKS", 4)


def tied(numel: int) -> torch.Tensor:
    return (2 * randn(numel)).round()


@pytest.mark.parametrize("joined", [False, True])
def test_ties_across_tiles_blocks_and_tensors(joined):
    tensors = [tied(700), tied(301)[1:], torch.empty(0), tied(400).bfloat16(), torch.ones(130)]
    for k in (60, 300, 900):
        check_same(ops.magnitude_threshold, tensors, k, joined=joined)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_of_all_kinds(dtype, joined):
    tensors = [value.flatten()[:200].to(dtype) for value in DATA.values()]
    check_same(ops.magnitude_threshold, tensors, 600 if joined else 77, joined=joined)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_place_of_the_cut(dtype):
    value = torch.ones(400, dtype=dtype)
    for k in (1, 128, 129, 200, 399):
        assert ops.magnitude_threshold([value], k)[1].tolist() == [k]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("state", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_of_adam(dtype, state, cached):
    check_same(ops.adam_threshold, adam_steps(dtype, state, cached, SMALL), 30)


def test_differences():
    value, base = randn(303).half(), randn(303, seed=1).bfloat16()
    check_same(ops.difference_threshold, Differences([value], [base], rounded=True), 100)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums(dtype):
    steps = adam_steps(dtype, dtype, shapes=SMALL)
    tensors = [randn(400).to(dtype), randn(9, 31).to(dtype), randn(301)[1:].to(dtype)]
    bases = [0.9 * tensor.float() for tensor in tensors]
    with zokern.use_backend("reference"):
        thresholds, cuts = ops.magnitude_threshold(tensors, 100)
    by_threshold = mask_by_threshold(tensors, thresholds, cuts)
    for given, mask in (
        (steps, random_mask(steps.grads)),
        (Differences(tensors), by_threshold),
        (Differences(tensors, bases), random_mask(tensors)),
        (Differences(tensors, bases, rounded=True), by_threshold),
    ):
        check_same(lambda *both: (ops.l1_sums(*both),), given, mask)
