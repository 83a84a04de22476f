"""OnDARE, OnTIES and EMA on parts of DTensors: several processes make the steps of one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import zokern
from tests import ranks
from tests.same_bits import same_bits
from tests.test_selection import DATA, INFINITY, mask_of
from zokern import ops, sharding
from zokern.merging import Differences, SparseTau, dense_tau
from zokern.optim.merging import MergingAdamW
from zokern.optim.merging_state import TAU_KEYS

STEPS = 3
# Parts of them begin within a group of noise, are empty, and are all of the tensor.
SHAPES = {"a": (37, 21), "b": (7,), "c": (2, 5, 3), "d": (1,), "e": (1, 9), "f": (5, 4), "g": ()}

Case = tuple[type[MergingAdamW], torch.dtype, dict[str, Any]]
MERGE: dict[str, Any] = {"use_merge": True, "alpha": 0.1, "lr": 1e-2}
PAPER: dict[str, Any] = {**MERGE, "semantics": "paper"}
CASES: dict[str, Case] = {
    "dare": (zokern.OnDAREAdamW, torch.float32, {**MERGE, "reserve_p": 0.4, "rescale": True}),
    "dare, paper": (
        zokern.OnDAREAdamW, torch.bfloat16, {**PAPER, "reserve_p": 0.4, "precision": "split8"}
    ),
    "dare, step-K": (
        zokern.OnDAREAdamW,
        torch.float16,
        {**MERGE, "reserve_p": 0.5, "online_step": 2, "state_dtype": torch.bfloat16},
    ),
    "dare, capturable": (
        zokern.OnDAREAdamW,
        torch.float32,
        {**MERGE, "reserve_p": 0.4, "capturable": True},
    ),
    "ties": (zokern.OnTIESAdamW, torch.float32, {**MERGE, "reserve_p": 0.3, "weight_decay": 0.1}),
    "ties, rescaled": (
        zokern.OnTIESAdamW,
        torch.bfloat16,
        {**MERGE, "reserve_p": 0.2, "rescale": True, "precision": "split"},
    ),
    "ties, step-K": (
        zokern.OnTIESAdamW,
        torch.bfloat16,
        {**MERGE, "reserve_p": 0.6, "online_step": 2, "precision": "master"},
    ),
    "ties, paper": (
        zokern.OnTIESAdamW,
        torch.float32,
        {**PAPER, "reserve_p": 0.01, "state_dtype": torch.bfloat16},
    ),
    "ema": (zokern.EMAAdamW, torch.bfloat16, {"pull": 0.1, "lr": 1e-2}),
}  # fmt: skip
FEW = ["dare", "ties", "ties, rescaled"]

# Shapes of meshes, and the dimensions along which they cut; "r" is a replica.
Layout = tuple[tuple[int, ...], tuple[int | str, ...]]
LAYOUTS: dict[int, list[tuple[Layout, list[str]]]] = {
    2: [(((2,), (0,)), [*CASES]), (((2,), (1,)), [*CASES])],
    3: [(((3,), (0,)), FEW), (((3,), (1,)), FEW)],
    4: [
        (((4,), (0,)), FEW),
        (((4,), (1,)), FEW),
        (((2, 2), (0, 1)), FEW),
        (((2, 2), ("r", 0)), FEW),
    ],
}


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def full_weights(dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: randn(*shape, seed=i).to(dtype) for i, (name, shape) in enumerate(SHAPES.items())}


def gradient(name: str, step: int, dtype: torch.dtype) -> Tensor:
    """The magnitudes of the first step's are all equal, so that indices decide."""
    grad = randn(*SHAPES[name], seed=ord(name) + 100 * step)
    return (grad.sign() * 0.25 if step == 0 else grad).to(dtype)


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype, place: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        for name, weight in full_weights(dtype).items():
            self.register_parameter(name, nn.Parameter(place(weight)))


