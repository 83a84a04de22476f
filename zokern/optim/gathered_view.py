"""What the modules of FSDP2 read while they are evaluated: what it gathers, perturbed.

FSDP2 (``fully_shard``) gathers the weights of a module before its forward. While a point is shown,
a hook after that takes what was gathered from θ to θ + Σ c·z, in place; the parts of the weights
that the ranks have are not written to. What is left of it when the point changes is dropped.
"""

import sys
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zokern import ops
from zokern.memory import Buffer
from zokern.ops.dtensors import local_operands
from zokern.optim.compiled import check_not_compiling
from zokern.optim.displacement import Member
from zokern.optim.gathered import GatheredCopies, parameters_of, sharded_modules
from zokern.optim.hooks import Hook
from zokern.optim.interrupts import uninterrupted
from zokern.optim.point import Point
from zokern.optim.watched import check_unwatched, unwatch, watch
from zokern.sharding import is_dtensor, like, local, part_of, whole


def check_gathered(module: nn.Module, named_params: Sequence[tuple[str, Tensor]]) -> None:
    """Raises ValueError, naming it, for a parameter that FSDP2 does not gather for a hook to see"""
    sharded = sharded_modules(module)
    own = {id(p) for inner in sharded for p in parameters_of(inner) if is_dtensor(p)}
    for name, param in named_params:
        if param.requires_grad and id(param) not in own:
            raise ValueError(
                f"layerwise=True under FSDP2 evaluates what that gathers, and {name} it does not: "
                "call fully_shard on the outermost module too, with no ignored_params that are "
                "trained, or take layerwise=False"
            )
    fsdp = sys.modules["torch.distributed.fsdp"]
    wrapper = fsdp.register_fsdp_forward_method.__code__.co_filename
    for inner in sharded:
        for name, value in vars(inner).items():
            if isinstance(value, types.MethodType) and value.__code__.co_filename == wrapper:
                raise ValueError(
                    f"layerwise=True hooks the forward of FSDP2's modules, and {name} of "
                    f"{type(inner).__name__} was registered as another one "
                    "(register_fsdp_forward_method): take layerwise=False"
                )


