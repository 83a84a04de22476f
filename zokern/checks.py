"""What an operand must be to be swept in place. Each error names the operand and the reason."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zokern.deltas import DeltaMerge
from zokern.laws import LAWS
from zokern.merging import AdamNumbers, AdamSteps, Differences
from zokern.sweep import InnerProducts, Shard, Sweep

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Which residuals each parameter dtype can have.
RESIDUAL_DTYPES = {
    torch.float32: (),
    torch.bfloat16: (torch.int16, torch.int8),
    torch.float16: (torch.float16,),
}

# Parameters and residuals that values are rounded to stochastically.
ROUNDED_DTYPES = ((torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, torch.int8))

# Dense directions that a kernel takes.
MAX_DENSE = 2


def check_direction_law(law: str) -> None:
    directions = [name for name, entry in LAWS.items() if entry.is_direction]
    if law not in directions:
        raise ValueError(f"law {law!r} gives no directions; those that do: {', '.join(directions)}")


def check_operand(sweep: Sweep, i: int) -> None:
    """Raises TypeError or ValueError, naming the operand, if it cannot be swept in place."""
    param, residual = sweep.params[i], sweep.residuals[i]
    check_layout = check_strided if sweep.outs is None else check_plain
    argument, tensor = "params", param
    try:
        check_layout(param)
        check_dtype(param)
        if param.device != sweep.params[0].device:
            raise ValueError(f"it is on {param.device}, params[0] on {sweep.params[0].device}")
        rows = sweep.rows[i]
        check_shard(param, sweep.shards[i], sweep.law, picked=rows is not None)
        if sweep.rounding is not None:
            _check_rounding(sweep, i)
        if rows is not None:
            argument, tensor = "rows", rows
            _check_rows(param, rows, sweep.shards[i])
        if residual is not None:
            argument, tensor = "residuals", residual
            check_layout(residual)
            check_residual(param, residual)
        if sweep.masters is not None:
            argument, tensor = "masters", sweep.masters[i]
            if residual is not None:
                raise ValueError("a parameter has a master or a residual, not both")
            check_float32_beside(param, tensor)
        if sweep.outs is not None:
            argument, tensor = "outs", sweep.outs[i]
            _check_out(param, tensor)
        for j, vectors in enumerate(sweep.dense):
            argument, tensor = f"dense[{j}]", vectors[i]
            _check_dense(sweep, i, j)
    except (TypeError, ValueError) as error:
        raise named_error(error, argument, i, tensor) from None


def check_update(sweep: Sweep, i: int) -> None:
    """Raises TypeError or ValueError, naming it, if a momentum cannot take the sweep's update."""
    momenta = None if sweep.update is None else sweep.update.momenta
    if momenta is None:
        return
    try:
        check_float32_beside(sweep.params[i], momenta[i])
        after = sweep.draws[sweep.rest :]
        if any(momenta[i] is vectors[i] and ~j in after for j, vectors in enumerate(sweep.dense)):
            raise ValueError("a momentum that is updated can be a direction only before rest")
    except (TypeError, ValueError) as error:
        raise named_error(error, "momenta", i, momenta[i]) from None


def check_form(sweep: Sweep) -> None:
    """Raises ValueError if what a sweep does to all its tensors cannot be done."""
    if sweep.update is not None and sweep.rest == 0:
        raise ValueError("an update moves the place of rest: rest must be at least 1")
    if not 0 <= sweep.rest <= len(sweep.draws):
        raise ValueError(
            f"rest must be between 0 and the {len(sweep.draws)} directions, not {sweep.rest}"
        )
    if sweep.outs is not None and (sweep.masters is not None or sweep.update is not None):
        raise ValueError("a sweep into outs leaves all else alone: no masters and no update")
    if sweep.rounding is not None and sweep.masters is not None:
        raise ValueError("with masters nothing is rounded stochastically: rounding must be None")
    if len(sweep.dense) > MAX_DENSE:
        raise ValueError(f"a sweep takes {MAX_DENSE} dense directions, not {len(sweep.dense)}")


def check_vector(products: InnerProducts, i: int) -> None:
    """Raises TypeError or ValueError, naming the vector, if there are no products with it."""
    vector = products.vectors[i]
    try:
        check_plain(vector)
        check_dtype(vector)
        if vector.device != products.vectors[0].device:
            other = products.vectors[0].device
            raise ValueError(f"it is on {vector.device}, vectors[0] on {other}")
        check_shard(vector, products.shards[i], products.law)
    except (TypeError, ValueError) as error:
        raise named_error(error, "vectors", i, vector) from None


