"""Align a small language model and see what it forgets: merging optimizers beside AdamW.

A small causal language model that has read Python's documentation and been instruction-tuned on it
(align_task.py says how) is taught to prefer plain words, against what it has read. TRL's trainers,
unmodified, do so by DPO, IPO and KTO, with every method in as many steps. The learning rate is the
smallest power of two times 1e-4 with which AdamW brought 90% of the pairs of another seed to the
preferred order by DPO; LoRA's, four times as high, was found in the same way.

On held-out text, the table and the plot set what the model has learned (the share of pairs whose
plain answer it holds the likelier one) against the tax (the rise of the loss on documentation). A
method that moves less learns less and forgets less, which is no merit: AdamW could be stopped
early. So one column compares it at five stops of its run with AdamW at the same tax.

Nothing is downloaded.

    make align
    python examples/align_merging.py --seeds 0 1 2 3 --json runs.json    # the table of README.md
    python examples/align_merging.py --quick
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import datasets
import matplotlib.pyplot as plt
import numpy as np
import torch
from align_task import Figures, School, Weights, weights
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import nn
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from zopro_rlhf import mean_and_spread

import zokern

PAIRS = 8  # in a step
LOSSES = ("DPO", "IPO", "KTO")
EPS = 1e-8  # as the trainers' AdamW
STOPS = 5  # of a run, its end included
FINE = 4  # times as many of AdamW's, as between its stops the curve is taken for straight

Maker = Callable[[nn.Module, School, argparse.Namespace], torch.optim.Optimizer]


@dataclass(frozen=True)
class Method:
    """What differs from plain AdamW, which is the trainer's own."""

    optimizer: Maker | None = None
    beta: float = 1.0  # times the others'
    lora: bool = False


def ema(policy: nn.Module, school: School, args: argparse.Namespace) -> torch.optim.Optimizer:
    return zokern.EMAAdamW(
        policy.named_parameters(),
        lr=args.lr,
        eps=EPS,
        pull=1 / args.steps,
        reference=school.start,
    )


def child_tuning(
    policy: nn.Module, school: School, args: argparse.Namespace
) -> torch.optim.Optimizer:
    return zokern.OnDAREAdamW(
        policy.named_parameters(), lr=args.lr, eps=EPS, reserve_p=args.reserve, seed=school.seed
    )


def online(optimizer: type[torch.optim.Optimizer], **options: Any) -> Method:
    """An online merge, but for ``reserve_p`` and ``alpha`` as published."""

    def make(policy: nn.Module, school: School, args: argparse.Namespace) -> torch.optim.Optimizer:
        return optimizer(
            policy.named_parameters(),
            lr=args.lr,
            eps=EPS,
            reserve_p=args.reserve,
            use_merge=True,
            alpha=args.alpha,
            reference=school.start,
            base=school.base,
            seed=school.seed,
            **options,
        )

    return Method(make)


METHODS = {
    "AdamW": Method(),
    "AdamW, 5 β": Method(beta=5.0),
    "LoRA": Method(lora=True),
    "EMA": Method(ema),
    "ChildTuning": Method(child_tuning),
    "OnDARE": online(zokern.OnDAREAdamW),
    "OnDARE, K = 5": online(zokern.OnDAREAdamW, online_step=5),
    "OnTIES": online(zokern.OnTIESAdamW),
    "OnTIES, K = 5": online(zokern.OnTIESAdamW, online_step=5),
}
# Of the instruction-tuned model and what AdamW made of it, as differences from the base.
MERGES = {
    "AdamW, linear": partial(zokern.merge.linear, weights=[0.5, 0.5]),
    "AdamW, DARE": partial(zokern.merge.dare, weights=[0.5, 0.5], density=0.5),
    "AdamW, TIES": partial(zokern.merge.ties, weights=[0.5, 0.5], density=0.5),
}


@dataclass
class Run:
    """``path`` is the stops' figures; an offline merge has only one."""

    loss: str
    method: str
    seed: int
    seconds: float
    path: list[Figures]


class Stops(TrainerCallback):
    """Keeps the weights as training goes on."""

    def __init__(self, steps: int, count: int) -> None:
        self.at = {round(steps * i / count) for i in range(1, count + 1)}
        self.kept: list[Weights] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.at:
            model = kwargs["model"]
            if isinstance(model, PeftModel):
                model = copy.deepcopy(model).merge_and_unload()
            self.kept.append(weights(model))


