"""A merge of several models over a base, by the native core."""

import torch

import zokern._C as _C
from zokern.backends.native.capability import cpu_capability
from zokern.backends.native.perturb import address
from zokern.deltas import COMBINE, VOTES, DeltaMerge, contiguous


def merge_deltas(merge: DeltaMerge) -> None:
    device = merge.outs[0].device
    rows = contiguous(merge)
    if device.type == "cpu":
        _C.cpu_merge_deltas(pack(rows), cpu_capability(), torch.get_num_threads())
    else:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream().cuda_stream
            _C.cuda_merge_deltas(pack(rows), device.index, stream)


def pack(merge: DeltaMerge) -> _C.DeltaMerge:
    """The same merge for the native core; every operand must be contiguous.

    It points to the operands, which must outlive it.
    """
    return _C.DeltaMerge(
        outs=[address(out) for out in merge.outs],
        bases=[address(base) for base in merge.bases or []],
        models=[[address(tensor) for tensor in model] for model in merge.models],
        numels=[out.numel() for out in merge.outs],
        tensor_ids=merge.tensor_ids,
        weights=merge.weights,
        ratios=_pointer(merge.ratios),
        thresholds=_pointer(merge.thresholds),
        cuts=_pointer(merge.cuts),
        limits=merge.limits,
        draws=merge.draws,
        seed=merge.seed,
        rounded=merge.rounded,
        votes=VOTES.index(merge.votes),
        zero_up=merge.zero_up,
        combine=COMBINE.index(merge.combine),
        divisor=merge.divisor,
        scale=merge.scale,
    )


def _pointer(numbers: torch.Tensor | None) -> int:
    return 0 if numbers is None else numbers.data_ptr()
