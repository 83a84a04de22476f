"""Inner products of tensors with noise, summed almost exactly.

Sums are kept in two float64, high and low: the rounding errors of the running sum `high` are summed
in `low`. A launch is for all tensors of a dtype; each of its blocks sums a part of one tensor, and
the host sums the blocks.
"""

import math
from itertools import chain, pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from zokern.backends.triton.launch import INTERPRETED, OPTIONS, on, target
from zokern.backends.triton.noise import octet_values
from zokern.backends.triton.storage import load, load_aligned, storage_of
from zokern.backends.triton.tiles import (
    PLACE,
    Place,
    address_of,
    find,
    first_blocks_of,
    interpreted_tile,
    launches_of,
    load_place,
    locate,
    owned,
    place_of,
    tiles_of,
    upload,
)
from zokern.sweep import InnerProducts

# What the table holds for a tensor: its place and its address.
COLUMNS = tl.constexpr(PLACE.value + 1)

# A launch has up to about 2·BLOCKS blocks, but one for each tensor: the host adds up their sums.
BLOCKS = 1024
WARPS = 4


@triton.constexpr_function
def log2(power):
    return power.bit_length() - 1


@triton.jit
def add_pair(high, low, x, y):
    """high + low + (x + y), as such a pair again."""
    total = high + x
    back = total - high
    error = (high - (total - back)) + (x - back)
    return total, low + y + error


@triton.jit
def folded(high, low, TIMES: tl.constexpr):
    """Each 2^TIMES sums in a row added up."""
    for _ in tl.static_range(TIMES):
        a, b = tl.split(tl.reshape(high, [high.shape[0] // 2, 2]))
        c, d = tl.split(tl.reshape(low, [low.shape[0] // 2, 2]))
        high, low = add_pair(a, c, b, d)
    return high, low


@triton.jit
def _add_product(sum_, a, b):
    """A sum for each octet, with those of the products added; float64 holds them exactly."""
    product = a.to(tl.float64) * b.to(tl.float64)
    high, low = folded(product, tl.zeros_like(product), 3)
    return add_pair(sum_[0], sum_[1], high, low)


@triton.jit
def _add_products(sums, v, z):
    vv, vz, zz = sums
    return _add_product(vv, v, v), _add_product(vz, v, z), _add_product(zz, z, z)


@triton.jit
def _store_total(partial, sum_, OCTETS: tl.constexpr):
    high, low = sum_
    if INTERPRETED:
        # The interpreter's reduction goes from one element to the next.
        high, low = folded(high, low, log2(OCTETS // 8))
    high, low = tl.reduce((high, low), 0, add_pair)
    tl.store(partial, high)
    tl.store(partial + 1, low)


@triton.jit(do_not_specialize=["tensors", "tiles", "seed_low", "seed_high", "draw"])
def inner_products_kernel(
    table,
    partials,
    tensors: tl.int32,
    tiles: tl.int32,
    seed_low: tl.uint32,
    seed_high: tl.uint32,
    draw: tl.uint32,
    LAW: tl.constexpr,
    STORAGE: tl.constexpr,
    ROWS: tl.constexpr,
    OCTETS: tl.constexpr,
    DP4A: tl.constexpr,
):
    """A block sums up to ``tiles`` tiles of OCTETS octets, of one tensor, into (3, 2) partial sums.

    ROWS says that some tensor has several rows.
    """
    i = find(table, tensors, tl.program_id(0))
    columns = table + tensors + i * COLUMNS
    tensor_id, unmasked, shard = load_place(columns)
    vector = tl.load(columns + PLACE)
    stream = (seed_low.to(tl.uint32), seed_high.to(tl.uint32), tensor_id)
    block = tl.program_id(0) - tl.load(table + i)
    start, origin, unmasked_tiles, all_tiles = tiles_of(block, shard, unmasked, tiles, OCTETS, ROWS)
    zero = tl.zeros([OCTETS], tl.float64)
    sums = ((zero, zero), (zero, zero), (zero, zero))
    for tile in range(unmasked_tiles):
        octet, _, _ = locate(origin, tile, shard, OCTETS, ROWS)
        v = load_aligned(STORAGE, vector, 0, start + tile * OCTETS, OCTETS)
        sums = _add_products(sums, v, octet_values(LAW, octet, stream, draw, DP4A))
    for tile in range(unmasked_tiles, all_tiles):
        octet, row, column = locate(origin, tile, shard, OCTETS, ROWS)
        at, mask = owned(row, column, shard, OCTETS)
        v = tl.where(mask, load(STORAGE, vector, 0, at, mask), 0.0)
        z = tl.where(mask, octet_values(LAW, octet, stream, draw, DP4A), 0.0)
        sums = _add_products(sums, v, z)
    partial = partials + tl.program_id(0).to(tl.int64) * 6
    for s in tl.static_range(3):
        _store_total(partial + 2 * s, sums[s], OCTETS)


def inner_products(products: InnerProducts) -> Tensor:
    vectors = [vector.contiguous() for vector in products.vectors]
    sums = torch.zeros(len(vectors), 3, dtype=torch.float64)
    launches = launches_of(vectors, products.shards, lambda i: storage_of(vectors[i]))
    with on(products.vectors[0].device):
        launched = [
            _launch(products, vectors, members, storage, rows)
            for (storage, rows), members in launches.items()
        ]
        if not launched:
            return sums
        all_partials = torch.cat([partials for partials, _ in launched]).cpu()
    members = [i for group in launches.values() for i in group]
    counts = [count for _, blocks in launched for count in blocks]
    for i, partials in zip(members, all_partials.split(counts), strict=True):
        for s in range(3):
            sums[i, s] = _total(partials[:, s].flatten().tolist())
    return sums


def _total(terms: list[float]) -> float:
    # Infinite terms of both signs are an error in fsum.
    return math.fsum(terms) if all(map(math.isfinite, terms)) else math.nan


def _launch(
    products: InnerProducts, vectors: list[Tensor], members: list[int], storage: str, rows: bool
) -> tuple[Tensor, list[int]]:
    """The partial sums of the blocks, and the number of blocks of each tensor."""
    places = [_place(products, vectors, i) for i in members]
    octets = sum(place.octets for place in places)
    tile = _tile(octets)
    tiles = max(1, octets // (tile * BLOCKS))
    first_blocks = first_blocks_of(places, tile * tiles)
    tensors = ((*place, address_of(vectors[i])) for place, i in zip(places, members, strict=True))
    numbers = [*first_blocks[:-1], *chain(*tensors)]
    device = vectors[0].device
    partials = torch.empty(first_blocks[-1], 3, 2, dtype=torch.float64, device=device)
    inner_products_kernel[(first_blocks[-1],)](
        upload(numbers, device),
        partials,
        len(members),
        tiles,
        products.seed & 0xFFFFFFFF,
        products.seed >> 32,
        products.draw,
        LAW=products.law,
        STORAGE=storage,
        ROWS=rows,
        OCTETS=tile,
        DP4A=target().dp4a,
        num_warps=1 if INTERPRETED.value else WARPS,
        **OPTIONS,
    )
    return partials, [end - begin for begin, end in pairwise(first_blocks)]


def _place(products: InnerProducts, vectors: list[Tensor], i: int) -> Place:
    return place_of((vectors[i],), products.shards[i], products.tensor_ids[i])


def _tile(octets: int) -> int:
    """Octets of a tile: one for a thread, whose sums take many registers."""
    return interpreted_tile(octets) if INTERPRETED.value else WARPS * target().warp_size
