"""Adam's step, said plainly: the moments and Δ of one tensor, in float32."""

from types import SimpleNamespace

import torch
from torch import Tensor

from zokern.backends.reference.arithmetic import fma, sqrt
from zokern.merging import AdamNumbers, AdamSteps


def numbers_of(steps: AdamSteps, i: int, device: torch.device) -> SimpleNamespace:
    """The :class:`AdamNumbers` of a tensor, each a float32 tensor of no dimension."""
    return SimpleNamespace(**AdamNumbers(*steps.numbers[i].to(device))._asdict())


def moments(steps: AdamSteps, i: int) -> tuple[Tensor, Tensor]:
    """The new moments, rounded to the dtype of the state, as float32 of one dimension.

    m = β₁·m + (1 - β₁)·g and v = β₂·v + ((1 - β₂)·g)·g, the last product fused with the sum.
    """
    n = numbers_of(steps, i, steps.grads[i].device)
    grad = n.sign * steps.grads[i].flatten().float()
    first, second = steps.exp_avgs[i].flatten(), steps.exp_avg_sqs[i].flatten()
    new_first = fma(torch.as_tensor(n.one_minus_beta1), grad, n.beta1 * first.float())
    new_second = fma(n.one_minus_beta2 * grad, grad, n.beta2 * second.float())
    return new_first.to(first.dtype).float(), new_second.to(second.dtype).float()


def delta(steps: AdamSteps, i: int) -> Tensor:
    """Δ = (m / (√v + eps))·(-step) plus, where the step merges, the Δ of those before it."""
    n = numbers_of(steps, i, steps.grads[i].device)
    first, second = moments(steps, i)
    own = (first / (sqrt(second) + n.eps)) * -n.step
    if steps.cached is not None and steps.merges[i]:
        return own + steps.cached[i].flatten()
    return own
