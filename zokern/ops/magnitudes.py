"""Operations on the magnitudes of values: thresholds that keep the k largest, and L1 sums.

The values are tensors, their differences from others, or the steps that Adam is about to take (see
:mod:`zokern.merging`); each kind has its operators. As in :mod:`zokern.ops` the checks run inside
the operators.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zokern import backends
from zokern.arguments import (
    by_device,
    check_flat,
    integer,
    integers,
    pick,
    signed,
    unsigned,
)
from zokern.checks import check_adam_numbers, check_adam_step, check_difference, check_table
from zokern.merging import (
    AdamSteps,
    Differences,
    EqualCounts,
    Histogram,
    L1Sums,
    Mask,
    Selection,
    Values,
    tensors_of,
)
from zokern.sweep import Shard

Thresholds = tuple[Tensor, Tensor]
# Of a histogram.
MAX_BINS, MAGNITUDES = 1 << 16, 1 << 31


def difference_threshold(
    values: Differences,
    k: int | Sequence[int],
    *,
    joined: bool = False,
) -> Thresholds:
    """:func:`zokern.ops.magnitude_threshold` of values that may be rounded to the dtype of the
    tensors, which are no DTensors."""
    tensors, bases, rounded = values.tensors, values.bases, values.rounded
    count = len(tensors)
    if bases is not None:
        check_flat(count, bases=(bases, 1))
    counts = counts_of(k, count, joined)
    groups = list(by_device(tensors).values())
    if joined and len(groups) > 1:
        raise ValueError("tensors that are joined must be on one device")
    home = tensors[0].device if tensors else torch.device("cpu")
    results = [torch.empty(count, dtype=dtype, device=home) for dtype in _RESULTS]
    with torch.no_grad():
        for members in groups:
            found = torch.ops.zokern.magnitude_threshold(
                pick(tensors, members),
                [] if bases is None else pick(bases, members),
                rounded,
                counts if joined else pick(counts, members),
                joined,
            )
            for result, own in zip(results, found, strict=True):
                result[members] = own.to(home)
    thresholds, cuts, largest = results
    check_no_nan(tensors, largest.isnan())
    return thresholds, cuts


def adam_threshold(steps: AdamSteps, k: int | Sequence[int]) -> tuple:
    """:func:`zokern.ops.magnitude_threshold` of Adam's steps Δ, all on one device; NaN counts as
    largest."""
    count = len(steps.grads)
    counts = counts_of(k, count, False)
    with torch.no_grad():
        return torch.ops.zokern.adam_threshold(*_flat_values(steps), counts, False)[:2]


def l1_sums(values: Values, mask: Mask) -> Tensor:
    """For each tensor Σ|v| over all its values, and over those that the mask keeps.

    Accumulated so exactly that every backend gives the same sums.

    Returns:
        A float32 tensor of shape (number of tensors, 2) on the device of the values, which is one.
    """
    return exact_l1_sums(values, mask).float()


def exact_l1_sums(values: Values, mask: Mask) -> Tensor:
    """:func:`l1_sums` in float64, where the last bits may be a backend's own."""
    name = "adam_l1_sums" if isinstance(values, AdamSteps) else "magnitude_l1_sums"
    with torch.no_grad():
        return getattr(torch.ops.zokern, name)(
            *_flat_values(values),
            mask.thresholds,
            mask.cuts,
            mask.draws,
            mask.limits,
            [n for shard in mask.shards for n in shard],
            mask.tensor_ids,
            signed(mask.seed),
        )


def histogram(values: Values, lows: Tensor, shift: int, bins: int) -> Tensor:
    """How many magnitudes lie in each bin, see :class:`zokern.merging.Histogram`.

    Returns:
        An int64 tensor of shape (number of tensors, bins) on the device of the values.
    """
    name = "adam_histogram" if isinstance(values, AdamSteps) else "magnitude_histogram"
    with torch.no_grad():
        return getattr(torch.ops.zokern, name)(*_flat_values(values), lows, shift, bins)


def equal_counts(values: Values, magnitudes: Tensor, edges: Tensor) -> Tensor:
    """How many values have a magnitude, see :class:`zokern.merging.EqualCounts`.

    Returns:
        An int64 tensor of shape (number of tensors, ranges) on the device of the values.
    """
    name = "adam_equal_counts" if isinstance(values, AdamSteps) else "magnitude_equal_counts"
    with torch.no_grad():
        return getattr(torch.ops.zokern, name)(*_flat_values(values), magnitudes, edges)


