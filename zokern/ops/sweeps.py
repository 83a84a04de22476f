"""Sweeps along noise, inner products with it, and noise as tensors."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from zokern import backends
from zokern.arguments import (
    Numbers,
    by_device,
    check_flat,
    check_length,
    directions,
    flat,
    float32s,
    integer,
    integers,
    number_rows,
    packed,
    pick,
    positions,
    signed,
    tensor_list,
    unflatten,
    unpacked,
    unsigned,
)
from zokern.checks import (
    check_direction_law,
    check_elements,
    check_form,
    check_memory,
    check_operand,
    check_vector,
)
from zokern.laws import LAWS
from zokern.sweep import InnerProducts, Shard, Sweep, Update

Shards = Sequence[tuple[int, int, int] | None]

torch.library.define(
    "zokern::perturb_",
    "(Tensor(a!)[] params, Tensor(b!)[] residuals, int[] residual_of, Tensor(c!)[] masters,"
    " Tensor(d!)[] momenta, Tensor(e!)[] outs, Tensor[] dense, int[] draws, float[] coeffs,"
    " float[] scales, int rest, float[] gradient, float[] decays, float[] steps, bool sign,"
    " int seed, str law, int[] tensor_ids, int[] shards, Tensor[] rows, int[] row_of,"
    " int? rounding) -> ()",
)
torch.library.define(
    "zokern::inner_products",
    "(Tensor[] vectors, int draw, int seed, str law, int[] tensor_ids, int[] shards) -> Tensor",
)
torch.library.define(
    "zokern::noise_sample",
    "(str law, int numel, int seed, int draw, int tensor_id, int offset, Device device) -> Tensor",
)


def perturb_(
    params: Iterable[Tensor],
    draws: Sequence[int],
    coeffs: Numbers,
    *,
    seed: int,
    law: str = "gauss16",
    scales: Numbers | None = None,
    tensor_ids: Sequence[int] | None = None,
    shards: Shards | None = None,
    rows: Sequence[Tensor | None] | None = None,
    residuals: Sequence[Tensor | None] | None = None,
    masters: Sequence[Tensor] | None = None,
    outs: Sequence[Tensor] | None = None,
    dense: Sequence[Sequence[Tensor]] = (),
    rest: int | None = None,
    update: Update | None = None,
    rounding: int | None = None,
) -> None:
    """Move a list of tensors along seeded random directions, in place or not, in one sweep.

    For each tensor θ, with float32 arithmetic and one rounding to θ's dtype at the end::

        t = master or θ
        u = decay * momentum                                 # 0 without momentum
        for k in range(rest):
            t = scales[k] * t                                # only where scales[k] != 1
            t = fma(coeffs[k], z_k, t)
            u = fma(gradient[k], z_k, u)                     # only with an update
        momentum = u
        t = fma(step, u or sign(u), t)                       # only with an update
        master = t                                           # only where rest > 0
        for k in range(rest, K):
            t = scales[k] * t
            t = fma(coeffs[k], z_k, t)
        θ = t                                                # out = t where there are outs

    With ``rounding``, up or down at the end, with a chance that makes it right on average, by
    the 16 bits r that ``rounding16`` has for the element::

        bfloat16:   bits of θ = (bits of t + r) >> 16        # t as it is if infinite or NaN
        split8:     bits of t = (bits of t + (r >> 8)) & ~0xFF, then as without rounding
        float16:    n = floor(|t| / ulp)                     # ulp = max(2^-24, 2^(e - 10))
                    n = n + (r < (|t| / ulp - n) * 2^16)     # for 2^e <= |t| < 2^(e + 1)
                    θ = ±n * ulp                             # to nearest where |t| >= 2^16

    The result is the same, bit for bit, on every backend and every device.

    Args:
        params: float32, bfloat16 or float16 tensors, dense (any memory format) and not
            overlapping. They may lie on several devices.
        draws: the K directions, K ≥ 1 (0 with masters): z_k is the noise of draw
            0 ≤ draws[k] < 2^32, or the dense direction j where draws[k] is ~j (-1, -2, …).
        coeffs: K numbers, or K for each tensor (shape (len(params), K)). Rounded to float32.
        seed: of the run, 0 ≤ seed < 2^64.
        law: ``gauss16``, ``gauss32``, ``rademacher`` or ``normal``; see :mod:`zokern.noise`.
        scales: like ``coeffs``; 1 by default.
        tensor_ids: 56-bit ids, for example of :func:`zokern.noise.tensor_id`; the tensors'
            positions by default.
        shards: for each tensor None (it is whole) or (offset, row_length, row_stride): its
            element (r, k), in rows of ``row_length``, is element offset + r·row_stride + k of the
            full tensor and gets the noise of that element.
        rows: for each tensor None or the numbers of its rows in the full tensor, where somebody
            picked them (an embedding's, say): int64, of one dimension, on the tensor's device. Its
            element (r, k) is element offset + rows[r]·row_stride + k then. The numbers are not
            looked at before the sweep: that none is negative, and that the law counts all their
            elements, is the caller's business.
        residuals: for each tensor None or the low bits of its value, shaped and laid out like it:
            int16 or int8 beside bfloat16, float16 beside float16 (``split`` and ``split8``).
        masters: for each tensor its float32 value at rest, of its shape; instead of residuals.
            With ``rest=0`` they are only read: params = masters + Σ coeffs[k]·z_k.
        outs: for each tensor where it goes instead: a contiguous tensor of its shape and dtype that
            shares memory with nothing else. The params and their residuals, in any memory format,
            are only read then. Not with masters or an update.
        dense: up to two dense directions, each with a tensor (float32, bfloat16 or float16) of
            each parameter's shape.
        rest: how many directions lead to the place of rest; all by default.
        update: the step by an estimated gradient that the place of rest makes, with momentum or by
            sign; its numbers may be one for all tensors. Plain SGD needs none: it is a matter of
            ``coeffs``. A momentum may itself be a dense direction before ``rest``, where it counts
            as it was before the sweep.
        rounding: 0 ≤ rounding < 2^32, the draw whose bits round what is stored stochastically: half
            precision alone (outs are), or bfloat16 with an int8 residual; float32 tensors among
            them are stored as they are. To nearest by default.

    Raises:
        TypeError, ValueError: for an operand that cannot be swept in place or an argument out of
            range, naming it, before anything is written.
    """
    params = tensor_list("params", params)
    count = len(params)
    dense = [tensor_list(f"dense[{j}]", vectors) for j, vectors in enumerate(dense)]
    for j, vectors in enumerate(dense):
        check_length(f"dense[{j}]", vectors, count)
    draws = directions(draws, len(dense))
    if not draws and masters is None:
        raise ValueError("draws is empty: give at least one direction")
    k = len(draws)
    coeff_rows = number_rows("coeffs", coeffs, count, k)
    scale_rows = None if scales is None else number_rows("scales", scales, count, k)
    seed = integer("seed", seed, bits=64)
    ids = list(range(count)) if tensor_ids is None else integers("tensor_ids", tensor_ids, bits=56)
    check_length("tensor_ids", ids, count)
    shard_list = _shard_list(shards, params)
    residual_list = [None] * count if residuals is None else list(residuals)
    check_length("residuals", residual_list, count)
    row_list = [None] * count if rows is None else list(rows)
    check_length("rows", row_list, count)
    master_list = None if masters is None else tensor_list("masters", masters)
    check_length("masters", params if master_list is None else master_list, count)
    out_list = None if outs is None else tensor_list("outs", outs)
    check_length("outs", params if out_list is None else out_list, count)
    rest = k if rest is None else integer("rest", rest, bits=32)
    update = None if update is None else _read_update(update, count, k)
    rounding = None if rounding is None else integer("rounding", rounding, bits=32)

    def call(members: list[int], own_rounding: int | None) -> tuple:
        momenta = None if update is None else update.momenta
        return (
            pick(params, members),
            *packed(pick(residual_list, members)),
            [] if master_list is None else pick(master_list, members),
            [] if momenta is None else pick(momenta, members),
            [] if out_list is None else pick(out_list, members),
            [vectors[i] for vectors in dense for i in members],
            draws,
            flat(coeff_rows, members),
            [] if scale_rows is None else flat(scale_rows, members),
            rest,
            [] if update is None else flat(update.gradient, members),
            [] if update is None else pick(update.decays, members),
            [] if update is None else pick(update.steps, members),
            update is not None and update.sign,
            signed(seed),
            law,
            pick(ids, members),
            [n for i in members for n in shard_list[i]],
            *packed(pick(row_list, members)),
            own_rounding,
        )

    # An operator's call rounds all of its tensors or none.
    exact = [param.dtype == torch.float32 for param in params]
    roundings = [None if one and not all(exact) else rounding for one in exact]
    kinds = positions(zip([param.device for param in params], roundings, strict=True))
    calls = [call(members, own_rounding) for (_, own_rounding), members in kinds.items()]
    if len(calls) > 1:
        for arguments in calls:
            check_memory(_sweep(*arguments))
    with torch.no_grad():
        for arguments in calls:
            torch.ops.zokern.perturb_(*arguments)


@torch.library.impl("zokern::perturb_", "CompositeExplicitAutograd")
def _perturb_kernel(params: list[Tensor], *arguments) -> None:
    sweep = _sweep(params, *arguments)
    if not params:
        return
    check_memory(sweep)
    backends.select(params[0].device).perturb_(sweep)
    # The dispatcher leaves this to the kernels; autograd notices stale saved tensors by it.
    torch.autograd.graph.increment_version(
        [tensor for _, _, tensor in sweep.written() if not tensor.is_inference()]
    )


@torch.library.register_fake("zokern::perturb_")
def _perturb_fake(*arguments) -> None:
    _sweep(*arguments)


def inner_products(
    vectors: Iterable[Tensor],
    draw: int,
    *,
    seed: int,
    law: str = "gauss16",
    tensor_ids: Sequence[int] | None = None,
    shards: Shards | None = None,
) -> Tensor:
    """Inner products of tensors with each other's noise, which is drawn on the way.

    Accumulated so exactly that every backend and every sharding gives the same sums once they are
    rounded to float32.

    Args:
        vectors: float32, bfloat16 or float16 tensors v, in any memory format.
        draw: 0 ≤ draw < 2^32, whose noise is z.
        seed, law, tensor_ids, shards: as for :func:`perturb_`.

    Returns:
        A float64 tensor of shape (len(vectors), 3) on the CPU: v·v, v·z and z·z for each tensor.

    Raises:
        TypeError, ValueError: for an argument out of range, naming it.
    """
    vectors = tensor_list("vectors", vectors)
    count = len(vectors)
    ids = list(range(count)) if tensor_ids is None else integers("tensor_ids", tensor_ids, bits=56)
    check_length("tensor_ids", ids, count)
    shard_list = _shard_list(shards, vectors)
    draw = integer("draw", draw, bits=32)
    seed = signed(integer("seed", seed, bits=64))
    sums = torch.zeros(count, 3, dtype=torch.float64)
    with torch.no_grad():
        for members in by_device(vectors).values():
            sums[members] = torch.ops.zokern.inner_products(
                pick(vectors, members),
                draw,
                seed,
                law,
                pick(ids, members),
                [n for i in members for n in shard_list[i]],
            )
    return sums


@torch.library.impl("zokern::inner_products", "CompositeExplicitAutograd")
def _inner_products_kernel(vectors: list[Tensor], *arguments) -> Tensor:
    products = _products(vectors, *arguments)
    if not vectors:
        return torch.zeros(0, 3, dtype=torch.float64)
    return backends.select(vectors[0].device).inner_products(products)


@torch.library.register_fake("zokern::inner_products")
def _inner_products_fake(vectors: list[Tensor], *arguments) -> Tensor:
    _products(vectors, *arguments)
    return torch.empty(len(vectors), 3, dtype=torch.float64)


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


def _sweep(
    params: list[Tensor],
    residuals: list[Tensor],
    residual_of: list[int],
    masters: list[Tensor],
    momenta: list[Tensor],
    outs: list[Tensor],
    dense: list[Tensor],
    draws: list[int],
    coeffs: list[float],
    scales: list[float],
    rest: int,
    gradient: list[float],
    decays: list[float],
    steps: list[float],
    sign: bool,
    seed: int,
    law: str,
    tensor_ids: list[int],
    shards: list[int],
    rows: list[Tensor],
    row_of: list[int],
    rounding: int | None,
) -> Sweep:
    """The flat arguments of the schema as a Sweep, every operand checked but for its memory."""
    check_direction_law(law)
    count, k = len(params), len(draws)
    check_flat(count, residual_of=(residual_of, 1), row_of=(row_of, 1))
    check_flat(count, tensor_ids=(tensor_ids, 1), shards=(shards, 3))
    if masters:
        check_flat(count, masters=(masters, 1))
    if momenta:
        check_flat(count, momenta=(momenta, 1))
    if outs:
        check_flat(count, outs=(outs, 1))
    if count and len(dense) % count:
        raise ValueError(f"dense has {len(dense)} entries, no multiple of the {count} params")
    if not 0 <= rest <= k:
        raise ValueError(f"rest must be between 0 and the {k} directions, not {rest}")
    update = None
    if gradient:
        check_flat(count, decays=(decays, 1), steps=(steps, 1))
        update = Update(
            unflatten("gradient", gradient, count, k),
            float32s("decays", decays),
            float32s("steps", steps),
            momenta or None,
            sign,
        )
    elif momenta or decays or steps or sign:
        raise ValueError("momenta, decays, steps and sign belong to an update: give its gradient")
    vectors = [dense[i : i + count] for i in range(0, len(dense), count or 1)]
    sweep = Sweep(
        params=params,
        residuals=unpacked("residuals", residuals, "residual_of", residual_of),
        masters=masters or None,
        outs=outs or None,
        dense=vectors,
        shards=[Shard(*shards[3 * i : 3 * i + 3]) for i in range(count)],
        rows=unpacked("rows", rows, "row_of", row_of),
        tensor_ids=integers("tensor_ids", tensor_ids, bits=56),
        draws=directions(draws, len(vectors)),
        coeffs=unflatten("coeffs", coeffs, count, k),
        scales=unflatten("scales", scales or [1.0] * k, count, k),
        rest=rest,
        update=update,
        rounding=None if rounding is None else integer("rounding", rounding, bits=32),
        seed=unsigned(seed),
        law=law,
    )
    check_form(sweep)
    for i in range(count):
        check_operand(sweep, i)
    return sweep


def _products(
    vectors: list[Tensor],
    draw: int,
    seed: int,
    law: str,
    tensor_ids: list[int],
    shards: list[int],
) -> InnerProducts:
    """The flat arguments of the schema, checked."""
    check_direction_law(law)
    count = len(vectors)
    check_flat(count, tensor_ids=(tensor_ids, 1), shards=(shards, 3))
    products = InnerProducts(
        vectors=vectors,
        shards=[Shard(*shards[3 * i : 3 * i + 3]) for i in range(count)],
        tensor_ids=integers("tensor_ids", tensor_ids, bits=56),
        draw=integer("draw", draw, bits=32),
        seed=unsigned(seed),
        law=law,
    )
    for i in range(count):
        check_vector(products, i)
    return products


def _read_update(update: Update, count: int, k: int) -> Update:
    def per_tensor(name: str, values: float | Sequence[float]) -> list[float]:
        given = list(values) if isinstance(values, Sequence) else [values] * count
        check_length(name, given, count)
        return float32s(name, given)

    momenta = update.momenta
    if momenta is not None:
        momenta = tensor_list("momenta", momenta)
        check_length("momenta", momenta, count)
    return Update(
        number_rows("gradient", update.gradient, count, k),
        per_tensor("decays", update.decays),
        per_tensor("steps", update.steps),
        momenta,
        bool(update.sign),
    )


def _shard_list(shards: Shards | None, tensors: list[Tensor]) -> list[tuple[int, ...]]:
    """Three numbers for each tensor."""
    given = [None] * len(tensors) if shards is None else list(shards)
    check_length("shards", given, len(tensors))
    result: list[tuple[int, ...]] = []
    for i, (shard, tensor) in enumerate(zip(given, tensors, strict=True)):
        if shard is None:
            result.append((0, tensor.numel(), tensor.numel()))
            continue
        if len(shard) != 3:
            raise ValueError(f"shards[{i}] must be (offset, row_length, row_stride), not {shard!r}")
        result.append(tuple(integer(f"shards[{i}]", n, bits=63) for n in shard))
    return result
