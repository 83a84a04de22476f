"""Arguments of the operations as users write them, read into lists of Python numbers.

Each error names the argument, says what it is and what is wanted.
"""

import array
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
K = TypeVar("K")
# One row of numbers for all tensors, or a row for each.
Numbers = Sequence[float] | Sequence[Sequence[float]] | Tensor
# For each tensor None or (offset, row_length, row_stride).
Shards = Sequence[tuple[int, int, int] | None]


def tensor_list(name: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        raise TypeError(f"{name} must be a list of tensors, not one tensor")
    result = list(tensors)
    for i, tensor in enumerate(result):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}[{i}] must be a tensor, not {type(tensor).__name__}")
        if tensor.is_conj() or tensor.is_neg():
            # The dispatcher would refuse these too, in words of its own.
            view = "conjugated" if tensor.is_conj() else "negated"
            raise ValueError(f"{name}[{i}] is a lazily {view} view: a sweep needs a copy")
    return result


def integer(name: str, value: int, *, bits: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    value = value.__index__()
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{name} must be at least 0 and below 2^{bits}, not {value}")
    return value


def integers(name: str, values: Sequence[int], *, bits: int) -> list[int]:
    limit = 1 << bits
    if all(type(value) is int and 0 <= value < limit for value in values):
        return list(values)
    return [integer(f"{name}[{i}]", value, bits=bits) for i, value in enumerate(values)]


def directions(draws: Sequence[int], dense: int) -> list[int]:
    """Draws, and ~j for the j-th of the dense directions."""
    result = []
    for i, draw in enumerate(draws):
        slot = hasattr(draw, "__index__") and draw.__index__() < 0
        if slot and not 0 <= ~draw.__index__() < dense:
            raise ValueError(f"draws[{i}] is {draw}, but there are {dense} dense directions")
        result.append(draw.__index__() if slot else integer(f"draws[{i}]", draw, bits=32))
    return result


def check_length(name: str, values: Sequence, count: int) -> None:
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count} params")


def number_rows(name: str, values: Numbers, count: int, k: int) -> list[list[float]]:
    """One row of K for all tensors, or a row for each."""
    to_list: Callable[[], list] = getattr(values, "tolist", lambda: list(values))
    given = to_list()
    shared = not given or not isinstance(given[0], Sequence)
    result: list[list[float]] = [given] if shared else given
    if any(len(row) != k for row in result) or (not shared and len(result) != count):
        raise ValueError(
            f"{name} must be {k} numbers, one per draw, or {k} for each of the {count} params; "
            f"got {values!r}"
        )
    # Rows that are one object stay one.
    read = {id(row): row for row in result}
    read = {key: float32s(name, row) for key, row in read.items()}
    return [read[id(row)] for row in result]


def float32s(name: str, numbers: Sequence[float]) -> list[float]:
    try:
        rounded = array.array("f", numbers).tolist()
    except TypeError:
        rounded = [math.nan]
    if not all(map(math.isfinite, rounded)):
        raise ValueError(f"{name} must be finite float32 numbers; got {numbers!r}")
    return rounded


def shard_list(shards: Shards | None, tensors: list[Tensor]) -> list[tuple[int, ...]]:
    """Three numbers for each tensor."""
    given = [None] * len(tensors) if shards is None else list(shards)
    check_length("shards", given, len(tensors))
    result: list[tuple[int, ...]] = []
    for i, (shard, tensor) in enumerate(zip(given, tensors, strict=True)):
        if shard is None:
            result.append((0, tensor.numel(), tensor.numel()))
            continue
        if len(shard) != 3:
            raise ValueError(f"shards[{i}] must be (offset, row_length, row_stride), not {shard!r}")
        result.append(tuple(integer(f"shards[{i}]", n, bits=63) for n in shard))
    return result


def unflatten(name: str, flat: list[float], count: int, k: int) -> list[list[float]]:
    flat = float32s(name, flat)
    if len(flat) == k:
        return [flat] * count
    if len(flat) != count * k:
        raise ValueError(f"{name} must hold {k} or {count * k} numbers, not {len(flat)}")
    return [flat[i * k : i * k + k] for i in range(count)]


def flat(rows_: Sequence[Sequence[float]], members: list[int]) -> list[float]:
    if len(rows_) == 1:
        return list(rows_[0])
    return [number for i in members for number in rows_[i]]


def pick(values: Sequence[T], members: list[int]) -> list[T]:
    return [values[i] for i in members]


def packed(optional: Sequence[T | None]) -> tuple[list[T], list[int]]:
    """Those that there are, and for each entry its place among them, -1 where it is None."""
    present = [entry for entry in optional if entry is not None]
    places = iter(range(len(present)))
    return present, [-1 if entry is None else next(places) for entry in optional]


def unpacked(
    name: str, present: Sequence[T], places_name: str, places: Sequence[int]
) -> list[T | None]:
    used = sorted(place for place in places if place >= 0)
    if used != list(range(len(present))):
        raise ValueError(f"{places_name} must name each of the {len(present)} {name} once")
    return [None if place < 0 else present[place] for place in places]


def positions(keys: Iterable[K]) -> dict[K, list[int]]:
    """Where each key is."""
    places: dict[K, list[int]] = {}
    for i, key in enumerate(keys):
        places.setdefault(key, []).append(i)
    return places


def by_device(tensors: list[Tensor]) -> dict[torch.device, list[int]]:
    """The positions of the tensors of each device."""
    return positions(tensor.device for tensor in tensors)


def check_flat(count: int, **arguments: tuple[Sequence, int]) -> None:
    """Each argument is (its entries, how many of them there are for a tensor)."""
    for name, (values, each) in arguments.items():
        if len(values) != each * count:
            raise ValueError(
                f"{name} must have {each * count} entries for {count} tensors, not {len(values)}"
            )


def signed(seed: int) -> int:
    """A schema's int is signed: 64-bit seeds travel as the int64 of the same bits."""
    return seed - (1 << 64) if seed >> 63 else seed


def unsigned(seed: int) -> int:
    return seed & ((1 << 64) - 1)
