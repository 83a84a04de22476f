"""Sums of magnitudes, each exact but for its rounding to float64."""

import math

import torch
from torch import Tensor

from zokern.backends.reference.values import kept, values_of
from zokern.merging import L1Sums, tensors_of


def l1_sums(sums: L1Sums) -> Tensor:
    rows = []
    tensors = tensors_of(sums.values)
    for i, tensor in enumerate(tensors):
        value = values_of(sums.values, i)
        mask = kept(sums.mask, i, value, tensor)
        rows.append([_sum(value), _sum(value[mask])])
    return torch.tensor(rows, dtype=torch.float64, device=tensors[0].device)


def _sum(value: Tensor) -> float:
    return math.fsum(value.double().abs().tolist())
