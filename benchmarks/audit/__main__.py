"""A static audit of the GPU kernels: what their machine code costs, with no GPU.

    python -m benchmarks.audit [--kernel 'sweep-*'] [--backend cuda] [--markdown] [--update]

Compiles the CUDA and Triton kernels for sm_90, disassembles them, follows the main path of the hot
loop and counts its instructions for a parameter: issue slots (one instruction of one thread) and
their pipes. From them follows what binds on an H200 and the share of a copy's bandwidth that can
be reached at most. Exit status 1: a kernel needs more than a slot more than is recorded in
budgets.json, misses a goal that it met, spills, or reads and writes in narrow pieces. Exit status
2: there was nothing to audit it with.
"""

import argparse
import fnmatch
import json
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from benchmarks.audit.reports import Report, compare, examine
from benchmarks.audit.sass import Function
from benchmarks.audit.tools import Missing, compile_cuda, disassemble, find
from benchmarks.audit.triton_kernels import compile_triton
from benchmarks.audit.variants import VARIANTS, cuda_kernel

ROOT = Path(__file__).parent
BUDGETS = ROOT / "budgets.json"
CSRC = ROOT.parent.parent / "csrc"
# nvcc takes a core, and about a gigabyte.
COMPILERS = 2


def audit_cuda(names: list[str], csrc: Path, progress: Callable[[], object]) -> list[Report]:
    kernels = {name: cuda_kernel(VARIANTS[name]) for name in names}
    sources = sorted({source for source, _ in kernels.values()})
    find("nvcc"), find("nvdisasm")

    def compiled(source: str) -> dict[str, Function]:
        functions = disassemble(compile_cuda(csrc / "cuda" / source))
        progress()
        return functions

    with ThreadPoolExecutor(COMPILERS) as pool:
        functions = dict(zip(sources, pool.map(compiled, sources), strict=True))
    return [
        examine("cuda", name, VARIANTS[name], _named(functions[source], pattern))
        for name, (source, pattern) in kernels.items()
    ]


def _named(functions: dict[str, Function], pattern: str) -> Function:
    found = [function for name, function in functions.items() if re.search(pattern, name)]
    if len(found) != 1:
        raise LookupError(f"{len(found)} kernels are named {pattern}, not one")
    return found[0]


def audit_triton(names: list[str], _: Path, progress: Callable[[], object]) -> list[Report]:
    find("nvdisasm")
    reports = []
    for name, cubin in compile_triton(names, progress).items():
        (function,) = disassemble(cubin).values()
        reports.append(examine("triton", name, VARIANTS[name], function))
    return reports


AUDITS = {"cuda": audit_cuda, "triton": audit_triton}


def table(reports: list[Report], budgets: dict) -> str:
    kinds = ["wide", "imad", "integer", "logic", "fma", "mufu", "convert", "fp64", "global",
             "shared", "constant", "uniform", "branch"]  # fmt: skip
    head = [
        "kernel",
        "slots",
        "budget",
        "goal",
        "start",
        *kinds,
        "widths",
        "bytes",
        "bound",
        "copy",
    ]
    rows = [head]
    for r in reports:
        budget = budgets.get(r.backend, {}).get(r.name, {})
        numbers = [budget.get("slots"), budget.get("goal"), r.start]
        rows.append([
            f"{r.backend} {r.name}",
            f"{r.slots:.2f}" if r.slots else "?",
            *("-" if n is None else f"{n:.4g}" for n in numbers),
            *(f"{n:.2f}" if (n := r.instructions.get(kind)) else "." for kind in kinds),
            "+".join(map(str, r.widths)) or "?",
            str(r.bytes),
            f"{r.bound or '?'} {r.bounds.get(r.bound, 0):.1f}",
            f"{r.share:.0%}" if r.share else "?",
        ])  # fmt: skip
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *rest = (cell.rjust(size) for cell, size in zip(row, sizes, strict=True))
        lines.append("  ".join([row[0].ljust(len(first)), *rest]))
    return "\n".join(lines)


