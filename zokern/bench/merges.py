"""Merges of three models beside mergekit's and peft's functions."""

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from zokern import merge
from zokern.bench import peers
from zokern.bench.comparison import OURS, Comparison, Line, Run, Setting, numels, random_values

WEIGHTS, DENSITY = [0.7, 0.4, 1.2], 0.3
MATRICES = 16
# Of what a model is away from its base.
DELTA_SCALE = 0.005

Merge = Callable[..., Mapping[str, Tensor]]


def beside_mergekit(own: Merge, theirs: str, **given: object) -> Callable[[Setting], Comparison]:
    """``theirs`` is the method's name there, ``given`` what both take besides the weights."""

    def build(setting: Setting) -> Comparison:
        base, models = _models(setting.part(32))
        return _comparison(
            len(models) + 2,
            partial(own, models, base=base, weights=WEIGHTS, **given),
            "mergekit",
            partial(peers.with_mergekit, theirs, base, models, **_for_mergekit(given)),
            base,
        )

    return build


def beside_peft(own: Merge, theirs: str, **given: object) -> Callable[[Setting], Comparison]:
    """Of adapters' tensors, which are differences: there is no base."""

    def build(setting: Setting) -> Comparison:
        _, models = _models(setting.part(32))
        return _comparison(
            len(models) + 1,
            partial(own, models, weights=WEIGHTS, semantics="peft", **given),
            "peft",
            partial(peers.with_peft, theirs, models, WEIGHTS, *given.values()),
            models[0],
        )

    return build


def _for_mergekit(given: dict[str, object]) -> dict[str, Any]:
    return {"weight": WEIGHTS} | {name: [value] * len(WEIGHTS) for name, value in given.items()}


def _comparison(
    tensors: int, own: Run, package: str, theirs: Run, like: Mapping[str, Tensor]
) -> Comparison:
    """``tensors`` are read and written for each one that is merged."""
    values = list(like.values())
    comparison = Comparison(
        numels(values), {OURS: Line(own, tensors * values[0].itemsize)}, {package: theirs}
    )
    if find_spec(package) is None:
        del comparison.peers[package]
        comparison.skipped[package] = "it is not installed"
    return comparison


def _models(setting: Setting) -> tuple[peers.State, list[peers.State]]:
    """A base of square matrices and biases, and three models that were trained from it."""
    width = max(8, int((setting.numel / MATRICES) ** 0.5))
    shapes: dict[str, tuple[int, ...]]
    shapes = {f"{i}.weight": (width, width) for i in range(MATRICES)}
    shapes |= {f"{i}.bias": (width,) for i in range(MATRICES)}

    def state(scale: float, seed: int) -> peers.State:
        return {
            name: random_values(setting, *shape, scale=scale, seed=100 * seed + i)
            for i, (name, shape) in enumerate(shapes.items())
        }

    base = state(0.02, 0)
    deltas = [state(DELTA_SCALE, 1 + m) for m in range(len(WEIGHTS))]
    return base, [{name: base[name] + delta[name] for name in base} for delta in deltas]


BUILD = {
    "linear": beside_mergekit(merge.linear, "task_arithmetic"),
    "dare": beside_mergekit(merge.dare, "dare_linear", density=DENSITY),
    "dare-ties": beside_mergekit(merge.dare_ties, "dare_ties", density=DENSITY),
    "ties": beside_mergekit(merge.ties, "ties", density=DENSITY),
    "ties-peft": beside_peft(merge.ties, "ties", density=DENSITY),
}
