"""What is done to the deltas of models, and to how many tensors at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from zokern.deltas import Combine, Votes
from zokern.laws import tensor_id
from zokern.merge_inputs import Entry

# Small tensors are merged in one call, of up to so many elements.
ELEMENTS = 1 << 22

Masks = Literal["none", "random", "magnitude", "joined"]


@dataclass(frozen=True)
class Recipe:
    """What is done to the models' deltas.

    Attributes:
        densities: for each model, the part of its delta that the mask keeps.
        masks: elements at random, or the largest of each tensor, or of all tensors ``joined``
            those not below the one that the density gives.
        at_least_one: keep an element of each tensor, however small the density.
        rescale: bring what is kept to the delta's ``l1`` norm, or multiply it with the
            ``inverse`` of the density.
        rounded: round deltas to the dtype of models and base, where these have the same.
        normalize: without votes, divide by the sum of the weights.
        resolve_zero: a sum of 0 elects the sign that most elements have; else the positive one.
    """

    weights: list[float]
    densities: list[float]
    masks: Masks = "none"
    at_least_one: bool = False
    rescale: Literal["l1", "inverse"] | None = None
    rounded: bool = False
    votes: Votes = "none"
    combine: Combine = "sum"
    normalize: bool = False
    resolve_zero: bool = False
    lambda_: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """Tensors of the same dtypes on one device, which a call merges together."""

    entries: list[Entry]
    bases: list[Tensor] | None
    models: list[list[Tensor]]
    ids: list[int]
    rounded: bool

    @property
    def device(self) -> torch.device:
        return self.models[0][0].device

    @property
    def numels(self) -> list[int]:
        return [tensor.numel() for tensor in self.models[0]]


def batches(recipe: Recipe, entries: list[Entry], device: torch.device | None) -> Iterator[Batch]:
    """The entries, those one after the other together that one call can merge."""
    waiting: list[Entry] = []
    numel = 0
    for entry in entries:
        own = entry.like.numel()
        if waiting and (_kind(entry) != _kind(waiting[0]) or numel + own > ELEMENTS):
            yield _batch(recipe, waiting, device)
            waiting, numel = [], 0
        waiting.append(entry)
        numel += own
    if waiting:
        yield _batch(recipe, waiting, device)


def _kind(entry: Entry) -> tuple:
    """What a call's tensors have in common."""
    return entry.like.device, entry.like.dtype, *(tensor.dtype for tensor in entry.models)


def _batch(recipe: Recipe, entries: list[Entry], device: torch.device | None) -> Batch:
    where = entries[0].like.device if device is None else device
    bases = [entry.base.to(where) for entry in entries if entry.base is not None]
    return Batch(
        entries=entries,
        bases=bases or None,
        models=[[e.models[m].to(where) for e in entries] for m in range(len(recipe.weights))],
        ids=[tensor_id(entry.names[0]) for entry in entries],
        rounded=recipe.rounded and entries[0].has_one_dtype,
    )
