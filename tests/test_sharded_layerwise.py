"""Layerwise evaluation of what FSDP2 gathers: bit for bit the run of one process."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import zokern
from tests import ranks, zo
from tests.ranks import error_of
from zokern.optim import fsdp_copies, watched

STEPS = 3
STORAGES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16, "precision": "inplace", "stochastic_rounding": True},
    "split8": {"dtype": torch.bfloat16, "precision": "split8", "momentum": 0.9},
    "split": {"dtype": torch.float16, "precision": "split"},
}
# How the blocks are gathered again or kept after their forward.
RESHARDS: dict[str, Any] = {"freed": True, "kept": False, "to fewer ranks": 2}
Case = tuple[str, str, str]


class Net(nn.Module):
    """Parameters of its own beside those of its blocks, one of which runs twice."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList([nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 10)])
            self.scale = nn.Parameter(torch.rand(10))
            self.head = nn.Linear(10, 4)
        self.frozen = nn.Parameter(torch.ones(10), requires_grad=False)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.blocks, self.blocks[0]):
            x = torch.tanh(block(x)) * self.scale + self.frozen
        return self.head(x)

    def features(self, x: Tensor) -> Tensor:
        return x * self.scale


def shard(model: Net, reshard: str = "freed", **arguments: Any) -> Net:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.blocks[0], mesh=mesh, reshard_after_forward=RESHARDS[reshard], **arguments)
    # One group of two modules.
    fully_shard([model.blocks[1], model.blocks[2]], mesh=mesh, **arguments)
    return fully_shard(model, mesh=mesh, **arguments)


def make(case: Case, sharded: bool, **arguments: Any) -> tuple[Net, zokern.ZOOptimizer]:
    method, storage, reshard = case
    own = dict(STORAGES[storage])
    model = Net(own.pop("dtype"))
    vectors = zo.vectors(model) if method.startswith("zopro") else {}
    if sharded:
        shard(model, reshard)
        own["process_group"] = dist.group.WORLD
    own |= {"module": model, "layerwise": True, "eps": 0.01, **vectors, **arguments}
    return model, zo.METHODS[method].make(model, **own)


def loss_of(model: nn.Module) -> Callable[[], float]:
    def closure() -> float:
        x = zo.X.to(next(model.parameters()).dtype)
        return float(nn.functional.cross_entropy(model(x).float(), zo.Y))

    return closure


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def drop(model: nn.Module) -> None:
    """What FSDP2 has gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def train(case: Case, sharded: bool) -> tuple[list[float], list[Tensor]]:
    model, opt = make(case, sharded)
    closure, losses = loss_of(model), []
    for _ in range(STEPS):
        opt.step(closure)
        losses += opt.last.losses
        with torch.no_grad():
            # As users evaluate between steps: the weights at rest.
            losses.append(closure())
    if sharded:
        drop(model)
    return losses, [whole(param) for param in model.parameters()]


CASES: dict[int, list[Case]] = {
    2: [
        *(("mezo", storage, "freed") for storage in STORAGES),
        *((method, "float32", "kept") for method in zo.METHODS),
        ("conmezo", "split", "kept"),
    ],
    # Parts of different size.
    3: [("mezo", "split8", "freed"), ("conmezo", "float32", "freed")],
    4: [("mezo", "split", "to fewer ranks"), ("mezo", "bfloat16", "to fewer ranks")],
}


def trained(cases: list[Case]) -> list[tuple[list[float], list[Tensor]]]:
    return [train(case, True) for case in cases]


@pytest.mark.parametrize("size", CASES)
def test_it_is_trained_as_one_process_trains_it(size, tmp_path):
    of_ranks = ranks.run(trained, size, tmp_path, CASES[size])
    for i, case in enumerate(CASES[size]):
        losses, expected = train(case, False)
        assert len(set(losses)) > STEPS
        for found in of_ranks:
            assert found[i][0] == losses, case
            assert zo.same(found[i][1], expected), case


def groups_of(module: nn.Module) -> list[Any]:
    return fsdp_copies.param_groups(module) if isinstance(module, FSDPModule) else []


def is_clean(model: nn.Module) -> bool:
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    plain = all(not isinstance(param, watched.Watched) for param in model.parameters())
    groups = [group for module in model.modules() for group in groups_of(module)]
    plain = plain and not any("wait_for_unshard" in vars(group) for group in groups)
    return plain and not watched._readers and max(hooks) == 1


def visited() -> dict[str, Any]:
    """What an evaluation leaves of weights and hooks, whether it ends well or not."""
    model, opt = make(("mezo", "float32", "kept"), True)
    closure, found = loss_of(model), {}
    rest = [param.to_local().clone() for param in model.parameters()]
    at_rest = closure()
    drop(model)
    with torch.no_grad():
        for move in opt.ask():
            assert closure() != at_rest, move
            drop(model)
            found["stray"] = [
                error_of(lambda: sum(p.sum() for p in model.blocks[0].parameters())),
                error_of(model.blocks[0].weight.full_tensor),
                error_of(model.blocks[0].weight.to_local),
            ]
            found["untouched"] = zo.same([p._local_tensor for p in model.parameters()], rest)
            found["with gradients"] = error_of(torch.enable_grad()(closure))
            break
    opt.flush()
    found["clean"] = is_clean(model)

    def fail() -> float:
        closure()
        raise ValueError("no data")

    found["raised"] = error_of(lambda: opt.step(fail))
    found["clean after"] = is_clean(model) and closure() == at_rest
    drop(model)
    found["rest"] = zo.same([param.to_local() for param in model.parameters()], rest)
    return found


def test_stored_weights_are_left_alone(tmp_path):
    for found in ranks.run(visited, 2, tmp_path):
        for stray in found["stray"]:
            assert stray.startswith("RuntimeError: blocks.0.weight is read while FSDP2 has it")
        assert "evaluate under torch.no_grad()" in found["with gradients"]
        assert found["untouched"]
        assert found["clean"]
        assert "ValueError: no data" in found["raised"]
        assert found["clean after"]
        assert found["rest"]


def refused() -> dict[str, str]:
    def build(model: nn.Module, params: Any = None) -> zokern.MeZO:
        params = model.named_parameters() if params is None else params
        group = dist.group.WORLD
        return zokern.MeZO(
            params, lr=0.1, module=model, layerwise=True, process_group=group, precision="inplace"
        )

    ignored, parts = Net(torch.float32), Net(torch.float32)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(ignored, mesh=mesh, ignored_params={ignored.scale})
    fully_shard(parts.blocks[0], mesh=mesh)
    cast = shard(Net(torch.float32), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    return {
        "ignored": error_of(lambda: build(ignored)),
        "parts": error_of(lambda: build(parts)),
        "cast": error_of(lambda: build(cast)),
    }


def test_what_cannot_be_evaluated_so_is_refused(tmp_path):
    for found in ranks.run(refused, 2, tmp_path):
        assert "evaluates what that gathers, and scale it does not" in found["ignored"]
        assert "evaluates what that gathers, and scale it does not" in found["parts"]
        assert "scale is stored as torch.float32 and gathered as torch.bfloat16" in found["cast"]


def registered(model: nn.Module, x: Tensor) -> Tensor:
    """A method that gathers as forward does."""
    return model.features(x)


def unsharded(model: nn.Module, x: Tensor) -> Tensor:
    """Gathered by hand, for a part of the module."""
    if isinstance(model, FSDPModule):
        model.unshard()
    return model.head(x)


def again(model: nn.Module, x: Tensor) -> Tensor:
    """Dropped and gathered within an evaluation."""
    y = model(x)
    if isinstance(model, FSDPModule):
        model.blocks[0].reshard()
        model.blocks[0].unshard()
    return y.sum() + model.blocks[0](x)


def of_a_group(model: nn.Module, x: Tensor) -> Tensor:
    """Weights that are gathered with those of another module."""
    return nn.functional.linear(model.blocks[1](x), model.blocks[2].weight)


def ahead(model: nn.Module, x: Tensor) -> Tensor:
    """Gathered before another module's forward, and not used."""
    if isinstance(model, FSDPModule):
        model.blocks[0].set_modules_to_forward_prefetch([model.blocks[1]])
    return model(x)


