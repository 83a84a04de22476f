"""Where torch.compile and the hooks of layerwise evaluation meet."""

import sys

import torch
from torch import nn

REFUSED = (
    "layerwise=True evaluates through hooks, which a compiled function around the model cannot "
    "trace: give the model compiled, module=torch.compile(model), compile its layers alone, or "
    "take layerwise=False"
)


def is_compiled(module: nn.Module) -> bool:
    """Whether its forward runs as one compiled whole."""
    # Whoever has compiled something has imported this, which takes its time.
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return False
    if isinstance(module, dynamo.OptimizedModule):
        return True
    forward = module.forward
    return getattr(module, "_compiled_call_impl", None) is not None or (
        hasattr(forward, "_torchdynamo_orig_callable")
        and not getattr(forward, "_torchdynamo_disable", False)
    )


def check_not_compiling() -> None:
    """Raises RuntimeError where the caller is being traced by torch.compile."""
    if torch.compiler.is_dynamo_compiling():
        _refuse()


def _refuse() -> None:
    raise RuntimeError(REFUSED)


# Dynamo calls what it is told not to trace, so that the error arrives as it is. What tells it so is
# set by hand: torch.compiler.disable would import all of Dynamo.
_refuse._torchdynamo_disable = True  # type: ignore[attr-defined]
_refuse._torchdynamo_disable_msg = REFUSED  # type: ignore[attr-defined]
