"""Copies of a run's weights elsewhere, which follow it from messages of a few bytes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from zokern.optim.base import ZOOptimizer
from zokern.optim.losses import Loss
from zokern.optim.recording import check_start, describe, settings_of
from zokern.optim.rules import float32
from zokern.optim.settings import ROUNDINGS
from zokern.optim.steps import Move, StepResult
from zokern.replay import Follower, Round, Weights, recorded_tensors
from zokern.trajectory import Record, checksum

Message = dict[str, Any]


class Driver:
    """Steps an optimizer by ask and tell, and says what workers need to follow it.

    Messages are dicts of numbers, strings and lists: they can be pickled, or go through JSON. The
    first one describes the run, when this is made: about 100 bytes a parameter tensor. The others
    are one a move: some ten bytes a direction.

    Args:
        optimizer: any method, at the beginning of a run or between two steps; what it keeps beside
            the weights (masters, residuals, momentum) must not hold anything yet that workers could
            not have.
        send: called with each message, in order; all workers must get all of them.

    Raises:
        TrajectoryError: if masters, residuals or momentum hold a part of the run already.
        ValueError: for a method with dense directions (ZOPrO) and ``fuse_next``.

    Example::

        driver = Driver(optimizer, send=lambda message: [q.put(message) for q in queues])
        losses = [evaluate_elsewhere() for _ in driver.ask()]
        driver.tell(losses)
    """

    def __init__(self, optimizer: ZOOptimizer, send: Callable[[Message], object]) -> None:
        if optimizer.DENSE and optimizer.run["fuse_next"]:
            raise ValueError(
                f"{type(optimizer).__name__} has directions that depend on the state of the run, "
                "which workers cannot merge with an update: take fuse_next=False"
            )
        optimizer.flush()
        optimizer._begin().close()
        check_start(optimizer)
        self.optimizer = optimizer
        self._send = send
        self._count = 0
        self._settings: dict[str, Any] = {}
        self._ids = self._tensor_ids()
        run = optimizer.run
        more = {key: run[key] for key in ("layerwise", "stochastic_rounding", ROUNDINGS)}
        self._post(run=describe(optimizer) | more)

    def ask(self) -> Iterator[Move]:
        """As :meth:`ZOOptimizer.ask`; a message says where each point is.

        Raises:
            RuntimeError: if parameters were frozen, thawed or added since the workers began.
        """
        for move in self.optimizer.ask():
            if self._tensor_ids() != self._ids:
                self.optimizer.flush()
                raise RuntimeError(
                    "other parameters are trained than when the workers began: begin anew, with a "
                    "new Driver and new workers"
                )
            self._post_move(self._state())
            yield move

    def tell(self, losses: Sequence[Loss]) -> StepResult | None:
        """As :meth:`ZOOptimizer.tell`; a message says what the step did."""
        state = self._state()
        lrs = [float32(float(group["lr"])) for group in self.optimizer.param_groups]
        result = self.optimizer.tell(losses)
        if result is not None:
            step = [list(result.draws), list(result.projected_gradient), lrs]
            self._post_move(state, step=None if result.skipped else step)
        return result

    def flush(self) -> None:
        """As :meth:`ZOOptimizer.flush`; the workers come to rest too."""
        state = self._state()
        self.optimizer.flush()
        self._post_move(state)

    def check(self) -> None:
        """Bring all weights to rest, and let workers compare theirs: a checksum of each tensor."""
        self.flush()
        members = self.optimizer._displacement.members
        self._post(checksums=[checksum(member.param) for member in members])

    def _tensor_ids(self) -> list[int]:
        return [member.tensor_id for member in self.optimizer._displacement.members]

    def _state(self) -> Message:
        """What decides on the step's directions and its update, where it is news."""
        settings = settings_of(self.optimizer)
        changed = {k: v for k, v in settings.items() if self._settings.get(k) != v}
        self._settings = settings
        return {"at": self.optimizer.run["step"]} | ({"settings": changed} if changed else {})

    def _post_move(self, state: Message, **more: Any) -> None:
        to = [[draw, c] for draw, c in self.optimizer._displacement.coefficients.items()]
        self._post(**state, to=to, **more)

    def _post(self, **content: Any) -> None:
        self._send({"number": self._count, **content})
        self._count += 1


class Worker:
    """Weights that follow a :class:`Driver`: to each point, and at rest.

    Bit for bit, if they begin with the driver's and get all messages, on any backend: the same
    moves are made in the same order, with the same masters, residuals and momentum.

    Args:
        weights: a module, a state dict or (name, tensor) pairs that hold what the driver's
            parameters held when it was made. With a driver that evaluates layer by layer it is a
            module, which shows the points in its forward pass only.
        rounds: for ZOPrO, the ``(previous_update, reward_delta)`` of each round.

    Example::

        worker = Worker(model)
        while True:
            worker.apply(queue.get())
    """

    def __init__(self, weights: Weights, *, rounds: Sequence[Round] = ()) -> None:
        self._weights, self._rounds = weights, rounds
        self._copy: _Copy | None = None
        self._next = 0

    @torch.no_grad()
    def apply(self, message: Message) -> None:
        """Go where the driver's weights went.

        Raises:
            RuntimeError: if a message before it is missing, or, at a :meth:`Driver.check`, the
                weights are not the driver's.
            TrajectoryError: if these weights are not those that the run began with.
        """
        if message["number"] != self._next:
            raise RuntimeError(
                f"message {message['number']} came where {self._next} was due: workers need all "
                "messages of their driver, in order"
            )
        if self._copy is None:
            self._copy = _Copy(self._weights, message["run"], self._rounds)
        elif "checksums" in message:
            self._copy.compare(message["checksums"])
        else:
            self._copy.move(message)
        self._next += 1


class _Copy(Follower):
    """The optimizer of a driver, with all its tensors."""

    def __init__(self, weights: Weights, run: dict[str, Any], rounds: Sequence[Round]) -> None:
        tensors = recorded_tensors(weights, run)
        module = None
        if run["layerwise"]:
            if not isinstance(weights, nn.Module):
                raise TypeError(
                    "the driver evaluates layer by layer: give the worker a module, not "
                    f"{type(weights).__name__}"
                )
            module = weights
            params = [tensor.requires_grad_() for tensor in tensors]
        else:
            params = [tensor.detach().requires_grad_() for tensor in tensors]
        super().__init__(
            run,
            params,
            range(len(params)),
            rounds,
            module=module,
            **{key: run[key] for key in ("precision", "layerwise", "stochastic_rounding")},
        )
        self._names = [entry["name"] for entry in run["tensors"]]
        self._settings: dict[str, Any] = {}
        self._optimizer._update_run(**{ROUNDINGS: run[ROUNDINGS]})
        self._optimizer._displacement.members = self._members()

    def move(self, message: Message) -> None:
        if "settings" in message:
            self._settings |= message["settings"]
            self._take_settings(self._settings)
            # Momentum may be new.
            self._optimizer._displacement.members = self._members()
        self._optimizer._follow(self._settings, message["at"], self._rounds)
        step = message.get("step")
        record = None if step is None else Record(*map(tuple, step))
        if record is not None:
            self._take_rates(record)
        self._move(dict(map(tuple, message["to"])), record)

    def compare(self, checksums: list[int]) -> None:
        members = self._optimizer._displacement.members
        own = [checksum(member.param) for member in members]
        differing = [n for n, a, b in zip(self._names, own, checksums, strict=True) if a != b]
        if differing:
            raise RuntimeError(f"the weights of {differing} are not those of the driver any more")
