"""Fused kernels for zeroth-order fine-tuning and online merging in PyTorch."""

from importlib.metadata import PackageNotFoundError, version

from zokern import merge, noise, ops
from zokern.backends import use_backend
from zokern.optim import (
    FZOO,
    ConMeZO,
    EMAAdamW,
    MeZO,
    MeZOGreedy,
    MeZOGV,
    ODAdamW,
    OnDAREAdamW,
    OnTIESAdamW,
    OTAdamW,
    ZOOptimizer,
    ZOPrO,
    param_groups,
    zopro,
)
from zokern.replay import replay
from zokern.trajectory import Trajectory, TrajectoryError

try:
    __version__ = version("zokern")
except PackageNotFoundError:
    __version__ = "0+unknown"

__all__ = [
    "FZOO",
    "ConMeZO",
    "EMAAdamW",
    "MeZO",
    "MeZOGV",
    "MeZOGreedy",
    "ODAdamW",
    "OTAdamW",
    "OnDAREAdamW",
    "OnTIESAdamW",
    "Trajectory",
    "TrajectoryError",
    "ZOOptimizer",
    "ZOPrO",
    "__version__",
    "merge",
    "noise",
    "ops",
    "param_groups",
    "replay",
    "use_backend",
    "zopro",
]