class GatheredView:
    """What the readers of FSDP2's modules see of their parameters until it is closed."""

    def __init__(self, module: nn.Module, members: list[Member]) -> None:
        for member in members:
            check_unwatched(member.whole)
        self._module = module
        self._members = members
        self._copies = GatheredCopies(module)
        self._slots = _slots(module, members)
        # The members whose gathered weights stand at the point.
        self._displaced: set[int] = set()
        self._sweepers: dict[tuple[int, ...], ops.Sweeper] = {}
        self._undo: list[Callable[[], object]] = []
        self._point: Point | None = None
        self._owner: weakref.finalize | None = None
        with uninterrupted():
            try:
                for inner in sharded_modules(module):
                    self._hook(inner)
                for member in members:
                    watch(member.whole, self)
            except BaseException:
                self.close()
                raise

    def show(self, point: Point) -> None:
        """From now on the parameters seem to be there."""
        self._drop()
        self._point = point

    def end_all(self) -> None:
        """A forward that was ended without its hooks leaves nothing but what is dropped."""

    def close_with(self, owner: object) -> None:
        """Also when the owner is dropped."""
        self._owner = weakref.finalize(owner, self.close)
        self._owner.atexit = False

    @uninterrupted()
    def close(self) -> None:
        """The modules read the weights again; nothing is left of the view."""
        if self._owner is not None:
            self._owner.detach()
        for undo in self._undo:
            undo()
        for member in self._members:
            unwatch(member.whole)
        self._drop()

    def _drop(self) -> None:
        self._copies.drop()
        self._displaced.clear()
        # A cast that autocast has kept would show the weights of before.
        torch.clear_autocast_cache()

    def _hook(self, module: nn.Module) -> None:
        held = {id(param) for param in parameters_of(module)}
        own = [i for i, member in enumerate(self._members) if id(member.whole) in held]
        # FSDP2's own hook is between these.
        before = module.register_forward_pre_hook(Hook(self._begin, own), prepend=True)
        after = module.register_forward_pre_hook(Hook(self._displace, own))
        self._undo += [before.remove, after.remove]

    def _begin(self, own: list[int]) -> None:
        """Before FSDP2 gathers: what was dropped since will be gathered anew."""
        check_not_compiling()
        if torch.is_grad_enabled():
            raise RuntimeError(
                "layerwise=True under FSDP2 evaluates without gradients, for which it would gather "
                "the weights again: evaluate under torch.no_grad(), or take layerwise=False"
            )
        self._displaced -= {i for i in self._displaced if self._held(i) is self._members[i].whole}

    def _held(self, i: int) -> Tensor:
        module, name = self._slots[i]
        return module._parameters[name]  # type: ignore[return-value]

    def _displace(self, own: list[int]) -> None:
        gathered = {i: self._held(i) for i in own if i not in self._displaced}
        gathered = {i: p for i, p in gathered.items() if p is not self._members[i].whole}
        if self._point is None or not gathered:
            return
        for i, param in gathered.items():
            if param.dtype != self._members[i].param.dtype:
                raise RuntimeError(
                    f"{self.name_of(self._members[i].whole)} is stored as "
                    f"{self._members[i].param.dtype} and gathered as {param.dtype}, in which "
                    "perturbations would be rounded twice: take layerwise=False, or leave "
                    "param_dtype out of FSDP2's MixedPrecisionPolicy"
                )
        with uninterrupted():
            self._sweep(gathered, self._point)
            self._displaced |= gathered.keys()

    def _sweep(self, gathered: dict[int, Tensor], point: Point) -> None:
        members = [self._members[i] for i in gathered]
        params = [param.detach() for param in gathered.values()]
        has_slots = any(draw < 0 for draw in point.draws)
        operands: dict[str, Any] = {
            "tensor_ids": [member.tensor_id for member in members],
            "residuals": [
                None if member.residual is None else _beside(param, member.residual, member)
                for param, member in zip(params, members, strict=True)
            ],
            "dense": [
                [_beside(p, m.dense[j], m) for p, m in zip(params, members, strict=True)]
                for j in range(len(members[0].dense) if has_slots else 0)
            ],
        }
        params, operands = local_operands(params, operands)
        key = tuple(gathered)
        outs = None
        if any(member.residual is not None for member in members):
            # What is gathered is to be the nearest value, not a part of one that has a residual.
            outs = [torch.empty_like(param) for param in params]
        sweeper = self._sweepers.setdefault(key, ops.Sweeper())
        sweeper.sweep(params, point.numbers(list(key)), law=point.law, outs=outs, **operands)
        for param, out in zip(params, outs or (), strict=False):
            param.copy_(out)

    def name_of(self, param: Tensor) -> str:
        i = next(i for i, member in enumerate(self._members) if member.whole is param)
        module, name = self._slots[i]
        path = next(path for path, inner in self._module.named_modules() if inner is module)
        return f"{path}.{name}" if path else name

    def at_rest(self, param: Tensor) -> Tensor:
        return like(param, local(param))

    def instead(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        return NotImplemented

    def lend(self, param: Tensor) -> tuple[Tensor, Buffer]:
        raise RuntimeError(
            f"{self.name_of(param)} is read while FSDP2 has it in parts, in which it is not "
            "perturbed: read it in the forward of its own module, or take layerwise=False"
        )

    def take_back(self, buffer: Buffer) -> None:
        """Nothing is lent."""


def _slots(module: nn.Module, members: list[Member]) -> list[tuple[nn.Module, str]]:
    """The module that holds each member, and under which name."""
    slots = {
        id(param): (inner, name)
        for inner in module.modules()
        for name, param in inner._parameters.items()
    }
    return [slots[id(member.whole)] for member in members]


def _beside(gathered: Tensor, part: Tensor, member: Member) -> Tensor:
    """Of what goes with a member the part that belongs to what was gathered."""
    return part_of(whole(like(member.whole, part)), gathered).contiguous()
