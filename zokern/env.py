"""Every environment variable that zokern reads.

At run time:

- ``ZOKERN_BACKEND``: ``native``, ``triton`` or ``reference``; as :func:`zokern.use_backend`.
- ``ZOKERN_CPU_CAPABILITY``: ``portable``, ``avx2`` or ``avx512`` forces the instruction set of the
  native CPU kernels (the best one that the processor has is the default).

At build time (read by ``setup.py``):

- ``ZOKERN_NATIVE``: ``0`` builds a pure-Python wheel, ``1`` fails where there is no compiler;
  by default the native core is built where a C++ compiler is found.
- ``ZOKERN_CUDA``: ``1`` requires the CUDA kernels, ``0`` leaves them out; ``auto``, the default,
  builds them where nvcc is found.
- ``ZOKERN_CUDA_ARCHS``: compute capabilities, ``"80;90;100"`` by default.
"""

import os


def backend() -> str | None:
    return os.environ.get("ZOKERN_BACKEND") or None


def cpu_capability() -> str | None:
    return os.environ.get("ZOKERN_CPU_CAPABILITY") or None
