"""Sweeps along noise and dense directions, in place or not."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from zokern import backends
from zokern.arguments import (
    Numbers,
    Shards,
    check_flat,
    check_length,
    directions,
    flat,
    float32s,
    integer,
    integers,
    number_rows,
    packed,
    pick,
    positions,
    shard_list,
    signed,
    tensor_list,
    unflatten,
    unpacked,
    unsigned,
)
from zokern.checks import check_direction_law, check_form, check_memory, check_operand, check_update
from zokern.ops.dtensors import local_operands
from zokern.sweep import Shard, Sweep, Update

torch.library.define(
    "zokern::perturb_",
    "(Tensor(a!)[] params, Tensor(b!)[] residuals, int[] residual_of, Tensor(c!)[] masters,"
    " Tensor(d!)[] momenta, Tensor(e!)[] outs, Tensor[] dense, int[] draws, float[] coeffs,"
    " float[] scales, int rest, float[] gradient, float[] decays, float[] steps, bool sign,"
    " int seed, str law, int[] tensor_ids, int[] shards, Tensor[] rows, int[] row_of,"
    " int? rounding) -> ()",
)


def perturb_(
    params: Iterable[Tensor],
    draws: Sequence[int],
    coeffs: Numbers,
    *,
    seed: int,
    law: str = "gauss16",
    scales: Numbers | None = None,
    tensor_ids: Sequence[int] | None = None,
    shards: Shards | None = None,
    rows: Sequence[Tensor | None] | None = None,
    residuals: Sequence[Tensor | None] | None = None,
    masters: Sequence[Tensor] | None = None,
    outs: Sequence[Tensor] | None = None,
    dense: Sequence[Sequence[Tensor]] = (),
    rest: int | None = None,
    update: Update | None = None,
    rounding: int | None = None,
) -> None:
    """Move a list of tensors along seeded random directions, in place or not, in one sweep.

    For each tensor θ, with float32 arithmetic and one rounding to θ's dtype at the end::

        t = master or θ
        u = decay * momentum                                 # 0 without momentum
        for k in range(rest):
            t = scales[k] * t                                # only where scales[k] != 1
            t = fma(coeffs[k], z_k, t)
            u = fma(gradient[k], z_k, u)                     # only with an update
        momentum = u
        t = fma(step, u or sign(u), t)                       # only with an update
        master = t                                           # only where rest > 0
        for k in range(rest, K):
            t = scales[k] * t
            t = fma(coeffs[k], z_k, t)
        θ = t                                                # out = t where there are outs

    With ``rounding``, up or down at the end, with a chance that makes it right on average, by
    the 16 bits r that ``rounding16`` has for the element::

        bfloat16:   bits of θ = (bits of t + r) >> 16        # t as it is if infinite or NaN
        split8:     bits of t = (bits of t + (r >> 8)) & ~0xFF, then as without rounding
        float16:    n = floor(|t| / ulp)                     # ulp = max(2^-24, 2^(e - 10))
                    n = n + (r < (|t| / ulp - n) * 2^16)     # for 2^e <= |t| < 2^(e + 1)
                    θ = ±n * ulp                             # to nearest where |t| >= 2^16

    The result is the same, bit for bit, on every backend and every device.

    Of a DTensor the part that this rank has is moved; nothing is communicated. What goes with it
    (residual, master, out, dense direction, momentum) is a DTensor placed alike, or the part.

    Args:
        params: float32, bfloat16 or float16 tensors, dense (any memory format) and not
            overlapping, or DTensors of such. They may lie on several devices.
        draws: the K directions, K ≥ 1 (0 with masters): z_k is the noise of draw
            0 ≤ draws[k] < 2^32, or the dense direction j where draws[k] is ~j (-1, -2, …).
        coeffs: K numbers, or K for each tensor (shape (len(params), K)). Rounded to float32.
        seed: of the run, 0 ≤ seed < 2^64.
        law: ``gauss16``, ``gauss32``, ``rademacher`` or ``normal``; see :mod:`zokern.noise`.
        scales: like ``coeffs``; 1 by default.
        tensor_ids: 56-bit ids, for example of :func:`zokern.noise.tensor_id`; the tensors'
            positions by default.
        shards: for each tensor None (it is whole) or (offset, row_length, row_stride): its
            element (r, k), in rows of ``row_length``, is element offset + r·row_stride + k of the
            full tensor and gets the noise of that element. Of a DTensor None stands for the shard
            that it says it is.
        rows: for each tensor None or the numbers of its rows in the full tensor, where somebody
            picked them (an embedding's, say): int64, of one dimension, on the tensor's device. Its
            element (r, k) is element offset + rows[r]·row_stride + k then. The numbers are not
            looked at before the sweep: that none is negative, and that the law counts all their
            elements, is the caller's business.
        residuals: for each tensor None or the low bits of its value, shaped and laid out like it:
            int16 or int8 beside bfloat16, float16 beside float16 (``split`` and ``split8``).
        masters: for each tensor its float32 value at rest, of its shape; instead of residuals.
            With ``rest=0`` they are only read: params = masters + Σ coeffs[k]·z_k.
        outs: for each tensor where it goes instead: a contiguous tensor of its shape and dtype that
            shares memory with nothing else. The params and their residuals, in any memory format,
            are only read then. Not with masters or an update.
        dense: up to two dense directions, each with a tensor (float32, bfloat16 or float16) of
            each parameter's shape.
        rest: how many directions lead to the place of rest; all by default.
        update: the step by an estimated gradient that the place of rest makes, with momentum or by
            sign; its numbers may be one for all tensors. Plain SGD needs none: it is a matter of
            ``coeffs``. A momentum may itself be a dense direction before ``rest``, where it counts
            as it was before the sweep.
        rounding: 0 ≤ rounding < 2^32, the draw whose bits round what is stored stochastically: half
            precision alone (outs are), or bfloat16 with an int8 residual; float32 tensors among
            them are stored as they are. To nearest by default.

    Raises:
        TypeError, ValueError: for an operand that cannot be swept in place or an argument out of
            range, naming it, before anything is written.
    """
    operands: dict[str, Any] = {
        "shards": shards,
        "rows": rows,
        "residuals": residuals,
        "masters": masters,
        "outs": outs,
        "dense": dense,
        "update": update,
    }
    params, operands = local_operands(tensor_list("params", params), operands)
    numbers = read_numbers(
        len(params),
        len(dense),
        draws,
        coeffs,
        has_masters=masters is not None,
        seed=seed,
        scales=scales,
        rest=rest,
        update=operands.pop("update"),
        rounding=rounding,
    )
    run_operator(operator_calls(numbers, law, params, tensor_ids=tensor_ids, **operands))


@dataclass(frozen=True)
class SweepNumbers:
    """The numbers of a sweep as users gave them, read: one row for all tensors or one for each."""

    draws: list[int]
    coeffs: list[list[float]]
    scales: list[list[float]] | None
    rest: int
    update: Update | None
    rounding: int | None
    seed: int

    @cached_property
    def is_plain(self) -> bool:
        """Whether one row says how to move all tensors along noise, rounded to nearest."""
        moves = min(self.draws, default=0) >= 0 and self.update is None and self.rounding is None
        return moves and len(self.coeffs) == 1


def read_numbers(
    count: int,
    slots: int,
    draws: Sequence[int],
    coeffs: Numbers,
    *,
    seed: int,
    has_masters: bool = False,
    scales: Numbers | None = None,
    rest: int | None = None,
    update: Update | None = None,
    rounding: int | None = None,
) -> SweepNumbers:
    """Of a sweep of ``count`` tensors with ``slots`` dense directions."""
    draws = directions(draws, slots)
    if not draws and not has_masters:
        raise ValueError("draws is empty: give at least one direction")
    k = len(draws)
    return SweepNumbers(
        draws=draws,
        coeffs=number_rows("coeffs", coeffs, count, k),
        scales=None if scales is None else number_rows("scales", scales, count, k),
        rest=k if rest is None else integer("rest", rest, bits=32),
        update=None if update is None else _read_update(update, count, k),
        rounding=None if rounding is None else integer("rounding", rounding, bits=32),
        seed=integer("seed", seed, bits=64),
    )


@dataclass(frozen=True)
class OperatorCall:
    """The arguments of one call of the operator, and which of the tensors it sweeps."""

    members: list[int]
    arguments: tuple


def operator_calls(
    numbers: SweepNumbers,
    law: str,
    params: list[Tensor],
    *,
    tensor_ids: Sequence[int] | None = None,
    shards: Shards | None = None,
    rows: Sequence[Tensor | None] | None = None,
    residuals: Sequence[Tensor | None] | None = None,
    masters: Sequence[Tensor] | None = None,
    outs: Sequence[Tensor] | None = None,
    dense: Sequence[Sequence[Tensor]] = (),
) -> list[OperatorCall]:
    """A call for each device, and for exact tensors beside rounded ones."""
    count, update = len(params), numbers.update
    dense = [tensor_list(f"dense[{j}]", vectors) for j, vectors in enumerate(dense)]
    for j, vectors in enumerate(dense):
        check_length(f"dense[{j}]", vectors, count)
    ids = list(range(count)) if tensor_ids is None else integers("tensor_ids", tensor_ids, bits=56)
    check_length("tensor_ids", ids, count)
    own_shards = shard_list(shards, params)
    residual_list = [None] * count if residuals is None else list(residuals)
    check_length("residuals", residual_list, count)
    row_list = [None] * count if rows is None else list(rows)
    check_length("rows", row_list, count)
    master_list = None if masters is None else tensor_list("masters", masters)
    check_length("masters", params if master_list is None else master_list, count)
    out_list = None if outs is None else tensor_list("outs", outs)
    check_length("outs", params if out_list is None else out_list, count)

    def call(members: list[int], rounding: int | None) -> tuple:
        momenta = None if update is None else update.momenta
        return (
            pick(params, members),
            *packed(pick(residual_list, members)),
            [] if master_list is None else pick(master_list, members),
            [] if momenta is None else pick(momenta, members),
            [] if out_list is None else pick(out_list, members),
            [vectors[i] for vectors in dense for i in members],
            numbers.draws,
            flat(numbers.coeffs, members),
            [] if numbers.scales is None else flat(numbers.scales, members),
            numbers.rest,
            [] if update is None else flat(update.gradient, members),
            [] if update is None else pick(update.decays, members),
            [] if update is None else pick(update.steps, members),
            update is not None and update.sign,
            signed(numbers.seed),
            law,
            pick(ids, members),
            [n for i in members for n in own_shards[i]],
            *packed(pick(row_list, members)),
            rounding,
        )

    # An operator's call rounds all of its tensors or none.
    exact = [param.dtype == torch.float32 for param in params]
    roundings = [None if one and not all(exact) else numbers.rounding for one in exact]
    kinds = positions(zip([param.device for param in params], roundings, strict=True))
    return [
        OperatorCall(members, call(members, rounding)) for (_, rounding), members in kinds.items()
    ]


def run_operator(calls: list[OperatorCall]) -> None:
    if len(calls) > 1:
        for call in calls:
            check_memory(sweep_of(*call.arguments))
    with torch.no_grad():
        for call in calls:
            torch.ops.zokern.perturb_(*call.arguments)


@torch.library.impl("zokern::perturb_", "CompositeExplicitAutograd")
def _perturb_kernel(params: list[Tensor], *arguments) -> None:
    sweep = sweep_of(params, *arguments)
    if params:
        check_memory(sweep)
        run(sweep)


def run(sweep: Sweep) -> None:
    """Run a sweep that has passed all checks."""
    backends.select(sweep.params[0].device).perturb_(sweep)
    note_writes(tensor for _, _, tensor in sweep.written())


def note_writes(tensors: Iterable[Tensor]) -> None:
    """Autograd notices stale saved tensors by it; the dispatcher leaves it to the kernels."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


@torch.library.register_fake("zokern::perturb_")
def _perturb_fake(*arguments) -> None:
    sweep_of(*arguments)


def sweep_of(
    params: list[Tensor],
    residuals: list[Tensor],
    residual_of: list[int],
    masters: list[Tensor],
    momenta: list[Tensor],
    outs: list[Tensor],
    dense: list[Tensor],
    draws: list[int],
    coeffs: list[float],
    scales: list[float],
    rest: int,
    gradient: list[float],
    decays: list[float],
    steps: list[float],
    sign: bool,
    seed: int,
    law: str,
    tensor_ids: list[int],
    shards: list[int],
    rows: list[Tensor],
    row_of: list[int],
    rounding: int | None,
) -> Sweep:
    """The flat arguments of the schema as a Sweep, every operand checked but for its memory."""
    check_direction_law(law)
    count, k = len(params), len(draws)
    check_flat(count, residual_of=(residual_of, 1), row_of=(row_of, 1))
    check_flat(count, tensor_ids=(tensor_ids, 1), shards=(shards, 3))
    if masters:
        check_flat(count, masters=(masters, 1))
    if momenta:
        check_flat(count, momenta=(momenta, 1))
    if outs:
        check_flat(count, outs=(outs, 1))
    if count and len(dense) % count:
        raise ValueError(f"dense has {len(dense)} entries, no multiple of the {count} params")
    update = None
    if gradient:
        check_flat(count, decays=(decays, 1), steps=(steps, 1))
        update = Update(
            unflatten("gradient", gradient, count, k),
            float32s("decays", decays),
            float32s("steps", steps),
            momenta or None,
            sign,
        )
    elif momenta or decays or steps or sign:
        raise ValueError("momenta, decays, steps and sign belong to an update: give its gradient")
    vectors = [dense[i : i + count] for i in range(0, len(dense), count or 1)]
    sweep = Sweep(
        params=params,
        residuals=unpacked("residuals", residuals, "residual_of", residual_of),
        masters=masters or None,
        outs=outs or None,
        dense=vectors,
        shards=[Shard(*shards[3 * i : 3 * i + 3]) for i in range(count)],
        rows=unpacked("rows", rows, "row_of", row_of),
        tensor_ids=integers("tensor_ids", tensor_ids, bits=56),
        draws=directions(draws, len(vectors)),
        coeffs=unflatten("coeffs", coeffs, count, k),
        scales=unflatten("scales", scales or [1.0] * k, count, k),
        rest=rest,
        update=update,
        rounding=None if rounding is None else integer("rounding", rounding, bits=32),
        seed=unsigned(seed),
        law=law,
    )
    check_form(sweep)
    for i in range(count):
        check_operand(sweep, i)
        check_update(sweep, i)
    return sweep


def _read_update(update: Update, count: int, k: int) -> Update:
    def per_tensor(name: str, values: float | Sequence[float]) -> list[float]:
        given = list(values) if isinstance(values, Sequence) else [values] * count
        check_length(name, given, count)
        return float32s(name, given)

    momenta = update.momenta
    if momenta is not None:
        momenta = tensor_list("momenta", momenta)
        check_length("momenta", momenta, count)
    return Update(
        number_rows("gradient", update.gradient, count, k),
        per_tensor("decays", update.decays),
        per_tensor("steps", update.steps),
        momenta,
        bool(update.sign),
    )
