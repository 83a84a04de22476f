"""Memory for large results, and for what is needed again and again."""

import ctypes
import functools
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

# Smaller than a huge page: neighbours share one.
LARGE = 1 << 18
# Tensors in one buffer begin at multiples of this, as those of torch's allocators do.
ALIGNMENT = 512


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _with_huge_pages(empty: Tensor) -> Tensor:
    """The tensor itself, not yet written to.

    Linux maps the memory of a new tensor when it is first written, by default 4 KiB at a time: for
    a merge that is more work than the merge. Where the tensor is large, it is asked for huge pages.
    """
    size = empty.numel() * empty.element_size()
    if sys.platform == "linux" and empty.device.type == "cpu" and size >= LARGE:
        begin = empty.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        length = empty.data_ptr() + size - begin
        # A kernel without huge pages refuses, and nothing is lost.
        _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return empty


def empty_like(tensor: Tensor) -> Tensor:
    """A contiguous tensor of the same shape, dtype and device, its values undefined."""
    return _with_huge_pages(torch.empty_like(tensor, memory_format=torch.contiguous_format))


class Scratch:
    """Buffers that are lent, given back and lent again."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def lend(self, likes: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """A buffer and, in it, contiguous tensors of these shapes and dtypes; of one device."""
        offsets, size = [], 0
        for like in likes:
            offsets.append(size)
            size += -(-like.numel() * like.element_size() // ALIGNMENT) * ALIGNMENT
        buffer = self._buffer(size, likes[0].device)
        tensors = []
        for like, begin in zip(likes, offsets, strict=True):
            end = begin + like.numel() * like.element_size()
            tensors.append(buffer[begin:end].view(like.dtype).view(like.shape))
        return buffer, tensors

    def take_back(self, buffer: Tensor) -> None:
        """Of which the borrower keeps nothing; it is lent again unless somebody else does."""
        # The buffer itself and the storage object that asks.
        if torch._C._storage_Use_Count(buffer.untyped_storage()._cdata) == 2:
            self._free.append(buffer)

    def clear(self) -> None:
        """Let go of what is not lent."""
        self._free.clear()

    def _buffer(self, size: int, device: torch.device) -> Tensor:
        own = [i for i, buffer in enumerate(self._free) if buffer.device == device]
        own.sort(key=lambda i: self._free[i].numel())
        for i in own:
            if self._free[i].numel() >= size:
                return self._free.pop(i)
        if own:
            # One that is too small would lie there unused.
            del self._free[own[-1]]
        with torch.inference_mode(False):
            return _with_huge_pages(torch.empty(size, dtype=torch.uint8, device=device))
