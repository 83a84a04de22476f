"""Sweeps that do more than move along noise: dense directions, masters, updates, rounding.

A launch is for all tensors of equal storage and equal dtypes of their dense directions. After what
the table begins with (see :mod:`zokern.backends.triton.tiles`) it holds

- the K draws, or directions ~j for the dense ones;
- for each row of coefficients K triples (coefficient, scale, gradient), as the bits of float32.

Floats in the columns are kept as their bits, too.
"""

from itertools import chain, repeat
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from zokern.backends.triton.launch import INTERPRETED, OPTIONS, on, target
from zokern.backends.triton.noise import fma, octet_values
from zokern.backends.triton.storage import alone, load_tile, round_by, storage_of, store_tile
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
    master: int
    momentum: int
    dense0: int
    dense1: int
    out: int
    decay: int
    step: int
    coeff_row: int
    rows: int


COLUMNS = tl.constexpr(PLACE.value + len(Columns._fields))


@triton.jit
def _direction(draws, triples, k):
    """Its draw, coefficient, scale and share in the update."""
    return (tl.load(draws + k), load_float(triples + 3 * k), load_float(triples + 3 * k + 1),
            load_float(triples + 3 * k + 2))  # fmt: skip


@triton.jit
def _values(draw, noise, dense, access, LAW: tl.constexpr, DENSE0: tl.constexpr,
            DENSE1: tl.constexpr, OCTETS: tl.constexpr, DP4A: tl.constexpr):  # fmt: skip
    """Those of a draw or, where it is negative, of the dense direction ~draw."""
    octet, stream = noise
    if DENSE0 == "" or draw >= 0:
        z = octet_values(LAW, octet, stream, draw, DP4A)
    elif DENSE1 == "" or draw == -1:
        z = load_tile(DENSE0, dense[0], 0, access, OCTETS)
    else:
        z = load_tile(DENSE1, dense[1], 0, access, OCTETS)
    return z


@triton.jit
def _moved(value, u, direction, noise, dense, access, LAW: tl.constexpr, ADDS: tl.constexpr,
           SCALED: tl.constexpr, DENSE0: tl.constexpr, DENSE1: tl.constexpr, OCTETS: tl.constexpr,
           DP4A: tl.constexpr):  # fmt: skip
    """The value moved along a direction and, with ADDS, the update with its share added."""
    draw, coeff, scale, gradient = direction
    z = _values(draw, noise, dense, access, LAW, DENSE0, DENSE1, OCTETS, DP4A)
    if SCALED:
        value *= scale
    value = fma(coeff, z, value)
    if ADDS:
        u = fma(gradient, z, u)
    return value, u


@triton.jit
def _sweep_tile(columns, noise, access, moves, rest, directions, rounding, LAW: tl.constexpr,
                STORAGE: tl.constexpr, OUT: tl.constexpr, MASTER: tl.constexpr,
                UPDATE: tl.constexpr, MOMENTUM: tl.constexpr, SIGN: tl.constexpr,
                ROUNDS: tl.constexpr, DENSE0: tl.constexpr, DENSE1: tl.constexpr,
                SCALED: tl.constexpr, REST: tl.constexpr, OCTETS: tl.constexpr,
                DP4A: tl.constexpr):  # fmt: skip
    """Sweep the octets and the stream of ``noise``, accessed as in ``load_tile``."""
    param, residual, master, momentum, dense, out, decay, step = columns
    draws, triples, only = moves
    if MASTER:
        value = load_tile("fp32", master, 0, access, OCTETS)
    else:
        value = load_tile(STORAGE, param, residual, access, OCTETS)
    if MOMENTUM:
        u = load_tile("fp32", momentum, 0, access, OCTETS) * decay
    else:
        u = tl.zeros([OCTETS * 8], tl.float32)
    if REST == 1:
        value, u = _moved(value, u, only, noise, dense, access,
                          LAW, UPDATE, SCALED, DENSE0, DENSE1, OCTETS, DP4A)  # fmt: skip
    elif REST == -1:
        for k in range(rest):
            value, u = _moved(value, u, _direction(draws, triples, k), noise, dense, access,
                              LAW, UPDATE, SCALED, DENSE0, DENSE1, OCTETS, DP4A)  # fmt: skip
    if MOMENTUM:
        # A dense direction may be this memory, but only before rest: what is stored here was made
        # from all that is read there.
        store_tile("fp32", momentum, 0, access, u)
    if UPDATE:
        if SIGN:
            u = (u > 0).to(tl.float32) - (u < 0).to(tl.float32)
        value = fma(step, u, value)
    if MASTER and rest > 0:
        store_tile("fp32", master, 0, access, value)
    if REST == 0:
        value, u = _moved(value, u, only, noise, dense, access,
                          LAW, False, SCALED, DENSE0, DENSE1, OCTETS, DP4A)  # fmt: skip
    elif REST == -1:
        for k in range(rest, directions):
            value, u = _moved(value, u, _direction(draws, triples, k), noise, dense, access,
                              LAW, False, SCALED, DENSE0, DENSE1, OCTETS, DP4A)  # fmt: skip
    if ROUNDS:
        octet, stream = noise
        random = octet_values("rounding16", octet, stream, rounding, DP4A)
        value = round_by(STORAGE if OUT == "" else OUT, random, value)
    if OUT == "":
        store_tile(STORAGE, param, residual, access, value)
    else:
        store_tile(OUT, out, 0, access, value)


