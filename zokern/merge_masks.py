"""Which elements of the models' deltas a merge keeps, and what brings these back to scale."""

from collections.abc import Callable

import torch
from torch import Tensor

from zokern import ops
from zokern.merge_inputs import Entry
from zokern.merge_recipe import Batch, Recipe
from zokern.merging import Differences, Mask
from zokern.sweep import Shard

# mergekit leaves deltas alone whose norm, or whose masked norm, is below this.
SMALL_NORM = 1e-7

Advance = Callable[[int], object]


def limit_of(density: float) -> int:
    """A word below it keeps its element."""
    return int(density * 2.0**32)


def mask_of(recipe: Recipe, batch: Batch, m: int, joined: list[float] | None) -> Mask:
    """A model's; ``joined`` has the threshold of each model where tensors are joined."""
    count, numels = len(batch.ids), batch.numels
    thresholds = cuts = None
    if joined is not None:
        thresholds = torch.full((count,), joined[m], device=batch.device)
        cuts = torch.tensor(numels, device=batch.device)
    elif recipe.masks == "magnitude":
        least = int(recipe.at_least_one)
        k = [n if (d := recipe.densities[m]) >= 1 else max(least, int(d * n)) for n in numels]
        thresholds, cuts = _thresholds(batch, m, k)
    return Mask(
        thresholds=thresholds,
        cuts=cuts,
        draws=torch.full((count,), m),
        limits=torch.full((count,), limit_of(recipe.densities[m])),
        shards=[Shard(0, n, n) for n in numels],
        tensor_ids=batch.ids,
        seed=recipe.seed,
    )


def _thresholds(batch: Batch, m: int, k: list[int]) -> tuple[Tensor, Tensor]:
    values = Differences(batch.models[m], batch.bases, batch.rounded)
    try:
        return ops.difference_threshold(values, k)
    except ValueError:
        _check_no_nan(batch.entries, m)
        raise


def _check_no_nan(entries: list[Entry], m: int) -> None:
    for entry in entries:
        delta = entry.models[m].float()
        if entry.base is not None:
            delta = delta - entry.base.float()
        if delta.isnan().any():
            raise ValueError(f"{entry.names[0]} of models[{m}], less the base, has NaN")


def ratios_of(recipe: Recipe, batch: Batch, masks: list[Mask]) -> Tensor | None:
    """What each model's masked deltas are multiplied with; None for 1."""
    if recipe.rescale is None:
        return None
    shape = len(masks), len(batch.ids)
    if recipe.rescale == "inverse":
        inverse = 1 / torch.tensor(recipe.densities, dtype=torch.float64)
        return inverse.float().to(batch.device)[:, None].expand(shape).contiguous()
    # As mergekit: in bfloat16 the norms and their ratio are rounded to it, in float16 they are not.
    half = batch.rounded and batch.models[0][0].dtype == torch.bfloat16
    dtype = torch.bfloat16 if half else torch.float32
    rows = []
    for m, mask in enumerate(masks):
        if recipe.densities[m] >= 1:
            rows.append(torch.ones(shape[1], device=batch.device))
            continue
        values = Differences(batch.models[m], batch.bases, batch.rounded)
        whole, kept = ops.l1_sums(values, mask).to(dtype).unbind(1)
        small = (whole < SMALL_NORM) | (kept < SMALL_NORM)
        rows.append(torch.where(small, 1.0, (whole / kept).float()))
    return torch.stack(rows)


def joined_thresholds(recipe: Recipe, entries: list[Entry], advance: Advance) -> list[float]:
    """For each model that of all its tensors together; at it, all are kept.

    TIES keeps what is not below the (n - ⌊d·n⌋)-th smallest of the n magnitudes.
    """
    numel = sum(entry.like.numel() for entry in entries)
    bases = [entry.base for entry in entries if entry.base is not None] or None
    thresholds = []
    for m, density in enumerate(recipe.densities):
        tensors = [entry.models[m] for entry in entries]
        k = min(numel, int(density * numel) + 1)
        if bases is not None:
            tensors = [x.to(b.device) for x, b in zip(tensors, bases, strict=True)]
        try:
            values = Differences(tensors, bases, recipe.rounded)
            found, _ = ops.difference_threshold(values, k, joined=True)
        except ValueError:
            _check_no_nan(entries, m)
            raise
        thresholds.append(float(found[0]) if density < 1 and numel > 0 else 0.0)
        advance(numel)
    return thresholds
