"""What the layers of a module read while it is evaluated: a buffer with their perturbed weights.

While a point is shown, a hook before each layer's forward writes θ + Σ c·z of the layer's own
parameters into a buffer as large as the largest layer, and lets the parameters be that until the
forward is over. Whoever else reads one (a functional call, a fused attention that reads the
projections of other modules) is given a buffer too, for the time of that one operation, by
:mod:`zokern.optim.watched`. What cannot be followed even there finds NaN: so nothing is missed.

Two reads need no whole tensor. An embedding takes the rows that its input names; a linear map with
a large weight is evaluated in chunks of its rows.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn import functional

from zokern import ops
from zokern.memory import Buffer, room_for
from zokern.optim.compiled import check_not_compiling, is_compiled
from zokern.optim.displacement import Member
from zokern.optim.interrupts import uninterrupted
from zokern.optim.layers import Layer, is_chunked
from zokern.optim.point import Point
from zokern.optim.watched import (
    Watched,
    check_unwatched,
    look_again,
    look_away,
    unwatch,
    watch,
)
from zokern.optim.workspace import Part, Workspace


class Source(NamedTuple):
    """What a part is made of: for each of its tensors, how it is stored."""

    params: list[Tensor]
    residuals: list[Tensor | None]
    dense: list[tuple[Tensor, ...]]
    tensor_ids: list[int]
    shards: list[tuple[int, int, int]] | None = None


@dataclass
class Lent:
    """What a running forward was lent."""

    layer: Layer
    members: Sequence[int] = ()
    tensors: Sequence[Tensor] = ()
    buffer: Buffer | None = None


class Hook:
    """Runs before or after a layer's forward; a copy of the module has none."""

    def __init__(self, run: Callable[["Layer"], None] | None, layer: "Layer | None") -> None:
        self._run, self._layer = run, layer

    def __call__(self, *_: object) -> None:
        if self._run is not None and self._layer is not None:
            self._run(self._layer)

    def __reduce__(self) -> tuple:
        return Hook, (None, None)


class Call:
    """Calls a compiled layer, as its hooks would."""

    def __init__(self, compiled: Callable, view: "LayerView", layer: "Layer") -> None:
        self._compiled, self._view, self._layer = compiled, view, layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._view._begin(self._layer)
        try:
            return self._compiled(*args, **kwargs)
        finally:
            self._view._finish(self._layer)


