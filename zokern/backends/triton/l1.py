"""Sums of magnitudes in Triton, accumulated as in :mod:`zokern.backends.triton.products`."""

from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from zokern.backends.triton.launch import INTERPRETED, OPTIONS, on, target
from zokern.backends.triton.noise import octet_values
from zokern.backends.triton.products import add_pair, folded, log2
from zokern.backends.triton.tiles import find, upload
from zokern.backends.triton.values import Launch, Packed, access_of, block_of, magnitude, values_of
from zokern.merging import L1Sums

# Blocks whose sums are added up at once.
AT_ONCE = tl.constexpr(128)


@triton.jit
def _kept(m, access, octet, index, stream, masks, AT_RANDOM: tl.constexpr, DP4A: tl.constexpr):
    """Whether the mask keeps each element of a tile."""
    thresholds, cuts, draws, limits = masks
    if AT_RANDOM:
        words = octet_values("uniform32", octet, stream, tl.load(draws + index), DP4A)
        return words.to(tl.int64) < tl.load(limits + index)
    else:
        threshold = magnitude(tl.load(thresholds + index))
        return (m > threshold) | ((m == threshold) & (access[1] < tl.load(cuts + index)))


@triton.jit
def _sums(own, access, octet, stream, tables, masks, sums, KIND: tl.constexpr,
          AT_RANDOM: tl.constexpr, OCTETS: tl.constexpr, DP4A: tl.constexpr):  # fmt: skip
    """The sums with those of a tile: a pair for each octet, of all and of what is kept."""
    m = magnitude(values_of(own, access, tables, KIND, OCTETS))
    kept = _kept(m, access, octet, tl.load(own + 4), stream, masks, AT_RANDOM, DP4A)
    value = m.to(tl.float32, bitcast=True).to(tl.float64)
    if access[2] is not None:
        value = tl.where(access[2], value, 0.0)
    all_sums, kept_sums = sums
    own_kept = tl.where(kept, value, 0.0)
    high, low = folded(value, tl.zeros_like(value), 3)
    all_sums = add_pair(all_sums[0], all_sums[1], high, low)
    high, low = folded(own_kept, tl.zeros_like(value), 3)
    return all_sums, add_pair(kept_sums[0], kept_sums[1], high, low)


@triton.jit
def _total(sum_, COUNT: tl.constexpr):
    """The total of COUNT pairs."""
    high, low = sum_
    if INTERPRETED:
        # The interpreter's reduction goes from one element to the next.
        high, low = folded(high, low, log2(COUNT))
    return tl.reduce((high, low), 0, add_pair)


@triton.jit(do_not_specialize=["tensors", "tiles", "seed_low", "seed_high"])
def l1_kernel(
    table,
    numbers,
    merges,
    thresholds,
    cuts,
    draws,
    limits,
    partials,
    tensors: tl.int32,
    tiles: tl.int32,
    seed_low: tl.uint32,
    seed_high: tl.uint32,
    AT_RANDOM: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    OCTETS: tl.constexpr,
    DP4A: tl.constexpr,
):
    """A block's sums, as (2, 2) float64: of all and of what is kept, high and low."""
    i = find(table, tensors, tl.program_id(0))
    own, tensor_id, place, unmasked_tiles, all_tiles = block_of(
        table, tensors, i, tiles, OCTETS, ROWS
    )
    stream = (seed_low.to(tl.uint32), seed_high.to(tl.uint32), tensor_id)
    tables = (numbers, merges)
    masks = (thresholds, cuts, draws, limits)
    zero = tl.zeros([OCTETS], tl.float64)
    sums = ((zero, zero), (zero, zero))
    for tile in range(unmasked_tiles):
        access, octet = access_of(place, tile, OCTETS, ROWS, False)
        sums = _sums(own, access, octet, stream, tables, masks, sums,
                     KIND, AT_RANDOM, OCTETS, DP4A)  # fmt: skip
    for tile in range(unmasked_tiles, all_tiles):
        access, octet = access_of(place, tile, OCTETS, ROWS, True)
        sums = _sums(own, access, octet, stream, tables, masks, sums,
                     KIND, AT_RANDOM, OCTETS, DP4A)  # fmt: skip
    partial = partials + tl.program_id(0).to(tl.int64) * 4
    for s in tl.static_range(2):
        high, low = _total(sums[s], OCTETS)
        tl.store(partial + 2 * s, high)
        tl.store(partial + 2 * s + 1, low)


@triton.jit
def _total_of_blocks(partials, blocks):
    """The total of the pairs of so many blocks."""
    zero = tl.zeros([AT_ONCE], tl.float64)
    sums = (zero, zero)
    for start in range(0, blocks, AT_ONCE):
        block = start + tl.arange(0, AT_ONCE)
        more_high = tl.load(partials + block * 4, block < blocks, other=0.0)
        more_low = tl.load(partials + block * 4 + 1, block < blocks, other=0.0)
        sums = add_pair(sums[0], sums[1], more_high, more_low)
    high, low = _total(sums, AT_ONCE)
    # An infinite sum has no rounding errors that mean anything.
    return tl.where(low == low, high + low, high)


@triton.jit
def total_kernel(table, partials, out):
    """A tensor's sums: the table says where its blocks begin, how many there are, its position."""
    row = table + tl.program_id(0) * 3
    first, blocks, position = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    for s in tl.static_range(2):
        total = _total_of_blocks(partials + first * 4 + 2 * s, blocks)
        tl.store(out + 2 * position + s, total)


def l1_sums(sums: L1Sums) -> Tensor:
    packed, mask = Packed(sums.values), sums.mask
    count, device = len(packed.tensors), packed.device
    out = torch.zeros(count, 2, dtype=torch.float64, device=device)
    with on(device):
        draws, limits = mask.draws.to(device), mask.limits.to(device)
        at_random = mask.thresholds is None
        thresholds = draws if mask.thresholds is None else mask.thresholds.to(device)
        cuts = draws if mask.cuts is None else mask.cuts.to(device)
        masks = [table.contiguous() for table in (thresholds, cuts, draws, limits)]
        for launch in packed.launches(range(count), mask.shards, mask.tensor_ids):
            partials = torch.empty(*launch.grid, 2, 2, dtype=torch.float64, device=device)
            l1_kernel[launch.grid](
                launch.table,
                *packed.tables,
                *masks,
                partials,
                len(launch.members),
                launch.tiles,
                mask.seed & 0xFFFFFFFF,
                mask.seed >> 32,
                AT_RANDOM=at_random,
                DP4A=target().dp4a,
                **launch.shape(),
                **OPTIONS,
            )
            _add_up(launch, partials, out)
    return out


def _add_up(launch: Launch, partials: Tensor, out: Tensor) -> None:
    rows = chain(*zip(launch.first_blocks, launch.blocks, launch.members, strict=False))
    total_kernel[(len(launch.members),)](upload(rows, out.device), partials, out, **OPTIONS)
