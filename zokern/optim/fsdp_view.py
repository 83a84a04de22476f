"""What the modules of FSDP2 read while they are evaluated: what it gathers, perturbed.

FSDP2 (``fully_shard``) gathers the weights of a module for its forward. While a point is shown,
they are taken from θ to θ + Σ c·z whenever that has been done, in place; the parts of the weights
that the ranks have are not written to. What is gathered is dropped when the point changes.
"""

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zokern import ops
from zokern.memory import Buffer
from zokern.ops.dtensors import local_operands
from zokern.optim.displacement import Member
from zokern.optim.fsdp_copies import GatheredCopies, param_groups, sharded_modules
from zokern.optim.interrupts import uninterrupted
from zokern.optim.point import Point
from zokern.optim.watched import check_unwatched, unwatch, watch
from zokern.sharding import like, local, part_of, whole


def check_gathered(module: nn.Module, named_params: Sequence[tuple[str, Tensor]]) -> None:
    """Raises ValueError, naming it, for a parameter that FSDP2 does not gather as it is stored."""
    groups = _groups(module)
    if not all(hasattr(group, "wait_for_unshard") for group in groups):
        raise ValueError(
            f"layerwise=True does not know how FSDP2 of torch {torch.__version__} gathers: take "
            "layerwise=False"
        )
    gathered = {id(p.sharded_param): _dtype(g, p) for g in groups for p in g.fsdp_params}
    for name, param in named_params:
        if not param.requires_grad:
            continue
        if id(param) not in gathered:
            raise ValueError(
                f"layerwise=True under FSDP2 evaluates what that gathers, and {name} it does not: "
                "call fully_shard on the outermost module too, with no ignored_params that are "
                "trained, or take layerwise=False"
            )
        dtype = gathered[id(param)]
        if dtype not in (None, param.dtype):
            raise ValueError(
                f"{name} is stored as {param.dtype} and gathered as {dtype}, in which "
                "perturbations would be rounded twice: take layerwise=False, or leave param_dtype "
                "out of FSDP2's MixedPrecisionPolicy"
            )


class FsdpView:
    """What the readers of FSDP2's modules see of their parameters until it is closed."""

    def __init__(self, module: nn.Module, members: list[Member]) -> None:
        for member in members:
            check_unwatched(member.whole)
        self._members = members
        self._copies = GatheredCopies(module)
        self._names = {id(param): name for name, param in module.named_parameters()}
        self._sweepers: dict[tuple[int, ...], ops.Sweeper] = {}
        self._undo: list[Callable[[], object]] = []
        self._point: Point | None = None
        self._owner: weakref.finalize | None = None
        with uninterrupted():
            try:
                for group in _groups(module):
                    self._undo.append(Gathering.of(group).join(self))
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
        """A forward that has ended otherwise than it should leaves nothing but what is dropped."""

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
        self._undo.clear()
        for member in self._members:
            unwatch(member.whole)
        self._drop()

    def _drop(self) -> None:
        self._copies.drop()
        # A cast that autocast has kept would show the weights of before.
        torch.clear_autocast_cache()

    def displace(self, group: Any) -> None:
        """What a group of FSDP2 has gathered."""
        gathered = {id(param.sharded_param): param.unsharded_param for param in group.fsdp_params}
        own = [i for i, member in enumerate(self._members) if id(member.whole) in gathered]
        if self._point is not None and own:
            params = [gathered[id(self._members[i].whole)].detach() for i in own]
            with uninterrupted():
                self._sweep(own, params, self._point)

    def _sweep(self, own: list[int], params: list[Tensor], point: Point) -> None:
        members = [self._members[i] for i in own]
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
        outs = None
        if any(member.residual is not None for member in members):
            # What is gathered is to be the nearest value, not a part of one that has a residual.
            outs = [torch.empty_like(param) for param in params]
        sweeper = self._sweepers.setdefault(tuple(own), ops.Sweeper())
        sweeper.sweep(params, point.numbers(own), law=point.law, outs=outs, **operands)
        for param, out in zip(params, outs or (), strict=False):
            param.copy_(out)

    def name_of(self, param: Tensor) -> str:
        return self._names[id(param)]

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


class Gathering:
    """Stands for what a group of FSDP2 calls when it has gathered, for whatever reason."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self._views: list[FsdpView] = []

    @staticmethod
    def of(group: Any) -> "Gathering":
        known = vars(group).get("wait_for_unshard")
        return known if isinstance(known, Gathering) else Gathering(group)

    def join(self, view: FsdpView) -> Callable[[], None]:
        """From now on the view displaces what is gathered; the result puts an end to it."""
        self._views.append(view)
        self._group.wait_for_unshard = self
        return functools.partial(self._leave, view)

    def _leave(self, view: FsdpView) -> None:
        self._views.remove(view)
        if not self._views:
            del self._group.wait_for_unshard

    def __call__(self) -> None:
        group = self._group
        if torch.is_grad_enabled():
            raise RuntimeError(
                "layerwise=True under FSDP2 evaluates without gradients, for which it would gather "
                "the weights again: evaluate under torch.no_grad(), or take layerwise=False"
            )
        was_gathered = group.is_unsharded
        # What lies with fewer ranks since a forward was displaced then.
        was_displaced = group.is_sharded_post_forward
        try:
            type(group).wait_for_unshard(group)
            if group.is_unsharded and not was_gathered and not was_displaced:
                for view in list(self._views):
                    view.displace(group)
        except BaseException:
            # Nobody is to read what is half displaced, or not at all.
            if group.is_unsharded and not was_gathered:
                group._to_sharded()
            raise


def _groups(module: nn.Module) -> list[Any]:
    found = [group for inner in sharded_modules(module) for group in param_groups(inner)]
    # Modules that are gathered at once share theirs.
    return list({id(group): group for group in found}.values())


def _dtype(group: Any, param: Any) -> torch.dtype | None:
    """In which it is gathered, where that is not as it is stored."""
    # From torch 2.15 on each parameter has its own.
    return (param if hasattr(param, "mp_policy") else group).mp_policy.param_dtype


def _beside(gathered: Tensor, part: Tensor, member: Member) -> Tensor:
    """Of what goes with a member the part that belongs to what was gathered."""
    return part_of(whole(like(member.whole, part)), gathered).contiguous()
