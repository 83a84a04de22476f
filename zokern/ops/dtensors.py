"""DTensors among the operands of an operation: the parts that this rank has, and their shards."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from zokern.arguments import Shards, check_length
from zokern.checks import named_error
from zokern.sharding import any_dtensor, is_dtensor, local, shard_of

# The operands of a sweep with a tensor, or None, for each of the params.
BESIDE = ("residuals", "masters", "outs", "rows")


def local_operands(
    params: list[Tensor], operands: dict[str, Any]
) -> tuple[list[Tensor], dict[str, Any]]:
    """The params and the other operands of :func:`perturb_`, by their names, as this rank has them.

    Raises:
        ValueError: for a DTensor that has no shard, or is placed otherwise than its parameter.
    """
    if not any_dtensor(params):
        return params, operands
    found = {**operands, "shards": shards_of("params", params, operands.get("shards"))}
    for name in BESIDE:
        if found.get(name) is not None:
            found[name] = _parts_beside(params, name, found[name])
    dense = enumerate(found.get("dense", ()))
    found["dense"] = [_parts_beside(params, f"dense[{j}]", vectors) for j, vectors in dense]
    update = found.get("update")
    if update is not None and update.momenta is not None:
        momenta = _parts_beside(params, "momenta", update.momenta)
        found["update"] = replace(update, momenta=momenta)
    return [local(param) for param in params], found


def shards_of(name: str, tensors: list[Tensor], shards: Shards | None) -> Shards:
    """Those that are given, and for DTensors without one that of this rank's part."""
    given: list[Any] = [None] * len(tensors) if shards is None else list(shards)
    check_length("shards", given, len(tensors))
    for i, tensor in enumerate(tensors):
        if given[i] is None and is_dtensor(tensor):
            try:
                given[i] = shard_of(tensor)
            except ValueError as error:
                raise named_error(error, name, i, tensor) from None
    return given


def _parts_beside(
    params: list[Tensor], name: str, tensors: Sequence[Tensor | None]
) -> list[Tensor | None]:
    tensors = list(tensors)
    check_length(name, tensors, len(params))
    return [
        None if tensor is None else _part_beside(param, tensor, f"{name}[{i}]")
        for i, (param, tensor) in enumerate(zip(params, tensors, strict=True))
    ]


def _part_beside(param: Tensor, tensor: Tensor, name: str) -> Tensor:
    if not is_dtensor(tensor) or not is_dtensor(param):
        return tensor
    own, wanted = ((t.device_mesh, t.placements) for t in (tensor, param))
    if own != wanted:
        raise ValueError(
            f"{name} is a DTensor with placements {own[1]} on {own[0]}, and its parameter has "
            f"{wanted[1]} on {wanted[0]}: redistribute it"
        )
    return local(tensor)
