"""Does MeZO train in bfloat16 as it does in float32? Each way to keep weights, on two tasks.

The tasks are the last block of the sentence encoder of compare_methods.py (591k weights), and a
small language model (320k weights) that has been pretrained on some of Python's documentation
topics and learns to name others. Each is run at two learning rates: at one the updates are larger
than an ulp of the weights in bfloat16, at the other they are smaller. They fall to 0 linearly.

All runs of a seed see the same batches and the same directions, and start from the same weights:
those of bfloat16, for float32 too. Losses are computed in float32 from what the model puts out;
held-out text is judged by the weights that the forward pass reads, without what is kept beside
them. Nothing is downloaded. The default takes some ten minutes of one CPU core.

    make precisions
    python examples/compare_precisions.py --seeds 0 1 --evaluations 200 --json runs.json
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import compare_methods
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from align_task import Batch, Questions, fit, padded, paragraphs
from compare_methods import HeadTask, by_method, mean_and_spread
from docstring_areas import batches, positive
from torch import Tensor, nn
from tqdm import tqdm
from transformers.utils import logging as transformers_logging
from zopro_rlhf import small_model, small_tokenizer

import zokern
from zokern.optim.steps import StepResult

EPS = 1e-3
BATCH_SIZE = 16  # docstrings
WINDOW, WINDOWS = 32, 32  # tokens in a row, and rows in a batch of pretraining
PRETRAINING_STEPS = 300
OTHER_TOPICS = ("formatstrings", "string-methods", "typesmapping", "typesseq")
HELD_OUT = 4  # one paragraph of the other topics in this many
WORDS, QUESTIONS = 8, 8  # in a question, and in a batch
MEASURED = 96  # held-out questions
MEASUREMENTS = 5  # of the losses in the course of a run


@dataclass
class Run(compare_methods.Run):
    """``method`` is the configuration; ``update`` the median step lr·|g|, in ulps of a weight."""

    task: str = ""
    update: float = 0.0


class Task(Protocol):
    """``rates`` are the best learning rate and one whose steps are smaller than an ulp."""

    rates: tuple[float, float]
    model: nn.Module

    def batches(self, seed: int) -> Iterator[Any]: ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor: ...

    def measure(self, model: nn.Module, run: Run, evaluations: int, seconds: float) -> None: ...


class Docstrings(HeadTask):
    rates = (8e-3, 6e-5)

    @property
    def model(self) -> nn.Module:
        return self.head

    def batches(self, seed: int) -> Iterator[list[int]]:
        return batches(self.train.tokens, BATCH_SIZE, seed)

    def loss(self, model: nn.Module, batch: list[int]) -> Tensor:
        texts = [self.train.tokens[i] for i in batch]
        return F.cross_entropy(self.scores(model, texts), self.train.areas[batch])


class Topics:
    """A pretrained language model learns to name the topics of passages that are new to it."""

    rates = (2e-4, 1e-5)

    def __init__(self) -> None:
        found = paragraphs()
        known = [line for topic, line in found if topic not in OTHER_TOPICS]
        other = [(topic, line) for topic, line in found if topic in OTHER_TOPICS]
        self.tokenizer = small_tokenizer(known)
        self.train = other[len(other) // HELD_OUT :]
        held_out = Questions(other[: len(other) // HELD_OUT], seed=0)
        self.held_out = self._questions(held_out, MEASURED)
        self.model = self._pretrained(known)

    def _pretrained(self, lines: list[str]) -> nn.Module:
        end = self.tokenizer.eos_token_id
        stream = [i for ids in self.tokenizer(lines).input_ids for i in (*ids, end)]
        draw = random.Random(0)

        def windows() -> Iterator[Batch]:
            while True:
                starts = [draw.randrange(len(stream) - WINDOW) for _ in range(WINDOWS)]
                rows = [stream[start : start + WINDOW] for start in starts]
                yield padded(rows, [0] * WINDOWS, end)

        torch.manual_seed(0)
        model = small_model(self.tokenizer)
        with tqdm(total=PRETRAINING_STEPS, desc="pretraining", unit="step") as progress:
            fit(model, windows(), PRETRAINING_STEPS, 2e-3, progress)
        return model.eval()

    def _questions(self, questions: Questions, count: int) -> Batch:
        asked, rows = [], []
        for _ in range(count):
            topic, words = questions.passage()
            asked.append(self.tokenizer(f"{' '.join(words[:WORDS])}\nTopic:").input_ids)
            rows.append([*asked[-1], *self.tokenizer(f" {topic}").input_ids])
        return padded(rows, [len(tokens) for tokens in asked], self.tokenizer.pad_token_id)

    def batches(self, seed: int) -> Iterator[Batch]:
        questions = Questions(self.train, seed)
        while True:
            yield self._questions(questions, QUESTIONS)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(*self._answers(model, batch))

    @staticmethod
    def _answers(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The scores of each token of the answers, float32, and what it is."""
        labels = batch["labels"][:, 1:]
        # Rows are padded on the right, where a causal model does not look.
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        answered = labels >= 0
        return logits[answered].float(), labels[answered]

    @torch.no_grad()
    def measure(self, model: nn.Module, run: Run, evaluations: int, seconds: float) -> None:
        run.evaluations.append(evaluations)
        run.seconds.append(seconds)
        scores, tokens = self._answers(model, self.held_out)
        run.held_out_loss.append(F.cross_entropy(scores, tokens).item())
        run.accuracy.append((scores.argmax(dim=1) == tokens).float().mean().item())


