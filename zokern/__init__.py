"""Fused kernels for zeroth-order fine-tuning and online merging in PyTorch."""

from importlib.metadata import PackageNotFoundError, version

from zokern import noise, ops
from zokern.backends import use_backend
from zokern.optim import MeZO, param_groups

try:
    __version__ = version("zokern")
except PackageNotFoundError:
    __version__ = "0+unknown"

__all__ = ["MeZO", "__version__", "noise", "ops", "param_groups", "use_backend"]