def make(case: Case, net: Net, **others: Any) -> MergingAdamW:
    cls, dtype, arguments = case
    base = full_weights(dtype)
    reference = {name: weight + 0.02 * gradient(name, 99, dtype) for name, weight in base.items()}
    given = {"reference": reference, **arguments, **others}
    if cls is not zokern.EMAAdamW:
        given = {"base": base, "seed": 7, **given}
    return cls(net.named_parameters(), **given)


def train(net: Net, opt: MergingAdamW, first: int = 0, last: int = STEPS) -> None:
    for step in range(first, last):
        for name, param in net.named_parameters():
            full = gradient(name, step, param.dtype).to(param.device)
            param.grad = sharding.like(param, sharding.part_of(full, param).clone())
        opt.step()


def everything(net: Net, opt: MergingAdamW) -> dict[str, Tensor]:
    """The weights and all that is kept beside them, whole."""
    found = {}
    for name, param in net.named_parameters():
        found[name] = sharding.whole(param.detach())
        tau = opt._tau(param)
        if isinstance(tau, SparseTau):
            found[f"tau_ref of {name}"] = dense_tau(tau, param.shape)
        for key, tensor in opt.state[param].items():
            if isinstance(tensor, Tensor) and key not in (*TAU_KEYS, "step"):
                assert isinstance(tensor, DTensor) == isinstance(param, DTensor), key
                found[f"{key} of {name}"] = sharding.whole(tensor)
    return found


def of_one_process(case: Case, steps: int = STEPS) -> dict[str, Tensor]:
    net = Net(case[1], lambda tensor: tensor)
    opt = make(case, net)
    train(net, opt, last=steps)
    return everything(net, opt)


def check_same(found: dict[str, Tensor], wanted: dict[str, Tensor], what: object) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert same_bits(found[name], tensor), (what, name)


def placing(layout: Layout) -> Callable[[Tensor], Tensor]:
    mesh_shape, dims = layout
    mesh = init_device_mesh(ranks.device().type, mesh_shape)

    def place(tensor: Tensor) -> Tensor:
        most = tensor.dim() - 1
        placements = [
            Shard(min(dim, most)) if isinstance(dim, int) and most >= 0 else Replicate()
            for dim in dims
        ]
        tensor = tensor.to(ranks.device())
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)

    return place


def on_parts(cases: list[tuple[Layout, list[str]]]) -> list[dict[str, Tensor]]:
    found = []
    for layout, names in cases:
        place = placing(layout)
        for name in names:
            net = Net(CASES[name][1], place)
            opt = make(CASES[name], net)
            train(net, opt)
            found.append({key: value.cpu() for key, value in everything(net, opt).items()})
    return found


@pytest.mark.parametrize("kind", ranks.DEVICES)
@pytest.mark.parametrize("size", LAYOUTS)
def test_steps_on_parts_are_those_of_one_process(size, kind, tmp_path):
    of_ranks = ranks.run(on_parts, size, tmp_path, LAYOUTS[size], kind=kind)
    cases = [(layout, name) for layout, names in LAYOUTS[size] for name in names]
    for i, (layout, name) in enumerate(cases):
        wanted = of_one_process(CASES[name])
        for found in of_ranks:
            check_same(found[i], wanted, (layout, name))


SELECTED = {
    "random": DATA["a matrix"],
    "tied": DATA["tied"].view(50, 60),
    "all equal": DATA["all equal"].view(50, 50),
    "all zero": DATA["all zero"].view(7, 100),
    "infinities": DATA["infinities"].view(20, 25),
    "NaN": torch.where(DATA["infinities"] == INFINITY, float("nan"), DATA["infinities"]),
    "three": torch.tensor([1.0, -1.0, 0.5]),
    "empty": torch.empty(0, 4),
}


def shares() -> tuple[float, ...]:
    return 0.0, 0.1, 0.5, 0.9, 1.0, 1.5