def counts_of(k: int | Sequence[int], count: int, joined: bool) -> list[int]:
    wanted = 1 if joined else count
    if not isinstance(k, Sequence):
        return [integer("k", k, bits=63)] * wanted
    if len(k) != wanted:
        what = "tensors that are joined" if joined else f"{count} tensors"
        raise ValueError(f"k must be one number or {wanted} for {what}; it has {len(k)}")
    return integers("k", k, bits=63)


def check_no_nan(tensors: Sequence[Tensor], nan: Tensor) -> None:
    """Raises ValueError, naming it, for a tensor that is said to have some."""
    if nan.any():
        i = int(nan.nonzero()[0])
        shape, dtype = tuple(tensors[i].shape), tensors[i].dtype
        raise ValueError(f"tensors[{i}] (shape {shape}, {dtype}): its values have NaN")


def _flat_values(values: Values) -> tuple:
    """The first arguments of the kind's operators."""
    if isinstance(values, Differences):
        return values.tensors, values.bases or [], values.rounded
    moments = values.exp_avgs, values.exp_avg_sqs, values.cached or []
    return values.grads, *moments, values.numbers, values.merges


def _differences(tensors: list[Tensor], bases: list[Tensor], rounded: bool) -> Differences:
    if bases:
        check_flat(len(tensors), bases=(bases, 1))
    values = Differences(tensors, bases or None, rounded)
    for i in range(len(tensors)):
        check_difference(values, i)
    return values


def _adam_steps(
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    cached: list[Tensor],
    numbers: Tensor,
    merges: Tensor,
) -> AdamSteps:
    count = len(grads)
    check_flat(count, exp_avgs=(exp_avgs, 1), exp_avg_sqs=(exp_avg_sqs, 1))
    if cached:
        check_flat(count, cached=(cached, 1))
    steps = AdamSteps(grads, exp_avgs, exp_avg_sqs, cached or None, numbers, merges)
    check_adam_numbers(steps)
    for i in range(count):
        check_adam_step(steps, i)
    return steps


def _selection(values: Values, k: list[int], joined: bool) -> Selection:
    count = 1 if joined else _length(values)
    if len(k) != count:
        raise ValueError(f"k must have {count} entries, not {len(k)}")
    return Selection(values, integers("k", k, bits=63), joined)


def _sums(
    values: Values,
    thresholds: Tensor | None,
    cuts: Tensor | None,
    draws: Tensor,
    limits: Tensor,
    shards: list[int],
    tensor_ids: list[int],
    seed: int,
) -> L1Sums:
    count = _length(values)
    check_flat(count, shards=(shards, 3), tensor_ids=(tensor_ids, 1))
    if (thresholds is None) != (cuts is None):
        raise ValueError("thresholds and cuts go together")
    if thresholds is not None and cuts is not None:
        check_table("thresholds", thresholds, torch.float32, (count,))
        check_table("cuts", cuts, torch.int64, (count,))
    check_table("draws", draws, torch.int64, (count,))
    check_table("limits", limits, torch.int64, (count,))
    own = [Shard(*shards[3 * i : 3 * i + 3]) for i in range(count)]
    ids = integers("tensor_ids", tensor_ids, bits=56)
    return L1Sums(values, Mask(thresholds, cuts, draws, limits, own, ids, unsigned(seed)))


def _histogram(values: Values, lows: Tensor, shift: int, bins: int) -> Histogram:
    check_table("lows", lows, torch.int64, (_length(values),))
    if not (1 <= bins <= MAX_BINS and shift >= 0 and bins << shift <= MAGNITUDES):
        raise ValueError(
            f"bins must be from 1 to {MAX_BINS}, and of all magnitudes at most, not {bins} of "
            f"2^{shift}"
        )
    return Histogram(values, lows, shift, bins)


def _equal_counts(values: Values, magnitudes: Tensor, edges: Tensor) -> EqualCounts:
    count = _length(values)
    check_table("magnitudes", magnitudes, torch.int64, (count,))
    if edges.dim() != 2 or edges.shape[1] < 2:
        raise ValueError(f"edges must be a row of 2 or more for each tensor, not {edges.shape}")
    check_table("edges", edges, torch.int64, (count, edges.shape[1]))
    return EqualCounts(values, magnitudes, edges)