def markdown(reports: list[Report]) -> str:
    """The predictions, as a table of docs/performance.md."""
    found = {(r.backend, r.name): r for r in reports if r.slots}
    lines = ["| | bytes | slots meanwhile |", "|---|---|---|"]
    for backend in AUDITS:
        lines[0] += f" {backend}: slots | bound by | of a copy |"
        lines[1] += "---|---|---|"
    for name in dict.fromkeys(name for _, name in found):
        own = [found.get((backend, name)) for backend in AUDITS]
        first = next(r for r in own if r is not None)
        line = f"| `{name}` | {first.bytes} | {first.bounds['memory']:.1f} |"
        for r in own:
            cells = ["", "", ""]
            if r is not None:
                pipe = r.bound not in ("issue", "memory")
                bound = f"{r.bound}, {r.bounds[r.bound]:.1f}" if pipe else r.bound
                cells = [f"{r.bounds['issue']:.1f}", bound, f"{r.share:.0%}"]
            line += "".join(f" {cell} |" for cell in cells)
        lines.append(line)
    return "\n".join(lines)


def update(budgets: dict, reports: list[Report]) -> None:
    """Records what was measured; the goals stay."""
    for report in reports:
        if report.slots and not report.problems:
            own = budgets.setdefault(report.backend, {}).setdefault(report.name, {})
            own["slots"] = round(report.slots, 4)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    lines = (__doc__ or "").split("\n")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit", description=lines[0])
    parser.add_argument("--kernel", default="*", help="names, as a shell would match them")
    parser.add_argument("--backend", choices=AUDITS, help="one of them instead of both")
    parser.add_argument("--json", type=Path, help="write all that was found to this file")
    parser.add_argument("--markdown", action="store_true", help="print the table of the docs")
    parser.add_argument("--update", action="store_true", help="record what was measured as budgets")
    parser.add_argument("--budgets", type=Path, default=BUDGETS, help="another file of budgets")
    parser.add_argument("--csrc", type=Path, default=CSRC, help="the CUDA sources of another tree")
    args = parser.parse_args(argv)
    args.names = fnmatch.filter(VARIANTS, args.kernel)
    if not args.names:
        parser.error(f"no kernel is named {args.kernel}; there are {', '.join(VARIANTS)}")
    return args


def _reports(args: argparse.Namespace) -> tuple[list[Report], list[str]]:
    """What was found, and which backends could not be audited, and why."""
    reports: list[Report] = []
    missing = []
    backends = [args.backend] if args.backend else list(AUDITS)
    names = {b: [n for n in args.names if b in VARIANTS[n].backends] for b in backends}
    sources = {cuda_kernel(VARIANTS[name])[0] for name in names.get("cuda", [])}
    steps = len(sources) + len(names.get("triton", []))
    with tqdm(total=steps, desc="compiling", disable=None) as bar:
        for backend in backends:
            try:
                reports += AUDITS[backend](names[backend], args.csrc, bar.update)
            except Missing as error:
                missing.append(f"{backend}: not audited: {error}")
    return reports, missing


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    budgets = json.loads(args.budgets.read_text()) if args.budgets.exists() else {}
    reports, missing = _reports(args)
    if args.update:
        update(budgets, reports)
        args.budgets.write_text(json.dumps(budgets, indent=2, sort_keys=True) + "\n")
    if args.json:
        args.json.write_text(json.dumps([report.as_json() for report in reports], indent=2))
    if reports:
        print(markdown(reports) if args.markdown else table(reports, budgets), flush=True)
    wrong = [
        f"{report.backend} {report.name}: {problem}"
        for report in reports
        for problem in compare(report, budgets.get(report.backend, {}).get(report.name))
    ]
    for line in (*missing, *wrong):
        print(line, file=sys.stderr)
    return 1 if wrong else 2 if missing and (args.backend or not reports) else 0


if __name__ == "__main__":
    sys.exit(main())
