"""What an optimizer writes into a trajectory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zokern.optim.displacement import Coefficients
from zokern.optim.parameters import named
from zokern.optim.rules import float32
from zokern.sharding import groups_of
from zokern.trajectory import Record, Trajectory, TrajectoryError, check_run, describe_tensor

if TYPE_CHECKING:
    from zokern.optim.base import ZOOptimizer


class Recorder:
    """Records the steps of one optimizer, if it was given a trajectory."""

    def __init__(self, trajectory: Trajectory | None) -> None:
        if trajectory is not None and not isinstance(trajectory, Trajectory):
            raise TypeError(f"trajectory must be a zokern.Trajectory, not {trajectory!r}")
        self._trajectory = trajectory
        self._attached = False
        self._may_rewind = False

    @property
    def has_begun(self) -> bool:
        return self._trajectory is not None and len(self._trajectory) > 0

    def detach(self, *, loaded: bool = False) -> None:
        """What is recorded next must fit what the trajectory says of the run, which is checked.

        After a checkpoint was loaded the run may stand at any of its steps.
        """
        self._attached = False
        self._may_rewind |= loaded

    def attach(self, optimizer: ZOOptimizer) -> None:
        # Until a step is made the weights may still be others.
        if self._trajectory is None or (self._attached and self.has_begun):
            return
        if not self.has_begun:
            check_start(optimizer)
        self._trajectory.attach(
            describe(optimizer),
            optimizer.run["step"],
            owner=self,
            may_rewind=self._may_rewind,
        )
        self._attached = True
        self._may_rewind = False

    def append(self, optimizer: ZOOptimizer, gradient: Coefficients) -> None:
        """Before the weights move, so that a step that cannot be recorded is not made."""
        if self._trajectory is not None:
            assert self._trajectory.header is not None
            check_run(self._trajectory.header, _of_run(optimizer))
            lrs = tuple(float32(float(group["lr"])) for group in optimizer.param_groups)
            record = Record(tuple(gradient), tuple(gradient.values()), lrs if gradient else ())
            self._trajectory.append(record, settings_of(optimizer), owner=self)

    def withdraw(self) -> None:
        """Take the last step back, which was not made after all."""
        if self._trajectory is not None:
            self._trajectory.withdraw()


def check_whole(params: Iterable[tuple[str, Tensor]]) -> None:
    """Raises TrajectoryError, naming it, for a parameter of which this rank has only a part."""
    for name, param in params:
        if groups_of(param):
            raise TrajectoryError(
                f"{name} is a DTensor, whose parts lie on several ranks: trajectories, replays and "
                "workers are for whole weights; replay the run of whole weights and shard the "
                "result, or save checkpoints"
            )


def check_start(optimizer: ZOOptimizer) -> None:
    """A replay begins with the parameters alone: nothing beside them may hold part of the run."""
    check_whole(named(optimizer.param_groups))
    for member in optimizer._displacement.members:
        master, residual, momentum = member.master, member.residual, member.momentum
        moved = (
            (master is not None and not torch.equal(master, member.param.float()))
            or (optimizer.run["step"] > 0 and residual is not None and bool(residual.any()))
            or (momentum is not None and bool(momentum.any()))
        )
        if moved:
            raise TrajectoryError(
                "the run has begun without the trajectory: masters, residuals or momentum hold "
                "part of it already, which a replay could not have; record from the first step on"
            )


def _of_run(optimizer: ZOOptimizer) -> dict[str, Any]:
    """What must not change while the run is recorded."""
    run = optimizer.run
    return {
        "method": optimizer._replays_as(),
        "arguments": optimizer._replay_arguments(),
        "seed": run["seed"],
        "law": run["law"],
        "precision": run["precision"],
        "sign": run["sign"],
    }


def describe(optimizer: ZOOptimizer) -> dict[str, Any]:
    """What the header says of the run; a checksum of the weights at rest is part of it."""
    run = optimizer.run
    names = {id(param): name for name, param in named(optimizer.param_groups)}
    groups = {id(group): i for i, group in enumerate(optimizer.param_groups)}
    members = optimizer._displacement.members
    return {
        **_of_run(optimizer),
        "named": "param_names" in run,
        "groups": len(groups),
        "tensors": [
            describe_tensor(names[id(m.whole)], m.tensor_id, groups[id(m.group)], m.param)
            for m in members
        ],
    }


def settings_of(optimizer: ZOOptimizer) -> dict[str, Any]:
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
