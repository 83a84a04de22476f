"""What an optimizer writes into a trajectory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zokern.optim.displacement import Coefficients
from zokern.optim.parameters import named
from zokern.optim.rules import float32
from zokern.trajectory import Record, Trajectory, describe_tensor

if TYPE_CHECKING:
    from zokern.optim.base import ZOOptimizer


class Recorder:
    """Records the steps of one optimizer, if it was given a trajectory."""

    def __init__(self, trajectory: Trajectory | None) -> None:
        if trajectory is not None and not isinstance(trajectory, Trajectory):
            raise TypeError(f"trajectory must be a zokern.Trajectory, not {trajectory!r}")
        self._trajectory = trajectory
        self._attached = False

    @property
    def has_begun(self) -> bool:
        return self._attached and self._trajectory is not None and len(self._trajectory) > 0

    def detach(self) -> None:
        """What is recorded next must fit what the trajectory says of the run, which is checked."""
        self._attached = False

    def attach(self, optimizer: ZOOptimizer) -> None:
        if self._trajectory is not None and not self._attached:
            self._trajectory.attach(_describe(optimizer), optimizer.run["step"])
            self._attached = True

    def append(self, optimizer: ZOOptimizer, gradient: Coefficients) -> None:
        """Before the weights move, so that a step that cannot be recorded is not made."""
        if self._trajectory is not None:
            lrs = tuple(float32(float(group["lr"])) for group in optimizer.param_groups)
            record = Record(tuple(gradient), tuple(gradient.values()), lrs if gradient else ())
            self._trajectory.append(record, _settings(optimizer))

    def withdraw(self) -> None:
        """Take the last step back, which was not made after all."""
        if self._trajectory is not None:
            self._trajectory.withdraw()


def _describe(optimizer: ZOOptimizer) -> dict[str, Any]:
    """What the header says of the run; a checksum of the weights at rest is part of it."""
    run = optimizer.run
    names = {id(param): name for name, param in named(optimizer.param_groups)}
    groups = {id(group): i for i, group in enumerate(optimizer.param_groups)}
    members = optimizer._displacement.members
    return {
        # Other methods are their directions' numbers and coefficients alone.
        "method": type(optimizer).__name__ if _is_special(optimizer) else "ZOOptimizer",
        "arguments": optimizer._replay_arguments(),
        "seed": run["seed"],
        "law": run["law"],
        "precision": run["precision"],
        "sign": run["sign"],
        "named": "param_names" in run,
        "groups": len(groups),
        "tensors": [
            describe_tensor(names[id(m.param)], m.tensor_id, groups[id(m.group)], m.param)
            for m in members
        ],
    }


def _is_special(optimizer: ZOOptimizer) -> bool:
    """Whether a replay needs the class: for the directions, or how the estimate is applied."""
    from zokern.optim.base import ZOOptimizer

    return bool(optimizer.DENSE) or type(optimizer)._rule is not ZOOptimizer._rule


def _settings(optimizer: ZOOptimizer) -> dict[str, Any]:
    """What else a replay must know of a step; a trajectory notes it where it changes."""
    groups = [
        {
            "weight_decay": float(group["weight_decay"]),
            "momentum": float(group["momentum"]),
            "maximize": bool(group["maximize"]),
        }
        for group in optimizer.param_groups
    ]
    return {"groups": groups, **optimizer._direction_settings()}
