"""The benchmark: that it runs through, says what it should, and compares like with like."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import zokern
from zokern.backends import triton
from zokern.bench import __main__ as command
from zokern.bench import goals, machine, memory, models, peers, report
from zokern.bench.comparison import COPY, DTYPES, IN_PLACE, OURS, Setting, Unavailable, bandwidth
from zokern.bench.operations import END_TO_END, OPERATIONS
from zokern.bench.run import Plan, run
from zokern.bench.table import tables
from zokern.bench.timing import rotated, take_turns

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SMALL = Plan(
    device=CPU,
    ops=list(OPERATIONS),
    dtypes=["fp32", "bf16"],
    numel=1 << 12,
    model_shapes="opt-tiny",
    model="opt-tiny",
    tokens=8,
    peers="quick",
    rounds=1,
    seconds=0.0,
    minutes=60.0,
)


def setting(dtype: torch.dtype = torch.float32, numel: int = 1 << 14) -> Setting:
    return Setting(CPU, dtype, numel, "opt-tiny")


@pytest.fixture(scope="module")
def operations() -> dict:
    """The results of all operations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zokern.bench.run.MOST_SETS", 2)
        return run(SMALL, progress=False)


@pytest.fixture(scope="module")
def steps() -> dict:
    """The results of whole steps, of which peak memory has a test of its own."""
    with pytest.MonkeyPatch.context() as patch:
        peaks = dict(zip(memory.KINDS, (100, 110, 120), strict=True))
        patch.setattr("zokern.bench.run.peaks", lambda setting, layers: peaks)
        return run(replace(SMALL, ops=[END_TO_END], dtypes=["bf16"]), progress=False)


def test_every_operation_is_timed_beside_a_copy_and_its_peers(operations):
    measured = {(r["operation"], r["dtype"]) for r in operations["operations"]}
    assert measured == set(SMALL.tasks())
    for record in operations["operations"]:
        assert record["seconds"]["low"] <= record["seconds"]["median"] <= record["seconds"]["high"]
        assert record["copy_gbps"] > 0
        assert record["share_of_copy"] == record["gbps"] / record["copy_gbps"]
        beside = record["bytes_at_copy_speed"] / record["bytes_floor"]
        assert beside == pytest.approx(1 / record["share_of_copy"])
        skipped = any(what.startswith("beside") for what in operations["skipped"])
        assert skipped or all(peer["times"] > 0 for peer in record["peers"].values())
        assert skipped or record["peers"]
    json.dumps(operations)


def test_a_run_says_on_what_it_ran(operations):
    about = operations["machine"]
    assert about["torch"] == torch.__version__
    assert about["zokern"] == zokern.__version__
    assert about["threads"] == torch.get_num_threads()
    assert {"cpu", "cpu_capability", "cpu_mhz", "triton", "python", "commit"} <= about.keys()
    assert about["backend"] in ("native", "triton", "reference")
    assert operations["settings"]["numel"] == SMALL.numel
    assert machine.file_name(about).startswith("cpu-")
    assert machine.file_name(about).endswith(f"-{about['threads']}.json")


def test_whole_steps_are_split_into_forward_passes_and_the_rest(steps):
    assert steps["skipped"] == {}
    assert [r["line"] for r in steps["steps"]] == ["in place", "layerwise", "eager loop"]
    for record in steps["steps"]:
        whole = record["forward_seconds"] + record["optimizer_seconds"]
        assert whole == pytest.approx(record["seconds"]["median"])
    in_place, layerwise, eager = steps["steps"]
    assert [r["peak_bytes"] for r in (in_place, layerwise, eager)] == [110, 120, None]
    assert {r["forward_peak_bytes"] for r in steps["steps"]} == {100}
    assert "opt-tiny, 2 of 2 layers, bf16, 8 tokens" in tables(steps)


@pytest.mark.skipif(not memory.STATUS.exists(), reason="nobody says what a process has taken")
def test_peak_memory_has_at_least_the_weights():
    own = replace(setting(torch.bfloat16), model="opt-125m", tokens=4)
    weights = sum(2 * shape.numel() for shape in models.shapes("opt-125m", 1).values())
    peaks = memory.peaks(own, layers=1)
    assert list(peaks) == list(memory.KINDS)
    for peak in peaks.values():
        assert 0.9 * weights < peak < 8 * weights


