"""The operations: each a torch.library schema, its checks and its fake, and the door to it.

A door (``perturb_``) takes what users write and brings it into the flat form of the schema; the
checks run inside the operator itself, so ``torch.ops.zokern.perturb_`` is as safe as the door.
Nothing is written before every operand has passed.
"""

import array
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from zokern import backends
from zokern.checks import check_elements, check_memory, check_operand
from zokern.laws import LAWS
from zokern.sweep import Shard, Sweep

T = TypeVar("T")
Numbers = Sequence[float] | Sequence[Sequence[float]] | Tensor

torch.library.define(
    "zokern::perturb_",
    "(Tensor(a!)[] params, Tensor(b!)[] residuals, int[] residual_of, int[] draws,"
    " float[] coeffs, float[] scales, int seed, str law, int[] tensor_ids, int[] shards) -> ()",
)
torch.library.define(
    "zokern::noise_sample",
    "(str law, int numel, int seed, int draw, int tensor_id, int offset, Device device) -> Tensor",
)


def perturb_(
    params: Iterable[Tensor],
    draws: Sequence[int],
    coeffs: Numbers,
    *,
    seed: int,
    law: str = "gauss16",
    scales: Numbers | None = None,
    tensor_ids: Sequence[int] | None = None,
    shards: Sequence[tuple[int, int, int] | None] | None = None,
    residuals: Sequence[Tensor | None] | None = None,
) -> None:
    """Move a list of tensors along seeded random directions, in place, in one sweep.

    For each tensor θ, with float32 arithmetic and one rounding to θ's dtype at the end::

        t = θ
        for k in range(K):
            t = scales[k] * t                                # only where scales[k] != 1
            t = fma(coeffs[k], z(seed, draws[k], id), t)
        θ = t

    The result is the same, bit for bit, on every backend and every device.

    Args:
        params: float32, bfloat16 or float16 tensors, dense (any memory format) and not
            overlapping. They may lie on several devices.
        draws: the K directions, K ≥ 1, each 0 ≤ draw < 2^32.
        coeffs: K numbers, or K for each tensor (shape (len(params), K)). Rounded to float32.
        seed: of the run, 0 ≤ seed < 2^64.
        law: ``gauss16``, ``gauss32``, ``rademacher`` or ``normal``; see :mod:`zokern.noise`.
        scales: like ``coeffs``; 1 by default.
        tensor_ids: 56-bit ids, for example of :func:`zokern.noise.tensor_id`; the tensors'
            positions by default.
        shards: for each tensor None (it is whole) or (offset, row_length, row_stride): its
            element (r, k), in rows of ``row_length``, is element offset + r·row_stride + k of the
            full tensor and gets the noise of that element.
        residuals: for each tensor None or the low bits of its value, shaped and laid out like it:
            int16 or int8 beside bfloat16, float16 beside float16 (``split`` and ``split8``).

    Raises:
        TypeError, ValueError: for an operand that cannot be swept in place or an argument out of
            range, naming it, before anything is written.
    """
    params = _tensor_list("params", params)
    count = len(params)
    draws = _integers("draws", draws, bits=32)
    if not draws:
        raise ValueError("draws is empty: give at least one direction")
    coeff_rows = _rows("coeffs", coeffs, count, len(draws))
    scale_rows = None if scales is None else _rows("scales", scales, count, len(draws))
    seed = _integer("seed", seed, bits=64)
    ids = list(range(count)) if tensor_ids is None else _integers("tensor_ids", tensor_ids, bits=56)
    _check_length("tensor_ids", ids, count)
    shard_list = [None] * count if shards is None else list(shards)
    _check_length("shards", shard_list, count)
    residual_list = [None] * count if residuals is None else list(residuals)
    _check_length("residuals", residual_list, count)

    by_device: dict[torch.device, list[int]] = {}
    for i, param in enumerate(params):
        by_device.setdefault(param.device, []).append(i)

    calls = []
    for members in by_device.values():
        own_residuals = [r for i in members if (r := residual_list[i]) is not None]
        slots = iter(range(len(own_residuals)))
        arguments = (
            _pick(params, members),
            own_residuals,
            [-1 if residual_list[i] is None else next(slots) for i in members],
            draws,
            _flat(coeff_rows, members),
            [] if scale_rows is None else _flat(scale_rows, members),
            _signed(seed),
            law,
            _pick(ids, members),
            [n for i in members for n in _shard_numbers(i, shard_list[i], params[i])],
        )
        calls.append(arguments)
    if len(calls) > 1:
        for arguments in calls:
            check_memory(_sweep(*arguments))
    with torch.no_grad():
        for arguments in calls:
            torch.ops.zokern.perturb_(*arguments)


