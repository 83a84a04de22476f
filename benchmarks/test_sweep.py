"""One sweep over 2^26 parameters beside what users write instead. Run: ``make bench``.

Each round of zokern's sweep follows a round of the peer, so that both see the same machine; the
ratio is that of the medians. Nothing is asserted.
"""

import statistics
import time
from collections.abc import Callable

import pytest
import torch

from zokern import ops

NUMEL = 1 << 26
ROUNDS = 7


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def weights(request) -> torch.Tensor:
    return torch.randn(NUMEL).mul_(0.02).to(request.param)


def beside(
    benchmark, capsys, peer_name: str, peer: Callable[[], object], sweep: Callable[[], object]
) -> None:
    """Benchmark ``sweep`` with a round of the peer before each of its own."""
    peer_seconds = []

    def run_peer():
        start = time.perf_counter()
        peer()
        peer_seconds.append(time.perf_counter() - start)

    benchmark.pedantic(sweep, setup=run_peer, rounds=ROUNDS, warmup_rounds=1)
    peer_median = statistics.median(peer_seconds[1:])
    ours = benchmark.stats.stats.median
    benchmark.extra_info |= {"peer": peer_name, "peer_median_s": peer_median}
    with capsys.disabled():
        print(
            f"\n{benchmark.name}: {ours * 1e3:.1f} ms, {NUMEL / ours / 1e9:.2f} Gparam/s; "
            f"{peer_name}: {peer_median * 1e3:.1f} ms; {peer_median / ours:.1f} times as fast"
        )


def test_against_normal_and_add(benchmark, capsys, weights):
    def eager():
        torch.manual_seed(0)
        z = torch.normal(0.0, 1.0, size=weights.shape, dtype=weights.dtype)
        weights.add_(z, alpha=1e-3)

    def sweep():
        ops.perturb_([weights], [0], [1e-3], seed=0)

    beside(benchmark, capsys, "torch.normal and add_", eager, sweep)


def test_against_reading_and_writing(benchmark, capsys, weights):
    """The bandwidth of the same memory traffic, which no sweep can beat."""

    def sweep():
        ops.perturb_([weights], [0], [1e-3], seed=0)

    beside(benchmark, capsys, "mul_ in place", lambda: weights.mul_(1.0), sweep)


def test_two_directions_against_two_passes(benchmark, capsys, weights):
    def two_passes():
        for draw in range(2):
            torch.manual_seed(draw)
            z = torch.normal(0.0, 1.0, size=weights.shape, dtype=weights.dtype)
            weights.add_(z, alpha=1e-3)

    def sweep():
        ops.perturb_([weights], [0, 1], [1e-3, 1e-3], seed=0)

    beside(benchmark, capsys, "torch.normal and add_, twice", two_passes, sweep)


@pytest.mark.parametrize("law", ["gauss32", "normal", "rademacher"])
def test_other_laws(benchmark, capsys, weights, law):
    def gauss16():
        ops.perturb_([weights], [0], [1e-3], seed=0)

    def sweep():
        ops.perturb_([weights], [0], [1e-3], seed=0, law=law)

    beside(benchmark, capsys, "gauss16", gauss16, sweep)


@pytest.mark.parametrize("residual", [torch.int16, torch.int8], ids=["split", "split8"])
def test_residuals(benchmark, capsys, residual):
    weights = torch.randn(NUMEL).mul_(0.02).bfloat16()
    residuals = torch.zeros(NUMEL, dtype=residual)

    def inplace():
        ops.perturb_([weights], [0], [1e-3], seed=0)

    def sweep():
        ops.perturb_([weights], [0], [1e-3], seed=0, residuals=[residuals])

    beside(benchmark, capsys, "inplace", inplace, sweep)
