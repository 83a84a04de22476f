"""IEEE-754 operations that torch does not offer, or not the same on every device."""

import torch
from torch import Tensor


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a·b + c in float32 with a single rounding, to nearest even.

    The product of two float32 is exact in float64. The float64 sum is rounded to odd (where it is
    inexact, its last bit is made 1), so that rounding it once more to float32 gives what a single
    rounding would have given.
    """
    product = a.double() * b.double()
    addend = c.double()
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    bits = total.view(torch.int64)
    away_from_zero = (error > 0) == (total > 0)
    odd = torch.where(away_from_zero, bits + 1, bits - 1)
    inexact = torch.isfinite(total) & (error != 0) & (bits & 1 == 0)
    return torch.where(inexact, odd, bits).view(torch.float64).float()


def sqrt(x: Tensor) -> Tensor:
    """The correctly rounded float32 square root (torch's own is off by an ulp on some inputs)."""
    return x.double().sqrt().float()
