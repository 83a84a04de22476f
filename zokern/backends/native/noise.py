"""Noise as tensors, by the native core."""

import torch
from torch import Tensor

import zokern._C as _C
from zokern.backends.native.capability import cpu_capability
from zokern.laws import LAWS


def sample(
    law: str,
    numel: int,
    *,
    seed: int,
    draw: int,
    tensor_id: int,
    offset: int,
    device: torch.device,
) -> Tensor:
    out = torch.empty(numel, dtype=LAWS[law].dtype, device=device)
    arguments = (LAWS[law].code, numel, seed, draw, tensor_id, offset, out.data_ptr())
    if device.type == "cpu":
        _C.cpu_sample(*arguments, cpu_capability(), torch.get_num_threads())
    else:
        with torch.cuda.device(out.device):
            stream = torch.cuda.current_stream().cuda_stream
            _C.cuda_sample(*arguments, out.device.index, stream)
    return out
