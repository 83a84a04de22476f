"""Results as Markdown, which is legible as it is."""

from collections.abc import Sequence
from typing import Any

from zokern.bench.results import Record

OPERATIONS_HEAD = (
    "operation", "dtype", "Mparam", "ms (quartiles)", "GB/s", "of copy", "of in place",
    "B/param: floor", "at copy speed", "times as fast as",
)  # fmt: skip
STEPS_HEAD = (
    "step of", "", "ms (quartiles)", "forward passes, ms", "optimizer, ms", "optimizer's share",
    "peak memory, MB", "of the forward pass",
)  # fmt: skip


def tables(results: dict[str, Any]) -> str:
    """Of the operations, and of whole steps."""
    operations = [_operation(record) for record in results["operations"]]
    steps = [_step(record) for record in results["steps"]]
    parts = []
    if operations:
        parts.append(_markdown([OPERATIONS_HEAD, *operations]))
    if steps:
        parts.append(_markdown([STEPS_HEAD, *steps]))
    return "\n\n".join(parts)


def _operation(record: Record) -> tuple[str, ...]:
    note = f" ({record['note']})" if record["note"] else ""
    return (
        record["title"] + note,
        record["dtype"],
        f"{record['parameters'] / 1e6:.3g}",
        _milliseconds(record["seconds"]),
        f"{record['gbps']:.3g}",
        f"{record['share_of_copy']:.0%}",
        f"{record['share_of_in_place']:.0%}",
        f"{record['bytes_floor']:.3g}",
        f"{record['bytes_at_copy_speed']:.3g}",
        ", ".join(f"{_times(peer['times'])} {name}" for name, peer in record["peers"].items()),
    )


def _step(record: Record) -> tuple[str, ...]:
    peak, forward = record["peak_bytes"], record["forward_peak_bytes"]
    return (
        record["note"],
        record["line"],
        _milliseconds(record["seconds"]),
        f"{1e3 * record['forward_seconds']:.0f}",
        f"{1e3 * record['optimizer_seconds']:.0f}",
        f"{record['optimizer_share']:.0%}",
        "" if peak is None else f"{peak / 1e6:.0f}",
        f"{peak / forward:.2f}" if peak and forward else "",
    )


def _milliseconds(seconds: dict[str, float]) -> str:
    median, low, high = (1e3 * seconds[name] for name in ("median", "low", "high"))
    digits = 3 if median < 1 else 2 if median < 10 else 1 if median < 100 else 0
    return f"{median:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def _times(times: float) -> str:
    return f"{times:.2f} ×" if times < 10 else f"{times:.0f} ×"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