def check_delta_tensors(merge: DeltaMerge, i: int) -> None:
    """Raises TypeError or ValueError, naming the operand, if an output cannot be merged."""
    out, device = merge.outs[i], merge.outs[0].device
    operands = [("outs", out)]
    if merge.bases is not None:
        operands.append(("bases", merge.bases[i]))
    operands += [(f"models[{m}]", model[i]) for m, model in enumerate(merge.models)]
    for name, tensor in operands:
        try:
            check_plain(tensor)
            check_dtype(tensor)
            if tensor.shape != out.shape or tensor.device != device:
                raise ValueError(
                    f"it must have the shape {tuple(out.shape)} of its output and the device "
                    f"{device} of outs[0]; it is on {tensor.device}"
                )
            if tensor is out:
                if not out.is_contiguous():
                    raise ValueError(f"its strides are {out.stride()}: an output is contiguous")
                check_elements(out.numel(), "uniform32")
        except (TypeError, ValueError) as error:
            raise named_error(error, name, i, tensor) from None


def check_difference(values: Differences, i: int) -> None:
    """Raises TypeError or ValueError, naming the operand, if it has no values to select from."""
    argument, tensor = "tensors", values.tensors[i]
    try:
        _check_value(tensor, values.tensors[0])
        if values.bases is not None:
            argument, tensor = "bases", values.bases[i]
            _check_value(tensor, values.tensors[i], beside=True)
    except (TypeError, ValueError) as error:
        raise named_error(error, argument, i, tensor) from None


def check_adam_step(steps: AdamSteps, i: int) -> None:
    """Raises TypeError or ValueError, naming the operand, if there is no step with it."""
    argument, tensor = "grads", steps.grads[i]
    try:
        _check_value(tensor, steps.grads[0])
        argument, tensor = "exp_avgs", steps.exp_avgs[i]
        _check_value(tensor, steps.grads[i], beside=True)
        argument, tensor = "exp_avg_sqs", steps.exp_avg_sqs[i]
        _check_value(tensor, steps.grads[i], beside=True)
        if steps.cached is not None:
            argument, tensor = "cached", steps.cached[i]
            _check_value(tensor, steps.grads[i], beside=True)
            if tensor.dtype != torch.float32:
                raise TypeError("its dtype must be float32")
    except (TypeError, ValueError) as error:
        raise named_error(error, argument, i, tensor) from None


def check_adam_numbers(steps: AdamSteps) -> None:
    count = len(steps.grads)
    check_table("numbers", steps.numbers, torch.float32, (count, len(AdamNumbers._fields)))
    check_table("merges", steps.merges, torch.int64, (count,))


