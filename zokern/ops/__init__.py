"""The operations: each a torch.library schema, its checks and its fake, and the door to it.

A door (``perturb_``) takes what users write and brings it into the flat form of the schema; the
checks run inside the operator itself, so ``torch.ops.zokern.perturb_`` is as safe as the door.
Nothing is written before every operand has passed.
"""

from zokern.ops.deltas import merge_deltas
from zokern.ops.magnitudes import adam_threshold, difference_threshold, l1_sums
from zokern.ops.noise import noise_sample
from zokern.ops.parts import (
    adam_threshold_of_parts,
    check_alike,
    l1_sums_of_parts,
    magnitude_threshold,
    threshold_of_parts,
)
from zokern.ops.products import inner_products
from zokern.ops.steps import check_merge_step, merge_step_
from zokern.ops.storage import stored_value
from zokern.ops.sweeper import Sweeper, forms_of
from zokern.ops.sweeps import SweepNumbers, perturb_, read_numbers
from zokern.sweep import Update

__all__ = [
    "SweepNumbers",
    "Sweeper",
    "Update",
    "adam_threshold",
    "adam_threshold_of_parts",
    "check_alike",
    "check_merge_step",
    "difference_threshold",
    "forms_of",
    "inner_products",
    "l1_sums",
    "l1_sums_of_parts",
    "magnitude_threshold",
    "merge_deltas",
    "merge_step_",
    "noise_sample",
    "perturb_",
    "read_numbers",
    "stored_value",
    "threshold_of_parts",
]
