"""The operation that merges models over a base: its schema, checks, fake and door."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from zokern import backends
from zokern.arguments import float32s, integer, integers, signed, tensor_list, unsigned
from zokern.checks import check_delta_tensors, check_disjoint
from zokern.deltas import COMBINE, MAX_MODELS, VOTES, Combine, DeltaMerge, Votes

KEEP_ALL = 1 << 32

torch.library.define(
    "zokern::merge_deltas",
    "(Tensor(a!)[] outs, Tensor[] bases, Tensor[] models, float[] weights, Tensor? ratios,"
    " Tensor? thresholds, Tensor? cuts, int[] limits, int[] draws, int seed, int[] tensor_ids,"
    " bool rounded, str votes, bool zero_up, str combine, float divisor, float scale) -> ()",
)


def merge_deltas(
    outs: Iterable[Tensor],
    models: Sequence[Iterable[Tensor]],
    *,
    bases: Iterable[Tensor] | None = None,
    weights: Sequence[float] | None = None,
    ratios: Tensor | None = None,
    thresholds: Tensor | None = None,
    cuts: Tensor | None = None,
    limits: Sequence[int] | None = None,
    draws: Sequence[int] | None = None,
    seed: int = 0,
    tensor_ids: Sequence[int] | None = None,
    rounded: bool = False,
    votes: Votes = "none",
    zero_up: bool = True,
    combine: Combine = "sum",
    divisor: float = 1.0,
    scale: float = 1.0,
) -> None:
    """Write base + scale · combined(masked deltas of the models), in one pass over all tensors.

    With float32 arithmetic and one rounding to the output's dtype at the end. The order of the
    arithmetic is that of :class:`zokern.deltas.DeltaMerge`; the result is the same, bit for bit,
    on every backend and every device.

    Args:
        outs: contiguous float32, bfloat16 or float16 tensors, which share memory with no other.
        models: for each of 1 … 64 models a tensor of each output's shape, in any memory format, of
            any of these dtypes.
        bases: likewise; without them the models' tensors are their deltas.
        weights: for each model; 1 by default.
        ratios: float32 of shape (models, outs): what is kept is multiplied with them.
        thresholds, cuts: float32 and int64 of that shape, as of
            :func:`zokern.ops.magnitude_threshold`: an element of a delta is kept if its magnitude
            is above the threshold, or equal to it and its index below the cut.
        limits: without thresholds, for each model: an element is kept if its word of the law
            ``uniform32`` is below; 0 ≤ limit ≤ 2^32. By default all are kept.
        draws: for each model, of those words; its position by default.
        seed: of those words, 0 ≤ seed < 2^64.
        tensor_ids: for each output; its position by default.
        rounded: round deltas to their model's dtype: once computed, multiplied with the ratio, and
            with the weight.
        votes: ``none``, or how the models elect the sign of each element: by the sum of their
            deltas (``total``), of their weighted deltas (``weighted``) or of the deltas' signs
            (``frequency``). Those of the opposite sign are left out.
        zero_up: whether a sum of 0 elects the positive sign.
        combine: ``sum`` of the weighted deltas, divided by ``divisor``; ``mean``, divided by the
            number of those that agree, or the sum of their weights where votes are weighted;
            ``max``, the largest magnitude; or ``sign``, the elected 1, 0 or -1 itself, without base
            and scale. All but ``sum`` need votes.
        divisor, scale: numbers.

    Raises:
        TypeError, ValueError: for an operand or argument that does not fit, naming it, before
            anything is written.
    """
    outs = tensor_list("outs", outs)
    lists = [tensor_list(f"models[{m}]", model) for m, model in enumerate(models)]
    count, model_count = len(outs), len(lists)
    for m, model in enumerate(lists):
        _check_count(f"models[{m}]", model, count)
    base_list = [] if bases is None else tensor_list("bases", bases)
    if bases is not None:
        _check_count("bases", base_list, count)
    with torch.no_grad():
        torch.ops.zokern.merge_deltas(
            outs,
            base_list,
            [tensor for model in lists for tensor in model],
            [1.0] * model_count if weights is None else list(weights),
            ratios,
            thresholds,
            cuts,
            [KEEP_ALL] * model_count if limits is None else list(limits),
            list(range(model_count)) if draws is None else list(draws),
            signed(integer("seed", seed, bits=64)),
            list(range(count)) if tensor_ids is None else list(tensor_ids),
            rounded,
            votes,
            zero_up,
            combine,
            divisor,
            scale,
        )


@torch.library.impl("zokern::merge_deltas", "CompositeExplicitAutograd")
def _merge_deltas_kernel(outs: list[Tensor], *arguments) -> None:
    merge = _merge(outs, *arguments)
    if not outs:
        return
    _check_memory(merge)
    backends.select(outs[0].device).merge_deltas(merge)
    # The dispatcher leaves this to the kernels; autograd notices stale saved tensors by it.
    torch.autograd.graph.increment_version([out for out in outs if not out.is_inference()])


@torch.library.register_fake("zokern::merge_deltas")
def _merge_deltas_fake(*arguments) -> None:
    _merge(*arguments)


def _merge(
    outs: list[Tensor],
    bases: list[Tensor],
    models: list[Tensor],
    weights: list[float],
    ratios: Tensor | None,
    thresholds: Tensor | None,
    cuts: Tensor | None,
    limits: list[int],
    draws: list[int],
    seed: int,
    tensor_ids: list[int],
    rounded: bool,
    votes: Votes,
    zero_up: bool,
    combine: Combine,
    divisor: float,
    scale: float,
) -> DeltaMerge:
    """The flat arguments of the schema, every operand checked but for its memory."""
    count, model_count = len(outs), len(weights)
    if not 1 <= model_count <= MAX_MODELS:
        raise ValueError(f"one call merges 1 to {MAX_MODELS} models, not {model_count}")
    _check_count("models", models, model_count * count)
    _check_count("limits", limits, model_count, "models")
    _check_count("draws", draws, model_count, "models")
    _check_count("tensor_ids", tensor_ids, count)
    if bases:
        _check_count("bases", bases, count)
    _check_rules(votes, combine, divisor)
    if any(not 0 <= limit <= KEEP_ALL for limit in limits):
        raise ValueError(f"limits must be between 0 and 2^32, not {limits}")
    if (thresholds is None) != (cuts is None):
        raise ValueError("thresholds and cuts belong together: give both or neither")
    numbers = (("ratios", ratios), ("thresholds", thresholds), ("cuts", cuts))
    for name, given in numbers:
        if given is not None:
            dtype = torch.int64 if name == "cuts" else torch.float32
            _check_numbers(name, given, dtype, (model_count, count), outs)
    merge = DeltaMerge(
        outs=outs,
        bases=bases or None,
        models=[models[m * count : m * count + count] for m in range(model_count)],
        weights=float32s("weights", weights),
        ratios=ratios,
        thresholds=thresholds,
        cuts=cuts,
        limits=limits,
        draws=integers("draws", draws, bits=32),
        seed=unsigned(seed),
        tensor_ids=integers("tensor_ids", tensor_ids, bits=56),
        rounded=rounded,
        votes=votes,
        zero_up=zero_up,
        combine=combine,
        divisor=float32s("divisor", [divisor])[0],
        scale=float32s("scale", [scale])[0],
    )
    for i in range(count):
        check_delta_tensors(merge, i)
    return merge


def _check_rules(votes: str, combine: str, divisor: float) -> None:
    for name, given, known in (("votes", votes, VOTES), ("combine", combine, COMBINE)):
        if given not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, not {given!r}")
    if votes == "none" and combine != "sum":
        raise ValueError(f"combine={combine!r} needs votes: total, weighted or frequency")
    if float32s("divisor", [divisor])[0] == 0:
        raise ValueError("divisor must not be 0")


def _check_count(name: str, values: Sequence, count: int, what: str = "outs") -> None:
    if len(values) != count:
        raise ValueError(f"{name} must have {count} entries for the {what}, not {len(values)}")


def _check_numbers(
    name: str, given: Tensor, dtype: torch.dtype, shape: tuple[int, int], outs: list[Tensor]
) -> None:
    if given.dtype != dtype or given.shape != shape:
        raise ValueError(
            f"{name} must be {dtype} of shape {shape}, not {given.dtype} of {tuple(given.shape)}"
        )
    if outs and given.device != outs[0].device:
        raise ValueError(f"{name} is on {given.device}, outs[0] on {outs[0].device}")


def _check_memory(merge: DeltaMerge) -> None:
    read = [
        ("bases", merge.bases or []),
        *((f"models[{m}]", t) for m, t in enumerate(merge.models)),
    ]
    check_disjoint(
        [
            *(("outs", i, out, True) for i, out in enumerate(merge.outs)),
            *((name, i, tensor, False) for name, ts in read for i, tensor in enumerate(ts)),
        ]
    )
