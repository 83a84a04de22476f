"""Recording a run, keeping the record safe, and replaying it."""

import copy
import json
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import zokern
from tests.commands import answers_to
from tests.zo import METHODS, CountOps, loss_of, make_model, same, vectors, weights
from zokern import Trajectory, TrajectoryError

safetensors = pytest.importorskip("safetensors.torch")

EVERY_METHOD = pytest.mark.parametrize("name", METHODS)


def rounds_of(name: str, model: nn.Module) -> list:
    given = vectors(model)
    return [(given["previous_update"], given["reward_delta"])] if "zopro" in name else []


def recorded(name="mezo", steps=5, dtype=torch.bfloat16, trajectory=None, **arguments):
    """A trained model and its trajectory."""
    model = make_model(dtype)
    trajectory = Trajectory() if trajectory is None else trajectory
    arguments = {"precision": "master", "weight_decay": 0.1, **arguments}
    optimizer = METHODS[name].make(model, trajectory=trajectory, **arguments)
    for _ in range(steps):
        optimizer.step(loss_of(model))
    optimizer.flush()
    return model, trajectory


@EVERY_METHOD
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_replay_is_the_run_bit_for_bit(name, dtype):
    model, trajectory = recorded(name, dtype=dtype)
    base = make_model(dtype)
    zokern.replay(base, trajectory, rounds=rounds_of(name, base))
    assert same(weights(base), weights(model))


@EVERY_METHOD
def test_a_replay_of_a_run_in_place_agrees_to_float32_rounding(name):
    model, trajectory = recorded(name, dtype=torch.float32, precision="inplace")
    base = make_model()
    zokern.replay(base, trajectory, rounds=rounds_of(name, base))
    for a, b in zip(weights(base), weights(model), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_groups_schedules_skips_and_changes_replay():
    model = make_model(torch.bfloat16)
    trajectory = Trajectory()
    groups = zokern.param_groups(model, weight_decay=0.1)
    optimizer = zokern.MeZO(
        groups, 0.02, seed=1, samples=2, precision="master", trajectory=trajectory, fuse_next=True
    )
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 6)
    for step in range(8):
        if step == 3:
            with pytest.warns(RuntimeWarning, match="not finite"):
                optimizer.step(lambda: float("nan"))
        if step == 5:
            optimizer.param_groups[0]["weight_decay"] = 0.3
            optimizer.param_groups[1]["momentum"] = 0.5
        optimizer.step(loss_of(model))
        scheduler.step()
    optimizer.flush()
    base = make_model(torch.bfloat16)
    zokern.replay(base, trajectory)
    assert same(weights(base), weights(model))
    assert len(trajectory) == 9


def test_several_rounds_of_zopro_replay():
    model = make_model()
    rounds = [
        tuple(vectors(model, seed)[k] for k in ("previous_update", "reward_delta"))
        for seed in (7, 8)
    ]
    trajectory = Trajectory()
    optimizer = METHODS["zopro"].make(
        model, advance="manual", precision="master", trajectory=trajectory
    )
    for step in range(6):
        optimizer.step(loss_of(model))
        if step % 2:
            optimizer.advance()
        if step == 2:
            optimizer.set_round(*rounds[1])
    base = make_model()
    with pytest.raises(TrajectoryError, match="none of the 1 rounds has the checksums"):
        zokern.replay(base, trajectory, rounds=rounds[:1])
    with pytest.raises(TrajectoryError, match="give rounds="):
        zokern.replay(base, trajectory)
    assert same(weights(base), weights(make_model()))
    zokern.replay(base, trajectory, rounds=rounds)
    assert same(weights(base), weights(model))


def test_rounds_with_vectors_of_frozen_parameters_replay():
    model = make_model()
    model[3].requires_grad_(False)
    trajectory = Trajectory()
    optimizer = METHODS["zopro"].make(model, precision="master", trajectory=trajectory)
    optimizer.step(loss_of(model))
    base = make_model()
    zokern.replay(base, trajectory, rounds=rounds_of("zopro", base))
    assert same(weights(base), weights(model))


