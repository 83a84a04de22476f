"""Optimizers: one file a method, the zeroth-order ones over one engine, the merging ones too."""

from zokern.optim import zopro
from zokern.optim.base import ZOOptimizer
from zokern.optim.conmezo import ConMeZO
from zokern.optim.ema import EMAAdamW
from zokern.optim.fzoo import FZOO
from zokern.optim.groups import param_groups
from zokern.optim.mezo import MeZO
from zokern.optim.mezo_greedy import MeZOGreedy
from zokern.optim.mezo_gv import MeZOGV
from zokern.optim.ondare import OnDAREAdamW
from zokern.optim.onties import OnTIESAdamW
from zokern.optim.steps import Estimate, Move
from zokern.optim.zopro import ZOPrO

# Their names in QwenLM's optimizers.py.
ODAdamW, OTAdamW = OnDAREAdamW, OnTIESAdamW

__all__ = [
    "FZOO",
    "ConMeZO",
    "EMAAdamW",
    "Estimate",
    "MeZO",
    "MeZOGV",
    "MeZOGreedy",
    "Move",
    "ODAdamW",
    "OTAdamW",
    "OnDAREAdamW",
    "OnTIESAdamW",
    "ZOOptimizer",
    "ZOPrO",
    "param_groups",
    "zopro",
]
