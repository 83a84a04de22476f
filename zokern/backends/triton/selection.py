"""Selection by magnitude in Triton: digits of eight bits, from the highest to the lowest.

Each pass counts how many values fall into each bin of an interval, in a histogram of the block;
between the passes a few operations of torch take the bin that the wanted magnitude lies in. All of
it is queued on the device.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from zokern.backends.triton.launch import OPTIONS, on
from zokern.backends.triton.tiles import find, upload
from zokern.backends.triton.values import Launch, Packed, access_of, block_of, magnitude, values_of
from zokern.merging import Selection
from zokern.sweep import Shard

BINS = tl.constexpr(256)
KEEPS_NOTHING = 0x7FFFFFFF


@triton.jit
def _bins(own, access, tables, low, shift, bins, KIND: tl.constexpr, OCTETS: tl.constexpr):
    """How many of a tile's values are in each bin, and the largest magnitude."""
    m = magnitude(values_of(own, access, tables, KIND, OCTETS))
    if access[2] is not None:
        m = tl.where(access[2], m, -1)
    # Arithmetic shifts leave what is below the interval negative.
    bin = m - low >> shift
    counted = (m >= low) & (bin < bins)
    counts = tl.histogram(tl.where(counted, bin, 0), BINS, mask=counted)
    return counts, tl.max(m, axis=0)


@triton.jit(do_not_specialize=["tensors", "tiles", "shift", "bins"])
def count_kernel(
    table,
    numbers,
    merges,
    groups,
    lows,
    counts,
    largest,
    tensors: tl.int32,
    tiles: tl.int32,
    shift: tl.int32,
    bins: tl.int32,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    OCTETS: tl.constexpr,
):
    """Adds a block's values to the counts (int32, BINS for each group) and the largest."""
    i = find(table, tensors, tl.program_id(0))
    own, _tensor_id, place, unmasked_tiles, all_tiles = block_of(
        table, tensors, i, tiles, OCTETS, ROWS
    )
    index = tl.load(own + 4)
    group = tl.load(groups + index)
    low = tl.load(lows + group).to(tl.int32)
    tables = (numbers, merges)
    total = tl.zeros([BINS], tl.int32)
    most = tl.zeros([], tl.int32)
    for tile in range(unmasked_tiles):
        access, _octet = access_of(place, tile, OCTETS, ROWS, False)
        more, own_most = _bins(own, access, tables, low, shift, bins, KIND, OCTETS)
        total += more
        most = tl.maximum(most, own_most)
    for tile in range(unmasked_tiles, all_tiles):
        access, _octet = access_of(place, tile, OCTETS, ROWS, True)
        more, own_most = _bins(own, access, tables, low, shift, bins, KIND, OCTETS)
        total += more
        most = tl.maximum(most, own_most)
    tl.atomic_add(counts + group * BINS + tl.arange(0, BINS), total.to(tl.int64), mask=total > 0)
    tl.atomic_max(largest + index, most)


@triton.jit
def _equals(own, access, tables, wanted, KIND: tl.constexpr, OCTETS: tl.constexpr):
    equal = magnitude(values_of(own, access, tables, KIND, OCTETS)) == wanted
    if access[2] is not None:
        equal = equal & access[2]
    return equal.to(tl.int32)


@triton.jit(do_not_specialize=["tensors", "tiles"])
def ties_kernel(
    table,
    numbers,
    merges,
    groups,
    lows,
    has_ties,
    ties,
    tensors: tl.int32,
    tiles: tl.int32,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    OCTETS: tl.constexpr,
):
    """How many of a block's values are at the threshold; only where not all of them are kept."""
    i = find(table, tensors, tl.program_id(0))
    own, _tensor_id, place, unmasked_tiles, all_tiles = block_of(
        table, tensors, i, tiles, OCTETS, ROWS
    )
    group = tl.load(groups + tl.load(own + 4))
    if tl.load(has_ties + group) != 0:
        wanted = tl.load(lows + group).to(tl.int32)
        total = tl.zeros([], tl.int64)
        for tile in range(unmasked_tiles):
            access, _octet = access_of(place, tile, OCTETS, ROWS, False)
            equal = _equals(own, access, (numbers, merges), wanted, KIND, OCTETS)
            total += tl.sum(equal, axis=0)
        for tile in range(unmasked_tiles, all_tiles):
            access, _octet = access_of(place, tile, OCTETS, ROWS, True)
            equal = _equals(own, access, (numbers, merges), wanted, KIND, OCTETS)
            total += tl.sum(equal, axis=0)
        tl.store(ties + tl.program_id(0), total)


