"""The operation of the merging optimizers: its torch.library schema, its checks and its door."""

import torch
from torch import Tensor

from zokern import backends
from zokern.arguments import integers, pick, signed, unsigned
from zokern.checks import (
    check_beside,
    check_disjoint,
    check_dtype,
    check_float32_beside,
    check_plain,
    check_residual,
    check_shard,
    check_strided,
    named_error,
)
from zokern.merging import (
    BUCKET,
    METHODS,
    AdamNumbers,
    AdamSteps,
    Mask,
    MergeStep,
    SparseTau,
)
from zokern.sweep import Shard

torch.library.define(
    "zokern::merge_step_",
    "(Tensor(a!)[] params, Tensor(b!)[] residuals, int[] residual_of, Tensor(c!)[] masters,"
    " Tensor[] grads, Tensor(d!)[] exp_avgs, Tensor(e!)[] exp_avg_sqs, Tensor(f!)[] cached,"
    " Tensor numbers, Tensor merges, Tensor[] taus, Tensor[] tau_starts, Tensor[] tau_places,"
    " Tensor? thresholds, Tensor? cuts, Tensor draws, Tensor limits, str method, int seed,"
    " int[] tensor_ids, int[] shards) -> ()",
)


def merge_step_(step: MergeStep) -> None:
    r"""One step of a merging optimizer on a list of tensors, in place, in one sweep.

    For each element, in float32, with one rounding of every stored tensor::

        g = sign·grad
        m = fma(1 - β₁, g, β₁·m);   v = fma((1 - β₂)·g, g, β₂·v)
        Δ = (m / (√v + eps))·(-step)
        Δ = Δ + Δc, θ = θ - Δc, Δc = 0           # step-K, where the step merges
        Δ = clamp(ratio·(scale·Δ), ±clip)        # of Δ where the mask keeps it, else of 0
        θ = θ + consensus(τ, Δ)                  # else θ = θ + Δ, Δc = Δc + Δ
        θ = fma(-decay, θ, θ)                    # only where decay != 0

    The consensus of ``dare`` is fma(alpha, τ, weight·Δ); ``ties`` first takes 0 for those of τ and
    Δ whose sign is not that of τ + Δ, ``ties_paper`` for those of alpha·τ and weight·Δ whose sign
    is not that of their sum. ``ema`` has neither mask nor consensus: θ = θ + Δ, the decay, then
    θ = fma(alpha, reference - θ, θ). The result is the same, bit for bit, on every backend.

    Args:
        step: see :class:`zokern.merging.MergeStep`. The tensors may lie on several devices.

    Raises:
        TypeError, ValueError: for an operand that does not fit, naming it, before anything is
            written.
    """
    devices: dict[torch.device, list[int]] = {}
    for i, param in enumerate(step.params):
        devices.setdefault(param.device, []).append(i)
    calls = [_flat(step, members) for members in devices.values()]
    if len(calls) > 1:
        for arguments in calls:
            _check_memory(_step(*arguments))
    with torch.no_grad():
        for arguments in calls:
            torch.ops.zokern.merge_step_(*arguments)


@torch.library.impl("zokern::merge_step_", "CompositeExplicitAutograd")
def _merge_step_kernel(params: list[Tensor], *arguments) -> None:
    step = _step(params, *arguments)
    if not params:
        return
    _check_memory(step)
    backends.select(params[0].device).merge_step_(step)
    # The dispatcher leaves this to the kernels; autograd notices stale saved tensors by it.
    torch.autograd.graph.increment_version(
        [tensor for _, _, tensor in step.written() if not tensor.is_inference()]
    )


@torch.library.register_fake("zokern::merge_step_")
def _merge_step_fake(*arguments) -> None:
    _step(*arguments)


