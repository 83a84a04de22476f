"""Whole MeZO steps of a model with random weights: what the forward passes leave for the rest."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import zokern
from zokern.bench import models, peers
from zokern.bench.comparison import DTYPE_NAMES, Comparison, Line, Run, Setting, numels
from zokern.bench.machine import available_memory
from zokern.bench.mezo import EAGER_LOOP

FORWARD, IN_PLACE, LAYERWISE = "two forward passes", "in place", "layerwise"
# What the weights may take of the memory that is free; the rest is for activations.
SHARE = 1 / 3
MOST_IN_A_ROW = 2048


def layers(setting: Setting) -> int:
    """Of the setting's model, those that there is memory for."""
    room = SHARE * available_memory(setting.device) / setting.dtype.itemsize
    return models.layers_that_fit(setting.model, room)


def steps(setting: Setting, layers: int) -> Comparison:
    model = models.build(setting.model, layers, setting.device, setting.dtype)
    loss = evaluation(model, setting.tokens)
    params = list(model.parameters())
    move, stored = peers.eager_loop(params), [param.data for param in params]

    @torch.no_grad()
    def forward() -> None:
        loss()
        loss()

    @torch.no_grad()
    def eager() -> None:
        peers.mezo_step(move, loss)
        # It gives the parameters other memory, which the optimizers would take for another model's.
        for param, own in zip(params, stored, strict=True):
            param.data = own

    return Comparison(
        numels(params),
        {name: Line(step(model, loss, name), 0) for name in (IN_PLACE, LAYERWISE)},
        {FORWARD: forward, EAGER_LOOP: eager},
        note=f"{setting.model}, {layers} of {models.layers_of(setting.model)} layers, "
        f"{DTYPE_NAMES[setting.dtype]}, {setting.tokens} tokens",
    )


def evaluation(model: Any, tokens: int) -> Callable[[], Tensor]:
    """The loss of random tokens."""
    row = min(tokens, MOST_IN_A_ROW, model.config.max_position_embeddings)
    device = next(model.parameters()).device
    batch = torch.randint(model.config.vocab_size, (-(-tokens // row), row), device=device)
    return lambda: model(input_ids=batch, labels=batch).loss.float()


def step(model: nn.Module, loss: Callable[[], Tensor], how: str) -> Run:
    optimizer = zokern.MeZO(
        model.named_parameters(), lr=peers.LR, eps=peers.EPS, seed=0, precision="inplace",
        module=model, layerwise=how == LAYERWISE, stochastic_rounding=False,
    )  # fmt: skip
    return lambda: optimizer.step(loss)
