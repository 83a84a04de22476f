"""Steps of the merging optimizers beside the published ones and torch's fused AdamW."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

import zokern
from zokern.bench.comparison import OURS, Comparison, Line, Run, Setting, random_values, weights
from zokern.bench.peers import LR, OnlineMerging
from zokern.merging import SparseTau, dense_tau

P, ALPHA = 0.01, 1e-7
# As those of the peers are; they are float32 by default.
BF16_MOMENTS = "moments in bf16"
EAGER, ADAMW = "published optimizer", "torch's fused AdamW"
# Of a gradient, and of what the reference adds to the base.
GRAD_SCALE, TAU_SCALE = 1e-5, 1e-3


def ondare(setting: Setting) -> Comparison:
    return _comparison(setting.part(4), zokern.OnDAREAdamW, "dare", reads_twice=False)


def onties(setting: Setting) -> Comparison:
    """The selection reads gradient and moments once more."""
    return _comparison(setting.part(4), zokern.OnTIESAdamW, "ties", reads_twice=True)


def _comparison(setting: Setting, cls: type, method: str, *, reads_twice: bool) -> Comparison:
    # One gradient at every step would make all of Adam's updates alike.
    grads = [random_values(setting, setting.numel, scale=GRAD_SCALE, seed=1 + i) for i in range(3)]
    difference = random_values(setting, setting.numel, scale=TAU_SCALE, seed=9)

    def line(state_dtype: torch.dtype) -> tuple[Line, Tensor | SparseTau]:
        param = torch.nn.Parameter(weights(setting))
        optimizer = cls(
            [("p", param)], lr=LR, reserve_p=P, alpha=ALPHA, use_merge=True, precision="inplace",
            reference={"p": difference}, base={"p": torch.zeros_like(difference)}, seed=0,
            state_dtype=state_dtype,
        )  # fmt: skip
        tau = optimizer._tau(param)
        size, moments = param.itemsize, 2 * state_dtype.itemsize
        floor = 3 * size + 2 * moments + reads_twice * (size + moments)
        return Line(_step(optimizer, param, grads), floor + _bytes(tau) / setting.numel), tau

    lines = {}
    lines[OURS], tau = line(torch.float32)
    if setting.dtype == torch.bfloat16:
        lines[BF16_MOMENTS], _ = line(torch.bfloat16)
    published = OnlineMerging(weights(setting), dense_tau(tau, difference.shape), p=P, alpha=ALPHA)
    update: Callable[[Tensor], None] = getattr(published, method)
    followed = itertools.cycle(grads)
    adamw_param = torch.nn.Parameter(weights(setting))
    adamw = torch.optim.AdamW([adamw_param], lr=LR, fused=True)
    return Comparison(
        setting.numel,
        lines,
        {EAGER: lambda: update(next(followed)), ADAMW: _step(adamw, adamw_param, grads)},
    )


def _step(optimizer: torch.optim.Optimizer, param: torch.nn.Parameter, grads: list[Tensor]) -> Run:
    given = itertools.cycle(grads)

    def step() -> None:
        param.grad = next(given)
        optimizer.step()

    return step


def _bytes(tau: Tensor | SparseTau) -> int:
    return sum(t.nbytes for t in ((tau,) if isinstance(tau, Tensor) else tau))
