"""Inner products of tensors with noise, each exact but for one rounding."""

import math

import torch
from torch import Tensor

from zokern.backends.reference.noise import values_at
from zokern.backends.reference.perturb import elements_of
from zokern.sweep import InnerProducts


def _exact_dot(a: Tensor, b: Tensor) -> float:
    # The product of two float32 is exact in float64, and fsum rounds once.
    return math.fsum((a.double() * b.double()).tolist())


def inner_products(products: InnerProducts) -> Tensor:
    rows = []
    for vector, shard, tensor_id in zip(
        products.vectors, products.shards, products.tensor_ids, strict=True
    ):
        if vector.numel() == 0:
            rows.append([0.0, 0.0, 0.0])
            continue
        v = vector.float().flatten()
        elements = elements_of(vector, shard)
        z = values_at(
            products.law, elements, seed=products.seed, draw=products.draw, tensor_id=tensor_id
        )
        rows.append([_exact_dot(v, v), _exact_dot(v, z), _exact_dot(z, z)])
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)