def check_table(name: str, table: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raises TypeError or ValueError if a table of numbers is not of this dtype and shape."""
    if table.dtype != dtype:
        raise TypeError(f"{name} must be of {dtype}, not {table.dtype}")
    if tuple(table.shape) != shape:
        raise ValueError(f"{name} must have the shape {shape}, not {tuple(table.shape)}")


def _check_value(tensor: Tensor, other: Tensor, *, beside: bool = False) -> None:
    """One that is only read, in any memory format, on the device of the other."""
    check_plain(tensor)
    check_dtype(tensor)
    if beside and tensor.shape != other.shape:
        raise ValueError(f"it must have the shape {tuple(other.shape)} of what it goes with")
    if tensor.device != other.device:
        raise ValueError(f"it must be on {other.device} with the others, not on {tensor.device}")


def named_error(error: Exception, argument: str, i: int, tensor: Tensor) -> Exception:
    return type(error)(f"{argument}[{i}] (shape {tuple(tensor.shape)}, {tensor.dtype}): {error}")


def check_dtype(tensor: Tensor) -> None:
    if tensor.dtype not in PARAM_DTYPES:
        raise TypeError("its dtype must be float32, bfloat16 or float16")


def check_beside(param: Tensor, tensor: Tensor) -> None:
    if tensor.shape != param.shape or tensor.device != param.device:
        raise ValueError(
            f"it must have the shape {tuple(param.shape)} and the device {param.device} of its "
            "parameter"
        )


def check_float32_beside(param: Tensor, tensor: Tensor) -> None:
    check_strided(tensor)
    if tensor.dtype != torch.float32:
        raise TypeError("its dtype must be float32")
    check_beside(param, tensor)


def _check_rounding(sweep: Sweep, i: int) -> None:
    param, residual = sweep.params[i], sweep.residuals[i]
    kept = None if residual is None or sweep.outs is not None else residual.dtype
    if (param.dtype, kept) not in ROUNDED_DTYPES:
        raise ValueError(
            "what is rounded stochastically is bfloat16 or float16 alone, or bfloat16 with an int8 "
            "residual: rounding must be None"
        )
    check_shard(param, sweep.shards[i], "rounding16", picked=sweep.rows[i] is not None)


def _check_rows(param: Tensor, rows: Tensor, shard: Shard) -> None:
    check_plain(rows)
    if rows.dtype != torch.int64:
        raise TypeError("its dtype must be int64")
    if rows.device != param.device:
        raise ValueError(f"it must be on {param.device}, the device of its parameter")
    if rows.dim() != 1 or not rows.is_contiguous():
        raise ValueError("it must be contiguous and have one dimension")
    if rows.numel() * shard.row_length != param.numel():
        raise ValueError(
            f"it must name the rows of {shard.row_length} elements that its parameter's "
            f"{param.numel()} elements are"
        )


def _check_out(param: Tensor, out: Tensor) -> None:
    check_plain(out)
    if out.dtype != param.dtype:
        raise TypeError(f"its dtype must be {param.dtype}, that of its parameter")
    check_beside(param, out)
    if not out.is_contiguous():
        raise ValueError(f"its strides are {out.stride()}: an output is contiguous")


def _check_dense(sweep: Sweep, i: int, j: int) -> None:
    vector = sweep.dense[j][i]
    check_plain(vector)
    check_dtype(vector)
    check_beside(sweep.params[i], vector)


def check_plain(tensor: Tensor) -> None:
    if is_traceable_wrapper_subclass(tensor):
        kind = type(tensor).__name__
        raise TypeError(f"it is a {kind}: give the local tensor that it wraps, with shards=")
    if tensor.layout != torch.strided:
        raise TypeError(f"its layout is {tensor.layout}: only strided tensors are swept")
    if tensor.numel() > 0 and tensor.untyped_storage().nbytes() < _end(tensor):
        raise ValueError("its memory was freed, or ends before its last element")


def check_strided(tensor: Tensor) -> None:
    check_plain(tensor)
    if not is_dense(tensor):
        raise ValueError(
            f"its strides {tensor.stride()} leave holes or overlapping elements: a sweep in place "
            "needs dense memory (a permuted or channels_last tensor is fine); sweep the tensor "
            "that it is a view of, or a copy"
        )


def check_shard(param: Tensor, shard: Shard, law: str, *, picked: bool = False) -> None:
    numel = param.numel()
    if numel == 0:
        return
    fills = shard.row_length > 0 and numel % shard.row_length == 0
    rows = numel // shard.row_length if fills else 0
    strides = rows > 1 or picked
    if not fills or shard.offset < 0 or (strides and shard.row_stride < shard.row_length):
        raise ValueError(
            f"{shard} does not describe its {numel} elements: rows of row_length must fill the "
            "tensor, row_stride be at least row_length, offset not negative"
        )
    # Which rows were picked is known on their device alone.
    last = 0 if picked else rows - 1
    check_elements(shard.offset + last * shard.row_stride + shard.row_length, law)


def check_residual(param: Tensor, residual: Tensor) -> None:
    wanted = RESIDUAL_DTYPES[param.dtype]
    if residual.dtype not in wanted:
        which = " or ".join(str(dtype) for dtype in wanted) or "no residual"
        raise TypeError(f"a {param.dtype} parameter takes {which} beside it")
    check_beside(param, residual)
    if _significant_strides(residual) != _significant_strides(param):
        raise ValueError(
            f"its strides {residual.stride()} must be those of its parameter, {param.stride()}: "
            "make it with torch.empty_like or zeros_like"
        )


# (argument, position, tensor, whether it is written).
Operands = Iterable[tuple[str, int, Tensor, bool]]


def check_memory(sweep: Sweep) -> None:
    """No operand may share memory with one that is written: the sweep would move it twice.

    A dense direction may be the momentum of its parameter.
    """
    operands = [(name, i, tensor, True) for name, i, tensor in sweep.written()]
    momenta = None if sweep.update is None else sweep.update.momenta
    for name, i, tensor in sweep.read():
        if momenta is None or tensor is not momenta[i]:
            operands.append((name, i, tensor, False))
    check_disjoint(operands)


def check_disjoint(operands: Operands) -> None:
    """Raises ValueError, naming both, if one that is written shares memory with another."""
    # Sorted by where they begin, an operand overlaps one that is written only if it begins before
    # the end of everything before it.
    spans = sorted(
        (*span(tensor), f"{name}[{i}]", is_written)
        for name, i, tensor, is_written in operands
        if tensor.numel() > 0
    )
    # The operands that reach furthest so far, of all and of those that are written.
    furthest: tuple[int, str] = (0, "")
    furthest_written: tuple[int, str] = (0, "")
    for start, end, name, is_written in spans:
        reach, other = furthest if is_written else furthest_written
        if start < reach:
            raise ValueError(
                f"{other} and {name} share memory: give a tensor once (tied weights too)"
            )
        furthest = max(furthest, (end, name))
        if is_written:
            furthest_written = max(furthest_written, (end, name))


def span(tensor: Tensor) -> tuple[int, int]:
    """The addresses that a tensor's elements lie between."""
    start = tensor.data_ptr()
    return start, start + _extent(tensor) * tensor.element_size()


def _extent(tensor: Tensor) -> int:
    """How many elements of its memory a tensor reaches over."""
    if tensor.is_contiguous():
        return tensor.numel()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps)


def _end(tensor: Tensor) -> int:
    """The byte of its storage that it ends before."""
    return int(tensor.storage_offset() + _extent(tensor)) * tensor.element_size()


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
