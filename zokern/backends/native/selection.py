"""Selection by magnitude, by the native core."""

import torch
from torch import Tensor

import zokern._C as _C
from zokern.backends.native.capability import cpu_capability
from zokern.backends.native.values import pack_values
from zokern.merging import Selection


def select(selection: Selection) -> tuple[Tensor, Tensor, Tensor]:
    packed = pack_values(selection.values)
    device = packed.device
    thresholds = torch.empty(packed.count, device=device, dtype=torch.float32)
    cuts = torch.empty(packed.count, device=device, dtype=torch.int64)
    largest = torch.zeros_like(thresholds)
    native = _C.Selection(values=packed.values, k=selection.k, joined=selection.joined)
    addresses = thresholds.data_ptr(), cuts.data_ptr(), largest.data_ptr()
    if device.type == "cpu":
        _C.cpu_select(native, *addresses, cpu_capability(), torch.get_num_threads())
    else:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream().cuda_stream
            size = _C.cuda_select_scratch(native, device.index)
            scratch = torch.zeros(size, device=device, dtype=torch.uint8)
            _C.cuda_select(native, *addresses, scratch.data_ptr(), device.index, stream)
    return thresholds, cuts, largest
