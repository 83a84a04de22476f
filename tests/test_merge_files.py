"""Merges of safetensors checkpoints, by zokern.merge and by ``python -m zokern merge``."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.commands import answers_to
from tests.test_merge import State, assert_same, state, states
from zokern import merge
from zokern.checkpoints import CheckpointError

safetensors = pytest.importorskip("safetensors.torch")


def save(path: Path, tensors: State) -> Path:
    safetensors.save_file(tensors, path, metadata={"format": "pt"})
    return path


def save_shards(folder: Path, tensors: State) -> Path:
    """With an index, and beside the shards what a model's folder holds besides."""
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"stale")
    names = list(tensors)
    places = {name: f"model-{i % 2 + 1}-of-2.safetensors" for i, name in enumerate(names)}
    for place in set(places.values()):
        save(folder / place, {name: tensors[name] for name in names if places[name] == place})
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save(folder / "consolidated.safetensors", tensors)
    return folder


def load(path: Path) -> State:
    files = [path]
    if path.is_dir():
        index = json.loads((path / "model.safetensors.index.json").read_text())
        files = [path / name for name in sorted(set(index["weight_map"].values()))]
    return {name: t for file in files for name, t in safetensors.load_file(file).items()}


def with_steps(tensors: State, steps: int) -> State:
    """With a tensor that is not merged, and one of no elements."""
    return tensors | {"steps": torch.tensor([steps, 2]), "none": torch.empty(0, 3)}


