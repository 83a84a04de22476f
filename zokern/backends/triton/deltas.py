"""Merges of models over a base, in Triton; the order is that of :mod:`zokern.deltas`.

A launch is for all tensors of equal storages. After what the table begins with (see
:mod:`zokern.backends.triton.tiles`) it holds

- the divisor and the scale;
- for each model its :class:`ModelColumns`;
- for each tensor and each model of it the :class:`SourceColumns`.

Floats are kept as the bits of float32, addresses are 0 where there is nothing.
"""

from itertools import chain
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from zokern.backends.triton.launch import INTERPRETED, OPTIONS, on, target
from zokern.backends.triton.noise import octet_values
from zokern.backends.triton.storage import load, load_aligned, rounded, storage_of, store
from zokern.backends.triton.tiles import (
    PLACE,
    address_of,
    find,
    first_blocks_of,
    float_bits,
    interpreted_tile,
    launches_of,
    load_float,
    load_place,
    place_of,
    tiles_of,
    upload,
)
from zokern.backends.triton.values import access_of, magnitude
from zokern.deltas import DeltaMerge, contiguous
from zokern.sweep import Shard

# A block merges up to MAX_TILES tiles, fewer where there would not be BLOCKS blocks.
MAX_TILES = 16
BLOCKS = 8192
WARPS = 4
# Of a model whose storage is a matter of the model.
TYPES = ("fp32", "bf16", "fp16")


class Columns(NamedTuple):
    """What the table holds for a tensor after its place."""

    out: int
    base: int
    source: int  # its first


class ModelColumns(NamedTuple):
    weight: int
    limit: int
    draw: int


class SourceColumns(NamedTuple):
    tensor: int
    type: int  # in TYPES
    ratio: int
    threshold: int
    cut: int


class Kind(NamedTuple):
    """What a kernel is compiled for."""

    out: str
    base: str  # "" where there is none
    models: str  # "mixed" where they differ
    rounded: bool
    mask: str  # "none", "random" or "magnitude"
    ratios: bool
    votes: str
    combine: str


COLUMNS = tl.constexpr(PLACE.value + len(Columns._fields))
MODEL_COLUMNS = tl.constexpr(len(ModelColumns._fields))
SOURCE_COLUMNS = tl.constexpr(len(SourceColumns._fields))


@triton.jit
def _load(STORAGE: tl.constexpr, address, access, OCTETS: tl.constexpr):
    """The values of a tile, accessed as :func:`zokern.backends.triton.values.access_of` says."""
    octet, at, mask = access
    if mask is None:
        return load_aligned(STORAGE, address, 0, octet, OCTETS)
    else:
        return load(STORAGE, address, 0, at, mask)


@triton.jit
def _load_model(source, access, KIND: tl.constexpr, OCTETS: tl.constexpr):
    address = tl.load(source)
    if KIND[2] != "mixed":
        return _load(KIND[2], address, access, OCTETS)
    else:
        type_ = tl.load(source + 1)
        if type_ == 0:
            value = _load("fp32", address, access, OCTETS)
        elif type_ == 1:
            value = _load("bf16", address, access, OCTETS)
        else:
            value = _load("fp16", address, access, OCTETS)
        return value


@triton.jit
def _rounded(source, value, KIND: tl.constexpr):
    """To the model's dtype, where deltas are rounded."""
    if not KIND[3]:
        return value
    elif KIND[2] != "mixed":
        return rounded(KIND[2], value)
    else:
        type_ = tl.load(source + 1)
        if type_ == 1:
            value = rounded("bf16", value)
        elif type_ == 2:
            value = rounded("fp16", value)
        return value


@triton.jit
def _delta(source, model, base, noise, access, KIND: tl.constexpr, OCTETS: tl.constexpr,
           DP4A: tl.constexpr):  # fmt: skip
    """A model's masked delta, times its ratio, and what it adds."""
    value = _load_model(source, access, KIND, OCTETS)
    if KIND[1] != "":
        value = _rounded(source, value - base, KIND)
    if KIND[4] == "random":
        octet, stream = noise
        words = octet_values("uniform32", octet, stream, tl.load(model + 2), DP4A)
        value = tl.where(words.to(tl.int64) < tl.load(model + 1), value, 0.0)
    elif KIND[4] == "magnitude":
        threshold = magnitude(tl.load(tl.load(source + 3).to(tl.pointer_type(tl.float32))))
        cut = tl.load(tl.load(source + 4).to(tl.pointer_type(tl.int64)))
        m = magnitude(value)
        kept = (m > threshold) | ((m == threshold) & (access[1] < cut))
        value = tl.where(kept, value, 0.0)
    if KIND[5]:
        ratio = tl.load(tl.load(source + 2).to(tl.pointer_type(tl.float32)))
        value = _rounded(source, ratio * value, KIND)
    return value, _rounded(source, load_float(model) * value, KIND)