class LayerView:
    """What a module's readers see of its parameters until it is closed."""

    def __init__(self, module: nn.Module, members: list[Member], workspace: Workspace) -> None:
        for member in members:
            check_unwatched(member.param)
        self._module = module
        self._members = members
        self._params = [member.param for member in members]
        self._stored = [member.param.data for member in members]
        workspace.begin(module, members, self._stored)
        self._workspace, self._scratch = workspace, workspace.scratch
        self._index = workspace.index
        self._running: list[Lent] = []
        self._undo: list[Callable[[], object]] = []
        self._point: Point | None = None
        self._thread = threading.get_ident()
        self._owner: weakref.finalize | None = None
        self._is_closed = False
        with uninterrupted():
            try:
                for layer in workspace.layers:
                    self._hook(layer)
                # Who reads a parameter behind torch's back is not to miss it.
                for param, blank in zip(self._params, workspace.blanks, strict=True):
                    param.data = blank
                    watch(param, self)
            except BaseException:
                self.close()
                raise

    def show(self, point: Point) -> None:
        """From now on the parameters seem to be there."""
        self.end_all()
        self._point = point
        # A cast that autocast has kept would show the weights of before.
        torch.clear_autocast_cache()

    def end_all(self) -> None:
        """What a closure has caught may have ended a forward without its hook."""
        with uninterrupted():
            while self._running:
                self._end(self._running.pop())

    def close_with(self, owner: object) -> None:
        """Also when the owner is dropped, in the middle of a forward too."""
        self._owner = weakref.finalize(owner, self.close)
        self._owner.atexit = False

    @uninterrupted()
    def close(self) -> None:
        """The parameters are what they were; nothing is left of the view."""
        self._is_closed = True
        if self._owner is not None:
            self._owner.detach()
        for undo in self._undo:
            undo()
        for param, stored in zip(self._params, self._stored, strict=True):
            unwatch(param)
            param.data = stored
        self._scratch.empty()
        torch.clear_autocast_cache()

    def _hook(self, layer: Layer) -> None:
        module = layer.module
        compiled = getattr(module, "_compiled_call_impl", None)
        if compiled is None:
            before = module.register_forward_pre_hook(Hook(self._begin, layer), prepend=True)
            self._undo.append(before.remove)
            after = module.register_forward_hook(Hook(self._finish, layer), always_call=True)
            self._undo.append(after.remove)
            return

        if isinstance(compiled, Call):
            raise RuntimeError(
                f"the layer of {self.name_of(self._params[layer.members[0]])} is compiled, and is "
                "being evaluated layerwise by another optimizer: end its step first"
            )
        # A compiled call would trace hooks of its module.
        self._undo.append(lambda: setattr(module, "_compiled_call_impl", compiled))
        module._compiled_call_impl = Call(compiled, self, layer)

    def _begin(self, layer: Layer) -> None:
        """Of a forward: what it reads is written to a buffer."""
        check_not_compiling()
        self._check_thread()
        members = [i for i in layer.members if isinstance(self._params[i], Watched)]
        lent = Lent(layer)
        self._running.append(lent)
        if not members or (_keeps_what_it_reads() and not is_compiled(layer.module)):
            # In the latter case each operation is given a buffer of its own.
            return
        lent.buffer, lent.tensors = self._perturbed(self._part(members), keep=True)
        lent.members = members
        for i, tensor in zip(members, lent.tensors, strict=True):
            look_away(self._params[i])
            self._params[i].data = tensor
        self._close_again()

    def _finish(self, layer: Layer) -> None:
        """Of a forward; of those inside it too, where an interrupt has ended them."""
        if not any(lent.layer is layer for lent in self._running):
            return
        written: list[int] = []
        while True:
            lent = self._running.pop()
            written += self._end(lent)
            if lent.layer is layer:
                break
        self._close_again()
        if written and not self._is_closed:
            raise RuntimeError(
                f"{self.name_of(self._params[written[0]])} was written to while it was "
                "evaluated: the closure must leave the weights alone"
            )

    def _end(self, lent: Lent) -> list[int]:
        """Put the members back; those that somebody has given other data."""
        written = []
        for i, tensor in zip(lent.members, lent.tensors, strict=True):
            param = self._params[i]
            if not isinstance(param, Watched):
                if param.data_ptr() != tensor.data_ptr():
                    written.append(i)
                param.data = self._workspace.blanks[i]
                look_again(param)
        if lent.buffer is not None:
            self._scratch.take_back(lent.buffer)
        return written

    def _close_again(self) -> None:
        """Where the owner was dropped in the middle of what swaps parameters."""
        if self._is_closed:
            self.close()

    def _check_thread(self) -> None:
        if threading.get_ident() != self._thread:
            raise RuntimeError(
                "layerwise evaluation swaps parameters in and out, for one thread: evaluate on the "
                "thread that called step or ask, or take layerwise=False"
            )

    def _part(self, members: list[int], rows: slice | None = None) -> Part:
        key = *members, None if rows is None else (rows.start, rows.stop)
        part = self._workspace.parts.get(key)
        if part is None:
            params = self._source(members, rows).params
            part = Part(members, rows, room_for(params), params[0].device)
            self._workspace.parts[key] = part
        return part

    def _source(self, members: list[int], rows: slice | None) -> Source:
        if rows is not None:
            i = members[0]
            param = self._stored[i][rows]
            shard = rows.start * param[0].numel(), param.numel(), param.numel()
            return self._rows(i, itemgetter(rows), shard)
        return Source(
            [self._stored[i] for i in members],
            [self._members[i].residual for i in members],
            [self._members[i].dense for i in members],
            [self._members[i].tensor_id for i in members],
        )

    def _rows(
        self, i: int, pick: Callable[[Tensor], Tensor], shard: tuple[int, int, int]
    ) -> Source:
        member = self._members[i]
        residual = None if member.residual is None else pick(member.residual)
        dense = tuple(map(pick, member.dense))
        return Source([pick(self._stored[i])], [residual], [dense], [member.tensor_id], [shard])

    def _perturbed(self, part: Part, *, keep: bool) -> tuple[Buffer, list[Tensor]]:
        """The part's perturbed values, and the buffer that they lie in.

        With ``keep`` the tensors are used again: nobody but the caller may get hold of them.
        """
        buffer = self._scratch.lend(part.size, part.device)
        tensors = buffer.kept.get(part) if keep else None
        source = None
        if tensors is None:
            source = self._source(part.members, part.rows)
            tensors = buffer.cut(source.params, part if keep else None)
        assert self._point is not None
        numbers = self._point.numbers(part.members)
        if not part.sweeper.again(tensors, numbers, self._point.law):
            source = source or self._source(part.members, part.rows)
            self._sweep(part.sweeper, numbers, source, tensors)
        return buffer, tensors

    def _sweep(
        self,
        sweeper: ops.Sweeper,
        numbers: ops.SweepNumbers,
        source: Source,
        outs: list[Tensor],
        rows: list[Tensor] | None = None,
    ) -> None:
        assert self._point is not None
        has_slots = any(draw < 0 for draw in self._point.draws)
        sweeper.sweep(
            source.params,
            numbers,
            law=self._point.law,
            tensor_ids=source.tensor_ids,
            shards=source.shards,
            rows=rows,
            residuals=source.residuals,
            dense=list(zip(*source.dense, strict=True)) if has_slots else (),
            outs=outs,
        )

    def name_of(self, param: Tensor) -> str:
        names = {id(own): name for name, own in self._module.named_parameters()}
        return names.get(id(param), "a parameter that its module had")

    def at_rest(self, param: Tensor) -> Tensor:
        return self._stored[self._index[id(param)]]

    def lend(self, param: Tensor) -> tuple[Tensor, Buffer]:
        self._check_thread()
        i = self._index[id(param)]
        with _outside_functorch():
            buffer, (tensor,) = self._perturbed(self._part([i]), keep=False)
        return tensor, buffer

    def take_back(self, buffer: Buffer) -> None:
        with _outside_functorch():
            self._scratch.take_back(buffer)

    def instead(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        if _in_functorch():
            return NotImplemented
        if func is functional.embedding:
            return self._embedding(*args, **kwargs)
        if func is functional.linear:
            return self._linear(*args, **kwargs)
        return NotImplemented

    def _embedding(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        *_: object,
        **__: object,
    ) -> Any:
        """Of the rows that the input names."""
        i = self._index.get(id(weight))
        if i is None or max_norm is not None or isinstance(input, Watched):
            return NotImplemented
        numbers, places = torch.unique(input.long(), return_inverse=True)
        width = weight.shape[1]
        source = self._rows(i, lambda t: t.index_select(0, numbers), (0, width, width))
        out = torch.empty_like(source.params[0])
        assert self._point is not None
        self._sweep(ops.Sweeper(), self._point.numbers([i]), source, [out], [numbers])
        return functional.embedding(places, out)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        """In chunks of rows of the weight."""
        i = self._index.get(id(weight))
        if i is None or not is_chunked(self._stored[i]) or isinstance(input, Watched):
            return NotImplemented
        if input.is_nested or (isinstance(bias, Watched) and id(bias) not in self._index):
            return NotImplemented
        count, width = weight.shape
        if isinstance(bias, Watched):
            bias, _ = self.lend(bias)
        step = max(1, self._workspace.most // (width * weight.element_size()))
        result = None
        # A graph for gradients would keep them.
        keep = not _keeps_what_it_reads()
        for begin in range(0, count, step):
            rows = slice(begin, min(begin + step, count))
            buffer, outs = self._perturbed(self._part([i], rows), keep=keep)
            own = functional.linear(input, outs[0], None if bias is None else bias[rows])
            if result is None:
                result = own.new_empty(*own.shape[:-1], count)
            result[..., rows] = own
            del outs
            self._scratch.take_back(buffer)
        return result


def _keeps_what_it_reads() -> bool:
    """Whether what is read now may be wanted again after the layer's forward, or is wrapped.

    A graph for gradients, with respect to inputs, remembers the parameter itself.
    """
    return torch.is_grad_enabled() or _in_functorch()


def _in_functorch() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def _outside_functorch() -> AbstractContextManager:
    """What is made inside belongs to no transformation that is under way."""
    return temporarily_clear_interpreter_stack() if _in_functorch() else nullcontext()
