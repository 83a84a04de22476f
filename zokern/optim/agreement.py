"""What must be the same on all ranks of a run."""

from __future__ import annotations

import binascii
from typing import TYPE_CHECKING, Any

from zokern.distributed import checksum, differences, drifted
from zokern.optim.parameters import named
from zokern.optim.rules import float32
from zokern.sharding import groups_of, holders, is_dtensor, local, shard_of, totals

if TYPE_CHECKING:
    from zokern.optim.base import ZOOptimizer
    from zokern.optim.steps import OpenStep

NUMBERS = ("lr", "weight_decay", "momentum")


def agree(optimizer: ZOOptimizer, seed: int | None, *, records: bool) -> tuple[int, bool]:
    """With the other ranks, about what the constructor was given.

    Returns:
        The seed of the run, and whether rank 0 records it.

    Raises:
        ValueError: on every rank, if they were given different things.
    """
    settings = {**_hyper_parameters(optimizer), "seed": seed, **_parameters(optimizer)}
    settings["parallel"] = optimizer._ranks.parallel
    groups = (groups_of(param) for _, param in named(optimizer.param_groups))
    own = settings, optimizer.run["seed"], records, sorted(holders(groups))
    given = optimizer._ranks.gather("the construction of an optimizer", own)
    found = differences([settings for settings, *_ in given])
    if found:
        raise ValueError(
            f"all ranks must give {type(optimizer).__name__} the same arguments: {found}"
        )
    optimizer._ranks.share([parts for *_, parts in given])
    return given[0][1:3]


def of_step(optimizer: ZOOptimizer, step: OpenStep) -> dict[str, Any]:
    """What a step is made of beside the losses and the weights."""
    members = optimizer._displacement.members
    moving = sorted((member.tensor_id, member.whole.numel()) for member in members)
    return {
        **_hyper_parameters(optimizer),
        **optimizer._direction_settings(),
        "the set of parameters that move": f"{len(moving)} of the checksum "
        f"{binascii.crc32(repr(moving).encode()):08x}",
        "the place that the step began at": "rest" if step.from_rest else "its first point",
    }


def drift(optimizer: ZOOptimizer) -> str:
    """Which ranks hold other weights, or other tensors beside them; empty where none does.

    Of DTensors the full tensors are compared: a rank shares the checksum of those that hold parts
    of the same copy.
    """
    tensors = {}
    for name, param in named(optimizer.param_groups):
        tensors[name] = param
        for key, tensor in optimizer.state[param].items():
            tensors[f"the {key} of {name}"] = tensor
    sums = [
        checksum(local(tensor), shard_of(tensor) if is_dtensor(tensor) else None)
        for tensor in tensors.values()
    ]
    sums = totals(sums, [groups_of(tensor) for tensor in tensors.values()])
    own = dict(zip(tensors, sums, strict=True))
    ranks, names = drifted(optimizer._ranks.gather("assert_in_sync", own))
    if not names:
        return ""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"rank {', '.join(map(str, ranks))} has drifted from the others, in {names[0]}{more}"


def _hyper_parameters(optimizer: ZOOptimizer) -> dict[str, Any]:
    groups = optimizer.param_groups
    settings = {key: optimizer.run[key] for key in optimizer._run_defaults}
    for i, group in enumerate(groups):
        where = f" of group {i}" if len(groups) > 1 else ""
        settings[f"maximize{where}"] = bool(group["maximize"])
        # In all digits that a float32 has, as which they are used.
        settings |= {f"{key}{where}": f"{float32(float(group[key])):.9g}" for key in NUMBERS}
    return settings


def _parameters(optimizer: ZOOptimizer) -> dict[str, Any]:
    groups = [i for i, group in enumerate(optimizer.param_groups) for _ in group["params"]]
    return {
        f"parameter {name}": (
            f"{param.dtype} {list(param.shape)} in group {i}"
            f"{'' if param.requires_grad else ', frozen'}"
        )
        for (name, param), i in zip(named(optimizer.param_groups), groups, strict=True)
    }
