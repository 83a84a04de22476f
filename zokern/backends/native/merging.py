"""A merging optimizer's step, by the native core."""

import torch
from torch import Tensor

import zokern._C as _C
from zokern.backends.native.capability import cpu_capability
from zokern.backends.native.perturb import STORAGES, address
from zokern.merging import METHODS, AdamSteps, Mask, MergeStep, SparseTau, row_major


def merge_step_(step: MergeStep) -> None:
    device = step.params[0].device
    with row_major(step) as rows:
        tables = Tables(device)
        if device.type == "cpu":
            _C.cpu_merge_step(pack(rows, tables), cpu_capability(), torch.get_num_threads())
        else:
            with torch.cuda.device(device):
                stream = torch.cuda.current_stream().cuda_stream
                _C.cuda_merge_step(pack(rows, tables), device.index, stream)


class Tables:
    """Puts what has a row for each tensor where the kernels read it, and keeps it there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: list[Tensor] = []

    def rows(self, table: Tensor | None, count: int) -> list[int]:
        """The address of each tensor's row; 0 where there is no table."""
        if table is None:
            return [0] * count
        here = table.to(self._device, non_blocking=True).contiguous()
        self._kept.append(here)
        size = here[0].numel() * here.element_size()
        return [here.data_ptr() + i * size for i in range(count)]


def pack(step: MergeStep, tables: Tables) -> _C.MergeStep:
    """The same step for the native core; every operand must be contiguous and outlive it."""
    adams = pack_adams(step.steps, tables)
    masks = pack_masks(step.mask, tables)
    taus = pack_taus(step)
    tensors = [
        _C.MergeTensor(
            param.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            0 if step.masters is None else step.masters[i].data_ptr(),
            param.numel(),
            STORAGES[param.dtype, None if residual is None else residual.dtype],
            adams[i],
            masks[i],
            taus[i],
        )
        for i, (param, residual) in enumerate(zip(step.params, step.residuals, strict=True))
    ]
    return _C.MergeStep(tensors, METHODS.index(step.method), step.mask.seed)


def pack_adams(steps: AdamSteps, tables: Tables) -> list[_C.AdamTensor]:
    count = len(steps.grads)
    numbers, merges = tables.rows(steps.numbers, count), tables.rows(steps.merges, count)
    return [
        _C.AdamTensor(
            address(steps.grads[i]),
            address(steps.exp_avgs[i]),
            address(steps.exp_avg_sqs[i]),
            0 if steps.cached is None else steps.cached[i].data_ptr(),
            numbers[i],
            merges[i],
        )
        for i in range(count)
    ]


def pack_masks(mask: Mask, tables: Tables) -> list[_C.MaskTensor]:
    count = len(mask.tensor_ids)
    columns = [
        tables.rows(table, count) for table in (mask.thresholds, mask.cuts, mask.draws, mask.limits)
    ]
    return [
        _C.MaskTensor(tuple(entries), tuple(shard), tensor_id)
        for *entries, shard, tensor_id in zip(*columns, mask.shards, mask.tensor_ids, strict=True)
    ]


def pack_taus(step: MergeStep) -> list[_C.TauTensor]:
    if step.taus is None:
        return [_C.TauTensor((0, 0), 0, 0)] * len(step.params)
    return [
        _C.TauTensor(address(tau.values), tau.starts.data_ptr(), tau.places.data_ptr())
        if isinstance(tau, SparseTau)
        else _C.TauTensor(address(tau), 0, 0)
        for tau in step.taus
    ]
