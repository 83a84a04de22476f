"""Memory for large results, and for what is needed again and again."""

import ctypes
import functools
import math
import mmap
import sys
from collections.abc import Hashable, Iterator, Sequence

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


class Buffer:
    """Memory that is lent."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.size, self.device = memory.numel(), memory.device
        self._kept: dict[Hashable, list[Tensor]] = {}
        self._known_uses = self._uses()

    def cut(self, likes: Sequence[Tensor], key: Hashable | None = None) -> list[Tensor]:
        """Contiguous tensors of these shapes and dtypes; for the same key the same ones again."""
        if key is None:
            return list(self._cut(likes))
        if key not in self._kept:
            uses = self._uses()
            self._kept[key] = list(self._cut(likes))
            self._known_uses += self._uses() - uses
        return self._kept[key]

    def _cut(self, likes: Sequence[Tensor]) -> Iterator[Tensor]:
        begin = 0
        of_dtype: dict[torch.dtype, Tensor] = {}
        for like in likes:
            if like.dtype not in of_dtype:
                of_dtype[like.dtype] = self.memory.view(like.dtype)
            strides = like.stride() if like.is_contiguous() else _strides(like.shape)
            yield of_dtype[like.dtype].as_strided(like.shape, strides, begin // like.itemsize)
            begin += _aligned(like.nbytes)

    @property
    def is_shared(self) -> bool:
        """Whether anybody holds a part of it, but for the tensors that have a key."""
        return self._uses() > self._known_uses

    def _uses(self) -> int:
        return torch._C._storage_Use_Count(self.memory.untyped_storage()._cdata)


class Scratch:
    """Buffers that are lent, given back and lent again."""

    def __init__(self) -> None:
        self._free: list[Buffer] = []
        # Of the first buffer that is at least half as large, in bytes: of the largest borrowers.
        self.least = 0

    def lend(self, size: int, device: torch.device) -> Buffer:
        """One of at least so many bytes, see :func:`room_for`."""
        own = [buffer for buffer in self._free if buffer.device == device]
        fits = [buffer for buffer in own if buffer.size >= size]
        if fits:
            buffer = min(fits, key=lambda buffer: buffer.size)
            self._free.remove(buffer)
            return buffer
        if own:
            # One that is too small would lie there unused.
            self._free.remove(max(own, key=lambda buffer: buffer.size))
        if size >= self.least / 2:
            size, self.least = max(size, self.least), 0
        with torch.inference_mode(False):
            empty = torch.empty(size, dtype=torch.uint8, device=device)
        return Buffer(_with_huge_pages(empty))

    def take_back(self, buffer: Buffer) -> None:
        """Of which the borrower keeps nothing; it is lent again unless somebody else does."""
        if not buffer.is_shared:
            self._free.append(buffer)


def room_for(likes: Sequence[Tensor]) -> int:
    """The bytes of a buffer that tensors of these shapes and dtypes can be cut from."""
    return sum(_aligned(like.nbytes) for like in likes)


def _strides(shape: torch.Size) -> list[int]:
    """Of a contiguous tensor."""
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
