"""Notices when somebody else writes to weights or replaces them: version counters, addresses."""

from collections.abc import Iterable

import torch
from torch import Tensor

from zokern.sharding import local


class Versions:
    """The versions of parameters when the optimizer last knew what they held."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, ...]] = {}

    def note(self, params: Iterable[Tensor]) -> None:
        """They hold what the optimizer has written, or has just been given."""
        self._known.update(_versions(params))

    def forget(self) -> None:
        """Their content may be anybody's."""
        self._known.clear()

    def all_known(self, params: Iterable[Tensor]) -> bool:
        """Whether none of them was written to since it was noted."""
        return all(self._known.get(key) == version for key, version in _versions(params).items())

    def knows(self, param: Tensor) -> bool:
        return id(param) in self._known

    def changed(self, param: Tensor) -> bool:
        """Whether it was written to since it was noted, or never noted."""
        return not self.all_known([param])


def _versions(params: Iterable[Tensor]) -> dict[int, tuple[int, int, int]]:
    """How often each was written to, and where it lies: ``.data`` may be another tensor's."""
    # A parameter that is watched keeps its address to itself.
    with torch._C.DisableTorchFunctionSubclass():
        # What is done to a DTensor counts there, what is done to its part there.
        parts = ((param, local(param)) for param in params)
        return {
            id(param): (_version(param), _version(part), part.data_ptr()) for param, part in parts
        }


def _version(tensor: Tensor) -> int:
    # Inference tensors count no versions.
    return -1 if tensor.is_inference() else tensor._version
