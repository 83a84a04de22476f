"""The specification: plain PyTorch, on anything torch runs on."""

import torch

from zokern.backends.reference.counts import equal_counts, histogram
from zokern.backends.reference.deltas import merge_deltas
from zokern.backends.reference.l1 import l1_sums
from zokern.backends.reference.merging import merge_step_
from zokern.backends.reference.noise import sample
from zokern.backends.reference.perturb import perturb_
from zokern.backends.reference.products import inner_products
from zokern.backends.reference.selection import select

__all__ = [
    "equal_counts",
    "histogram",
    "inner_products",
    "l1_sums",
    "merge_deltas",
    "merge_step_",
    "perturb_",
    "sample",
    "select",
    "why_not",
    "why_not_by_default",
]


def why_not(device: torch.device) -> str | None:
    return None


why_not_by_default = why_not
