"""What the native core was built for, and what this machine makes use of."""

import functools

import zokern._C as _C
from zokern import env


@functools.cache
def cpu_capabilities() -> tuple[str, ...]:
    """The instruction sets that this processor has kernels for, the best one last."""
    return tuple(_C.cpu_capabilities())


def cpu_capability() -> str:
    """The instruction set in use: ``ZOKERN_CPU_CAPABILITY``, or the best one."""
    available = cpu_capabilities()
    forced = env.cpu_capability()
    if forced is None:
        return available[-1]
    if forced not in available:
        raise RuntimeError(
            f"ZOKERN_CPU_CAPABILITY={forced}, but this processor has {', '.join(available)}"
        )
    return forced


def cuda_architectures() -> list[int]:
    """The compute capabilities that it holds kernels for; empty in a build without CUDA."""
    return _C.cuda_architectures()