def test_tensors_that_cannot_be_written_are_refused_before_anything_is(monkeypatch):
    _, trajectory = recorded("mezo", dtype=torch.float32)
    monkeypatch.setattr(sys.modules["zokern.replay"], "ELEMENTS", 10)
    base = dict(make_model().state_dict())
    base["3.weight"] = torch.zeros(4, 32)[:, ::2].copy_(base["3.weight"])
    before = {name: tensor.clone() for name, tensor in base.items()}
    with pytest.raises(TrajectoryError, match=r"3\.weight cannot be written in place"):
        zokern.replay(base, trajectory)
    assert same(list(base.values()), list(before.values()))


def test_parameters_without_names_replay_by_order():
    model = make_model()
    trajectory = Trajectory()
    optimizer = zokern.MeZO(
        model.parameters(), 0.01, seed=1, precision="master", trajectory=trajectory
    )
    for _ in range(3):
        optimizer.step(loss_of(model))
    base = make_model()
    zokern.replay(base.parameters(), trajectory)
    assert same(weights(base), weights(model))


def test_what_was_frozen_stays_as_it_is():
    model = make_model()
    model[0].weight.requires_grad_(False)
    trajectory = Trajectory()
    optimizer = METHODS["mezo"].make(model, precision="master", trajectory=trajectory)
    for _ in range(3):
        optimizer.step(loss_of(model))
    base = make_model()
    zokern.replay(base.state_dict(), trajectory)
    assert same(weights(base), weights(model))


def test_the_size_of_a_step():
    """At most 16 bytes a direction, step and param group."""
    for groups in (1, 2):
        for samples in (1, 3):
            model = make_model()
            params = list(model.named_parameters())
            given = [params[:2], params[2:]] if groups == 2 else [params]
            trajectory = Trajectory()
            optimizer = zokern.MeZO(
                [{"params": p} for p in given],
                0.01,
                seed=1,
                samples=samples,
                weight_decay=0.1,
                momentum=0.9,
                trajectory=trajectory,
            )
            optimizer.step(loss_of(model))
            before = len(trajectory.to_bytes())
            for _ in range(10):
                optimizer.step(loss_of(model))
            size = (len(trajectory.to_bytes()) - before) / 10
            assert size <= 16 * groups * samples


def test_steps_are_merged_into_few_sweeps():
    weight = nn.Parameter(torch.randn(1000).bfloat16())
    base = weight.detach().clone()
    trajectory = Trajectory()
    optimizer = zokern.MeZO(
        [("w", weight)], 0.01, seed=1, precision="master", weight_decay=0.1, trajectory=trajectory
    )
    with CountOps() as counted:
        for _ in range(300):
            optimizer.step(lambda: weight.detach()[0].float())
    with CountOps() as replayed:
        zokern.replay({"w": base}, trajectory)
    assert torch.equal(base, weight.detach())
    assert counted.sweeps == 900
    assert replayed.sweeps < 90


def test_large_models_are_replayed_in_chunks(monkeypatch):
    model, trajectory = recorded("momentum")
    # The function has the name of its module.
    monkeypatch.setattr(sys.modules["zokern.replay"], "ELEMENTS", 100)
    base = make_model(torch.bfloat16)
    zokern.replay(base, trajectory)
    assert same(weights(base), weights(model))


def test_files_hold_the_same(tmp_path):
    path = tmp_path / "run.zok"
    model, written = recorded("gv", trajectory=Trajectory(path))
    loaded = Trajectory.load(path)
    assert list(loaded) == list(written)
    assert loaded.header == written.header
    assert len(loaded) == 5
    loaded.save(tmp_path / "copy.zok")
    assert (tmp_path / "copy.zok").read_bytes() == path.read_bytes()
    base = make_model(torch.bfloat16)
    zokern.replay(base, path)
    assert same(weights(base), weights(model))


def test_every_cut_loads_to_its_last_whole_step(tmp_path):
    path = tmp_path / "run.zok"
    recorded("mezo", trajectory=Trajectory(path))
    data, whole = path.read_bytes(), list(Trajectory.load(path))
    header = len(data) - len(b"".join(Trajectory.load(path)._records))
    lengths = set()
    for size in range(header, len(data)):
        path.write_bytes(data[:size])
        loaded = Trajectory.load(path, allow_truncated=True)
        assert list(loaded) == whole[: len(loaded)]
        lengths.add(len(loaded))
        if loaded.to_bytes() != data[:size]:
            with pytest.raises(TrajectoryError, match=f"is cut off in step {len(loaded)} "):
                Trajectory.load(path)
    assert lengths == {0, 1, 2, 3, 4}
    for size in (0, 5, 20, header - 1):
        path.write_bytes(data[:size])
        with pytest.raises(TrajectoryError, match=r"is cut off in its header|is no zokern traj"):
            Trajectory.load(path, allow_truncated=True)


