"""What a merge of several models over a base does: the words in which ops speak to a backend."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import Tensor

Votes = Literal["none", "total", "weighted", "frequency"]
Combine = Literal["sum", "mean", "max", "sign"]
VOTES: tuple[str, ...] = get_args(Votes)
COMBINE: tuple[str, ...] = get_args(Combine)

# Models that one call merges: their deltas of a block stay in a cache.
MAX_MODELS = 64


@dataclass(frozen=True)
class DeltaMerge:
    """out ← base + scale · combined(masked deltas of the models); rounded once.

    For each element, in float32, model by model in order::

        d = x - base                              # x without a base; rounded to x's dtype*
        d = ratio * d where it is kept, else 0    # rounded*
        p = weight * d                            # rounded*
        elected += d, p or the sign of d          # votes total, weighted, frequency
    s = the sign of elected, that of 0 being what zero_up says

    A vote is d, or p where votes are weighted. Then, in the same order, over the models whose vote
    is not of the opposite sign (all of them where there are no votes)::

        sum   total += p                          # then total / divisor
        mean  total += p, and of those whose vote is not 0:
              count += weight where votes are weighted, else 1
                                                  # then total / count, or total where it is 0
        max   total = max(total, |p|)             # then s * total
        out = base + scale * total
        sign  out = 1, 0 or -1, the sign of elected, without base and scale

    * where ``rounded`` says so. NaN votes with neither side and is passed on.

    An element is kept by magnitude where there are thresholds (above the threshold, or equal to it
    and of an index below the cut), else if its word of the law ``uniform32`` is below the model's
    limit; 2^32 keeps all.

    All tensors are on one device, contiguous outs among them, and have passed the checks of
    :mod:`zokern.ops`. The numbers are float32 values.

    Attributes:
        models: for each model its tensors.
        ratios, thresholds, cuts: of shape (models, tensors): float32, float32, int64. A ratio of
            None is 1.
        weights, limits, draws: for each model.
    """

    outs: list[Tensor]
    bases: list[Tensor] | None
    models: list[list[Tensor]]
    weights: Sequence[float]
    ratios: Tensor | None
    thresholds: Tensor | None
    cuts: Tensor | None
    limits: Sequence[int]
    draws: Sequence[int]
    seed: int
    tensor_ids: list[int]
    rounded: bool
    votes: Votes
    zero_up: bool
    combine: Combine
    divisor: float
    scale: float


def contiguous(merge: DeltaMerge) -> DeltaMerge:
    """The merge over operands that are contiguous, for kernels that take no others."""

    def copied(numbers: Tensor | None) -> Tensor | None:
        return None if numbers is None else numbers.contiguous()

    return replace(
        merge,
        bases=None if merge.bases is None else [base.contiguous() for base in merge.bases],
        models=[[tensor.contiguous() for tensor in model] for model in merge.models],
        ratios=copied(merge.ratios),
        thresholds=copied(merge.thresholds),
        cuts=copied(merge.cuts),
    )
