"""How a launch goes over many tensors: the table that it reads, its blocks and its tiles.

The table is of int64, in device memory, uploaded once. It begins with

- for each tensor the first block that works on it, ascending;
- for each tensor a row of columns: its :class:`Place`, then those that the kernel adds.

A tensor is taken by octets of the full tensor (see :mod:`zokern.backends.triton.noise`). Where a
shard's octets are whole and lie aligned in memory they need no mask and go in vectors of 16 bytes;
elsewhere the shard may own a part of an octet, and each element goes by itself.
"""

import struct
from array import array
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import accumulate, chain
from typing import NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from zokern.sweep import Shard

Key = TypeVar("Key", bound=Hashable)


class Place(NamedTuple):
    """Where a tensor's elements lie in the full tensor, and in memory."""

    tensor_id: int
    unmasked: int  # octets, from the first one on, that need no mask
    rows: int
    octets_per_row: int
    offset: int
    row_length: int
    row_stride: int

    @property
    def octets(self) -> int:
        return self.rows * self.octets_per_row


PLACE = tl.constexpr(len(Place._fields))


@triton.jit
def find(first_blocks, tensors, block):
    """The last tensor whose first block is not above this one: the tensor that it works on.

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
def load_place(columns):
    """A tensor's id, its octets that need no mask, and its shard."""
    shard = (tl.load(columns + 2), tl.load(columns + 3), tl.load(columns + 4),
             tl.load(columns + 5), tl.load(columns + 6))  # fmt: skip
    return tl.load(columns), tl.load(columns + 1), shard


@triton.jit
def load_float(address):
    """A float32 whose bits are kept in an int64."""
    return tl.load(address).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def tiles_of(block, shard, unmasked, tiles, OCTETS: tl.constexpr, ROWS: tl.constexpr):
    """The first octet of the tensor's block, also as (row, place), and how many tiles it has.

    Octets are numbered through all rows. The tiles that need no mask come first.
    """
    rows, octets_per_row, _, _, _ = shard
    start = block * tiles * OCTETS
    origin = (start // octets_per_row, start % octets_per_row) if ROWS else (0, start)
    all_tiles = tl.minimum(tl.cdiv(rows * octets_per_row - start, OCTETS), tiles).to(tl.int32)
    unmasked_tiles = tl.minimum(tl.maximum(unmasked - start, 0) // OCTETS, tiles).to(tl.int32)
    return start, origin, unmasked_tiles, all_tiles


@triton.jit
def locate(origin, tile, shard, OCTETS: tl.constexpr, ROWS: tl.constexpr, picked=0,
           PICKED: tl.constexpr = False):  # fmt: skip
    """For each octet of a tile: its index, its row, and the column of its first element.

    With PICKED, ``picked`` is the address of the rows' numbers in the full tensor.
    """
    row_of_origin, place = origin
    rows, octets_per_row, offset, _, row_stride = shard
    place += tile * OCTETS + tl.arange(0, OCTETS)
    row = row_of_origin + tl.zeros([OCTETS], tl.int64)
    if ROWS:
        # A division of 32 bits is several times faster than one of 64.
        ahead = (place.to(tl.uint32) // octets_per_row.to(tl.uint32)).to(tl.int64)
        row += ahead
        place -= ahead * octets_per_row
    number = row
    if PICKED:
        number = tl.load(picked.to(tl.pointer_type(tl.int64)) + row, row < rows, 0)
    start = offset + number * row_stride
    return (start >> 3) + place, row, place * 8 - (start & 7)


@triton.jit
def owned(row, column, shard, OCTETS: tl.constexpr):
    """For each element of these octets its place in memory, and whether the shard owns it."""
    rows, _, _, row_length, _ = shard
    columns = column[:, None] + tl.arange(0, 8)[None, :]
    mask = (columns >= 0) & (columns < row_length) & (row < rows)[:, None]
    at = (row * row_length)[:, None] + columns
    return tl.reshape(at, [OCTETS * 8]), tl.reshape(mask, [OCTETS * 8])


def place_of(
    operands: Sequence[Tensor | None], shard: Shard, tensor_id: int, *, picked: bool = False
) -> Place:
    """Of a tensor whose operands are these, the first of them always there."""
    assert operands[0] is not None
    numel = operands[0].numel()
    rows = numel // shard.row_length
    starts = (shard.offset, *((shard.row_length, shard.row_stride) if rows > 1 or picked else ()))
    whole = all(start % 8 == 0 for start in starts)
    aligned = whole and all(address_of(operand) % 16 == 0 for operand in operands)
    # A row may begin with the last element of an octet.
    octets_per_row = (shard.row_length + (7 if whole else 14)) // 8
    assert rows == 1 or octets_per_row < 1 << 31, "the kernels divide by it in 32 bits"
    return Place(
        tensor_id=tensor_id,
        unmasked=numel // 8 if aligned else 0,
        rows=rows,
        octets_per_row=octets_per_row,
        offset=shard.offset,
        row_length=shard.row_length,
        row_stride=shard.row_stride,
    )


def address_of(operand: Tensor | None) -> int:
    return 0 if operand is None else operand.data_ptr()


def launches_of(
    tensors: list[Tensor], shards: list[Shard], key: Callable[[int], Key]
) -> dict[tuple[Key, bool], list[int]]:
    """(key, whether tensors have several rows) → the positions of those that one launch takes."""
    launches: dict[tuple[Key, bool], list[int]] = {}
    for i, (tensor, shard) in enumerate(zip(tensors, shards, strict=True)):
        if tensor.numel() > 0:
            launches.setdefault((key(i), shard.row_length < tensor.numel()), []).append(i)
    return launches


def first_blocks_of(places: Iterable[Place], octets: int) -> list[int]:
    """For each tensor its first block, then the number of all blocks, each of so many octets."""
    return list(accumulate((-(-place.octets // octets) for place in places), initial=0))


def interpreted_tile(octets: int) -> int:
    """The interpreter takes its time for operations, not for their elements."""
    return max(512, triton.next_power_of_2(octets) // 16)


def coefficient_rows(
    tensors: list[tuple[Sequence[float], ...]],
) -> tuple[list[int], list[float]]:
    """For each tensor, given lists of a number for each direction, the row that it has; all rows.

    A row has the numbers of the first direction, then those of the second, and so on. Tensors that
    share their lists share the row.
    """
    row_of: dict[tuple[int, ...], int] = {}
    numbers: list[float] = []
    rows = []
    for lists in tensors:
        key = tuple(map(id, lists))
        if key not in row_of:
            row_of[key] = len(row_of)
            numbers += chain(*zip(*lists, strict=True))
        rows.append(row_of[key])
    return rows, numbers


def float_bits(numbers: Sequence[float]) -> tuple[int, ...]:
    """The float32 bits of numbers."""
    return struct.unpack(f"{len(numbers)}I", struct.pack(f"{len(numbers)}f", *numbers))


def upload(numbers: Iterable[int], device: torch.device) -> Tensor:
    """An int64 tensor on the device; the copy is queued there, not waited for."""
    host = torch.frombuffer(array("Q", numbers), dtype=torch.int64)
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)
