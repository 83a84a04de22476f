"""Zeroth-order optimizers: one file a method, over one engine."""

from zokern.optim.groups import param_groups
from zokern.optim.mezo import MeZO

__all__ = ["MeZO", "param_groups"]
