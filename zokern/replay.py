"""Rebuilds trained weights from base weights and a trajectory."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zokern import ops
from zokern.checks import is_dense
from zokern.laws import canonical_name
from zokern.optim.base import ZOOptimizer
from zokern.optim.displacement import Member
from zokern.optim.names import plain_name
from zokern.optim.recording import check_whole
from zokern.progress import progress_bar
from zokern.sharding import local
from zokern.trajectory import Record, Trajectory, TrajectoryError, check_run, describe_tensor

Weights = nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | Iterable[Tensor]
Round = tuple[Mapping, Mapping]

# Directions in a sweep: reading and writing the weights is then a small part of its work.
DIRECTIONS = 128
# Half-precision weights have a float32 master while they are replayed: this many at a time.
ELEMENTS = 1 << 28


@torch.no_grad()
def replay(
    weights: Weights,
    trajectory: Trajectory | str | os.PathLike,
    *,
    rounds: Sequence[Round] = (),
    device: torch.device | str | None = None,
    progress: bool = False,
) -> None:
    """Turn base weights into the trained ones, in place, many steps a sweep, on any backend.

    If it is interrupted, the weights stand somewhere between.

    Bit for bit the weights of a run under ``precision="master"``. A run that displaced its weights
    in place has rounded on the way: then the result agrees to float32 rounding (float32 weights,
    ``split``), or to the rounding of the parameters (``split8``, ``inplace``).

    Args:
        weights: the base: a module, a state dict, (name, tensor) pairs, or tensors in order for a
            run whose parameters had no names. Weights that the run did not train are left alone.
        trajectory: of the run, or its file.
        rounds: for ZOPrO, the ``(previous_update, reward_delta)`` of each round.
        device: where the kernels run; where the weights are by default. What lies elsewhere is
            copied there and back.
        progress: show a progress bar.

    Raises:
        TrajectoryError: if the trajectory is of another run than these weights and rounds, naming
            the field, before anything is written.
    """
    if not isinstance(trajectory, Trajectory):
        trajectory = Trajectory.load(trajectory)
    if trajectory.header is None:
        return
    tensors = recorded_tensors(weights, trajectory.header)
    method = method_of(trajectory.header)
    chunks = list(_chunks(tensors)) if not method.DENSE else [list(range(len(tensors)))]
    with progress_bar(len(chunks) * len(trajectory), "replay", "step", shown=progress) as advance:
        for chunk in chunks:
            there = [tensors[i].to(device or tensors[i].device) for i in chunk]
            _Replay(trajectory, there, chunk, rounds).run(advance)
            for i, tensor in zip(chunk, there, strict=True):
                if tensor is not tensors[i]:
                    tensors[i].copy_(tensor)


class Follower:
    """The optimizer of a run over some of its tensors, given estimates instead of losses.

    ``chunk`` says which of the tensors of the header; ``settings`` are the constructor's.
    """

    def __init__(
        self,
        header: dict[str, Any],
        tensors: list[Tensor],
        chunk: Sequence[int],
        rounds: Sequence[Round],
        **settings: Any,
    ) -> None:
        recorded = [header["tensors"][i] for i in chunk]
        groups: list[dict[str, Any]] = [{"params": []} for _ in range(header["groups"])]
        for tensor, entry in zip(tensors, recorded, strict=True):
            groups[entry["group"]]["params"].append(
                (entry["name"], tensor) if header["named"] else tensor
            )
        self._kept = [g for g, group in enumerate(groups) if group["params"]]
        self._rounds = rounds
        self._optimizer = method_of(header)._for_replay(
            [groups[g] for g in self._kept],
            header["arguments"],
            rounds,
            lr=0.0,
            seed=header["seed"],
            law=header["law"],
            sign=header["sign"],
            **settings,
        )
        self._ids = [entry["id"] for entry in recorded]

    def _take_settings(self, settings: dict[str, Any]) -> None:
        for g, group in zip(self._kept, self._optimizer.param_groups, strict=True):
            group.update(settings["groups"][g])

    def _take_rates(self, record: Record) -> None:
        for g, group in zip(self._kept, self._optimizer.param_groups, strict=True):
            group["lr"] = record.lrs[g]

    def _members(self) -> list[Member]:
        members = self._optimizer._members()
        return [replace(m, tensor_id=n) for m, n in zip(members, self._ids, strict=True)]

    def _move(self, target: dict[int, float], record: Record | None = None) -> None:
        """Go to a point, with a step of the place of rest on the way."""
        optimizer = self._optimizer
        gradient = record and dict(zip(record.draws, record.gradient, strict=True))
        optimizer._move(target, gradient)
        optimizer._displacement.forget_all_but(target)


class _Replay(Follower):
    """Follows a trajectory over a chunk of its tensors, several steps a sweep."""

    def __init__(
        self,
        trajectory: Trajectory,
        tensors: list[Tensor],
        chunk: list[int],
        rounds: Sequence[Round],
    ) -> None:
        header = trajectory.header
        assert header is not None
        half = any(tensor.dtype != torch.float32 for tensor in tensors)
        params = [tensor.detach().requires_grad_() for tensor in tensors]
        precision = "master" if half else "inplace"
        super().__init__(header, params, chunk, rounds, precision=precision)
        self._trajectory = trajectory
        self._first_step = header["first_step"]
        self._batch: list[tuple[Record, list[Any]]] = []
        # Rounds that do not fit are found before anything is written.
        for number, settings in self._changes():
            self._optimizer._follow(settings, number, rounds)

    def _changes(self) -> Iterator[tuple[int, dict[str, Any]]]:
        last = None
        for number, (_, settings) in enumerate(self._trajectory, self._first_step):
            if settings is not last:
                yield number, settings
            last = settings

    def run(self, advance: Callable[[int], object]) -> None:
        settings: dict[str, Any] = {}
        for number, (record, current) in enumerate(self._trajectory, self._first_step):
            if current is not settings:
                self._flush()
                settings = current
                self._take_settings(settings)
            self._optimizer._follow(settings, number, self._rounds)
            if record.draws:
                self._step(record)
            advance(1)
        self._flush()

    def _step(self, record: Record) -> None:
        optimizer = self._optimizer
        self._take_rates(record)
        rules = [optimizer._rule(group) for group in optimizer.param_groups]
        if optimizer.DENSE or not all(rule.is_direct for rule in rules):
            optimizer._displacement.members = self._members()
            self._move({}, record)
            return
        self._batch.append((record, rules))
        if sum(len(record.draws) for record, _ in self._batch) >= DIRECTIONS:
            self._flush()

    def _flush(self) -> None:
        """Make the steps that wait in one sweep: each scales the weights, then moves them."""
        if not self._batch:
            return
        members, run = self._members(), self._optimizer.run
        rows = []
        for g in range(len(self._optimizer.param_groups)):
            coeffs, scales = [], []
            for record, rules in self._batch:
                coeffs += [rules[g].direct * c for c in record.gradient]
                scales += [rules[g].scale, *[1.0] * (len(record.draws) - 1)]
            rows.append((coeffs, scales))
        which = {id(group): g for g, group in enumerate(self._optimizer.param_groups)}
        own = [rows[which[id(member.group)]] for member in members]
        ops.perturb_(
            [member.param for member in members],
            [draw for record, _ in self._batch for draw in record.draws],
            [coeffs for coeffs, _ in own],
            scales=[scales for _, scales in own],
            seed=run["seed"],
            law=run["law"],
            tensor_ids=[member.tensor_id for member in members],
            masters=[m.master for m in members if m.master is not None] or None,
        )
        self._batch.clear()


def recorded_tensors(weights: Weights, header: dict[str, Any]) -> list[Tensor]:
    """The tensors that the run trained, in its order, checked against the header."""
    if isinstance(weights, nn.Module):
        weights = dict(weights.named_parameters())
    has_names = isinstance(weights, Mapping)
    given: list[Any] = list(weights.items() if isinstance(weights, Mapping) else weights)
    recorded = header["tensors"]
    if has_names or (given and isinstance(given[0], tuple)):
        # A saved adapter leaves out its name, as in lora_A.default.weight.
        by_name = {plain_name(name): tensor for name, tensor in given}
        by_name |= {canonical_name(name): tensor for name, tensor in given}
    elif header["named"]:
        raise TrajectoryError("the run's parameters have names: give them with the weights")
    else:
        by_name = {str(i): tensor for i, tensor in enumerate(given)}
    found = [_look_up(by_name, entry["name"]) for entry in recorded]
    missing = [t["name"] for t, tensor in zip(recorded, found, strict=True) if tensor is None]
    if missing:
        raise TrajectoryError(
            f"the trajectory is of another run: there are no weights for its {missing}"
        )
    tensors = [tensor for tensor in found if tensor is not None]
    check_whole(zip((entry["name"] for entry in recorded), tensors, strict=True))
    tensors = [local(tensor) for tensor in tensors]
    for entry, tensor in zip(recorded, tensors, strict=True):
        if tensor.layout != torch.strided or not is_dense(tensor) or tensor.is_inference():
            raise TrajectoryError(
                f"{entry['name']} cannot be written in place: it is not dense in memory, or an "
                "inference tensor"
            )
    own = [
        describe_tensor(entry["name"], entry["id"], entry["group"], tensor)
        for entry, tensor in zip(recorded, tensors, strict=True)
    ]
    check_run(header, {"tensors": own})
    for entry, mine in zip(recorded, own, strict=True):
        if entry["checksum"] != mine["checksum"]:
            raise TrajectoryError(
                f"the trajectory is of another run: the checksum of {entry['name']} differs, so "
                "these are not the weights that it began with"
            )
    return tensors


def _look_up(by_name: dict[str, Tensor], name: str) -> Tensor | None:
    tensor = by_name.get(canonical_name(name))
    return by_name.get(plain_name(name)) if tensor is None else tensor


def method_of(header: dict[str, Any]) -> type[ZOOptimizer]:
    """The class that makes the run's directions and applies its estimates."""
    classes = {"ZOOptimizer": ZOOptimizer}
    waiting: list[type[ZOOptimizer]] = [ZOOptimizer]
    while waiting:
        subclasses = waiting.pop().__subclasses__()
        classes |= {cls.__name__: cls for cls in subclasses}
        waiting += subclasses
    if header["method"] not in classes:
        raise TrajectoryError(
            f"the trajectory is of the method {header['method']!r}: import it before the replay"
        )
    return classes[header["method"]]


def _chunks(tensors: list[Tensor]) -> Iterator[list[int]]:
    chunk: list[int] = []
    numel = 0
    for i, tensor in enumerate(tensors):
        if chunk and numel + tensor.numel() > ELEMENTS:
            yield chunk
            chunk, numel = [], 0
        chunk.append(i)
        numel += tensor.numel()
    if chunk:
        yield chunk
