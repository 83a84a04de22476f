"""The fused sweep, by the native core."""

import torch

import zokern._C as _C
from zokern.backends.native.capability import cpu_capability
from zokern.laws import LAWS
from zokern.sweep import Sweep, row_major

# (parameter, residual) → the enumerators of csrc/storage.h.
STORAGES = {
    (torch.float32, None): 0,
    (torch.bfloat16, None): 1,
    (torch.float16, None): 2,
    (torch.bfloat16, torch.int16): 3,
    (torch.bfloat16, torch.int8): 4,
    (torch.float16, torch.float16): 5,
}


def perturb_(sweep: Sweep) -> None:
    device = sweep.params[0].device
    with row_major(sweep) as rows:
        if device.type == "cpu":
            _C.cpu_sweep(pack(rows), cpu_capability(), torch.get_num_threads())
        else:
            with torch.cuda.device(device):
                stream = torch.cuda.current_stream().cuda_stream
                _C.cuda_sweep(pack(rows), device.index, stream)


def pack(sweep: Sweep) -> _C.Sweep:
    """The same sweep for the native core; every operand must be contiguous.

    It points to the operands, which must outlive it.
    """
    rows: dict[tuple, int] = {}
    row_of = []
    coeffs: list[float] = []
    scales: list[float] = []
    for coeff, scale in zip(sweep.coeffs, sweep.scales, strict=True):
        key = (*coeff, *scale)
        if key not in rows:
            rows[key] = len(rows)
            coeffs += coeff
            scales += scale
        row_of.append(rows[key])
    return _C.Sweep(
        params=[p.data_ptr() for p in sweep.params],
        residuals=[0 if r is None else r.data_ptr() for r in sweep.residuals],
        numels=[p.numel() for p in sweep.params],
        offsets=[s.offset for s in sweep.shards],
        row_lengths=[s.row_length for s in sweep.shards],
        row_strides=[s.row_stride for s in sweep.shards],
        tensor_ids=sweep.tensor_ids,
        storages=[
            STORAGES[p.dtype, None if r is None else r.dtype]
            for p, r in zip(sweep.params, sweep.residuals, strict=True)
        ],
        rows=row_of,
        law=LAWS[sweep.law].code,
        seed=sweep.seed,
        draws=sweep.draws,
        coeffs=coeffs,
        scales=scales,
    )
