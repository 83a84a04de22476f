"""A merging optimizer's step, said plainly: Adam's Δ, its mask, the consensus with τ, the weights.

For each element, in float32::

    θ ← θ + Δ,  Δc ← Δc + Δ                         on a step-K optimizer's steps between merges
    θ ← (θ - Δc) + consensus(τ, masked Δ),  Δc ← 0  where the step merges; Δ includes Δc
    θ ← fma(-decay, θ, θ)                           only where decay != 0
"""

from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor

from zokern.backends.reference import adam, storage
from zokern.backends.reference.adam import numbers_of
from zokern.backends.reference.arithmetic import fma
from zokern.backends.reference.values import kept
from zokern.merging import TAU_DRAWS, MergeStep, dense_tau


def masked(step: MergeStep, i: int, delta: Tensor) -> Tensor:
    """Δ with 0 where it is not kept, times scale and ratio, clamped to ±clip."""
    n = numbers_of(step.steps, i, delta.device)
    own = torch.where(kept(step.mask, i, delta, step.params[i]), delta, 0.0)
    scaled = n.ratio * (n.scale * own)
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
        mask = replace(step.mask, draws=step.mask.draws + TAU_DRAWS)
        tau = torch.where(kept(mask, i, tau, param), tau, 0.0)
    return tau