@torch.library.impl("zokern::perturb_", "CompositeExplicitAutograd")
def _perturb_kernel(
    params: list[Tensor],
    residuals: list[Tensor],
    residual_of: list[int],
    draws: list[int],
    coeffs: list[float],
    scales: list[float],
    seed: int,
    law: str,
    tensor_ids: list[int],
    shards: list[int],
) -> None:
    sweep = _sweep(
        params, residuals, residual_of, draws, coeffs, scales, seed, law, tensor_ids, shards
    )
    if not params:
        return
    check_memory(sweep)
    backends.select(params[0].device).perturb_(sweep)
    # The dispatcher leaves this to the kernels; autograd notices stale saved tensors by it.
    torch.autograd.graph.increment_version(
        [tensor for tensor in (*params, *residuals) if not tensor.is_inference()]
    )


@torch.library.register_fake("zokern::perturb_")
def _perturb_fake(*arguments) -> None:
    _sweep(*arguments)


@torch.library.impl("zokern::noise_sample", "CompositeExplicitAutograd")
def _noise_sample_kernel(
    law: str, numel: int, seed: int, draw: int, tensor_id: int, offset: int, device: torch.device
) -> Tensor:
    _check_sample(law, numel, offset)
    return backends.select(device).sample(
        law,
        numel,
        seed=_unsigned(seed),
        draw=_integer("draw", draw, bits=32),
        tensor_id=_integer("tensor_id", tensor_id, bits=56),
        offset=offset,
        device=device,
    )


@torch.library.register_fake("zokern::noise_sample")
def _noise_sample_fake(law, numel, seed, draw, tensor_id, offset, device) -> Tensor:
    _check_sample(law, numel, offset)
    return torch.empty(numel, dtype=LAWS[law].dtype, device=device)


def noise_sample(
    law: str,
    numel: int,
    *,
    seed: int,
    draw: int,
    tensor_id: int,
    offset: int,
    device: torch.device | str,
) -> Tensor:
    """See :func:`zokern.noise.sample`."""
    _check_sample(law, numel, offset)
    return torch.ops.zokern.noise_sample(
        law,
        numel,
        _signed(_integer("seed", seed, bits=64)),
        _integer("draw", draw, bits=32),
        _integer("tensor_id", tensor_id, bits=56),
        offset,
        torch.device(device),
    )


def _check_sample(law: str, numel: int, offset: int) -> None:
    if law not in LAWS:
        raise ValueError(f"unknown law {law!r}; there are {', '.join(LAWS)}")
    _integer("numel", numel, bits=63)
    _integer("offset", offset, bits=63)
    try:
        check_elements(offset + numel, law)
    except ValueError as error:
        raise ValueError(f"the range [{offset}, {offset + numel}): {error}") from None


