"""Writes the README's performance section and its plot from what runs have left.

    python -m zokern.bench.report

Each file of benchmarks/results/ is a run on one kind of machine, as ``python -m zokern.bench --json
benchmarks/results/`` writes it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zokern.bench import machine
from zokern.bench.goals import verdicts
from zokern.bench.table import tables

BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
COMMAND = "python -m zokern.bench --device cuda --json benchmarks/results/"

Results = dict[str, Any]


def load(folder: Path) -> list[Results]:
    """The runs in a folder, in the order of their files' names."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def section(runs: Sequence[Results], plot: str) -> str:
    """Of the README: each run's tables and goals, and whether a GPU is among them."""
    parts = [_run(results) for results in runs]
    if any(results["operations"] for results in runs):
        parts.append(f"![Bandwidth and speed beside others]({plot})")
    if not any(results["machine"]["device"] == "cuda" for results in runs):
        parts.append(
            "No GPU has been measured yet: what these pages say of times on GPUs are predictions. "
            f"`{COMMAND}` and `make report` put figures here."
        )
    return "\n\n".join(parts)


def _run(results: Results) -> str:
    about = results["machine"]
    triton = f", triton {about['triton']}" if about["triton"] else ""
    head = (
        f"**{machine.title(about)}** (torch {about['torch']}{triton}, zokern {about['zokern']} at "
        f"{about['commit']}, {about['date']}):"
    )
    return "\n\n".join([head, tables(results), _goals(results)]).rstrip()


def _goals(results: Results) -> str:
    return "\n".join(f"- {verdict}" for verdict in verdicts_of(results) if verdict.figure)


def verdicts_of(results: Results) -> list:
    return verdicts(results["machine"]["device"], [*results["operations"], *results["steps"]])


def written(readme: str, new: str) -> str:
    """The README with a new section between its marks.

    Raises:
        ValueError: where the marks are missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the README needs a line {BEGIN} and after it a line {END}")
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m zokern.bench.report", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="a folder")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--plot", type=Path, default=Path("docs/performance.png"))
    arguments = parser.parse_args()
    runs = load(arguments.results)
    try:
        new = written(arguments.readme.read_text(), section(runs, arguments.plot.as_posix()))
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")
    drawn = [results for results in runs if results["operations"]]
    if drawn:
        from zokern.bench.plot import plot

        plot(drawn, arguments.plot)
    arguments.readme.write_text(new)


if __name__ == "__main__":
    main()
