"""The kernels in Triton: for NVIDIA, AMD and Intel GPUs, and for tests under its interpreter.

Triton is imported when it is first asked for: the package works without it.
"""

import torch
from torch import Tensor

from zokern.backends.reference.counts import equal_counts, histogram
from zokern.deltas import DeltaMerge
from zokern.merging import L1Sums, MergeStep, Selection
from zokern.sweep import InnerProducts, Sweep

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
    try:
        from zokern.backends.triton import launch
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    return launch.why_not(device.type)


def why_not_by_default(device: torch.device) -> str | None:
    if device.type == "cpu":
        return "on a CPU it runs only under Triton's interpreter, which is for tests"
    return why_not(device)


def perturb_(sweep: Sweep) -> None:
    from zokern.backends.triton import perturb, update

    (perturb if sweep.is_plain else update).perturb_(sweep)


def merge_step_(step: MergeStep) -> None:
    from zokern.backends.triton import merging

    merging.merge_step_(step)


def inner_products(products: InnerProducts) -> Tensor:
    # Importing a module named inner_products would put it in this function's place.
    from zokern.backends.triton import products as kernels

    return kernels.inner_products(products)


def merge_deltas(merge: DeltaMerge) -> None:
    from zokern.backends.triton import deltas

    deltas.merge_deltas(merge)


def sample(
    law: str,
    numel: int,
    *,
    seed: int,
    draw: int,
    tensor_id: int,
    offset: int,
    device: torch.device,
) -> Tensor:
    from zokern.backends.triton import noise

    return noise.sample(
        law, numel, seed=seed, draw=draw, tensor_id=tensor_id, offset=offset, device=device
    )


def select(selection: Selection) -> tuple[Tensor, Tensor, Tensor]:
    from zokern.backends.triton import selection as kernels

    return kernels.select(selection)


def l1_sums(sums: L1Sums) -> Tensor:
    from zokern.backends.triton import l1

    return l1.l1_sums(sums)
