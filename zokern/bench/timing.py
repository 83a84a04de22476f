"""Times of runs that take turns, so that all of them see the same machine."""

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zokern.bench.comparison import Run

LEAST_ROUNDS = 3
# A run that is shorter than this is taken several times in its turn.
SHORT, IN_TURN = 0.1, 3
# What a clock is read for at least, by kind of device: launches go ahead of a GPU.
LEAST_SECONDS = {"cpu": 2e-3, "cuda": 2e-2}
MOST_REPEATS = 1000


@dataclass(frozen=True)
class Timing:
    """Seconds of a run.

    Attributes:
        low, high: the quartiles.
        samples: how many times the clock was read for it.
    """

    median: float
    low: float
    high: float
    samples: int


def take_turns(
    sets: Sequence[dict[str, Run]], device: torch.device, *, rounds: int, seconds: float
) -> dict[str, Timing]:
    """Rounds of all runs, each beginning with another one.

    Args:
        sets: the same runs over different memory, which are used in turn.
        rounds: at most; three at least.
        seconds: no further round begins afterwards.
    """
    synchronize = synchronizer(device)
    runs = {name: _next_of([own[name] for own in sets]) for name in sets[0]}
    repeats = {name: _repeats(run, synchronize, device) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for number in range(rounds):
        if number >= LEAST_ROUNDS and time.perf_counter() - begin > seconds:
            break
        for name in rotated(list(runs), number):
            in_turn = 0
            while in_turn == 0 or (in_turn < IN_TURN and samples[name][-1] < SHORT):
                samples[name].append(sample(runs[name], synchronize, repeats[name]))
                in_turn += 1
    return {name: _timing(times) for name, times in samples.items()}


def rotated(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def _timing(times: list[float]) -> Timing:
    low, median, high = torch.tensor(times, dtype=torch.float64).quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    )
    return Timing(float(median), float(low), float(high), len(times))


def _next_of(runs: list[Run]) -> Run:
    """Each in turn."""
    turns = itertools.cycle(runs)
    return lambda: next(turns)()


def _repeats(run: Run, synchronize: Run, device: torch.device) -> int:
    """How often it runs between two looks at the clock; warms it up."""
    first = sample(run, synchronize)
    if first > SHORT:
        return 1
    again = sample(run, synchronize)
    return max(1, min(MOST_REPEATS, math.ceil(LEAST_SECONDS[device.type] / again)))


def sample(run: Run, synchronize: Run, repeats: int = 1) -> float:
    """Seconds of one run."""
    synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize()
    return (time.perf_counter() - begin) / repeats


def synchronizer(device: torch.device) -> Run:
    """Waits for what has been launched."""
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.cuda.synchronize(device)
