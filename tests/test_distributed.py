"""Several processes make one run: equal weights, errors on every rank, and a run that is killed."""

import copy
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import zokern
from tests import ranks, zo
from tests.ranks import error_of
from zokern.distributed import checksum, differences, drifted, mean

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


def as_population(cases: list[Case]) -> list[tuple[list[Tensor], Tensor, int]]:
    found = []
    for case in cases:
        torch.manual_seed(5)
        model, opt = make(case, process_group=world(), parallel="population")
        closure = Evaluations(model)
        found.append((train(model, opt, closure), torch.get_rng_state(), closure.count))
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
            assert torch.equal(found[i][1], torch.get_rng_state()), case
        counts = [found[i][2] for found in of_ranks]
        # Ranks that are left over evaluate a point again, in each of at most two rounds.
        assert closure.count <= sum(counts) <= closure.count + 2 * STEPS * (size - 1)
        assert max(counts) <= closure.count / size + 2 * STEPS


def test_the_mean_of_equal_losses_is_that_loss_and_others_are_added_in_order():
    assert mean([0.1, 0.1, 0.1]) == 0.1
    assert mean([1.0, 1e16, -1e16, 2.0]) == 0.5
    assert mean([2.0, -1e16, 1e16, 1.0]) == 0.75


def mine(rank: int, value: Any, other: Any) -> Any:
    """The value on that rank, the other one elsewhere."""
    return value if dist.get_rank() == rank else other


VECTORS: dict[str, Any] = {
    "previous_update": {name: torch.ones(3) for name in "ab"},
    "reward_delta": {name: torch.ones(3) for name in "ab"},
    "total_steps": 9,
}
# What a rank is refused, what the others are given, and what is said.
INVALID: dict[str, tuple[type, dict[str, Any], dict[str, Any], str]] = {
    "eps": (zokern.MeZO, {"eps": -1.0}, {}, "eps must be positive"),
    "candidates": (zokern.FZOO, {"candidates": 1}, {}, "candidates must be an integer"),
    "elite": (zokern.MeZOGV, {"elite": 0.1}, {}, "elite=0.1 makes 0 of 2 candidates"),
    "angle": (zokern.ConMeZO, {"angle": 2.0}, {}, "angle must be between 0 and π/2"),
    "decay": (zokern.ZOPrO, {"decay": "slow"}, VECTORS, "decay must be 'linear' or 'exp'"),
    "vectors": (
        zokern.ZOPrO, {"reward_delta": {"a": torch.ones(3)}}, VECTORS,
        "reward_delta has no entry for ['b']",
    ),
}  # fmt: skip


def disagreeing() -> dict[str, str]:
    def build(
        names: str = "ab", shape: tuple = (3,), dtype: torch.dtype = torch.float32, **arguments: Any
    ) -> None:
        params = [(name, nn.Parameter(torch.zeros(shape, dtype=dtype))) for name in names]
        cls = arguments.pop("cls", zokern.MeZO)
        cls(params, **{"lr": 0.1, "seed": 0, "process_group": world(), **arguments})

    found = {
        "lr": error_of(lambda: build(lr=mine(1, 0.2, 0.1))),
        "names": error_of(lambda: build("ac" if dist.get_rank() == 0 else "ab")),
        "shapes": error_of(lambda: build(shape=mine(2, (4,), (3,)))),
        "dtypes": error_of(lambda: build(dtype=mine(0, torch.bfloat16, torch.float32))),
        "seed": error_of(lambda: build(seed=mine(1, 7, None))),
        "methods": error_of(lambda: build(cls=mine(1, zokern.MeZOGV, zokern.MeZO))),
        "parallel": error_of(lambda: build(parallel=mine(1, "population", "data"))),
        **{
            f"invalid {name}": error_of(
                lambda cls=cls, bad=bad, good=good: build(cls=cls, **{**good, **mine(2, bad, {})})
            )
            for name, (cls, bad, good, _) in INVALID.items()
        },
    }
    torch.manual_seed(dist.get_rank())
    model, opt = make(("mezo", "float32"), seed=None, process_group=world())
    found["drawn seed"] = str(opt.run["seed"])

    opt.param_groups[0]["lr"] = mine(1, 0.5, 0.1)
    found["later"] = error_of(lambda: opt.step(zo.loss_of(model)))
    opt.param_groups[0]["lr"] = 0.1
    model[3].bias.requires_grad_(dist.get_rank() != 0)
    found["frozen"] = error_of(lambda: opt.step(zo.loss_of(model)))
    model[3].bias.requires_grad_(True)
    opt.assert_in_sync()
    found["afterwards"] = error_of(lambda: opt.step(zo.loss_of(model)))
    _, other = make(("mezo", "float32"), process_group=world())
    found["other calls"] = error_of(
        lambda: opt.step(zo.loss_of(model)) if dist.get_rank() == 0 else other.assert_in_sync()
    )
    return found


