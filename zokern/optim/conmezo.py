"""ConMeZO: directions in a cone around the momentum, arXiv 2511.02757."""

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from zokern import ops
from zokern.optim.base import CommonArguments
from zokern.optim.displacement import Expansion, Member
from zokern.optim.mezo import MeZO
from zokern.optim.parameters import is_number
from zokern.optim.rules import Rule, float32, rule_of
from zokern.sharding import exact_totals, groups_of


class ConMeZO(MeZO):
    r"""MeZO along directions in a cone around a momentum (arXiv 2511.02757).

    With Gaussian noise n, d parameters in all, and m = 0 at first (then z = n):

    .. math::
        z &= \sqrt{d} \cos\varphi \, \frac{m}{\lVert m \rVert} + \sin\varphi \, n \\
        g &= \frac{L(\theta + \varepsilon z) - L(\theta - \varepsilon z)}{2 \varepsilon} \\
        m &\leftarrow \beta m + (1 - \beta) g z, \qquad
        \theta \leftarrow (1 - \mathrm{lr} \cdot \mathrm{wd}) \, \theta - \mathrm{lr} \, g z

    The momentum (float32, 4 bytes a parameter) is updated in the same sweep as the weights. A step
    takes 2 evaluations, 3 sweeps and a reduction for ‖m‖.

    Args:
        params, lr, eps: as for :class:`zokern.MeZO`.
        angle: φ in radians, of the cone: π/2 is MeZO.
        beta: β, at least 0 and below 1.
        **common: the other arguments of :class:`zokern.MeZO`, but for ``momentum``, ``sign`` and
            ``fuse_next``: the next direction is not known before the update is made.

    Raises:
        ValueError, TypeError: as :class:`zokern.MeZO`.
    """

    DENSE = ("momentum",)

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        angle: float = 1.35,
        beta: float = 0.95,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(params, lr, eps, settings={"angle": angle, "beta": beta}, **common)

    def _prepare(self) -> None:
        super()._prepare()
        angle, beta = self.run["angle"], self.run["beta"]
        if not (is_number(angle) and 0 <= angle <= math.pi / 2):
            raise ValueError(f"angle must be between 0 and π/2, not {angle!r}")
        if not (is_number(beta) and 0 <= beta < 1):
            raise ValueError(f"beta must be at least 0 and below 1, not {beta!r}")
        excluded = [key for key in ("sign", "fuse_next") if self.run[key]]
        if excluded:
            raise ValueError(f"ConMeZO does not take {', '.join(excluded)}")

    def _check_last_group(self, precision: str) -> None:
        super()._check_last_group(precision)
        if self.param_groups[-1]["momentum"] != 0.0:
            raise ValueError("ConMeZO does not take momentum: its own has the decay beta")

    def _keeps_momentum(self) -> bool:
        return True

    def _rule(self, group: dict[str, Any]) -> Rule:
        # A scheduler that cycles momentum writes one into the groups.
        sgd, beta = rule_of({**group, "momentum": 0.0}, sign=False), self.run["beta"]
        return Rule(sgd.scale, direct=sgd.direct, decay=beta, inflow=1.0 - beta)

    def _expand(self, draw: int, members: list[Member]) -> Expansion:
        run = self.run
        sums = exact_totals(
            ops.inner_products([m.dense[0] for m in members], 0, seed=run["seed"]),
            [groups_of(m.whole) for m in members],
        )
        norm = math.sqrt(math.fsum(sums[:, 0].tolist()))
        if norm == 0.0:
            return [(1.0, 0.0)] * len(members)
        numel = sum(member.whole.numel() for member in members)
        along = math.sqrt(numel) * math.cos(run["angle"]) / norm
        return [(float32(math.sin(run["angle"])), float32(along))] * len(members)

    def _replay_arguments(self) -> dict[str, Any]:
        return {"angle": self.run["angle"], "beta": self.run["beta"]}
