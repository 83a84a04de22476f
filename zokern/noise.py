"""The noise contract: one noise for every backend, device, sharding and grouping.

A weight's noise depends on the run's seed, the draw, the parameter's name and the element's index
in the full tensor, and on nothing else. It is Philox4x32-10 (Salmon et al., SC'11) under one of
these laws:

============== =============================================================================
``gauss16``    moment-matched Gaussian from 16 bits: mean 0, variance 1 to 6e-8, fourth and
               sixth moments those of N(0, 1) to 1e-6, \\|z\\| ≤ 4.324, Kolmogorov-Smirnov
               distance to N(0, 1) 2.0e-4. The default
``gauss32``    the same from 32 bits: \\|z\\| ≤ 5.106, distance 5.3e-5
``normal``     N(0, 1) by Box-Muller, within 4 ulp of the exact transform, \\|z\\| ≤ 6.661
``rademacher`` +1 or -1
``uniform32``  words of 32 bits: a Bernoulli(p) mask keeps an element iff word < ⌊p·2^32⌋
``rounding16`` 16 bits for stochastic rounding
============== =============================================================================

The moment-matched directions are i.i.d., symmetric and bounded; Stein's identity holds for them
only approximately. Take ``normal`` where the tails matter.
"""

import torch
from torch import Tensor

from zokern import ops
from zokern.laws import LAWS, canonical_name, tensor_id

__all__ = ["LAWS", "canonical_name", "sample", "tensor_id"]


def sample(
    law: str,
    numel: int,
    *,
    seed: int,
    draw: int,
    tensor_id: int = 0,
    offset: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Elements ``offset`` … ``offset + numel - 1`` of a tensor's noise.

    Args:
        law: one of :data:`LAWS`.
        numel: how many elements.
        seed: of the run, 0 ≤ seed < 2^64.
        draw: which direction of the run, 0 ≤ draw < 2^32.
        tensor_id: 0 ≤ id < 2^56; :func:`tensor_id` makes one from a name.
        offset: the first element's row-major index in the full tensor. A law whose groups give n
            elements counts n·2^32 elements.
        device: where the result lies.

    Returns:
        A tensor of shape (numel,): float32 for gauss16, gauss32, rademacher and normal; int64 for
        uniform32 (0 … 2^32 - 1) and rounding16 (0 … 2^16 - 1).

    Raises:
        ValueError: for an unknown law or an argument out of range.
    """
    return ops.noise_sample(
        law, numel, seed=seed, draw=draw, tensor_id=tensor_id, offset=offset, device=device
    )
