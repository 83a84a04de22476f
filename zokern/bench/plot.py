"""Runs as a plot: how near each operation is to a copy, and how far ahead of what others run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from zokern.bench import machine

COLORS = {"fp32": "tab:blue", "bf16": "tab:orange", "fp16": "tab:green"}
MARKERS = "osD^vP*X<>hpd8H"


def plot(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """A row of panels for each run."""
    heights = [1 + len(_titles(results)) / 3 for results in runs]
    figure, panels = plt.subplots(
        len(runs), 2, squeeze=False, sharey="row", figsize=(12, 1 + sum(heights)),
        height_ratios=heights, layout="constrained",
    )  # fmt: skip
    for (bandwidth, ahead), results in zip(panels, runs, strict=True):
        _bandwidth(bandwidth, results)
        _ahead(ahead, results)
        bandwidth.set_title(machine.title(results["machine"]), loc="left")
    figure.savefig(path, dpi=85)
    plt.close(figure)


def _titles(results: dict[str, Any]) -> list[str]:
    """Of the lines, those at the top last, as a plot counts them."""
    return list(dict.fromkeys(record["title"] for record in results["operations"]))[::-1]


def _bandwidth(axes: Axes, results: dict[str, Any]) -> None:
    titles = _titles(results)
    dtypes = [name for name in COLORS if any(r["dtype"] == name for r in results["operations"])]
    height = 0.8 / len(dtypes)
    for i, dtype in enumerate(dtypes):
        own = [record for record in results["operations"] if record["dtype"] == dtype]
        axes.barh(
            [titles.index(r["title"]) + 0.4 - (i + 0.5) * height for r in own],
            [100 * r["share_of_copy"] for r in own],
            height, label=dtype, color=COLORS[dtype],
        )  # fmt: skip
    axes.axvline(100, color="black", lw=0.8)
    axes.set_yticks(range(len(titles)), titles)
    axes.set_ylim(-0.6, len(titles) - 0.4)
    axes.set_xlabel("% of the bandwidth of a copy")
    axes.legend(frameon=False)


def _ahead(axes: Axes, results: dict[str, Any]) -> None:
    """A mark for each peer and dtype, in the dtype's color."""
    titles = _titles(results)
    names = list(dict.fromkeys(n for record in results["operations"] for n in record["peers"]))
    for record in results["operations"]:
        for name, peer in record["peers"].items():
            axes.plot(
                peer["times"], titles.index(record["title"]), linestyle="none",
                marker=MARKERS[names.index(name) % len(MARKERS)], color=COLORS[record["dtype"]],
            )  # fmt: skip
    for i, name in enumerate(names):
        axes.plot(
            [], [], linestyle="none", color="gray", marker=MARKERS[i % len(MARKERS)], label=name
        )
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xscale("log")
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlabel("times as fast as")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
