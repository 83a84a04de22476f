"""mergekit's and peft's own merges, tensor by tensor, for state dicts of the same names."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from zokern import noise

State = dict[str, Tensor]


def with_mergekit(method: str, base: State | None, models: list[State], **parameters) -> State:
    """By the method that mergekit has under that name; parameters in its words."""
    registry = pytest.importorskip("mergekit.merge_methods.registry")
    from mergekit.merge_methods.base import TensorBatch, TensorGroup

    merge = registry.get(method)
    weights = parameters.pop("weight")
    if base is None:
        result = {}
        for name in models[0]:
            batch = TensorBatch([model[name][None] for model in models])
            weight = torch.tensor([weights])
            result[name] = merge.merge_batch(batch, weight=weight, **parameters)[0]
        return result
    given = {spec.name: spec.default for spec in merge.spec.parameters} | parameters
    ids = range(1, len(models) + 1)
    given["weight"] = dict(zip(ids, weights, strict=True))
    if "density" in parameters:
        given["density"] = dict(zip(ids, parameters["density"], strict=True))
    result = {}
    for name in base:
        tensors = [base[name], *(model[name] for model in models)]
        result[name] = merge.merge_group(TensorGroup.from_tensors(tensors, base_index=0), **given)
    return result


def with_peft(method: str, models: list[State], weights: list[float], *arguments) -> State:
    """By peft's function of that name, of models that are deltas themselves."""
    functions = pytest.importorskip("peft.utils.merge_utils")
    function = getattr(functions, method)
    return {
        name: function([model[name] for model in models], torch.tensor(weights), *arguments)
        for name in models[0]
    }


def with_paper(base: State, models: list[State], density: float, how: str, lambda_: float) -> State:
    """TIES as its authors' code does it: over all tensors in one vector."""
    start = torch.cat([tensor.flatten() for tensor in base.values()])
    deltas = torch.stack(
        [torch.cat([model[name].flatten() for name in base]) - start for model in models]
    )
    for row in deltas:
        smallest = row.numel() - int(row.numel() * density)
        row[row.abs() < row.abs().kthvalue(smallest).values] = 0
    signs = deltas.sum(0).sign()
    signs[signs == 0] = signs.sum().sign()
    agree = torch.where(signs > 0, deltas > 0, deltas < 0)
    agreeing = deltas * agree
    if how == "mean":
        combined = agreeing.sum(0) / agree.sum(0).clamp(min=1)
    else:
        combined = agreeing.sum(0) if how == "sum" else agreeing.abs().amax(0) * signs
    merged = (start + lambda_ * combined).split([tensor.numel() for tensor in base.values()])
    return {name: part.view(base[name].shape) for name, part in zip(base, merged, strict=True)}


@contextmanager
def our_masks(names: list[str], densities: list[float], seed: int, monkeypatch) -> Iterator[None]:
    """Peers draw their masks from zokern's words: of each tensor in turn, model by model."""
    asked = iter([(name, m) for name in names for m, d in enumerate(densities) if d < 1])

    def bernoulli(probabilities: Tensor, *_: object) -> Tensor:
        name, m = next(asked)
        words = noise.sample(
            "uniform32",
            probabilities.numel(),
            seed=seed,
            draw=m,
            tensor_id=noise.tensor_id(name),
        )
        kept = words < int(densities[m] * 2**32)
        return kept.view(probabilities.shape).to(probabilities.dtype)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "bernoulli", bernoulli)
        yield
    assert next(asked, None) is None