def _flat(step: MergeStep, members: list[int]) -> tuple:
    """The arguments of the schema for some of the tensors."""
    whole = len(members) == len(step.params)

    def own(tensors: list | None) -> list:
        return [] if tensors is None else pick(tensors, members)

    def entries(table: Tensor | None) -> Tensor | None:
        return table if table is None or whole else table[members]

    residuals = [r for i in members if (r := step.residuals[i]) is not None]
    slots = iter(range(len(residuals)))
    steps, mask = step.steps, step.mask
    taus, starts, places = _flat_taus(own(step.taus))
    return (
        own(step.params),
        residuals,
        [-1 if step.residuals[i] is None else next(slots) for i in members],
        own(step.masters),
        own(steps.grads),
        own(steps.exp_avgs),
        own(steps.exp_avg_sqs),
        own(steps.cached),
        entries(steps.numbers),
        entries(steps.merges),
        taus,
        starts,
        places,
        entries(mask.thresholds),
        entries(mask.cuts),
        entries(mask.draws),
        entries(mask.limits),
        step.method,
        signed(mask.seed),
        own(mask.tensor_ids),
        [n for i in members for n in mask.shards[i]],
    )


def _flat_taus(taus: list[Tensor | SparseTau]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The values of each, and the starts and places: empty tensors for a dense one."""
    if not taus:
        return [], [], []
    sparse = [
        tau
        if isinstance(tau, SparseTau)
        else SparseTau(
            torch.empty(0, dtype=torch.int64, device=tau.device),
            torch.empty(0, dtype=torch.int16, device=tau.device),
            tau,
        )
        for tau in taus
    ]
    starts, places, values = (list(column) for column in zip(*sparse, strict=True))
    return (values, starts, places) if any(map(len, starts)) else (values, [], [])


def _step(
    params: list[Tensor],
    residuals: list[Tensor],
    residual_of: list[int],
    masters: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    cached: list[Tensor],
    numbers: Tensor,
    merges: Tensor,
    taus: list[Tensor],
    tau_starts: list[Tensor],
    tau_places: list[Tensor],
    thresholds: Tensor | None,
    cuts: Tensor | None,
    draws: Tensor,
    limits: Tensor,
    method: str,
    seed: int,
    tensor_ids: list[int],
    shards: list[int],
) -> MergeStep:
    """The flat arguments of the schema as a step, every operand checked but for its memory."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    count = len(params)
    for name, entries, each in (
        ("residual_of", residual_of, 1),
        ("grads", grads, 1),
        ("exp_avgs", exp_avgs, 1),
        ("exp_avg_sqs", exp_avg_sqs, 1),
        ("masters", masters or params, 1),
        ("cached", cached or params, 1),
        ("taus", taus or params, 1),
        ("tau_starts", tau_starts or params, 1),
        ("tau_places", tau_places or params, 1),
        ("tensor_ids", tensor_ids, 1),
        ("shards", shards, 3),
    ):
        if len(entries) != each * count:
            raise ValueError(
                f"{name} must have {each * count} entries for {count} tensors, not {len(entries)}"
            )
    all_taus: list[Tensor | SparseTau] = list(taus)
    if tau_starts:
        all_taus = [
            values if len(starts) == 0 else SparseTau(starts, places, values)
            for values, starts, places in zip(taus, tau_starts, tau_places, strict=True)
        ]
    step = MergeStep(
        params=params,
        residuals=[None if slot < 0 else residuals[slot] for slot in residual_of],
        masters=masters or None,
        steps=AdamSteps(grads, exp_avgs, exp_avg_sqs, cached or None, numbers, merges),
        taus=all_taus or None,
        mask=Mask(
            thresholds,
            cuts,
            draws,
            limits,
            [Shard(*shards[3 * i : 3 * i + 3]) for i in range(count)],
            integers("tensor_ids", tensor_ids, bits=56),
            unsigned(seed),
        ),
        method=method,
    )
    _check_tables(step)
    for i in range(count):
        _check_operands(step, i)
    return step


def _check_tables(step: MergeStep) -> None:
    """The tensors that have an entry for each tensor."""
    count = len(step.params)
    mask = step.mask
    if (mask.thresholds is None) != (mask.cuts is None):
        raise ValueError("thresholds and cuts belong together")
    if step.method.startswith("ties") and mask.thresholds is None:
        raise ValueError(f"{step.method} masks by magnitude: give thresholds and cuts")
    if step.method.startswith("dare") and mask.thresholds is not None:
        raise ValueError(f"{step.method} masks at random: it takes no thresholds")
    if step.method == "ema" and (step.taus is None or step.steps.cached is not None):
        raise ValueError("ema pulls towards a reference, whose weights are taus, on every step")
    for name, table, dtype, shape in (
        ("numbers", step.steps.numbers, torch.float32, (count, len(AdamNumbers._fields))),
        ("merges", step.steps.merges, torch.int64, (count,)),
        ("thresholds", mask.thresholds, torch.float32, (count,)),
        ("cuts", mask.cuts, torch.int64, (count,)),
        ("draws", mask.draws, torch.int64, (count,)),
        ("limits", mask.limits, torch.int64, (count,)),
    ):
        if table is not None and (table.dtype != dtype or table.shape != shape):
            raise ValueError(
                f"{name} must be {dtype} of shape {shape}, not {table.dtype} of "
                f"{tuple(table.shape)}"
            )


def _check_operands(step: MergeStep, i: int) -> None:
    """Raises TypeError or ValueError, naming the operand, if one does not fit its parameter."""
    param, residual = step.params[i], step.residuals[i]
    argument, tensor = "params", param
    try:
        check_strided(param)
        check_dtype(param)
        if param.device != step.params[0].device:
            raise ValueError(f"it is on {param.device}, params[0] on {step.params[0].device}")
        check_shard(param, step.mask.shards[i], "uniform32")
        if residual is not None:
            argument, tensor = "residuals", residual
            check_strided(residual)
            check_residual(param, residual)
        if step.masters is not None:
            argument, tensor = "masters", step.masters[i]
            if residual is not None:
                raise ValueError("a parameter has a master or a residual, not both")
            check_float32_beside(param, tensor)
        argument, tensor = "grads", step.steps.grads[i]
        _check_read(param, tensor)
        argument, tensor = "exp_avgs", step.steps.exp_avgs[i]
        _check_moment(param, tensor)
        argument, tensor = "exp_avg_sqs", step.steps.exp_avg_sqs[i]
        _check_moment(param, tensor)
        if step.steps.cached is not None:
            argument, tensor = "cached", step.steps.cached[i]
            check_float32_beside(param, tensor)
        if step.taus is not None:
            tau = step.taus[i]
            argument, tensor = "taus", tau.values if isinstance(tau, SparseTau) else tau
            _check_tau(param, tau)
    except (TypeError, ValueError) as error:
        raise named_error(error, argument, i, tensor) from None


def _check_read(param: Tensor, tensor: Tensor) -> None:
    check_plain(tensor)
    check_dtype(tensor)
    check_beside(param, tensor)


def _check_moment(param: Tensor, moment: Tensor) -> None:
    check_strided(moment)
    _check_read(param, moment)


def _check_tau(param: Tensor, tau: Tensor | SparseTau) -> None:
    if not isinstance(tau, SparseTau):
        _check_read(param, tau)
        return
    check_dtype(tau.values)
    if {tensor.device for tensor in tau} != {param.device}:
        raise ValueError(f"it must be on its parameter's device, {param.device}")
    if tau.starts.dtype != torch.int64 or tau.places.dtype != torch.int16:
        given = f"{tau.starts.dtype} and {tau.places.dtype}"
        raise TypeError(f"starts and places must be int64 and int16, not {given}")
    if len(tau.starts) != -(-param.numel() // BUCKET) + 1 or tau.places.shape != tau.values.shape:
        raise ValueError(f"it is not a sparse tensor of {param.numel()} elements: see SparseTau")


def _check_memory(step: MergeStep) -> None:
    """No operand may share memory with one that is written."""
    check_disjoint(
        [
            *((*operand, True) for operand in step.written()),
            *((*operand, False) for operand in step.read()),
        ]
    )
