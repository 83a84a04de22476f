"""The fused sweep: one launch for all tensors of a storage, however many directions.

A launch reads what it sweeps from a table of int64 in device memory, uploaded once:

- for each tensor the first block that sweeps it, ascending;
- for each tensor its :class:`Columns`;
- the K draws;
- for each row of coefficients K pairs (coefficient, scale), as the bits of float32.

A tensor is swept by octets of the full tensor (see :mod:`zokern.backends.triton.noise`). Where a
shard's octets are whole and lie aligned in memory they need no mask and go in vectors of 16 bytes;
elsewhere the shard may own a part of an octet, and each element goes by itself.
"""

import struct
from array import array
from itertools import accumulate, chain
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zokern.backends.triton.launch import INTERPRETED, OPTIONS, on, target
from zokern.backends.triton.noise import fma, octet_values
from zokern.backends.triton.storage import STORAGES, load, load_aligned, sizes, store
from zokern.sweep import Sweep, row_major

# A block sweeps up to MAX_TILES tiles, fewer where there would not be BLOCKS blocks.
MAX_TILES = 16
BLOCKS = 8192


class Columns(NamedTuple):
    """What the table holds for a tensor, in the order in which the kernel reads it."""

    param: int
    residual: int
    tensor_id: int
    coeff_row: int
    unmasked: int  # octets, from the first one on, that need no mask
    rows: int
    octets_per_row: int
    offset: int
    row_length: int
    row_stride: int


COLUMNS = tl.constexpr(len(Columns._fields))


@triton.jit
def _find(first_blocks, tensors, block):
    """The last tensor whose first block is not above this one: the tensor that it sweeps.

    Each step compares 32 candidates, so that few loads wait for one another.
    """
    low = 0
    candidates = tensors
    while candidates > 1:
        stride = (candidates + 31) // 32
        probes = low + stride * tl.arange(0, 32)
        first = tl.load(first_blocks + probes, mask=probes < low + candidates, other=1 << 62)
        steps = tl.sum((first <= block).to(tl.int32), axis=0) - 1
        low += steps * stride
        candidates = tl.minimum(stride, candidates - steps * stride)
    return low


@triton.jit
def _direction(draws, pairs, k):
    """Its draw, coefficient and scale."""
    coeff = tl.load(pairs + 2 * k).to(tl.int32).to(tl.float32, bitcast=True)
    scale = tl.load(pairs + 2 * k + 1).to(tl.int32).to(tl.float32, bitcast=True)
    return tl.load(draws + k), coeff, scale


@triton.jit
def _moved(value, octet, stream, direction,
           LAW: tl.constexpr, SCALED: tl.constexpr, DP4A: tl.constexpr):  # fmt: skip
    draw, coeff, scale = direction
    if SCALED:
        value *= scale
    return fma(coeff, octet_values(LAW, octet, stream, draw, DP4A), value)


