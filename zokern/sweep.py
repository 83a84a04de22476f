"""What one sweep over a list of tensors does: the words in which ops speak to a backend."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from zokern.row_major import RowMajor


class Shard(NamedTuple):
    """Where a tensor's elements lie in the full tensor whose noise they get.

    Local element (r, k), row-major over rows of ``row_length``, is element
    ``offset + r·row_stride + k`` of the full tensor; ``offset + rows[r]·row_stride + k`` where
    somebody picked ``rows``.
    """

    offset: int
    row_length: int
    row_stride: int


@dataclass(frozen=True)
class Update:
    """How a sweep moves the place of rest by an estimated gradient Σ gradient[k]·z_k.

    u = decay·momentum + Σ over the directions before rest, in order, by fma; momentum = u; then
    θ = fma(step, u, θ), or the sign of u instead of u. Without momentum u begins at 0.

    Attributes:
        gradient: for each tensor a row of numbers, one for each direction; those of the directions
            after rest are not looked at.
        decays: for each tensor.
        steps: for each tensor.
        momenta: float32, shaped like the tensors.
        sign: step by +1, 0 or -1 instead of u.
    """

    gradient: Sequence[Sequence[float]]
    decays: Sequence[float]
    steps: Sequence[float]
    momenta: list[Tensor] | None = None
    sign: bool = False


@dataclass(frozen=True)
class Sweep:
    """θ ← Σ over directions, in order: θ ← s_k·θ, then θ ← fma(c_k, z_k, θ); rounded once.

    A direction z_k is the noise of a draw or, where ``draws[k]`` is negative, the dense tensor
    ``dense[~draws[k]]``. After the first ``rest`` directions the value is the new place of rest:
    there the update is added and the master, where there is one, is written. θ is read from the
    master, else from the parameter and its residual, and written to the parameter at the end; with
    ``outs`` it is written there, rounded to their dtype, and what it is read from stays as it is.
    It is rounded to nearest or, where ``rounding`` is a draw of rounding16, stochastically by that.

    All tensors are on one device and have passed the checks of :mod:`zokern.ops`. Coefficients and
    scales are float32 values; each tensor has a row of them, and rows may be one shared object.
    """

    params: list[Tensor]
    residuals: list[Tensor | None]
    masters: list[Tensor] | None
    outs: list[Tensor] | None
    dense: list[list[Tensor]]
    shards: list[Shard]
    rows: list[Tensor | None]
    tensor_ids: list[int]
    draws: list[int]
    coeffs: Sequence[Sequence[float]]
    scales: Sequence[Sequence[float]]
    rest: int
    update: Update | None
    rounding: int | None
    seed: int
    law: str
    # What a backend has made of the tensors, kept for the next sweep over the same ones; None where
    # nobody says that there will be one.
    kept: dict[str, Any] | None = None

    @property
    def is_packed(self) -> bool:
        """Whether a backend has made something of all its tensors, which are contiguous then."""
        return bool(self.kept) and (self.update is None or self.update.momenta is None)

    @property
    def is_plain(self) -> bool:
        """Whether it only moves parameters along noise, and rounds them to nearest."""
        moves = self.masters is None and self.update is None and not self.dense
        return moves and self.rounding is None

    def written(self) -> Iterator[tuple[str, int, Tensor]]:
        """The operands that it writes: argument, position, tensor."""
        if self.outs is not None:
            yield from _present(outs=self.outs)
            return
        momenta = None if self.update is None else self.update.momenta
        yield from _present(
            params=self.params,
            residuals=self.residuals,
            masters=self.masters or [],
            momenta=momenta or [],
        )

    def operands(self) -> Iterator[tuple[str, int, Tensor]]:
        yield from self.written()
        yield from self.read()

    def read(self) -> Iterator[tuple[str, int, Tensor]]:
        """Those that it reads and leaves as they are."""
        if self.outs is not None:
            yield from _present(params=self.params, residuals=self.residuals)
        yield from _present(rows=self.rows)
        yield from _present(**{f"dense[{j}]": vectors for j, vectors in enumerate(self.dense)})


def _present(**operands: Sequence[Tensor | None]) -> Iterator[tuple[str, int, Tensor]]:
    for name, tensors in operands.items():
        for i, tensor in enumerate(tensors):
            if tensor is not None:
                yield name, i, tensor


@dataclass(frozen=True)
class InnerProducts:
    """For each tensor v the sums v·v, v·z and z·z, z being the noise of one draw.

    All tensors are on one device and have passed the checks of :mod:`zokern.ops`.
    """

    vectors: list[Tensor]
    shards: list[Shard]
    tensor_ids: list[int]
    draw: int
    seed: int
    law: str


@contextmanager
def row_major(sweep: Sweep) -> Iterator[Sweep]:
    """The sweep over operands that are contiguous; those that it writes are written back."""
    update = sweep.update
    contiguous = RowMajor()
    if update is not None and update.momenta is not None:
        update = replace(update, momenta=[contiguous(momentum) for momentum in update.momenta])
    yield replace(
        sweep,
        params=[contiguous(param) for param in sweep.params],
        residuals=[None if r is None else contiguous(r) for r in sweep.residuals],
        masters=None if sweep.masters is None else [contiguous(m) for m in sweep.masters],
        dense=[[contiguous(vector) for vector in vectors] for vectors in sweep.dense],
        update=update,
        kept=None if contiguous.has_copied else sweep.kept,
    )
    contiguous.write_back(tensor for _, _, tensor in sweep.written())
