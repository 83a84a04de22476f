"""The native core, ``zokern._C``: SIMD C++ on the CPU, CUDA C++ on NVIDIA GPUs.

Everything torch-like (devices, streams, allocation) happens here; the module itself knows only
pointers and sizes.
"""

import torch

_missing: str | None = None
try:
    import zokern._C as _C
except ImportError as error:
    _missing = str(error)
else:
    from zokern.backends.native.counts import equal_counts, histogram
    from zokern.backends.native.deltas import merge_deltas
    from zokern.backends.native.l1 import l1_sums
    from zokern.backends.native.merging import merge_step_
    from zokern.backends.native.noise import sample
    from zokern.backends.native.perturb import perturb_, prepare
    from zokern.backends.native.products import inner_products
    from zokern.backends.native.selection import select

__all__ = [
    "equal_counts",
    "histogram",
    "inner_products",
    "l1_sums",
    "merge_deltas",
    "merge_step_",
    "perturb_",
    "prepare",
    "sample",
    "select",
    "why_not",
    "why_not_by_default",
]


def why_not(device: torch.device) -> str | None:
    if _missing is not None:
        return f"zokern was built without the native core, or for another Python ({_missing})"
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return "the native kernels are for CPUs and NVIDIA GPUs"
    if not _C.cuda_architectures():
        return "zokern was built without CUDA"
    return _C.cuda_why_not(device.index or 0) or None


why_not_by_default = why_not
