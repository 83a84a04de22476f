"""Memory for large results, and for what is needed again and again."""

import ctypes
import functools
import math
import mmap
import sys
from bisect import insort
from collections.abc import Hashable, Iterator, Sequence
from operator import attrgetter

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


def _pages(size: int) -> mmap.mmap | None:
    """Memory of its own, which the system can take while it is not needed, but need not.

    What an allocator is given back it often unmaps: to map it again for each step, page by page,
    takes longer than all else that a step does beside its sweeps. None for small memory, and where
    there is no such thing.
    """
    if size < LARGE or not hasattr(mmap, "MADV_FREE") or torch._C._len_torch_dispatch_stack():
        return None
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_FREE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return None
    return pages


class Buffer:
    """So many bytes of memory, lent."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self._pages = _pages(size) if device.type == "cpu" else None
        with torch.inference_mode(False):
            if self._pages is None:
                self.memory = torch.empty(size, dtype=torch.uint8, device=device)
            else:
                self.memory = torch.frombuffer(self._pages, dtype=torch.uint8)
        self.kept: dict[Hashable, list[Tensor]] = {}
        # What a mode of torch has made in place of memory has no address.
        self._address = self.memory.data_ptr() if type(self.memory) is Tensor else None
        self._references()
        self._known_references = self._references()

    def cut(self, likes: Sequence[Tensor], key: Hashable | None = None) -> list[Tensor]:
        """Contiguous tensors of these shapes and dtypes; kept, where they have a key."""
        before = self._references()
        tensors = list(self._cut(likes))
        if key is not None:
            self.kept[key] = tensors
            self._known_references += self._references() - before
        return tensors

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
        """Whether anybody holds a part of it, but for the tensors that have a key; or has it moved,
        as ``share_memory_`` does."""
        is_elsewhere = self._address is None or self.memory.data_ptr() != self._address
        return is_elsewhere or self._references() > self._known_references

    def empty(self) -> None:
        """Nobody needs what it holds, nor the memory until :meth:`fill`."""
        if self._pages is not None:
            self._pages.madvise(mmap.MADV_FREE)
        else:
            self.memory.untyped_storage().resize_(0)

    def fill(self) -> None:
        """Have memory again, perhaps elsewhere."""
        if self._pages is None and not self.memory.untyped_storage().nbytes():
            self.memory.untyped_storage().resize_(self.size)
            self._address = self.memory.data_ptr()

    def _references(self) -> int:
        """Of tensors to its storage, and of Python to the object that stands for that."""
        storage = self.memory.untyped_storage()
        return torch._C._storage_Use_Count(storage._cdata) + sys.getrefcount(storage)


class Scratch:
    """Buffers that are lent, given back and lent again."""

    def __init__(self) -> None:
        # The smaller ones first.
        self._free: list[Buffer] = []
        # Of the first buffer that is at least half as large, in bytes: of the largest borrowers.
        self.least = 0

    def lend(self, size: int, device: torch.device) -> Buffer:
        """One of at least so many bytes, see :func:`room_for`."""
        wanted = size
        if size >= self.least / 2:
            wanted, self.least = _aligned(max(size, self.least)), 0
        too_small = None
        for i, buffer in enumerate(self._free):
            if buffer.device == device:
                if buffer.size >= size:
                    del self._free[i]
                    buffer.fill()
                    return buffer
                too_small = i
        if too_small is not None:
            # It would lie there unused.
            del self._free[too_small]
        return Buffer(wanted, device)

    def take_back(self, buffer: Buffer) -> None:
        """Of which the borrower keeps nothing; it is lent again unless somebody else does."""
        if not buffer.is_shared:
            insort(self._free, buffer, key=attrgetter("size"))

    def empty(self) -> None:
        """Nobody needs the memory of those that are free, until they are lent again."""
        for buffer in self._free:
            buffer.empty()


def room_for(likes: Sequence[Tensor]) -> int:
    """The bytes of a buffer that tensors of these shapes and dtypes can be cut from."""
    return sum(_aligned(like.nbytes) for like in likes)


def _strides(shape: torch.Size) -> list[int]:
    """Of a contiguous tensor."""
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