def same(got: State, wanted: State) -> None:
    assert_same({name: got[name] for name in wanted}, wanted)
    assert len(got) == len(wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_files_folders_and_state_dicts_are_merged_alike(tmp_path, dtype):
    base, models = states(dtype)
    base, models = with_steps(base, 1), [with_steps(model, 1) for model in models]
    given = {"density": 0.4, "weights": [0.5, 1.0, 0.2]}
    wanted = merge.dare_ties(models, base=base, **given)
    file = save(tmp_path / "base.safetensors", base)
    folder = save_shards(tmp_path / "base", base)
    own = [
        save(tmp_path / "a.safetensors", models[0]),
        str(save_shards(tmp_path / "b", models[1])),
        models[2],
    ]
    for i, (given_base, out) in enumerate([(file, "out"), (base, "from_dict"), (folder, "folder")]):
        assert merge.dare_ties(own, base=given_base, out=tmp_path / out, **given) == {}, i
        same(load(tmp_path / out), wanted)
        same(merge.dare_ties(own, base=given_base, **given), wanted)
    kept = sorted(str(p.relative_to(tmp_path / "folder")) for p in (tmp_path / "folder").rglob("*"))
    assert kept == [
        *("1_Pooling", "1_Pooling/config.json", "config.json", "model-1-of-2.safetensors"),
        *("model-2-of-2.safetensors", "model.safetensors.index.json"),
    ]
    with safetensors.safe_open(tmp_path / "out", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    same(load(file), base)


def test_all_semantics_are_streamed(tmp_path):
    base, models = states()
    paths = [save(tmp_path / f"{m}.safetensors", model) for m, model in enumerate(models)]
    file = save(tmp_path / "base.safetensors", base)
    for semantics in ("mergekit", "peft", "ties"):
        given = {"density": 0.3, "semantics": semantics}
        merge.ties(paths, base=file, out=tmp_path / "out.safetensors", **given)
        same(load(tmp_path / "out.safetensors"), merge.ties(models, base=base, **given))
    merge.linear(paths, out=tmp_path / "out.safetensors")
    same(load(tmp_path / "out.safetensors"), merge.linear(models))


def test_no_output_takes_the_place_of_an_input_or_a_folder(tmp_path):
    base = state(0)
    file, folder = save(tmp_path / "base.safetensors", base), save_shards(tmp_path / "b", base)
    (tmp_path / "link").symlink_to(file)
    other = tmp_path / "other"
    other.mkdir()
    for model, given_base, out, message in [
        (base, file, file, "is merged itself"),
        (base, file, tmp_path / "link", "is merged itself"),
        (file, base, file, "is merged itself"),
        (file, None, file, "is merged itself"),
        (base, folder, folder, "is merged itself"),
        (base, folder, folder / "model-1-of-2.safetensors", "is merged itself"),
        (base, folder, other, "exists already"),
        (base, file, other, "give a file, as .*base.safetensors is one"),
        (base, base, other, "give a file, as the output is one"),
        (base, file, tmp_path / "no" / "folder", "there is no folder"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            merge.linear([model], base=given_base, out=out)
    same(load(file), base)


def test_damaged_checkpoints_are_named(tmp_path):
    base = state(0)
    file, folder = save(tmp_path / "base.safetensors", base), save_shards(tmp_path / "b", base)
    (tmp_path / "cut").write_bytes(file.read_bytes()[:-100])
    (tmp_path / "empty").touch()
    (tmp_path / "nothing").mkdir()
    header = b'{"w":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    (tmp_path / "f4").write_bytes(len(header).to_bytes(8, "little") + header + b"1")
    for name, message in [
        ("missing", "there is no file"),
        ("cut", "cut is no safetensors file"),
        ("empty", "empty is no safetensors file"),
        ("nothing", "there are no .safetensors files"),
        ("f4", "w is of the type F4, which cannot be read"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            merge.linear([base, tmp_path / name], base=base, out=tmp_path / "out")
    (folder / "model-1-of-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match="files that are not there"):
        merge.linear([folder])
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is no index of shards"):
        merge.linear([folder])
    assert not (tmp_path / "out").exists()


def test_a_merge_that_fails_leaves_nothing(tmp_path):
    base, models = states(count=1)
    file = save(tmp_path / "base.safetensors", base)
    models[0]["norm"][0] = float("nan")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="norm of models"):
        merge.ties(models, base=file, density=0.5, out=tmp_path / "out.safetensors")
    assert sorted(tmp_path.iterdir()) == before


def command(*arguments: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "zokern", "merge", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        check=False,
        **options,
    )


def test_the_command_merges_checkpoints(tmp_path):
    base, models = states()
    paths = [save(tmp_path / f"{m}.safetensors", model) for m, model in enumerate(models)]
    file, out = save(tmp_path / "base.safetensors", base), tmp_path / "out.safetensors"
    options = ("--density", 0.3, "--weights", 0.5, 1, 0.2, "--lambda", 0.9, "--seed", 4)
    run = command("dare_ties", *paths, "--base", file, "--out", out, *options, "--normalize")
    assert run.returncode == 0, run.stderr
    assert "merge" in run.stderr  # the progress bar
    given = {"weights": [0.5, 1, 0.2], "lambda_": 0.9, "seed": 4, "normalize": True}
    same(load(out), merge.dare_ties(models, base=base, density=0.3, **given))


def test_the_command_says_what_is_wrong_and_leaves_nothing(tmp_path):
    base, models = states(count=1)
    file, model = save(tmp_path / "base", base), save(tmp_path / "model", models[0])
    before = sorted(tmp_path.iterdir())
    out = ("--base", file, "--out", tmp_path / "out")
    cases = [
        (("ties", model, *out), "zokern: ties needs --density"),
        (("linear", model, *out, "--density", 1), "zokern: linear has no --density"),
        (("linear", model, *out, "--seed", 1), "zokern: linear has no --seed"),
        (("ties", model, *out, "--density", 2), "zokern: density must be above 0"),
        (("linear", tmp_path / "no", *out), "zokern: there is no file"),
        (("linear", model, "--base", file, "--out", model), "is merged itself"),
        (("linear", model, *out, "--device", "tpu"), "'tpu' cannot be used"),
        (("dare", model, *out, "--density", 0.5, "--semantics", "ties"), "that have random masks"),
    ]
    answers = answers_to(("merge", *arguments) for arguments, _ in cases)
    for (code, said), (_, message) in zip(answers, cases, strict=True):
        assert code == 1, message
        assert message in said
    assert sorted(tmp_path.iterdir()) == before


SLOW = """
import sys, time
import signal
# A background job begins with Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from zokern import __main__, ops
merge = ops.merge_deltas
def slow(*arguments, **given):
    merge(*arguments, **given)
    print("merging", flush=True)
    time.sleep(60)
ops.merge_deltas = slow
sys.argv = ["zokern", *sys.argv[1:]]
__main__.main()
"""


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_merge_that_is_stopped_leaves_no_half_output(tmp_path, number, folder):
    base, models = states(count=1)
    base_path = save_shards(tmp_path / "base", base) if folder else save(tmp_path / "base", base)
    model, out = save(tmp_path / "model", models[0]), tmp_path / "out"
    if not folder:
        out.write_bytes(b"as it was")
    before = sorted(tmp_path.iterdir())
    arguments = f"merge linear {model} --base {base_path} --out {out}".split()
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "merging\n"
    os.kill(process.pid, number)
    process.communicate()
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert sorted(tmp_path.iterdir()) == before
    assert not out.exists() if folder else out.read_bytes() == b"as it was"


def test_an_index_names_its_files(tmp_path):
    folder = tmp_path / "sharded"
    folder.mkdir()
    for name, value in (("a", 1.0), ("b", 2.0)):
        save(folder / f"{name}.safetensors", {name: torch.full((3,), value)})
        save(folder / f"{name}.other.safetensors", {name: torch.full((3,), 7.0)})
    for variant in ("model", "other"):
        files = {
            n: f"{n}.safetensors" if variant == "model" else f"{n}.other.safetensors" for n in "ab"
        }
        index = folder / f"{variant}.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": files}))
    result = merge.linear([folder / "model.safetensors.index.json"])
    assert result["a"].tolist() == [1.0] * 3
    result = merge.linear([folder / "other.safetensors.index.json"])
    assert result["b"].tolist() == [7.0] * 3
    with pytest.raises(ValueError, match="there is no file"):
        merge.linear([folder / "none.safetensors.index.json"])
    with pytest.raises(ValueError, match="is an index: give its folder"):
        merge.linear([folder / "model.safetensors.index.json"], out=tmp_path / "out.safetensors")
    for out in (folder / "model.safetensors.index.json", folder / "a.safetensors"):
        with pytest.raises(ValueError, match="is merged itself"):
            merge.linear([{"a": torch.ones(3), "b": torch.ones(3)}, folder], out=out)
    with pytest.raises(ValueError, match="which it is to be a copy of"):
        merge.linear([folder], out=folder / "new")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 7]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
    ],
)
def test_damaged_headers_are_refused(entry, tmp_path):
    header = json.dumps({"a": entry}).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match="is no safetensors file"):
        merge.linear([path])


def test_models_that_untie_what_the_base_ties_are_refused():
    tied = torch.randn(3, 2)
    base = {"embedding": tied, "head": tied}
    with pytest.raises(ValueError, match="are one tensor in base, several in models"):
        merge.linear([{"embedding": tied + 1, "head": tied + 2}], base=base)


def test_weights_that_cancel_out_are_refused():
    models = [{"a": torch.ones(2)} for _ in range(3)]
    with pytest.raises(ValueError, match="sum to 0"):
        merge.linear(models, weights=[0.1, 0.2, -0.3])