def hooked(model: nn.Module, x: Tensor) -> Tensor:
    """A hook that reads weights before the forward."""
    read: list[float] = []
    handle = model.register_forward_pre_hook(lambda m, _: read.append(float(m.scale.sum())))
    y = model(x)
    handle.remove()
    return y + read[0]


READS: list[Callable] = [registered, unsharded, again, ahead, hooked]
if hasattr(FSDPModule, "reset_iter_state"):
    # In older versions of torch a module of a group does not gather by itself.
    READS.append(of_a_group)


def losses_of(model: nn.Module, read: Callable, **arguments: Any) -> list[float]:
    opt = zokern.MeZO(
        model.named_parameters(),
        **{"lr": 0.01, "eps": 0.1, "seed": 3, "module": model, "layerwise": True, **arguments},
    )
    if isinstance(model, FSDPModule):
        register_fsdp_forward_method(model, "features")
    found = []
    for _ in range(STEPS):
        opt.step(lambda: float(read(model, zo.X).sum()))
        found += opt.last.losses
        with torch.no_grad():
            found.append(float(read(model, zo.X).sum()))
    return found


def read_otherwise() -> list[list[float]]:
    group = dist.group.WORLD
    models = [shard(Net(torch.float32)) for _ in READS]
    with torch.no_grad():
        for model in models:
            model(zo.X)
            drop(model)
    found = zip(models, READS, strict=True)
    return [losses_of(model, read, process_group=group) for model, read in found]


def test_whatever_gathers_is_given_perturbed_weights(tmp_path):
    of_ranks = ranks.run(read_otherwise, 2, tmp_path)
    for i, read in enumerate(READS):
        expected = losses_of(Net(torch.float32), read)
        for found in of_ranks:
            assert found[i] == expected, read.__name__


def over_tensor_parallelism() -> tuple[list[float], list[Tensor]]:
    model = zo.make_model()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    plan = {
        "0": ColwiseParallel(output_layouts=Replicate()),
        "3": RowwiseParallel(input_layouts=Replicate()),
    }
    parallelize_module(model, mesh["tp"], plan)
    for child in model:
        fully_shard(child, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    return steps(model, process_group=dist.group.WORLD)


def steps(model: nn.Module, **arguments: Any) -> tuple[list[float], list[Tensor]]:
    opt = zokern.MeZO(
        model.named_parameters(),
        **{"lr": 0.01, "eps": 0.1, "seed": 3, "module": model, "layerwise": True, **arguments},
    )
    losses = []
    for _ in range(STEPS):
        opt.step(zo.loss_of(model))
        losses += opt.last.losses
    return losses, [whole(param) for param in model.parameters()]


def test_over_tensor_parallelism(tmp_path):
    """Whose forward pass adds in another order."""
    losses, weights = steps(zo.make_model())
    for found in ranks.run(over_tensor_parallelism, 4, tmp_path):
        assert found[0] == pytest.approx(losses, rel=1e-5)
        for own, expected in zip(found[1], weights, strict=True):
            assert torch.allclose(own, expected, atol=1e-4)