@triton.jit
def _store_end(cut, equal, access, seen, rank):
    """Stores the place after the equal that is number ``rank``, if it is in this tile."""
    number = seen + tl.cumsum(equal, axis=0)
    hit = (equal != 0) & (number == rank)
    tl.store(cut + tl.zeros_like(access[1]), access[1] + 1, mask=hit)
    return seen + tl.sum(equal, axis=0)


@triton.jit(do_not_specialize=["tensors", "tiles"])
def cut_kernel(
    table,
    numbers,
    merges,
    groups,
    lows,
    before,
    ties,
    kept,
    cuts,
    tensors: tl.int32,
    tiles: tl.int32,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    OCTETS: tl.constexpr,
):
    """The place after the last equal that is kept, in the block where it lies.

    ``kept`` says for each tensor how many are, ``before`` for each block how many precede it.
    """
    i = find(table, tensors, tl.program_id(0))
    own, _tensor_id, place, unmasked_tiles, all_tiles = block_of(
        table, tensors, i, tiles, OCTETS, ROWS
    )
    index = tl.load(own + 4)
    rank = tl.load(kept + index) - tl.load(before + tl.program_id(0))
    if (rank > 0) & (rank <= tl.load(ties + tl.program_id(0))):
        wanted = tl.load(lows + tl.load(groups + index)).to(tl.int32)
        seen = tl.zeros([], tl.int64)
        for tile in range(unmasked_tiles):
            access, _octet = access_of(place, tile, OCTETS, ROWS, False)
            equal = _equals(own, access, (numbers, merges), wanted, KIND, OCTETS)
            seen = _store_end(cuts + index, equal, access, seen, rank)
        for tile in range(unmasked_tiles, all_tiles):
            access, _octet = access_of(place, tile, OCTETS, ROWS, True)
            equal = _equals(own, access, (numbers, merges), wanted, KIND, OCTETS)
            seen = _store_end(cuts + index, equal, access, seen, rank)


def select(selection: Selection) -> tuple[Tensor, Tensor, Tensor]:
    packed = Packed(selection.values)
    with on(packed.device):
        search = _Search.start(selection, packed)
        classes: dict[int, list[int]] = {}
        count = len(packed.tensors)
        for i in range(count):
            classes.setdefault(packed.zero_bits(i), []).append(i)
        if selection.joined:
            classes = {min(classes): list(range(count))}
        for zero_bits, members in classes.items():
            search.run(members, zero_bits)
        return search.answers(selection)


