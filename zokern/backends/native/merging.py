"""A merging optimizer's step, by the native core."""

from dataclasses import dataclass

import torch

import zokern._C as _C
from zokern.backends.native.capability import cpu_capability
from zokern.backends.native.perturb import STORAGES, address
from zokern.backends.native.values import PackedMasks, PackedValues, pack_masks, pack_values
from zokern.merging import METHODS, MergeStep, SparseTau, row_major


@dataclass(frozen=True)
class PackedStep:
    step: _C.MergeStep
    values: PackedValues
    masks: PackedMasks


def merge_step_(step: MergeStep) -> None:
    device = step.params[0].device
    with row_major(step) as rows:
        packed = pack(rows)
        if device.type == "cpu":
            _C.cpu_merge_step(packed.step, cpu_capability(), torch.get_num_threads())
        else:
            with torch.cuda.device(device):
                stream = torch.cuda.current_stream().cuda_stream
                _C.cuda_merge_step(packed.step, device.index, stream)


def pack(step: MergeStep) -> PackedStep:
    """The same step for the native core; every operand must be contiguous and outlive it."""
    values = pack_values(step.steps)
    masks = pack_masks(step.mask, values.device)
    count = len(step.params)
    masters = [0] * count if step.masters is None else [m.data_ptr() for m in step.masters]
    packed = _C.MergeStep(
        params=[param.data_ptr() for param in step.params],
        residuals=[0 if residual is None else residual.data_ptr() for residual in step.residuals],
        masters=masters,
        storages=[
            STORAGES[param.dtype, None if residual is None else residual.dtype]
            for param, residual in zip(step.params, step.residuals, strict=True)
        ],
        values=values.values,
        masks=masks.masks,
        taus=pack_taus(step),
        method=METHODS.index(step.method),
    )
    return PackedStep(packed, values, masks)


def pack_taus(step: MergeStep) -> list[_C.TauTensor]:
    if step.taus is None:
        return [_C.TauTensor((0, 0), 0, 0)] * len(step.params)
    return [
        _C.TauTensor(address(tau.values), tau.starts.data_ptr(), tau.places.data_ptr())
        if isinstance(tau, SparseTau)
        else _C.TauTensor(address(tau), 0, 0)
        for tau in step.taus
    ]