@triton.jit(
    do_not_specialize=[
        "tensors",
        "rest",
        "directions",
        "tiles",
        "seed_low",
        "seed_high",
        "rounding",
    ]
)
def update_kernel(
    table,
    tensors: tl.int32,
    rest: tl.int32,
    directions: tl.int32,
    tiles: tl.int32,
    seed_low: tl.uint32,
    seed_high: tl.uint32,
    rounding: tl.uint32,
    LAW: tl.constexpr,
    STORAGE: tl.constexpr,
    OUT: tl.constexpr,
    MASTER: tl.constexpr,
    UPDATE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    SIGN: tl.constexpr,
    ROUNDS: tl.constexpr,
    DENSE0: tl.constexpr,
    DENSE1: tl.constexpr,
    SCALED: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    PICKED: tl.constexpr,
    OCTETS: tl.constexpr,
    DP4A: tl.constexpr,
):
    """A block sweeps up to ``tiles`` tiles of OCTETS octets, of one tensor.

    MASTER, UPDATE and MOMENTUM say what there is, OUT, DENSE0 and DENSE1 in which storage (or ""),
    SCALED that some scale is not 1, ROWS that some tensor has several rows, PICKED that somebody
    picked them. REST is ``rest`` where there is a single direction, else -1.
    """
    i = find(table, tensors, tl.program_id(0))
    place = table + tensors + i * COLUMNS
    tensor_id, unmasked, shard = load_place(place)
    stream = (seed_low.to(tl.uint32), seed_high.to(tl.uint32), tensor_id)
    own = place + PLACE
    dense = (tl.load(own + 4), tl.load(own + 5))
    columns = (tl.load(own), tl.load(own + 1), tl.load(own + 2), tl.load(own + 3), dense,
               tl.load(own + 6), load_float(own + 7), load_float(own + 8))  # fmt: skip
    draws = table + tensors * (1 + COLUMNS)
    triples = draws + directions + tl.load(own + 9) * directions * 3
    # A single direction is read once, not for each tile.
    only = (0, 0.0, 0.0, 0.0)
    if REST != -1:
        only = _direction(draws, triples, 0)
    moves = (draws, triples, only)
    picked = tl.load(own + 10)

    block = tl.program_id(0) - tl.load(table + i)
    start, origin, unmasked_tiles, all_tiles = tiles_of(block, shard, unmasked, tiles, OCTETS, ROWS)
    for tile in range(unmasked_tiles):
        octet, _, _ = locate(origin, tile, shard, OCTETS, ROWS, picked, PICKED)
        first = start + tile * OCTETS
        access = (first, first * 8 + tl.arange(0, OCTETS * 8), None)
        _sweep_tile(columns, (octet, stream), access, moves, rest, directions, rounding, LAW,
                    STORAGE, OUT, MASTER, UPDATE, MOMENTUM, SIGN, ROUNDS, DENSE0, DENSE1, SCALED,
                    REST, OCTETS, DP4A)  # fmt: skip
    for tile in range(unmasked_tiles, all_tiles):
        octet, row, column = locate(origin, tile, shard, OCTETS, ROWS, picked, PICKED)
        at, mask = owned(row, column, shard, OCTETS)
        _sweep_tile(columns, (octet, stream), (0, at, mask), moves, rest, directions, rounding, LAW,
                    STORAGE, OUT, MASTER, UPDATE, MOMENTUM, SIGN, ROUNDS, DENSE0, DENSE1, SCALED,
                    REST, OCTETS, DP4A)  # fmt: skip


