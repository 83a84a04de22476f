"""Where Triton's kernels can run, and how they are launched there."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from triton.runtime import driver

# Triton decorates its own library when it is imported: TRITON_INTERPRET counts at that moment.
INTERPRETED = tl.constexpr(not isinstance(tl.interleave, triton.JITFunction))

# Before 3.9 the interpreter rounds the product of an fma, too.
_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
FUSED_FMA = tl.constexpr(not INTERPRETED.value or _VERSION >= (3, 9))

# No product is fused with a sum but where the code says so, and unsigned sums may wrap around.
OPTIONS = {"enable_fp_fusion": False, "sanitize_overflow": False}


@cache
def why_not(kind: str) -> str | None:
    """None where Triton's kernels can run on that kind of device, else the reason."""
    if INTERPRETED.value:
        if kind == "cpu":
            return None
        return "TRITON_INTERPRET is set, and Triton's interpreter reaches only a CPU's memory"
    if kind == "cpu":
        return (
            "Triton compiles for GPUs only; set TRITON_INTERPRET=1 before Python starts to run it "
            "on a CPU, for tests"
        )
    try:
        own = driver.active.get_active_torch_device().type
    except Exception as error:  # no GPU, no C compiler, …: all of them are reasons
        return f"Triton has no active driver: {error}"
    return None if own == kind else f"Triton's active driver is for {own}"


@dataclass(frozen=True)
class Target:
    """What the kernels' shape depends on."""

    warp_size: int
    dp4a: bool


@cache
def target() -> Target:
    if INTERPRETED.value:
        return Target(warp_size=32, dp4a=False)
    current = driver.active.get_current_target()
    return Target(warp_size=current.warp_size, dp4a=current.backend == "cuda")


def on(device: torch.device) -> AbstractContextManager:
    """Makes the device the current one, whose current stream Triton launches on."""
    if device.type == "cpu":
        return nullcontext()
    return torch.get_device_module(device).device(device)