def test_the_table_has_a_line_for_each_record(operations):
    lines = tables(operations).splitlines()
    assert len(lines) == 2 + len(operations["operations"])
    assert len({len(line) for line in lines}) == 1
    for operation in OPERATIONS.values():
        assert any(line.startswith(f"| {operation.title}") for line in lines)


def call(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["zokern.bench", *map(str, arguments)])
    command.main()


def test_the_command_writes_what_it_prints(monkeypatch, capsys, tmp_path):
    small = ("--device", "cpu", "--numel", "2^10", "--rounds", 1, "--ops", "sweep,select")
    plot = tmp_path / "plot.png"
    call(monkeypatch, *small, "--json", tmp_path, "--plot", plot)
    printed = capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())
    assert path.name == machine.file_name(results["machine"])
    assert tables(results) in printed
    assert printed.splitlines()[-1].startswith("goal: ")
    assert "torch.normal and add_, fp32, at least 18: not measured" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_what_there_is_is_shown_when_somebody_interrupts(monkeypatch, capsys, tmp_path):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(OPERATIONS, "select", replace(OPERATIONS["select"], build=stop))
    small = ("--device", "cpu", "--numel", "2^10", "--rounds", 1, "--ops", "sweep,select,split")
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, *small, "--json", tmp_path)
    assert end.value.code == 130
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        call(monkeypatch, *small, "--json", tmp_path / "own.json")
    written = json.loads((tmp_path / "own.json").read_text())
    assert {run["operation"] for run in written["operations"]} == {"sweep"}
    printed = capsys.readouterr().out
    assert "skipped: the rest: interrupted" in printed
    assert "sweep, one direction" in printed
    assert "split" not in printed


def test_what_cannot_run_is_named_with_the_reason(monkeypatch):
    def refuse(own: Setting) -> None:
        raise Unavailable("there is no moon")

    monkeypatch.setitem(OPERATIONS, "sweep", replace(OPERATIONS["sweep"], build=refuse))
    results = run(replace(SMALL, ops=["sweep", "split"]), progress=False)
    assert results["skipped"] == {f"sweep, {d}": "there is no moon" for d in SMALL.dtypes}
    assert [r["operation"] for r in results["operations"]] == ["split"]


def test_no_operation_begins_when_the_minutes_are_over():
    results = run(replace(SMALL, ops=["sweep"], minutes=0.0), progress=False)
    assert results["skipped"] == {f"sweep, {d}": "0 minutes were over" for d in SMALL.dtypes}


def test_peers_may_be_left_out():
    results = run(replace(SMALL, ops=["mezo"], peers="none"), progress=False)
    assert all(record["peers"] == {} for record in results["operations"])


def test_a_peer_that_does_not_compile_is_named_with_the_reason(monkeypatch):
    def broken(params: object) -> None:
        def move(seed: int, coefficient: float) -> None:
            raise RuntimeError("no compiler\nat all")

        return move

    monkeypatch.setattr(peers, "compiled_loop", broken)
    results = run(replace(SMALL, ops=["mezo"], peers="all"), progress=False)
    assert results["skipped"] == {"beside torch.compile": "no compiler"}
    assert all(list(r["peers"]) == ["eager loop"] for r in results["operations"])


def test_the_command_lists_what_there_is(monkeypatch, capsys):
    call(monkeypatch, "--list")
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[:-1]] == command.NAMES
    assert all(name in printed for name in models.MODELS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "sweep,swoop"], "unknown operation 'swoop'; there are sweep, sweep-2"),
        (["--dtype", "fp64"], "unknown dtype 'fp64'; there are fp32, bf16, fp16"),
        (["--model", "gpt-5"], "argument --model: invalid choice: 'gpt-5'"),
        (["--numel", "0"], "argument --numel: '0' is no positive integer"),
        (["--numel", "many"], "argument --numel: 'many' is no positive integer"),
        (["--numel", "1.5"], "argument --numel: '1.5' is no positive integer"),
        (["--numel", "inf"], "argument --numel: 'inf' is no positive integer"),
        (["--ops", "split8", "--dtype", "fp32"], "none of split8 is for fp32"),
        (["--ops", "step", "--plot", "plot.png"], "whole steps are not drawn"),
        (["--json", "/nowhere/at/all.json"], "argument --json: there is no folder /nowhere/at"),
    ],
)
def test_bad_arguments_get_one_error(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, "--device", "cpu", *arguments)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("error:") == 1


