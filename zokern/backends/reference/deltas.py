"""A merge of several models over a base, said plainly; its order is in :mod:`zokern.deltas`."""

import torch
from torch import Tensor

from zokern.backends.reference.noise import values_at
from zokern.backends.reference.values import magnitudes
from zokern.deltas import DeltaMerge


def merge_deltas(merge: DeltaMerge) -> None:
    for i, out in enumerate(merge.outs):
        if out.numel() > 0:
            _merge_tensor(merge, i)


def _merge_tensor(merge: DeltaMerge, i: int) -> None:
    out = merge.outs[i]

    def number(x: float) -> Tensor:
        return torch.tensor(x, dtype=torch.float32, device=out.device)

    deltas = [_masked(merge, m, i) for m in range(len(merge.models))]
    weighted = [
        _rounded(merge, m, i, number(merge.weights[m]) * delta) for m, delta in enumerate(deltas)
    ]
    total = _combined(merge, deltas, weighted, number)
    if merge.combine != "sign":
        total = number(merge.scale) * total
    if merge.combine != "sign" and merge.bases is not None:
        total = merge.bases[i].flatten().float() + total
    out.copy_(total.view(out.shape))


def _rounded(merge: DeltaMerge, m: int, i: int, values: Tensor) -> Tensor:
    return values.to(merge.models[m][i].dtype).float() if merge.rounded else values


def _masked(merge: DeltaMerge, m: int, i: int) -> Tensor:
    """A model's delta in float32, of one dimension, times the ratio where it is kept, else 0."""
    delta = merge.models[m][i].flatten().float()
    if merge.bases is not None:
        delta = _rounded(merge, m, i, delta - merge.bases[i].flatten().float())
    kept = torch.where(_kept(merge, m, i, delta), delta, 0.0)
    return kept if merge.ratios is None else _rounded(merge, m, i, merge.ratios[m, i] * kept)


def _kept(merge: DeltaMerge, m: int, i: int, delta: Tensor) -> Tensor:
    elements = torch.arange(delta.numel(), device=delta.device)
    if merge.thresholds is not None:
        assert merge.cuts is not None
        magnitude, threshold = magnitudes(delta), magnitudes(merge.thresholds[m, i])
        below_cut = elements < merge.cuts[m, i]
        return (magnitude > threshold) | ((magnitude == threshold) & below_cut)
    if merge.limits[m] == 1 << 32:
        return torch.ones_like(elements, dtype=torch.bool)
    words = values_at(
        "uniform32",
        elements,
        seed=merge.seed,
        draw=merge.draws[m],
        tensor_id=merge.tensor_ids[i],
    )
    return words < merge.limits[m]


def _combined(merge: DeltaMerge, deltas: list[Tensor], weighted: list[Tensor], number) -> Tensor:
    votes = weighted if merge.votes == "weighted" else deltas
    zero = torch.zeros_like(deltas[0])
    elected = zero
    for vote in votes:
        ballot = (vote > 0).float() - (vote < 0).float() if merge.votes == "frequency" else vote
        elected = elected + ballot
    if merge.combine == "sign":
        return (elected > 0).float() - (elected < 0).float()
    up = (elected > 0) | ((elected == 0) & merge.zero_up)
    # +1 for the votes that agree, -1 for those that do not; all agree where there is no election.
    sign = torch.where(up, 1.0, -1.0)
    total, count = zero, zero
    for weight, vote, p in zip(merge.weights, votes, weighted, strict=True):
        side = vote.abs() if merge.votes == "none" else sign * vote
        if merge.combine == "max":
            larger = ~(side < 0) & ~(p.abs() <= total) & ~total.isnan()
            total = torch.where(larger, p.abs(), total)
            continue
        total = total + torch.where(side < 0, 0.0, p)
        one = number(weight if merge.votes == "weighted" else 1.0)
        count = count + torch.where(side > 0, one, 0.0)
    if merge.combine == "max":
        return sign * total
    if merge.combine == "mean":
        return total / torch.where(count == 0, 1.0, count)
    return total / number(merge.divisor)
