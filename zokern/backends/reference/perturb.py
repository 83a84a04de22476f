"""The fused sweep, said plainly: θ ← s₁·θ + c₁·z₁, then the next direction, one rounding."""

import torch
from torch import Tensor

from zokern.backends.reference import storage
from zokern.backends.reference.arithmetic import fma
from zokern.backends.reference.noise import values_at
from zokern.sweep import Sweep


def elements_of(sweep: Sweep, i: int) -> Tensor:
    """The index in the full tensor of each element of operand i, row-major."""
    param, shard = sweep.params[i], sweep.shards[i]
    local = torch.arange(param.numel(), device=param.device)
    row, column = local // shard.row_length, local % shard.row_length
    return shard.offset + row * shard.row_stride + column


def perturb_(sweep: Sweep) -> None:
    for i, (param, residual) in enumerate(zip(sweep.params, sweep.residuals, strict=True)):
        if param.numel() == 0:
            continue
        elements = elements_of(sweep, i)
        value = storage.load(param, residual).flatten()
        for draw, coeff, scale in zip(sweep.draws, sweep.coeffs[i], sweep.scales[i], strict=True):
            if scale != 1:
                value = value * torch.tensor(scale, dtype=torch.float32, device=value.device)
            z = values_at(
                sweep.law, elements, seed=sweep.seed, draw=draw, tensor_id=sweep.tensor_ids[i]
            )
            value = fma(torch.tensor(coeff, dtype=torch.float32, device=value.device), z, value)
        storage.store(value.view(param.shape), param, residual)
