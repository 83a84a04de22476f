"""Counts of magnitudes: by the native core on a CPU, by the reference elsewhere."""

import torch
from torch import Tensor

import zokern._C as _C
from zokern.backends.native.capability import cpu_capability
from zokern.backends.native.values import PackedValues, pack_values
from zokern.backends.reference import counts as reference
from zokern.merging import EqualCounts, Histogram


def histogram(histogram: Histogram) -> Tensor:
    packed = pack_values(histogram.values)
    if packed.device.type != "cpu":
        return reference.histogram(histogram)
    out, lows = _rows(packed, histogram.bins), histogram.lows.cpu().contiguous()
    numbers = lows.data_ptr(), histogram.shift, histogram.bins
    _C.cpu_histogram(
        packed.values, *numbers, out.data_ptr(), cpu_capability(), torch.get_num_threads()
    )
    return out


def equal_counts(counts: EqualCounts) -> Tensor:
    packed = pack_values(counts.values)
    if packed.device.type != "cpu":
        return reference.equal_counts(counts)
    ranges = counts.edges.shape[1] - 1
    magnitudes, edges = counts.magnitudes.cpu().contiguous(), counts.edges.cpu().contiguous()
    out, numbers = _rows(packed, ranges), (magnitudes.data_ptr(), edges.data_ptr(), ranges)
    _C.cpu_equal_counts(
        packed.values, *numbers, out.data_ptr(), cpu_capability(), torch.get_num_threads()
    )
    return out


def _rows(packed: PackedValues, columns: int) -> Tensor:
    return torch.empty(packed.count, columns, dtype=torch.int64)
