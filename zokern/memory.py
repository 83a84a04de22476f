"""Memory for large results, and for what is needed again and again."""

import ctypes
import functools
import mmap
import sys
from collections.abc import Hashable, Sequence
from typing import Any

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


class Cut:
    """Contiguous tensors that lie in a buffer, and what their borrower wants to keep with them."""

    def __init__(self, memory: Tensor, likes: Sequence[Tensor]) -> None:
        self.tensors = []
        self.note: Any = None
        begin = 0
        for like in likes:
            end = begin + like.numel() * like.element_size()
            self.tensors.append(memory[begin:end].view(like.dtype).view(like.shape))
            begin = _aligned(end)


class Buffer:
    """Memory that is lent."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self._cuts: dict[Hashable, Cut] = {}

    def cut(self, likes: Sequence[Tensor], key: Hashable | None = None) -> Cut:
        """Tensors of these shapes and dtypes; for the same key the same ones each time."""
        if key is None:
            return Cut(self.memory, likes)
        if key not in self._cuts:
            self._cuts[key] = Cut(self.memory, likes)
        return self._cuts[key]

    @property
    def is_shared(self) -> bool:
        """Whether anybody holds a part of it, but for the tensors that have a key."""
        kept = sum(len(cut.tensors) for cut in self._cuts.values())
        # The memory itself and the storage object that asks.
        storage = self.memory.untyped_storage()
        return torch._C._storage_Use_Count(storage._cdata) > 2 + kept


class Scratch:
    """Buffers that are lent, given back and lent again."""

    def __init__(self) -> None:
        self._free: list[Buffer] = []

    def lend(self, likes: Sequence[Tensor]) -> Buffer:
        """One that tensors of these shapes and dtypes, of one device, can be cut from."""
        size = sum(_aligned(like.numel() * like.element_size()) for like in likes)
        device = likes[0].device
        own = [i for i, buffer in enumerate(self._free) if buffer.memory.device == device]
        own.sort(key=lambda i: self._free[i].memory.numel())
        for i in own:
            if self._free[i].memory.numel() >= size:
                return self._free.pop(i)
        if own:
            # One that is too small would lie there unused.
            del self._free[own[-1]]
        with torch.inference_mode(False):
            empty = torch.empty(size, dtype=torch.uint8, device=device)
        return Buffer(_with_huge_pages(empty))

    def take_back(self, buffer: Buffer) -> None:
        """Of which the borrower keeps nothing; it is lent again unless somebody else does."""
        if not buffer.is_shared:
            self._free.append(buffer)

    def clear(self) -> None:
        """Let go of what is not lent."""
        self._free.clear()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