TASKS: dict[str, Callable[[], Task]] = {"docstrings": Docstrings, "topics": Topics}


class PublishedMeZO(torch.optim.Optimizer):
    """The arithmetic of MeZO's published trainer: loops in the weights' own dtype, four a step.

    The directions are those of zokern.MeZO, rounded to that dtype, so that runs can be paired.
    """

    def __init__(self, model: nn.Module, lr: float, eps: float, seed: int) -> None:
        self.named = list(model.named_parameters())
        super().__init__(self.named, {"lr": lr})
        self.eps, self.seed, self.draw = eps, seed, 0
        self.last: StepResult | None = None

    def _directions(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for name, param in self.named:
            z = zokern.noise.sample(
                "gauss16",
                param.numel(),
                seed=self.seed,
                draw=self.draw,
                tensor_id=zokern.noise.tensor_id(name),
            )
            yield param, z.to(param.dtype).view_as(param)

    def _perturb(self, scale: float) -> None:
        for param, z in self._directions():
            param.data = param.data + scale * z * self.eps

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        self._perturb(1)
        plus = closure()
        self._perturb(-2)
        minus = closure()
        self._perturb(1)
        gradient = ((plus - minus) / (2 * self.eps)).item()
        for param, z in self._directions():
            param.data = param.data - self.param_groups[0]["lr"] * (gradient * z)
        losses = plus.item(), minus.item()
        self.last = StepResult(losses, (self.draw,), (gradient,), skipped=False, update=None)
        self.draw += 1
        return plus


@dataclass(frozen=True)
class Configuration:
    """How weights are kept; ``options`` are zokern.MeZO's, and None stands for PublishedMeZO."""

    bytes: int  # a weight
    style: dict[str, str]
    options: dict[str, Any] | None = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16

    def optimizer(self, model: nn.Module, run: Run) -> PublishedMeZO | zokern.MeZO:
        if self.options is None:
            return PublishedMeZO(model, run.lr, EPS, run.seed)
        return zokern.MeZO(
            model.named_parameters(),
            lr=run.lr,
            eps=EPS,
            seed=run.seed,
            # It is what layerwise evaluates, and of no effect without.
            module=model,
            **self.options,
        )


def nearest(*, layerwise: bool) -> dict[str, Any]:
    return {"precision": "inplace", "layerwise": layerwise, "stochastic_rounding": False}


CONFIGURATIONS = {
    "float32": Configuration(4, {"color": "black"}, dtype=torch.float32),
    "bf16, published loops": Configuration(2, {"color": "crimson"}, None),
    "bf16, inplace": Configuration(2, {"color": "orange"}, nearest(layerwise=False)),
    "bf16, inplace, layerwise": Configuration(2, {"color": "saddlebrown"}, nearest(layerwise=True)),
    "bf16, layerwise, stochastic rounding": Configuration(2, {"color": "green"}),
    "bf16, split8": Configuration(
        3, {"color": "dodgerblue"}, {"precision": "split8", "layerwise": False}
    ),
    "bf16, split8, layerwise": Configuration(
        3, {"color": "dodgerblue", "ls": "--"}, {"precision": "split8", "layerwise": True}
    ),
    "bf16, split": Configuration(4, {"color": "navy"}, {"precision": "split"}),
    "bf16, master": Configuration(6, {"color": "navy", "ls": "--"}, {"precision": "master"}),
}


def median_ulp(model: nn.Module) -> float:
    """Half of the model's weights have a larger one in bfloat16."""
    weights = torch.cat([param.detach().flatten() for param in model.parameters()])
    return 2.0 ** (torch.frexp(weights.float()).exponent.median().item() - 8)


def train(task: Task, run: Run, evaluations: int) -> Run:
    configuration = CONFIGURATIONS[run.method]
    model = copy.deepcopy(task.model).bfloat16().to(configuration.dtype)
    optimizer = configuration.optimizer(model, run)
    steps = evaluations // 2
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    measured = {round(steps * i / MEASUREMENTS) for i in range(1, MEASUREMENTS + 1)}
    batch_of_step = task.batches(run.seed)
    ulp, updates, seconds = median_ulp(model), [], 0.0
    task.measure(model, run, 0, seconds)
    for step in range(1, steps + 1):
        start = time.perf_counter()
        batch = next(batch_of_step)
        optimizer.step(lambda: task.loss(model, batch))  # noqa: B023
        seconds += time.perf_counter() - start
        updates.append(schedule.get_last_lr()[0] * abs(optimizer.last.projected_gradient[0]))
        schedule.step()
        if step in measured:
            task.measure(model, run, 2 * step, seconds)
    run.update = statistics.median(updates) / ulp
    return run


def compare(tasks: dict[str, Task], args: argparse.Namespace, runs: list[Run]) -> None:
    """Run every configuration with each seed and learning rate; add the runs to ``runs``."""
    rates = [(name, lr) for name, task in tasks.items() for lr in task.rates]
    total = len(rates) * len(CONFIGURATIONS) * len(args.seeds)
    with tqdm(total=total, unit="run") as progress:
        for seed in args.seeds:
            for name, lr in rates:
                for configuration in CONFIGURATIONS:
                    progress.set_postfix_str(f"{name}, lr {lr:.2g}, {configuration}, seed {seed}")
                    run = Run(configuration, seed, lr, task=name)
                    runs.append(train(tasks[name], run, args.evaluations))
                    progress.update()


# The runs of each configuration, by learning rate.
Rates = dict[float, dict[str, list[Run]]]


def by_task(runs: Iterable[Run]) -> dict[str, Rates]:
    groups: dict[str, dict[float, list[Run]]] = {}
    for run in runs:
        groups.setdefault(run.task, {}).setdefault(run.lr, []).append(run)
    return {
        task: {lr: by_method(group) for lr, group in rates.items()}
        for task, rates in groups.items()
    }


def median_update(groups: dict[str, list[Run]]) -> float:
    """In ulps, where nothing is lost."""
    return statistics.median(run.update for run in groups["float32"])


def cells(group: list[Run], reference: list[Run]) -> list[str]:
    """The held-out loss, by how much it exceeds the reference's, seed by seed, and accuracy."""
    if not group:
        return ["", "", ""]
    loss_of = {run.seed: run.held_out_loss[-1] for run in reference}
    loss, loss_spread = mean_and_spread(run.held_out_loss[-1] for run in group)
    more, more_spread = mean_and_spread(run.held_out_loss[-1] - loss_of[run.seed] for run in group)
    right, right_spread = mean_and_spread(100 * run.accuracy[-1] for run in group)
    return [
        f"{loss:.4f} ± {loss_spread:.4f}",
        "" if group is reference else f"{more:+.4f} ± {more_spread:.4f}",
        f"{right:.1f} ± {right_spread:.1f}",
    ]


def table(task: str, rates: Rates) -> str:
    """In Markdown, a line a configuration."""
    groups = next(iter(rates.values()))
    first = groups["float32"][0]
    header = ["weights", "bytes"]
    for lr, of_rate in rates.items():
        update = f"lr {lr:.2g} ({median_update(of_rate):.2g} ulps)"
        header += [f"{update}: held-out loss", "behind float32", "accuracy, %"]
    rows = [header, ["---"] * len(header)]
    for name in groups:
        row = [name, str(CONFIGURATIONS[name].bytes)]
        for of_rate in rates.values():
            row += cells(of_rate.get(name, []), of_rate["float32"])
        rows.append(row)
    return "\n".join(
        [
            f"{task}, {first.evaluations[-1]} evaluations, from a held-out loss of "
            f"{first.held_out_loss[0]:.4f} and an accuracy of {100 * first.accuracy[0]:.1f}%\n",
            *(f"| {' | '.join(row)} |" for row in rows),
        ]
    )


def plot(runs: list[Run], path: Path) -> None:
    tasks = by_task(runs)
    figure, axes_of = plt.subplots(len(tasks), 2, figsize=(11, 1 + 3.5 * len(tasks)), squeeze=False)
    panels = [(task, lr, groups) for task, rates in tasks.items() for lr, groups in rates.items()]
    for axes, (task, lr, groups) in zip(axes_of.flat, panels, strict=False):
        for name, group in groups.items():
            losses = zip(*(run.held_out_loss for run in group), strict=True)
            means = [statistics.fmean(of_seeds) for of_seeds in losses]
            axes.plot(group[0].evaluations, means, label=name, lw=1.5, **CONFIGURATIONS[name].style)
        axes.set(xlabel="evaluations", ylabel="held-out loss")
        axes.set_title(f"{task}, lr {lr:.2g}: updates of {median_update(groups):.2g} ulps")
        axes.grid(alpha=0.3)
    labels = axes_of[0, 0].get_legend_handles_labels()
    figure.legend(*labels, loc="lower center", ncols=3, frameon=False)
    figure.suptitle(f"mean over {len({run.seed for run in runs})} seeds")
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(path, dpi=85)
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--evaluations", type=positive(int), default=360, help="of each run")
    parser.add_argument("--out", type=Path, default=Path("compare_precisions.png"), help="the plot")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--redraw", type=Path, help="show what --json wrote instead of running")
    args = parser.parse_args()
    if args.evaluations < 2:
        parser.error("argument --evaluations: a step takes 2")
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
        compare({name: TASKS[name]() for name in args.tasks}, args, runs)
    except KeyboardInterrupt:
        print("interrupted; what there is so far:", file=sys.stderr)
    return runs


def main() -> None:
    args = parse_arguments()
    runs = measured_runs(args)
    if args.json:
        args.json.write_text(json.dumps([asdict(run) for run in runs], indent=1))
    if runs:
        plot(runs, args.out)
        print(f"curves: {args.out}")
        for task, rates in by_task(runs).items():
            print(f"\n{table(task, rates)}")


if __name__ == "__main__":
    main()
