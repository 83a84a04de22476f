"""Sums of magnitudes, by the native core."""

import torch
from torch import Tensor

import zokern._C as _C
from zokern.backends.native.capability import cpu_capability
from zokern.backends.native.values import pack_masks, pack_values
from zokern.merging import L1Sums


def l1_sums(sums: L1Sums) -> Tensor:
    packed = pack_values(sums.values)
    masks = pack_masks(sums.mask, packed.device)
    native = _C.L1Sums(values=packed.values, masks=masks.masks)
    device = packed.device
    out = torch.empty(packed.count, 2, device=device, dtype=torch.float64)
    if device.type == "cpu":
        _C.cpu_l1_sums(native, out.data_ptr(), cpu_capability(), torch.get_num_threads())
    else:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream().cuda_stream
            scratch = torch.empty(_C.l1_scratch(native), device=device, dtype=torch.uint8)
            _C.cuda_l1_sums(native, out.data_ptr(), scratch.data_ptr(), device.index, stream)
    return out