def test_every_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "run.zok"
    recorded("mezo", trajectory=Trajectory(path))
    data = path.read_bytes()
    choose = random.Random(0)
    for _ in range(300):
        at = choose.randrange(len(data))
        damaged = bytearray(data)
        damaged[at] ^= 1 << choose.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(TrajectoryError, match=r"damaged|cut off|no zokern trajectory"):
            Trajectory.load(path)


def test_a_damaged_file_is_left_as_it_is(tmp_path):
    path = tmp_path / "run.zok"
    recorded("mezo", steps=20, trajectory=Trajectory(path))
    data = bytearray(path.read_bytes())
    data[-16 * 10 + 5] ^= 1
    path.write_bytes(data)
    for read in (Trajectory, lambda p: Trajectory.load(p, allow_truncated=True)):
        with pytest.raises(TrajectoryError, match=r"is damaged in step 1\d "):
            read(path)
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    ("name", "precision"), [("mezo", "master"), ("mezo", "split"), ("momentum", "inplace")]
)
def test_a_recording_begins_with_the_run(name, precision):
    """Else a replay would lack what masters, residuals and momentum held already."""
    model = make_model(torch.bfloat16)
    optimizer = METHODS[name].make(model, precision=precision)
    optimizer.step(loss_of(model))
    late = METHODS[name].make(model, precision=precision, trajectory=Trajectory())
    late.load_state_dict(optimizer.state_dict())
    before = weights(model)
    with pytest.raises(TrajectoryError, match="has begun without the trajectory"):
        late.step(loss_of(model))
    assert same(weights(model), before)


def test_weights_in_place_may_be_recorded_from_any_step():
    model = make_model()
    optimizer = METHODS["mezo"].make(model)
    optimizer.step(loss_of(model))
    trajectory = Trajectory()
    late = METHODS["mezo"].make(model, trajectory=trajectory)
    late.load_state_dict(optimizer.state_dict())
    base = make_model()
    base.load_state_dict(model.state_dict())
    late.step(loss_of(model))
    zokern.replay(base, trajectory)
    for a, b in zip(weights(base), weights(model), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_recorded_weights_that_somebody_changes_are_noticed():
    model = make_model()
    optimizer = METHODS["mezo"].make(model, trajectory=Trajectory())
    optimizer.step(loss_of(model))
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"0\.weight is recorded in a trajectory"):
        optimizer.step(loss_of(model))
    with pytest.raises(RuntimeError, match="a trajectory records this run"):
        optimizer.refresh()


def test_a_run_that_made_no_step_leaves_no_checksums(tmp_path):
    path = tmp_path / "run.zok"

    def fails():
        raise MemoryError

    optimizer = METHODS["mezo"].make(make_model(), trajectory=Trajectory(path))
    with pytest.raises(MemoryError):
        optimizer.step(fails)
    model, base = make_model(), make_model()
    with torch.no_grad():
        for param in (*model.parameters(), *base.parameters()):
            param.add_(1)
    optimizer = METHODS["mezo"].make(model, precision="master", trajectory=Trajectory(path))
    optimizer.step(loss_of(model))
    zokern.replay(base, path)
    assert same(weights(base), weights(model))


def test_a_run_may_be_made_anew_from_its_first_checkpoint(tmp_path):
    path = tmp_path / "run.zok"
    model = make_model()
    first = METHODS["mezo"].make(model, precision="master", trajectory=Trajectory(path))
    state = copy.deepcopy(first.state_dict())
    first.step(loss_of(model))
    again = make_model()
    second = METHODS["mezo"].make(again, precision="master", trajectory=Trajectory(path))
    second.load_state_dict(state)
    second.step(loss_of(again))
    assert same(weights(again), weights(model))
    assert len(Trajectory.load(path)) == 1


@pytest.mark.parametrize(
    ("key", "value"), [("seed", 5), ("law", "normal"), ("sign", True), ("precision", "inplace")]
)
def test_what_a_replay_takes_from_the_header_may_not_change(key, value):
    model = make_model()
    trajectory = Trajectory()
    optimizer = METHODS["mezo"].make(model, precision="master", trajectory=trajectory)
    optimizer.step(loss_of(model))
    before = weights(model)
    optimizer.param_groups[0][key] = value
    with pytest.raises(TrajectoryError, match=f"its {key} is"):
        optimizer.step(loss_of(model))
    assert same(weights(model), before)
    assert len(trajectory) == 1