def test_ranks_that_disagree_all_say_in_what(tmp_path):
    of_ranks = ranks.run(disagreeing, 3, tmp_path)
    for case, expected in {
        "lr": "ValueError: all ranks must give MeZO the same arguments: "
        "lr is 0.100000001 on ranks 0, 2, 0.200000003 on rank 1",
        "names": "parameter c is torch.float32 [3] in group 0 on rank 0, missing on ranks 1, 2",
        "shapes": "torch.float32 [3] in group 0 on ranks 0, 1, torch.float32 [4] in group 0 on "
        "rank 2",
        "dtypes": "parameter a is torch.bfloat16 [3] in group 0 on rank 0, torch.float32",
        "seed": "seed is None on ranks 0, 2, 7 on rank 1",
        "methods": "method is MeZO on ranks 0, 2, MeZOGV on rank 1",
        "parallel": "parallel is data on ranks 0, 2, population on rank 1",
        "later": "lr is 0.100000001 on ranks 0, 2, 0.5 on rank 1",
        "frozen": "the set of parameters that move is 5 of the checksum",
        "other calls": "what it waits for is losses on rank 0, assert_in_sync on ranks 1, 2",
    }.items():
        for found in of_ranks:
            assert expected in found[case]
    for name, (_, _, _, said) in INVALID.items():
        assert of_ranks[2][f"invalid {name}"].startswith(f"ValueError: {said}")
        for found in of_ranks[:2]:
            assert found[f"invalid {name}"].startswith("RuntimeError: ")
            assert f"rank 2 with ValueError: {said}" in found[f"invalid {name}"]
    assert len({found["drawn seed"] for found in of_ranks}) == 1
    assert all(found["afterwards"] == "" for found in of_ranks)


class Failing:
    """A closure that fails at one of its calls on one rank."""

    def __init__(self, model: nn.Module, at: int, rank: int, fail: Callable[[], object]) -> None:
        self._loss, self._at, self._calls = zo.loss_of(model), at, 0
        self._fail = fail if dist.get_rank() == rank else lambda: None

    def __call__(self) -> Tensor:
        self._calls += 1
        if self._calls == self._at:
            self._fail()
        return self._loss()


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def no_value() -> None:
    raise ValueError("no data")


FAILURES: dict[str, tuple[Case, dict, int, Callable]] = {
    "first point": (("mezo, 3 samples", "float32"), {}, 1, no_value),
    "second round": (("gv", "float32"), {}, 5, no_value),
    "Ctrl-C": (("mezo", "split8"), {}, 2, interrupt),
    "layerwise": (("mezo", "layerwise"), {}, 1, no_value),
    "population": (("gv", "float32"), {"parallel": "population"}, 1, no_value),
    "fused": (("mezo", "fused"), {}, 4, interrupt),
}


def failing() -> dict[str, Any]:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    found: dict[str, Any] = {}
    for name, (case, arguments, at, fail) in FAILURES.items():
        model, opt = make(case, process_group=world(), **arguments)
        closure = Failing(model, at, 1, fail)
        while not (error := error_of(lambda opt=opt, closure=closure: opt.step(closure))):
            pass
        opt.assert_in_sync()
        found[name] = error, zo.weights(model), opt.run["step"]
        opt.step(zo.loss_of(model))
        opt.assert_in_sync()

    model, opt = make(("mezo", "float32"), process_group=world())
    start = zo.weights(model)
    with pytest.warns(RuntimeWarning, match="the update is skipped"):
        opt.step(lambda: zo.loss_of(model)() * mine(1, float("nan"), 1.0))
    opt.assert_in_sync()
    drift = max(float((a - b).abs().max()) for a, b in zip(start, model.parameters(), strict=True))
    found["skipped"] = opt.run["skipped"], drift

    move = opt._move
    calls = []

    def interrupted_move(*arguments: Any) -> None:
        move(*arguments)
        calls.append(arguments)
        if len(calls) == 2 and dist.get_rank() == 0:
            interrupt()

    opt._move = interrupted_move  # type: ignore[method-assign]
    found["between evaluations"] = error_of(lambda: opt.step(zo.loss_of(model)))
    opt._move = move  # type: ignore[method-assign]
    opt.assert_in_sync()

    found["pickle"] = error_of(lambda: pickle.dumps(opt))
    twin = copy.deepcopy(opt)
    twin.step(lambda: float(dist.get_rank()))
    found["copy"] = twin.last.losses
    return found


