"""A merging optimizer's step: Adam's moments and Δ, the mask, the consensus with τ, the weights.

A launch is for all tensors of equal storage and equal dtypes of their other operands. Of the tables
of the step it holds the addresses alone: the kernel reads them where they lie, on the device.
"""

from itertools import chain
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from zokern.backends.tables import Tables
from zokern.backends.triton.launch import INTERPRETED, OPTIONS, on, target
from zokern.backends.triton.noise import fma, octet_values
from zokern.backends.triton.storage import load, load_tile, rounded, storage_of, store_tile
from zokern.backends.triton.tiles import (
    PLACE,
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
from zokern.merging import TAU_DRAWS, MergeStep, SparseTau, row_major

# A block takes up to MAX_TILES tiles, fewer where there would not be BLOCKS blocks.
MAX_TILES = 16
BLOCKS = 8192

TAU_DRAW = tl.constexpr(TAU_DRAWS)
# Halvings that find one of 2^16 places.
HALVINGS = tl.constexpr(17)


class Columns(NamedTuple):
    """The addresses that the table holds for a tensor after its place, as the kernel reads them."""

    param: int
    residual: int
    master: int
    grad: int
    exp_avg: int
    exp_avg_sq: int
    cached: int
    tau: int
    tau_starts: int
    tau_places: int
    numbers: int
    merges: int
    threshold: int
    cut: int
    draw: int
    limit: int


COLUMNS = tl.constexpr(PLACE.value + len(Columns._fields))


class Kinds(NamedTuple):
    """The storages of a tensor's operands, "" where there is none, and whether τ is sparse."""

    param: str
    grad: str
    exp_avg: str
    exp_avg_sq: str
    tau: str
    sparse: bool


@triton.jit
def _entry(column, dtype: tl.constexpr):
    """What lies at the address in a column."""
    return tl.load(tl.load(column).to(tl.pointer_type(dtype)))


@triton.jit
def _load_numbers(column):
    """A tensor's AdamNumbers: those of the moments, those of Δ, those of the weights."""
    n = tl.load(column).to(tl.pointer_type(tl.float32))
    moments = (tl.load(n), tl.load(n + 1), tl.load(n + 2), tl.load(n + 3), tl.load(n + 4))
    # A difference from 0 would not have the sign of a zero.
    delta = (tl.load(n + 5), tl.load(n + 6) * -1.0, tl.load(n + 10), tl.load(n + 11),
             tl.load(n + 12))  # fmt: skip
    return moments, delta, (tl.load(n + 7), tl.load(n + 8), tl.load(n + 9))


@triton.jit
def _load_row(columns, METHOD: tl.constexpr):
    """Whether the tensor merges, and its mask; ema's pull is not put off."""
    merges = (_entry(columns + 11, tl.int64) != 0) | (METHOD == "ema")
    if METHOD == "ties" or METHOD == "ties_paper":
        mask = (_entry(columns + 12, tl.uint32) & 0x7FFFFFFF, _entry(columns + 13, tl.int64))
    else:
        mask = (_entry(columns + 14, tl.int64), _entry(columns + 15, tl.int64))
    return merges, mask


@triton.jit
def _sparse_tau(TAU: tl.constexpr, addresses, at, mask):
    """Each element's value if it is among the sparse ones of its 2^16 elements, else 0."""
    values, starts, places = addresses
    starts = starts.to(tl.pointer_type(tl.int64)) + (at >> 16)
    places = places.to(tl.pointer_type(tl.uint16))
    place = at & 0xFFFF
    exists = at >= 0 if mask is None else mask
    low = tl.load(starts, exists, other=0)
    end = tl.load(starts + 1, exists, other=0)
    high = end
    for _ in range(HALVINGS):
        middle = low + high >> 1
        searching = low < high
        below = tl.load(places + middle, searching, other=0).to(tl.int64) < place
        low = tl.where(searching & below, middle + 1, low)
        high = tl.where(searching & (below == 0), middle, high)
    found = low < end
    found = found & (tl.load(places + low, found, other=0).to(tl.int64) == place)
    return tl.where(found, load(TAU, values, 0, low, found), 0.0)


@triton.jit
def _load_tau(addresses, access, TAU: tl.constexpr, SPARSE: tl.constexpr, OCTETS: tl.constexpr):
    if TAU == "":
        return tl.zeros([OCTETS * 8], tl.float32)
    elif SPARSE:
        return _sparse_tau(TAU, addresses, access[1], access[2])
    else:
        return load_tile(TAU, addresses[0], 0, access, OCTETS)


@triton.jit
def _adam(addresses, numbers, access, GRAD: tl.constexpr, FIRST: tl.constexpr,
          SECOND: tl.constexpr, OCTETS: tl.constexpr):  # fmt: skip
    """Store the new moments; Δ without what is cached."""
    sign, beta1, one_minus_beta1, beta2, one_minus_beta2 = numbers[0]
    eps, minus_step, _, _, _ = numbers[1]
    grad = sign * load_tile(GRAD, addresses[0], 0, access, OCTETS)
    first = load_tile(FIRST, addresses[1], 0, access, OCTETS)
    second = load_tile(SECOND, addresses[2], 0, access, OCTETS)
    first = rounded(FIRST, fma(one_minus_beta1, grad, beta1 * first))
    second = rounded(SECOND, fma(one_minus_beta2 * grad, grad, beta2 * second))
    store_tile(FIRST, addresses[1], 0, access, first)
    store_tile(SECOND, addresses[2], 0, access, second)
    return tl.div_rn(first, tl.sqrt_rn(second) + eps) * minus_step


@triton.jit
def _kept_at_random(value, noise, draw, limit):
    """The value, 0 where the element's word is not below the limit; 2^32 keeps all."""
    if limit < 1 << 32:
        words = octet_values("uniform32", noise[0], noise[1], draw, False)
        value = tl.where(words.to(tl.int64) < limit, value, 0.0)
    return value


@triton.jit
def _masked(delta, tau, mask, noise, at, METHOD: tl.constexpr):
    """Δ and τ with 0 where they are not kept."""
    if METHOD == "ties" or METHOD == "ties_paper":
        threshold, cut = mask
        magnitude = delta.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
        kept = (magnitude > threshold) | ((magnitude == threshold) & (at < cut))
        delta = tl.where(kept, delta, 0.0)
    else:
        draw, limit = mask
        delta = _kept_at_random(delta, noise, draw, limit)
        if METHOD == "dare_paper":
            tau = _kept_at_random(tau, noise, draw + TAU_DRAW, limit)
    return delta, tau


@triton.jit
def _agreeing(x, positive, negative):
    """x, or 0 where its sign is not that of the sum. A sum that is NaN keeps it."""
    return tl.where((positive & (x < 0)) | (negative & (x > 0)), 0.0, x)


@triton.jit
def _consensus(tau, delta, numbers, METHOD: tl.constexpr):
    """What τ and Δ add to the parameter together."""
    _, alpha, weight = numbers
    if METHOD == "ties_paper":
        a = alpha * tau
        b = weight * delta
        total = a + b
        positive = total > 0
        negative = total < 0
        agreed = _agreeing(a, positive, negative) + _agreeing(b, positive, negative)
        return tl.where(total == 0, 0.0, agreed)
    else:
        if METHOD == "ties":
            total = tau + delta
            positive = total >= 0
            negative = total < 0
            tau = _agreeing(tau, positive, negative)
            delta = _agreeing(delta, positive, negative)
        return fma(alpha, tau, weight * delta)


@triton.jit
def _decayed(value, decay):
    if decay != 0:
        value = fma(decay * -1.0, value, value)
    return value


@triton.jit
def _merged(value, tau, delta, numbers, mask, noise, at, METHOD: tl.constexpr):
    """The new value where the step merges; that of before is without what was cached."""
    decay, alpha, _ = numbers[2]
    if METHOD == "ema":
        moved = _decayed(value + delta, decay)
        return fma(alpha, tau - moved, moved)
    else:
        delta, tau = _masked(delta, tau, mask, noise, at, METHOD)
        _, _, scale, ratio, clip = numbers[1]
        scaled = ratio * (scale * delta)
        floor = clip * -1.0
        clamped = tl.where(scaled > clip, clip, tl.where(scaled < floor, floor, scaled))
        return _decayed(value + _consensus(tau, clamped, numbers[2], METHOD), decay)


@triton.jit
def _merge_tile(columns, numbers, row, noise, access, METHOD: tl.constexpr, STORAGE: tl.constexpr,
                MASTER: tl.constexpr, GRAD: tl.constexpr, FIRST: tl.constexpr,
                SECOND: tl.constexpr, CACHED: tl.constexpr, TAU: tl.constexpr,
                SPARSE: tl.constexpr, OCTETS: tl.constexpr):  # fmt: skip
    """Take the octets and the stream of ``noise``, accessed as in ``load_tile``."""
    param, residual, master, adam, cached, tau = columns
    merges, mask = row
    if MASTER:
        value = load_tile("fp32", master, 0, access, OCTETS)
    else:
        value = load_tile(STORAGE, param, residual, access, OCTETS)
    delta = _adam(adam, numbers, access, GRAD, FIRST, SECOND, OCTETS)
    if CACHED:
        before = load_tile("fp32", cached, 0, access, OCTETS)
        sum_ = delta + before
        store_tile("fp32", cached, 0, access, tl.where(merges, 0.0, sum_))
        if merges:
            delta = sum_
            value = value - before
    if merges:
        taus = _load_tau(tau, access, TAU, SPARSE, OCTETS)
        value = _merged(value, taus, delta, numbers, mask, noise, access[1], METHOD)
    else:
        value = _decayed(value + delta, numbers[2][0])
    if MASTER:
        store_tile("fp32", master, 0, access, value)
    store_tile(STORAGE, param, residual, access, value)


@triton.jit(do_not_specialize=["tensors", "tiles", "seed_low", "seed_high"])
def merge_step_kernel(
    table,
    tensors: tl.int32,
    tiles: tl.int32,
    seed_low: tl.uint32,
    seed_high: tl.uint32,
    METHOD: tl.constexpr,
    STORAGE: tl.constexpr,
    MASTER: tl.constexpr,
    GRAD: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    CACHED: tl.constexpr,
    TAU: tl.constexpr,
    SPARSE: tl.constexpr,
    ROWS: tl.constexpr,
    OCTETS: tl.constexpr,
):
    """A block takes up to ``tiles`` tiles of OCTETS octets, of one tensor.

    MASTER and CACHED say what there is, GRAD, FIRST, SECOND and TAU (or "") in which storage, ROWS
    that some tensor has several rows.
    """
    i = find(table, tensors, tl.program_id(0))
    place = table + tensors + i * COLUMNS
    tensor_id, unmasked, shard = load_place(place)
    stream = (seed_low.to(tl.uint32), seed_high.to(tl.uint32), tensor_id)
    own = place + PLACE
    adam = (tl.load(own + 3), tl.load(own + 4), tl.load(own + 5))
    tau = (tl.load(own + 7), tl.load(own + 8), tl.load(own + 9))
    columns = (tl.load(own), tl.load(own + 1), tl.load(own + 2), adam, tl.load(own + 6), tau)
    numbers = _load_numbers(own + 10)
    row = _load_row(own, METHOD)

    block = tl.program_id(0) - tl.load(table + i)
    start, origin, unmasked_tiles, all_tiles = tiles_of(block, shard, unmasked, tiles, OCTETS, ROWS)
    for tile in range(unmasked_tiles):
        octet, _, _ = locate(origin, tile, shard, OCTETS, ROWS)
        first = start + tile * OCTETS
        access = (first, first * 8 + tl.arange(0, OCTETS * 8), None)
        _merge_tile(columns, numbers, row, (octet, stream), access, METHOD, STORAGE, MASTER,
                    GRAD, FIRST, SECOND, CACHED, TAU, SPARSE, OCTETS)  # fmt: skip
    for tile in range(unmasked_tiles, all_tiles):
        octet, line, column = locate(origin, tile, shard, OCTETS, ROWS)
        at, mask = owned(line, column, shard, OCTETS)
        _merge_tile(columns, numbers, row, (octet, stream), (0, at, mask), METHOD, STORAGE, MASTER,
                    GRAD, FIRST, SECOND, CACHED, TAU, SPARSE, OCTETS)  # fmt: skip


def merge_step_(step: MergeStep) -> None:
    with row_major(step) as rows, on(step.params[0].device):
        tables = Tables(step.params[0].device)
        columns = _columns(rows, tables)
        launches = launches_of(rows.params, rows.mask.shards, lambda i: _kinds(rows, i))
        for (kinds, several_rows), members in launches.items():
            _launch(rows, columns, members, kinds, several_rows)


def _kinds(step: MergeStep, i: int) -> Kinds:
    steps = step.steps
    tau = None if step.taus is None else step.taus[i]
    values = tau.values if isinstance(tau, SparseTau) else tau
    return Kinds(
        param=storage_of(step.params[i], step.residuals[i]),
        grad=storage_of(steps.grads[i]),
        exp_avg=storage_of(steps.exp_avgs[i]),
        exp_avg_sq=storage_of(steps.exp_avg_sqs[i]),
        tau="" if values is None else storage_of(values),
        sparse=isinstance(tau, SparseTau),
    )


def _operands(step: MergeStep, i: int) -> tuple[Tensor | None, ...]:
    """Those of a tensor that have its elements, in the order of their columns."""
    steps = step.steps
    tau = None if step.taus is None else step.taus[i]
    return (
        step.params[i],
        step.residuals[i],
        None if step.masters is None else step.masters[i],
        steps.grads[i],
        steps.exp_avgs[i],
        steps.exp_avg_sqs[i],
        None if steps.cached is None else steps.cached[i],
        None if isinstance(tau, SparseTau) else tau,
    )


def _columns(step: MergeStep, tables: Tables) -> list[Columns]:
    """Of every tensor."""
    steps, mask, count = step.steps, step.mask, len(step.params)
    rows = [
        tables.rows(table, count)
        for table in (
            steps.numbers, steps.merges, mask.thresholds, mask.cuts, mask.draws, mask.limits
        )
    ]  # fmt: skip
    columns = []
    for i, entries in enumerate(zip(*rows, strict=True)):
        *addresses, dense = map(address_of, _operands(step, i))
        tau = None if step.taus is None else step.taus[i]
        sparse = (tau.values, tau.starts, tau.places) if isinstance(tau, SparseTau) else None
        taus = (dense, 0, 0) if sparse is None else map(address_of, sparse)
        columns.append(Columns(*addresses, *taus, *entries))
    return columns


def _launch(
    step: MergeStep, columns: list[Columns], members: list[int], kinds: Kinds, rows: bool
) -> None:
    mask = step.mask
    places = [place_of(_operands(step, i), mask.shards[i], mask.tensor_ids[i]) for i in members]
    octets = sum(place.octets for place in places)
    tile, warps = _tile(octets)
    tiles = min(MAX_TILES, max(1, octets // (tile * BLOCKS)))
    *first_blocks, all_blocks = first_blocks_of(places, tile * tiles)
    tensors = (place + columns[i] for place, i in zip(places, members, strict=True))
    merge_step_kernel[(all_blocks,)](
        upload([*first_blocks, *chain(*tensors)], step.params[0].device),
        len(members),
        tiles,
        mask.seed & 0xFFFFFFFF,
        mask.seed >> 32,
        METHOD=step.method,
        STORAGE=kinds.param,
        MASTER=step.masters is not None,
        GRAD=kinds.grad,
        FIRST=kinds.exp_avg,
        SECOND=kinds.exp_avg_sq,
        CACHED=step.steps.cached is not None,
        TAU=kinds.tau,
        SPARSE=kinds.sparse,
        ROWS=rows,
        OCTETS=tile,
        num_warps=warps,
        **OPTIONS,
    )


def _tile(octets: int) -> tuple[int, int]:
    """Octets of a tile and warps of a block: one octet for a thread, which has many operands."""
    if INTERPRETED.value:
        return interpreted_tile(octets), 1
    return target().warp_size, 1
