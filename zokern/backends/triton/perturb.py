"""The fused sweep: one launch for all tensors of a storage, however many directions.

After what the table begins with (see :mod:`zokern.backends.triton.tiles`) it holds

- the K draws;
- for each row of coefficients K pairs (coefficient, scale), as the bits of float32.
"""

from itertools import chain
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from zokern.backends.triton.launch import INTERPRETED, OPTIONS, on, target
from zokern.backends.triton.noise import fma, octet_values
from zokern.backends.triton.storage import alone, load, load_aligned, sizes, storage_of, store
from zokern.backends.triton.tiles import (
    PLACE,
    Place,
    address_of,
    coefficient_rows,
    find,
    first_blocks_of,
    float_bits,
    interpreted_tile,
    launches_of,
    load_float,
    load_place,
    locate,
    owned,
    place_of,
    tiles_of,
    upload,
)
from zokern.sweep import Sweep, row_major

# A block sweeps up to MAX_TILES tiles, fewer where there would not be BLOCKS blocks.
MAX_TILES = 16
BLOCKS = 8192


class Columns(NamedTuple):
    """What the table holds for a tensor after its place, in the order in which it is read."""

    param: int
    residual: int
    coeff_row: int
    out: int  # 0 in place
    rows: int


COLUMNS = tl.constexpr(PLACE.value + len(Columns._fields))


@triton.jit
def _direction(draws, pairs, k):
    """Its draw, coefficient and scale."""
    return tl.load(draws + k), load_float(pairs + 2 * k), load_float(pairs + 2 * k + 1)


@triton.jit
def _moved(value, octet, stream, direction,
           LAW: tl.constexpr, SCALED: tl.constexpr, DP4A: tl.constexpr):  # fmt: skip
    draw, coeff, scale = direction
    if SCALED:
        value *= scale
    return fma(coeff, octet_values(LAW, octet, stream, draw, DP4A), value)


@triton.jit
def _sweep_tile(tensor, shard, start, origin, tile, moves,
                LAW: tl.constexpr, STORAGE: tl.constexpr, OUT: tl.constexpr,
                DIRECTIONS: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr,
                PICKED: tl.constexpr, MASKED: tl.constexpr, OCTETS: tl.constexpr,
                DP4A: tl.constexpr):  # fmt: skip
    """Sweep a tile of the block whose first octet is ``start``, and ``origin`` as (row, place)."""
    param, residual, out, picked, stream = tensor
    draws, pairs, directions, few = moves
    octet, row, column = locate(origin, tile, shard, OCTETS, ROWS, picked, PICKED)
    if MASKED:
        at, mask = owned(row, column, shard, OCTETS)
        value = load(STORAGE, param, residual, at, mask)
    else:
        SIZES: tl.constexpr = sizes(STORAGE)
        param += start * (8 * SIZES[0])
        residual += start * (8 * SIZES[1])
        out += start * (8 * SIZES[0])
        # In 32 bits, Triton would take AMD's buffer instructions, and each of them would loop over
        # the lanes to see that all have the same address, since that was read from memory.
        tile_start = tl.full([], tile, tl.int64) * OCTETS
        at, mask = tile_start * 8 + tl.arange(0, OCTETS * 8), None
        value = load_aligned(STORAGE, param, residual, tile_start, OCTETS)
    if DIRECTIONS == 0:
        for k in range(directions):
            direction = _direction(draws, pairs, k)
            value = _moved(value, octet, stream, direction, LAW, SCALED, DP4A)
    else:
        for k in tl.static_range(DIRECTIONS):
            value = _moved(value, octet, stream, few[k], LAW, SCALED, DP4A)
    if OUT == "":
        store(STORAGE, param, residual, at, mask, value, 1 if MASKED else 16)
    else:
        store(OUT, out, 0, at, mask, value, 1 if MASKED else 16)


