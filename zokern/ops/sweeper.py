"""Sweeps over the same tensors again and again."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from zokern import backends
from zokern.arguments import Numbers, Shards, pick, tensor_list
from zokern.checks import check_form, check_memory, check_update
from zokern.ops.dtensors import local_operands
from zokern.ops.sweeps import (
    SweepNumbers,
    note_writes,
    operator_calls,
    read_numbers,
    run,
    run_operator,
    sweep_of,
)
from zokern.sweep import Sweep, Update

T = TypeVar("T")


class Sweeper:
    """:func:`perturb_` for whoever sweeps the same tensors again and again.

    Tensors are checked and brought into the form that the backend wants when they are first swept,
    and again only where they lie elsewhere or have another form. It holds none of them.

    Sweeps pass by torch's dispatcher, unless a profiler or a dispatch mode looks on.
    """

    def __init__(self) -> None:
        self._known: dict[tuple, tuple[list | None, list[_Part]]] = {}
        self._prepared: Prepared | None = None

    def perturb_(
        self,
        params: Iterable[Tensor],
        draws: Sequence[int],
        coeffs: Numbers,
        *,
        seed: int,
        scales: Numbers | None = None,
        dense: Sequence[Sequence[Tensor]] = (),
        rest: int | None = None,
        update: Update | None = None,
        rounding: int | None = None,
        **others: Any,
    ) -> None:
        """See :func:`perturb_`, which takes the same arguments."""
        operands = {**others, "dense": dense, "update": update}
        params, operands = local_operands(tensor_list("params", params), operands)
        numbers = read_numbers(
            len(params),
            len(dense),
            draws,
            coeffs,
            has_masters=others.get("masters") is not None,
            seed=seed,
            scales=scales,
            rest=rest,
            update=operands.pop("update"),
            rounding=rounding,
        )
        self.sweep(params, numbers, **operands)

    def sweep(
        self,
        params: list[Tensor],
        numbers: SweepNumbers,
        *,
        law: str = "gauss16",
        tensor_ids: Sequence[int] | None = None,
        shards: Shards | None = None,
        rows: Sequence[Tensor | None] | None = None,
        residuals: Sequence[Tensor | None] | None = None,
        masters: Sequence[Tensor] | None = None,
        outs: Sequence[Tensor] | None = None,
        dense: Sequence[Sequence[Tensor]] = (),
    ) -> None:
        """The same by numbers that :func:`read_numbers` has read, for several sweeps perhaps."""
        places: dict[str, Any] = {"tensor_ids": tensor_ids, "shards": shards}
        tensors = Operands(params, residuals, masters, outs, dense, rows)
        if _is_looked_on() or not all(map(_has_address, tensors.all())):
            run_operator(operator_calls(numbers, law, params, **tensors.beside, **places))
            return
        key = law, numbers.rounding is None, masters is None, outs is None, len(dense)
        # Copies: the caller's lists may hold other numbers the next time.
        numbered = [None if given is None else list(given) for given in places.values()]
        signature = [*numbered, *tensors.forms()]
        known, parts = self._known.get(key, (None, []))
        if known != signature:
            calls = operator_calls(numbers, law, params, **tensors.beside, **places)
            parts = [_Part(call.members, sweep_of(*call.arguments)) for call in calls]
            self._known[key] = signature, parts
        sweeps = [part.sweep(tensors, numbers) for part in parts]
        with torch.no_grad():
            for sweep in sweeps:
                run(sweep)
        self._prepared = None
        if outs is not None and rows is None and len(sweeps) == 1:
            self._prepared = Prepared.of(sweeps[0])

    def again(self, outs: list[Tensor], numbers: SweepNumbers, law: str) -> bool:
        """The last sweep again, if of this law, by other numbers and into other outs.

        What it reads must lie where it lay, the outs to each other as those did, and the backend be
        the same: the caller knows.

        Returns:
            Whether it could be done so; if not, nothing has been done.
        """
        prepared = self._prepared
        return prepared is not None and prepared.law == law and prepared.run(outs, numbers)

    def __reduce__(self) -> tuple:
        return Sweeper, ()


@dataclass(frozen=True)
class Operands:
    """The tensors of a sweep, as :func:`perturb_` takes them."""

    params: list[Tensor]
    residuals: Sequence[Tensor | None] | None
    masters: Sequence[Tensor] | None
    outs: Sequence[Tensor] | None
    dense: Sequence[Sequence[Tensor]]
    rows: Sequence[Tensor | None] | None

    @property
    def beside(self) -> dict[str, Any]:
        """Those beside the params, by their names."""
        return {key: value for key, value in vars(self).items() if key != "params"}

    def all(self) -> Iterator[Tensor]:
        for tensors in (self.params, self.residuals, self.masters, self.outs, self.rows):
            yield from (t for t in tensors or () if t is not None)
        for vectors in self.dense:
            yield from vectors

    def forms(self) -> list:
        given = (self.params, self.residuals, self.masters, self.outs, self.rows, *self.dense)
        return forms_of(t for tensors in given if tensors is not None for t in tensors)


def forms_of(tensors: Iterable[Tensor | None]) -> list:
    """Where each tensor lies, and how; the backend that was asked for."""
    forms: list = [backends.chosen()]
    forms += [None if t is None else (t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]
    return forms


class _Part:
    """What one call of a backend sweeps, checked."""

    def __init__(self, members: list[int], sweep: Sweep) -> None:
        check_memory(sweep)
        self._members = members
        self._none: list[Tensor | None] = [None] * len(members)
        self._rounds = sweep.rounding is not None
        self._places: dict[str, Any] = {
            "tensor_ids": sweep.tensor_ids,
            "shards": sweep.shards,
            "law": sweep.law,
            "kept": {},
        }

    def sweep(self, tensors: Operands, numbers: SweepNumbers) -> Sweep:
        """Of these tensors, by these numbers."""
        none = self._none
        sweep = Sweep(
            **self._places,
            params=self._own(tensors.params),
            residuals=none if tensors.residuals is None else self._own(tensors.residuals),
            masters=None if tensors.masters is None else self._own(tensors.masters),
            outs=None if tensors.outs is None else self._own(tensors.outs),
            dense=[self._own(vectors) for vectors in tensors.dense],
            rows=none if tensors.rows is None else self._own(tensors.rows),
            draws=numbers.draws,
            coeffs=self._rows(numbers.coeffs),
            scales=self._rows(numbers.scales or [[1.0] * len(numbers.draws)]),
            rest=numbers.rest,
            update=None if numbers.update is None else self._update(numbers.update),
            rounding=numbers.rounding if self._rounds else None,
            seed=numbers.seed,
        )
        check_form(sweep)
        if sweep.update is not None and sweep.update.momenta is not None:
            for i in range(len(self._members)):
                check_update(sweep, i)
            check_memory(sweep)
        return sweep

    def _own(self, entries: Sequence[T]) -> list[T]:
        return list(entries) if len(entries) == len(self._members) else pick(entries, self._members)

    def _rows(self, rows: Sequence[Sequence[float]]) -> list[Sequence[float]]:
        return [*rows] * len(self._members) if len(rows) == 1 else self._own(rows)

    def _update(self, update: Update) -> Update:
        return Update(
            self._rows(update.gradient),
            self._own(update.decays),
            self._own(update.steps),
            None if update.momenta is None else self._own(update.momenta),
            update.sign,
        )


@dataclass(frozen=True)
class Prepared:
    """A sweep into outs that a backend can run again without a look at its tensors."""

    law: str
    run_again: Callable[[list[Tensor], SweepNumbers], None]
    # One of the outs of each memory: views of one tensor count their writes together.
    apart: list[int]

    @staticmethod
    def of(sweep: Sweep) -> "Prepared | None":
        prepare = getattr(backends.select(sweep.params[0].device), "prepare", None)
        if prepare is None or not sweep.is_packed:
            return None
        assert sweep.outs is not None
        apart = {id(out if out._base is None else out._base): i for i, out in enumerate(sweep.outs)}
        return Prepared(sweep.law, prepare(sweep), list(apart.values()))

    def run(self, outs: list[Tensor], numbers: SweepNumbers) -> bool:
        """By plain numbers, or not at all."""
        if not numbers.is_plain or _is_looked_on():
            return False
        self.run_again(outs, numbers)
        note_writes(outs[i] for i in self.apart)
        return True


def _has_address(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta


def _is_looked_on() -> bool:
    return torch._C._len_torch_dispatch_stack() > 0 or torch.autograd._profiler_enabled()
