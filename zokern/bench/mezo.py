"""The optimizer's part of a MeZO step: on one tensor, and on the tensors of a real model."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import zokern
from zokern.bench import models, peers
from zokern.bench.comparison import OURS, Comparison, Line, Run, Setting, numels, random_values
from zokern.bench.machine import available_memory

FUSED = "fuse_next"
EAGER_LOOP, FOREACH, COMPILED = "eager loop", "foreach", "torch.compile"
# What a list of tensors may take of the memory that is free: two of zokern's, the peers', the noise
# of foreach, and both ends of a copy, with some room.
SHARE = 1 / 7


def on_one_tensor(setting: Setting) -> Comparison:
    comparison = _steps(setting, [(setting.numel,)])
    # One tensor is no list.
    del comparison.peers[FOREACH]
    return comparison


def on_a_model(setting: Setting) -> Comparison:
    """The tensors of the setting's model, fewer layers of it where memory is short."""
    room = SHARE * available_memory(setting.device) / setting.dtype.itemsize
    layers = models.layers_that_fit(setting.model, room)
    comparison = _steps(setting, list(models.shapes(setting.model, layers).values()))
    # A compiler unrolls the loop over hundreds of tensors.
    del comparison.peers[COMPILED]
    comparison.note = f"{setting.model}, {layers} of {models.layers_of(setting.model)} layers"
    return comparison


def _steps(setting: Setting, shapes: Sequence[Sequence[int]]) -> Comparison:
    def params() -> list[torch.nn.Parameter]:
        values = (random_values(setting, *shape, seed=i) for i, shape in enumerate(shapes))
        return [torch.nn.Parameter(value) for value in values]

    own, fused, theirs = params(), params(), params()
    sweep = 2 * setting.dtype.itemsize
    return Comparison(
        numels(own),
        {
            OURS: Line(_own_step(own), 3 * sweep),
            FUSED: Line(_own_step(fused, fuse_next=True), 2 * sweep),
        },
        {
            name: _peer_step(make(theirs))
            for name, make in (
                (EAGER_LOOP, peers.eager_loop),
                (FOREACH, peers.foreach),
                (COMPILED, peers.compiled_loop),
            )
        },
    )


def _own_step(params: list[torch.nn.Parameter], **arguments) -> Run:
    optimizer = zokern.MeZO(
        [(f"p{i}", param) for i, param in enumerate(params)],
        lr=peers.LR, eps=peers.EPS, seed=0, precision="inplace", stochastic_rounding=False,
        **arguments,
    )  # fmt: skip
    loss = _losses()
    return lambda: optimizer.step(loss)


def _peer_step(move: peers.Move) -> Run:
    loss = _losses()

    @torch.no_grad()
    def step() -> None:
        peers.mezo_step(move, loss)

    return step


def _losses() -> Callable[[], float | Tensor]:
    """Of a model that takes no time."""
    values = itertools.cycle([1.0, 1.01])
    return lambda: next(values)