@triton.jit
def _sign_or_zero(value):
    return (value > 0).to(tl.float32) - (value < 0).to(tl.float32)


@triton.jit
def _elected(tables, models, base, noise, access, KIND: tl.constexpr, OCTETS: tl.constexpr,
             DP4A: tl.constexpr):  # fmt: skip
    """The sum of the votes."""
    model, source = tables
    total = tl.zeros([OCTETS * 8], tl.float32)
    for m in range(models):
        delta, p = _delta(source + m * SOURCE_COLUMNS, model + m * MODEL_COLUMNS, base, noise,
                          access, KIND, OCTETS, DP4A)  # fmt: skip
        if KIND[6] == "frequency":
            total += _sign_or_zero(delta)
        elif KIND[6] == "weighted":
            total += p
        else:
            total += delta
    return total


@triton.jit
def _combined(tables, models, base, noise, access, sign, divisor, KIND: tl.constexpr,
              OCTETS: tl.constexpr, DP4A: tl.constexpr):  # fmt: skip
    """What those add up to whose votes have the elected sign; all where there are no votes."""
    model, source = tables
    total = tl.zeros([OCTETS * 8], tl.float32)
    count = tl.zeros([OCTETS * 8], tl.float32)
    for m in range(models):
        delta, p = _delta(source + m * SOURCE_COLUMNS, model + m * MODEL_COLUMNS, base, noise,
                          access, KIND, OCTETS, DP4A)  # fmt: skip
        if KIND[6] == "none":
            total += p
        else:
            side = sign * (p if KIND[6] == "weighted" else delta)
            if KIND[7] == "max":
                smaller = (side < 0) | (tl.abs(p) <= total) | (total != total)
                total = tl.where(smaller, total, tl.abs(p))
            else:
                total += tl.where(side < 0, 0.0, p)
            if KIND[7] == "mean":
                one = load_float(model + m * MODEL_COLUMNS) if KIND[6] == "weighted" else 1.0
                count += tl.where(side > 0, one, 0.0)
    if KIND[7] == "max":
        return sign * total
    elif KIND[7] == "mean":
        return tl.div_rn(total, tl.where(count == 0, 1.0, count))
    else:
        return tl.div_rn(total, divisor + tl.zeros_like(total))


@triton.jit
def _merge_tile(own, tables, numbers, models, zero_up, noise, access, KIND: tl.constexpr,
                OCTETS: tl.constexpr, DP4A: tl.constexpr):  # fmt: skip
    base = tl.zeros([OCTETS * 8], tl.float32)
    sign = base
    if KIND[1] != "":
        base = _load(KIND[1], tl.load(own + 1), access, OCTETS)
    if KIND[6] != "none":
        sign = _elected(tables, models, base, noise, access, KIND, OCTETS, DP4A)
    if KIND[7] == "sign":
        value = _sign_or_zero(sign)
    else:
        sign = tl.where((sign > 0) | ((sign == 0) & (zero_up != 0)), 1.0, -1.0)
        divisor, scale = load_float(numbers), load_float(numbers + 1)
        value = scale * _combined(tables, models, base, noise, access, sign, divisor,
                                  KIND, OCTETS, DP4A)  # fmt: skip
        if KIND[1] != "":
            value = base + value
    _, at, mask = access
    store(KIND[0], tl.load(own), 0, at, mask, value, 16 if mask is None else 1)


