"""The parameters of param groups: their names, ids and what makes them fit to be moved."""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zokern import checks
from zokern.laws import canonical_name, tensor_id
from zokern.optim.precision import resolve
from zokern.sharding import is_dtensor, local, placed, shard_of

Groups = list[dict[str, Any]]

# What a parameter has that somebody has flattened, and who.
FLATTENED = (
    ("_fsdp_flattened", "FullyShardedDataParallel (FSDP1)"),
    ("ds_id", "DeepSpeed ZeRO"),
)


def named(groups: Groups) -> list[tuple[str, Tensor]]:
    """All parameters in order, with their names or, for unnamed ones, their positions."""
    result: list[tuple[str, Tensor]] = []
    for group in groups:
        count = len(group["params"])
        positions = [str(i) for i in range(len(result), len(result) + count)]
        result += zip(group.get("param_names", positions), group["params"], strict=True)
    return result


def tensor_ids(groups: Groups) -> list[int]:
    if "param_names" not in groups[0]:
        return list(range(len(named(groups))))
    return [tensor_id(name) for name, _ in named(groups)]


def check_last_group(groups: Groups, precision: str, owner: str) -> None:
    """Raises TypeError or ValueError, naming what is wrong, if the last group cannot join."""
    group = groups[-1]
    for key in ("lr", "weight_decay"):
        if not (is_number(group[key]) and 0 <= group[key] < float("inf")):
            raise ValueError(f"{key} must be at least 0 and finite, not {group[key]!r}")
    if not (is_number(group["momentum"]) and 0 <= group["momentum"] < 1):
        raise ValueError(f"momentum must be at least 0 and below 1, not {group['momentum']!r}")
    check_params(group, precision, owner)
    check_tensor_ids(groups)


def check_params(group: dict[str, Any], precision: str, owner: str) -> None:
    """Raises TypeError or ValueError, naming it, for one that cannot be updated in place."""
    names = group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]
    for name, param in zip(names, group["params"], strict=True):
        if param.dtype not in checks.PARAM_DTYPES:
            raise TypeError(
                f"{owner} moves float32, bfloat16 and float16 parameters; {name} is {param.dtype}"
            )
        _check_kind(name, param, owner)
        own = local(param)
        if own.layout != torch.strided or not checks.is_dense(own):
            raise ValueError(
                f"{owner} moves parameters in place; {name} is not dense in memory (layout "
                f"{own.layout}, shape {tuple(own.shape)})"
            )
        resolve(precision, param.dtype)


def _check_kind(name: str, param: Tensor, owner: str) -> None:
    """Raises TypeError or ValueError for one of which it cannot be told where its elements lie."""
    check_unflattened(name, param, owner)
    if is_dtensor(param):
        try:
            shard_of(param)
        except ValueError as error:
            raise ValueError(f"{owner} cannot move {name}: {error}") from None
    part = local(param)
    if is_traceable_wrapper_subclass(part):
        raise TypeError(
            f"{owner} takes plain tensors and DTensors of them; {name} is "
            f"{'a DTensor of ' if is_dtensor(param) else ''}a {type(part).__name__}"
        )


def check_unflattened(name: str, param: Tensor, owner: str) -> None:
    """Raises TypeError for one that somebody has flattened, to share it out among ranks."""
    for mark, wrapper in FLATTENED:
        if hasattr(param, mark):
            raise TypeError(
                f"{owner} cannot tell which elements of {name} this rank has: {wrapper} has "
                "flattened it; shard the model with torch.distributed.fsdp.fully_shard (FSDP2), "
                "whose parameters are DTensors"
            )


def check_tensor_ids(groups: Groups) -> None:
    """Raises ValueError, naming them, if two parameters would get the same noise."""
    by_id: dict[int, str] = {}
    for number, (name, _) in zip(tensor_ids(groups), named(groups), strict=True):
        if by_id.get(number) == name:
            raise ValueError(f"two parameters have the name {name!r} and would get the same noise")
        if by_id.setdefault(number, name) != name:
            raise ValueError(
                f"{by_id[number]!r} and {name!r} have the same tensor id and would get the same "
                "noise: rename one (names of wrappers, such as 'module.', do not count)"
            )


def restore_tensors(
    optimizer: Optimizer, state_dict: dict[str, Any], *, unplaced: Sequence[str] = ()
) -> None:
    """Give the tensors of a state that torch has loaded their own dtypes back.

    ``Optimizer.load_state_dict`` casts them to the parameter's dtype. Those of DTensors are placed
    like them, but for those whose keys are ``unplaced``.
    """
    saved = [number for group in state_dict["param_groups"] for number in group["params"]]
    for number, (_, param) in zip(saved, named(optimizer.param_groups), strict=True):
        for key, value in state_dict["state"].get(number, {}).items():
            if isinstance(value, Tensor):
                is_placed = key not in unplaced and value.shape == param.shape
                own = placed(value, param) if is_placed else value
                optimizer.state[param][key] = own.to(param.device, copy=True)


def check_names(own_groups: Groups, saved_groups: Groups) -> None:
    """Raises ValueError if the parameters of a state have other names than an optimizer's."""
    for own, saved in zip(own_groups, saved_groups, strict=False):
        names = [canonical_name(name) for name in own.get("param_names", [])]
        saved_names = [canonical_name(name) for name in saved.get("param_names", [])]
        if names != saved_names:
            differing = sorted(set(names) ^ set(saved_names)) or "their order"
            raise ValueError(
                "the state's parameters have other names, and with them other noise; they "
                f"differ in {differing}"
            )


def is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, Real)
