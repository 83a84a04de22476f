"""Zeroth-order optimizers: one file a method, over one engine."""

from zokern.optim import zopro
from zokern.optim.base import ZOOptimizer
from zokern.optim.conmezo import ConMeZO
from zokern.optim.fzoo import FZOO
from zokern.optim.groups import param_groups
from zokern.optim.mezo import MeZO
from zokern.optim.mezo_greedy import MeZOGreedy
from zokern.optim.mezo_gv import MeZOGV
from zokern.optim.steps import Estimate, Move
from zokern.optim.zopro import ZOPrO

__all__ = [
    "FZOO",
    "ConMeZO",
    "Estimate",
    "MeZO",
    "MeZOGV",
    "MeZOGreedy",
    "Move",
    "ZOOptimizer",
    "ZOPrO",
    "param_groups",
    "zopro",
]
