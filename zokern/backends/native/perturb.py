"""The fused sweep, by the native core."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

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
    if sweep.is_packed:
        _run(sweep)
        return
    with row_major(sweep) as contiguous:
        _run(contiguous)


def _run(contiguous: Sweep) -> None:
    _launcher(contiguous.params[0].device)(pack(contiguous))


def _launcher(device: torch.device) -> Callable[[_C.Sweep], None]:
    if device.type == "cpu":
        capability = cpu_capability()
        return lambda packed: _C.cpu_sweep(packed, capability, torch.get_num_threads())

    def launch(packed: _C.Sweep) -> None:
        with torch.cuda.device(device):
            _C.cuda_sweep(packed, device.index, torch.cuda.current_stream().cuda_stream)

    return launch


def prepare(sweep: Sweep) -> Callable[[list[Tensor], Any], None]:
    packed, launch = pack(sweep), _launcher(sweep.params[0].device)

    def run_again(outs: list[Tensor], numbers: Any) -> None:
        coeffs = numbers.coeffs[0]
        scales = numbers.scales[0] if numbers.scales else [1.0] * len(coeffs)
        packed.renumber(_first_address(outs), numbers.seed, numbers.draws, coeffs, scales)
        launch(packed)

    return run_again


def pack(sweep: Sweep) -> _C.Sweep:
    """The same sweep for the native core; every operand must be contiguous.

    It points to the operands, which must outlive it.
    """
    kept = {} if sweep.kept is None else sweep.kept
    if "native" not in kept:
        kept["native"] = _pack_tensors(sweep)
    update = sweep.update
    momenta = None if update is None else update.momenta
    row_of, numbers = _distinct_rows(
        sweep.coeffs, sweep.scales, *([] if update is None else [update.gradient])
    )
    return _C.Sweep(
        tensors=kept["native"],
        outs=_first_address(sweep.outs or []),
        momenta=[m.data_ptr() for m in momenta or []],
        coeff_rows=row_of,
        decays=[] if update is None else update.decays,
        steps=[] if update is None else update.steps,
        law=LAWS[sweep.law].code,
        seed=sweep.seed,
        draws=sweep.draws,
        coeffs=numbers[0],
        scales=numbers[1],
        rest=sweep.rest,
        sign=update is not None and update.sign,
        gradient=[] if update is None else numbers[2],
        rounding=-1 if sweep.rounding is None else sweep.rounding,
        plain=sweep.is_plain,
    )


def _pack_tensors(sweep: Sweep) -> _C.SweepTensors:
    first = _first_address(sweep.outs or [])
    return _C.SweepTensors(
        params=[p.data_ptr() for p in sweep.params],
        residuals=[0 if r is None else r.data_ptr() for r in sweep.residuals],
        masters=[m.data_ptr() for m in sweep.masters or []],
        # Relative to the first, which may lie elsewhere the next time.
        outs=[out.data_ptr() - first for out in sweep.outs or []],
        dense=[[address(vector) for vector in vectors] for vectors in sweep.dense],
        numels=[p.numel() for p in sweep.params],
        offsets=[s.offset for s in sweep.shards],
        row_lengths=[s.row_length for s in sweep.shards],
        row_strides=[s.row_stride for s in sweep.shards],
        rows=[0 if r is None else r.data_ptr() for r in sweep.rows],
        tensor_ids=sweep.tensor_ids,
        storages=[
            STORAGES[p.dtype, None if r is None else r.dtype]
            for p, r in zip(sweep.params, sweep.residuals, strict=True)
        ],
    )


def _first_address(tensors: Sequence[Tensor]) -> int:
    # Tensors without elements have none.
    return next((address for tensor in tensors if (address := tensor.data_ptr())), 0)


def _distinct_rows(
    *columns: Sequence[Sequence[float]],
) -> tuple[list[int], list[list[float]]]:
    """Which row is each tensor's, and of each column the distinct rows, one after another."""
    if all(row is column[0] for column in columns for row in column):
        return [0] * len(columns[0]), [list(column[0]) for column in columns]
    by_identity: dict[tuple[int, ...], int] = {}
    by_value: dict[tuple[float, ...], int] = {}
    flat: list[list[float]] = [[] for _ in columns]
    row_of = []
    for own in zip(*columns, strict=True):
        identity = tuple(map(id, own))
        if identity not in by_identity:
            value = tuple(chain(*own))
            if value not in by_value:
                by_value[value] = len(by_value)
                for column, row in zip(flat, own, strict=True):
                    column += row
            by_identity[identity] = by_value[value]
        row_of.append(by_identity[identity])
    return row_of, flat


def address(vector: Tensor) -> tuple[int, int]:
    """Where a dense direction lies, and of what type it is."""
    return vector.data_ptr(), STORAGES[vector.dtype, None]
