"""Thresholds and sums of full tensors of which each rank has a part.

The ranks tell each other how many elements lie where, and never the elements: all find the same
answer, that of the full tensor.
"""

import binascii
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from zokern import sharding
from zokern.arguments import check_flat, pick, positions, tensor_list
from zokern.merging import AdamSteps, Differences, Mask, Values, some_of, tensors_of
from zokern.ops.magnitudes import (
    Thresholds,
    adam_threshold,
    check_no_nan,
    counts_of,
    difference_threshold,
    equal_counts,
    exact_l1_sums,
    histogram,
)
from zokern.sharding import Groups, Part

# A magnitude has 31 bits, of which a round of messages finds so many.
MAGNITUDE_BITS = (11, 10, 10)
# Likewise of the index of an element.
INDEX_BITS = 12
# The threshold that no magnitude is above: with a cut of 0 nothing is kept.
NOTHING = 0x7FFFFFFF
# Of greater magnitude is only what is not a number.
INFINITY = 0x7F800000


def magnitude_threshold(
    tensors: Iterable[Tensor],
    k: int | Sequence[int],
    *,
    bases: Iterable[Tensor] | None = None,
    joined: bool = False,
) -> Thresholds:
    """The thresholds that keep exactly the k elements of largest magnitude, without a sort.

    With values v = x, or x - base in float32, the k-th largest ``|v|`` is the threshold t, and an
    element of index i (in row-major order) is kept iff ::

        |v[i]| > t    or    |v[i]| == t and i < cut

    so that of equal magnitudes those of lower index are kept: min(k, numel) elements, the same on
    every backend and device. The mask of a tensor ``x`` ::

        (t,), (cut,) = magnitude_threshold([x], k)
        index = torch.arange(x.numel(), device=x.device).view(x.shape)
        mask = (x.float().abs() > t) | ((x.float().abs() == t) & (index < cut))

    Args:
        tensors: float32, bfloat16 or float16 tensors x, in any memory format. A DTensor counts as
            its full tensor, of which all ranks that have parts must ask; its cut is that of this
            rank's part.
        k: how many to keep, 0 ≤ k, of all tensors alike or of each.
        bases: a tensor (float32, bfloat16 or float16) of each x's shape, placed like it.
        joined: keep k elements in all, as if the tensors were one, in their order. They must be on
            one device, and no DTensors.

    Returns:
        ``thresholds`` (float32) and ``cuts`` (int64) of shape (len(tensors),), on the device of the
        tensors (of the first one). Where k is 0 the threshold is NaN and the cut 0; where k is at
        least the number of elements they are 0 and that number.

    Raises:
        TypeError, ValueError: for an argument out of range or a tensor whose values have NaN,
            naming it.
    """
    tensors = tensor_list("tensors", tensors)
    bases = None if bases is None else tensor_list("bases", bases)
    if not any(map(sharding.is_dtensor, tensors)):
        return difference_threshold(Differences(tensors, bases), k, joined=joined)
    if joined:
        raise ValueError("DTensors cannot be joined")
    check_flat(len(tensors), bases=(bases or tensors, 1))
    for i, (tensor, base) in enumerate(zip(tensors, bases or tensors, strict=True)):
        if not sharding.is_placed_like(base, tensor):
            raise ValueError(f"bases[{i}] must be a DTensor that is placed like tensors[{i}]")
    own = Differences(_own(tensors), None if bases is None else _own(bases))
    parts = [sharding.describe(tensor) for tensor in tensors]
    with torch.no_grad():
        thresholds, cuts = threshold_of_parts(own, counts_of(k, len(tensors), False), parts)
        check_no_nan(tensors, _have_nan(own, parts))
    return thresholds, cuts


def _own(tensors: list[Tensor]) -> list[Tensor]:
    return [sharding.local(tensor) for tensor in tensors]


def _have_nan(values: Differences, parts: Sequence[Part]) -> Tensor:
    """Which of the full tensors have values that are NaN."""
    above_infinity = torch.full((len(parts),), INFINITY + 1)
    counts = histogram(values, above_infinity, 23, 1).cpu()
    for groups, members in positions(part.groups for part in parts).items():
        counts[members] = sharding.total(counts[members], groups)
    return counts.flatten() > 0


def adam_threshold_of_parts(
    steps: AdamSteps, k: Sequence[int], parts: Sequence[Part]
) -> Thresholds:
    """:func:`adam_threshold` of full tensors, by all ranks that have parts of them.

    Every rank asks for the same tensors in the same order. Cuts are those of this rank's part, in
    its own row-major order.
    """
    shared = [i for i, part in enumerate(parts) if part.groups]
    if not shared:
        return adam_threshold(steps, k)
    device = steps.grads[0].device
    thresholds = torch.empty(len(parts), device=device)
    cuts = torch.empty(len(parts), dtype=torch.int64, device=device)
    alone = [i for i, part in enumerate(parts) if not part.groups]
    if alone:
        thresholds[alone], cuts[alone] = adam_threshold(some_of(steps, alone), pick(k, alone))
    found = threshold_of_parts(some_of(steps, shared), pick(k, shared), pick(parts, shared))
    thresholds[shared], cuts[shared] = found
    return thresholds, cuts


