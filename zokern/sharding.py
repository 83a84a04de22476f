"""DTensors: the part of the full tensor that this rank has, and sums over the ranks of all parts.

A DTensor that is replicated counts as a whole tensor on each rank.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zokern.arguments import positions, signed, unsigned
from zokern.sweep import Shard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# The process groups over whose ranks the parts of a tensor lie: one for each sharded dimension of
# its mesh.
Groups = tuple[Any, ...]

_PLAIN = (Tensor, nn.Parameter)


class Part(NamedTuple):
    """Of a tensor the part that this rank has: where it lies, of how many elements, and the groups
    of those that have the others."""

    shard: Shard
    numel: int
    groups: Groups


def is_dtensor(tensor: Tensor) -> "TypeGuard[DTensor]":
    if type(tensor) in _PLAIN:
        return False
    # Importing it takes longer than all of zokern; whoever has a DTensor has imported it.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def any_dtensor(tensors: Iterable[Tensor]) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(tensor, module.DTensor) for tensor in tensors)


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this rank has, sharing its memory; other tensors as they are."""
    # to_local() makes a new view of a parameter's each time, which takes longer than all else that
    # is done with it between two sweeps.
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def like(tensor: Tensor, part: Tensor) -> Tensor:
    """A DTensor placed like another one, of which this rank has the part given; or the part."""
    if not is_dtensor(tensor):
        return part
    with torch.no_grad():
        return type(tensor).from_local(
            part,
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )


def part_of(full: Tensor, tensor: Tensor) -> Tensor:
    """Of a full tensor the part that this rank has of a DTensor; all of it beside other tensors."""
    if not is_dtensor(tensor):
        return full
    for dim, (start, length) in enumerate(_extents(tensor)):
        full = full.narrow(dim, start, length)
    return full


def shard_of(tensor: Tensor) -> Shard:
    """Where the elements of this rank's part lie in the full tensor.

    Raises:
        ValueError: for partial sums, and for parts that are not rows at equal distances: of a
            tensor that is sharded along two dimensions neither of which is the first.
    """
    if not is_dtensor(tensor):
        return Shard(0, tensor.numel(), tensor.numel())
    extents, shape = _extents(tensor), tensor.shape
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    offset = sum(start * stride for (start, _), stride in zip(extents, strides, strict=True))
    cut = [dim for dim, (_, length) in enumerate(extents) if length != shape[dim]]
    if not cut:
        return Shard(0, tensor.numel(), tensor.numel())
    *outer, last = cut
    row_length = extents[last][1] * strides[last]
    if outer and math.prod(length for _, length in extents[: outer[-1]]) > 1:
        raise ValueError(
            f"a DTensor of shape {tuple(shape)} with placements {tensor.placements} has parts that "
            "are not rows at equal distances: shard it along one dimension, or along the first "
            "one and another"
        )
    return Shard(offset, row_length, shape[last] * strides[last])


def groups_of(tensor: Tensor) -> Groups:
    """Those of several ranks over which the parts of a tensor lie; none for a whole one."""
    if not is_dtensor(tensor):
        return ()
    return tuple(
        tensor.device_mesh.get_group(i)
        for i, placement in enumerate(tensor.placements)
        if hasattr(placement, "dim") and tensor.device_mesh.size(i) > 1
    )


def describe(tensor: Tensor) -> Part:
    """Raises ValueError as :func:`shard_of`."""
    return Part(shard_of(tensor), tensor.numel(), groups_of(tensor))


def whole(tensor: Tensor) -> Tensor:
    """The full tensor; of a DTensor all its ranks must ask for it."""
    if not is_dtensor(tensor):
        return tensor
    if tensor.dtype == torch.int16:
        # Neither gloo nor NCCL sends int16.
        return whole(like(tensor, local(tensor).view(torch.float16))).view(torch.int16)
    return tensor.full_tensor()


def is_placed_like(tensor: Tensor, other: Tensor) -> bool:
    if not is_dtensor(tensor) or not is_dtensor(other):
        return is_dtensor(tensor) == is_dtensor(other)
    return tensor.device_mesh == other.device_mesh and tensor.placements == other.placements


def placed(tensor: Tensor, param: Tensor) -> Tensor:
    """A tensor of a parameter's shape, placed like it.

    A DTensor that lies in other parts is put together first, by all its ranks.
    """
    if is_placed_like(tensor, param):
        return tensor
    full = whole(tensor)
    return like(param, part_of(full, param).clone()) if is_dtensor(param) else full


