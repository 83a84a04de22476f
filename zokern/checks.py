"""What an operand must be to be swept in place. Each error names the operand and the reason."""

import itertools

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zokern.laws import LAWS
from zokern.sweep import Shard, Sweep

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Which residuals each parameter dtype can have.
RESIDUAL_DTYPES = {
    torch.float32: (),
    torch.bfloat16: (torch.int16, torch.int8),
    torch.float16: (torch.float16,),
}


def check_operand(sweep: Sweep, i: int) -> None:
    """Raises TypeError or ValueError, naming the operand, if it cannot be swept in place."""
    param, residual = sweep.params[i], sweep.residuals[i]
    try:
        _check_strided(param)
        if param.dtype not in PARAM_DTYPES:
            raise TypeError("its dtype must be float32, bfloat16 or float16")
        if param.device != sweep.params[0].device:
            raise ValueError(f"it is on {param.device}, params[0] on {sweep.params[0].device}")
        _check_shard(param, sweep.shards[i], sweep.law)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{_describe('params', i, param)}: {error}") from None
    if residual is None:
        return
    try:
        _check_strided(residual)
        _check_residual(param, residual)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{_describe('residuals', i, residual)}: {error}") from None


def _check_strided(tensor: Tensor) -> None:
    if is_traceable_wrapper_subclass(tensor):
        kind = type(tensor).__name__
        raise TypeError(f"it is a {kind}: give the local tensor that it wraps, with shards=")
    if tensor.layout != torch.strided:
        raise TypeError(f"its layout is {tensor.layout}: only strided tensors are swept")
    if not is_dense(tensor):
        raise ValueError(
            f"its strides {tensor.stride()} leave holes or overlapping elements: a sweep in place "
            "needs dense memory (a permuted or channels_last tensor is fine); sweep the tensor "
            "that it is a view of, or a copy"
        )


def _check_shard(param: Tensor, shard: Shard, law: str) -> None:
    numel = param.numel()
    if numel == 0:
        return
    fills = shard.row_length > 0 and numel % shard.row_length == 0
    rows = numel // shard.row_length if fills else 0
    if not fills or shard.offset < 0 or (rows > 1 and shard.row_stride < shard.row_length):
        raise ValueError(
            f"{shard} does not describe its {numel} elements: rows of row_length must fill the "
            "tensor, row_stride be at least row_length, offset not negative"
        )
    check_elements(shard.offset + (rows - 1) * shard.row_stride + shard.row_length, law)


def _check_residual(param: Tensor, residual: Tensor) -> None:
    wanted = RESIDUAL_DTYPES[param.dtype]
    if residual.dtype not in wanted:
        which = " or ".join(str(dtype) for dtype in wanted) or "no residual"
        raise TypeError(f"a {param.dtype} parameter takes {which} beside it")
    if residual.shape != param.shape or residual.device != param.device:
        raise ValueError(
            f"it must have the shape {tuple(param.shape)} and the device {param.device} of its "
            "parameter"
        )
    if _significant_strides(residual) != _significant_strides(param):
        raise ValueError(
            f"its strides {residual.stride()} must be those of its parameter, {param.stride()}: "
            "make it with torch.empty_like or zeros_like"
        )


def check_memory(sweep: Sweep) -> None:
    """No two operands may share memory: the sweep would move the shared elements twice."""
    spans = []
    for kind, tensors in (("params", sweep.params), ("residuals", sweep.residuals)):
        for i, tensor in enumerate(tensors):
            if tensor is not None and tensor.numel() > 0:
                start = tensor.data_ptr()
                end = start + tensor.numel() * tensor.element_size()
                spans.append((start, end, f"{kind}[{i}]"))
    spans.sort()
    for (_, end, first), (start, _, second) in itertools.pairwise(spans):
        if start < end:
            raise ValueError(
                f"{first} and {second} share memory: give a tensor once (tied weights too)"
            )


def _significant_strides(tensor: Tensor) -> list[int]:
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor's elements fill a range of memory, each place once, in some order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    sized = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted((stride, size) for stride, size in sized if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def check_elements(end: int, law: str) -> None:
    """Raises ValueError if a law cannot count all elements below ``end``."""
    limit = LAWS[law].max_elements
    if end > limit:
        raise ValueError(f"it reaches element {end - 1}; {law} counts elements below {limit}")


def _describe(argument: str, i: int, tensor: Tensor) -> str:
    return f"{argument}[{i}] (shape {tuple(tensor.shape)}, {tensor.dtype})"
