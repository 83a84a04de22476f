"""MeZO with a guiding vector, arXiv 2601.04710."""

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from zokern.optim.base import CommonArguments
from zokern.optim.candidates import CandidateOptimizer
from zokern.optim.estimates import pairs, ranked, two_sided
from zokern.optim.parameters import is_number
from zokern.optim.steps import Estimate, Method, OpenStep


class MeZOGV(CandidateOptimizer):
    r"""MeZO along a guiding vector (arXiv 2601.04710) made of several candidate directions.

    M candidates are evaluated once and sorted by their losses :math:`L(\theta + \varepsilon z_i)`,
    the best first (of equal ones the earlier draw); the best ⌊αM⌋ are the elite:

    .. math::
        v &= \mathrm{mean}(z_i : \text{elite}) - \mathrm{mean}(z_i : \text{the rest}) \\
        g &= \frac{L(\theta + \varepsilon v) - L(\theta - \varepsilon v)}{2 \varepsilon} \\
        \theta &\leftarrow (1 - \mathrm{lr} \cdot \mathrm{wd}) \, \theta - \mathrm{lr} \, g v

    v is never stored: its coefficients go into the sweeps. A step takes M + 2 evaluations and
    M + 3 sweeps, M + 2 with ``fuse_next``.

    What to expect: the two-sided estimate does not see the sign of v, so with M = 2 this is MeZO
    along √2·z at twice the evaluations. On a linear loss in d dimensions the mean squared cosine
    between v and the gradient is 1.00/d for M = 2, 2.10/d for 4, 4.55/d for 8, 9.60/d for 16
    (α = ½, without history), against 1/d for MeZO.

    Args:
        params, lr, eps: as for :class:`zokern.MeZO`.
        candidates: M, at least 2.
        elite: α; ⌊αM⌋ must be at least 1 and below M.
        history: one of the candidates is the best draw of the step before, evaluated anew, and
            M - 1 are fresh; at the first step all are.
        **common: the other arguments of :class:`zokern.MeZO`. ``samples`` guiding vectors, each of
            M candidates of its own, are averaged.

    Raises:
        ValueError, TypeError: as :class:`zokern.MeZO`, and for an elite that is empty or all.
    """

    # The best draw of the step before, for each guiding vector.
    STATE: ClassVar[dict[str, Any]] = {"best": ()}

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        candidates: int = 2,
        elite: float = 0.5,
        history: bool = True,
        **common: Unpack[CommonArguments],
    ) -> None:
        own: dict[str, Any] = {"elite": elite, "history": bool(history)}
        super().__init__(params, lr, eps, candidates=candidates, settings=own, **common)

    def _prepare(self) -> None:
        super()._prepare()
        elite, candidates = self.run["elite"], self.run["candidates"]
        if not (is_number(elite) and 0 <= elite <= 1):
            raise ValueError(f"elite must be a number between 0 and 1, not {elite!r}")
        if not 1 <= self._elite_count() < candidates:
            raise ValueError(
                f"elite={elite!r} makes {self._elite_count()} of {candidates} candidates the "
                "elite: it must be at least one and not all"
            )

    def _elite_count(self) -> int:
        # ⌊αM⌋ of the decimal that was meant: 0.29·100 is 28.999… in binary.
        return int(self.run["elite"] * self.run["candidates"] + 1e-9)

    def _method(self, step: OpenStep) -> Method:
        eps, m = self.run["eps"], self.run["candidates"]
        best = self.run["best"] if self.run["history"] else ()
        pools = self._pools(step, best)
        losses = yield [{draw: eps} for pool in pools for draw in pool]

        directions, best = [], []
        for i, pool in enumerate(pools):
            order = ranked(pool, losses[i * m : i * m + m], maximize=self._maximizes())
            elite, others = order[: self._elite_count()], order[self._elite_count() :]
            directions.append(
                dict.fromkeys(elite, 1 / len(elite)) | dict.fromkeys(others, -1 / len(others))
            )
            best.append(order[0])
        losses = yield pairs(directions, eps)
        return Estimate(two_sided(directions, losses, eps), losses, {"best": tuple(best)})
