"""Sweeps: one direction and several, each storage, each way of rounding, inner products."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from zokern import ops
from zokern.bench.comparison import OURS, Comparison, Line, Run, Setting, random_values, weights

EPS = 1e-3
NORMAL_AND_ADD = "torch.normal and add_"


def normal_like(tensor: Tensor, seed: int) -> Tensor:
    """Noise as users draw it."""
    torch.manual_seed(seed)
    return torch.normal(0.0, 1.0, tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _sweep(param: Tensor, directions: int = 1, **arguments) -> Run:
    """A sweep along new directions at each call."""
    draws = itertools.count(step=directions)

    def run() -> None:
        first = next(draws)
        ops.perturb_(
            [param], range(first, first + directions), [EPS] * directions, seed=0, **arguments
        )

    return run


def in_place(directions: int, **arguments) -> Callable[[Setting], Comparison]:
    def build(setting: Setting) -> Comparison:
        own, theirs = weights(setting), weights(setting)

        def passes() -> None:
            for seed in range(directions):
                theirs.add_(normal_like(theirs, seed), alpha=EPS)

        return Comparison(
            setting.numel,
            {OURS: Line(_sweep(own, directions, **arguments), 2 * own.itemsize)},
            {NORMAL_AND_ADD: passes},
        )

    return build


def out_of_place(setting: Setting) -> Comparison:
    param = weights(setting)
    out, other = torch.empty_like(param), torch.empty_like(param)

    def eager() -> None:
        torch.add(param, normal_like(param, 0), alpha=EPS, out=other)

    return Comparison(
        setting.numel,
        {OURS: Line(_sweep(param, outs=[out]), 2 * param.itemsize)},
        {"torch.normal and add": eager},
    )


def residual(dtype: torch.dtype) -> Callable[[Setting], Comparison]:
    """Low bits beside bfloat16; what users keep instead is a master."""

    def build(setting: Setting) -> Comparison:
        param = weights(setting)
        low = torch.zeros_like(param, dtype=dtype)
        floor = 2 * (param.itemsize + low.itemsize)
        return Comparison(
            setting.numel,
            {OURS: Line(_sweep(param, residuals=[low]), floor)},
            {MASTER_PEER: _eager_master(setting)},
        )

    return build


def master(setting: Setting) -> Comparison:
    """An evaluation: the master is read, the working copy written."""
    param = weights(setting)
    floor = 4 + param.itemsize
    values = param.float()
    return Comparison(
        setting.numel,
        {OURS: Line(_sweep(param, masters=[values], rest=0), floor)},
        {MASTER_PEER: _eager_master(setting)},
    )


MASTER_PEER = "add_ to a float32 master, copy_"


def _eager_master(setting: Setting) -> Run:
    values = random_values(setting, setting.numel, dtype=torch.float32)
    param = values.to(setting.dtype)

    def eager() -> None:
        values.add_(normal_like(values, 0), alpha=EPS)
        param.copy_(values)

    return eager


def stochastic_rounding(setting: Setting) -> Comparison:
    own, theirs = weights(setting), weights(setting)
    draws = itertools.count()

    def sweep() -> None:
        draw = next(draws)
        ops.perturb_([own], [draw], [EPS], seed=0, rounding=draw)

    def eager() -> None:
        moved = theirs.float().add_(normal_like(theirs, 0), alpha=EPS)
        bits = moved.view(torch.int32)
        bits.add_(torch.randint_like(bits, 1 << 16)).bitwise_and_(-1 << 16)
        theirs.copy_(moved)

    return Comparison(
        setting.numel,
        {OURS: Line(sweep, 2 * own.itemsize)},
        {"eager, bits from randint_like": eager},
    )


def inner_products(setting: Setting) -> Comparison:
    """ZOPrO's reduction: v·v, v·z and z·z."""
    vector = weights(setting)
    draws = itertools.count()

    def eager() -> Tensor:
        z = normal_like(vector, 0)
        return torch.stack([torch.dot(vector, vector), torch.dot(vector, z), torch.dot(z, z)])

    return Comparison(
        setting.numel,
        {OURS: Line(lambda: ops.inner_products([vector], next(draws), seed=0), vector.itemsize)},
        {"torch.normal and dot": eager},
    )


def selection(setting: Setting) -> Comparison:
    """The threshold of the largest tenth."""
    setting = setting.part(4)
    values = weights(setting)
    k = max(1, setting.numel // 10)
    return Comparison(
        setting.numel,
        {OURS: Line(lambda: ops.magnitude_threshold([values], k), values.itemsize)},
        {
            "topk": lambda: torch.topk(values.abs(), k, sorted=False),
            "kthvalue": lambda: torch.kthvalue(values.abs(), setting.numel - k + 1),
            "sort": lambda: torch.sort(values.abs()),
        },
    )
