"""What the forward pass sees of a perturbation: weights in half precision round it."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from zokern import noise, ops
from zokern.optim.displacement import Member

# At a time.
ELEMENTS = 1 << 24
# Of each tensor, where a look at some elements is enough.
SAMPLE = 1 << 12


@torch.no_grad()
def fidelity(
    members: Iterable[Member],
    eps: float,
    *,
    seed: int,
    draw: int,
    law: str,
    elements: int | None = None,
) -> float:
    """The cosine between the perturbation that weights show, rounded, and ε·z itself.

    ``elements`` limits how many of each tensor are looked at; they stand for all of them.
    """
    inner = seen_square = wanted_square = 0.0
    for member in members:
        numel = member.param.numel()
        count = numel if elements is None else min(numel, elements)
        for begin, value, dtype in _values(member, count):
            z = noise.sample(
                law,
                value.numel(),
                seed=seed,
                draw=draw,
                tensor_id=member.tensor_id,
                offset=begin,
                device=value.device,
            )
            wanted = eps * z.double()
            seen = (value.double() + wanted).float().to(dtype).double() - value.double()
            inner += float(seen @ wanted) * numel / count
            seen_square += float(seen @ seen) * numel / count
            wanted_square += float(wanted @ wanted) * numel / count
    norms = (seen_square * wanted_square) ** 0.5
    return inner / norms if 0 < norms < float("inf") else 0.0


def _values(member: Member, count: int) -> Iterator[tuple[int, Tensor, torch.dtype]]:
    """Where they begin, float32 values at rest, and the dtype that the forward pass sees."""
    param = member.param.detach().flatten()
    beside = member.master if member.residual is None else member.residual
    beside = None if beside is None else beside.flatten()
    for begin in range(0, count, ELEMENTS):
        part = slice(begin, min(begin + ELEMENTS, count))
        if member.master is not None and beside is not None:
            value = beside[part]
        else:
            value = ops.stored_value(param[part], None if beside is None else beside[part])
        yield begin, value, param.dtype
