"""FZOO: Fast Zeroth-Order Optimizer for Fine-Tuning Large Language Models, arXiv 2506.09034."""

import statistics
from collections.abc import Iterable

from torch import Tensor
from typing_extensions import Unpack

from zokern.optim.base import CommonArguments
from zokern.optim.candidates import CandidateOptimizer
from zokern.optim.displacement import Coefficients
from zokern.optim.steps import Estimate, Method, OpenStep


class FZOO(CandidateOptimizer):
    r"""One-sided estimates along random signs, normalized by the spread of the losses
    (arXiv 2506.09034).

    With :math:`l_0 = L(\theta)` and N directions :math:`u_i` of random signs,
    :math:`l_i = L(\theta + \varepsilon u_i)`:

    .. math::
        \hat g &= \frac{1}{\varepsilon N} \sum_{i=1}^{N} (l_i - l_0) u_i \\
        \sigma &= \sqrt{\tfrac{1}{N-1} \textstyle\sum_i (l_i - \bar l)^2} \\
        \theta &\leftarrow (1 - \mathrm{lr} \cdot \mathrm{wd}) \, \theta
                - \mathrm{lr} \, \hat g / \sigma

    A step takes N + 1 evaluations and N + 1 sweeps (the weights are at rest for the first one).
    The step's size does not depend on the scale of the loss: where all :math:`l_i` are equal,
    ĝ/σ is taken as 0.

    Args:
        params, lr, eps: as for :class:`zokern.MeZO`.
        candidates: N, at least 2.
        **common: the other arguments of :class:`zokern.MeZO`; ``law`` is ``rademacher`` by default.
            ``samples`` estimates, each of N directions of its own, are averaged; they
            share :math:`l_0`.

    Raises:
        ValueError, TypeError: as :class:`zokern.MeZO`.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        candidates: int = 8,
        **common: Unpack[CommonArguments],
    ) -> None:
        common = {"law": "rademacher", **common}
        super().__init__(params, lr, eps, candidates=candidates, **common)

    def _method(self, step: OpenStep) -> Method:
        eps, n = self.run["eps"], self.run["candidates"]
        pools = self._pools(step)
        losses = yield [{}, *({draw: eps} for pool in pools for draw in pool)]

        at_rest, moved = losses[0], losses[1:]
        gradient: Coefficients = {}
        for i, pool in enumerate(pools):
            own = moved[i * n : i * n + n]
            sigma = statistics.stdev(own)
            for draw, loss in zip(pool, own, strict=True):
                g = (loss - at_rest) / (eps * n) / len(pools)
                gradient[draw] = g / sigma if sigma > 0 else 0.0
        return Estimate(gradient, losses)
