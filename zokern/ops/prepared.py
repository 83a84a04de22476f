"""Sweeps over the same tensors again and again."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zokern.arguments import Numbers, pick, tensor_list
from zokern.checks import check_form, check_memory, check_update
from zokern.ops.sweeps import SweepNumbers, operator_calls, perturb_, read_numbers, run, sweep_of
from zokern.sweep import Sweep, Update


class PreparedSweep:
    """What :func:`perturb_` does, for tensors that are swept again and again.

    It is given the tensors, with the arguments of :func:`perturb_` that belong to them. They are
    checked and brought into the form that the backend wants when they are first swept, and again
    only where one of them was given other memory.

    Sweeps pass by torch's dispatcher, unless a profiler or a dispatch mode looks on.
    """

    def __init__(self, params: Iterable[Tensor], **operands: Any) -> None:
        self._params = tensor_list("params", params)
        self._dense = operands.pop("dense", ())
        self._operands = operands
        self._parts: dict[tuple, list[_Part]] = {}

    def perturb_(
        self,
        draws: Sequence[int],
        coeffs: Numbers,
        *,
        seed: int,
        law: str = "gauss16",
        scales: Numbers | None = None,
        rest: int | None = None,
        update: Update | None = None,
        rounding: int | None = None,
    ) -> None:
        """The sweep by these numbers, see :func:`perturb_`."""
        if _is_looked_on():
            uses_dense = any(draw < 0 for draw in draws)
            perturb_(
                self._params,
                draws,
                coeffs,
                seed=seed,
                law=law,
                scales=scales,
                rest=rest,
                update=update,
                rounding=rounding,
                dense=self._dense if uses_dense else (),
                **self._operands,
            )
            return
        numbers = read_numbers(
            len(self._params),
            len(self._dense),
            draws,
            coeffs,
            has_masters=self._operands.get("masters") is not None,
            seed=seed,
            scales=scales,
            rest=rest,
            update=update,
            rounding=rounding,
        )
        parts = self._prepare(numbers, law)
        sweeps = [part.with_numbers(numbers) for part in parts]
        with torch.no_grad():
            for sweep in sweeps:
                run(sweep)

    def _prepare(self, numbers: SweepNumbers, law: str) -> "list[_Part]":
        uses_dense = any(draw < 0 for draw in numbers.draws)
        key = law, numbers.rounding is None, uses_dense
        parts = self._parts.get(key)
        if parts is None or not all(part.is_current for part in parts):
            calls = operator_calls(
                numbers,
                law,
                self._params,
                dense=self._dense if uses_dense else (),
                **self._operands,
            )
            parts = [_Part(call.members, sweep_of(*call.arguments)) for call in calls]
            self._parts[key] = parts
        return parts


class _Part:
    """Tensors that one call of a backend sweeps, checked."""

    def __init__(self, members: list[int], sweep: Sweep) -> None:
        check_memory(sweep)
        self._members = members
        self._sweep = replace(sweep, update=None, kept={})
        self._tensors = [tensor for _, _, tensor in self._sweep.operands()]
        self._seen = list(map(_form, self._tensors))

    @property
    def is_current(self) -> bool:
        """Whether the tensors lie where they lay when they were checked."""
        return list(map(_form, self._tensors)) == self._seen

    def with_numbers(self, numbers: SweepNumbers) -> Sweep:
        count, k, update = len(self._members), len(numbers.draws), numbers.update
        sweep = replace(
            self._sweep,
            draws=numbers.draws,
            coeffs=self._rows(numbers.coeffs),
            scales=[[1.0] * k] * count if numbers.scales is None else self._rows(numbers.scales),
            rest=numbers.rest,
            update=None if update is None else self._own(update),
            rounding=None if self._sweep.rounding is None else numbers.rounding,
            seed=numbers.seed,
        )
        check_form(sweep)
        if sweep.update is not None:
            for i in range(count):
                check_update(sweep, i)
            check_memory(sweep)
        return sweep

    def _rows(self, rows: Sequence[Sequence[float]]) -> list[Sequence[float]]:
        return [*rows] * len(self._members) if len(rows) == 1 else pick(rows, self._members)

    def _own(self, update: Update) -> Update:
        return Update(
            self._rows(update.gradient),
            pick(update.decays, self._members),
            pick(update.steps, self._members),
            None if update.momenta is None else pick(update.momenta, self._members),
            update.sign,
        )


def _is_looked_on() -> bool:
    return torch._C._len_torch_dispatch_stack() > 0 or torch.autograd._profiler_enabled()


def _form(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
