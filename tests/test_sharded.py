"""Zeroth-order optimizers on DTensors: bit for bit the run of one process with whole weights."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import zokern
from tests import ranks, zo
from tests.ranks import error_of
from zokern import sharding

STEPS = 3
SHAPES = [(5, 4), (2, 3), (7,)]

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
    shape = (size,) if len(placements) == 1 else (2, size // 2)
    return init_device_mesh(ranks.device().type, shape)


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
        model.to(ranks.device())
        shard(model, mesh_of(placements), placements)
        own["process_group"] = dist.group.WORLD
    return model, zo.METHODS[method].make(model, eps=0.01, **{**vectors, **own, **arguments})


def loss_of(model: nn.Module, make_twin: Callable = zo.make_model) -> Callable[[], Tensor]:
    """Of the whole weights, in the arithmetic of one process."""
    twin = make_twin(next(model.parameters()).dtype)

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
            found.append(whole(tensor).to("cpu", copy=True))
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


@pytest.mark.parametrize("kind", ranks.DEVICES)
@pytest.mark.parametrize("size", CASES)
def test_shards_are_trained_as_one_process_trains_the_whole(size, kind, tmp_path):
    of_ranks = ranks.run(trained, size, tmp_path, CASES[size], kind=kind)
    for i, (method, storage, placements) in enumerate(CASES[size]):
        model, opt = make((method, storage, ()))
        start, expected = zo.weights(model), train(model, opt)
        assert not zo.same(start, zo.weights(model))
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
                with torch.no_grad():
                    # As users evaluate between steps: it leaves copies behind.
                    loss_of_batch(model)
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


def checkpointed(folder: Path, cases: list[dict], saves: bool) -> list[list[Tensor]]:
    """Two steps and a checkpoint, or the checkpoint of another world and two steps more."""
    found = []
    for i, case in enumerate(cases):
        mesh = None
        if dist.is_initialized():
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        seed = {} if saves else {"seed": 4}
        model, opt = net("split8", mesh, **case, **seed)
        closure = loss_of(model, Net)
        if saves:
            for _ in range(2):
                opt.step(closure)
        weights, state = get_state_dict(model, opt)
        path = folder / f"checkpoint-{i}"
        if saves:
            dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path)
        else:
            for tensor in (*weights.values(), *opt.state[model.scale].values()):
                tensor.zero_()
            dcp.load({"model": weights, "optimizer": state}, checkpoint_id=path)
            set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=state)
        for _ in range(2):
            opt.step(closure)
        found.append([whole(param.detach()).clone() for param in model.parameters()])
    return found


def test_a_distributed_checkpoint_goes_on_in_a_world_of_another_size(tmp_path):
    cases: list[dict] = [{"momentum": 0.9}, {"precision": "master"}]
    first = ranks.run(checkpointed, 2, tmp_path, tmp_path, cases, True)
    later = ranks.run(checkpointed, 3, tmp_path, tmp_path, cases, False)
    alone = checkpointed(tmp_path, cases, False)
    for i, case in enumerate(cases):
        model, opt = net("split8", **case)
        for _ in range(4):
            opt.step(loss_of(model, Net))
        for found in (*first, *later, alone):
            assert zo.same(found[i], zo.weights(model)), case


def refused() -> dict[str, str]:
    mesh = init_device_mesh("cpu", (2,))
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    sharded, fsdp, plain = zo.make_model(), net("float32", mesh)[0], zo.make_model()
    shard(sharded, mesh, ROWS)
    columns = distribute_tensor(torch.zeros(4, 4), mesh, COLUMNS)
    rows = distribute_tensor(torch.zeros(4, 4), mesh, ROWS)
    run = zokern.Trajectory()
    plain_run = zokern.MeZO(plain.named_parameters(), lr=0.1, seed=0, trajectory=run)
    plain_run.step(zo.loss_of(plain))

    def build(params: Any = None, **arguments: Any) -> None:
        params = sharded.named_parameters() if params is None else params
        zokern.MeZO(params, lr=0.1, **{"process_group": dist.group.WORLD, **arguments})

    def partial() -> None:
        tensor = DTensor.from_local(torch.zeros(4), mesh, [Partial()])
        build([("w", nn.Parameter(tensor))])

    def gathered() -> None:
        with torch.no_grad():
            fsdp(zo.X)
        build(list(fsdp.named_parameters()), module=fsdp)

    def unknown() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr("torch.distributed._composable_state._module_state_mapping")
            build(module=sharded)
            build()

    return {
        "unknown": error_of(unknown),
        "partial": error_of(partial),
        "layerwise": error_of(lambda: build(module=sharded, layerwise=True)),
        "joining": error_of(
            lambda: zokern.MeZO(
                [("w", nn.Parameter(torch.zeros(3)))], lr=0.1, process_group=dist.group.WORLD
            ).add_param_group({"params": [("rows", nn.Parameter(rows))]})
        ),
        "no group": error_of(lambda: build(process_group=None)),
        "another group": error_of(lambda: build(process_group=alone)),
        "no module": error_of(lambda: build(fsdp.named_parameters())),
        "part of it": error_of(lambda: build(fsdp.named_parameters(), module=fsdp.blocks)),
        "gathered": error_of(gathered),
        "trajectory": error_of(lambda: build(trajectory=zokern.Trajectory())),
        "replay": error_of(lambda: zokern.replay(sharded, run)),
        "residual": error_of(
            lambda: zokern.ops.perturb_(
                [rows.bfloat16()], [0], [1.0], seed=0, residuals=[columns.to(torch.int16)]
            )
        ),
    }


def test_what_cannot_be_trained_in_parts_is_refused(tmp_path):
    for found in ranks.run(refused, 2, tmp_path):
        for case, expected in {
            "unknown": "ValueError: 0.weight is sharded by FSDP2",
            "partial": "ValueError: MeZO cannot move w: a DTensor with placements (Partial(sum),) "
            "holds partial sums",
            "layerwise": "ValueError: layerwise=True evaluates plain tensors and what FSDP2 "
            "(fully_shard) gathers, and the module has other DTensors: take layerwise=False",
            "no group": "ValueError: parameters are DTensors of the ranks [0, 1], which must all "
            "take the same steps by the same losses: process_group must be a group of all of them, "
            "such as torch.distributed.group.WORLD, not none",
            "another group": "torch.distributed.group.WORLD, not one of the ranks [",
            "joining": "ValueError: parts of the parameters lie on ranks [0, 1], those of the "
            "parameters before on [",
            "no module": "ValueError: blocks.0.weight is sharded by FSDP2, whose modules keep",
            "part of it": "ValueError: scale is sharded by FSDP2, whose modules keep copies",
            "gathered": "ValueError: scale is a copy that FSDP2 had gathered, not the weight",
            "trajectory": "TrajectoryError: 0.weight is a DTensor, whose parts lie on several",
            "replay": "TrajectoryError: 0.weight is a DTensor, whose parts lie on several ranks",
            "residual": "ValueError: residuals[0] is a DTensor with placements (Shard(dim=1),)",
        }.items():
            assert expected in found[case], case


def various() -> dict[str, Any]:
    found: dict[str, Any] = {}
    model, opt = make(("mezo", "momentum", COLUMNS))
    found["fidelity"] = opt.probe_fidelity()
    opt.step(loss_of(model))

    twin, twin_opt = copy.deepcopy((model, opt))
    found["copy"] = [train(*each, 1) for each in ((model, opt), (twin, twin_opt))]
    found["pickle"] = error_of(lambda: pickle.dumps(opt))

    # The state of whole weights is cut, that of parts is gathered.
    other, whole_run = make(("mezo", "momentum", ()))
    whole_run.load_state_dict(opt.state_dict())
    for own, param in zip(other.parameters(), model.parameters(), strict=True):
        own.data.copy_(whole(param.detach()))
    found["gathered"] = train(other, whole_run, 1)
    again, cut = make(("mezo", "momentum", ROWS))
    again_state = whole_run.state_dict()
    cut.load_state_dict(again_state)
    for own, param in zip(again.parameters(), other.parameters(), strict=True):
        own.data.copy_(distribute_tensor(param.detach(), own.device_mesh, own.placements))
    found["cut"] = train(again, cut, 1)

    module = shard(zo.make_model(torch.bfloat16), mesh_of(ROWS), ROWS)
    auto = zokern.MeZO(
        module.named_parameters(), lr=0.1, module=module, process_group=dist.group.WORLD
    )
    residual = auto.state[module[0].weight]["residual"]
    found["auto"] = auto.run["layerwise"], residual.dtype, residual.placements == ROWS

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    both = shard(zo.make_model(), mesh["tp"], ROWS)
    fully_shard(both, mesh=mesh["dp"])
    strided = zo.METHODS["zopro"].make(
        both, eps=0.01, module=both, process_group=dist.group.WORLD, **zo.vectors(zo.make_model())
    )
    found["fsdp of tp"] = train(both, strided)

    rows, columns = (shard(zo.make_model(), mesh_of(p), p) for p in (ROWS, COLUMNS))
    made = {}
    for key, vectors in zo.vectors(zo.make_model()).items():
        placed = {
            name: distribute_tensor(vectors[name], param.device_mesh, param.placements)
            for name, param in columns.named_parameters()
        }
        zeros = {name: torch.zeros_like(vector) for name, vector in vectors.items()}
        made[key] = zokern.zopro.delta(placed, zeros)
        assert made[key]["0.weight"].placements == COLUMNS
    opt = zo.METHODS["zopro"].make(rows, eps=0.01, process_group=dist.group.WORLD, **made)
    found["placed otherwise"] = train(rows, opt)

    copies, opt = make(("mezo", "float32", (Replicate(), Shard(0))))
    opt.step(loss_of(copies))
    opt.assert_in_sync()
    if dist.get_rank() == 3:
        copies[3].weight.to_local().data[0] += 1.0
    found["drift"] = error_of(opt.assert_in_sync)
    return found


def test_states_places_and_drift_are_those_of_the_full_tensors(tmp_path):
    model, opt = make(("mezo", "momentum", ()))
    fidelity = opt.probe_fidelity()
    after = [train(model, opt, steps) for steps in (2, 1, 1)]
    strided = train(*make(("zopro", "float32", ())))
    for found in ranks.run(various, 4, tmp_path):
        assert found["fidelity"] == pytest.approx(fidelity, rel=1e-9)
        for copied in found["copy"]:
            assert zo.same(copied, after[0])
        assert "save its state_dict()" in found["pickle"]
        assert zo.same(found["gathered"], after[1])
        assert zo.same(found["cut"], after[2])
        assert found["auto"] == (False, torch.int16, True)
        assert zo.same(found["fsdp of tp"], strided)
        assert zo.same(found["placed otherwise"], strided)
        assert found["drift"] == (
            "RuntimeError: rank 2, 3 has drifted from the others, in 3.weight"
        )


def aborted(**arguments: Any) -> dict[str, Any]:
    model, opt = net("float32", init_device_mesh("cpu", (2,)), **arguments)
    opt.step(lambda: loss_of_batch(model))

    def fail(*_: Any) -> None:
        raise ValueError("no data")

    hook = model.blocks[1].register_forward_hook(fail)
    first = error_of(lambda: opt.step(lambda: loss_of_batch(model)))
    hook.remove()
    with torch.no_grad():
        loss = float(loss_of_batch(model))
    opt.step(lambda: loss_of_batch(model))
    model.reshard()
    weights = [whole(param.detach()) for param in model.parameters()]
    return {"error": first, "loss": loss, "weights": weights}


def both_aborted() -> list[dict[str, Any]]:
    return [aborted(), aborted(layerwise=True)]


def test_a_forward_pass_that_was_aborted_leaves_no_stale_copy(tmp_path):
    of_ranks = ranks.run(both_aborted, 2, tmp_path)
    for i in range(2):
        model, opt = net("float32")
        if i:
            opt = zokern.MeZO(
                model.named_parameters(), lr=0.01, eps=0.01, seed=3, module=model, layerwise=True
            )
        opt.step(lambda model=model: loss_of_batch(model))

        def fail() -> float:
            raise ValueError("no data")

        with pytest.raises(ValueError, match="no data"):
            opt.step(fail)
        loss = float(loss_of_batch(model))
        opt.step(lambda model=model: loss_of_batch(model))
        for found in of_ranks:
            assert "ValueError: no data" in found[i]["error"]
            # In place, ranks come to rest by way of all the points that others may have visited.
            assert found[i]["loss"] == pytest.approx(loss, rel=0.0 if i else 1e-6)
            for own, expected in zip(found[i]["weights"], zo.weights(model), strict=True):
                assert torch.allclose(own, expected, rtol=0.0, atol=0.0 if i else 1e-6)


def operands(place: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> dict[str, list[Tensor]]:
    """Of sweeps and reductions, with an update that has momenta."""
    generator = torch.Generator().manual_seed(1)

    def tensors(dtype: torch.dtype, high: int = 0) -> list[Tensor]:
        made = [torch.randn(shape, generator=generator) * max(high, 1) for shape in SHAPES]
        return [place(tensor.to(dtype)) for tensor in made]

    return {
        "params": tensors(torch.bfloat16),
        "residuals": tensors(torch.int8, 100),
        "masters": tensors(torch.float32),
        "momenta": tensors(torch.float32),
        "dense": tensors(torch.float32),
        "outs": tensors(torch.bfloat16),
    }


def operated(given: dict[str, list[Tensor]], sweep: Callable) -> Tensor:
    """Sweeps with each of the operands, and the sums."""
    params, dense = given["params"], [given["dense"]]
    update = zokern.ops.Update([1.0, 0.5], 0.9, 0.1, given["momenta"])
    both = {"seed": 1, "dense": dense, "tensor_ids": [5, 6, 7]}
    sweep(params, [3, -1], [0.1, 0.2], residuals=given["residuals"], update=update, **both)
    sweep(params, [4, -1], [0.3, 0.2], residuals=given["residuals"], outs=given["outs"], **both)
    sweep(params, [5, -1], [0.3, 0.2], masters=given["masters"], rest=1, **both)
    return zokern.ops.inner_products(params, 2, seed=1, tensor_ids=[5, 6, 7])


def operators() -> list[tuple[Tensor, list[Tensor]]]:
    mesh = init_device_mesh("cpu", (3,))
    found = []
    for dim in (0, -1):
        for sweep in (zokern.ops.perturb_, zokern.ops.Sweeper().perturb_):
            given = operands(lambda t, dim=dim: distribute_tensor(t, mesh, [Shard(dim % t.ndim)]))
            sums = operated(given, sweep)
            parts = [tensor.to_local() for tensor in given["params"]]
            shards = [sharding.shard_of(tensor) for tensor in given["params"]]
            own = zokern.ops.inner_products(parts, 2, seed=1, tensor_ids=[5, 6, 7], shards=shards)
            dist.all_reduce(own)
            assert torch.allclose(own, sums, rtol=1e-12, atol=0)
            found.append((sums, [whole(t) for tensors in given.values() for t in tensors]))
    return found


def test_operators_take_dtensors(tmp_path):
    given = operands()
    sums = operated(given, zokern.ops.perturb_)
    expected = [tensor for tensors in given.values() for tensor in tensors]
    for of_rank in ranks.run(operators, 3, tmp_path):
        for found, tensors in of_rank:
            assert torch.equal(found.float(), sums.float())
            assert zo.same(tensors, expected)


def tensor_parallel() -> tuple[list[float], list[Tensor]]:
    model = zo.make_model()
    plan = {
        "0": ColwiseParallel(output_layouts=Replicate()),
        "3": RowwiseParallel(input_layouts=Replicate()),
    }
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    assert not isinstance(model[1].weight, DTensor)
    opt = zokern.MeZO(
        model.named_parameters(), lr=0.01, eps=0.01, seed=3, process_group=dist.group.WORLD
    )
    losses = []
    for _ in range(STEPS):
        opt.step(zo.loss_of(model))
        losses += opt.last.losses
    opt.assert_in_sync()
    return losses, [whole(param.detach()).clone() for param in model.parameters()]


def test_a_forward_pass_of_tensor_parallelism(tmp_path):
    model = zo.make_model()
    opt = zokern.MeZO(model.named_parameters(), lr=0.01, eps=0.01, seed=3)
    losses = []
    for _ in range(STEPS):
        opt.step(zo.loss_of(model))
        losses += opt.last.losses
    first, second = ranks.run(tensor_parallel, 2, tmp_path)
    assert first[0] == second[0] == pytest.approx(losses, rel=1e-5)
    assert zo.same(first[1], second[1])
    for found, expected in zip(first[1], zo.weights(model), strict=True):
        assert torch.allclose(found, expected, atol=1e-4)
