"""The fused sweep, said plainly: θ ← s₁·θ + c₁·z₁, then the next direction, one rounding."""

import torch
from torch import Tensor

from zokern.backends.reference import storage
from zokern.backends.reference.arithmetic import fma
from zokern.backends.reference.noise import values_at
from zokern.sweep import Shard, Sweep


def elements_of(tensor: Tensor, shard: Shard, rows: Tensor | None = None) -> Tensor:
    """The index in the full tensor of each element of a tensor, row-major."""
    local = torch.arange(tensor.numel(), device=tensor.device)
    row, column = local // shard.row_length, local % shard.row_length
    if rows is not None:
        row = rows[row]
    return shard.offset + row * shard.row_stride + column


def perturb_(sweep: Sweep) -> None:
    for i, param in enumerate(sweep.params):
        if param.numel() > 0:
            _perturb_tensor(sweep, i)


def _perturb_tensor(sweep: Sweep, i: int) -> None:
    param, residual = sweep.params[i], sweep.residuals[i]
    master = None if sweep.masters is None else sweep.masters[i]
    elements = elements_of(param, sweep.shards[i], sweep.rows[i])
    directions = range(len(sweep.draws))

    def number(x: float) -> Tensor:
        return torch.tensor(x, dtype=torch.float32, device=param.device)

    def noise(law: str, draw: int) -> Tensor:
        key = {"seed": sweep.seed, "tensor_id": sweep.tensor_ids[i]}
        return values_at(law, elements, draw=draw, **key)

    def direction(k: int) -> Tensor:
        if sweep.draws[k] < 0:
            return sweep.dense[~sweep.draws[k]][i].flatten().float()
        return noise(sweep.law, sweep.draws[k])

    def moved(value: Tensor, k: int, z: Tensor) -> Tensor:
        if sweep.scales[i][k] != 1:
            value = value * number(sweep.scales[i][k])
        return fma(number(sweep.coeffs[i][k]), z, value)

    value = (storage.load(param, residual) if master is None else master).flatten()
    update = sweep.update
    if update is not None:
        u = torch.zeros_like(value)
        if update.momenta is not None:
            u = update.momenta[i].flatten() * number(update.decays[i])
    for k in directions[: sweep.rest]:
        z = direction(k)
        value = moved(value, k, z)
        if update is not None:
            u = fma(number(update.gradient[i][k]), z, u)
    if update is not None:
        if update.momenta is not None:
            update.momenta[i].copy_(u.view(param.shape))
        if update.sign:
            u = (u > 0).float() - (u < 0).float()
        value = fma(number(update.steps[i]), u, value)
    if master is not None and sweep.rest > 0:
        master.copy_(value.view(param.shape))
    for k in directions[sweep.rest :]:
        value = moved(value, k, direction(k))
    if sweep.outs is not None:
        param, residual = sweep.outs[i], None
    if sweep.rounding is not None:
        bits = noise("rounding16", sweep.rounding)
        value = storage.round_by(bits, value, param.dtype, residual is not None)
    storage.store(value.view(param.shape), param, residual)
