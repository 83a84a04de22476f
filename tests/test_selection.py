"""Thresholds that keep the k largest magnitudes, and L1 sums: right, and on every backend alike."""

import functools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import zokern
from tests.same_bits import same_bits
from zokern import backends, ops
from zokern.backends.reference import adam
from zokern.backends.reference.noise import values_at
from zokern.merging import AdamNumbers, AdamSteps, Differences, Mask
from zokern.ops.magnitudes import equal_counts, histogram
from zokern.sweep import Shard

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INFINITY = float("inf")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def data() -> dict[str, Tensor]:
    few = torch.tensor([0.0, -0.0, 0.5, -0.5, 2.0])
    pick = torch.randint(0, 5, (3000,), generator=torch.Generator().manual_seed(1))
    zeros = torch.zeros(700)
    zeros[::3] = -0.0
    denormals = randn(900) * 1e-40
    denormals[::7] = 0.0
    infinite = randn(500)
    infinite[::50] = INFINITY
    infinite[7::70] = -INFINITY
    return {
        "random": randn(6000),
        "a matrix": randn(37, 41),
        "wide": randn(2000) * torch.logspace(-44, 38, 2000),
        "tied": few[pick],
        "all equal": torch.full((2500,), -0.3),
        "all zero": zeros,
        "denormals": denormals,
        "infinities": infinite,
        "one element": torch.tensor([-3.0]),
        "one of no dimension": torch.tensor(2.5),
        "two": torch.tensor([1.0, -1.0]),
        "empty": torch.empty(0),
    }


DATA = data()


def magnitudes(value: Tensor) -> Tensor:
    return value.float().flatten().contiguous().view(torch.int32) & 0x7FFFFFFF


def mask_of(value: Tensor, threshold: Tensor, cut: Tensor) -> Tensor:
    """The elements that an answer keeps."""
    magnitude, limit = magnitudes(value), threshold.reshape(1).view(torch.int32) & 0x7FFFFFFF
    index = torch.arange(magnitude.numel())
    return (magnitude > limit) | ((magnitude == limit) & (index < cut))


def mask_by_sorting(value: Tensor, k: int) -> Tensor:
    order = magnitudes(value).sort(descending=True, stable=True).indices
    mask = torch.zeros(value.numel(), dtype=torch.bool)
    mask[order[:k]] = True
    return mask


def some(backend: str, items: list) -> list:
    """Fewer of them for the interpreter of Triton, which takes its time for every launch."""
    return items[1::3] if backend == "triton" else items