def perturb_(sweep: Sweep) -> None:
    with row_major(sweep) as contiguous, on(sweep.params[0].device):

        def kind(i: int) -> tuple[tuple[str, ...], bool]:
            param = storage_of(contiguous.params[i], contiguous.residuals[i])
            storages = (param, *(storage_of(vectors[i]) for vectors in contiguous.dense))
            return storages, contiguous.rows[i] is not None

        launches = launches_of(contiguous.params, contiguous.shards, kind)
        for ((storages, picked), rows), members in launches.items():
            _launch(contiguous, members, storages, rows, picked)


def _launch(
    sweep: Sweep, members: list[int], storages: tuple[str, ...], rows: bool, picked: bool
) -> None:
    storage, dense0, dense1 = (*storages, "", "")[:3]
    update = sweep.update
    coeff_rows, triples = _coefficients(sweep, members)
    places = [_place(sweep, i) for i in members]
    octets = sum(place.octets for place in places)
    tile, warps = _tile(storage, octets)
    tiles = min(MAX_TILES, max(1, octets // (tile * BLOCKS)))
    *first_blocks, all_blocks = first_blocks_of(places, tile * tiles)
    columns = (_columns(sweep, i, row) for i, row in zip(members, coeff_rows, strict=True))
    tensors = (place + own for place, own in zip(places, columns, strict=True))
    draws = (draw % (1 << 64) for draw in sweep.draws)
    numbers = [*first_blocks, *chain(*tensors), *draws, *float_bits(triples)]
    update_kernel[(all_blocks,)](
        upload(numbers, sweep.params[0].device),
        len(members),
        sweep.rest,
        len(sweep.draws),
        tiles,
        sweep.seed & 0xFFFFFFFF,
        sweep.seed >> 32,
        sweep.rounding or 0,
        LAW=sweep.law,
        STORAGE=storage,
        OUT="" if sweep.outs is None else alone(storage),
        MASTER=sweep.masters is not None,
        UPDATE=update is not None,
        MOMENTUM=update is not None and update.momenta is not None,
        SIGN=update is not None and update.sign,
        ROUNDS=sweep.rounding is not None,
        DENSE0=dense0,
        DENSE1=dense1,
        SCALED=any(scale != 1 for scale in triples[1::3]),
        REST=sweep.rest if len(sweep.draws) == 1 else -1,
        ROWS=rows,
        PICKED=picked,
        OCTETS=tile,
        DP4A=target().dp4a,
        num_warps=warps,
        **OPTIONS,
    )


def _place(sweep: Sweep, i: int) -> Place:
    picked = sweep.rows[i] is not None
    return place_of(_operands(sweep, i), sweep.shards[i], sweep.tensor_ids[i], picked=picked)


def _operands(sweep: Sweep, i: int) -> tuple[Tensor | None, ...]:
    """Of a tensor, in the order of its columns."""
    master = None if sweep.masters is None else sweep.masters[i]
    momenta = None if sweep.update is None else sweep.update.momenta
    momentum = None if momenta is None else momenta[i]
    dense = [vectors[i] for vectors in sweep.dense]
    dense0, dense1 = (*dense, None, None)[:2]
    out = None if sweep.outs is None else sweep.outs[i]
    return sweep.params[i], sweep.residuals[i], master, momentum, dense0, dense1, out


def _columns(sweep: Sweep, i: int, coeff_row: int) -> Columns:
    update = sweep.update
    numbers = (0.0, 0.0) if update is None else (update.decays[i], update.steps[i])
    addresses = map(address_of, _operands(sweep, i))
    return Columns._make((*addresses, *float_bits(numbers), coeff_row, address_of(sweep.rows[i])))


def _coefficients(sweep: Sweep, members: list[int]) -> tuple[list[int], list[float]]:
    """The row of each tensor, and all rows: coefficient, scale and gradient of each direction."""
    zeros = [0.0] * len(sweep.draws)
    gradient = repeat(zeros) if sweep.update is None else sweep.update.gradient
    rows = list(zip(sweep.coeffs, sweep.scales, gradient, strict=False))
    return coefficient_rows([rows[i] for i in members])


def _tile(storage: str, octets: int) -> tuple[int, int]:
    """Octets of a tile and warps of a block.

    One warp: float32 operands beside half-precision ones go in vectors of other elements, which
    then change places within the warp. int8 residuals go in vectors of one octet, others of two.
    """
    if INTERPRETED.value:
        return interpreted_tile(octets), 1
    return (1 if storage == "bf16_int8" else 2) * target().warp_size, 1