@dataclass(frozen=True)
class _Search:
    """The state of every group: a tensor, or all tensors if they are joined. int64."""

    packed: Packed
    joined: bool
    groups: Tensor  # of each tensor
    numels: Tensor  # of each tensor
    ranks: Tensor  # of the wanted magnitude among those in the interval, from 1 on
    lows: Tensor
    equals: Tensor
    cuts: Tensor  # of each tensor
    largest: Tensor  # of each tensor, int32

    @staticmethod
    def start(selection: Selection, packed: Packed) -> "_Search":
        device, count = packed.device, len(packed.tensors)
        numels = upload([tensor.numel() for tensor in packed.tensors], device)
        groups = upload([0] * count if selection.joined else range(count), device)
        # Where all are kept or none, the largest is searched for all the same.
        ranks = upload([max(k, 1) for k in _clamped(selection, packed)], device)
        return _Search(
            packed,
            selection.joined,
            groups,
            numels,
            ranks,
            torch.zeros_like(ranks),
            torch.zeros_like(ranks),
            numels.clone(),
            torch.zeros(count, dtype=torch.int32, device=device),
        )

    def run(self, members: list[int], zero_bits: int) -> None:
        """Of tensors the last bits of whose magnitudes are 0."""
        shards = [Shard(0, tensor.numel(), tensor.numel()) for tensor in self.packed.tensors]
        launches = self.packed.launches(members, shards, [0] * len(shards))
        own = self.groups[:1] if self.joined else upload(members, self.packed.device)
        end = 31
        while end > zero_bits:
            shift = max(end - 8, zero_bits)
            counts = self._counts(launches, shift, 1 << (end - shift))
            self._decide(own, counts[own], shift)
            end = shift
        self._cut(members, launches)

    def _counts(self, launches: list[Launch], shift: int, bins: int) -> Tensor:
        counts = torch.zeros(len(self.lows), BINS.value, dtype=torch.int64, device=self.lows.device)
        for launch in launches:
            count_kernel[launch.grid](
                launch.table,
                *self.packed.tables,
                self.groups,
                self.lows,
                counts,
                self.largest,
                len(launch.members),
                launch.tiles,
                shift,
                bins,
                **launch.shape(),
                **OPTIONS,
            )
        return counts

    def _decide(self, own: Tensor, counts: Tensor, shift: int) -> None:
        """The bin that the wanted magnitude lies in, counted from the top."""
        down = counts.flip(1)
        reached = down.cumsum(1)
        bin = (reached < self.ranks[own, None]).sum(1).clamp(max=BINS.value - 1)[:, None]
        equals = down.gather(1, bin)[:, 0]
        self.ranks[own] -= reached.gather(1, bin)[:, 0] - equals
        self.equals[own] = equals
        self.lows[own] += (BINS.value - 1 - bin[:, 0]) << shift

    def _cut(self, members: list[int], launches: list[Launch]) -> None:
        """Where not all equals are kept, the cuts behind the last that is."""
        has_ties = self.ranks < self.equals
        all_ties = [self._ties(launch, has_ties) for launch in launches]
        totals = torch.zeros_like(self.numels)
        befores = []
        for launch, ties in zip(launches, all_ties, strict=True):
            firsts = upload(launch.first_blocks, ties.device)
            sums = torch.cat([ties.new_zeros(1), ties.cumsum(0)])
            at_first = sums[firsts[:-1]]
            totals[upload(launch.members, ties.device)] = sums[firsts[1:]] - at_first
            tensor_of = torch.bucketize(
                torch.arange(len(ties), device=ties.device), firsts[1:], right=True
            )
            befores.append(sums[:-1] - at_first[tensor_of])
        before = totals.cumsum(0) - totals if self.joined else torch.zeros_like(totals)
        # Of the equals that are kept, those that do not lie before this tensor.
        kept = self.ranks[self.groups] - before
        own = upload(members, self.numels.device)
        none = has_ties[self.groups] & (kept <= 0)
        self.cuts[own] = torch.where(none, 0, self.numels)[own]
        for launch, ties, block_before in zip(launches, all_ties, befores, strict=True):
            cut_kernel[launch.grid](
                launch.table,
                *self.packed.tables,
                self.groups,
                self.lows,
                block_before,
                ties,
                kept,
                self.cuts,
                len(launch.members),
                launch.tiles,
                **launch.shape(),
                **OPTIONS,
            )

    def _ties(self, launch: Launch, has_ties: Tensor) -> Tensor:
        ties = torch.zeros(launch.grid, dtype=torch.int64, device=self.lows.device)
        ties_kernel[launch.grid](
            launch.table,
            *self.packed.tables,
            self.groups,
            self.lows,
            has_ties.long(),
            ties,
            len(launch.members),
            launch.tiles,
            **launch.shape(),
            **OPTIONS,
        )
        return ties

    def answers(self, selection: Selection) -> tuple[Tensor, Tensor, Tensor]:
        clamped, numels = _clamped(selection, self.packed), _numels(selection, self.packed)
        nothing = upload([k == 0 for k in selection.k], self.lows.device) != 0
        whole = [k == numel for k, numel in zip(clamped, numels, strict=True)]
        everything = upload(whole, self.lows.device) != 0
        lows = torch.where(everything, 0, self.lows)
        lows = torch.where(nothing, KEEPS_NOTHING, lows).int().view(torch.float32)
        cuts = torch.where(everything[self.groups], self.numels, self.cuts)
        cuts = torch.where(nothing[self.groups], 0, cuts)
        return lows[self.groups], cuts, self.largest.view(torch.float32)


def _numels(selection: Selection, packed: Packed) -> list[int]:
    """Of each group."""
    numels = [tensor.numel() for tensor in packed.tensors]
    return [sum(numels)] if selection.joined else numels


def _clamped(selection: Selection, packed: Packed) -> list[int]:
    """The k of each group, at most what it has."""
    return [min(k, n) for k, n in zip(selection.k, _numels(selection, packed), strict=True)]
