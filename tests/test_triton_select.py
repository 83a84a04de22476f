"""Triton's selections and L1 sums in many small blocks.

That they agree with the reference in ordinary blocks is in test_selection.py.
"""

import pytest
import torch

import zokern
from tests.conftest import choose
from tests.same_bits import same_bits
from tests.test_selection import DTYPES, adam_steps, check_same, randn, random_mask
from zokern import ops
from zokern.merging import Differences

pytest.importorskip("triton")

from zokern.backends.triton import values


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
    tensors = [tied(1500), tied(701)[1:], torch.empty(0), tied(900).bfloat16(), torch.ones(130)]
    for k in (120, 700, 2000):
        check_same(ops.magnitude_threshold, tensors, k, joined=joined)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_place_of_the_cut(dtype):
    value = torch.ones(1000, dtype=dtype)
    for k in (1, 128, 129, 500, 999):
        assert ops.magnitude_threshold([value], k)[1].tolist() == [k if k < 1000 else 1000]


def test_steps_and_differences():
    check_same(ops.adam_threshold, adam_steps(torch.bfloat16, torch.float32), 300)
    value, base = randn(1303).half(), randn(1303, seed=1).bfloat16()
    check_same(ops.difference_threshold, Differences([value], [base], rounded=True), 400)


def test_sums():
    tensors = [randn(2000), randn(9, 131).bfloat16(), randn(801)[1:].half()]
    mask = random_mask(tensors)
    got = ops.l1_sums(Differences(tensors), mask)
    with zokern.use_backend("reference"):
        assert same_bits(got, ops.l1_sums(Differences(tensors), mask))