def test_a_rank_that_fails_is_heard_on_all_and_the_weights_stay_equal(tmp_path):
    first, second = ranks.run(failing, 2, tmp_path)
    for name, (case, _, _, fail) in FAILURES.items():
        own = "KeyboardInterrupt: " if fail is interrupt else "ValueError: no data"
        assert second[name][0] == own
        assert first[name][0] == (
            f"RuntimeError: this rank stops because others have failed: rank 1 with {own}"
        )
        assert zo.same(first[name][1], second[name][1])
        assert first[name][2] == second[name][2]
        if case[1] == "layerwise":
            assert zo.same(first[name][1], zo.weights(make(case)[0]))
    assert first["skipped"][0] == second["skipped"][0] == 1
    assert max(first["skipped"][1], second["skipped"][1]) < 1e-6
    assert first["between evaluations"] == "KeyboardInterrupt: "
    assert "rank 0 with KeyboardInterrupt" in second["between evaluations"]
    assert "save its state_dict()" in first["pickle"]
    assert first["copy"] == second["copy"] == (0.5, 0.5)


def drifting() -> dict[str, str]:
    found = {}
    model, opt = make(("mezo", "split8"), process_group=world())
    opt.step(zo.loss_of(model))
    param, rank = model[3].weight, dist.get_rank()
    opt.assert_in_sync()

    bits = param.data.view(torch.int16)
    # Two changes that cancel in a plain sum.
    change = mine(2, 1, 0)
    bits[0, 0] += change
    bits[0, 1] -= change
    found["weight"] = error_of(opt.assert_in_sync)
    bits[0, 0] -= change
    bits[0, 1] += change
    opt.assert_in_sync()
    opt.state[model[0].bias]["residual"][2] += rank == 0
    found["residual"] = error_of(opt.assert_in_sync)

    fused, opt = make(("mezo", "fused"), process_group=world())
    opt.step(zo.loss_of(fused))
    if rank == 0:
        opt.state_dict()
    found["flushed alone"] = error_of(lambda: opt.step(zo.loss_of(fused)))
    return found


def test_a_rank_that_has_drifted_is_named_with_its_first_parameter(tmp_path):
    for found in ranks.run(drifting, 3, tmp_path):
        assert found["weight"] == "RuntimeError: rank 2 has drifted from the others, in 3.weight"
        assert found["residual"] == (
            "RuntimeError: rank 0 has drifted from the others, in the residual of 0.bias"
        )
        assert "the place that the step began at is rest on rank 0, its" in found["flushed alone"]


def telling() -> dict[str, Any]:
    found: dict[str, Any] = {}
    model, opt = make(("gv", "float32"), process_group=world(), parallel="population")
    losses = [zo.loss_of(model)() for _ in opt.ask()]
    found["share"] = len(losses)
    found["too many"] = error_of(lambda: opt.tell([*losses, losses[0]]))
    opt.tell(losses)
    opt.tell([zo.loss_of(model)() for _ in opt.ask()])
    found["weights"] = zo.weights(model)

    model, opt = make(("mezo", "float32"), samples=40, process_group=world())
    opt.step(lambda: loss_of_part(model, dist.get_rank(), 3))
    found["many"] = opt.last.losses

    part = dist.new_group([0, 2])
    if dist.get_rank() == 1:
        found["not in it"] = error_of(lambda: make(("mezo", "float32"), process_group=part))
        return found
    model, opt = make(("mezo", "float32"), process_group=part)
    opt.step(lambda: float(dist.get_rank()))
    opt.assert_in_sync()
    found["some ranks"] = opt.last.losses
    return found


def test_ask_and_tell_of_a_share_long_messages_and_groups_of_some_ranks(tmp_path):
    model, opt = make(("gv", "float32"))
    opt.step(zo.loss_of(model))
    other, many = make(("mezo", "float32"), samples=40)
    a, b, c = (lambda rank=rank: loss_of_part(other, rank, 3) for rank in range(3))
    many.step(lambda: (a() + b() + c()) / 3)
    of_ranks = ranks.run(telling, 3, tmp_path)
    assert "a torch.distributed.ProcessGroup that this process is in" in of_ranks[1]["not in it"]
    assert of_ranks[0]["some ranks"] == of_ranks[2]["some ranks"] == (1.0, 1.0)
    for rank, found in enumerate(of_ranks):
        assert found["share"] == (2, 1, 1)[rank]
        assert f"got {found['share'] + 1} losses for {found['share']} points" in found["too many"]
        assert zo.same(found["weights"], zo.weights(model))
        assert found["many"] == many.last.losses


