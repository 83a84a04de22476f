"""How an optimizer keeps its parameters' values: the bytes that each precision adds."""

import logging

import torch
from torch import Tensor

PRECISIONS = ("auto", "inplace", "split8", "split")

logger = logging.getLogger("zokern")


def resolve(precision: str, dtype: torch.dtype) -> str:
    """The storage of a parameter of this dtype, under an optimizer's ``precision``.

    float32 parameters are always swept in place. ``auto`` is ``split`` for half precision.
    """
    if dtype == torch.float32 or precision == "inplace":
        return "inplace"
    if precision == "split8" and dtype != torch.bfloat16:
        raise ValueError(
            f"precision='split8' is for bfloat16 parameters, not {dtype}; take 'split'"
        )
    return "split" if precision == "auto" else precision


def new_residual(param: Tensor, storage: str) -> Tensor | None:
    """The residual of a parameter whose value is, so far, exactly the parameter."""
    if storage == "inplace":
        return None
    if param.dtype == torch.float16:
        return torch.zeros_like(param)
    return torch.zeros_like(param, dtype=torch.int8 if storage == "split8" else torch.int16)


def log_memory(owner: str, precision: str, params: list[Tensor], residuals: list[Tensor]) -> None:
    """One line that says what the choice of precision costs."""
    numel = sum(param.numel() for param in params)
    extra = sum(residual.numel() * residual.element_size() for residual in residuals)
    per_param = extra / numel if numel else 0.0
    logger.info(
        "%s: precision=%r adds %.2f bytes per parameter (%.1f MB for %d parameters)",
        *(owner, precision, per_param, extra / 1e6, numel),
    )
