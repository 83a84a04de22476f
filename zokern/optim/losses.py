"""What counts as a loss, and losses that look wrong."""

from numbers import Real

import torch
from torch import Tensor

Loss = float | Tensor


def as_float(loss: Loss) -> float:
    """A loss as a number; TypeError for what is no scalar or in half precision."""
    if isinstance(loss, Tensor):
        if loss.numel() != 1 or loss.is_complex():
            raise TypeError(
                "the closure must return a scalar loss, not a tensor of shape "
                f"{tuple(loss.shape)} and {loss.dtype}"
            )
        if loss.dtype in (torch.float16, torch.bfloat16):
            raise TypeError(
                f"the loss is {loss.dtype}, which rounds the difference of two losses away: "
                "compute it in float32, for example cross_entropy(logits.float(), labels)"
            )
        return float(loss.detach())
    if not isinstance(loss, Real) or type(loss).__name__ == "float16":
        raise TypeError(f"the closure must return a float32 scalar loss, not {type(loss).__name__}")
    return float(loss)


class EqualLosses:
    """Watches for steps whose losses are all equal bit for bit."""

    # After so many such steps running, something must be wrong.
    STEPS = 3
    WARNING = (
        f"the losses of {STEPS} steps running are equal bit for bit, so nothing is learned: the "
        "loss may not depend on these parameters, be rounded to half precision on its way or see "
        "a cached copy of the weights, or eps may be too small"
    )

    def __init__(self) -> None:
        self._steps = 0

    def seen(self, losses: list[float]) -> bool:
        """Count a step; whether it is the one to warn after."""
        equal = len(losses) > 1 and all(loss == losses[0] for loss in losses)
        self._steps = self._steps + 1 if equal else 0
        return self._steps == self.STEPS
