"""Zeroth-order optimizers on DTensors: bit for bit the run of one process with whole weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
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


def population(cases: list[Case]) -> list[tuple[list[Tensor], int]]:
    found = []
    for case in cases:
        model, opt = make(case, parallel="population")
        evaluate, calls = loss_of(model), []

        def closure(evaluate: Callable = evaluate, calls: list = calls) -> Tensor:
            calls.append(1)
            return evaluate()

        for _ in range(STEPS):
            opt.step(closure)
        opt.assert_in_sync()
        weights = [whole(param.detach()).clone() for param in model.parameters()]
        found.append((weights, len(calls)))
    return found


def test_ranks_with_parts_of_one_copy_evaluate_the_same_points_of_a_population(tmp_path):
    copies = (Replicate(), Shard(0))
    cases: list[Case] = [
        ("gv", "float32", ROWS),
        ("gv", "float32", copies),
        ("gv", "master", copies),
        ("greedy", "split8", copies),
    ]
    of_ranks = ranks.run(population, 4, tmp_path, cases)
    for i, (method, storage, placements) in enumerate(cases):
        model, opt = make((method, storage, ()))
        calls = zo.METHODS[method].evaluations * STEPS
        train(model, opt)
        for found, count in (of_rank[i] for of_rank in of_ranks):
            assert zo.same(found, zo.weights(model)), (method, storage, placements)
            assert count == calls if placements == ROWS else calls // 2 <= count < calls


class Net(nn.Module):
    """With parameters of its own, which FSDP2 leaves gathered after a forward pass."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList([nn.Linear(10, 10), nn.Linear(10, 10)])
            self.scale = nn.Parameter(torch.rand(10))
            self.head = nn.Linear(10, 4)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x)) * self.scale
        return self.head(x)


def net(storage: str, mesh: Any = None, **arguments: Any) -> tuple[nn.Module, zokern.ZOOptimizer]:
    own = dict(STORAGES[storage])
    model = Net(own.pop("dtype"))
    if mesh is not None:
        if mesh.ndim > 1:
            shard(model, mesh["tp"], COLUMNS)
            mesh = mesh["dp"]
        fully_shard(model.blocks[0], mesh=mesh)
        fully_shard(model.blocks[1], mesh=mesh, reshard_after_forward=False)
        fully_shard(model, mesh=mesh)
        own |= {"module": model, "process_group": dist.group.WORLD}
    own |= {"lr": 0.01, "eps": 0.01, "seed": 3, **arguments}
    return model, zokern.MeZO(model.named_parameters(), **own)


def loss_of_batch(model: nn.Module, part: slice = slice(None)) -> Tensor:
    x, y = zo.X[part].to(next(model.parameters()).dtype), zo.Y[part]
    return nn.functional.cross_entropy(model(x).float(), y)


def with_fsdp(storages: list[str]) -> list[tuple[list[float], list[Tensor]]]:
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    found = []
    for storage in storages:
        for part in (slice(None), slice(rank, None, 2)):
            model, opt = net(storage, mesh)
            losses = []
            for _ in range(STEPS):
                opt.step(lambda model=model, part=part: loss_of_batch(model, part))
                losses += opt.last.losses
            opt.flush()
            model.reshard()
            weights = [whole(param.detach()).clone() for param in model.parameters()]
            found.append((losses, weights))
    return found


def test_fsdp2_sees_the_weights_where_they_stand(tmp_path):
    storages = ["float32", "momentum", "fused"]
    of_ranks = ranks.run(with_fsdp, 2, tmp_path, storages)
    runs = [(storage, own) for storage in storages for own in (False, True)]
    for i, (storage, own) in enumerate(runs):
        model, opt = net(storage)

        def closure(model: nn.Module = model, own: bool = own) -> Tensor:
            if not own:
                return loss_of_batch(model)
            return sum(loss_of_batch(model, slice(rank, None, 2)).double() for rank in range(2)) / 2

        losses = []
        for _ in range(STEPS):
            opt.step(lambda: float(closure()))
            losses += opt.last.losses
        opt.flush()
        for found in of_ranks:
            assert found[i][0] == losses
            assert zo.same(found[i][1], zo.weights(model)), (storage, own)