@triton.jit(do_not_specialize=["tensors", "directions", "tiles", "seed_low", "seed_high"])
def perturb_kernel(
    table,
    tensors: tl.int32,
    directions: tl.int32,
    tiles: tl.int32,
    seed_low: tl.uint32,
    seed_high: tl.uint32,
    LAW: tl.constexpr,
    STORAGE: tl.constexpr,
    OUT: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    PICKED: tl.constexpr,
    OCTETS: tl.constexpr,
    DP4A: tl.constexpr,
):
    """A block sweeps up to ``tiles`` tiles of OCTETS octets, of one tensor.

    OUT is the storage of what is written apart, or "" in place. DIRECTIONS is how many there are,
    or 0 for any number; SCALED says that some scale is not 1, ROWS that some tensor has several
    rows, PICKED that somebody picked them.
    """
    i = find(table, tensors, tl.program_id(0))
    columns = table + tensors + i * COLUMNS
    tensor_id, unmasked, shard = load_place(columns)
    stream = (seed_low.to(tl.uint32), seed_high.to(tl.uint32), tensor_id)
    tensor = (tl.load(columns + PLACE), tl.load(columns + PLACE + 1), tl.load(columns + PLACE + 3),
              tl.load(columns + PLACE + 4), stream)  # fmt: skip

    draws = table + tensors * (1 + COLUMNS)
    pairs = draws + directions + tl.load(columns + PLACE + 2) * directions * 2
    # Few directions are read once, not for each tile.
    few = ()
    for k in tl.static_range(DIRECTIONS):
        few += (_direction(draws, pairs, k),)  # type: ignore[assignment]
    moves = (draws, pairs, directions, few)

    block = tl.program_id(0) - tl.load(table + i)
    start, origin, unmasked_tiles, all_tiles = tiles_of(block, shard, unmasked, tiles, OCTETS, ROWS)
    for tile in range(unmasked_tiles):
        _sweep_tile(tensor, shard, start, origin, tile, moves, LAW, STORAGE, OUT,
                    DIRECTIONS, SCALED, ROWS, PICKED, False, OCTETS, DP4A)  # fmt: skip
    for tile in range(unmasked_tiles, all_tiles):
        _sweep_tile(tensor, shard, start, origin, tile, moves, LAW, STORAGE, OUT,
                    DIRECTIONS, SCALED, ROWS, PICKED, True, OCTETS, DP4A)  # fmt: skip


def perturb_(sweep: Sweep) -> None:
    """A plain sweep: parameters move along noise alone."""
    with row_major(sweep) as contiguous, on(sweep.params[0].device):

        def kind(i: int) -> tuple[str, bool]:
            storage = storage_of(contiguous.params[i], contiguous.residuals[i])
            return storage, contiguous.rows[i] is not None

        launches = launches_of(contiguous.params, contiguous.shards, kind)
        for ((storage, picked), rows), members in launches.items():
            _launch(contiguous, members, storage, rows, picked)


def _launch(sweep: Sweep, members: list[int], storage: str, rows: bool, picked: bool) -> None:
    coeff_rows, pairs = coefficient_rows([(sweep.coeffs[i], sweep.scales[i]) for i in members])
    places = [_place(sweep, i) for i in members]
    octets = sum(place.octets for place in places)
    tile, warps = _tile(storage, octets)
    tiles = min(MAX_TILES, max(1, octets // (tile * BLOCKS)))
    *first_blocks, all_blocks = first_blocks_of(places, tile * tiles)
    columns = (_columns(sweep, i, row) for i, row in zip(members, coeff_rows, strict=True))
    tensors = (place + own for place, own in zip(places, columns, strict=True))
    numbers = [*first_blocks, *chain(*tensors), *sweep.draws, *float_bits(pairs)]
    directions = len(sweep.draws)
    perturb_kernel[(all_blocks,)](
        upload(numbers, sweep.params[0].device),
        len(members),
        directions,
        tiles,
        sweep.seed & 0xFFFFFFFF,
        sweep.seed >> 32,
        LAW=sweep.law,
        STORAGE=storage,
        OUT="" if sweep.outs is None else alone(storage),
        DIRECTIONS=directions if directions in (1, 2, 4) else 0,
        SCALED=any(scale != 1 for scale in pairs[1::2]),
        ROWS=rows,
        PICKED=picked,
        OCTETS=tile,
        DP4A=target().dp4a,
        num_warps=warps,
        **OPTIONS,
    )


def _place(sweep: Sweep, i: int) -> Place:
    operands = (sweep.params[i], sweep.residuals[i], _out(sweep, i))
    picked = sweep.rows[i] is not None
    return place_of(operands, sweep.shards[i], sweep.tensor_ids[i], picked=picked)


def _out(sweep: Sweep, i: int) -> Tensor | None:
    return None if sweep.outs is None else sweep.outs[i]


def _columns(sweep: Sweep, i: int, coeff_row: int) -> Columns:
    return Columns(
        param=address_of(sweep.params[i]),
        residual=address_of(sweep.residuals[i]),
        coeff_row=coeff_row,
        out=address_of(_out(sweep, i)),
        rows=address_of(sweep.rows[i]),
    )


def _tile(storage: str, octets: int) -> tuple[int, int]:
    """Octets of a tile and warps of a block, so that a thread loads and stores what it computes.

    Two octets for a thread, but int8 residuals would then go in vectors of 16, those of two octets.
    In float32 half an octet is 16 bytes, and the halves change places within a warp.
    """
    if INTERPRETED.value:
        return interpreted_tile(octets), 1
    warp_size = target().warp_size
    if storage == "fp32":
        return 2 * warp_size, 1
    return 128 if storage == "bf16_int8" else 256, 128 // warp_size
