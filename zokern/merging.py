"""What the merging optimizers' operations do: the words in which ops speak to a backend."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from zokern.row_major import RowMajor
from zokern.sweep import Shard


class AdamNumbers(NamedTuple):
    """A tensor's row in the float32 table of numbers.

    Attributes:
        sign: -1 to maximize, else 1.
        beta1, one_minus_beta1, beta2, one_minus_beta2, eps: Adam's.
        step: lr, corrected for the moments' bias.
        decay: lr times weight decay; 0 for none.
        alpha, weight: the weights of τ and of Δ in what is added to the parameter.
        scale: what the elements of Δ that the mask keeps are multiplied with.
        ratio: then with this, to bring Δ back to its L1 norm.
        clip: then they are clamped to ±clip; infinite for none.
    """

    sign: float = 1.0
    beta1: float = 0.9
    one_minus_beta1: float = 0.1
    beta2: float = 0.999
    one_minus_beta2: float = 0.001
    eps: float = 1e-6
    step: float = 1e-3
    decay: float = 0.0
    alpha: float = 0.0
    weight: float = 1.0
    scale: float = 1.0
    ratio: float = 1.0
    clip: float = float("inf")


class SparseTau(NamedTuple):
    """τ where few of its elements are not 0: those, in row-major order.

    Attributes:
        starts: int64, for each 2^16 elements of the tensor where theirs begin, then how many
            there are in all.
        places: int16, the element's place within its 2^16, as the bits of a uint16.
        values: float32, bfloat16 or float16.
    """

    starts: Tensor
    places: Tensor
    values: Tensor


BUCKET = 1 << 16


def sparse_tau(tau: Tensor) -> SparseTau:
    """The elements of a dense τ that are not 0."""
    flat = tau.flatten()
    places = flat.nonzero().flatten()
    buckets = torch.arange(0, flat.numel() + BUCKET, BUCKET, device=tau.device)
    starts = torch.searchsorted(places, buckets)
    return SparseTau(starts, (places % BUCKET).to(torch.uint16).view(torch.int16), flat[places])


def dense_tau(tau: Tensor | SparseTau, shape: torch.Size) -> Tensor:
    """τ as a tensor of its parameter's shape."""
    if isinstance(tau, Tensor):
        return tau
    buckets = torch.arange(len(tau.starts) - 1, device=tau.starts.device)
    first = buckets.repeat_interleave(tau.starts.diff()) * BUCKET
    flat = tau.values.new_zeros(shape.numel())
    flat[first + (tau.places.long() & 0xFFFF)] = tau.values
    return flat.view(shape)


@dataclass(frozen=True)
class AdamSteps:
    """Adam's Δ of each tensor, computed from its gradient and moments where it is needed.

    Attributes:
        cached: for a step-K optimizer, float32: the sum of the Δ since the last merge. It belongs
            to the Δ of a tensor that merges.
        numbers: float32, a row of :class:`AdamNumbers` for each tensor, on any device.
        merges: int64, for each tensor whether this step merges; the others are plain Adam's.
    """

    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    cached: list[Tensor] | None
    numbers: Tensor
    merges: Tensor


@dataclass(frozen=True)
class Differences:
    """Tensors less others, computed in float32 and rounded to the dtype of the first where that is
    what ``rounded`` says; tensors as they are without ``bases``."""

    tensors: list[Tensor]
    bases: list[Tensor] | None = None
    rounded: bool = False


Values = AdamSteps | Differences
SomeValues = TypeVar("SomeValues", bound=Values)


@dataclass(frozen=True)
class Selection:
    """Which elements are the k of the largest magnitude; of equal ones, those of lower index.

    The answer for a tensor is a threshold and a cut: an element is kept iff its magnitude is above
    the threshold, or equal to it and its index below the cut.
    """

    values: Values
    k: Sequence[int]  # one for each tensor, or one for all as if they were joined
    joined: bool


@dataclass(frozen=True)
class Mask:
    """The elements to keep: by magnitude, or else at random.

    At random, an element is kept iff its word of the law ``uniform32`` is below the limit; 2^32
    keeps all. All are tensors with an entry for each tensor, on any device.
    """

    thresholds: Tensor | None  # float32
    cuts: Tensor | None  # int64
    draws: Tensor  # int64
    limits: Tensor  # int64
    shards: list[Shard]
    tensor_ids: list[int]
    seed: int


@dataclass(frozen=True)
class L1Sums:
    """Of each tensor's magnitudes: all of them, and those that the mask keeps."""

    values: Values
    mask: Mask