def masks_of_parts() -> None:
    """That the masks of parts are the parts of the masks."""
    for dim in (0, 1):
        place = placing(((dist.get_world_size(),), (dim,)))
        tensors = [place(value) for value in SELECTED.values()]
        own, parts = [*map(sharding.local, tensors)], [*map(sharding.describe, tensors)]
        for share in shares():
            counts = [int(share * value.numel()) for value in SELECTED.values()]
            found = ops.threshold_of_parts(Differences(own), counts, parts)
            for i, (name, value) in enumerate(SELECTED.items()):
                bits = value.flatten().view(torch.int32) & 0x7FFFFFFF
                order = bits.sort(descending=True, stable=True).indices
                mask = torch.zeros(value.numel(), dtype=torch.bool)
                mask[order[: counts[i]]] = True
                part = sharding.part_of(mask.view(value.shape), tensors[i]).flatten()
                assert torch.equal(mask_of(own[i], found[0][i], found[1][i]), part), (name, share)


def thresholds_of_dtensors() -> None:
    place = placing(((dist.get_world_size(),), (0,)))
    value, base = SELECTED["random"], 0.5 * SELECTED["random"].flip(0)
    tensors = [place(value), value]
    thresholds, cuts = ops.magnitude_threshold(tensors, [70, 80], bases=[place(base), base])
    wanted = ops.magnitude_threshold([value, value], [70, 80], bases=[base, base])
    assert torch.equal(thresholds, wanted[0])
    assert cuts.tolist() == [sharding.local(tensors[0]).numel(), int(wanted[1][1])]
    for arguments, said in (
        (([place(SELECTED["NaN"])], 3), r"tensors\[0\].*NaN"),
        (([tensors[0]], 3, [base]), r"bases\[0\] must be a DTensor"),
        (([tensors[0]], 3, None, True), "joined"),
    ):
        names = ("tensors", "k", "bases", "joined")
        with pytest.raises(ValueError, match=said):
            ops.magnitude_threshold(**dict(zip(names, arguments, strict=False)))


def masks_of_parts_on_backends() -> None:
    for backend in ("native", "reference"):
        if zokern.backends.load(backend).why_not(torch.device("cpu")) is None:
            with zokern.use_backend(backend):
                masks_of_parts()
    thresholds_of_dtensors()


@pytest.mark.parametrize("size", [2, 3])
def test_masks_of_parts_are_the_parts_of_masks(size, tmp_path):
    ranks.run(masks_of_parts_on_backends, size, tmp_path)


