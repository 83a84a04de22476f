"""What the forward pass sees of a perturbation: weights in half precision round it."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from zokern import noise, ops
from zokern.optim.displacement import Member
from zokern.sharding import Groups, exact_total, groups_of
from zokern.sweep import Shard

# At a time.
ELEMENTS = 1 << 24
# Of each tensor, where a look at some elements is enough.
SAMPLE = 1 << 12


@torch.no_grad()
def fidelity(members: Iterable[Member], eps: float, *, seed: int, draw: int, law: str) -> float:
    """The cosine between the perturbation that weights show, rounded, and ε·z itself.

    All ranks that hold parts of the weights must call it.
    """
    by_groups: dict[Groups, Tensor] = {}
    for member in members:
        sums = _sums(member, member.param.numel(), eps, seed=seed, draw=draw, law=law)
        groups = groups_of(member.whole)
        by_groups[groups] = by_groups.get(groups, 0.0) + sums
    return _cosine(exact_total(sums, groups) for groups, sums in by_groups.items())


@torch.no_grad()
def sampled_fidelity(
    members: Iterable[Member], eps: float, *, seed: int, draw: int, law: str
) -> float:
    """The same by some elements of each tensor, which stand for all that this rank has of it."""
    return _cosine(
        _sums(member, min(member.param.numel(), SAMPLE), eps, seed=seed, draw=draw, law=law)
        for member in members
    )


def _cosine(sums: Iterable[Tensor]) -> float:
    inner, seen_square, wanted_square = torch.stack(list(sums)).sum(0).tolist()
    norms = (seen_square * wanted_square) ** 0.5
    return inner / norms if 0 < norms < float("inf") else 0.0


def _sums(member: Member, count: int, eps: float, *, seed: int, draw: int, law: str) -> Tensor:
    """seen·wanted, seen·seen and wanted·wanted; ``count`` elements stand for all."""
    sums = torch.zeros(3, dtype=torch.float64)
    param = member.param.detach().flatten()
    beside = member.master if member.residual is None else member.residual
    beside = None if beside is None else beside.flatten()
    for piece, shard in _pieces(member.shard or Shard(0, len(param), len(param)), count):
        if member.master is not None and beside is not None:
            value = beside[piece]
        else:
            value = ops.stored_value(param[piece], None if beside is None else beside[piece])
        stream = {"seed": seed, "draw": draw, "tensor_id": member.tensor_id}
        z = _noise(law, len(value), shard, **stream, device=value.device)
        wanted = eps * z.double()
        seen = (value.double() + wanted).float().to(param.dtype).double() - value.double()
        sums += torch.stack([seen @ wanted, seen @ seen, wanted @ wanted]).cpu()
    return sums * (len(param) / count) if count else sums


def _pieces(shard: Shard, count: int) -> Iterator[tuple[slice, Shard]]:
    """Of the first ``count`` elements of a shard: whole rows of it, or a piece of a long one."""
    begin = 0
    while begin < count:
        row, column = divmod(begin, shard.row_length)
        length = min(ELEMENTS, count - begin, shard.row_length - column)
        row_length = length
        if length == shard.row_length:
            length *= max(1, min(ELEMENTS // shard.row_stride, (count - begin) // length))
        offset = shard.offset + row * shard.row_stride + column
        yield slice(begin, begin + length), Shard(offset, row_length, shard.row_stride)
        begin += length


def _noise(law: str, numel: int, shard: Shard, **stream: Any) -> Tensor:
    """Of all between the first and the last row, those of the rows."""
    rows, length, stride = numel // shard.row_length, shard.row_length, shard.row_stride
    between = noise.sample(law, (rows - 1) * stride + length, offset=shard.offset, **stream)
    return between.as_strided((rows, length), (stride, 1)).flatten()
