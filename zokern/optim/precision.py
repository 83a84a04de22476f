"""How an optimizer keeps its parameters' values: the bytes that each precision adds."""

import logging

import torch
from torch import Tensor

PRECISIONS = ("auto", "inplace", "split8", "split", "master")

# Where in an optimizer's state a parameter's value goes on.
VALUE_KEYS = ("residual", "master")

logger = logging.getLogger("zokern")


def resolve(precision: str, dtype: torch.dtype) -> str:
    """The storage of a parameter of this dtype, under an optimizer's ``precision``.

    float32 parameters have no residuals: they are swept in place, or have a master like others.
    ``auto`` is ``split`` for half precision.
    """
    if precision == "master":
        return "master"
    if dtype == torch.float32 or precision == "inplace":
        return "inplace"
    if precision == "split8" and dtype != torch.bfloat16:
        raise ValueError(
            f"precision='split8' is for bfloat16 parameters, not {dtype}; take 'split'"
        )
    return "split" if precision == "auto" else precision


def new_value_state(param: Tensor, storage: str) -> dict[str, Tensor]:
    """What keeps the value beside a parameter that is, so far, exactly that value."""
    param = param.detach()
    if storage == "inplace":
        return {}
    if storage == "master":
        return {"master": param.to(torch.float32, copy=True)}
    if param.dtype == torch.float16:
        return {"residual": torch.zeros_like(param)}
    dtype = torch.int8 if storage == "split8" else torch.int16
    return {"residual": torch.zeros_like(param, dtype=dtype)}


def log_memory(owner: str, precision: str, params: list[Tensor], state: list[Tensor]) -> None:
    """One line that says what the choice of precision costs."""
    numel = sum(param.numel() for param in params)
    extra = sum(tensor.numel() * tensor.element_size() for tensor in state)
    per_param = extra / numel if numel else 0.0
    logger.info(
        "%s: precision=%r adds %.2f bytes per parameter (%.1f MB for %d parameters)",
        *(owner, precision, per_param, extra / 1e6, numel),
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal also where both are NaN."""
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.detach().view(bits), b.view(bits))