@pytest.mark.parametrize("text", ["1024", "2^10", "1.024e3", "1024.0"])
def test_counts_are_whole_numbers_in_any_notation(text):
    assert command._count(text) == 1024


@pytest.mark.parametrize("way", ["argument", "environment"])
def test_a_backend_that_cannot_run_on_the_device_gets_one_error(monkeypatch, capsys, way):
    monkeypatch.setattr(triton, "why_not", lambda device: "it is not for that")
    arguments = ["--backend", "triton"] if way == "argument" else []
    if way == "environment":
        monkeypatch.setenv("ZOKERN_BACKEND", "triton")
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, "--device", "cpu", *arguments)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "error: the backend 'triton' cannot run on cpu: it is not for that" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, "--device", "cuda")
    assert end.value.code == 2
    assert "torch finds no CUDA GPU here" in capsys.readouterr().err


def test_all_take_turns_over_all_sets():
    calls: list[str] = []

    def named(name: str):
        return lambda: calls.append(name)

    sets = [{"a": named(f"a{i}"), "b": named(f"b{i}")} for i in range(2)]
    timings = take_turns(sets, CPU, rounds=4, seconds=60.0)
    assert {timing.samples for timing in timings.values()} == {4 * 3}
    assert {calls.count(f"{name}0") - calls.count(f"{name}1") for name in "ab"} <= {-1, 0, 1}
    assert rotated(["a", "b", "c"], 4) == ["b", "c", "a"]


def test_three_rounds_are_taken_however_long_they_last():
    timings = take_turns([{"a": lambda: None}], CPU, rounds=9, seconds=0.0)
    assert timings["a"].samples == 3 * 3


def test_selections_are_those_of_the_peers():
    comparison = OPERATIONS["select"].build(setting())
    threshold = comparison.lines[OURS].run()[0]
    assert comparison.peers["topk"]().values.min() == threshold
    assert comparison.peers["kthvalue"]().values == threshold


@pytest.mark.parametrize("name", ["merge-linear", "merge-ties", "merge-ties-peft"])
def test_merges_are_those_of_the_peers(name):
    comparison = OPERATIONS[name].build(setting(numel=1 << 16))
    if comparison.skipped:
        pytest.skip(str(comparison.skipped))
    (theirs,) = comparison.peers.values()
    for own, wanted in zip(comparison.lines[OURS].run().values(), theirs().values(), strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-6)


def test_inner_products_are_those_of_the_peer():
    comparison = OPERATIONS["zopro"].build(setting())
    (peer,) = comparison.peers.values()
    own, theirs = comparison.lines[OURS].run()[0], peer()
    assert own[0] == pytest.approx(float(theirs[0]), rel=1e-4)
    # Of other noise.
    assert own[2] == pytest.approx(float(theirs[2]), rel=0.1)


def test_onties_takes_the_published_step():
    generator = torch.Generator().manual_seed(0)
    value, tau = (0.02 * torch.randn(4096, generator=generator) for _ in range(2))
    param = torch.nn.Parameter(value.clone())
    # All are kept: the published code keeps any of equal magnitudes.
    own = zokern.OnTIESAdamW(
        [("p", param)], lr=1e-3, reserve_p=1.0, alpha=0.25, use_merge=True, correct_bias=False,
        reference={"p": tau}, base={"p": torch.zeros_like(tau)},
    )  # fmt: skip
    published = peers.OnlineMerging(value, tau, p=1.0, alpha=0.25, lr=1e-3)
    for _ in range(2):
        grad = param.grad = torch.randn(4096, generator=generator)
        own.step()
        published.ties(grad)
    torch.testing.assert_close(param.detach(), published.param)


@pytest.mark.parametrize("make", [peers.eager_loop, peers.foreach])
def test_an_eager_step_of_mezo_is_its_formula(make):
    values = [torch.randn(33), torch.randn(4, 5)]
    params = [torch.nn.Parameter(value.clone()) for value in values]
    losses = iter([3.0, 1.0])
    with torch.no_grad():
        peers.mezo_step(make(params), lambda: next(losses), seed=7)
    torch.manual_seed(7)
    for value, param in zip(values, params, strict=True):
        moved = value - peers.LR * (3.0 - 1.0) / (2 * peers.EPS) * torch.randn_like(value)
        torch.testing.assert_close(param.detach(), moved, rtol=0, atol=1e-6)
        assert not torch.equal(param, value)