def test_one_optimizer_records_in_a_trajectory(tmp_path):
    trajectory = Trajectory()
    first = METHODS["mezo"].make(make_model(), trajectory=trajectory)
    second = METHODS["mezo"].make(make_model(), trajectory=trajectory)
    first.step(loss_of(make_model()))
    with pytest.raises(TrajectoryError, match="another optimizer records"):
        second.step(loss_of(make_model()))

    path = tmp_path / "run.zok"
    models = make_model(), make_model()
    pair = [METHODS["mezo"].make(m, trajectory=Trajectory(path)) for m in models]
    pair[0].step(loss_of(models[0]))
    with pytest.raises(TrajectoryError, match="somebody else has written to"):
        pair[1].step(loss_of(models[1]))
    assert len(Trajectory.load(path)) == 1


def test_an_optimizer_that_was_loaded_takes_over():
    model, trajectory = make_model(), Trajectory()
    first = METHODS["mezo"].make(model, precision="master", trajectory=trajectory)
    first.step(loss_of(model))
    second = METHODS["mezo"].make(model, precision="master", trajectory=trajectory)
    second.load_state_dict(first.state_dict())
    second.step(loss_of(model))
    with pytest.raises(RuntimeError, match="somebody else has written"):
        first.step(loss_of(model))
    base = make_model()
    zokern.replay(base, trajectory)
    assert same(weights(base), [second.state[p]["master"] for p in model.parameters()])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_a_copy_of_a_trajectory_is_a_branch_of_the_run(duplicate):
    model, trajectory = make_model(), Trajectory()
    first = METHODS["mezo"].make(model, precision="master", trajectory=trajectory)
    first.step(loss_of(model))
    other = copy.deepcopy(model)
    branch = METHODS["mezo"].make(other, precision="master", trajectory=duplicate(trajectory))
    branch.load_state_dict(copy.deepcopy(first.state_dict()))
    branch.step(loss_of(other))
    first.step(loss_of(model))
    assert same(weights(model), weights(other))
    assert len(trajectory) == 2


