"""Noise as tensors."""

import torch
from torch import Tensor

from zokern import backends
from zokern.arguments import integer, signed, unsigned
from zokern.checks import check_elements
from zokern.laws import LAWS

torch.library.define(
    "zokern::noise_sample",
    "(str law, int numel, int seed, int draw, int tensor_id, int offset, Device device) -> Tensor",
)


def noise_sample(
    law: str,
    numel: int,
    *,
    seed: int,
    draw: int,
    tensor_id: int,
    offset: int,
    device: torch.device | str,
) -> Tensor:
    """See :func:`zokern.noise.sample`."""
    _check_sample(law, numel, offset)
    return torch.ops.zokern.noise_sample(
        law,
        numel,
        signed(integer("seed", seed, bits=64)),
        integer("draw", draw, bits=32),
        integer("tensor_id", tensor_id, bits=56),
        offset,
        torch.device(device),
    )


@torch.library.impl("zokern::noise_sample", "CompositeExplicitAutograd")
def _noise_sample_kernel(
    law: str, numel: int, seed: int, draw: int, tensor_id: int, offset: int, device: torch.device
) -> Tensor:
    _check_sample(law, numel, offset)
    return backends.select(device).sample(
        law,
        numel,
        seed=unsigned(seed),
        draw=integer("draw", draw, bits=32),
        tensor_id=integer("tensor_id", tensor_id, bits=56),
        offset=offset,
        device=device,
    )


@torch.library.register_fake("zokern::noise_sample")
def _noise_sample_fake(law, numel, seed, draw, tensor_id, offset, device) -> Tensor:
    _check_sample(law, numel, offset)
    return torch.empty(numel, dtype=LAWS[law].dtype, device=device)


def _check_sample(law: str, numel: int, offset: int) -> None:
    if law not in LAWS:
        raise ValueError(f"unknown law {law!r}; there are {', '.join(LAWS)}")
    integer("numel", numel, bits=63)
    integer("offset", offset, bits=63)
    try:
        check_elements(offset + numel, law)
    except ValueError as error:
        raise ValueError(f"the range [{offset}, {offset + numel}): {error}") from None
