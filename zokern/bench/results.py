"""What a run has measured, as it is written to JSON."""

from dataclasses import asdict
from typing import Any

from zokern.bench.comparison import COPY, DTYPE_NAMES, IN_PLACE, OURS, Comparison, Setting
from zokern.bench.end_to_end import FORWARD
from zokern.bench.timing import Timing

Record = dict[str, Any]


def records(
    name: str, title: str, setting: Setting, comparison: Comparison, timings: dict[str, Timing]
) -> list[Record]:
    """One for each of zokern's lines.

    Bandwidths are in GB/s and count the floor of the operation: what has to be read and written,
    not what is. ``bytes_at_copy_speed`` is what a copy moves, per parameter, in the time taken.
    """
    traffic = 2 * setting.dtype.itemsize * comparison.parameters / 1e9
    copy, in_place = (traffic / timings[name].median for name in (COPY, IN_PLACE))
    result = []
    for line, own in comparison.lines.items():
        timing = timings[line]
        gbps = own.floor * comparison.parameters / 1e9 / timing.median
        result.append(
            {
                "operation": name,
                "title": title if line == OURS else f"{title}, {line}",
                "line": line,
                "dtype": DTYPE_NAMES[setting.dtype],
                "parameters": comparison.parameters,
                "note": comparison.note,
                "seconds": asdict(timing),
                "bytes_floor": own.floor,
                "bytes_at_copy_speed": 1e9 * copy * timing.median / comparison.parameters,
                "gbps": gbps,
                "copy_gbps": copy,
                "in_place_gbps": in_place,
                "share_of_copy": gbps / copy,
                "share_of_in_place": gbps / in_place,
                "peers": {
                    peer: {
                        "seconds": asdict(timings[peer]),
                        "times": timings[peer].median / timing.median,
                    }
                    for peer in comparison.peers
                },
            }
        )
    return result


def step_records(
    setting: Setting,
    layers: int,
    comparison: Comparison,
    timings: dict[str, Timing],
    peaks: dict[str, int],
) -> list[Record]:
    """One for each way to evaluate, and for the eager loop; the optimizer's seconds are those that
    the forward passes leave."""
    forward = timings[FORWARD].median
    return [
        {
            "operation": "step",
            "line": line,
            "model": setting.model,
            "layers": layers,
            "note": comparison.note,
            "dtype": DTYPE_NAMES[setting.dtype],
            "tokens": setting.tokens,
            "parameters": comparison.parameters,
            "seconds": asdict(timings[line]),
            "forward_seconds": forward,
            "optimizer_seconds": timings[line].median - forward,
            "optimizer_share": 1 - forward / timings[line].median,
            "peak_bytes": peaks.get(line),
            "forward_peak_bytes": peaks.get(FORWARD),
        }
        for line in timings
        if line != FORWARD
    ]