def test_weights_loaded_before_the_first_recorded_step_are_the_base():
    model, base, trajectory = make_model(), make_model(), Trajectory()
    optimizer = METHODS["mezo"].make(model, trajectory=trajectory)
    next(optimizer.ask())
    optimizer.flush()
    with torch.no_grad():
        for param in (*model.parameters(), *base.parameters()):
            param.fill_(0.1)
    optimizer.step(loss_of(model))
    zokern.replay(base, trajectory)
    for a, b in zip(weights(base), weights(model), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_step_that_cannot_be_recorded_is_dropped(tmp_path):
    path = tmp_path / "run.zok"
    model = make_model()
    optimizer = METHODS["mezo"].make(model, precision="master", trajectory=Trajectory(path))
    optimizer.step(loss_of(model))
    before = weights(model)
    list(optimizer.ask())
    path.unlink()
    with pytest.raises(TrajectoryError, match="somebody else has written"):
        optimizer.tell([1.0, 0.0])
    assert same(weights(model), before)
    assert optimizer.run["step"] == 1


def test_a_run_resumes_from_its_checkpoint_and_its_file(tmp_path):
    path = tmp_path / "run.zok"
    model, _ = recorded("gv", steps=6)
    wanted = weights(model)

    model = make_model(torch.bfloat16)
    arguments = {"precision": "master", "weight_decay": 0.1}
    optimizer = METHODS["gv"].make(model, trajectory=Trajectory(path), **arguments)
    for step in range(5):
        if step == 3:
            torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
        optimizer.step(loss_of(model))
    with open(path, "ab") as file:
        file.write(b"half a step")

    model = make_model(torch.bfloat16)
    trajectory = Trajectory(path)
    assert len(trajectory) == 5
    optimizer = METHODS["gv"].make(model, trajectory=trajectory, **arguments)
    states = torch.load(tmp_path / "state.pt")
    model.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    for _ in range(3):
        optimizer.step(loss_of(model))
    assert same(weights(model), wanted)
    base = make_model(torch.bfloat16)
    zokern.replay(base, path)
    assert same(weights(base), wanted)


def test_a_file_is_not_overwritten_by_another_run(tmp_path):
    path = tmp_path / "run.zok"
    recorded(trajectory=Trajectory(path))
    before = path.read_bytes()
    model = make_model(torch.bfloat16)
    base = weights(model)
    arguments = {"precision": "master", "weight_decay": 0.1}
    for changes, message in (
        ({}, "holds 5 steps already"),
        ({"seed": 4}, "its seed is 3, not 4"),
        ({"law": "normal"}, "its law is 'gauss16', not 'normal'"),
    ):
        optimizer = METHODS["mezo"].make(
            model, trajectory=Trajectory(path), **{**arguments, **changes}
        )
        with pytest.raises(TrajectoryError, match=message):
            optimizer.step(loss_of(model))
    assert path.read_bytes() == before
    assert same(weights(model), base)


def test_a_full_disk_stops_the_step_before_it_is_made(tmp_path, monkeypatch):
    model = make_model()
    trajectory = Trajectory(tmp_path / "run.zok")
    optimizer = METHODS["mezo"].make(model, precision="master", trajectory=trajectory)
    optimizer.step(loss_of(model))
    before = weights(model)

    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("zokern.trajectory.open", lambda *_, **__: Full(), raising=False)
    with pytest.raises(OSError, match="No space left"):
        optimizer.step(loss_of(model))
    monkeypatch.undo()
    assert same(weights(model), before)
    assert len(trajectory) == 1
    optimizer.step(loss_of(model))
    base = make_model()
    zokern.replay(base, tmp_path / "run.zok")
    assert same(weights(base), weights(model))


def test_a_sweep_that_fails_is_not_recorded(tmp_path, monkeypatch):
    model = make_model()
    trajectory = Trajectory(tmp_path / "run.zok")
    optimizer = METHODS["mezo"].make(model, precision="master", trajectory=trajectory)
    optimizer.step(loss_of(model))
    list(optimizer.ask())
    with pytest.raises(ValueError, match="finite"):
        optimizer.tell([1e38, -1e38])
    optimizer.flush()
    assert len(Trajectory.load(tmp_path / "run.zok")) == 1
    optimizer.step(loss_of(model))
    base = make_model()
    zokern.replay(base, tmp_path / "run.zok")
    assert same(weights(base), weights(model))


RUN = """
    import sys
    import torch
    import zokern
    from tests.zo import make_model, loss_of
    torch.set_num_threads(1)
    model = make_model(torch.bfloat16)
    run = zokern.Trajectory(sys.argv[1])
    optimizer = zokern.MeZO(model.named_parameters(), 0.01, seed=1, precision="master",
                            trajectory=run)
    for step in range(int(sys.argv[2])):
        optimizer.step(loss_of(model))
        print(step + 1, flush=True)
    torch.save(model.state_dict(), sys.argv[3])
"""


def run_script(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(RUN), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )


def test_a_killed_run_replays_to_its_last_whole_step(tmp_path):
    path, choose = tmp_path / "run.zok", random.Random()
    process = run_script(path, 10**9, tmp_path / "never")
    assert process.stdout is not None
    for _ in range(20):
        process.stdout.readline()
    time.sleep(choose.uniform(0, 0.2))
    os.kill(process.pid, signal.SIGKILL)
    made = int(process.stdout.read().split("\n")[-2] or 0)
    process.wait()
    trajectory = Trajectory.load(path, allow_truncated=True)
    assert made <= len(trajectory) <= made + 1

    whole = run_script(tmp_path / "again.zok", len(trajectory), tmp_path / "model.pt")
    whole.communicate()
    base, wanted = make_model(torch.bfloat16), make_model(torch.bfloat16)
    zokern.replay(base, trajectory)
    wanted.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert same(weights(base), weights(wanted))


def test_other_weights_are_refused_by_the_field():
    model, trajectory = recorded()
    other = make_model(torch.bfloat16)
    base = weights(other)
    named = dict(other.named_parameters())
    wrong = {
        r"there are no weights for its \['0.weight'": {},
        r"the shape of 0\.weight is \[16, 10\]": named | {"0.weight": torch.zeros(3)},
        r"the dtype of 0\.weight is 'bfloat16'": named | {"0.weight": torch.zeros(16, 10)},
        r"the checksum of 0\.weight differs": named | {"0.weight": named["0.weight"] * 2},
    }
    for message, given in wrong.items():
        with pytest.raises(TrajectoryError, match=message):
            zokern.replay(given, trajectory)
    with pytest.raises(TrajectoryError, match="parameters have names"):
        zokern.replay(other.parameters(), trajectory)
    assert same(weights(other), base)
    with pytest.raises(TrajectoryError, match="the checksum"):
        zokern.replay(model, trajectory)


def test_new_weights_end_a_recording():
    model = make_model()
    optimizer = METHODS["mezo"].make(model, trajectory=Trajectory())
    optimizer.step(loss_of(model))
    with pytest.raises(RuntimeError, match="a trajectory records this run"):
        optimizer.refresh()


def test_no_trajectory():
    with pytest.raises(TypeError, match=r"must be a zokern\.Trajectory, not 'run\.zok'"):
        zokern.MeZO(make_model().named_parameters(), 0.1, trajectory="run.zok")


def command(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "zokern", "replay", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        check=False,
    )


def test_the_command_replays_a_checkpoint(tmp_path):
    model, _ = recorded("gv", trajectory=Trajectory(tmp_path / "run.zok"))
    base = dict(make_model(torch.bfloat16).state_dict())
    base["step"] = torch.tensor([7])
    safetensors.save_file(base, tmp_path / "base.safetensors", metadata={"format": "pt"})
    run = command(
        tmp_path / "base.safetensors", tmp_path / "run.zok", "--out", tmp_path / "out.safetensors"
    )
    assert run.returncode == 0, run.stderr
    assert "replay" in run.stderr  # the progress bar
    got = safetensors.load_file(tmp_path / "out.safetensors")
    assert got.pop("step").item() == 7
    assert same(list(got.values()), [model.state_dict()[name] for name in got])
    unchanged = safetensors.load_file(tmp_path / "base.safetensors")
    assert same(list(unchanged.values()), [base[name] for name in unchanged])


def test_the_command_replays_shards(tmp_path):
    model, _ = recorded("mezo", trajectory=Trajectory(tmp_path / "run.zok"))
    base = dict(make_model(torch.bfloat16).state_dict())
    folder = tmp_path / "base"
    folder.mkdir()
    names = list(base)
    for i, part in enumerate((names[:2], names[2:])):
        safetensors.save_file(
            {name: base[name] for name in part}, folder / f"model-{i}.safetensors"
        )
    (folder / "config.json").write_text("{}")
    given = ("replay", folder, tmp_path / "run.zok", "--out", tmp_path / "out")
    (code, said), (code_again, said_again) = answers_to([given, given])
    assert code == 0, said
    assert code_again == 1
    assert "exists already" in said_again
    assert (tmp_path / "out" / "config.json").exists()
    got = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        got |= safetensors.load_file(file)
    assert same([got[name] for name in names], [model.state_dict()[name] for name in names])


def test_the_command_says_what_is_wrong_and_leaves_nothing(tmp_path):
    run, out = tmp_path / "run.zok", tmp_path / "out.safetensors"
    recorded("mezo", trajectory=Trajectory(run))
    bad, folder = tmp_path / "bad.safetensors", tmp_path / "twice"
    bad.write_bytes(struct.pack("<Q", 2) + json.dumps({}).encode())
    base = dict(make_model(torch.bfloat16).state_dict())
    folder.mkdir()
    for name in ("a", "b"):
        safetensors.save_file(base, folder / f"{name}.safetensors")
    before = sorted(tmp_path.rglob("*"))
    cases = [
        ((tmp_path / "missing", run, "--out", out), "there is no file"),
        ((run, run, "--out", out), "is no safetensors file"),
        ((bad, run, "--out", out), "there are no weights for its"),
        ((folder, run, "--out", tmp_path / "out"), "several files of the folder hold"),
        ((folder / "a.safetensors", run, "--out", run), "would overwrite"),
        ((folder / "a.safetensors", run, "--out", out, "--device", "tpu"), "'tpu' cannot be used"),
    ]
    answers = answers_to(("replay", *arguments) for arguments, _ in cases)
    for (code, said), (_, message) in zip(answers, cases, strict=True):
        assert code == 1, message
        assert message in said
    assert sorted(tmp_path.rglob("*")) == before