def recorded(folder: Path, begin: int, end: int, killed_at: int | None) -> list[Tensor]:
    rank = dist.get_rank()
    run = zokern.Trajectory(folder / "run.zok" if rank == 0 else None)
    model, opt = make(("mezo", "master"), trajectory=run, process_group=world())
    if begin > 0:
        checkpoint = torch.load(folder / "checkpoint.pt")
        model.load_state_dict(checkpoint["model"])
        opt.load_state_dict(checkpoint["optimizer"])
    for step in range(begin, end):
        if step == killed_at and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        opt.step(lambda: loss_of_part(model, rank, 2))
        if step == 1 and rank == 0:
            state = {"model": model.state_dict(), "optimizer": opt.state_dict()}
            torch.save(state, folder / "checkpoint.pt")
    if rank == 1:
        assert len(run) == 0
    return zo.weights(model)


def unrecordable() -> tuple[str, int]:
    run = zokern.Trajectory()
    model, opt = make(("mezo", "float32"), trajectory=run, process_group=world())
    opt.step(zo.loss_of(model))
    if dist.get_rank() == 0:
        opt._recorder.append = lambda *_: no_value()  # type: ignore[method-assign]
    error = error_of(lambda: opt.step(zo.loss_of(model)))
    opt.assert_in_sync()
    return error, opt.run["step"]


def test_a_killed_run_goes_on_from_its_checkpoint_and_its_trajectory(tmp_path):
    survivor, killed = ranks.start(recorded, 2, tmp_path, tmp_path, 0, 6, 4)
    assert survivor[0] == "raised"
    assert killed == ("died", -signal.SIGKILL)
    assert len(zokern.Trajectory.load(tmp_path / "run.zok")) == 4

    resumed = ranks.run(recorded, 2, tmp_path, tmp_path, 2, 6, None)
    model, opt = make(("mezo", "master"))
    for _ in range(6):
        opt.step(lambda: mean([loss_of_part(model, rank, 2) for rank in range(2)]))
    replayed = zo.make_model(torch.bfloat16)
    zokern.replay(replayed, tmp_path / "run.zok")
    for found in (*resumed, zo.weights(replayed)):
        assert zo.same(found, zo.weights(model))


def test_a_step_that_cannot_be_recorded_is_made_on_no_rank(tmp_path):
    first, second = ranks.run(unrecordable, 2, tmp_path)
    assert first[0] == "ValueError: no data"
    assert "rank 0 with ValueError: no data" in second[0]
    assert first[1] == second[1] == 1


def test_what_is_no_process_group_is_refused():
    params = [nn.Parameter(torch.zeros(3))]
    with pytest.raises(TypeError, match=r"must be a torch\.distributed\.ProcessGroup"):
        zokern.MeZO(params, lr=0.1, process_group="gloo")
    with pytest.raises(ValueError, match="must be 'data' or 'population', not 'model'"):
        zokern.MeZO(params, lr=0.1, parallel="model")


def test_the_checksum_knows_places_and_dtypes_of_one_size():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int16):
        tensor = torch.arange(24).reshape(4, 6).to(dtype)
        assert checksum(tensor) == checksum(tensor.clone())
        assert checksum(tensor) != checksum(tensor.flip(0))
        assert checksum(tensor.t()) == checksum(tensor.t().contiguous())
    large = torch.zeros((1 << 20) + 1)
    sums = [checksum(large)]
    for place in (0, 1 << 20):
        large[place] = 1.0
        sums.append(checksum(large))
        large[place] = 0.0
    assert len(set(sums)) == 3
    assert checksum(torch.zeros(0)) == 0


def test_differences_and_drift_of_many_keys_are_cut_short():
    of_ranks = [{str(i): rank for i in range(6)} for rank in range(2)]
    assert differences(of_ranks).endswith("3 is 0 on rank 0, 1 on rank 1; and 2 more")
    assert differences([of_ranks[0]] * 2) == ""
    assert drifted(of_ranks) == ([1], [str(i) for i in range(6)])
    assert drifted([{"a": 1}, {"a": 2}, {"a": 2}]) == ([0], ["a"])
