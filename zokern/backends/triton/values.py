"""The values whose magnitudes are looked at, in Triton: a tile at a time.

A launch is for tensors of one :class:`Kind`. After what the table begins with (see
:mod:`zokern.backends.triton.tiles`) it holds for a tensor its :class:`Columns`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zokern.backends.triton.launch import INTERPRETED, target
from zokern.backends.triton.noise import fma
from zokern.backends.triton.storage import load, load_aligned, rounded, storage_of
from zokern.backends.triton.tiles import (
    PLACE,
    Place,
    address_of,
    first_blocks_of,
    interpreted_tile,
    load_place,
    locate,
    owned,
    place_of,
    tiles_of,
    upload,
)
from zokern.merging import AdamNumbers, Differences, Values
from zokern.sweep import Shard

# A launch has up to about 2·BLOCKS blocks, but one for each tensor.
BLOCKS = 1024
WARPS = 4
NUMBERS = tl.constexpr(len(AdamNumbers._fields))


class Kind(NamedTuple):
    """What a kernel is compiled for: storages, "" where there is no operand, and the rounding."""

    tensor: str  # or the gradient, where there are moments
    second: str  # the base, or the first moment
    third: str  # the second moment
    cached: bool
    rounded: bool


class Columns(NamedTuple):
    tensor: int
    second: int
    third: int
    cached: int
    position: int  # among all tensors


# Of a tensor, in the order of its columns.
Operands = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]

COLUMNS = tl.constexpr(PLACE.value + len(Columns._fields))


@triton.jit
def magnitude(value):
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _load(STORAGE: tl.constexpr, address, access, OCTETS: tl.constexpr):
    """The values of a tile, accessed by (first octet, places, mask); no mask, whole octets."""
    octet, at, mask = access
    if mask is None:
        return load_aligned(STORAGE, address, 0, octet, OCTETS)
    else:
        return load(STORAGE, address, 0, at, mask)


@triton.jit
def _steps(own, access, numbers, merges, KIND: tl.constexpr, OCTETS: tl.constexpr):
    """Adam's Δ; see :mod:`zokern.backends.reference.adam`."""
    row = numbers + tl.load(own + 4) * NUMBERS
    sign, beta1, rest1 = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    beta2, rest2 = tl.load(row + 3), tl.load(row + 4)
    eps, step = tl.load(row + 5), tl.load(row + 6)
    grad = sign * _load(KIND[0], tl.load(own), access, OCTETS)
    first = beta1 * _load(KIND[1], tl.load(own + 1), access, OCTETS)
    second = beta2 * _load(KIND[2], tl.load(own + 2), access, OCTETS)
    first = rounded(KIND[1], fma(rest1, grad, first))
    second = rounded(KIND[2], fma(rest2 * grad, grad, second))
    value = tl.div_rn(first, tl.sqrt_rn(second) + eps) * -step
    if KIND[3]:
        merging = tl.load(merges + tl.load(own + 4)) != 0
        if merging:
            value += _load("fp32", tl.load(own + 3), access, OCTETS)
    return value


@triton.jit
def values_of(own, access, tables, KIND: tl.constexpr, OCTETS: tl.constexpr):
    """The values of a tile of the tensor whose own columns these are; see :func:`_load`."""
    if KIND[2] != "":
        return _steps(own, access, tables[0], tables[1], KIND, OCTETS)
    else:
        value = _load(KIND[0], tl.load(own), access, OCTETS)
        if KIND[1] != "":
            value -= _load(KIND[1], tl.load(own + 1), access, OCTETS)
            if KIND[4]:
                value = rounded(KIND[0], value)
        return value


@triton.jit
def block_of(table, tensors, i, tiles, OCTETS: tl.constexpr, ROWS: tl.constexpr):
    """This block's part of tensor i: its columns, its octets, its tiles; see :func:`access_of`."""
    columns = table + tensors + i * COLUMNS
    tensor_id, unmasked, shard = load_place(columns)
    block = tl.program_id(0) - tl.load(table + i)
    start, origin, unmasked_tiles, all_tiles = tiles_of(block, shard, unmasked, tiles, OCTETS, ROWS)
    return columns + PLACE, tensor_id, (start, origin, shard), unmasked_tiles, all_tiles


@triton.jit
def access_of(place, tile, OCTETS: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr):
    """How a tile is accessed, and its octets of the full tensor."""
    start, origin, shard = place
    octet, row, column = locate(origin, tile, shard, OCTETS, ROWS)
    if MASKED:
        at, mask = owned(row, column, shard, OCTETS)
        return (0, at, mask), octet
    else:
        first = start + tile * OCTETS
        return (first, first * 8 + tl.arange(0, OCTETS * 8), None), octet


