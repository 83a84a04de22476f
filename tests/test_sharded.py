"""Zeroth-order optimizers on DTensors: bit for bit the run of one process with whole weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import zokern
from tests import ranks, zo

STEPS = 3

STORAGES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "split8": {"dtype": torch.bfloat16, "precision": "split8"},
    "split": {"dtype": torch.float16, "precision": "split"},
    "master": {"dtype": torch.bfloat16, "precision": "master"},
    "rounded": {"dtype": torch.bfloat16, "precision": "inplace", "stochastic_rounding": True},
    "momentum": {"dtype": torch.bfloat16, "precision": "split8", "momentum": 0.9},
    "fused": {"dtype": torch.float32, "fuse_next": True},
}
# A method, how weights are kept, and the placements on a mesh.
Case = tuple[str, str, tuple]
ROWS, COLUMNS = (Shard(0),), (Shard(1),)


def mesh_of(placements: tuple) -> Any:
    size = dist.get_world_size()
    return init_device_mesh("cpu", (size,) if len(placements) == 1 else (2, size // 2))


def shard(model: nn.Module, mesh: Any, placements: tuple) -> nn.Module:
    """The same model of DTensors; a vector that cannot be cut in columns is cut in rows."""
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            own = tuple(
                Shard(min(p.dim, param.ndim - 1)) if isinstance(p, Shard) else p for p in placements
            )
            tensor = distribute_tensor(param.detach(), mesh, own, src_data_rank=None)
            setattr(module, name, nn.Parameter(tensor))
    return model


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def make(case: Case, **arguments: Any) -> tuple[nn.Module, zokern.ZOOptimizer]:
    """On whole weights where the placements are ()."""
    method, storage, placements = case
    own = dict(STORAGES[storage])
    model = zo.make_model(own.pop("dtype"))
    # Before, as they are made like the weights.
    vectors = zo.vectors(model) if method.startswith("zopro") else {}
    if placements:
        shard(model, mesh_of(placements), placements)
        own["process_group"] = dist.group.WORLD
    return model, zo.METHODS[method].make(model, eps=0.01, **{**vectors, **own, **arguments})


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    """Of the whole weights, in the arithmetic of one process."""
    twin = zo.make_model(next(model.parameters()).dtype)

    def closure() -> Tensor:
        for own, param in zip(twin.parameters(), model.parameters(), strict=True):
            own.data.copy_(whole(param.detach()))
        return zo.loss_of(twin)()

    return closure


def train(model: nn.Module, opt: zokern.ZOOptimizer, steps: int = STEPS) -> list[Tensor]:
    """The weights and what is kept beside them, whole."""
    closure = loss_of(model)
    for _ in range(steps):
        opt.step(closure)
    opt.flush()
    found = []
    for param in model.parameters():
        for tensor in (param.detach(), *opt.state[param].values()):
            assert isinstance(tensor, DTensor) == isinstance(param, DTensor)
            found.append(whole(tensor).clone())
    return found


def trained(cases: list[Case]) -> list[list[Tensor]]:
    found = []
    for case in cases:
        model, opt = make(case)
        found.append(train(model, opt))
        opt.assert_in_sync()
    return found


FEW: list[Case] = [
    ("mezo", "momentum", ROWS),
    ("mezo", "float32", COLUMNS),
    ("zopro", "float32", COLUMNS),
    ("conmezo", "float32", ROWS),
]
CASES: dict[int, list[Case]] = {
    2: [
        *(("mezo", storage, ROWS) for storage in STORAGES),
        *(("mezo", storage, COLUMNS) for storage in ("split8", "master", "rounded", "momentum")),
        *((method, "float32", ROWS) for method in zo.METHODS if method != "mezo"),
    ],
    # Some ranks have shorter parts, or none.
    3: [*FEW, ("mezo", "split8", COLUMNS), ("greedy", "master", ROWS), ("gv", "float32", COLUMNS)],
    4: [
        *FEW,
        ("mezo", "split8", (Shard(0), Shard(1))),
        ("zopro", "float32", (Shard(0), Shard(0))),
        ("conmezo", "master", (Replicate(), Shard(1))),
        ("mezo", "float32", (Replicate(), Replicate())),
    ],
}


@pytest.mark.parametrize("size", CASES)
def test_shards_are_trained_as_one_process_trains_the_whole(size, tmp_path):
    of_ranks = ranks.run(trained, size, tmp_path, CASES[size])
    for i, (method, storage, placements) in enumerate(CASES[size]):
        expected = train(*make((method, storage, ())))
        for found in of_ranks:
            assert zo.same(found[i], expected), (method, storage, placements)