def of_first_rank(own: int, tensor: "DTensor") -> int:
    """The 64-bit number that the first rank of a DTensor's mesh has."""
    mesh = tensor.device_mesh
    groups = tuple(mesh.get_group(i) for i in range(mesh.ndim))
    return unsigned(int(gathered(torch.tensor(signed(own)), groups)[0]))


def holders(groups: Iterable[Groups]) -> set[int]:
    """The ranks, among all that there are, over which the parts of tensors lie."""
    each = {group for of_tensor in groups for group in of_tensor}
    return {rank for group in each for rank in dist.get_process_group_ranks(group)}


def mesh_ranks(tensors: Iterable[Tensor]) -> set[int]:
    """The ranks of DTensors' meshes, among all that there are: those with replicas too."""
    meshes = {tensor.device_mesh for tensor in tensors if is_dtensor(tensor)}
    return {rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()}


def gathered(own: Tensor, groups: Groups) -> Tensor:
    """What all ranks of the groups have, stacked; the same on each of them, in the same order."""
    own, home = own[None], own.device
    for group in groups:
        sent = own.to(device_of(group)).contiguous()
        received = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
        dist.all_gather(received, sent, group=group)
        own = torch.cat(received)
    return own.to(home)


def total(own: Tensor, groups: Groups) -> Tensor:
    """The sum of the integers that all ranks of the groups have."""
    result = own.clone()
    for group in groups:
        sent = result.to(device_of(group))
        dist.all_reduce(sent, group=group)
        result = sent.to(own.device)
    return result


def exact_total(own: Tensor, groups: Groups) -> Tensor:
    """The sum of the float64 numbers that all ranks of the groups have, with one rounding."""
    if not groups:
        return own
    every = gathered(own, groups).flatten(1).T.tolist()
    sums = [math.fsum(row) for row in every]
    return torch.tensor(sums, dtype=own.dtype, device=own.device).view_as(own)


def exact_totals(own: Tensor, groups: Sequence[Groups]) -> Tensor:
    """:func:`exact_total` of each row over its groups; rows of the same ones in one exchange."""
    result = own.clone()
    for key, rows in positions(groups).items():
        if key:
            result[rows] = exact_total(own[rows], key)
    return result


def totals(own: Sequence[int], groups: Sequence[Groups]) -> list[int]:
    """:func:`total` of each 64-bit integer over its groups, modulo 2^64."""
    result = list(own)
    for key, places in positions(groups).items():
        if key:
            sums = total(torch.tensor([own[i] for i in places]), key).tolist()
            for i, value in zip(places, sums, strict=True):
                result[i] = value
    return result


def device_of(group: dist.ProcessGroup | None) -> torch.device:
    """Where the group's backend takes tensors: a processor's memory if it can."""
    config = dist.get_backend_config(group)
    devices = [part.partition(":")[0] for part in config.split(",")]
    if "cpu" in devices:
        return torch.device("cpu")
    return torch.device(devices[0], torch.get_device_module(devices[0]).current_device())


def _extents(tensor: "DTensor") -> list[tuple[int, int]]:
    """For each dimension the start and the length of this rank's part."""
    extents = [(0, length) for length in tensor.shape]
    for i in _order(tensor.placements):
        placement = tensor.placements[i]
        if placement.is_partial():
            raise ValueError(
                f"a DTensor with placements {tensor.placements} holds partial sums: redistribute "
                "it first"
            )
        if not hasattr(placement, "dim"):
            continue
        dim = placement.dim % tensor.ndim
        start, length = extents[dim]
        # As torch.chunk does: the last parts are shorter, or empty.
        size = -(-length // tensor.device_mesh.size(i))
        first = min(size * tensor.device_mesh.get_local_rank(i), length)
        extents[dim] = start + first, min(size, length - first)
    wanted = tuple(length for _, length in extents)
    given = tuple(local(tensor).shape)
    if given != wanted:
        raise ValueError(
            f"a DTensor of shape {tuple(tensor.shape)} with placements {tensor.placements} should "
            f"have a part of shape {wanted} on this rank, not {given}"
        )
    return extents


def _order(placements: Sequence) -> list[int]:
    """The mesh dimensions in the order in which they cut: what FSDP shards, tensor parallelism has
    cut before."""
    return sorted(range(len(placements)), key=lambda i: hasattr(placements[i], "split_factor"))
