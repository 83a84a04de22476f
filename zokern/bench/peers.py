"""What users run instead of zokern's optimizers, as it is written where they take it from."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

EPS, LR = 1e-3, 1e-6

# Moves every parameter by a coefficient times the noise of the seed.
Move = Callable[[int, float], None]


def eager_loop(params: Sequence[Tensor]) -> Move:
    """The loop of MeZO's published code."""

    def move(seed: int, coefficient: float) -> None:
        torch.manual_seed(seed)
        for param in params:
            z = torch.normal(
                mean=0, std=1, size=param.data.size(), device=param.data.device,
                dtype=param.data.dtype,
            )  # fmt: skip
            param.data = param.data + coefficient / EPS * z * EPS

    return move


def foreach(params: Sequence[Tensor]) -> Move:
    """All tensors in one operation; their noise is made one by one."""

    def move(seed: int, coefficient: float) -> None:
        torch.manual_seed(seed)
        noise = [
            torch.normal(0.0, 1.0, param.shape, device=param.device, dtype=param.dtype)
            for param in params
        ]
        torch._foreach_add_(list(params), noise, alpha=coefficient)

    return move


def compiled_loop(params: Sequence[Tensor]) -> Move:
    """The loop under torch.compile, which makes the noise where it is added."""

    @torch.compile
    def loop(coefficient: Tensor) -> None:
        for param in params:
            param.add_(torch.randn_like(param) * coefficient)

    def move(seed: int, coefficient: float) -> None:
        torch.manual_seed(seed)
        loop(torch.tensor(coefficient, dtype=params[0].dtype, device=params[0].device))

    return move


def mezo_step(move: Move, loss: Callable[[], float | Tensor], seed: int = 0) -> None:
    """Two evaluations and the four passes over the weights around them."""
    move(seed, EPS)
    above = float(loss())
    move(seed, -2 * EPS)
    below = float(loss())
    move(seed, EPS)
    move(seed, -LR * (above - below) / (2 * EPS))


class OnlineMerging:
    """The steps of the published OnDARE and OnTIES for one parameter, bias corrections left out.

    Args:
        tau: the reference less its base, thinned out.
        p: which part of an update is kept.
    """

    def __init__(
        self, param: Tensor, tau: Tensor, *, p: float, alpha: float, lr: float = LR
    ) -> None:
        self.param, self.tau = param.detach().clone(), tau
        self.p, self.alpha, self.lr = p, alpha, lr
        self.first, self.second = torch.zeros_like(param), torch.zeros_like(param)

    def delta(self, grad: Tensor) -> Tensor:
        self.first.mul_(0.9).add_(grad, alpha=0.1)
        self.second.mul_(0.999).addcmul_(grad, grad, value=0.001)
        return (self.first / self.second.sqrt().add_(1e-6)) * -self.lr

    def dare(self, grad: Tensor) -> None:
        delta = self.delta(grad)
        delta.abs().sum()
        F.dropout(delta, p=1 - self.p, training=True, inplace=True)
        delta.abs().sum()
        self.param.add_(self.tau, alpha=self.alpha)
        self.param.add_(delta, alpha=1 - self.alpha)

    def ties(self, grad: Tensor) -> None:
        delta = self.delta(grad)
        kept = torch.argsort(delta.view(-1).abs(), descending=True)[: int(self.p * delta.numel())]
        mask = torch.zeros_like(delta)
        mask.view(-1)[kept] = 1
        delta.abs().sum()
        delta.mul_(mask)
        delta.abs().sum()
        deltas = torch.stack([self.tau, delta])
        weights = torch.tensor(
            [[self.alpha], [1 - self.alpha]], dtype=deltas.dtype, device=deltas.device
        )
        sign = (deltas.sum(dim=0) >= 0) * 2 - 1
        deltas.mul_(deltas.sign() == sign)
        self.param.add_((deltas * weights).sum(dim=0))


State = dict[str, Tensor]


def with_mergekit(method: str, base: State | None, models: list[State], **parameters) -> State:
    """By the method that mergekit has under that name; parameters in its words.

    Raises:
        ImportError: without mergekit.
    """
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import TensorBatch, TensorGroup

    merge = registry.get(method)
    weights = parameters.pop("weight")
    if base is None:
        result = {}
        for name in models[0]:
            batch = TensorBatch([model[name][None] for model in models])
            weight = torch.tensor([weights])
            result[name] = merge.merge_batch(batch, weight=weight, **parameters)[0]
        return result
    given = {spec.name: spec.default for spec in merge.spec.parameters} | parameters
    ids = range(1, len(models) + 1)
    given["weight"] = dict(zip(ids, weights, strict=True))
    if "density" in parameters:
        given["density"] = dict(zip(ids, parameters["density"], strict=True))
    result = {}
    for name in base:
        tensors = [base[name], *(model[name] for model in models)]
        result[name] = merge.merge_group(TensorGroup.from_tensors(tensors, base_index=0), **given)
    return result


def with_peft(method: str, models: list[State], weights: list[float], *arguments) -> State:
    """By peft's function of that name, of models that are deltas themselves.

    Raises:
        ImportError: without peft.
    """
    from peft.utils import merge_utils

    function = getattr(merge_utils, method)
    result = {}
    for name, like in models[0].items():
        weight = torch.tensor(weights, device=like.device)
        result[name] = function([model[name] for model in models], weight, *arguments)
    return result