def threshold_of_parts(values: Values, k: Sequence[int], parts: Sequence[Part]) -> Thresholds:
    """The thresholds that keep the k largest magnitudes of full tensors; NaN counts as largest.

    Returns:
        The thresholds, and the cuts of this rank's parts, as :func:`magnitude_threshold`.

    Raises:
        RuntimeError: on all ranks, where they ask for different tensors.
    """
    tensors = tensors_of(values)
    magnitudes = torch.zeros(len(parts), dtype=torch.int64)
    cuts = torch.tensor([tensor.numel() for tensor in tensors])
    nothing = [i for i, wanted in enumerate(k) if wanted == 0]
    magnitudes[nothing], cuts[nothing] = NOTHING, 0
    searched = [i for i, part in enumerate(parts) if 0 < k[i] < part.numel]
    for groups, places in positions(parts[i].groups for i in searched).items():
        members = pick(searched, places)
        some, own = some_of(values, members), pick(parts, members)
        check_alike([(part.numel, k[i]) for part, i in zip(own, members, strict=True)], groups)
        magnitudes[members], kept, equals = _kth_largest(some, pick(k, members), own, groups)
        cutting = (kept < equals).nonzero().flatten().tolist()
        if cutting:
            tied = pick(members, cutting)
            cuts[tied] = _cuts(
                some_of(values, tied), magnitudes[tied], kept[cutting], pick(parts, tied), groups
            )
    device = tensors[0].device
    return magnitudes.int().view(torch.float32).to(device), cuts.to(device)


def l1_sums_of_parts(values: Values, mask: Mask, parts: Sequence[Part]) -> Tensor:
    """:func:`l1_sums` of full tensors, by all ranks that have parts of them."""
    sums = exact_l1_sums(values, mask)
    for groups, members in positions(part.groups for part in parts).items():
        if groups:
            check_alike([parts[i].numel for i in members], groups)
    return sharding.exact_totals(sums, [part.groups for part in parts]).float()


def check_alike(asked: list, groups: Groups) -> None:
    """Raises RuntimeError on all ranks where they ask for different things."""
    own = torch.tensor(binascii.crc32(repr(asked).encode()))
    every = sharding.gathered(own, groups).tolist()
    if len(set(every)) > 1:
        raise RuntimeError(
            "the ranks that have parts of the same tensors must step the same ones in the same "
            f"order, by the same hyper-parameters: this one steps {len(asked)}; does one of them "
            "lack gradients?"
        )


def _kth_largest(
    values: Values, k: Sequence[int], parts: Sequence[Part], groups: Groups
) -> tuple[Tensor, Tensor, Tensor]:
    """The magnitudes, how many of the elements that have them are kept, and how many there are."""

    def count(lows: Tensor, shift: int, bins: int) -> Tensor:
        return sharding.total(histogram(values, lows, shift, bins).cpu(), groups)

    ranks = torch.tensor([part.numel - n + 1 for n, part in zip(k, parts, strict=True)])
    magnitude, rank, equals = _search(count, ranks, MAGNITUDE_BITS)
    return magnitude, equals - rank + 1, equals


def _cuts(
    values: Values, magnitudes: Tensor, kept: Tensor, parts: Sequence[Part], groups: Groups
) -> Tensor:
    """Where in each part the equals end that are kept: those of lowest index."""
    numels = [tensor.numel() for tensor in tensors_of(values)]

    def places(indices: Tensor) -> Tensor:
        rows = zip(parts, numels, indices, strict=True)
        return torch.stack([elements_below(part, numel, row) for part, numel, row in rows])

    def count(lows: Tensor, shift: int, bins: int) -> Tensor:
        edges = places(lows[:, None] + (torch.arange(bins + 1) << shift))
        return sharding.total(equal_counts(values, magnitudes, edges).cpu(), groups)

    largest = max(part.numel for part in parts) - 1
    rounds = -(-largest.bit_length() // INDEX_BITS)
    last, _, _ = _search(count, kept, (INDEX_BITS,) * rounds)
    return places(last[:, None] + 1).flatten()


def elements_below(part: Part, numel: int, indices: Tensor) -> Tensor:
    """How many of a part's elements have lower indices in the full tensor: they are its first."""
    offset, row_length, row_stride = part.shard
    past = (indices - offset).clamp(min=0)
    rows = past // max(row_stride, 1)
    within = (past - rows * row_stride).clamp(max=row_length)
    return (rows * row_length + within).clamp(max=numel)


def _search(
    count: Callable[[Tensor, int, int], Tensor], ranks: Tensor, bits: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """For each tensor the key of that rank, from 1 on, in ascending order.

    ``count`` says how many keys lie in each of some bins of 2^shift, from the lows on.

    Returns:
        The keys, the ranks among those that are equal, from 1 on, and how many are equal.
    """
    lows, ranks, equals = torch.zeros_like(ranks), ranks.clone(), ranks
    shift = sum(bits)
    for width in bits:
        shift -= width
        counts = count(lows, shift, 1 << width)
        below = counts.cumsum(1) - counts
        bins = (below < ranks[:, None]).sum(1, keepdim=True) - 1
        ranks -= below.gather(1, bins).flatten()
        equals = counts.gather(1, bins).flatten()
        lows = lows + (bins.flatten() << shift)
    return lows, ranks, equals
