"""Each operation of ``python -m zokern.bench`` under pytest-benchmark. Run: ``make bench``.

Each round of zokern's run follows a round of each peer on the same machine; the ratios are those of
the medians. Nothing is asserted.
"""

import statistics
from collections.abc import Callable

import pytest
import torch

from zokern.bench.comparison import DTYPES, OURS, Setting, Unavailable, bandwidth
from zokern.bench.mezo import COMPILED
from zokern.bench.operations import OPERATIONS
from zokern.bench.timing import sample, synchronizer

NUMEL = 1 << 26
MODEL = "opt-125m"
ROUNDS = 5
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

CASES = [(name, dtype) for name in OPERATIONS for dtype in ("fp32", "bf16")]
CASES = [(name, dtype) for name, dtype in CASES if dtype in OPERATIONS[name].dtypes]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_operation(benchmark, capsys, name, dtype):
    setting = Setting(DEVICE, DTYPES[dtype], NUMEL, MODEL)
    try:
        comparison = OPERATIONS[name].build(setting)
    except Unavailable as reason:
        pytest.skip(str(reason))
    peers = comparison.peers | bandwidth(setting, comparison.parameters)
    # To compile takes longer than all the rest.
    peers.pop(COMPILED, None)
    synchronize = synchronizer(DEVICE)
    seconds: dict[str, list[float]] = {peer: [] for peer in peers}

    def run_peers() -> None:
        for peer, run in peers.items():
            seconds[peer].append(sample(run, synchronize))

    own = waited_for(comparison.lines[OURS].run, synchronize)
    benchmark.pedantic(own, setup=run_peers, rounds=ROUNDS, warmup_rounds=1)
    median = benchmark.stats.stats.median
    report = [f"\n{benchmark.name}: {median * 1e3:.1f} ms"]
    for peer, times in seconds.items():
        theirs = benchmark.extra_info[peer] = statistics.median(times[1:])
        report.append(f"{peer}: {theirs * 1e3:.1f} ms, {theirs / median:.2f} times as long")
    with capsys.disabled():
        print("; ".join(report))


def waited_for(run: Callable[[], object], synchronize: Callable[[], object]) -> Callable[[], None]:
    def until_done() -> None:
        run()
        synchronize()

    return until_done
