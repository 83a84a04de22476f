"""Notices when somebody else writes to weights or replaces them: version counters, addresses."""

from collections.abc import Iterable

import torch
from torch import Tensor

from zokern.sharding import local


class Versions:
    """The versions of parameters when the optimizer last knew what they held."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, int]] = {}

    def note(self, params: Iterable[Tensor]) -> None:
        """They hold what the optimizer has written, or has just been given."""
        self._known.update((id(param), _version(param)) for param in params)

    def forget(self) -> None:
        """Their content may be anybody's."""
        self._known.clear()

    def all_known(self, params: Iterable[Tensor]) -> bool:
        """Whether none of them was written to since it was noted."""
        return not any(self.changed(param) for param in params)

    def knows(self, param: Tensor) -> bool:
        return id(param) in self._known

    def changed(self, param: Tensor) -> bool:
        """Whether it was written to since it was noted, or never noted."""
        return self._known.get(id(param)) != _version(param)


def _version(param: Tensor) -> tuple[int, int]:
    """How often it was written to, and where it lies: ``.data`` may be another tensor's."""
    param = local(param)
    # A parameter that is watched keeps its address to itself.
    with torch._C.DisableTorchFunctionSubclass():
        # Inference tensors count no versions.
        return -1 if param.is_inference() else param._version, param.data_ptr()