def preferences(school: School, loss: str, steps: int, folder: Path) -> Path:
    """The pairs in the form that the loss's trainer wants, in a file: what is computed from a
    file, tokens and the reference's log-probabilities, is kept for the next method."""
    pairs = school.pairs(steps * PAIRS)
    path = folder / f"{loss} {school.seed}"
    if loss == "KTO":
        # In a batch each prompt stands twice, as far from itself as can be: its estimate of the KL
        # divergence pairs a prompt with the answer before its own.
        pairs = [
            {"prompt": pair["prompt"], "completion": pair[which], "label": which == "chosen"}
            for start in range(0, len(pairs), PAIRS)
            for which in ("chosen", "rejected")
            for pair in pairs[start : start + PAIRS]
        ]
    Dataset.from_list(pairs).save_to_disk(path)
    return path


def make_trainer(
    school: School, loss: str, method: Method, data: Path, args: argparse.Namespace
) -> Trainer:
    policy = copy.deepcopy(school.sft)
    common: dict[str, Any] = {
        "output_dir": str(data.parent),
        "max_steps": args.steps,
        "per_device_train_batch_size": 2 * PAIRS if loss == "KTO" else PAIRS,
        "learning_rate": 4 * args.lr if method.lora else args.lr,
        "lr_scheduler_type": "linear",
        "warmup_steps": args.steps // 10,
        "beta": args.beta * method.beta,
        "precompute_ref_log_probs": True,
        "max_length": None,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "seed": school.seed,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    if loss == "KTO":
        trainer, config = KTOTrainer, KTOConfig(**common)
    else:
        kind = {"DPO": "sigmoid", "IPO": "ipo"}[loss]
        trainer, config = DPOTrainer, DPOConfig(**common, loss_type=[kind])
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return trainer(
        model=policy,
        args=config,
        train_dataset=datasets.load_from_disk(str(data)),
        processing_class=school.tokenizer,
        optimizers=(method.optimizer and method.optimizer(policy, school, args), None),
        peft_config=lora if method.lora else None,
    )


def align(
    school: School, loss: str, name: str, data: Path, args: argparse.Namespace
) -> tuple[Run, Weights]:
    method = METHODS[name]
    start = time.perf_counter()
    trainer = make_trainer(school, loss, method, data, args)
    trainer.remove_callback(PrinterCallback)
    stops = Stops(args.steps, STOPS * FINE if name == "AdamW" else STOPS)
    trainer.add_callback(stops)
    trainer.train()
    seconds = time.perf_counter() - start
    path = [school.judge.figures(each) for each in stops.kept]
    return Run(loss, name, school.seed, seconds, path), stops.kept[-1]


def one_seed(seed: int, args: argparse.Namespace) -> list[Run]:
    """All runs of a seed, on one thread: so small a model gains nothing from a second one."""
    torch.set_num_threads(1)
    silence()
    runs: list[Run] = []
    steps = args.base_steps + args.sft_steps + len(args.losses) * len(METHODS) * args.steps
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=steps, unit="step", position=args.seeds.index(seed)) as progress,
    ):
        school = School(seed, args.base_steps, args.sft_steps, progress)
        for loss in args.losses:
            data = preferences(school, loss, args.steps, Path(folder))
            for name in METHODS:
                progress.set_description(f"seed {seed}, {loss}, {name}")
                run, end = align(school, loss, name, data, args)
                runs.append(run)
                progress.update(args.steps)
                if name == "AdamW":
                    runs += offline(school, loss, end)
    return runs


def silence() -> None:
    # The trainers warn of options that they set themselves.
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    # TRL looks here when it computes log-probabilities, tqdm only when it is imported.
    os.environ["TQDM_DISABLE"] = "1"


def offline(school: School, loss: str, aligned: Weights) -> list[Run]:
    runs = []
    for name, merge in MERGES.items():
        start = time.perf_counter()
        merged = merge(base=school.base, models=[school.start, aligned])
        seconds = time.perf_counter() - start
        runs.append(Run(loss, name, school.seed, seconds, [school.judge.figures(merged)]))
    return runs


def ahead(run: Run, runs: list[Run]) -> float:
    """The mean over its stops of its share less AdamW's at the same tax, in points; stops beyond
    the tax that AdamW ended with do not count."""
    path = next(
        other.path
        for other in runs
        if (other.method, other.loss, other.seed) == ("AdamW", run.loss, run.seed)
    )
    taxes = np.array([figures.tax for figures in path])
    shares = np.array([figures.plain for figures in path])
    order = np.argsort(taxes)
    leads = [
        figures.plain - np.interp(figures.tax, taxes[order], shares[order])
        for figures in run.path
        if taxes.min() <= figures.tax <= taxes.max()
    ]
    return 100 * float(np.mean(leads)) if leads else float("nan")


