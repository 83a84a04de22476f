"""Tensors of a module that lie in the memory of one of its parameters.

A layer that reads such a tensor reads the parameter behind its back: nothing tells that it should
be perturbed. A buffer may be one, an attribute (a view of a weight, ``weight.detach()``,
``weight.data``), or another parameter; the parameter itself, under whatever name, is none.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from zokern.checks import span

CONTAINERS = (dict, list, tuple, set, frozenset)
# What torch gives to every module.
ATTRIBUTES = frozenset(nn.Module().__dict__)
PLAIN = frozenset({bool, int, float, str, type(None)})
# Of containers within containers.
DEPTH = 3


class Places:
    """Where parameters lie; they must stay there."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._params = list(params)
        self._own = set(map(id, self._params))
        with torch._C.DisableTorchFunctionSubclass():
            spans = [(*span(p), i) for i, p in enumerate(self._params) if _has_memory(p)]
        self._spans = sorted(spans)
        self._begins = [begin for begin, _, _ in self._spans]

    def check(self, module: nn.Module) -> None:
        """Raises ValueError if the module holds a tensor that shares memory with one of them.

        Looked at are the parameters, buffers and attributes of all submodules, and what containers
        among these hold, three deep.
        """
        with torch._C.DisableTorchFunctionSubclass():
            for path, tensor in _tensors(module):
                if id(tensor) in self._own or not _has_memory(tensor):
                    continue
                begin, end = span(tensor)
                at = bisect_left(self._begins, end) - 1
                if at >= 0 and begin < self._spans[at][1]:
                    names = {id(param): name for name, param in module.named_parameters()}
                    name = names.get(id(self._params[self._spans[at][2]]), "that the module had")
                    raise ValueError(
                        f"{path} shares memory with the parameter {name}, and layerwise=True would "
                        "not notice who reads it: keep the parameter itself there, make what is "
                        "wanted of it in forward, or take layerwise=False"
                    )


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a module and its submodules hold, with where."""
    waiting, seen = [("", module)], {id(module)}
    for prefix, inner in waiting:
        held = inner.__dict__
        found = [*held["_parameters"].items(), *held["_buffers"].items(), *held["_modules"].items()]
        for key in sorted(held.keys() - ATTRIBUTES):
            if type(held[key]) not in PLAIN and not _is_made_before_forward(inner, key):
                found += _contents(key, held[key], DEPTH)
        for name, value in found:
            if isinstance(value, Tensor):
                yield prefix + name, value
            elif value is not None and id(value) not in seen:
                seen.add(id(value))
                waiting.append((f"{prefix}{name}.", value))


def _contents(path: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """The tensors and modules that an attribute is, or that it holds as a container."""
    if isinstance(value, (Tensor, nn.Module)):
        yield path, value
    elif depth and isinstance(value, CONTAINERS) and len(value):
        items: Iterable = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            if type(inner) not in PLAIN:
                yield from _contents(f"{path}[{key!r}]", inner, depth - 1)


def _is_made_before_forward(module: nn.Module, name: str) -> bool:
    """Whether a hook of torch.nn.utils (spectral_norm, prune) computes it from ``…_orig``."""
    return f"{name}_orig" in module._parameters


def _has_memory(tensor: Tensor) -> bool:
    """Not so a tensor without elements, a sparse one, or one that wraps others."""
    is_strided = tensor.layout is torch.strided and not tensor.is_nested
    return is_strided and tensor.numel() > 0 and tensor.data_ptr() != 0
