"""How models are merged: tensor by tensor, so that few are in memory at a time."""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from zokern import ops
from zokern.checkpoints import CheckpointError, created, weight_files
from zokern.deltas import MAX_MODELS
from zokern.memory import empty_like
from zokern.merge.inputs import Entry, Model, aligned, is_path, read
from zokern.merge.masks import joined_thresholds, limit_of, mask_of, ratios_of
from zokern.merge.recipe import Batch, Recipe, batches
from zokern.progress import progress_bar
from zokern.warn import warn

# A sum of weights below this is not divided by, as in mergekit.
SMALL_WEIGHT = 1e-8

Advance = Callable[[int], object]


@torch.no_grad()
def run(
    recipe: Recipe,
    models: Sequence[Model],
    base: Model | None,
    *,
    out: str | os.PathLike | None,
    device: torch.device | str | None,
    progress: bool,
) -> dict[str, Tensor]:
    """The merged tensors; none where they are written to a path."""
    if len(models) > MAX_MODELS:
        raise ValueError(f"up to {MAX_MODELS} models are merged at once, not {len(models)}")
    where = None if device is None else torch.empty(0, device=device).device
    _check_place(out, [*models, *([] if base is None else [base])])
    read_models = [read(f"models[{m}]", model) for m, model in enumerate(models)]
    target = read_models[0] if base is None else read("base", base)
    entries = aligned(read_models, None if base is None else target)
    merged = [entry for entry in entries if entry.is_merged]
    copies = [entry for entry in entries if not entry.is_merged]
    _warn_of_copies(copies)
    joined = recipe.masks == "joined"
    if joined and not all(entry.has_one_dtype for entry in merged):
        recipe = replace(recipe, rounded=False)
    passes = 1 + len(models) * joined + recipe.resolve_zero
    numel = sum(entry.like.numel() for entry in merged)
    with (
        progress_bar(passes * numel, "merge", "param", shown=progress) as advance,
        _output(entries, models[0] if base is None else base, out) as tensors,
    ):
        for entry in copies:
            tensors[entry.names[0]].copy_(entry.like)
        thresholds = joined_thresholds(recipe, merged, advance) if joined else None
        zero_up = True
        if recipe.resolve_zero:
            zero_up = _most_are_up(recipe, merged, thresholds, where, advance)
        for batch in batches(recipe, merged, where):
            _write(recipe, batch, thresholds, zero_up, tensors)
            advance(sum(batch.numels))
        if out is not None:
            return {}
        results = {name: tensors[entry.names[0]] for entry in entries for name in entry.names}
        return {name: results[name] for name in target}


def _check_place(out: str | os.PathLike | None, inputs: list[Model]) -> None:
    """An output may not take the place of what is read."""
    for given in inputs:
        if out is not None and is_path(given):
            path = Path(given)
            files = [file.resolve() for file in (path, *weight_files(path))]
            inside = (
                Path(out).exists()
                and path.is_dir()
                and path.resolve() in Path(out).resolve().parents
            )
            if inside or Path(out).resolve() in files:
                raise CheckpointError(f"{out} is merged itself: give another place for the result")


def _warn_of_copies(copies: list[Entry]) -> None:
    differ = [
        entry.names[0]
        for entry in copies
        if not all(torch.equal(entry.like.cpu(), model.cpu()) for model in entry.models)
    ]
    if differ:
        warn(
            "integer and bool tensors are not merged but copied from the base, or from the first "
            f"model where there is none; these differ between the models: {', '.join(differ)}"
        )


def _output(
    entries: list[Entry], first: Model, out: str | os.PathLike | None
) -> AbstractContextManager[dict[str, Tensor]]:
    """The tensors to write to, by their first names."""
    if out is not None and is_path(first):
        return created(Path(first), Path(out))
    likes = {entry.names[0]: entry.like for entry in entries}
    if out is not None:
        return created(likes, Path(out))
    return nullcontext({name: empty_like(like) for name, like in likes.items()})


def _write(
    recipe: Recipe,
    batch: Batch,
    thresholds: list[float] | None,
    zero_up: bool,
    tensors: dict[str, Tensor],
) -> None:
    targets = [tensors[entry.names[0]] for entry in batch.entries]
    outs = [
        target if target.device == batch.device else torch.empty_like(target, device=batch.device)
        for target in targets
    ]
    _merge(recipe, batch, thresholds, zero_up, outs)
    for target, result in zip(targets, outs, strict=True):
        if target is not result:
            target.copy_(result)


def _merge(
    recipe: Recipe, batch: Batch, joined: list[float] | None, zero_up: bool, outs: list[Tensor]
) -> None:
    dtype = batch.models[0][0].dtype if batch.rounded else torch.float32
    weights = torch.tensor(recipe.weights, dtype=dtype)
    divisor = float(weights.sum()) if recipe.normalize else 1.0
    masks = [mask_of(recipe, batch, m, joined) for m in range(len(recipe.weights))]
    thresholds = [mask.thresholds for mask in masks if mask.thresholds is not None]
    cuts = [mask.cuts for mask in masks if mask.cuts is not None]
    ops.merge_deltas(
        outs,
        batch.models,
        bases=batch.bases,
        weights=weights.tolist(),
        ratios=ratios_of(recipe, batch, masks),
        thresholds=torch.stack(thresholds) if thresholds else None,
        cuts=torch.stack(cuts) if cuts else None,
        limits=[limit_of(density) for density in recipe.densities],
        seed=recipe.seed,
        tensor_ids=batch.ids,
        rounded=batch.rounded,
        votes=recipe.votes,
        zero_up=zero_up,
        combine=recipe.combine,
        divisor=1.0 if abs(divisor) < SMALL_WEIGHT else divisor,
        scale=recipe.lambda_,
    )


def _most_are_up(
    recipe: Recipe,
    entries: list[Entry],
    thresholds: list[float] | None,
    device: torch.device | None,
    advance: Advance,
) -> bool:
    """Whether more elements elect the positive sign than the negative one, over all tensors."""
    signs = replace(recipe, combine="sign")
    total = 0
    for batch in batches(signs, entries, device):
        outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in batch.models[0]]
        _merge(signs, batch, thresholds, True, outs)
        total += sum(int(out.sum(dtype=torch.float64)) for out in outs)
        advance(sum(batch.numels))
    return total > 0
