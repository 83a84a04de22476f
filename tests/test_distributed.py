"""Several processes make one run: equal weights, errors on every rank, and a run that is killed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import zokern
from tests import ranks, zo
from zokern.distributed import mean

STEPS = 3

# How the weights are kept and evaluated.
STORAGES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "layerwise": {"dtype": torch.bfloat16, "layerwise": True},
    "split8": {"dtype": torch.bfloat16, "precision": "split8"},
    "master": {"dtype": torch.bfloat16, "precision": "master"},
    "fused": {"dtype": torch.float32, "fuse_next": True},
    "momentum": {"dtype": torch.float32, "momentum": 0.9},
}
Case = tuple[str, str]
FEW: list[Case] = [("mezo", "float32"), ("mezo", "layerwise")]
WITH_DATA: dict[int, list[Case]] = {
    2: [
        *(("mezo", storage) for storage in STORAGES),
        *((method, "float32") for method in ("zopro", "conmezo", "gv", "sign")),
    ],
    3: FEW,
    4: FEW,
}
POOLS: list[Case] = [
    (method, "float32") for method in ("mezo", "mezo, 3 samples", "gv", "greedy", "fzoo")
]
AS_POPULATION: dict[int, list[Case]] = {
    1: [("gv", "float32")],
    2: [*POOLS, ("gv", "layerwise"), ("gv", "master"), ("gv", "split8"), ("gv", "fused")],
    3: [*POOLS, ("gv, 2 samples", "layerwise")],
    4: [*POOLS, ("fzoo", "master")],
}


def world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def make(case: Case, **arguments: Any) -> tuple[nn.Module, zokern.ZOOptimizer]:
    method, storage = case
    own = dict(STORAGES[storage])
    model = zo.make_model(own.pop("dtype"))
    if "layerwise" in own:
        own["module"] = model
    return model, zo.METHODS[method].make(model, eps=0.01, **{**own, **arguments})


def loss_of_part(model: nn.Module, rank: int, size: int) -> float:
    """Of one rank's own batch, on another scale on each, so that the order of a sum shows."""
    dtype = next(model.parameters()).dtype
    x, y = zo.X[rank::size], zo.Y[rank::size]
    return float(F.cross_entropy(model(x.to(dtype)).float(), y)) * 0.1 ** (3 * rank)


def train(model: nn.Module, opt: zokern.ZOOptimizer, closure: Callable) -> list[Tensor]:
    for _ in range(STEPS):
        opt.step(closure)
    opt.flush()
    return zo.weights(model)


def with_data(cases: list[Case]) -> list[list[Tensor]]:
    rank, size = dist.get_rank(), dist.get_world_size()
    found = []
    for case in cases:
        model, opt = make(case, process_group=world())
        found.append(train(model, opt, lambda model=model: loss_of_part(model, rank, size)))
        opt.assert_in_sync()
    return found


@pytest.mark.parametrize("size", WITH_DATA)
def test_ranks_with_data_of_their_own_are_one_process_that_averages(size, tmp_path):
    of_ranks = ranks.run(with_data, size, tmp_path, WITH_DATA[size])
    for i, case in enumerate(WITH_DATA[size]):
        model, opt = make(case)

        def closure(model: nn.Module = model) -> float:
            total = 0.0
            for rank in range(size):
                total += loss_of_part(model, rank, size)
            return total / size

        expected = train(model, opt, closure)
        assert not zo.same(expected, zo.weights(make(case)[0]))
        for found in of_ranks:
            assert zo.same(found[i], expected), case


class Evaluations:
    """A closure with dropout that counts its calls."""

    def __init__(self, model: nn.Module) -> None:
        self._loss, self._model = zo.loss_of(model), model
        self.count = 0

    def __call__(self) -> Tensor:
        self.count += 1
        return self._loss() + 0.1 * F.dropout(torch.ones(64)).mean()


def as_population(cases: list[Case]) -> list[tuple[list[Tensor], int]]:
    found = []
    for case in cases:
        torch.manual_seed(5)
        model, opt = make(case, process_group=world(), parallel="population")
        closure = Evaluations(model)
        found.append((train(model, opt, closure), closure.count))
        opt.assert_in_sync()
    return found


@pytest.mark.parametrize("size", AS_POPULATION)
def test_a_population_on_several_ranks_is_one_process_that_evaluates_all(size, tmp_path):
    of_ranks = ranks.run(as_population, size, tmp_path, AS_POPULATION[size])
    for i, case in enumerate(AS_POPULATION[size]):
        torch.manual_seed(5)
        model, opt = make(case)
        closure = Evaluations(model)
        expected = train(model, opt, closure)
        for found in of_ranks:
            assert zo.same(found[i][0], expected), case
        counts = [found[i][1] for found in of_ranks]
        # Ranks that are left over evaluate a point again, in each of at most two rounds.
        assert closure.count <= sum(counts) <= closure.count + 2 * STEPS * (size - 1)
        assert max(counts) <= closure.count / size + 2 * STEPS


def test_the_mean_of_equal_losses_is_that_loss_and_others_are_added_in_order():
    assert mean([0.1, 0.1, 0.1]) == 0.1
    assert mean([1e16, 1.0, 1.0, -1e16]) == ((1e16 + 1.0) + 1.0 - 1e16) / 4
    assert mean([1.0, 1.0, 1e16, -1e16]) != mean([1e16, 1.0, 1.0, -1e16])
