"""A merging optimizer's step, said plainly: Adam's Δ, its mask, the consensus with τ, the weights.

For each element, in float32::

    θ ← θ + Δ,  Δc ← Δc + Δ                         on a step-K optimizer's steps between merges
    θ ← (θ - Δc) + consensus(τ, masked Δ),  Δc ← 0  where the step merges; Δ includes Δc
    θ ← fma(-decay, θ, θ)                           only where decay != 0
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from zokern.backends.reference import adam, storage
from zokern.backends.reference.adam import numbers_of
from zokern.backends.reference.arithmetic import fma
from zokern.backends.reference.noise import values_at
from zokern.backends.reference.perturb import elements_of
from zokern.merging import TAU_DRAWS, Mask, MergeStep, dense_tau


def kept_at_random(mask: Mask, i: int, tensor: Tensor, draws_on: int = 0) -> Tensor:
    """Whether each element's word of the law ``uniform32`` is below the limit."""
    limit = int(mask.limits[i])
    if limit == 1 << 32:
        return torch.ones(tensor.numel(), dtype=torch.bool, device=tensor.device)
    elements = elements_of(tensor, mask.shards[i])
    draw = int(mask.draws[i]) + draws_on
    words = values_at(
        "uniform32", elements, seed=mask.seed, draw=draw, tensor_id=mask.tensor_ids[i]
    )
    return words < limit


def kept_by_magnitude(mask: Mask, i: int, values: Tensor) -> Tensor:
    """Above the threshold, or equal to it and of an index below the cut; NaN is above all."""
    assert mask.thresholds is not None
    assert mask.cuts is not None
    magnitudes = values.view(torch.int32) & 0x7FFFFFFF
    threshold = mask.thresholds[i].to(values.device).view(torch.int32) & 0x7FFFFFFF
    before_cut = torch.arange(values.numel(), device=values.device) < mask.cuts[i].to(values.device)
    return (magnitudes > threshold) | ((magnitudes == threshold) & before_cut)


def masked(step: MergeStep, i: int, delta: Tensor) -> Tensor:
    """Δ with 0 where it is not kept, times scale and ratio, clamped to ±clip."""
    n = numbers_of(step.steps, i, delta.device)
    if step.mask.thresholds is None:
        kept = kept_at_random(step.mask, i, step.params[i])
    else:
        kept = kept_by_magnitude(step.mask, i, delta)
    scaled = n.ratio * (n.scale * torch.where(kept, delta, 0.0))
    return torch.where(scaled > n.clip, n.clip, torch.where(scaled < -n.clip, -n.clip, scaled))


def majority(a: Tensor, b: Tensor, *, tie: bool) -> tuple[Tensor, Tensor]:
    """The operands whose sign is that of a + b, 0 in place of the others.

    A sum of 0 counts as positive or, with ``tie``, as a tie, which keeps neither. Where the sum is
    NaN both are kept, so that it is passed on.
    """
    total = a + b
    positive, negative = (total > 0, total < 0) if tie else (total >= 0, total < 0)
    tied = (total == 0) & tie

    def agreeing(x: Tensor) -> Tensor:
        return torch.where((positive & (x < 0)) | (negative & (x > 0)) | tied, 0.0, x)

    return agreeing(a), agreeing(b)


def consensus(method: str, n: SimpleNamespace, tau: Tensor, delta: Tensor) -> Tensor:
    """What τ and Δ add to the parameter together."""
    if method == "ties_paper":
        a, b = majority(n.alpha * tau, n.weight * delta, tie=True)
        return a + b
    if method == "ties":
        tau, delta = majority(tau, delta, tie=False)
    return fma(n.alpha, tau, n.weight * delta)


def merge_step_(step: MergeStep) -> None:
    for i, param in enumerate(step.params):
        if param.numel() > 0:
            _step_tensor(step, i)


def _step_tensor(step: MergeStep, i: int) -> None:
    param, residual = step.params[i], step.residuals[i]
    master = None if step.masters is None else step.masters[i]
    steps = step.steps
    cached = None if steps.cached is None else steps.cached[i]
    n = numbers_of(steps, i, param.device)
    merges = bool(steps.merges[i])

    first, second = adam.moments(steps, i)
    delta = adam.delta(steps, i)
    value = (storage.load(param, residual) if master is None else master).flatten()
    if not merges or step.method == "ema":
        value = value + delta
    else:
        if cached is not None:
            value = value - cached.flatten()
        value = value + consensus(step.method, n, _tau(step, i), masked(step, i, delta))
    if n.decay != 0:
        value = fma(-n.decay, value, value)
    if step.method == "ema":
        assert step.taus is not None
        reference = dense_tau(step.taus[i], param.shape).flatten().float()
        value = fma(n.alpha, reference - value, value)

    if cached is not None:
        new_cached = torch.zeros_like(delta) if merges else cached.flatten() + delta
        cached.copy_(new_cached.view(param.shape))
    steps.exp_avgs[i].copy_(first.view(param.shape))
    steps.exp_avg_sqs[i].copy_(second.view(param.shape))
    if master is not None:
        master.copy_(value.view(param.shape))
    storage.store(value.view(param.shape), param, residual)


def _tau(step: MergeStep, i: int) -> Tensor:
    """τ in float32, of one dimension; 0 where there is none."""
    param = step.params[i]
    if step.taus is None:
        return torch.zeros(param.numel(), device=param.device)
    tau = dense_tau(step.taus[i], param.shape).flatten().float()
    if step.method == "dare_paper":
        tau = torch.where(kept_at_random(step.mask, i, param, TAU_DRAWS), tau, 0.0)
    return tau