@triton.jit(do_not_specialize=["tensors", "models", "tiles", "zero_up", "seed_low", "seed_high"])
def merge_kernel(
    table,
    tensors: tl.int32,
    models: tl.int32,
    tiles: tl.int32,
    zero_up: tl.int32,
    seed_low: tl.uint32,
    seed_high: tl.uint32,
    KIND: tl.constexpr,
    OCTETS: tl.constexpr,
    DP4A: tl.constexpr,
):
    """A block merges up to ``tiles`` tiles of OCTETS octets of one tensor."""
    i = find(table, tensors, tl.program_id(0))
    columns = table + tensors + i * COLUMNS
    tensor_id, unmasked, shard = load_place(columns)
    own = columns + PLACE
    stream = (seed_low.to(tl.uint32), seed_high.to(tl.uint32), tensor_id)
    numbers = table + tensors + tensors * COLUMNS
    model = numbers + 2
    tables = (model, model + models * MODEL_COLUMNS + tl.load(own + 2) * SOURCE_COLUMNS)
    block = tl.program_id(0) - tl.load(table + i)
    start, origin, unmasked_tiles, all_tiles = tiles_of(
        block, shard, unmasked, tiles, OCTETS, False
    )
    place = (start, origin, shard)
    for tile in range(unmasked_tiles):
        access, octet = access_of(place, tile, OCTETS, False, False)
        _merge_tile(own, tables, numbers, models, zero_up, (octet, stream), access,
                    KIND, OCTETS, DP4A)  # fmt: skip
    for tile in range(unmasked_tiles, all_tiles):
        access, octet = access_of(place, tile, OCTETS, False, True)
        _merge_tile(own, tables, numbers, models, zero_up, (octet, stream), access,
                    KIND, OCTETS, DP4A)  # fmt: skip


def merge_deltas(merge: DeltaMerge) -> None:
    merge = contiguous(merge)
    shards = [Shard(0, out.numel(), out.numel()) for out in merge.outs]
    launches = launches_of(merge.outs, shards, lambda i: _kind(merge, i))
    with on(merge.outs[0].device):
        for (kind, _), members in launches.items():
            _launch(merge, members, shards, kind)


def _kind(merge: DeltaMerge, i: int) -> Kind:
    models = {storage_of(model[i]) for model in merge.models}
    mask = "none" if all(limit >> 32 for limit in merge.limits) else "random"
    return Kind(
        out=storage_of(merge.outs[i]),
        base="" if merge.bases is None else storage_of(merge.bases[i]),
        models=models.pop() if len(models) == 1 else "mixed",
        rounded=merge.rounded,
        mask=mask if merge.thresholds is None else "magnitude",
        ratios=merge.ratios is not None,
        votes=merge.votes,
        combine=merge.combine,
    )


def _launch(merge: DeltaMerge, members: list[int], shards: list[Shard], kind: Kind) -> None:
    places = [place_of(_operands(merge, i), shards[i], merge.tensor_ids[i]) for i in members]
    octets = sum(place.octets for place in places)
    tile = interpreted_tile(octets) if INTERPRETED.value else WARPS * target().warp_size
    tiles = max(1, min(MAX_TILES, octets // (tile * BLOCKS)))
    first_blocks = first_blocks_of(places, tile * tiles)
    count = len(merge.models)
    columns = (
        (*place, *_columns(merge, i, n * count))
        for n, (place, i) in enumerate(zip(places, members, strict=True))
    )
    models = zip(float_bits(merge.weights), merge.limits, merge.draws, strict=True)
    sources = (_source(merge, m, i) for i in members for m in range(count))
    numbers = [
        *first_blocks[:-1],
        *chain(*columns),
        *float_bits([merge.divisor, merge.scale]),
        *chain(*(ModelColumns(*model) for model in models)),
        *chain(*sources),
    ]
    merge_kernel[(first_blocks[-1],)](
        upload(numbers, merge.outs[0].device),
        len(members),
        count,
        tiles,
        int(merge.zero_up),
        merge.seed & 0xFFFFFFFF,
        merge.seed >> 32,
        KIND=kind,
        OCTETS=tile,
        DP4A=target().dp4a,
        num_warps=1 if INTERPRETED.value else WARPS,
        **OPTIONS,
    )


def _operands(merge: DeltaMerge, i: int) -> list[Tensor]:
    bases = [] if merge.bases is None else [merge.bases[i]]
    return [merge.outs[i], *bases, *(model[i] for model in merge.models)]


def _columns(merge: DeltaMerge, i: int, source: int) -> Columns:
    base = None if merge.bases is None else merge.bases[i]
    return Columns(address_of(merge.outs[i]), address_of(base), source)


def _source(merge: DeltaMerge, m: int, i: int) -> SourceColumns:
    def entry(numbers: Tensor | None) -> int:
        return 0 if numbers is None else numbers[m, i].data_ptr()

    tensor = merge.models[m][i]
    return SourceColumns(
        address_of(tensor),
        TYPES.index(storage_of(tensor)),
        entry(merge.ratios),
        entry(merge.thresholds),
        entry(merge.cuts),
    )