def shard_fully(model: nn.Sequential) -> None:
    """By FSDP2, and by tensor parallelism before where there are ranks for it."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import parallel

    mesh = None
    if dist.get_world_size() == 4:
        meshes = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        plan = {"0": parallel.ColwiseParallel(), "2": parallel.RowwiseParallel()}
        parallel.parallelize_module(model, meshes["tensor"], plan)
        mesh = meshes["data"]
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)


def train_fully_sharded(name: str) -> tuple[list[Tensor], list[Tensor]]:
    """The weights of a model that is trained in parts, and of one process with its gradients."""

    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))

    model, alone = network(), network()
    cls, _, arguments = CASES[name]
    weights = network().state_dict()
    reference = {name: weight * 1.01 for name, weight in weights.items()}
    common = {**arguments, "seed": 3, "reference": reference, "base": weights}
    expected = cls(alone.named_parameters(), **common)
    shard_fully(model)
    opt = cls(model.named_parameters(), **common)
    # Ranks of tensor parallelism see the same data.
    x = randn(4, 6, seed=10 + dist.get_rank() // (dist.get_world_size() // 2))
    for _ in range(STEPS):
        F.cross_entropy(model(x), torch.arange(4) % 3).backward()
        for param, other in zip(model.parameters(), alone.parameters(), strict=True):
            assert param.grad is not None
            other.grad = sharding.whole(param.grad)
        opt.step()
        opt.zero_grad()
        expected.step()
    trained = [sharding.whole(param.detach()) for param in model.parameters()]
    assert not any(map(torch.equal, trained, weights.values()))
    return trained, [param.detach() for param in alone.parameters()]


def fully_sharded() -> list[tuple[list[Tensor], list[Tensor]]]:
    return [train_fully_sharded(name) for name in ("dare", "ties")]


@pytest.mark.parametrize("size", [2, 4])
def test_a_fully_sharded_model_takes_the_steps_of_one_process(size, tmp_path):
    first, *others = ranks.run(fully_sharded, size, tmp_path)
    for i, (trained, expected) in enumerate(first):
        assert all(map(same_bits, trained, expected))
        assert all(all(map(same_bits, trained, other[i][0])) for other in others)


RESUMED = ["dare, step-K", "ties, rescaled"]


def checkpoint(net: Net, opt: MergingAdamW) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = get_state_dict(net, opt)
    return {"model": model, "optimizer": optimizer}


def save(folder: Path) -> None:
    import torch.distributed.checkpoint as dcp

    for name in RESUMED:
        net = Net(CASES[name][1], placing(((dist.get_world_size(),), (0,))))
        opt = make(CASES[name], net)
        train(net, opt)
        dcp.save(checkpoint(net, opt), checkpoint_id=folder / name)


def resume(folder: Path, dim: int) -> list[dict[str, Tensor]]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    found = []
    for name in RESUMED:
        net = Net(CASES[name][1], placing(((dist.get_world_size(),), (dim,))))
        opt = make(CASES[name], net, seed=11)
        state = checkpoint(net, opt)
        dcp.load(state, checkpoint_id=folder / name)
        set_state_dict(
            net, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        train(net, opt, STEPS, STEPS + 2)
        found.append(everything(net, opt))
    return found


def test_a_checkpoint_goes_on_with_another_number_of_ranks(tmp_path):
    ranks.run(save, 2, tmp_path, tmp_path)
    wanted = [of_one_process(CASES[name], STEPS + 2) for name in RESUMED]
    for size, dim in ((3, 0), (2, 1)):
        for found in ranks.run(resume, size, tmp_path, tmp_path, dim):
            for name, own, other in zip(RESUMED, found, wanted, strict=True):
                check_same(own, other, name)


def refusals() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    for keeps in (True, False):
        layer = nn.Linear(6, 9)
        before = zokern.OnDAREAdamW(layer.named_parameters())
        flat = FullyShardedDataParallel(layer, use_orig_params=keeps, device_id=torch.device("cpu"))
        with pytest.raises(TypeError, match="this rank has: FullyShardedDataParallel"):
            zokern.OnTIESAdamW(flat.named_parameters(), semantics="paper")
        if keeps:
            with pytest.raises(TypeError, match="this rank has: FullyShardedDataParallel"):
                before.step()

    place = placing(((2,), (0,)))
    net = Net(torch.float32, place)
    opt = make(CASES["ties"], net, capturable=True)
    with pytest.raises(ValueError, match="capturable must be False"):
        train(net, opt)
    opt = make(CASES["ties"], net)
    net.b.grad = randn(7, seed=0)
    with pytest.raises(RuntimeError, match="b is a DTensor, and its gradient is not"):
        opt.step()
    for name in ("ties", "dare"):
        net.zero_grad()
        net.a.grad = place(randn(37, 21, seed=0))
        if dist.get_rank() == 0:
            net.b.grad = place(randn(7, seed=0))
        before = sharding.local(net.a).clone()
        with pytest.raises(RuntimeError, match="does one of them lack gradients"):
            make(CASES[name], net).step()
        assert torch.equal(sharding.local(net.a), before)
    refuse_other_tensors_of_the_same_shape(place)
    refuse_gathered_copies()


def refuse_other_tensors_of_the_same_shape(place: Callable) -> None:
    """Stepped by one rank, or by none."""
    rank = dist.get_rank()
    for steps in ([0, 1], [0, None]):
        params = [nn.Parameter(place(randn(4, 6, seed=i))) for i in range(2)]
        opt = zokern.OnTIESAdamW(
            zip("ab", params, strict=True), reserve_p=0.3, semantics="paper", use_merge=False
        )
        if (i := steps[rank]) is not None:
            params[i].grad = place(randn(4, 6, seed=5))
        with pytest.raises(RuntimeError, match="must step the same ones"):
            opt.step()


def refuse_gathered_copies() -> None:
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 6))
    fully_shard(model)
    with torch.no_grad():
        model(randn(2, 6, seed=0))
    with pytest.raises(ValueError, match=r"0\.weight is a copy that FSDP2 had gathered"):
        zokern.OnDAREAdamW(model.named_parameters())
    zokern.OnDAREAdamW(model.named_parameters())


def test_what_cannot_be_told_is_refused(tmp_path):
    ranks.run(refusals, 2, tmp_path)


def weights_of(net: Net) -> dict[str, Tensor]:
    return {name: param.detach() for name, param in net.named_parameters()}


def odds() -> list[Any]:
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    place = placing(((2,), (0,)))
    torch.manual_seed(rank)
    net = Net(torch.float32, place)
    drawn = zokern.OnDAREAdamW(net.named_parameters(), reserve_p=0.5).run["seed"]

    # Gradients that are still to be added up.
    opt = make(CASES["ties"], net)
    full = gradient("a", 1, torch.float32)
    net.a.grad = DTensor.from_local(
        full if rank else torch.zeros_like(full), mesh, [Partial()], run_check=False
    )
    opt.step()

    # A DTensor as the reference; a state that was saved whole.
    cls, dtype, arguments = CASES["dare"]
    weights = {name: place(weight) for name, weight in full_weights(dtype).items()}
    base = full_weights(dtype)
    taus = cls(net.named_parameters(), **arguments, seed=7, reference=weights, base=base)
    zeros = [not sharding.local(taus.state[p]["tau_ref"]).any() for p in net.parameters()]

    alone = Net(dtype, lambda tensor: tensor)
    other = make(CASES["dare"], alone)
    train(alone, other)
    resumed = Net(dtype, place)
    with torch.no_grad():
        for param, value in zip(resumed.parameters(), alone.parameters(), strict=True):
            param.copy_(place(value.detach()))
    going_on = make(CASES["dare"], resumed, seed=1)
    going_on.load_state_dict(other.state_dict())
    train(resumed, going_on, STEPS, STEPS + 1)
    found = everything(resumed, going_on)

    # And one that was saved in parts, for whole parameters.
    together = make(CASES["dare"], alone, seed=1)
    together.load_state_dict(going_on.state_dict())
    check_same(everything(alone, together), found | weights_of(alone), "a sharded state")
    return [drawn, sharding.whole(net.a.detach()), zeros, found]


def write_to_weights() -> None:
    net = Net(torch.bfloat16, placing(((2,), (0,))))
    opt = zokern.OnDAREAdamW(net.named_parameters(), lr=1e-2, precision="master", seed=0)
    train(net, opt)
    own = sharding.local(net.a)
    for weight, value in ((net.a, 1.0), (own, -1.0)):
        with torch.no_grad():
            weight.fill_(value)
        train(net, opt)
        assert 0 < (own - value).abs().max() < 0.1


def test_weights_that_somebody_else_has_written_are_gone_on_from(tmp_path):
    ranks.run(write_to_weights, 2, tmp_path)


def test_seeds_partial_gradients_sharded_references_and_whole_states(tmp_path):
    (drawn, weight, zeros, resumed), (other, *_) = ranks.run(odds, 2, tmp_path)
    assert drawn == other
    assert all(zeros)
    net = Net(torch.float32, lambda tensor: tensor)
    net.a.grad = gradient("a", 1, torch.float32)
    make(CASES["ties"], net).step()
    assert same_bits(weight, net.a.detach())
    check_same(resumed, of_one_process(CASES["dare"], STEPS + 1), "a whole state")


def test_parameters_that_deepspeed_has_put_into_the_groups_are_refused():
    net = Net(torch.float32, lambda tensor: tensor)
    opt = zokern.OnDAREAdamW(net.named_parameters(), reserve_p=0.5)
    flat = nn.Parameter(torch.zeros(9))
    flat.grad = torch.ones(9)
    opt.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match="DeepSpeed ZeRO"):
        opt.step()
    net.a.ds_id = 0
    with pytest.raises(TypeError, match="DeepSpeed ZeRO"):
        zokern.OnDAREAdamW(net.named_parameters())
