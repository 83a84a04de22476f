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
# The coefficients and the scales of a sweep, one of each for every direction.
Row = tuple[list[float], list[float]]


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
        groups = {id(member.group): member.group for member in self.members}
        rows = {key: self._row(draws, target, gradient, group) for key, group in groups.items()}
        stays = all(
            not any(coeffs) and all(scale == 1.0 for scale in scales)
            for coeffs, scales in rows.values()
        )
        with uninterrupted():
            if not stays:
                self._sweep(draws, rows, seed=seed, law=law)
            self.coefficients = {draw: c for draw, c in target.items() if c != 0.0}

    def _sweep(self, draws: list[int], rows: dict[int, Row], *, seed: int, law: str) -> None:
        per_tensor = [rows[id(member.group)] for member in self.members]
        alike = all(row == per_tensor[0] for row in rows.values())
        ops.perturb_(
            [member.param for member in self.members],
            draws,
            per_tensor[0][0] if alike else [coeffs for coeffs, _ in per_tensor],
            seed=seed,
            law=law,
            scales=per_tensor[0][1] if alike else [scales for _, scales in per_tensor],
            tensor_ids=[member.tensor_id for member in self.members],
            residuals=[member.residual for member in self.members],
        )
        # A cast that autocast has kept would show the forward pass the weights of before.
        torch.clear_autocast_cache()

    def _row(
        self,
        draws: list[int],
        target: Coefficients,
        gradient: Coefficients | None,
        group: dict,
    ) -> Row:
        """The coefficients and scales of the sweep for a group's parameters."""
        lr = float(group["lr"])
        scale = 1.0 if gradient is None else 1.0 - lr * group["weight_decay"]
        step = lr if group["maximize"] else -lr
        updates = gradient or {}
        coeffs = [
            target.get(draw, 0.0)
            - scale * self.coefficients.get(draw, 0.0)
            + step * updates.get(draw, 0.0)
            for draw in draws
        ]
        # The weights are scaled as they stand, displacement and all, before the first direction.
        return coeffs, [scale, *[1.0] * (len(draws) - 1)][: len(draws)]
