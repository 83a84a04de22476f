"""mergekit's and peft's own merges, tensor by tensor, for state dicts of the same names."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from zokern import noise
from zokern.bench import peers
from zokern.bench.peers import State


def with_mergekit(*arguments, **parameters) -> State:
    """As :func:`zokern.bench.peers.with_mergekit`; skips the test without mergekit."""
    pytest.importorskip("mergekit")
    return peers.with_mergekit(*arguments, **parameters)


def with_peft(*arguments) -> State:
    """As :func:`zokern.bench.peers.with_peft`; skips the test without peft."""
    pytest.importorskip("peft")
    return peers.with_peft(*arguments)


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
