"""Moving weights between points of the form θ + Σ c_k·z_k, one fused sweep a move.

Restoring, moving to the next point and applying an update are the same operation: a difference of
coefficients. That is why a step of E evaluations needs E + 1 sweeps, and E with ``fuse_next``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from zokern import ops
from zokern.optim.interrupts import uninterrupted

# The coefficient of each draw's direction.
Coefficients = dict[int, float]


@dataclass(frozen=True)
class Member:
    """A parameter as the sweeps see it."""

    param: Tensor
    residual: Tensor | None
    tensor_id: int
    group: dict


class Displacement:
    """Where weights stand: θ + Σ coefficients[draw]·z(draw), θ being their place of rest."""

    def __init__(self) -> None:
        self.members: list[Member] = []
        self.coefficients: Coefficients = {}

    @property
    def at_rest(self) -> bool:
        return not self.coefficients

    def move(
        self,
        target: Coefficients,
        *,
        seed: int,
        law: str,
        gradient: Coefficients | None = None,
    ) -> None:
        """Go to ``target`` in one sweep, with an SGD step of the place of rest on the way.

        With an estimated gradient Σ g_k·z_k, rest moves from θ to (1 - lr·wd)·θ - lr·Σ g_k·z_k,
        lr and wd being those of each parameter's group.
        """
        draws = list(dict.fromkeys((*self.coefficients, *(gradient or ()), *target)))
        coeffs, scales = [], []
        for member in self.members:
            scale = 1.0 if gradient is None else 1.0 - _lr(member) * member.group["weight_decay"]
            step = -_lr(member) if not member.group["maximize"] else _lr(member)
            updates = gradient or {}
            coeffs.append(
                [
                    target.get(draw, 0.0)
                    - scale * self.coefficients.get(draw, 0.0)
                    + step * updates.get(draw, 0.0)
                    for draw in draws
                ]
            )
            # What scales θ scales the first direction's sum with it, and so all of them.
            scales.append([scale] + [1.0] * (len(draws) - 1))
        with uninterrupted():
            if any(any(row) for row in coeffs) or any(row[0] != 1.0 for row in scales if row):
                ops.perturb_(
                    [member.param for member in self.members],
                    draws,
                    coeffs,
                    seed=seed,
                    law=law,
                    scales=scales,
                    tensor_ids=[member.tensor_id for member in self.members],
                    residuals=[member.residual for member in self.members],
                )
                # A cast that autocast has kept would show the forward pass the weights of before.
                torch.clear_autocast_cache()
            self.coefficients = {draw: c for draw, c in target.items() if c != 0.0}


def _lr(member: Member) -> float:
    return float(member.group["lr"])
