"""Times operations beside what users would run instead, in turns, on this machine.

A figure is the median of the times, with its quartiles; GB/s count what has to be read and written
at least, and are set beside a copy and a pass in place over as many parameters, which take turns
with all the rest. The tables come last, and whether the goals hold.
"""

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch

import zokern
from zokern.backends import ORDER, chosen, load
from zokern.bench import machine
from zokern.bench.comparison import DTYPES
from zokern.bench.models import MODELS
from zokern.bench.operations import END_TO_END, OPERATIONS
from zokern.bench.report import verdicts_of
from zokern.bench.run import PEERS, REST, Plan, run
from zokern.bench.table import tables

# As much as takes minutes, and more than caches hold. A CPU's compiler takes longer than the rest.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"numel": 1 << 26, "model": "opt-125m", "tokens": 128, "peers": "quick"},
    "cuda": {"numel": 1 << 28, "model": "llama-3-8b", "tokens": 4096, "peers": "all"},
}
NAMES = [*OPERATIONS, END_TO_END]


def _names(what: str, known: Iterable[str]) -> Callable[[str], list[str]]:
    """An argument of names, with commas between them."""
    known = list(known)

    def names(text: str) -> list[str]:
        given = [name.strip() for name in text.split(",")]
        for name in given:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"unknown {what} {name!r}; there are {', '.join(known)}"
                )
        return given

    return names


def _count(text: str) -> int:
    """A positive integer, also as 2^26 or 1e6."""
    base, power, exponent = text.partition("^")
    try:
        value = Decimal(base) ** int(exponent) if power else Decimal(base)
        count = int(value)
    except (ArithmeticError, ValueError):
        value, count = Decimal(), 0
    if count < 1 or count != value:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no positive integer, such as 1000, 1e6 or 2^26"
        )
    return count


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m zokern.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=DEFAULTS, help="cuda where there is one, else cpu")
    add("--backend", choices=ORDER, help="the one that zokern takes by default")
    add("--ops", type=_names("operation", NAMES), default=NAMES, help="see --list; all by default")
    add("--dtype", type=_names("dtype", DTYPES), default=["fp32", "bf16"],
        help="with commas between them: fp32, bf16, fp16; fp32,bf16 by default")  # fmt: skip
    add("--numel", type=_count, help="parameters of a sweep; merging optimizers and selections get "
        "a quarter, merges a 32nd; by default 2^26, 2^28 on a GPU")  # fmt: skip
    add("--model-shapes", choices=MODELS, help="whose list of tensors mezo-model takes")
    add("--model", choices=MODELS, help="of whole steps; both models are cut down to the layers "
        "that fit, and by default opt-125m, llama-3-8b on a GPU")  # fmt: skip
    add("--tokens", type=_count, help="of whole steps; by default 128, 4096 on a GPU")
    add("--peers", choices=PEERS, help="quick leaves torch.compile out, the default on a CPU")
    add("--rounds", type=_count, default=7, help="at most; default 7")
    add("--seconds", type=float, default=6.0, help="after which no round of an operation begins "
        "but the first three; default 6")  # fmt: skip
    add("--minutes", type=float, default=8.0, help="after which no operation begins; default 8")
    add("--json", type=Path, help="where to write all figures: a file, or a folder of results, "
        "in which it is named after the machine")  # fmt: skip
    add("--plot", type=Path, help="where to draw them")
    add("--list", action="store_true", help="name the operations and models, and time nothing")
    return parser


def _plan(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Plan:
    """Complete arguments; ends with an error where they cannot be had."""
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch finds no CUDA GPU here; there is cpu")
    backend = given.backend or chosen()
    reason = backend and load(backend).why_not(torch.device(device))
    if reason:
        parser.error(f"the backend {backend!r} cannot run on {device}: {reason}")
    for option, kinds in (("json", (".json",)), ("plot", (".png", ".svg", ".pdf"))):
        path = getattr(given, option)
        if path is None or (option == "json" and path.is_dir()):
            continue
        if not path.resolve().parent.is_dir():
            parser.error(f"argument --{option}: there is no folder {path.resolve().parent}")
        if path.suffix not in kinds:
            parser.error(f"argument --{option}: {str(path)!r} ends with none of {', '.join(kinds)}")
    if given.plot and given.ops == [END_TO_END]:
        parser.error("argument --plot: whole steps are not drawn; add other operations to --ops")
    own = DEFAULTS[device]
    model = given.model or own["model"]
    plan = Plan(
        device=torch.device(device),
        ops=given.ops,
        dtypes=given.dtype,
        numel=given.numel or own["numel"],
        model_shapes=given.model_shapes or own["model"],
        model=model,
        tokens=given.tokens or own["tokens"],
        peers=given.peers or own["peers"],
        rounds=given.rounds,
        seconds=given.seconds,
        minutes=given.minutes,
    )
    if not plan.tasks():
        parser.error(
            f"argument --dtype: none of {', '.join(given.ops)} is for {', '.join(given.dtype)}"
        )
    return plan


def _listing() -> str:
    width = max(map(len, NAMES)) + 2
    lines = [
        f"{name:<{width}}{operation.title} ({', '.join(operation.dtypes)})"
        for name, operation in OPERATIONS.items()
    ]
    lines.append(f"{END_TO_END:<{width}}MeZO step of a model, forward passes and peak memory")
    return "\n".join([*lines, f"models: {', '.join(MODELS)}"])


def _show(results: dict[str, Any]) -> None:
    for what, reason in results["skipped"].items():
        print(f"skipped: {what}: {reason}")
    print(f"\n{machine.title(results['machine'])}\n\n{tables(results)}\n")
    for verdict in verdicts_of(results):
        print(verdict)


def main() -> None:
    parser = _parser()
    given = parser.parse_args()
    if given.list:
        print(_listing())
        return
    plan = _plan(parser, given)
    try:
        zokern.use_backend(given.backend)
        results = run(plan)
    except ImportError as error:
        sys.exit(f"{parser.prog}: {error}; pip install 'zokern[bench]' has what it needs")
    interrupted = REST in results["skipped"]
    folder = given.json is not None and given.json.is_dir()
    # Half a run does not replace a machine's results.
    if given.json and not (interrupted and folder):
        path = given.json / machine.file_name(results["machine"]) if folder else given.json
        path.write_text(json.dumps(results, indent=1) + "\n")
    if given.plot:
        from zokern.bench.plot import plot

        plot([results], given.plot)
    _show(results)
    if interrupted:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