def _sweep(
    params: list[Tensor],
    residuals: list[Tensor],
    residual_of: list[int],
    draws: list[int],
    coeffs: list[float],
    scales: list[float],
    seed: int,
    law: str,
    tensor_ids: list[int],
    shards: list[int],
) -> Sweep:
    """The flat arguments of the schema as a Sweep, every operand checked but for its memory."""
    directions = [name for name, entry in LAWS.items() if entry.is_direction]
    if law not in directions:
        raise ValueError(f"law {law!r} gives no directions; those that do: {', '.join(directions)}")
    count = len(params)
    if len(residual_of) != count or len(tensor_ids) != count or len(shards) != 3 * count:
        raise ValueError(
            f"{count} params need {count} residual_of, {count} tensor_ids and {3 * count} shards; "
            f"got {len(residual_of)}, {len(tensor_ids)} and {len(shards)}"
        )
    used = sorted(slot for slot in residual_of if slot >= 0)
    if used != list(range(len(residuals))):
        raise ValueError(f"residual_of must name each of the {len(residuals)} residuals once")
    sweep = Sweep(
        params=params,
        residuals=[None if slot < 0 else residuals[slot] for slot in residual_of],
        shards=[Shard(*shards[3 * i : 3 * i + 3]) for i in range(count)],
        tensor_ids=_integers("tensor_ids", tensor_ids, bits=56),
        draws=_integers("draws", draws, bits=32),
        coeffs=_unflatten("coeffs", coeffs, count, len(draws)),
        scales=_unflatten("scales", scales or [1.0] * len(draws), count, len(draws)),
        seed=_unsigned(seed),
        law=law,
    )
    for i in range(count):
        check_operand(sweep, i)
    return sweep


def _tensor_list(name: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        raise TypeError(f"{name} must be a list of tensors, not one tensor")
    result = list(tensors)
    for i, tensor in enumerate(result):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}[{i}] must be a tensor, not {type(tensor).__name__}")
        if tensor.is_conj() or tensor.is_neg():
            # The dispatcher would refuse these too, in words of its own.
            view = "conjugated" if tensor.is_conj() else "negated"
            raise ValueError(f"{name}[{i}] is a lazily {view} view: a sweep in place needs a copy")
    return result


def _integer(name: str, value: int, *, bits: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    value = value.__index__()
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{name} must be at least 0 and below 2^{bits}, not {value}")
    return value


def _integers(name: str, values: Sequence[int], *, bits: int) -> list[int]:
    return [_integer(f"{name}[{i}]", value, bits=bits) for i, value in enumerate(values)]


def _check_length(name: str, values: Sequence, count: int) -> None:
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count} params")


def _shard_numbers(i: int, shard: tuple[int, int, int] | None, param: Tensor) -> tuple:
    if shard is None:
        return (0, param.numel(), param.numel())
    if len(shard) != 3:
        raise ValueError(f"shards[{i}] must be (offset, row_length, row_stride), not {shard!r}")
    return tuple(_integer(f"shards[{i}]", n, bits=63) for n in shard)


def _rows(name: str, values: Numbers, count: int, k: int) -> list[list[float]]:
    """One row of K for all tensors, or a row for each."""
    to_list: Callable[[], list] = getattr(values, "tolist", lambda: list(values))
    given = to_list()
    shared = not given or not isinstance(given[0], Sequence)
    rows: list[list[float]] = [given] if shared else [list(row) for row in given]
    if any(len(row) != k for row in rows) or (not shared and len(rows) != count):
        raise ValueError(
            f"{name} must be {k} numbers, one per draw, or {k} for each of the {count} params; "
            f"got {values!r}"
        )
    return [_float32(name, row) for row in rows]


def _float32(name: str, numbers: list[float]) -> list[float]:
    try:
        rounded = array.array("f", numbers).tolist()
    except TypeError:
        rounded = [math.nan]
    if not all(map(math.isfinite, rounded)):
        raise ValueError(f"{name} must be finite float32 numbers; got {numbers!r}")
    return rounded


def _unflatten(name: str, flat: list[float], count: int, k: int) -> list[list[float]]:
    flat = _float32(name, flat)
    if len(flat) == k:
        return [flat] * count
    if len(flat) != count * k:
        raise ValueError(f"{name} must hold {k} or {count * k} numbers, not {len(flat)}")
    return [flat[i * k : i * k + k] for i in range(count)]


def _flat(rows: list[list[float]], members: list[int]) -> list[float]:
    if len(rows) == 1:
        return rows[0]
    return [number for i in members for number in rows[i]]


def _pick(values: list[T], members: list[int]) -> list[T]:
    return [values[i] for i in members]


def _signed(seed: int) -> int:
    """A schema's int is signed: 64-bit seeds travel as the int64 of the same bits."""
    return seed - (1 << 64) if seed >> 63 else seed


def _unsigned(seed: int) -> int:
    return seed & ((1 << 64) - 1)
