"""A run: which operations in which dtypes, one after the other, and what comes out of it."""

import gc
import time
from dataclasses import dataclass
from typing import Any

import torch

from zokern.bench import end_to_end, machine
from zokern.bench.comparison import DTYPES, Comparison, Run, Setting, Unavailable, bandwidth
from zokern.bench.memory import peaks
from zokern.bench.mezo import COMPILED
from zokern.bench.operations import END_TO_END, OPERATIONS
from zokern.bench.results import Record, records, step_records
from zokern.bench.timing import take_turns
from zokern.progress import progress_bar

# What is skipped when somebody interrupts.
REST = "the rest"
# Whom zokern is timed beside.
PEERS = ("all", "quick", "none")
# How many times over what is swept a cache should be able to hold, and as how many sets at most.
CACHES, MOST_SETS = 2, 16


@dataclass(frozen=True)
class Plan:
    """What a run is asked for; the fields are the options of ``python -m zokern.bench``."""

    device: torch.device
    ops: list[str]
    dtypes: list[str]
    numel: int
    model_shapes: str
    model: str
    tokens: int
    peers: str
    rounds: int
    seconds: float
    minutes: float

    def tasks(self) -> list[tuple[str, str]]:
        """Operations and dtypes."""
        return [
            (name, dtype)
            for name in self.ops
            for dtype in self.dtypes
            if name == END_TO_END or dtype in OPERATIONS[name].dtypes
        ]

    def setting(self, dtype: str, model: str) -> Setting:
        return Setting(self.device, DTYPES[dtype], self.numel, model, self.tokens)


def run(plan: Plan, *, progress: bool = True) -> dict[str, Any]:
    """Everything that the plan asks for; what cannot be run is ``skipped``, with the reason.

    Interrupted, what there is; the rest is ``skipped`` then.
    """
    results: dict[str, Any] = {
        "machine": machine.describe(plan.device),
        "settings": {name: _plain(value) for name, value in vars(plan).items()},
        "operations": [],
        "steps": [],
        "skipped": {},
    }
    tasks, begin = plan.tasks(), time.perf_counter()
    with progress_bar(len(tasks), "bench", "op", shown=progress) as advance:
        for name, dtype in tasks:
            kind = "steps" if name == END_TO_END else "operations"
            if time.perf_counter() - begin > 60 * plan.minutes:
                results["skipped"][f"{name}, {dtype}"] = f"{plan.minutes:g} minutes were over"
                advance(1)
                continue
            measure = _step if name == END_TO_END else _operation
            try:
                results[kind] += measure(plan, name, dtype, results["skipped"])
            except (Unavailable, torch.OutOfMemoryError) as reason:
                results["skipped"][f"{name}, {dtype}"] = str(reason)
            except KeyboardInterrupt:
                results["skipped"][REST] = "interrupted"
                break
            _let_go(plan.device)
            advance(1)
    return results


def _plain(value: object) -> object:
    return str(value) if isinstance(value, torch.device) else value


def _operation(plan: Plan, name: str, dtype: str, skipped: dict[str, str]) -> list[Record]:
    operation, setting = OPERATIONS[name], plan.setting(dtype, plan.model_shapes)
    comparison = operation.build(setting)
    _choose_peers(plan, comparison, skipped)
    sets = [_runs(setting, comparison)]
    size = comparison.parameters * setting.dtype.itemsize
    while len(sets) < min(MOST_SETS, CACHES * machine.cache_size(plan.device) / size):
        again = operation.build(setting)
        again.peers = {peer: again.peers[peer] for peer in comparison.peers}
        sets.append(_runs(setting, again))
    timings = take_turns(sets, plan.device, rounds=plan.rounds, seconds=plan.seconds)
    return records(name, operation.title, setting, comparison, timings)


def _runs(setting: Setting, comparison: Comparison) -> dict[str, Run]:
    lines = {name: line.run for name, line in comparison.lines.items()}
    return lines | comparison.peers | bandwidth(setting, comparison.parameters)


def _choose_peers(plan: Plan, comparison: Comparison, skipped: dict[str, str]) -> None:
    """Drop those that are not wanted, or do not compile."""
    skipped.update({f"beside {name}": reason for name, reason in comparison.skipped.items()})
    if plan.peers == "none":
        comparison.peers = {}
    elif plan.peers == "quick":
        comparison.peers.pop(COMPILED, None)
    if COMPILED in comparison.peers:
        try:
            comparison.peers[COMPILED]()
        except Exception as error:  # The compiler's own, and those of a missing C++ or CUDA.
            del comparison.peers[COMPILED]
            skipped[f"beside {COMPILED}"] = str(error).strip().partition("\n")[0]


def _step(plan: Plan, name: str, dtype: str, skipped: dict[str, str]) -> list[Record]:
    setting = plan.setting(dtype, plan.model)
    layers = end_to_end.layers(setting)
    comparison = end_to_end.steps(setting, layers)
    if plan.peers == "none":
        del comparison.peers[end_to_end.EAGER_LOOP]
    runs = {key: line.run for key, line in comparison.lines.items()} | comparison.peers
    timings = take_turns([runs], plan.device, rounds=plan.rounds, seconds=plan.seconds)
    comparison.lines.clear()
    comparison.peers.clear()
    del runs
    _let_go(plan.device)
    try:
        peak_bytes = peaks(setting, layers)
    except Unavailable as reason:
        skipped[f"{name}, {dtype}"] = str(reason)
        peak_bytes = {}
    return step_records(setting, layers, comparison, timings, peak_bytes)


def _let_go(device: torch.device) -> None:
    """Of memory that nobody uses; what follows fits itself to what is free."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
