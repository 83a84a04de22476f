"""Counts of magnitudes, of which the search for the k-th largest over several ranks is made.

Values are computed some at a time, so that there is no need for much memory.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from zokern.backends.reference.values import magnitudes, values_of
from zokern.merging import EqualCounts, Histogram, Values, section_of, tensors_of

AT_ONCE = 1 << 22


def histogram(histogram: Histogram) -> Tensor:
    """int64, for each tensor a row of bins."""
    rows = []
    for i, low in enumerate(histogram.lows.tolist()):
        row = _zeros(histogram.values, histogram.bins)
        for _, magnitude in _sections(histogram.values, i):
            places = (magnitude - low) >> histogram.shift
            places = places[(places >= 0) & (places < histogram.bins)]
            row += torch.bincount(places, minlength=histogram.bins)
        rows.append(row)
    return torch.stack(rows)


def equal_counts(counts: EqualCounts) -> Tensor:
    """int64, for each tensor a row of ranges."""
    rows = []
    for i, wanted in enumerate(counts.magnitudes.tolist()):
        edges = counts.edges[i].to(tensors_of(counts.values)[i].device)
        below = torch.zeros_like(edges)
        for start, magnitude in _sections(counts.values, i):
            places = (magnitude == wanted).nonzero().flatten() + start
            below += torch.searchsorted(places, edges)
        rows.append(below.diff())
    return torch.stack(rows)


def _sections(values: Values, i: int) -> Iterator[tuple[int, Tensor]]:
    """The magnitudes of a tensor, and where they begin in it."""
    for start in range(0, tensors_of(values)[i].numel(), AT_ONCE):
        section = section_of(values, i, slice(start, start + AT_ONCE))
        yield start, magnitudes(values_of(section, 0))


def _zeros(values: Values, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64, device=tensors_of(values)[0].device)
