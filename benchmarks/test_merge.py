"""Merges of three models of 22M parameters beside mergekit's own functions. Run: ``make bench``.

Each round of zokern's merge follows a round of mergekit's on the same tensors, so that both see the
same machine; the ratio is that of the medians. Nothing is asserted.
"""

import statistics
import time

import pytest
import torch

from tests import merge_peers
from zokern import merge

ROUNDS = 5
WEIGHTS, DENSITIES = [0.7, 0.4, 1.2], [0.3, 0.5, 0.2]
# Of mergekit, of zokern, and what both are given besides the weights.
METHODS = {
    "linear": ("linear", merge.linear, {}),
    "task_arithmetic": ("task_arithmetic", merge.linear, {}),
    "dare": ("dare_linear", merge.dare, {"density": DENSITIES}),
    "dare_ties": ("dare_ties", merge.dare_ties, {"density": DENSITIES}),
    "ties": ("ties", merge.ties, {"density": DENSITIES}),
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Those of a sentence encoder: 12M parameters in the embeddings, 11M in six layers."""
    result: dict[str, tuple[int, ...]] = {"words": (30522, 384), "positions": (512, 384)}
    for layer in range(6):
        for name in ("query", "key", "value", "output"):
            result |= {f"{layer}.{name}": (384, 384), f"{layer}.{name}.bias": (384,)}
        result |= {f"{layer}.up": (1536, 384), f"{layer}.up.bias": (1536,)}
        result |= {f"{layer}.down": (384, 1536), f"{layer}.down.bias": (384,)}
        for name in ("norm", "bias", "norm2", "bias2"):
            result[f"{layer}.{name}"] = (384,)
    return result


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def states(request) -> tuple[dict, list[dict]]:
    base = {name: 0.05 * torch.randn(shape) for name, shape in shapes().items()}
    models = [
        {name: (t + 0.005 * torch.randn_like(t)).to(request.param) for name, t in base.items()}
        for _ in WEIGHTS
    ]
    return {name: tensor.to(request.param) for name, tensor in base.items()}, models


@pytest.mark.parametrize("name", METHODS)
def test_against_mergekit(benchmark, capsys, states, name):
    theirs, ours, given = METHODS[name]
    base, models = states
    start = None if name == "linear" else base
    peer_seconds = []

    def run_peer():
        begin = time.perf_counter()
        merge_peers.with_mergekit(theirs, start, models, weight=WEIGHTS, **given)
        peer_seconds.append(time.perf_counter() - begin)

    benchmark.pedantic(
        lambda: ours(models, base=start, weights=WEIGHTS, **given),
        setup=run_peer,
        rounds=ROUNDS,
        warmup_rounds=1,
    )
    peer, own = statistics.median(peer_seconds[1:]), benchmark.stats.stats.median
    benchmark.extra_info |= {"peer": "mergekit", "peer_median_s": peer}
    with capsys.disabled():
        print(
            f"\n{benchmark.name}: {own * 1e3:.0f} ms; mergekit: {peer * 1e3:.0f} ms; "
            f"{peer / own:.1f} times as fast"
        )
