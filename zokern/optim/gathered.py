"""FSDP2's modules: the copies of weights that they gather to run, and keep."""

import sys
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from zokern.sharding import is_dtensor


class GatheredCopies:
    """Those in a module, which no longer are the weights once these have moved.

    FSDP2 (``fully_shard``) frees most of them itself after a forward pass, but not those of the
    outermost module, nor any with ``reshard_after_forward=False``.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self._module = module
        self._sharded = [m for m in module.modules() if _is_sharded(m)] if module else []
        self._owned: dict[int, str] = {}
        self.drop()

    def drop(self) -> None:
        """Let the next forward pass gather them anew."""
        for module in self._sharded:
            module.reshard()  # type: ignore[operator]

    def check(self, named_params: Sequence[tuple[str, Tensor]], owner: str) -> None:
        """Raises ValueError, naming it, for a parameter whose copies cannot be dropped."""
        names = {id(param): name for name, param in named_params}
        for module in _all_sharded():
            own = [names[id(param)] for param in _parameters(module) if id(param) in names]
            if own and module not in self._sharded:
                raise ValueError(
                    f"{own[0]} is sharded by FSDP2, whose modules keep copies of weights that they "
                    f"have gathered: give {owner} module=, the outermost one that fully_shard was "
                    "called on, so that it can drop them when the weights move"
                )
        for name, param in named_params if self._sharded else ():
            if not is_dtensor(param) and param.numel() and not param.untyped_storage().nbytes():
                raise ValueError(
                    f"{name} is a copy that FSDP2 had gathered, not the weight: call reshard() on "
                    "its module before its parameters are listed"
                )
        self._owned |= {
            id(param): names[id(param)]
            for module in self._sharded
            for param in _parameters(module)
            if id(param) in names
        }

    def check_dropped(self) -> None:
        """Raises RuntimeError, naming it, if a module would run with a copy of a weight still."""
        if self._module is None or not self._owned:
            return
        kept = self._owned.keys() - {id(param) for param in self._module.parameters()}
        if kept:
            raise RuntimeError(
                f"the module does not hold {self._owned[min(kept)]} any more, but another tensor: "
                "a copy that FSDP2 has gathered and keeps after a forward pass that was aborted "
                "(call reset_iter_state() on the outermost module that fully_shard was called on), "
                "or a new parameter, which needs a new optimizer"
            )


def _is_sharded(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _all_sharded() -> Iterator[nn.Module]:
    """The modules of FSDP2 that there are."""
    composable = sys.modules.get("torch.distributed._composable_state")
    known = getattr(composable, "_module_state_mapping", {})
    return (module for module in list(known) if _is_sharded(module))


def _parameters(module: nn.Module) -> Iterator[Tensor]:
    """Those in a module that belong to no FSDP2 module inside it."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if not _is_sharded(child):
            yield from _parameters(child)