def _length(values: Values) -> int:
    return len(tensors_of(values))


def _device(values: Values) -> torch.device:
    tensors = tensors_of(values)
    return tensors[0].device if tensors else torch.device("cpu")


# Of a selection: thresholds, cuts and, for the sake of NaN, the largest magnitudes.
_RESULTS = (torch.float32, torch.int64, torch.float32)


def _empty_results(selection: Selection) -> tuple[Tensor, ...]:
    count, device = _length(selection.values), _device(selection.values)
    return tuple(torch.empty(count, dtype=dtype, device=device) for dtype in _RESULTS)


def _run_select(selection: Selection) -> tuple[Tensor, ...]:
    if _length(selection.values) == 0:
        return _empty_results(selection)
    return backends.select(_device(selection.values)).select(selection)


def _empty_sums(sums: L1Sums) -> Tensor:
    shape = _length(sums.values), 2
    return torch.empty(shape, dtype=torch.float64, device=_device(sums.values))


def _run_l1_sums(sums: L1Sums) -> Tensor:
    if _length(sums.values) == 0:
        return _empty_sums(sums)
    return backends.select(_device(sums.values)).l1_sums(sums)


def _empty_counts(values: Values, columns: int) -> Tensor:
    shape = _length(values), columns
    return torch.empty(shape, dtype=torch.int64, device=_device(values))


def _empty_histogram(histogram: Histogram) -> Tensor:
    return _empty_counts(histogram.values, histogram.bins)


def _run_histogram(histogram: Histogram) -> Tensor:
    if _length(histogram.values) == 0:
        return _empty_histogram(histogram)
    return backends.select(_device(histogram.values)).histogram(histogram)


def _empty_equal_counts(counts: EqualCounts) -> Tensor:
    return _empty_counts(counts.values, counts.edges.shape[1] - 1)


def _run_equal_counts(counts: EqualCounts) -> Tensor:
    if _length(counts.values) == 0:
        return _empty_equal_counts(counts)
    return backends.select(_device(counts.values)).equal_counts(counts)


def _register(name: str, schema: str, read: Callable, run: Callable, fake: Callable) -> None:
    torch.library.define(name, schema)
    torch.library.impl(name, "CompositeExplicitAutograd")(lambda *args: run(read(*args)))
    torch.library.register_fake(name)(lambda *args: fake(read(*args)))


def _register_kind(kind: str, operands: str, read: Callable[..., Values]) -> None:
    """The operators on values of a kind, of which the schema's first arguments are the operands."""
    n = len(operands.split(","))
    _register(
        f"zokern::{kind}_threshold",
        f"({operands}, int[] k, bool joined) -> (Tensor, Tensor, Tensor)",
        lambda *args: _selection(read(*args[:n]), *args[n:]),
        _run_select,
        _empty_results,
    )
    _register(
        f"zokern::{kind}_l1_sums",
        f"({operands}, Tensor? thresholds, Tensor? cuts, Tensor draws, Tensor limits, int[] shards,"
        " int[] tensor_ids, int seed) -> Tensor",
        lambda *args: _sums(read(*args[:n]), *args[n:]),
        _run_l1_sums,
        _empty_sums,
    )
    _register(
        f"zokern::{kind}_histogram",
        f"({operands}, Tensor lows, int shift, int bins) -> Tensor",
        lambda *args: _histogram(read(*args[:n]), *args[n:]),
        _run_histogram,
        _empty_histogram,
    )
    _register(
        f"zokern::{kind}_equal_counts",
        f"({operands}, Tensor magnitudes, Tensor edges) -> Tensor",
        lambda *args: _equal_counts(read(*args[:n]), *args[n:]),
        _run_equal_counts,
        _empty_equal_counts,
    )


_register_kind("magnitude", "Tensor[] tensors, Tensor[] bases, bool rounded", _differences)
_register_kind(
    "adam",
    "Tensor[] grads, Tensor[] exp_avgs, Tensor[] exp_avg_sqs, Tensor[] cached, Tensor numbers,"
    " Tensor merges",
    _adam_steps,
)