@triton.jit
def _locate(origin, tile, shard, OCTETS: tl.constexpr, ROWS: tl.constexpr):
    """For each octet of a tile: its index, its row, and the column of its first element."""
    row_of_origin, place = origin
    _, octets_per_row, offset, _, row_stride = shard
    place += tile * OCTETS + tl.arange(0, OCTETS)
    row = row_of_origin + tl.zeros([OCTETS], tl.int64)
    if ROWS:
        # A division of 32 bits is several times faster than one of 64.
        ahead = (place.to(tl.uint32) // octets_per_row.to(tl.uint32)).to(tl.int64)
        row += ahead
        place -= ahead * octets_per_row
    start = offset + row * row_stride
    return (start >> 3) + place, row, place * 8 - (start & 7)


@triton.jit
def _owned(row, column, shard, OCTETS: tl.constexpr):
    """For each element of these octets its place in memory, and whether the shard owns it."""
    rows, _, _, row_length, _ = shard
    columns = column[:, None] + tl.arange(0, 8)[None, :]
    mask = (columns >= 0) & (columns < row_length) & (row < rows)[:, None]
    at = (row * row_length)[:, None] + columns
    return tl.reshape(at, [OCTETS * 8]), tl.reshape(mask, [OCTETS * 8])


@triton.jit
def _sweep_tile(tensor, shard, start, origin, tile, moves,
                LAW: tl.constexpr, STORAGE: tl.constexpr, DIRECTIONS: tl.constexpr,
                SCALED: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
                OCTETS: tl.constexpr, DP4A: tl.constexpr):  # fmt: skip
    """Sweep a tile of the block whose first octet is ``start``, and ``origin`` as (row, place)."""
    param, residual, stream = tensor
    draws, pairs, directions, first, last = moves
    octet, row, column = _locate(origin, tile, shard, OCTETS, ROWS)
    if MASKED:
        at, mask = _owned(row, column, shard, OCTETS)
        value = load(STORAGE, param, residual, at, mask)
    else:
        SIZES: tl.constexpr = sizes(STORAGE)
        param += start * (8 * SIZES[0])
        residual += start * (8 * SIZES[1])
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
        value = _moved(value, octet, stream, first, LAW, SCALED, DP4A)
        if DIRECTIONS == 2:
            value = _moved(value, octet, stream, last, LAW, SCALED, DP4A)
    store(STORAGE, param, residual, at, mask, value, 1 if MASKED else 16)


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
    DIRECTIONS: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    OCTETS: tl.constexpr,
    DP4A: tl.constexpr,
):
    """A block sweeps up to ``tiles`` tiles of OCTETS octets, of one tensor.

    DIRECTIONS is how many there are, or 0 for any number; SCALED says that some scale is not 1,
    ROWS that some tensor has several rows.
    """
    i = _find(table, tensors, tl.program_id(0))
    columns = table + tensors + i * COLUMNS
    stream = (seed_low.to(tl.uint32), seed_high.to(tl.uint32), tl.load(columns + 2))
    tensor = (tl.load(columns), tl.load(columns + 1), stream)
    coeff_row, unmasked = tl.load(columns + 3), tl.load(columns + 4)
    rows, octets_per_row, offset = tl.load(columns + 5), tl.load(columns + 6), tl.load(columns + 7)
    shard = (rows, octets_per_row, offset, tl.load(columns + 8), tl.load(columns + 9))

    draws = table + tensors * (1 + COLUMNS)
    pairs = draws + directions + coeff_row * directions * 2
    # Few directions are read once, not for each tile.
    first, last = _direction(draws, pairs, 0), _direction(draws, pairs, directions - 1)
    moves = (draws, pairs, directions, first, last)

    # Octets are numbered through all rows.
    start = (tl.program_id(0) - tl.load(table + i)) * tiles * OCTETS
    origin = (start // octets_per_row, start % octets_per_row) if ROWS else (0, start)
    all_tiles = tl.minimum(tl.cdiv(rows * octets_per_row - start, OCTETS), tiles).to(tl.int32)
    unmasked_tiles = tl.minimum(tl.maximum(unmasked - start, 0) // OCTETS, tiles).to(tl.int32)
    for tile in range(unmasked_tiles):
        _sweep_tile(tensor, shard, start, origin, tile, moves, LAW, STORAGE,
                    DIRECTIONS, SCALED, ROWS, False, OCTETS, DP4A)  # fmt: skip
    for tile in range(unmasked_tiles, all_tiles):
        _sweep_tile(tensor, shard, start, origin, tile, moves, LAW, STORAGE,
                    DIRECTIONS, SCALED, ROWS, True, OCTETS, DP4A)  # fmt: skip


def perturb_(sweep: Sweep) -> None:
    with row_major(sweep) as contiguous, on(sweep.params[0].device):
        for (storage, rows), members in _launches(contiguous).items():
            _launch(contiguous, members, storage, rows)


def _launches(sweep: Sweep) -> dict[tuple[str, bool], list[int]]:
    """(storage, whether tensors have several rows) → the tensors that one launch sweeps."""
    launches: dict[tuple[str, bool], list[int]] = {}
    for i, (param, residual) in enumerate(zip(sweep.params, sweep.residuals, strict=True)):
        if param.numel() > 0:
            storage = STORAGES[param.dtype, None if residual is None else residual.dtype]
            rows = sweep.shards[i].row_length < param.numel()
            launches.setdefault((storage, rows), []).append(i)
    return launches


def _launch(sweep: Sweep, members: list[int], storage: str, rows: bool) -> None:
    coeff_rows, pairs = _coefficients(sweep, members)
    tensors = [_columns(sweep, i, row) for i, row in zip(members, coeff_rows, strict=True)]
    octets = [tensor.rows * tensor.octets_per_row for tensor in tensors]
    tile, warps = _tile(storage, sum(octets))
    tiles = min(MAX_TILES, max(1, sum(octets) // (tile * BLOCKS)))
    blocks = (-(-n // (tile * tiles)) for n in octets)
    *first_blocks, all_blocks = accumulate(blocks, initial=0)
    numbers = [*first_blocks, *chain(*tensors), *sweep.draws, *_bits(pairs)]
    directions = len(sweep.draws)
    perturb_kernel[(all_blocks,)](
        _upload(numbers, sweep.params[0].device),
        len(members),
        directions,
        tiles,
        sweep.seed & 0xFFFFFFFF,
        sweep.seed >> 32,
        LAW=sweep.law,
        STORAGE=storage,
        DIRECTIONS=directions if directions <= 2 else 0,
        SCALED=any(scale != 1 for scale in pairs[1::2]),
        ROWS=rows,
        OCTETS=tile,
        DP4A=target().dp4a,
        num_warps=warps,
        **OPTIONS,
    )


def _coefficients(sweep: Sweep, members: list[int]) -> tuple[list[int], list[float]]:
    """The row of each tensor, and all rows: coefficients and scales in turn."""
    row_of: dict[tuple[int, int], int] = {}
    pairs: list[float] = []
    rows = []
    for i in members:
        coeffs, scales = sweep.coeffs[i], sweep.scales[i]
        key = (id(coeffs), id(scales))
        if key not in row_of:
            row_of[key] = len(row_of)
            pairs += chain(*zip(coeffs, scales, strict=True))
        rows.append(row_of[key])
    return rows, pairs


def _columns(sweep: Sweep, i: int, coeff_row: int) -> Columns:
    param, residual, shard = sweep.params[i], sweep.residuals[i], sweep.shards[i]
    addresses = (param.data_ptr(), 0 if residual is None else residual.data_ptr())
    rows = param.numel() // shard.row_length
    starts = (shard.offset, *((shard.row_length, shard.row_stride) if rows > 1 else ()))
    whole = all(start % 8 == 0 for start in starts)
    aligned = whole and all(address % 16 == 0 for address in addresses)
    # A row may begin with the last element of an octet.
    octets_per_row = (shard.row_length + (7 if whole else 14)) // 8
    assert rows == 1 or octets_per_row < 1 << 31, "the kernel divides by it in 32 bits"
    return Columns(
        param=addresses[0],
        residual=addresses[1],
        tensor_id=sweep.tensor_ids[i],
        coeff_row=coeff_row,
        unmasked=param.numel() // 8 if aligned else 0,
        rows=rows,
        octets_per_row=octets_per_row,
        offset=shard.offset,
        row_length=shard.row_length,
        row_stride=shard.row_stride,
    )


def _tile(storage: str, octets: int) -> tuple[int, int]:
    """Octets of a tile and warps of a block, so that a thread loads and stores what it computes.

    Two octets for a thread, but int8 residuals would then go in vectors of 16, those of two octets.
    In float32 half an octet is 16 bytes, and the halves change places within a warp.
    """
    if INTERPRETED.value:
        # The interpreter takes its time for operations, not for their elements.
        return max(512, triton.next_power_of_2(octets) // 16), 1
    warp_size = target().warp_size
    if storage == "fp32":
        return 2 * warp_size, 1
    return 128 if storage == "bf16_int8" else 256, 128 // warp_size


def _bits(numbers: list[float]) -> tuple[int, ...]:
    """The float32 bits of numbers."""
    return struct.unpack(f"{len(numbers)}I", struct.pack(f"{len(numbers)}f", *numbers))


def _upload(numbers: list[int], device: torch.device) -> Tensor:
    """An int64 tensor on the device; the copy is queued there, not waited for."""
    host = torch.frombuffer(array("Q", numbers), dtype=torch.int64)
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)
