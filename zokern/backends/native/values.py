"""The values whose magnitudes are looked at, and masks, for the native core.

Both are packed together with the tensors that they point to, which must outlive them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import zokern._C as _C
from zokern.backends.native.perturb import address
from zokern.merging import AdamSteps, Differences, Mask, Values


@dataclass(frozen=True)
class PackedValues:
    values: _C.Values
    operands: list[Tensor]
    count: int
    device: torch.device


@dataclass(frozen=True)
class PackedMasks:
    masks: _C.Masks
    operands: list[Tensor]


def pack_values(values: Values) -> PackedValues:
    if isinstance(values, Differences):
        return _pack_differences(values)
    return _pack_steps(values)


def _pack_differences(values: Differences) -> PackedValues:
    tensors = _contiguous(values.tensors)
    bases = _contiguous(values.bases or [])
    packed = _C.Values(
        tensors=[address(tensor) for tensor in tensors],
        numels=[tensor.numel() for tensor in tensors],
        bases=[address(base) for base in bases],
        rounded=values.rounded,
        exp_avgs=[],
        exp_avg_sqs=[],
        cached=[],
        numbers=0,
        merges=0,
    )
    return PackedValues(packed, [*tensors, *bases], len(tensors), tensors[0].device)


def _pack_steps(steps: AdamSteps) -> PackedValues:
    device = steps.grads[0].device
    grads, exp_avgs = _contiguous(steps.grads), _contiguous(steps.exp_avgs)
    exp_avg_sqs, cached = _contiguous(steps.exp_avg_sqs), _contiguous(steps.cached or [])
    tables = [
        table.to(device, non_blocking=True).contiguous() for table in (steps.numbers, steps.merges)
    ]
    packed = _C.Values(
        tensors=[address(grad) for grad in grads],
        numels=[grad.numel() for grad in grads],
        bases=[],
        rounded=False,
        exp_avgs=[address(exp_avg) for exp_avg in exp_avgs],
        exp_avg_sqs=[address(exp_avg_sq) for exp_avg_sq in exp_avg_sqs],
        cached=[tensor.data_ptr() for tensor in cached],
        numbers=tables[0].data_ptr(),
        merges=tables[1].data_ptr(),
    )
    operands = [*grads, *exp_avgs, *exp_avg_sqs, *cached, *tables]
    return PackedValues(packed, operands, len(grads), device)


def pack_masks(mask: Mask, device: torch.device) -> PackedMasks:
    def on_device(table: Tensor | None) -> list[Tensor]:
        return [] if table is None else [table.to(device, non_blocking=True).contiguous()]

    thresholds, cuts = on_device(mask.thresholds), on_device(mask.cuts)
    draws, limits = on_device(mask.draws), on_device(mask.limits)
    packed = _C.Masks(
        thresholds=_address(thresholds),
        cuts=_address(cuts),
        draws=_address(draws),
        limits=_address(limits),
        offsets=[shard.offset for shard in mask.shards],
        row_lengths=[shard.row_length for shard in mask.shards],
        row_strides=[shard.row_stride for shard in mask.shards],
        tensor_ids=mask.tensor_ids,
        seed=mask.seed,
    )
    return PackedMasks(packed, [*thresholds, *cuts, *draws, *limits])


def _address(table: list[Tensor]) -> int:
    return table[0].data_ptr() if table else 0


def _contiguous(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]
