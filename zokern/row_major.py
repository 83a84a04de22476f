"""Operands as contiguous tensors, for kernels that take no others."""

from collections.abc import Iterable

from torch import Tensor


class RowMajor:
    """Contiguous copies of operands that are not, each made once, and copied back where written.

    Elements are numbered in logical row-major order in every memory format, so an operand in
    another dense format (channels_last, permuted) is copied, worked on and copied back at the end.
    """

    def __init__(self) -> None:
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor.is_contiguous():
            return tensor
        if id(tensor) not in self._copies:
            self._copies[id(tensor)] = (tensor, tensor.contiguous())
        return self._copies[id(tensor)][1]

    @property
    def has_copied(self) -> bool:
        return bool(self._copies)

    def write_back(self, written: Iterable[Tensor]) -> None:
        for tensor in written:
            if id(tensor) in self._copies:
                tensor.copy_(self._copies[id(tensor)][1])