def ks(numel: int) -> list[int]:
    return sorted({0, 1, numel // 10, numel // 2, max(numel - 1, 0), numel, numel + 5})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DATA)
def test_they_keep_what_a_stable_sort_puts_first(backend, name, dtype):
    value = DATA[name].to(dtype)
    for k in some(backend, ks(value.numel())):
        thresholds, cuts = ops.magnitude_threshold([value], k)
        assert thresholds.shape == cuts.shape == (1,)
        assert thresholds.dtype == torch.float32
        assert cuts.dtype == torch.int64
        mask = mask_of(value, thresholds[0], cuts[0])
        assert torch.equal(mask, mask_by_sorting(value, k)), f"k = {k}"


def test_what_keeps_nothing_and_what_keeps_all(backend):
    value = torch.tensor([1.0, -INFINITY])
    thresholds, cuts = ops.magnitude_threshold([value, value, value], [0, 2, 10])
    assert thresholds.view(torch.int32).tolist() == [0x7FFFFFFF, 0, 0]
    assert cuts.tolist() == [0, 2, 2]


def test_the_cut_is_behind_the_last_of_its_equals_that_is_kept(backend):
    value = torch.tensor([2.0, 1.0, -1.0, 0.0, 1.0, -2.0, 0.0])
    thresholds, cuts = ops.magnitude_threshold([value] * 4, [2, 3, 4, 5])
    assert thresholds.tolist() == [2.0, 1.0, 1.0, 1.0]
    assert cuts.tolist() == [7, 2, 3, 7]


def tensors_of_all_kinds(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [value.to(dtype) for value in DATA.values()]


def both(call, *arguments, **keywords) -> tuple:
    """What the chosen backend and what the reference answers."""
    got = call(*arguments, **keywords)
    with zokern.use_backend("reference"):
        return got, call(*arguments, **keywords)


def check_same(call, *arguments, **keywords) -> None:
    got, wanted = both(call, *arguments, **keywords)
    for a, b in zip(got, wanted, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backends_agree(native_backend, dtype, joined):
    tensors = tensors_of_all_kinds(dtype)
    for k in (0, 2, 77, 1000, 2400, 7000, 15_000, 30_000):
        check_same(ops.magnitude_threshold, tensors, k, joined=joined)


def selections_of_large(name: str, dtype: torch.dtype) -> list[tuple]:
    """Of tensors that threads share, in one call beside a shorter one that they do not."""
    value = DATA[name].repeat((1 << 21) // DATA[name].numel()).to(dtype)
    value[1:] *= 1 + (torch.arange(value.numel() - 1) % 3 == 0)
    numel = value.numel()
    return [
        ops.magnitude_threshold([value, value[5 : 1 << 18]], int(0.01 * numel)),
        ops.magnitude_threshold([value], int(0.5 * numel)),
        ops.magnitude_threshold([value, value[5:70_000]], int(0.999 * numel)),
        ops.magnitude_threshold([value[7 : 1 << 20], value[5 : 1 << 20]], 1 << 20, joined=True),
    ]


@functools.cache
def selections_of_the_reference(name: str, dtype: torch.dtype) -> list[tuple]:
    with zokern.use_backend("reference"):
        return selections_of_large(name, dtype)


@pytest.mark.parametrize("name", ["random", "tied", "all equal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_tensors(native_backend, dtype, name):
    wanted = selections_of_the_reference(name, dtype)
    for own, others in zip(selections_of_large(name, dtype), wanted, strict=True):
        assert all(same_bits(a, b) for a, b in zip(own, others, strict=True))


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("base_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_differences(backend, dtype, base_dtype, rounded):
    value = randn(3001).to(dtype)
    base = (value.float() + 0.01 * randn(3001, seed=1)).to(base_dtype)
    difference = value.float() - base.float()
    if rounded:
        difference = difference.to(dtype)
    values = Differences([value], [base], rounded)
    for k in some(backend, ks(3001)):
        (threshold,), (cut,) = ops.difference_threshold(values, k)
        assert torch.equal(mask_of(difference, threshold, cut), mask_by_sorting(difference, k))
    if not rounded:
        check_same(ops.magnitude_threshold, [value], 100, bases=[base])


def test_joined_tensors_are_their_concatenation(backend):
    tensors = [randn(50), DATA["tied"], torch.empty(0), DATA["all equal"].bfloat16(), randn(7, 9)]
    whole = torch.cat([tensor.float().flatten() for tensor in tensors])
    for k in some(backend, ks(whole.numel())):
        thresholds, cuts = ops.magnitude_threshold(tensors, k, joined=True)
        own = [mask_of(*one) for one in zip(tensors, thresholds, cuts, strict=True)]
        assert torch.equal(torch.cat(own), mask_by_sorting(whole, k)), f"k = {k}"
        assert all(0 <= c <= t.numel() for t, c in zip(tensors, cuts.tolist(), strict=True))


def test_elements_count_in_logical_order_in_every_memory_format(backend):
    value = torch.randint(-3, 3, (2, 3, 5, 4), generator=torch.Generator().manual_seed(0)).float()
    base = randn(4, 5, 3, 2)
    strange = [value.to(memory_format=torch.channels_last), value.transpose(1, 2), value[:, :, ::2]]
    for tensor in strange:
        check_same(ops.magnitude_threshold, [tensor], 37)
        got = ops.magnitude_threshold([tensor], 37)
        assert got == ops.magnitude_threshold([tensor.contiguous()], 37)
    bases = base.permute(3, 2, 1, 0)
    got = ops.magnitude_threshold([value], 37, bases=[bases])
    assert got == ops.magnitude_threshold([value], 37, bases=[bases.contiguous()])


def unlike_a_sample() -> dict[str, Tensor]:
    """Of so many elements that a core may go by some of them, which say little about the others."""
    many = randn(70001)
    clustered, columns, infinite = torch.zeros(70001), many * 1e-3, many.clone()
    clustered[30000:31000] = many[:1000]
    columns[::2048] = 100.0
    infinite[::100] = INFINITY
    return {
        "random": many,
        "sorted": many.sort().values,
        "clustered": clustered,
        "columns": columns,
        "infinite": infinite,
        "all equal": torch.full((70001,), 0.3),
        "few": (many * 3).round(),
        "neighbors": torch.where(many > 1, 1.0, 1.0 + 2**-23),
        "denormal": many * 1e-41,
    }


@pytest.mark.parametrize("name", unlike_a_sample())
def test_of_large_tensors_a_sample_says_little(native_backend, name):
    value = unlike_a_sample()[name]
    for k in (1, 17, 700, 4000, 35000, 69999):
        for bases in (None, [randn(70001, seed=2) * 1e-3]):
            got = ops.magnitude_threshold([value], k, bases=bases)
            with zokern.use_backend("reference"):
                wanted = ops.magnitude_threshold([value], k, bases=bases)
            assert all(map(torch.equal, got, wanted)), (k, bases is None)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0xFFFFFFFF], ids=hex)
@pytest.mark.parametrize("joined", [False, True])
def test_nan_is_an_error_that_names_the_tensor(backend, bits, joined):
    good, bad = randn(40), randn(8, 5)
    bad.view(torch.int32)[3, 2] = bits - (bits >> 31 << 32)
    for k in (1, 39):
        with pytest.raises(
            ValueError, match=r"tensors\[1\] \(shape \(8, 5\), torch.float32\).*NaN"
        ):
            ops.magnitude_threshold([good, bad, bad], k, joined=joined)
    infinite = torch.full((8, 5), INFINITY)
    with pytest.raises(ValueError, match=r"tensors\[0\].*NaN"):
        ops.magnitude_threshold([infinite], 1, bases=[infinite])
    ops.magnitude_threshold([infinite], 1, bases=[good.view(8, 5)])


SHAPES = [(70, 30), (1,), (0,), (1000,), (3, 333), (900,)]


def adam_steps(
    dtype: torch.dtype, state: torch.dtype, cached: bool = True, shapes: list[tuple] = SHAPES
) -> AdamSteps:
    """Tensors of several sizes; the last is at its first step, with one magnitude."""
    grads = [randn(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]
    exp_avgs = [0.1 * randn(*shape, seed=10 + i) for i, shape in enumerate(shapes)]
    exp_avg_sqs = [0.01 * randn(*shape, seed=20 + i) ** 2 for i, shape in enumerate(shapes)]
    grads[-1].fill_(0.5)[::3] = -0.5
    exp_avgs[-1].zero_()
    exp_avg_sqs[-1].zero_()
    numbers = [AdamNumbers(step=1e-3 * (1 + i), sign=(-1.0) ** i) for i in range(len(shapes))]
    return AdamSteps(
        grads,
        [exp_avg.to(state) for exp_avg in exp_avgs],
        [exp_avg_sq.to(state) for exp_avg_sq in exp_avg_sqs],
        [1e-3 * randn(*shape, seed=30 + i) for i, shape in enumerate(shapes)] if cached else None,
        torch.tensor(numbers),
        torch.tensor([1, 1, 1, 0, 1, 0][-len(shapes) :]),
    )


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("state", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_steps_of_adam_are_selected_from_as_if_they_were_stored(
    fast_backend, dtype, state, cached
):
    steps = adam_steps(dtype, state, cached)
    deltas = [adam.delta(steps, i) for i in range(len(steps.grads))]
    for k in (0, 300, 900, 5000):
        got = ops.adam_threshold(steps, k)
        wanted = ops.magnitude_threshold(deltas, k)
        assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True))


def test_a_step_that_is_nan_counts_as_largest(backend):
    steps = adam_steps(torch.float32, torch.float32)
    steps.grads[0][4, 5] = math.nan
    thresholds, cuts = ops.adam_threshold(steps, 1)
    assert thresholds[0].isnan()
    assert cuts[0] == 2100


def test_steps_are_not_taken(backend):
    steps = adam_steps(torch.bfloat16, torch.float32)
    assert steps.cached is not None
    tensors = [*steps.grads, *steps.exp_avgs, *steps.exp_avg_sqs, *steps.cached]
    before = [tensor.clone() for tensor in tensors]
    ops.adam_threshold(steps, 10)
    ops.l1_sums(steps, random_mask(steps.grads))
    assert all(same_bits(a, b) for a, b in zip(tensors, before, strict=True))


def shards_of(tensors: list[Tensor]) -> list[Shard]:
    """Whole tensors, but those of two dimensions rows of larger ones."""
    return [
        Shard(1021, t.shape[1], t.shape[1] + 3) if t.dim() == 2 else Shard(0, t.numel(), t.numel())
        for t in tensors
    ]


def random_mask(tensors: list[Tensor], seed: int = 2**64 - 3) -> Mask:
    count = len(tensors)
    limits = [0, 1 << 32, 1 << 31, 1 << 30, 1, (1 << 32) - 1]
    return Mask(
        None,
        None,
        torch.arange(count) + (1 << 32) - count,
        torch.tensor([limits[i % len(limits)] for i in range(count)]),
        shards_of(tensors),
        [(1 << 56) - 1 - i for i in range(count)],
        seed,
    )


def mask_by_threshold(tensors: list[Tensor], thresholds: Tensor, cuts: Tensor) -> Mask:
    zeros = torch.zeros(len(tensors), dtype=torch.int64)
    return Mask(thresholds, cuts, zeros, zeros, shards_of(tensors), [0] * len(tensors), 0)


def l1_data() -> list[Tensor]:
    finite = [value for name, value in DATA.items() if name != "infinities"]
    return [*finite, torch.tensor([1.0, INFINITY, -INFINITY]), torch.tensor([1.0, math.nan])]


def exact_sum(value: Tensor) -> Tensor:
    total = math.fsum(value.flatten().double().abs().tolist())
    return torch.tensor(total, dtype=torch.float64).float()


def test_sums_by_threshold_are_exact(backend):
    tensors = l1_data()
    thresholds, cuts = ops.magnitude_threshold(tensors[:-1], 100)
    thresholds = torch.cat([thresholds, torch.tensor([INFINITY])])
    cuts = torch.cat([cuts, torch.tensor([2])])
    got = ops.l1_sums(Differences(tensors), mask_by_threshold(tensors, thresholds, cuts))
    assert got.shape == (len(tensors), 2)
    for i, tensor in enumerate(tensors):
        mask = mask_of(tensor, thresholds[i], cuts[i])
        assert same_bits(got[i, 0], exact_sum(tensor)), f"tensor {i}"
        assert same_bits(got[i, 1], exact_sum(tensor.flatten()[mask])), f"tensor {i}"


def test_sums_at_random_are_exact(backend):
    tensors = [value for value in l1_data() if value.numel() > 1 or value.dim() == 1]
    mask = random_mask(tensors)
    got = ops.l1_sums(Differences(tensors), mask)
    for i, (tensor, shard) in enumerate(zip(tensors, mask.shards, strict=True)):
        rows = torch.arange(tensor.numel()) // max(shard.row_length, 1)
        elements = (
            shard.offset
            + torch.arange(tensor.numel())
            + rows * (shard.row_stride - shard.row_length)
        )
        word = values_at(
            "uniform32",
            elements,
            seed=mask.seed,
            draw=int(mask.draws[i]),
            tensor_id=mask.tensor_ids[i],
        )
        assert same_bits(got[i, 0], exact_sum(tensor))
        assert same_bits(got[i, 1], exact_sum(tensor.flatten()[word < mask.limits[i]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_agree(native_backend, dtype):
    steps = adam_steps(dtype, dtype)
    tensors = [randn(5000).to(dtype), randn(30, 41).to(dtype)]
    bases = [0.9 * tensor.float() for tensor in tensors]
    for values, like in (
        (steps, steps.grads),
        (Differences(tensors, bases), tensors),
        (Differences(tensors, bases, rounded=True), tensors),
    ):
        (got,), (wanted,) = both(lambda *a: (ops.l1_sums(*a),), values, random_mask(like))
        assert same_bits(got, wanted)
        thresholds, cuts = ops.adam_threshold(steps, 100)
        if values is not steps:
            thresholds, cuts = ops.difference_threshold(values, 100)
        mask = mask_by_threshold(like, thresholds, cuts)
        (got,), (wanted,) = both(lambda *a: (ops.l1_sums(*a),), values, mask)
        assert same_bits(got, wanted)


def test_sums_do_not_depend_on_the_order_of_large_and_small_terms(backend):
    value = torch.full((5000,), 2.0**-30)
    value[2500] = 2.0**30
    mask = mask_by_threshold([value], torch.tensor([1.0]), torch.tensor([0]))
    wanted = 2.0**30 + 4999 * 2.0**-30
    assert ops.l1_sums(Differences([value]), mask)[0].tolist() == [
        float(torch.tensor(wanted, dtype=torch.float64).float()),
        2.0**30,
    ]


def test_many_threads_agree_with_one():
    if backends.select(torch.device("cpu")).__name__ != "zokern.backends.native":
        pytest.skip("zokern was built without the native core")
    value = randn(3 << 20)
    tied = (4 * value).round()
    tensors = [value, tied, value[:1000], tied[:40_000], value.bfloat16()]
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append([*ops.magnitude_threshold(tensors, 500)])
        results[-1] += ops.magnitude_threshold(tensors, 1 << 20, joined=True)
        results[-1].append(ops.l1_sums(Differences(tensors), random_mask(tensors)))
    torch.set_num_threads(before)
    for others in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], others, strict=True))


def test_it_passes_opcheck():
    tensors = [randn(5, 3), randn(7).bfloat16()]
    selection = (tensors, [], False, [3, 4], False)
    torch.library.opcheck(torch.ops.zokern.magnitude_threshold, selection)
    joined = (tensors, [randn(5, 3), randn(7)], True, [3], True)
    torch.library.opcheck(torch.ops.zokern.magnitude_threshold, joined)
    mask = (None, None, torch.tensor([0, 1]), torch.tensor([1 << 31, 5]))
    place = ([0, 15, 15, 0, 7, 7], [1, 2], -7)
    torch.library.opcheck(torch.ops.zokern.magnitude_l1_sums, (tensors, [], False, *mask, *place))
    steps = adam_steps(torch.bfloat16, torch.float32)
    own = (
        steps.grads,
        steps.exp_avgs,
        steps.exp_avg_sqs,
        steps.cached,
        steps.numbers,
        steps.merges,
    )
    torch.library.opcheck(torch.ops.zokern.adam_threshold, (*own, [3] * 6, False))


def test_a_gradient_is_no_obstacle_and_the_result_has_none():
    weight = randn(10).requires_grad_()
    thresholds, _ = ops.magnitude_threshold([weight], 3)
    assert not thresholds.requires_grad


def test_no_tensors_at_all():
    thresholds, cuts = ops.magnitude_threshold([], 3)
    assert thresholds.shape == cuts.shape == (0,)
    assert ops.magnitude_threshold([], 3, joined=True)[0].shape == (0,)


BAD = {
    "k negative": (lambda t: ([t], -1), {}, ValueError, "k must be at least 0"),
    "k a float": (lambda t: ([t], 2.0), {}, TypeError, "k must be an integer"),
    "k of wrong length": (lambda t: ([t], [1, 2]), {}, ValueError, "k must be one number or 1"),
    "k in a list": (lambda t: ([t], [None]), {}, TypeError, r"k\[0\] must be an integer"),
    "several k joined": (
        lambda t: ([t, t], [1, 2]),
        {"joined": True},
        ValueError,
        "k must be one number or 1 for tensors that are joined",
    ),
    "one tensor": (lambda t: (t, 1), {}, TypeError, "tensors must be a list"),
    "integers": (
        lambda t: ([t, t.int()], 1),
        {},
        TypeError,
        r"tensors\[1\].*dtype must be",
    ),
    "sparse": (lambda t: ([t.to_sparse()], 1), {}, TypeError, r"tensors\[0\].*layout"),
    "bases missing": (lambda t: ([t], 1), {"bases": []}, ValueError, "bases must have 1 entries"),
    "base of another shape": (
        lambda t: ([t], 1),
        {"bases": [torch.zeros(3)]},
        ValueError,
        r"bases\[0\].*it must have the shape \(4,\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    arguments, keywords, error, message = BAD[name]
    with pytest.raises(error, match=message):
        ops.magnitude_threshold(*arguments(torch.ones(4)), **keywords)


def test_bad_operands_of_steps_and_masks_are_named():
    steps = adam_steps(torch.float32, torch.float32)
    with pytest.raises(ValueError, match=r"exp_avgs\[0\].*shape"):
        ops.adam_threshold(replace(steps, exp_avgs=steps.exp_avgs[::-1]), 1)
    with pytest.raises(ValueError, match="numbers must have the shape"):
        ops.adam_threshold(replace(steps, numbers=steps.numbers[:, 1:]), 1)
    with pytest.raises(TypeError, match=r"merges must be of torch\.int64"):
        ops.adam_threshold(replace(steps, merges=steps.merges.float()), 1)
    mask = random_mask(steps.grads)
    with pytest.raises(ValueError, match="thresholds and cuts go together"):
        ops.l1_sums(steps, replace(mask, cuts=mask.draws))
    with pytest.raises(ValueError, match="limits must have the shape"):
        ops.l1_sums(steps, replace(mask, limits=mask.limits[1:]))


def check_counts(values: AdamSteps | Differences, like: list[Tensor]) -> None:
    own = [magnitudes(value) for value in like]
    count = len(like)
    lows = torch.tensor([int(m.median()) - 900 if m.numel() else 0 for m in own]).clamp(min=0)
    for shift, bins, begin in ((20, 2048, lows * 0), (10, 1024, lows), (0, 1000, lows)):
        got, wanted = both(histogram, values, begin, shift, bins)
        assert torch.equal(got, wanted)
        assert got.shape == (count, bins)
    wanted_magnitudes = torch.tensor([int(m.mode().values) if m.numel() else 0 for m in own])
    numels = torch.tensor([m.numel() for m in own])
    edges = (numels[:, None] * torch.tensor([0, 0, 3, 5, 9, 10])) // 10
    got, wanted = both(equal_counts, values, wanted_magnitudes, edges)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backends_count_alike(native_backend, dtype):
    tensors = tensors_of_all_kinds(dtype)
    large = DATA["tied"].repeat(100).to(dtype)
    check_counts(Differences([*tensors, large]), [*tensors, large])
    steps = adam_steps(dtype, torch.float32)
    tensors = steps.grads
    check_counts(steps, [adam.delta(steps, i) for i in range(len(tensors))])


def test_histograms_and_counts_are_those_of_the_elements(fast_backend):
    value = torch.tensor([1.0, -1.0, 1.5, 0.0, 2.0, 1.0])
    one = 0x3F800000
    lows, magnitude = torch.tensor([one]), torch.tensor([one])
    assert histogram(Differences([value]), lows, 22, 3).tolist() == [[3, 1, 1]]
    edges = torch.tensor([[0, 1, 1, 5, 6]])
    assert equal_counts(Differences([value]), magnitude, edges).tolist() == [[1, 0, 1, 1]]


def test_operators_that_count_pass_opcheck():
    values, table = [DATA["random"]], torch.tensor([0])
    torch.library.opcheck(torch.ops.zokern.magnitude_histogram, (values, [], False, table, 20, 64))
    edges = torch.tensor([[0, 3, 9]])
    torch.library.opcheck(
        torch.ops.zokern.magnitude_equal_counts, (values, [], False, table, edges)
    )
    with pytest.raises(ValueError, match="bins must be from 1"):
        histogram(Differences(values), table, 22, 1 << 16)
    with pytest.raises(ValueError, match="edges"):
        equal_counts(Differences(values), table, edges[:, :1])
