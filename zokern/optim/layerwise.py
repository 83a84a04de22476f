"""Evaluation without a change to the weights: forward passes read perturbed copies of them.

The copies are those of one layer at a time, in a buffer (:mod:`zokern.optim.layer_view`), or what
FSDP2 gathers for a forward pass anyway (:mod:`zokern.optim.fsdp_view`).
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from zokern.optim.aliases import Places
from zokern.optim.displacement import (
    Coefficients,
    Displacement,
    Member,
    Rounding,
    Step,
    never,
)
from zokern.optim.fsdp_copies import sharded_modules
from zokern.optim.fsdp_view import FsdpView, check_gathered
from zokern.optim.interrupts import uninterrupted
from zokern.optim.layer_view import LayerView
from zokern.optim.layers import check_hookable
from zokern.optim.point import Point
from zokern.optim.workspace import Workspace


class LayerwiseDisplacement(Displacement):
    """A displacement that a module shows while its weights stay at rest."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._is_gathered = bool(sharded_modules(module))
        self._view: LayerView | FsdpView | None = None
        self._workspace = Workspace()

    @property
    def is_beside_rest(self) -> bool:
        return True

    def fresh(self) -> "LayerwiseDisplacement":
        return LayerwiseDisplacement(self.module)

    def check(self, named_params: Sequence[tuple[str, Tensor]]) -> None:
        own = {id(param) for param in self.module.parameters()}
        missing = [name for name, param in named_params if id(param) not in own]
        if missing:
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            raise ValueError(
                f"layerwise=True evaluates the parameters of module=; {', '.join(missing[:8])}"
                f"{more} are not among them"
            )
        for name, param in named_params:
            if type(param).__torch_function__ != nn.Parameter.__torch_function__:
                raise ValueError(
                    f"layerwise=True takes plain parameters; {name} is a {type(param).__name__}, "
                    "which has functions of its own: take layerwise=False"
                )
        check_hookable(self.module)
        if self._is_gathered:
            check_gathered(self.module, named_params)
        else:
            Places(p for _, p in named_params if p.requires_grad).check(self.module)

    def move(
        self,
        target: Coefficients,
        *,
        seed: int,
        law: str,
        step: Step | None = None,
        rounding: Rounding = never,
    ) -> None:
        with uninterrupted():
            wanted = {draw: c for draw, c in target.items() if c != 0.0}
            if step is not None or not wanted:
                self._leave()
            if step is not None:
                super().move({}, seed=seed, law=law, step=step, rounding=rounding)
            if not wanted:
                return
            if self._view is None:
                self._view = self._open()
                self._view.close_with(self)
            self.coefficients, self._noise = wanted, (seed, law)
            made = self.from_rest(wanted)
            assert made is not None
            self._view.show(Point(*made[:2], seed, law))

    def _open(self) -> LayerView | FsdpView:
        if self._is_gathered:
            return FsdpView(self.module, self.members)
        return LayerView(self.module, self.members, self._workspace)

    def settle(self) -> None:
        if self._view is not None:
            self._view.end_all()

    def keep(self, wanted: Callable[[Member], bool]) -> None:
        """All of them: whatever was done to what a view shows, the weights stand at rest."""

    def _leave(self) -> None:
        if self._view is not None:
            self._view.close()
        self._view, self.coefficients = None, {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy shows nothing.
        return self.__dict__ | {"_view": None, "coefficients": {}}
