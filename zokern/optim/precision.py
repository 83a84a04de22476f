"""How an optimizer keeps its parameters' values: the bytes that each precision adds."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zokern.optim.fsdp_copies import sharded_modules
from zokern.sharding import any_dtensor

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


@dataclass(frozen=True)
class Choice:
    """What an optimizer makes of ``precision``, ``layerwise`` and ``stochastic_rounding``."""

    precision: str
    layerwise: bool
    stochastic_rounding: bool

    def __str__(self) -> str:
        parts = [f"precision={self.precision!r}"]
        if self.layerwise:
            parts.append("layerwise (a buffer for one layer while it is evaluated)")
        if self.stochastic_rounding:
            parts.append("stochastic rounding")
        return ", ".join(parts)


def choose(
    precision: str,
    layerwise: bool | None,
    stochastic_rounding: bool | None,
    *,
    module: nn.Module | None,
    fuse_next: bool,
) -> Choice:
    """The defaults: for half precision the cheapest that neither loses nor drifts.

    Raises:
        ValueError: for what does not go together.
    """
    for name, given in (("layerwise", layerwise), ("stochastic_rounding", stochastic_rounding)):
        if given is not None and not isinstance(given, bool):
            raise ValueError(f"{name} must be True, False or None, not {given!r}")
    dtypes = () if module is None else {param.dtype for param in module.parameters()}
    sharded = module is not None and any_dtensor(module.parameters())
    halves = [dtype for dtype in dtypes if dtype in (torch.bfloat16, torch.float16)]
    if layerwise is None:
        layerwise = precision == "auto" and bool(halves) and not fuse_next and not sharded
    if layerwise and module is None:
        raise ValueError("layerwise=True needs module=, whose layers it evaluates one by one")
    if layerwise and sharded and module is not None and not sharded_modules(module):
        raise ValueError(
            "layerwise=True evaluates plain tensors and what FSDP2 (fully_shard) gathers, and the "
            "module has other DTensors: take layerwise=False, with precision='split8' or 'split' "
            "for half precision"
        )
    if layerwise and fuse_next:
        raise ValueError("layerwise=True leaves the weights at rest: fuse_next has nothing to fuse")
    if layerwise and precision == "master":
        raise ValueError(
            "with precision='master' evaluations leave the weights at rest already: layerwise=True "
            "is for inplace, split8 and split"
        )
    if precision == "auto" and layerwise:
        precision = "inplace"
    if stochastic_rounding is None:
        in_place = layerwise and precision == "inplace" and bool(halves)
        stochastic_rounding = in_place or precision == "split8"
    if stochastic_rounding and precision not in ("inplace", "split8"):
        raise ValueError(
            "stochastic_rounding=True is for precision 'inplace' and 'split8' in half precision; "
            f"{precision!r} loses nothing that it could keep"
        )
    return Choice(precision, bool(layerwise), bool(stochastic_rounding))


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


def log_memory(owner: str, how: str, params: list[Tensor], state: list[Tensor]) -> None:
    """One line that says what the choice of precision costs."""
    numel = sum(param.numel() for param in params)
    extra = sum(tensor.numel() * tensor.element_size() for tensor in state)
    per_param = extra / numel if numel else 0.0
    logger.info(
        "%s: %s adds %.2f bytes per parameter (%.1f MB for %d parameters)",
        *(owner, how, per_param, extra / 1e6, numel),
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal also where both are NaN."""
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.detach().view(bits), b.view(bits))
