"""What methods that choose among candidate directions share."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from zokern.optim.base import CommonArguments, ZOOptimizer
from zokern.optim.settings import integer
from zokern.optim.steps import OpenStep


class CandidateOptimizer(ZOOptimizer):
    """Evaluates ``candidates`` directions for each of ``samples`` estimates."""

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor,
        eps: float = 1e-3,
        *,
        candidates: int = 2,
        settings: dict[str, Any] | None = None,
        **common: Unpack[CommonArguments],
    ) -> None:
        settings = {"candidates": candidates, **(settings or {})}
        super().__init__(params, lr, eps, settings=settings, **common)

    def _prepare(self) -> None:
        super()._prepare()
        candidates = integer("candidates", self.run["candidates"], at_least=2, below=1 << 14)
        self._update_run(candidates=candidates)

    def _check_last_group(self, precision: str) -> None:
        super()._check_last_group(precision)
        if len({group["maximize"] for group in self.param_groups}) > 1:
            raise ValueError("maximize must be the same in all groups: candidates are ranked by it")

    def _maximizes(self) -> bool:
        return self.run["maximize"]

    def _pools(self, step: OpenStep, kept: Sequence[int] = ()) -> list[list[int]]:
        """The candidates of each estimate: the draw kept for it, if any, and fresh ones."""
        pools = []
        for i in range(self.run["samples"]):
            own = list(kept[i : i + 1])
            pools.append(own + step.take_draws(self.run["candidates"] - len(own)))
        return pools
