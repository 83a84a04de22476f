"""Memory for large results."""

import ctypes
import functools
import mmap
import sys

import torch
from torch import Tensor

# Smaller than a huge page: neighbours share one.
LARGE = 1 << 18


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def empty_like(tensor: Tensor) -> Tensor:
    """A contiguous tensor of the same shape, dtype and device, its values undefined.

    Linux maps the memory of a new tensor when it is first written, by default 4 KiB at a time: for
    a merge that is more work than the merge. Where the tensor is large, it is asked for huge pages.
    """
    empty = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    size = empty.numel() * empty.element_size()
    if sys.platform == "linux" and empty.device.type == "cpu" and size >= LARGE:
        begin = empty.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        length = empty.data_ptr() + size - begin
        # A kernel without huge pages refuses, and nothing is lost.
        _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return empty
