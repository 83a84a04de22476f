"""Which modules of a model are written at once, before whose forward, for layerwise evaluation."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zokern.optim.compiled import is_compiled


class Sizes(NamedTuple):
    """In bytes: what is never divided, what several modules may have to be written at once, and
    what a chunk has at least."""

    undivided: int
    together: int
    chunk: int


# A processor has caches, where what is written can be read soon after; on a GPU a write should be
# worth its launch.
SIZES = {"cpu": Sizes(10 << 20, 5 << 20, 5 << 20), "cuda": Sizes(1 << 28, 1 << 28, 1 << 26)}
# Of all parameters, what is written at once at most where nothing needs more.
SHARE = 1 / 24
# Of that, what is written with the module around it.
SMALL = 1 / 16
# Of an embedding: a smaller one is written as a whole, which is less work than a look for its rows.
FEW_ROWS = 1 << 21
# These have one operation for all of their parts.
WHOLE = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass(frozen=True, eq=False)
class Layer:
    """A module whose forward reads parameters, and which of the members they are."""

    module: nn.Module
    members: list[int]


def check_hookable(module: nn.Module) -> None:
    """Raises ValueError if a module within takes no hooks."""
    for name, inner in module.named_modules():
        if isinstance(inner, torch.jit.ScriptModule):
            raise ValueError(
                f"layerwise=True hooks layers, and {name or 'the module'} is scripted, which "
                "has no hooks: take layerwise=False"
            )


def structure(module: nn.Module) -> tuple[list[int], list]:
    """What :func:`layers` looks at beside the form of the members, by ids; and what has these ids,
    which are theirs as long as somebody keeps it."""
    ids: list[int] = []
    kept: list = []
    for inner in module.modules():
        held = inner.__dict__
        # Scripted modules have a forward that cannot be asked for.
        of_class = getattr(type(inner), "forward", None)
        looked_at = inner, of_class, held.get("forward"), inner._compiled_call_impl
        kept += looked_at
        ids += map(id, looked_at)
        ids += map(id, held["_parameters"].values())
        ids += map(id, held["_modules"].values())
        # Where the next one begins.
        ids.append(0)
    return ids, kept


def layers(module: nn.Module, index: dict[int, int]) -> tuple[list[Layer], int]:
    """The modules before whose forward members of the index are written, each once; and the bytes
    of the most that is written at once, of a chunk too.

    As few as do with a buffer for the largest of those that cannot be divided, or for what may be
    written together; that is at most ``SHARE`` of all parameters, unless chunks need as much: one
    write for an attention costs less than one for each of its projections.

    Raises:
        ValueError: if modules within take no hooks, or members of the index are not there.
    """
    check_hookable(module)
    tree = Tree(module, index)
    if len(tree.sizes) < len(index):
        raise ValueError(
            f"{len(index) - len(tree.sizes)} of the optimizer's {len(index)} parameters are no "
            "longer in module=: modules were replaced, or weights assigned; make a new optimizer"
        )
    share = math.inf if tree.has_chunks else tree.size(tree.sizes) * SHARE
    bound = max(min(share, tree.limits.together), *map(tree.size, tree.own.values()))
    seen: set[int] = set()

    def visit(module: nn.Module) -> Iterator[Layer]:
        # A hook would be traced, where it is read with a compiled one around it.
        if id(module) in seen or tree.is_part_of_compiled(module):
            return
        seen.add(id(module))
        whole = tree.inside[id(module)]
        if tree.is_whole(module) or (_has_forward(module) and tree.size(whole) <= bound):
            if whole:
                yield Layer(module, sorted(whole))
            return
        mine, children = tree.own[id(module)], _children(module)
        if _has_forward(module):
            # Norms and the like are written with whom they belong to.
            small = [child for child in children if not tree.is_whole(child)]
            small = [c for c in small if tree.size(tree.inside[id(c)]) <= bound * SMALL]
            added = set().union(*(tree.inside[id(child)] for child in small))
            if tree.size(added) <= bound * SMALL:
                mine = mine | added
                seen.update(id(inner) for child in small for inner in child.modules())
        if mine:
            yield Layer(module, sorted(mine))
        for child in children:
            yield from visit(child)

    found = list(visit(module))
    if _has_forward(module) and not tree.is_whole(module):
        found = _with_small_ones_together(module, found, tree, bound * SMALL)
    chunks = [tree.limits.chunk] if tree.has_chunks else []
    return found, max([*chunks, *(tree.size(layer.members) for layer in found)], default=0)


def _with_small_ones_together(
    module: nn.Module, found: list[Layer], tree: "Tree", room: float
) -> list[Layer]:
    """The norms of all decoder layers, say, with the whole model, as many as there is room for."""
    together: set[int] = set()
    others = []
    for layer in found:
        added = together.union(layer.members)
        if tree.is_whole(layer.module) or tree.size(added) > room:
            others.append(layer)
        else:
            together = added
    return [Layer(module, sorted(together)), *others] if together else others


class Tree:
    """Which members the modules of a tree read as a whole, by the modules' ids."""

    def __init__(self, module: nn.Module, index: dict[int, int]) -> None:
        self._index = index
        compiled = [it for it in module.modules() if is_compiled(it)]
        self._compiled = {id(it) for it in compiled}
        # Where no operation can be given the part that it reads.
        self._inside_compiled = {id(inner) for it in compiled for inner in it.modules()}
        # In bytes, by member.
        self.sizes: dict[int, int] = {}
        # What a module's forward reads, and that with the modules inside.
        self.own: dict[int, set[int]] = {}
        self.inside: dict[int, set[int]] = {}
        self.limits, self.has_chunks = SIZES["cpu"], False
        self._add(module)

    def size(self, members: Iterable[int]) -> int:
        return sum(self.sizes[i] for i in members)

    def is_whole(self, module: nn.Module) -> bool:
        """Whether it reads the parameters of its parts itself, or lets nothing be hooked inside."""
        return id(module) in self._compiled or isinstance(module, WHOLE)

    def is_part_of_compiled(self, module: nn.Module) -> bool:
        """Whether a compiled module reads it as a part of itself."""
        return id(module) in self._inside_compiled and id(module) not in self._compiled

    def _add(self, module: nn.Module) -> set[int]:
        if id(module) not in self.inside:
            own = set(self._read_by(module))
            inside = own.union(*map(self._add, _children(module)))
            self.inside[id(module)] = inside
            self.own[id(module)] = inside if self.is_whole(module) else own
        return self.inside[id(module)]

    def _read_by(self, module: nn.Module) -> Iterator[int]:
        for param in module._parameters.values():
            i = None if param is None else self._index.get(id(param))
            if param is None or i is None:
                continue
            self.sizes[i] = param.nbytes
            self.limits = limits_of(param)
            if id(module) in self._inside_compiled or not _is_read_in_parts(module, param):
                yield i
            elif isinstance(module, nn.Linear):
                self.has_chunks = True


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _children(module: nn.Module) -> list[nn.Module]:
    return [child for child in module._modules.values() if child is not None]


def _is_read_in_parts(module: nn.Module, param: Tensor) -> bool:
    """Whether its own forward can do with less than the whole parameter."""
    if isinstance(module, nn.Embedding):
        return module.max_norm is None and param.nbytes > FEW_ROWS
    return isinstance(module, nn.Linear) and is_chunked(param)


def is_chunked(param: Tensor) -> bool:
    is_matrix = param.dim() == 2 and param.is_contiguous()
    return is_matrix and param.nbytes > limits_of(param).undivided


def limits_of(param: Tensor) -> Sizes:
    return SIZES.get(param.device.type, SIZES["cuda"])
