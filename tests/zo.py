"""What the tests of zeroth-order optimizers share: small models, counters, dense formulas."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import zokern

X = torch.randn(64, 10, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 4, (64,), generator=torch.Generator().manual_seed(2))


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 4))
    return model.to(dtype)


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    dtype = next(model.parameters()).dtype
    return lambda: F.cross_entropy(model(X.to(dtype)).float(), Y)


def vectors(model: nn.Module, seed: int = 7) -> dict[str, dict[str, Tensor]]:
    """ZOPrO's arguments."""
    generator = torch.Generator().manual_seed(seed)

    def like(param: Tensor) -> Tensor:
        return torch.randn(param.shape, generator=generator)

    names = [name for name, _ in model.named_parameters()]
    params = dict(model.named_parameters())
    return {
        "previous_update": {name: like(params[name]) for name in names},
        "reward_delta": {name: like(params[name]) for name in names},
    }


@dataclass(frozen=True)
class Method:
    cls: type[zokern.ZOOptimizer]
    arguments: dict
    evaluations: int
    # Sweeps of a step; with fuse_next, None where a method cannot take it.
    sweeps: int
    fused_sweeps: int | None

    def make(self, model: nn.Module, **arguments) -> zokern.ZOOptimizer:
        own = dict(self.arguments)
        if self.cls is zokern.ZOPrO:
            own |= {"total_steps": 50, **vectors(model)}
        defaults = {"lr": 0.01, "seed": 3}
        params = arguments.pop("params", None) or model.named_parameters()
        return self.cls(params, **{**defaults, **own, **arguments})


METHODS = {
    "mezo": Method(zokern.MeZO, {}, 2, 3, 2),
    "mezo, 3 samples": Method(zokern.MeZO, {"samples": 3}, 6, 7, 6),
    "gv": Method(zokern.MeZOGV, {"candidates": 4}, 6, 7, 6),
    "gv, no history": Method(zokern.MeZOGV, {"candidates": 3, "history": False}, 5, 6, 5),
    "gv, 2 samples": Method(zokern.MeZOGV, {"samples": 2}, 8, 9, 8),
    "greedy": Method(zokern.MeZOGreedy, {"candidates": 3}, 4, 5, 4),
    "fzoo": Method(zokern.FZOO, {"lr": 1e-4}, 9, 9, 9),
    "zopro": Method(zokern.ZOPrO, {}, 2, 3, 2),
    "zopro, exp": Method(zokern.ZOPrO, {"decay": "exp", "samples": 2}, 4, 5, 4),
    "conmezo": Method(zokern.ConMeZO, {}, 2, 3, None),
    "momentum": Method(zokern.MeZO, {"momentum": 0.9, "lr": 1e-3}, 2, 3, 2),
    "sign": Method(zokern.MeZO, {"sign": True, "lr": 1e-4}, 2, 3, 2),
    "gv, signed momentum": Method(
        zokern.MeZOGV, {"momentum": 0.5, "sign": True, "lr": 1e-4}, 4, 5, 4
    ),
}


class CountOps(TorchDispatchMode):
    """Counts the calls of zokern's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.sweeps = 0
        self.reductions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.sweeps += func is torch.ops.zokern.perturb_.default
        self.reductions += func is torch.ops.zokern.inner_products.default
        return func(*args, **(kwargs or {}))


def weights(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@contextmanager
def watched(closure: Callable[[], Tensor]) -> Iterator[tuple[Callable, list[float]]]:
    """A closure that keeps the losses it returned."""
    seen: list[float] = []

    def watching() -> Tensor:
        loss = closure()
        seen.append(float(loss))
        return loss

    yield watching, seen