def test_bandwidth_reads_and_writes_as_many_bytes():
    runs = bandwidth(setting(), 100)
    assert set(runs) == {COPY, IN_PLACE}
    copied = runs[COPY]()
    assert copied.numel() == 100
    assert copied.any()
    assert torch.equal(runs[IN_PLACE](), copied)


def test_models_are_as_large_as_they_are_called():
    for name, millions in (("opt-125m", 125), ("qwen2-0.5b", 494), ("llama-3-8b", 8030)):
        shapes = models.shapes(name, models.layers_of(name))
        assert sum(shape.numel() for shape in shapes.values()) // 10**6 == millions
    assert models.layers_that_fit("opt-125m", 1e9) == 12
    assert models.layers_that_fit("opt-125m", 1.0) == 1
    some = models.layers_that_fit("opt-13b", 2e9)
    count = sum(shape.numel() for shape in models.shapes("opt-13b", some).values())
    assert 1.5e9 < count <= 2e9


def record(**others: object) -> dict:
    return {
        "operation": "mezo", "line": OURS, "dtype": "fp32", "parameters": 1 << 26,
        "peers": {"eager loop": {"times": 31.0}}, **others,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        (record(), "held (31)"),
        (record(peers={"eager loop": {"times": 29.0}}), "missed (29)"),
        (record(parameters=1 << 20), "not measured"),
        (record(dtype="bf16"), "not measured"),
        (record(peers={}), "not measured"),
    ],
)
def test_goals_are_held_missed_or_not_measured(measured, said):
    first = goals.verdicts("cpu", [measured])[0]
    assert str(first) == f"goal: MeZO step, times as fast as eager loop, fp32, at least 30: {said}"


@pytest.mark.parametrize(("times", "word"), [(0.6, "held"), (0.5, "missed")])
def test_a_goal_may_be_an_upper_bound(times, word):
    own = record(operation="ondare", peers={"torch's fused AdamW": {"times": times}})
    said = [verdict for verdict in goals.verdicts("cpu", [own]) if verdict.figure is not None]
    assert [verdict.word for verdict in said] == [word]


def test_steps_of_a_model_cut_down_are_no_goals():
    whole = {
        "operation": "step", "line": "layerwise", "dtype": "bf16", "parameters": 8 << 30,
        "model": "llama-3-8b", "layers": 32, "tokens": 4096, "optimizer_share": 0.05,
        "peak_bytes": 104, "forward_peak_bytes": 100,
    }  # fmt: skip
    for measured, count in ((whole, 2), (whole | {"layers": 9}, 0), (whole | {"tokens": 8}, 0)):
        said = [v for v in goals.verdicts("cuda", [measured]) if v.figure is not None]
        assert [verdict.word for verdict in said] == ["held"] * count


def test_every_goal_is_of_an_operation_and_its_peers():
    for goal in goals.GOALS:
        assert goal.operation in command.NAMES
        assert (goal.at_least is None) != (goal.at_most is None)


def test_the_readme_says_what_the_results_say():
    readme = (ROOT / "README.md").read_text()
    new = report.section(report.load(ROOT / "benchmarks" / "results"), "docs/performance.png")
    assert report.written(readme, new) == readme


def test_the_report_writes_readme_and_plot(monkeypatch, tmp_path, operations, steps):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "cpu.json").write_text(json.dumps(operations | {"steps": steps["steps"]}))
    readme, plot = tmp_path / "README.md", tmp_path / "plot.png"
    readme.write_text(f"before\n{report.BEGIN}\nwhat was there\n{report.END}\nafter\n")
    arguments = ["--results", folder, "--readme", readme, "--plot", plot]
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    report.main()
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "what was there" not in text
    assert tables(operations) in text
    assert "No GPU has been measured yet" in text
    assert plot.read_bytes().startswith(b"\x89PNG")
    readme.write_text("no marks")
    with pytest.raises(SystemExit, match="the README needs a line"):
        report.main()


def test_dtypes_are_known_to_every_operation():
    for operation in OPERATIONS.values():
        assert set(operation.dtypes) <= DTYPES.keys()


@pytest.mark.parametrize("option", ["--plot=x.foo", "--json=folder"])
def test_files_of_other_kinds_are_refused_before_anything_is_timed(option, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench", "--device=cpu", option])
    with pytest.raises(SystemExit):
        command.main()
    assert "ends with none of" in capsys.readouterr().err
