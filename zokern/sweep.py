"""What one sweep over a list of tensors does: the words in which ops speak to a backend."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """Where a tensor's elements lie in the full tensor whose noise they get.

    Local element (r, k), row-major over rows of ``row_length``, is element
    ``offset + r·row_stride + k`` of the full tensor.
    """

    offset: int
    row_length: int
    row_stride: int


@dataclass(frozen=True)
class Sweep:
    """θ ← Σ over directions, in order: θ ← s_k·θ, then θ ← fma(c_k, z_k, θ); rounded once.

    All tensors are on one device and have passed the checks of :mod:`zokern.ops`. Coefficients and
    scales are float32 values; each tensor has a row of them, and rows may be one shared object.
    """

    params: list[Tensor]
    residuals: list[Tensor | None]
    shards: list[Shard]
    tensor_ids: list[int]
    draws: list[int]
    coeffs: Sequence[Sequence[float]]
    scales: Sequence[Sequence[float]]
    seed: int
    law: str


@contextmanager
def row_major(sweep: Sweep) -> Iterator[Sweep]:
    """The sweep over operands that are contiguous, for kernels that take no others.

    Elements are numbered in logical row-major order in every memory format, so an operand in
    another dense format (channels_last, permuted) is copied, swept and copied back at the end.
    """
    copies: list[tuple[Tensor, Tensor]] = []

    def contiguous(tensor: Tensor) -> Tensor:
        if tensor.is_contiguous():
            return tensor
        copy = tensor.contiguous()
        copies.append((tensor, copy))
        return copy

    params = [contiguous(param) for param in sweep.params]
    residuals = [None if residual is None else contiguous(residual) for residual in sweep.residuals]
    yield replace(sweep, params=params, residuals=residuals)
    for tensor, copy in copies:
        tensor.copy_(copy)
