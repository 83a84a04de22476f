"""FSDP2's modules: the copies of weights that they gather to run, and keep."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from zokern.sharding import is_dtensor

COPY = (
    "{name} is a copy that FSDP2 had gathered, not the weight: call reshard() on its module before "
    "its parameters are listed"
)


class GatheredCopies:
    """Those in a module, which no longer are the weights once these have moved.

    FSDP2 (``fully_shard``) frees most of them itself after a forward pass, but not those of the
    outermost module, nor any with ``reshard_after_forward=False``.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self._is_given = module is not None
        self._sharded = [] if module is None else sharded_modules(module)
        self._module = module if self._sharded else None
        self._owned: dict[int, str] = {}
        self.drop()

    def drop(self) -> None:
        """Let the next forward pass gather them anew."""
        for module in self._sharded:
            _reset(module)
        for module in self._sharded:
            module.reshard()  # type: ignore[operator]

    def check(self, named_params: Sequence[tuple[str, Tensor]], owner: str) -> None:
        """Raises ValueError, naming it, for a parameter whose copies cannot be dropped."""
        names = {id(param): name for name, param in named_params}
        others = self._of_others([param for _, param in named_params])
        if others:
            raise ValueError(
                f"{names[id(others[0])]} is sharded by FSDP2, whose modules keep copies of weights "
                f"that they have gathered: give {owner} module=, the outermost one that "
                "fully_shard was called on, so that it can drop them when the weights move"
            )
        for name, param in named_params if self._sharded else ():
            if not is_dtensor(param) and param.numel() and not param.untyped_storage().nbytes():
                raise ValueError(COPY.format(name=name))
        self._owned |= {
            id(param): names[id(param)]
            for module in self._sharded
            for param in _parameters(module)
            if id(param) in names
        }

    def check_dropped(self) -> None:
        """Raises RuntimeError, naming it, if a module would run with a copy of a weight still."""
        if self._module is None:
            return
        held = {id(param) for param in self._module.parameters()}
        lost = [name for key, name in self._owned.items() if key not in held]
        if lost:
            raise RuntimeError(
                f"the module does not hold {lost[0]} any more, but another tensor: "
                "a new parameter, which needs a new optimizer, or a copy that FSDP2 has gathered "
                "and does not let go"
            )

    def _of_others(self, params: list[Tensor]) -> list[Tensor]:
        """Those that belong to modules of FSDP2 which are not in the given one."""
        if "torch.distributed.fsdp" not in sys.modules:
            return []
        modules = _all_sharded()
        if modules is None:
            # Where torch does not say which modules there are, any DTensor may be one of theirs.
            return [param for param in params if is_dtensor(param) and not self._is_given]
        own = {id(param) for param in params}
        return [
            param
            for module in modules
            if module not in self._sharded
            for param in _parameters(module)
            if id(param) in own
        ]


def check_weights_themselves(named_params: Sequence[tuple[str, Tensor]]) -> None:
    """Raises ValueError, naming it, for a parameter that is a copy which FSDP2 has gathered."""
    names = {id(param): name for name, param in named_params if not is_dtensor(param)}
    for module in _all_sharded() or ():
        held = [param for param in _parameters(module) if id(param) in names]
        if not held:
            continue
        # One that FSDP2 was told to ignore stays.
        module.reshard()  # type: ignore[operator]
        left = {id(param) for param in _parameters(module)}
        for param in held:
            if id(param) not in left:
                raise ValueError(COPY.format(name=names[id(param)]))


def _all_sharded() -> list[nn.Module] | None:
    """All modules of FSDP2; None where torch does not say which there are."""
    composable = sys.modules.get("torch.distributed._composable_state")
    known = getattr(composable, "_module_state_mapping", None)
    return None if known is None else [module for module in list(known) if _is_sharded(module)]


def sharded_modules(module: nn.Module) -> list[nn.Module]:
    """Those in a module that fully_shard was called on."""
    return [inner for inner in module.modules() if _is_sharded(inner)]


def param_groups(module: nn.Module) -> list[Any]:
    """What FSDP2 gathers at once for one of its modules.

    Not public, as is all that says when it has gathered.
    """
    state = module._get_fsdp_state()  # type: ignore[operator]
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [getattr(state, "_fsdp_param_group", None)]
    return [group for group in groups if group is not None]


def _reset(module: nn.Module) -> None:
    """End what FSDP2 has under way: a forward that was aborted, what is gathered ahead of use."""
    state = module._get_fsdp_state()  # type: ignore[operator]
    if hasattr(module, "reset_iter_state"):
        # Of the outermost module, which its first forward makes ready.
        if state._is_root and hasattr(state._comm_ctx, "all_gather_state"):
            module.reset_iter_state()  # type: ignore[operator]
        return
    for group in param_groups(module):
        type(group).wait_for_unshard(group)
        if group.is_unsharded:
            group._to_sharded()


def _is_sharded(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _parameters(module: nn.Module) -> Iterator[Tensor]:
    """Those in a module that belong to no FSDP2 module inside it."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if not _is_sharded(child):
            yield from _parameters(child)