@dataclass(frozen=True)
class Histogram:
    """How many magnitudes of each tensor lie in each of ``bins`` bins of 2^shift magnitudes.

    A magnitude is the integer of a float32's bits without the sign; the bins of a tensor begin at
    its entry of ``lows`` (int64, on any device).
    """

    values: Values
    lows: Tensor
    shift: int
    bins: int


@dataclass(frozen=True)
class EqualCounts:
    """How many values of each tensor have a given magnitude, in each of a row of ranges.

    A range goes from one edge (an index in row-major order) to the next.
    """

    values: Values
    magnitudes: Tensor  # int64, an entry for each tensor
    edges: Tensor  # int64, for each tensor a row of them, ascending, from 0 to its numel at most


METHODS = ("dare", "dare_paper", "ties", "ties_paper", "ema")
# In ``dare_paper`` τ has a mask of its own on each step, whose draw is this far from the step's.
TAU_DRAWS = 1 << 31


@dataclass(frozen=True)
class MergeStep:
    """A step of a merging optimizer: moments, Δ, mask, consensus with τ, decay, weights.

    ``taus`` are dense tensors or sparse ones; for ``ema`` the reference's weights.
    """

    params: list[Tensor]
    residuals: list[Tensor | None]
    masters: list[Tensor] | None
    steps: AdamSteps
    taus: list[Tensor | SparseTau] | None
    mask: Mask
    method: str

    def written(self) -> Iterator[tuple[str, int, Tensor]]:
        """The operands that it writes: argument, position, tensor."""
        for name, tensors in (
            ("params", self.params),
            ("residuals", self.residuals),
            ("masters", self.masters or []),
            ("exp_avgs", self.steps.exp_avgs),
            ("exp_avg_sqs", self.steps.exp_avg_sqs),
            ("cached", self.steps.cached or []),
        ):
            for i, tensor in enumerate(tensors):
                if tensor is not None:
                    yield name, i, tensor

    def read(self) -> Iterator[tuple[str, int, Tensor]]:
        """Those that it only reads, but for the entries for each tensor."""
        for i, grad in enumerate(self.steps.grads):
            yield "grads", i, grad
        for i, tau in enumerate(self.taus or []):
            for tensor in tau if isinstance(tau, SparseTau) else (tau,):
                yield "taus", i, tensor


def tensors_of(values: Values) -> list[Tensor]:
    """What the values are shaped like."""
    return values.grads if isinstance(values, AdamSteps) else values.tensors


def some_of(values: SomeValues, members: list[int]) -> SomeValues:
    """Those of some tensors."""
    if len(members) == len(tensors_of(values)):
        return values

    def own(tensors: list[Tensor] | None) -> list[Tensor] | None:
        return None if tensors is None else [tensors[i] for i in members]

    return _with_operands(values, own, members)


def section_of(values: SomeValues, i: int, section: slice) -> SomeValues:
    """Some of one tensor's values, in row-major order."""

    def own(tensors: list[Tensor] | None) -> list[Tensor] | None:
        return None if tensors is None else [tensors[i].flatten()[section]]

    return _with_operands(values, own, [i])


def _with_operands(
    values: Values, own: Callable[[list[Tensor] | None], Any], members: list[int]
) -> Any:
    if isinstance(values, Differences):
        return replace(values, tensors=own(values.tensors), bases=own(values.bases))
    return replace(
        values,
        grads=own(values.grads),
        exp_avgs=own(values.exp_avgs),
        exp_avg_sqs=own(values.exp_avg_sqs),
        cached=own(values.cached),
        numbers=values.numbers[members],
        merges=values.merges[members],
    )


def contiguous_steps(steps: AdamSteps, contiguous: RowMajor) -> AdamSteps:
    return replace(
        steps,
        grads=[contiguous(grad) for grad in steps.grads],
        exp_avgs=[contiguous(moment) for moment in steps.exp_avgs],
        exp_avg_sqs=[contiguous(moment) for moment in steps.exp_avg_sqs],
        cached=None if steps.cached is None else [contiguous(delta) for delta in steps.cached],
    )


@contextmanager
def row_major(step: MergeStep) -> Iterator[MergeStep]:
    """The step over operands that are contiguous; those that it writes are written back."""
    contiguous = RowMajor()
    taus = step.taus
    if taus is not None:
        taus = [tau if isinstance(tau, SparseTau) else contiguous(tau) for tau in taus]
    yield replace(
        step,
        params=[contiguous(param) for param in step.params],
        residuals=[None if r is None else contiguous(r) for r in step.residuals],
        masters=None if step.masters is None else [contiguous(m) for m in step.masters],
        steps=contiguous_steps(step.steps, contiguous),
        taus=taus,
    )
    contiguous.write_back(tensor for _, _, tensor in step.written())
