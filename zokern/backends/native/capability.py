"""The instruction set of the CPU kernels."""

from zokern import _C, env


def cpu_capabilities() -> list[str]:
    """The instruction sets that this processor has kernels for, the best one last."""
    return _C.cpu_capabilities()


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
