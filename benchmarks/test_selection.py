"""Selections of other kinds than the one of ``python -m zokern.bench``. Run: ``make bench``.

Rounds of all of them follow one another, so that they see the same machine; the ratios are those of
the medians. Nothing is asserted.
"""

import statistics
import time
from collections.abc import Callable

import pytest
import torch

from zokern import ops

NUMEL = 1 << 24
ROUNDS = 5
SHARES = [0.01, 0.1, 0.5]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request) -> torch.dtype:
    return request.param


def beside(
    benchmark, capsys, peers: dict[str, Callable[[], object]], select: Callable[[], object]
) -> None:
    """Benchmark ``select`` with a round of each peer before each of its own."""
    seconds: dict[str, list[float]] = {name: [] for name in peers}

    def run_peers():
        for name, peer in peers.items():
            start = time.perf_counter()
            peer()
            seconds[name].append(time.perf_counter() - start)

    benchmark.pedantic(select, setup=run_peers, rounds=ROUNDS, warmup_rounds=1)
    ours = benchmark.stats.stats.median
    report = [f"\n{benchmark.name}: {ours * 1e3:.1f} ms"]
    for name, times in seconds.items():
        median = statistics.median(times[1:])
        benchmark.extra_info[name] = median
        report.append(f"{name}: {median * 1e3:.1f} ms, {median / ours:.1f} times as long")
    with capsys.disabled():
        print("; ".join(report))


@pytest.mark.parametrize("share", SHARES)
def test_of_equal_values(benchmark, capsys, dtype, share):
    values = torch.full((NUMEL,), 0.3, dtype=dtype)
    k = int(share * NUMEL)
    peers = {
        "topk": lambda: torch.topk(values.abs(), k, sorted=False),
        "kthvalue": lambda: torch.kthvalue(values.abs(), NUMEL - k + 1),
    }
    beside(benchmark, capsys, peers, lambda: ops.magnitude_threshold([values], k))


def test_many_small_tensors(benchmark, capsys):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(768, generator=generator) for _ in range(300)]
    peers = {"topk of each": lambda: [torch.topk(t.abs(), 76, sorted=False) for t in tensors]}
    beside(benchmark, capsys, peers, lambda: ops.magnitude_threshold(tensors, 76))
