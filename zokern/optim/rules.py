"""How an estimated gradient ĝ is applied: SGD, momentum, sign, for any way of choosing directions.

A rule is the arithmetic of one parameter group for one step::

    m ← decay·m + inflow·ĝ
    θ ← scale·θ + direct·ĝ + step·(m, or the sign of m)
"""

import struct
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """Coefficients of an update; without a buffer m begins at 0 each time."""

    scale: float = 1.0
    direct: float = 0.0
    decay: float = 0.0
    inflow: float = 0.0
    step: float = 0.0

    @property
    def is_direct(self) -> bool:
        """Whether ĝ is all that moves the weights: then the update is only a displacement."""
        return self.inflow == 0.0


def rule_of(group: dict[str, Any], *, sign: bool) -> Rule:
    """θ ← (1 - lr·wd)·θ - lr·d with d = ĝ, or with momentum μ d = m ← μ·m + ĝ; sign takes sign(d).

    lr is rounded to float32, as a trajectory records it.
    """
    lr = float32(float(group["lr"]))
    scale = 1.0 - lr * group["weight_decay"]
    step = lr if group["maximize"] else -lr
    if group["momentum"] == 0.0 and not sign:
        return Rule(scale, direct=step)
    return Rule(scale, decay=float(group["momentum"]), inflow=1.0, step=step)


def float32(x: float) -> float:
    """The nearest float32; beyond its range infinity."""
    try:
        return struct.unpack("f", struct.pack("f", x))[0]
    except OverflowError:
        return float("inf") if x > 0 else float("-inf")
