"""Compare zeroth-order methods at equal numbers of evaluations, that is, of forward passes.

The task is that of docstring_areas.py. To make room for many runs, docstrings are cut to 12 tokens
and all of the encoder is frozen but its last block, the output of the last layer's feed-forward
part (591k weights): what that block reads is computed once and kept.

Each method gets the best of five learning rates or more, by the training loss on one further seed,
and then runs with every seed; within a run the learning rate falls to 0 linearly. Nothing is
downloaded. The default takes some ten minutes of one CPU core.

    make compare
    python examples/compare_methods.py --methods MeZO FZOO --evaluations 1080 --json runs.json
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import docstring_areas
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from docstring_areas import TEMPERATURE, Examples, batches, positive
from tqdm import tqdm
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

import zokern

MAX_TOKENS = 12
TRAIN, MEASURED = 2048, 384  # docstrings: to train on, and of each part to measure losses on
BATCH_SIZE = 16
EPS = 1e-3  # two-sided estimates agree to 1% from 1e-4 to 1.4e-3
MEASUREMENTS = 6  # of the losses in the course of a run
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of a method's own learning rate
LR = 2e-3


@dataclass(frozen=True)
class Method:
    """An optimizer, its evaluations a step and the middle of its learning rates."""

    optimizer: type[zokern.ZOOptimizer]
    evaluations: int
    lr: float = LR
    options: dict[str, Any] = field(default_factory=dict)
    tuned_as: str | None = None  # the method whose learning rate it takes over
    style: dict[str, str] = field(default_factory=dict)


def guided(candidates: int, color: str, *, history: bool) -> Method:
    # A guiding vector is √(4/M) times as long as a draw, and lr multiplies its square.
    return Method(
        zokern.MeZOGV,
        candidates + 2,
        LR * candidates / 4,
        {"candidates": candidates, "history": history},
        style={"color": color, "ls": "--" if history else "-"},
    )


def greedy(candidates: int, color: str) -> Method:
    options = {"candidates": candidates}
    return Method(zokern.MeZOGreedy, candidates + 1, options=options, style={"color": color})


METHODS = {
    "MeZO": Method(zokern.MeZO, 2, style={"color": "black"}),
    "MeZO, normal": Method(
        zokern.MeZO,
        2,
        options={"law": "normal"},
        tuned_as="MeZO",
        style={"color": "black", "ls": ":"},
    ),
    "GV 2": guided(2, "lightskyblue", history=False),
    "GV 2, history": guided(2, "lightskyblue", history=True),
    "GV 4": guided(4, "dodgerblue", history=False),
    "GV 4, history": guided(4, "dodgerblue", history=True),
    "GV 8": guided(8, "navy", history=False),
    "GV 8, history": guided(8, "navy", history=True),
    "Greedy 2": greedy(2, "orange"),
    "Greedy 4": greedy(4, "saddlebrown"),
    # The loss's scale is divided out, so its learning rates are of another size.
    "FZOO 8": Method(zokern.FZOO, 9, 5e-5, {"candidates": 8}, style={"color": "green"}),
    "ConMeZO": Method(zokern.ConMeZO, 2, style={"color": "crimson"}),
}


@dataclass
class Run:
    """A method on a seed; the lists go with the measurements, and seconds leave those out."""

    method: str
    seed: int
    lr: float
    evaluations: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    held_out_loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)


@dataclass
class Texts:
    """What the head reads of each text's tokens, and the texts' areas."""

    tokens: list[torch.Tensor]
    areas: torch.Tensor


class HeadTask:
    """The docstrings behind the frozen part of the encoder; the head is what follows."""

    def __init__(self) -> None:
        task = docstring_areas.Task(MAX_TOKENS)
        model = AutoModel.from_pretrained(docstring_areas.MODEL, add_pooling_layer=False).eval()
        self.head = model.encoder.layer[-1].output
        self.areas = self._frozen(model, task.area_ids)
        self.train = self._texts(model, task.train, TRAIN)
        self.held_out = self._texts(model, task.held_out, MEASURED)
        self.measured = Texts(self.train.tokens[:MEASURED], self.train.areas[:MEASURED])

    def _texts(self, model: torch.nn.Module, examples: Examples, count: int) -> Texts:
        chosen = random.Random(0).sample(range(len(examples)), count)
        return Texts(self._frozen(model, [examples.ids[i] for i in chosen]), examples.areas[chosen])

    @torch.no_grad()
    def _frozen(self, model: torch.nn.Module, ids: list[list[int]]) -> list[torch.Tensor]:
        read: list[torch.Tensor] = []
        hook = self.head.register_forward_pre_hook(
            lambda _, inputs: read.append(torch.cat(inputs, dim=-1))
        )
        texts = []
        for start in range(0, len(ids), 64):
            part = ids[start : start + 64]
            docstring_areas.embed(model, part)
            # Copies, so that the padding is not kept.
            texts += [row[: len(i)].clone() for row, i in zip(read.pop(), part, strict=True)]
        hook.remove()
        return texts

    def scores(self, head: torch.nn.Module, texts: list[torch.Tensor]) -> torch.Tensor:
        """As docstring_areas.Task.scores, without padding."""
        texts = texts + self.areas
        lengths = torch.tensor([len(text) for text in texts])
        owner = torch.arange(len(texts)).repeat_interleave(lengths)
        inner, outer = head.dense.in_features, head.dense.out_features
        read = torch.cat(texts).to(head.dense.weight.dtype)
        states = head(*read.split((inner, outer), dim=-1)).float()
        sums = torch.zeros(len(texts), outer).index_add_(0, owner, states)
        vectors = F.normalize(sums, dim=-1)
        return TEMPERATURE * vectors[: -len(self.areas)] @ vectors[-len(self.areas) :].T

    @torch.no_grad()
    def measure(self, head: torch.nn.Module, run: Run, evaluations: int, seconds: float) -> None:
        run.evaluations.append(evaluations)
        run.seconds.append(seconds)
        scores = self.scores(head, self.measured.tokens)
        run.train_loss.append(F.cross_entropy(scores, self.measured.areas).item())
        scores, areas = self.scores(head, self.held_out.tokens), self.held_out.areas
        run.held_out_loss.append(F.cross_entropy(scores, areas).item())
        run.accuracy.append((scores.argmax(dim=1) == areas).float().mean().item())


def train(task: HeadTask, run: Run, evaluations: int, measurements: int) -> Run:
    method = METHODS[run.method]
    head = copy.deepcopy(task.head)
    optimizer = method.optimizer(
        head.named_parameters(), lr=run.lr, eps=EPS, seed=run.seed, **method.options
    )
    steps = evaluations // method.evaluations
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    measured = {round(steps * i / measurements) for i in range(1, measurements + 1)}
    batch_of_step = batches(task.train.tokens, BATCH_SIZE, run.seed)
    seconds = 0.0
    task.measure(head, run, 0, seconds)
    for step in range(1, steps + 1):
        start = time.perf_counter()
        batch = next(batch_of_step)
        texts, areas = [task.train.tokens[i] for i in batch], task.train.areas[batch]
        optimizer.step(lambda: F.cross_entropy(task.scores(head, texts), areas))  # noqa: B023
        schedule.step()
        seconds += time.perf_counter() - start
        if step in measured:
            task.measure(head, run, step * method.evaluations, seconds)
    return run


def compare(task: HeadTask, args: argparse.Namespace, runs: list[Run]) -> None:
    """Tune each method, run it with each seed and add the runs to ``runs``."""
    tuned = list(dict.fromkeys(METHODS[name].tuned_as or name for name in args.methods))
    total = len(tuned) * len(FACTORS) + len(args.methods) * len(args.seeds)
    with tqdm(total=total, unit="run") as progress:

        def one(name: str, seed: int, lr: float, measurements: int) -> Run:
            progress.set_postfix_str(f"{name}, seed {seed}")
            run = train(task, Run(name, seed, lr), args.evaluations, measurements)
            progress.update()
            return run

        lr_of = {}
        for name in tuned:
            trial = partial(one, name, max(args.seeds) + 1, measurements=1)
            tried = tune(trial, METHODS[name].lr)
            progress.total += len(tried) - len(FACTORS)
            lr_of[name] = min(tried, key=tried.__getitem__)
        # Seed by seed, so that what else the machine does falls on all methods alike.
        for seed in args.seeds:
            for name in args.methods:
                lr = lr_of[METHODS[name].tuned_as or name]
                runs.append(one(name, seed, lr, MEASUREMENTS))


def tune(trial: Callable[[float], Run], middle: float) -> dict[float, float]:
    """Learning rates and their training losses; the best of them is not at an end."""
    losses: dict[float, float] = {}
    wanted = [middle * factor for factor in FACTORS]
    while wanted:
        for lr in wanted:
            loss = trial(lr).train_loss[-1]
            # A run that diverged has no loss to compare.
            losses[lr] = loss if math.isfinite(loss) else math.inf
        best = min(losses, key=losses.__getitem__)
        ends = {min(losses): best / 2, max(losses): best * 2}
        wanted = [ends[best]] if best in ends else []
    return losses


def by_method(runs: Iterable[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.method, []).append(run)
    return groups


def mean_and_spread(values: Iterable[float]) -> tuple[float, float]:
    """The mean and the standard deviation over seeds, 0 for a single one."""
    values = list(values)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(runs: list[Run]) -> str:
    """A line a method."""
    lines = [
        f"after {runs[0].evaluations[-1]} evaluations, mean ± standard deviation over seeds",
        f"{'method':<15}{'evals/step':>10}{'steps':>6}{'lr':>9}  {'held-out loss':>16}"
        f"{'training loss':>18}{'accuracy, %':>14}{'seconds':>9}",
    ]
    for name, group in by_method(runs).items():
        method, lr = METHODS[name], group[0].lr
        last = [
            mean_and_spread(getattr(run, what)[-1] for run in group)
            for what in ("held_out_loss", "train_loss", "accuracy", "seconds")
        ]
        held_out, training, (right, right_spread), (seconds, _) = last
        lines.append(
            f"{name:<15}{method.evaluations:>10}"
            f"{group[0].evaluations[-1] // method.evaluations:>6}{lr:>9.2g}  "
            f"{held_out[0]:>8.4f} ± {held_out[1]:.4f}{training[0]:>9.4f} ± {training[1]:.4f}"
            f"{100 * right:>8.1f} ± {100 * right_spread:.1f}{seconds:>9.1f}"
        )
    return "\n".join(lines)


def laws(runs: list[Run]) -> str:
    """Whether the cheap noise law differs from the normal one by more than seeds do."""
    groups = by_method(runs)
    if not {"MeZO", "MeZO, normal"} <= groups.keys() or len(groups["MeZO"]) < 2:
        return ""
    (cheap, cheap_spread), (normal, normal_spread) = (
        mean_and_spread(run.held_out_loss[-1] for run in groups[name])
        for name in ("MeZO", "MeZO, normal")
    )
    spread = max(cheap_spread, normal_spread)
    verdict = "within" if abs(cheap - normal) <= spread else "more than"
    return (
        f"MeZO with gauss16 and with normal noise: the mean held-out losses differ by "
        f"{cheap - normal:+.4f}, {verdict} the spread over seeds, {spread:.4f}"
    )


def plot(runs: list[Run], path: Path) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.8))
    for name, group in by_method(runs).items():
        evaluations = group[0].evaluations
        seconds = [statistics.fmean(t) for t in zip(*(run.seconds for run in group), strict=True)]
        for axes, x, what in zip(
            panels,
            (evaluations, evaluations, seconds),
            ("train_loss", "held_out_loss", "held_out_loss"),
            strict=True,
        ):
            losses = zip(*(getattr(run, what) for run in group), strict=True)
            means, spreads = zip(*map(mean_and_spread, losses), strict=True)
            axes.plot(x, means, label=name, lw=1.5, **METHODS[name].style)
            low, high = ([m + s * d for m, d in zip(means, spreads, strict=True)] for s in (-1, 1))
            axes.fill_between(x, low, high, alpha=0.07, color=METHODS[name].style["color"], lw=0)
    panels[0].set(xlabel="evaluations", ylabel="training loss")
    panels[1].set(xlabel="evaluations", ylabel="held-out loss")
    panels[2].set(xlabel="seconds", ylabel="held-out loss")
    for axes in panels:
        axes.grid(alpha=0.3)
    labels = panels[0].get_legend_handles_labels()
    figure.legend(*labels, loc="lower center", ncols=6, frameon=False)
    figure.suptitle(f"mean and standard deviation over {len(group)} seeds")
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path, dpi=85)
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--evaluations", type=positive(int), default=540, help="of each run")
    parser.add_argument("--out", type=Path, default=Path("compare_methods.png"), help="the plot")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--redraw", type=Path, help="show what --json wrote instead of running")
    args = parser.parse_args()
    least = max(METHODS[name].evaluations for name in args.methods)
    if args.evaluations < least:
        parser.error(f"argument --evaluations: a step takes up to {least}")
    for path in filter(None, (args.out, args.json)):
        if not path.resolve().parent.is_dir():
            parser.error(f"there is no folder {path.resolve().parent} to write {path.name} into")
    return args


def measured_runs(args: argparse.Namespace) -> list[Run]:
    if args.redraw:
        return [Run(**run) for run in json.loads(args.redraw.read_text())]
    # Forward passes this small gain nothing from a second thread.
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    runs: list[Run] = []
    try:
        compare(HeadTask(), args, runs)
    except KeyboardInterrupt:
        print("interrupted; what there is so far:", file=sys.stderr)
    return runs


def main() -> None:
    args = parse_arguments()
    runs = measured_runs(args)
    if runs:
        print(table(runs))
        if verdict := laws(runs):
            print(verdict)
        plot(runs, args.out)
        print(f"curves: {args.out}")
    if args.json:
        args.json.write_text(json.dumps([asdict(run) for run in runs], indent=1))


if __name__ == "__main__":
    main()
