"""Where torch.compile meets steps, and the hooks of layerwise evaluation."""

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

Step = TypeVar("Step", bound=Callable[..., Any])

REFUSED = (
    "layerwise=True evaluates through hooks, which a compiled function around the model cannot "
    "trace: give the model compiled, module=torch.compile(model), compile its layers alone, or "
    "take layerwise=False"
)

UNTRACED = (
    "a step of zokern is a few fused sweeps, with Python between them that a trace would freeze: "
    "compile the model, torch.compile(model), and call step as it is, or compile without fullgraph"
)


def untraced(step: Step) -> Step:
    """The step of an optimizer, which compiled functions call as it is, at a break of the graph.

    What is compiled in its closure stays compiled.
    """
    disabled = None

    @functools.wraps(step)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if disabled is None:
            # Not before: it imports all of Dynamo, as the constructors of torch's optimizers do.
            disabled = torch.compiler.disable(step, reason=UNTRACED)
        return disabled(*args, **kwargs)

    _disable(call, UNTRACED)
    return call  # type: ignore[return-value]


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


def _disable(function: Any, reason: str) -> None:
    """Have Dynamo call a function instead of tracing into it.

    By hand: torch.compiler.disable would import all of Dynamo.
    """
    function._torchdynamo_disable = True
    function._torchdynamo_disable_msg = reason


# So that the error arrives as it is.
_disable(_refuse, REFUSED)