@dataclass(frozen=True)
class Launch:
    """Tensors of one kind: their positions, the table, the blocks."""

    kind: Kind
    rows: bool
    members: list[int]
    table: Tensor
    tile: int
    tiles: int
    first_blocks: list[int]  # then the number of all blocks

    @property
    def grid(self) -> tuple[int]:
        return (self.first_blocks[-1],)

    @property
    def blocks(self) -> list[int]:
        """How many each tensor has."""
        return [end - begin for begin, end in pairwise(self.first_blocks)]

    def shape(self) -> dict:
        """The arguments of every kernel that goes over values."""
        return {
            "KIND": self.kind,
            "ROWS": self.rows,
            "OCTETS": self.tile,
            "num_warps": 1 if INTERPRETED.value else WARPS,
        }


class Packed:
    """Values as the kernels take them: contiguous operands, and the tables of Adam's numbers."""

    def __init__(self, values: Values) -> None:
        self.operands, self.kinds = _operands(values)
        self.tensors = [operands[0] for operands in self.operands]
        self.device = self.tensors[0].device
        if isinstance(values, Differences):
            nothing = torch.empty(0, dtype=torch.int64, device=self.device)
            self.tables = nothing.float(), nothing
        else:
            self.tables = (
                values.numbers.to(self.device).contiguous(),
                values.merges.to(self.device).contiguous(),
            )

    def zero_bits(self, i: int) -> int:
        """How many of a magnitude's last bits are 0 in all values of a tensor."""
        kind = self.kinds[i]
        exact = kind.third == "" and (kind.second == "" or kind.rounded)
        return {"bf16": 16, "fp16": 13}.get(kind.tensor, 0) if exact else 0

    def launches(
        self, members: Sequence[int], shards: list[Shard], tensor_ids: list[int]
    ) -> list[Launch]:
        """Shards and ids are of all tensors, not of the members only."""
        by_kind: dict[tuple[Kind, bool], list[int]] = {}
        for i in members:
            numel = self.tensors[i].numel()
            if numel > 0:
                key = self.kinds[i], shards[i].row_length < numel
                by_kind.setdefault(key, []).append(i)
        return [
            self._launch(kind, rows, own, shards, tensor_ids)
            for (kind, rows), own in by_kind.items()
        ]

    def _launch(
        self, kind: Kind, rows: bool, members: list[int], shards: list[Shard], ids: list[int]
    ) -> Launch:
        places = [self._place(i, shards[i], ids[i]) for i in members]
        octets = sum(place.octets for place in places)
        tile = interpreted_tile(octets) if INTERPRETED.value else WARPS * target().warp_size
        tiles = max(1, octets // (tile * BLOCKS))
        first_blocks = first_blocks_of(places, tile * tiles)
        columns = (self._columns(i) for i in members)
        tensors = (place + own for place, own in zip(places, columns, strict=True))
        table = upload([*first_blocks[:-1], *chain(*tensors)], self.device)
        return Launch(kind, rows, members, table, tile, tiles, first_blocks)

    def _place(self, i: int, shard: Shard, tensor_id: int) -> Place:
        return place_of(self.operands[i], shard, tensor_id)

    def _columns(self, i: int) -> Columns:
        tensor, second, third, cached = map(address_of, self.operands[i])
        return Columns(tensor, second, third, cached, i)


def _operands(values: Values) -> tuple[list[Operands], list[Kind]]:
    """For each tensor its operands in the order of the columns, and its kind."""
    others: tuple[list[Tensor] | None, ...]
    if isinstance(values, Differences):
        tensors, others = values.tensors, (values.bases, None, None)
        rounded_ = values.rounded and values.bases is not None
    else:
        tensors, others = values.grads, (values.exp_avgs, values.exp_avg_sqs, values.cached)
        rounded_ = False

    def operand(tensors: list[Tensor] | None, i: int) -> Tensor | None:
        return None if tensors is None else tensors[i].contiguous()

    operands, kinds = [], []
    for i, tensor in enumerate(tensors):
        second, third, cached = (operand(other, i) for other in others)
        operands.append((tensor.contiguous(), second, third, cached))
        kinds.append(
            Kind(
                storage_of(tensor),
                "" if second is None else storage_of(second),
                "" if third is None else storage_of(third),
                cached is not None,
                rounded_,
            )
        )
    return operands, kinds
