"""Comparison of tensors bit for bit."""

import torch
from torch import Tensor

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits; NaN equals NaN, whatever its payload."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    integers = INTEGERS[a.element_size()]
    equal = a.contiguous().view(integers) == b.contiguous().view(integers)
    return bool((equal | (a.isnan() & b.isnan())).all())