def statistics(group: list[Run], runs: list[Run]) -> list[tuple[float, float]]:
    ends = [run.path[-1] for run in group]
    values = (
        [100 * end.plain for end in ends],
        [end.margin for end in ends],
        [end.tax for end in ends],
        [end.answers for end in ends],
        [lead for run in group if not np.isnan(lead := ahead(run, runs))] or [float("nan")],
        [run.seconds for run in group],
    )
    return [mean_and_spread(each) for each in values]


def table(runs: list[Run]) -> str:
    lines = []
    for loss in dict.fromkeys(run.loss for run in runs):
        lines += [
            f"{loss}, mean ± standard deviation over seeds",
            f"{'method':<15}{'plain, %':>14}{'margin, nats':>16}{'tax, nats':>16}"
            f"{'tax on answers':>16}{'ahead, points':>16}{'seconds':>9}",
        ]
        for name in (*METHODS, *MERGES):
            group = [run for run in runs if (run.loss, run.method) == (loss, name)]
            plain, margin, tax, answers, lead, seconds = statistics(group, runs)
            lines.append(
                f"{name:<15}{plain[0]:>8.1f} ±{plain[1]:>4.1f}{margin[0]:>10.1f} ±{margin[1]:>4.1f}"
                f"{tax[0]:>9.2f} ± {tax[1]:.2f}{answers[0]:>9.2f} ± {answers[1]:.2f}"
                f"{lead[0]:>+10.1f} ±{lead[1]:>4.1f}{seconds[0]:>9.1f}"
            )
    return "\n".join(lines)


def plot(runs: list[Run], path: Path) -> None:
    losses = list(dict.fromkeys(run.loss for run in runs))
    figure, panels = plt.subplots(1, len(losses), figsize=(4.6 * len(losses), 5.2), squeeze=False)
    for axes, loss in zip(panels[0], losses, strict=True):
        for i, name in enumerate((*METHODS, *MERGES)):
            paths = [run.path for run in runs if (run.loss, run.method) == (loss, name)]
            taxes, shares = (
                [
                    mean_and_spread([getattr(figures, what) for figures in stop])
                    for stop in zip(*paths, strict=True)
                ]
                for what in ("tax", "plain")
            )
            color, marker = plt.get_cmap("tab20")(i), "os^vDPX*pdh<"[i]
            axes.plot([mean for mean, _ in taxes], [mean for mean, _ in shares], lw=1, color=color)
            (x, dx), (y, dy) = taxes[-1], shares[-1]
            axes.errorbar(x, y, dy, dx, fmt=marker, color=color, label=name, ms=7, lw=0.8)
        axes.set(title=loss, xlabel="tax, nats")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("share of pairs with the plain answer likelier")
    labels = panels[0][0].get_legend_handles_labels()
    columns = 2 * len(losses)
    figure.legend(*labels, loc="lower center", ncols=columns, frameon=False)
    figure.suptitle("At the end of the run, and on the way there")
    figure.tight_layout(rect=(0, 0.03 + 0.04 * len(labels[0]) / columns, 1, 1))
    figure.savefig(path, dpi=85)
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--jobs", type=int, default=2, help="seeds that run at a time")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--steps", type=int, default=40, help="of alignment")
    parser.add_argument("--lr", type=float, default=4e-4, help="of alignment")
    parser.add_argument("--beta", type=float, default=0.1, help="weight of the KL divergence")
    parser.add_argument("--reserve", type=float, default=0.1, help="what the masks keep of a step")
    parser.add_argument("--alpha", type=float, default=2.5e-3, help="weight of τ in a merge")
    parser.add_argument("--base-steps", type=int, default=500, help="of pretraining")
    parser.add_argument("--sft-steps", type=int, default=200, help="of instruction tuning")
    parser.add_argument("--quick", action="store_true", help="one seed, DPO, a weaker base")
    parser.add_argument("--out", type=Path, default=Path("align_merging.png"), help="the plot")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.losses, args.base_steps, args.sft_steps = [0], ["DPO"], 250, 100
    if args.steps < STOPS * FINE:
        parser.error(f"argument --steps: at least {STOPS * FINE}")
    for path in filter(None, (args.out, args.json)):
        if not path.resolve().parent.is_dir():
            parser.error(f"there is no folder {path.resolve().parent} to write {path.name} into")
    return args


def main() -> None:
    args = parse_arguments()
    began = time.perf_counter()
    # Spawned, as a forked process may not use threads that its parent has started.
    workers = ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"))
    with workers as pool:
        runs = [run for runs in pool.map(one_seed, args.seeds, repeat(args)) for run in runs]
    print(table(runs))
    print(f"{time.perf_counter() - began:.0f} s")
    plot(runs, args.out)
    print(f"plot: {args.out}")
    if args.json:
        args.json.write_text(json.dumps([asdict(run) for run in runs], indent=1))


if __name__ == "__main__":
    main()
