"""How fast zokern means to be, and whether a run was."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from zokern.bench.comparison import OURS
from zokern.bench.end_to_end import IN_PLACE, LAYERWISE
from zokern.bench.merging import ADAMW, BF16_MOMENTS, EAGER
from zokern.bench.mezo import COMPILED, EAGER_LOOP, FUSED
from zokern.bench.models import layers_of
from zokern.bench.results import Record
from zokern.bench.sweeps import NORMAL_AND_ADD

BOTH = ("fp32", "bf16")
TOKENS = 4096


@dataclass(frozen=True)
class Goal:
    """A bound on a figure of an operation's record, on a kind of device.

    Attributes:
        parameters: how many the operation must have had at least.
        model: of a whole step, with all of its layers and at least ``TOKENS`` a batch.
    """

    device: str
    operation: str
    dtypes: tuple[str, ...]
    words: str
    figure: Callable[[Record], float | None]
    at_least: float | None = None
    at_most: float | None = None
    line: str = OURS
    parameters: int = 1 << 26
    model: str | None = None

    def holds(self, figure: float) -> bool:
        if self.at_least is not None:
            return figure >= self.at_least
        return self.at_most is not None and figure <= self.at_most


@dataclass(frozen=True)
class Verdict:
    """A goal for a dtype; without a figure where it was not measured."""

    goal: Goal
    dtype: str
    figure: float | None

    @property
    def word(self) -> str:
        if self.figure is None:
            return "not measured"
        return "held" if self.goal.holds(self.figure) else "missed"

    def __str__(self) -> str:
        goal = self.goal
        bound = f"at least {goal.at_least:g}" if goal.at_least else f"at most {goal.at_most:g}"
        figure = "" if self.figure is None else f" ({self.figure:.3g})"
        return f"goal: {goal.words}, {self.dtype}, {bound}: {self.word}{figure}"


def _times(peer: str) -> Callable[[Record], float | None]:
    return lambda record: record["peers"].get(peer, {}).get("times")


def _time_over(peer: str) -> Callable[[Record], float | None]:
    def figure(record: Record) -> float | None:
        times = _times(peer)(record)
        return None if times is None else 1 / times

    return figure


def _figure(name: str) -> Callable[[Record], float | None]:
    return lambda record: record[name]


def _peak_over_forward(record: Record) -> float | None:
    if record["peak_bytes"] is None:
        return None
    return record["peak_bytes"] / record["forward_peak_bytes"]


def _beside(
    device: str, operation: str, words: str, peer: str, at_least: float, **others: Any
) -> Goal:
    return Goal(
        device, operation, BOTH, f"{words}, times as fast as {peer}", _times(peer), at_least,
        **others,
    )  # fmt: skip


def _of_copy(operation: str, words: str, at_least: float) -> Goal:
    words = f"{words}, share of the copy bandwidth"
    return Goal("cuda", operation, BOTH, words, _figure("share_of_copy"), at_least)


def _of_in_place(dtype: str, at_least: float) -> Goal:
    words = "sweep, share of the bandwidth of reading and writing in place"
    return Goal("cpu", "sweep", (dtype,), words, _figure("share_of_in_place"), at_least)


def _step(words: str, figure: Callable[[Record], float | None], at_most: float, line: str) -> Goal:
    return Goal(
        "cuda", "step", ("bf16",), f"step of an 8B model, {line}, {words}", figure,
        at_most=at_most, line=line, model="llama-3-8b",
    )  # fmt: skip


def _beside_adam(operation: str, words: str, at_most: float, at_least: float) -> Iterator[Goal]:
    """On a CPU, with moments in the dtype that the peers have them in."""
    for dtype, line in (("fp32", OURS), ("bf16", BF16_MOMENTS)):
        title = words if line == OURS else f"{words}, {line}"
        common: dict[str, Any] = {"line": line, "parameters": 1 << 24}
        yield Goal(
            "cpu", operation, (dtype,), f"{title}, time over that of {ADAMW}", _time_over(ADAMW),
            at_most=at_most, **common,
        )  # fmt: skip
        yield Goal(
            "cpu", operation, (dtype,), f"{title}, times as fast as {EAGER}", _times(EAGER),
            at_least, **common,
        )  # fmt: skip


GOALS = (
    _beside("cpu", "mezo", "MeZO step", EAGER_LOOP, 30),
    _beside("cpu", "mezo-model", "MeZO step on a model's tensors", EAGER_LOOP, 25),
    _beside("cpu", "sweep", "sweep", NORMAL_AND_ADD, 18),
    _of_in_place("fp32", 0.6),
    _of_in_place("bf16", 0.35),
    *_beside_adam("ondare", "OnDARE", 1.7, 20),
    *_beside_adam("onties", "OnTIES", 4.0, 40),
    _of_copy("sweep", "sweep", 0.9),
    _of_copy("sweep-2", "two directions", 0.75),
    _of_copy("ondare", "OnDARE", 0.9),
    _of_copy("onties", "OnTIES", 0.8),
    _of_copy("normal", "normal law", 0.65),
    _beside("cuda", "mezo", "MeZO step", EAGER_LOOP, 6),
    _beside("cuda", "mezo", "MeZO step, fuse_next", EAGER_LOOP, 8, line=FUSED),
    _beside("cuda", "mezo", "MeZO step", COMPILED, 3),
    _step("the optimizer's share of the time", _figure("optimizer_share"), 0.1, IN_PLACE),
    _step("the optimizer's share of the time", _figure("optimizer_share"), 0.1, LAYERWISE),
    _step("peak memory over that of the forward pass", _peak_over_forward, 1.05, LAYERWISE),
)  # fmt: skip


def verdicts(device: str, records: Iterable[Record]) -> list[Verdict]:
    """Of all goals for the kind of device."""
    records = list(records)
    return [
        Verdict(goal, dtype, _measured(goal, dtype, records))
        for goal in GOALS
        if goal.device == device
        for dtype in goal.dtypes
    ]


def _measured(goal: Goal, dtype: str, records: list[Record]) -> float | None:
    for record in records:
        if (record["operation"], record["line"], record["dtype"]) != (
            goal.operation,
            goal.line,
            dtype,
        ):
            continue
        if record["parameters"] >= goal.parameters and _is_of(record, goal.model):
            return goal.figure(record)
    return None


def _is_of(record: Record, model: str | None) -> bool:
    if model is None:
        return True
    whole = record["model"] == model and record["layers"] == layers_of(model)
    return whole and record["tokens"] >= TOKENS
