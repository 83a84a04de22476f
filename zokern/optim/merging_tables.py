"""The tables with a row for each parameter that a merging optimizer's sweep reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zokern.merging import AdamNumbers, SparseTau
from zokern.optim.merging_groups import Group
from zokern.sharding import Part, local

STEP, DECAY = map(AdamNumbers._fields.index, ("step", "decay"))

MAX_COLUMNS = 256

NumbersOf = Callable[[Group, int], AdamNumbers]


@dataclass(frozen=True)
class Member:
    """A parameter that takes a step, and what is kept beside it.

    ``own``, ``grad`` and ``tau`` are what this rank has of a DTensor, and the tensors themselves of
    others.
    """

    name: str
    param: Tensor
    own: Tensor
    grad: Tensor
    state: dict[str, Any]
    group: Group
    tensor_id: int
    tau: Tensor | SparseTau | None
    part: Part

    def kept(self, key: str) -> Tensor | None:
        """What this rank has of a tensor of its state."""
        tensor = self.state.get(key)
        return None if tensor is None else local(tensor)

    @property
    def rescales(self) -> bool:
        return bool(self.group.get("rescale"))

    @property
    def kind(self) -> tuple:
        """What the members of one sweep have in common."""
        kept = ("master", "cached_delta")
        flags = (self.rescales, self.group["capturable"], self.tau is None)
        return self.own.device, *flags, *(key in self.state for key in kept)


@dataclass(frozen=True)
class Tables:
    """The numbers, whether each parameter merges, and the draw of its mask: the step's number."""

    numbers: Tensor
    merges: Tensor
    draws: Tensor


class OnHost:
    """Tables from steps that are Python's integers, computed there."""

    def tables(self, members: list[Member], numbers_of: NumbersOf) -> Tables:
        rows: dict[tuple[int, int], int] = {}
        numbers: list[AdamNumbers] = []
        row_of, draws, merges = [], [], []
        for member in members:
            t = int(member.state["step"]) + 1
            key = (id(member.group), t)
            if key not in rows:
                rows[key] = len(numbers)
                numbers.append(numbers_of(member.group, t))
            row_of.append(rows[key])
            draws.append(t)
            merges.append(t % member.group.get("online_step", 1) == 0)
        table = torch.tensor(numbers, dtype=torch.float32)[row_of]
        return Tables(table, torch.tensor(merges, dtype=torch.int64), torch.tensor(draws))

    def column(self, values: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A number for each parameter."""
        return torch.tensor(values, dtype=dtype)

    def advance(self, members: list[Member]) -> None:
        for member in members:
            member.state["step"] += 1


class OnDevice:
    """Tables from steps and learning rates on the device, which no host waits for or knows.

    What does not change is uploaded once, so that a CUDA graph that captures a step goes on
    stepping when it is replayed.
    """

    def __init__(self) -> None:
        self._uploaded: dict[tuple, Tensor] = {}

    def tables(self, members: list[Member], numbers_of: NumbersOf) -> Tables:
        device = members[0].own.device
        t = torch.stack([member.state["step"] for member in members]).double() + 1
        lr = self._learning_rates(members, device)
        groups = [member.group for member in members]
        fixed = tuple(numbers_of({**group, "lr": 1.0}, 1) for group in groups)
        numbers = self.column(fixed, torch.float32, device).clone()
        beta1, beta2, corrected, every = self.column(
            tuple(
                (
                    *map(float, group["betas"]),
                    float(group["correct_bias"]),
                    group.get("online_step", 1),
                )
                for group in groups
            ),
            torch.float64,
            device,
        ).unbind(1)
        step = lr * (1 - beta2**t).sqrt() / (1 - beta1**t)
        numbers[:, STEP] = torch.where(corrected > 0, step, lr).float()
        decays = tuple(float(group["weight_decay"]) for group in groups)
        numbers[:, DECAY] = (lr * self.column(decays, torch.float64, device)).float()
        return Tables(numbers, (t % every == 0).long(), t.long())

    def advance(self, members: list[Member]) -> None:
        torch._foreach_add_([member.state["step"] for member in members], 1)

    def _learning_rates(self, members: list[Member], device: torch.device) -> Tensor:
        rates = [member.group["lr"] for member in members]
        if any(isinstance(lr, Tensor) for lr in rates):
            return torch.stack(
                [
                    torch.as_tensor(lr, dtype=torch.float64, device=device).reshape(())
                    for lr in rates
                ]
            )
        return self.column(tuple(map(float, rates)), torch.float64, device)

    def column(self, values: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A number, or a row of them, for each parameter."""
        key = (tuple(values), dtype, device)
        if key not in self._uploaded:
            # A learning rate that is no tensor is another column on each step of a schedule.
            if len(self._uploaded) >= MAX_COLUMNS:
                self._uploaded.pop(next(iter(self._uploaded)))
            self._uploaded[key] = torch.tensor(values, dtype=dtype).to(device)
        return self._uploaded[key]
