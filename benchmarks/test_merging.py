"""OnDARE and OnTIES over 2^24 parameters beside what users run instead. Run: ``make bench``.

The peers are the operations of the published optimizers, each parameter by itself in eager torch,
and torch's fused AdamW. Each round follows a round of the peer; the ratio is that of the medians.
Nothing is asserted.
"""

import statistics
import time

import pytest
import torch
import torch.nn.functional as F

import zokern

NUMEL = 1 << 24
ROUNDS = 7
P, ALPHA, LR = 0.01, 1e-7, 1e-6
BETA1, BETA2, EPS = 0.9, 0.999, 1e-6

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


class Eager:
    """The steps of the published optimizers, as they are written there."""

    def __init__(self, param: torch.Tensor, tau: torch.Tensor) -> None:
        self.param, self.tau = param.detach().clone(), tau
        self.first, self.second = torch.zeros_like(param), torch.zeros_like(param)

    def delta(self, grad: torch.Tensor) -> torch.Tensor:
        self.first.mul_(BETA1).add_(grad, alpha=1 - BETA1)
        self.second.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
        return (self.first / self.second.sqrt().add_(EPS)) * -LR

    def dare(self, grad: torch.Tensor) -> None:
        delta = self.delta(grad)
        delta.abs().sum()
        F.dropout(delta, p=1 - P, training=True, inplace=True)
        delta.abs().sum()
        self.param.add_(self.tau, alpha=ALPHA)
        self.param.add_(delta, alpha=1 - ALPHA)

    def ties(self, grad: torch.Tensor) -> None:
        delta = self.delta(grad)
        kept = torch.argsort(delta.view(-1).abs(), descending=True)[: int(P * delta.numel())]
        mask = torch.zeros_like(delta)
        mask.view(-1)[kept] = 1
        delta.abs().sum()
        delta.mul_(mask)
        delta.abs().sum()
        deltas = torch.stack([self.tau, delta])
        weights = torch.tensor([[ALPHA], [1 - ALPHA]], dtype=deltas.dtype)
        sign = (deltas.sum(dim=0) >= 0) * 2 - 1
        deltas.mul_(deltas.sign() == sign)
        self.param.add_((deltas * weights).sum(dim=0))


def tensors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A parameter, its gradient and the difference of the reference."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        (scale * torch.randn(NUMEL, generator=generator)).to(dtype) for scale in (0.02, 1e-5, 1e-3)
    )


def optimizer(cls, dtype: torch.dtype):
    value, grad, tau = tensors(dtype)
    param = torch.nn.Parameter(value)
    param.grad = grad
    # The value that is kept is the parameter alone, as the peers keep it.
    opt = cls(
        [("p", param)],
        lr=LR,
        reserve_p=P,
        alpha=ALPHA,
        use_merge=True,
        precision="inplace",
        reference={"p": tau},
        base={"p": torch.zeros_like(tau)},
        seed=0,
    )
    return opt, Eager(value, zokern.merging.dense_tau(opt._tau(param), tau.shape)), grad


def beside(benchmark, capsys, name: str, peer, step) -> None:
    seconds = []

    def run_peer():
        start = time.perf_counter()
        peer()
        seconds.append(time.perf_counter() - start)

    benchmark.pedantic(step, setup=run_peer, rounds=ROUNDS, warmup_rounds=2)
    theirs, ours = statistics.median(seconds[2:]), benchmark.stats.stats.median
    benchmark.extra_info |= {"peer": name, "peer_median_s": theirs}
    with capsys.disabled():
        print(
            f"\n{benchmark.name}: {ours * 1e3:.1f} ms; {name}: {theirs * 1e3:.1f} ms; "
            f"{theirs / ours:.2f} times as fast"
        )


@dtypes
@pytest.mark.parametrize("method", ["dare", "ties"])
def test_against_the_published_optimizers(benchmark, capsys, dtype, method):
    cls = zokern.OnDAREAdamW if method == "dare" else zokern.OnTIESAdamW
    opt, eager, grad = optimizer(cls, dtype)
    peer = getattr(eager, method)
    beside(benchmark, capsys, "eager operations", lambda: peer(grad), opt.step)


@dtypes
@pytest.mark.parametrize("method", ["dare", "ties"])
def test_against_fused_adamw(benchmark, capsys, dtype, method):
    cls = zokern.OnDAREAdamW if method == "dare" else zokern.OnTIESAdamW
    opt, _, grad = optimizer(cls, dtype)
    param = torch.nn.Parameter(tensors(dtype)[0])
    param.grad = grad
    adamw = torch.optim.AdamW([param], lr=LR, fused=True)
    beside(benchmark, capsys, "torch's fused AdamW", adamw.step, opt.step)
