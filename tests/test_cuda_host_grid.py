"""The bodies and the launch plans of the CUDA kernels, run over a simulated grid without a GPU."""

import random
from dataclasses import replace

import pytest
import torch

import zokern
from tests import (
    test_inner_products,
    test_merge_deltas,
    test_perturb,
    test_rounding,
    test_sweep_forms,
)
from tests.same_bits import same_bits
from zokern import noise, ops

_C = pytest.importorskip("zokern._C", reason="zokern was built without the native core")

BLOCK = 4 * 256 * 8  # elements that a block moves where there is little to do
LAST = (8 << 32) - 40_000  # close to the last element that gauss16 counts


@pytest.fixture(autouse=True)
def _simulated_grid(monkeypatch):
    """What the native backend runs on the CPU goes to the simulated grid."""
    monkeypatch.setattr(_C, "cpu_sweep", lambda sweep, *_: _C.host_grid_sweep(sweep))
    monkeypatch.setattr(
        _C,
        "cpu_inner_products",
        lambda products, out, *_: _C.host_grid_inner_products(products, out),
    )
    monkeypatch.setattr(_C, "cpu_sample", lambda *arguments: _C.host_grid_sample(*arguments[:7]))
    monkeypatch.setattr(_C, "cpu_merge_deltas", lambda merge, *_: _C.host_grid_merge_deltas(merge))
    monkeypatch.setenv("ZOKERN_BACKEND", "native")


def operands(storage: str, layout: list) -> tuple[list, list, list]:
    """Memory, and in it parameters and residuals of (elements, first element in the memory)."""
    dtype, residual_dtype = test_perturb.STORAGES[storage]
    generator = torch.Generator().manual_seed(0)
    memory, params, residuals = [], [], []
    for numel, start in layout:
        value = torch.randn(start + numel + 9, generator=generator)
        memory.append(value.to(dtype))
        params.append(memory[-1][start : start + numel])
        residuals.append(None)
        if residual_dtype is not None:
            memory.append((30 * value).to(residual_dtype))
            residuals[-1] = memory[-1][start : start + numel]
    return memory, params, residuals


def check(
    storage: str,
    layout: list,
    draws: list,
    coeffs: list,
    outs: int | None = None,
    **arguments,
) -> None:
    """The simulated grid and the reference agree, and spare the memory around the operands.

    Out of place where ``outs`` is given, the first element of each output in its memory.
    """
    results = []
    for backend in ("native", "reference"):
        memory, params, residuals = operands(storage, layout)
        out_list = None if outs is None else [in_memory(param, outs, memory) for param in params]
        with zokern.use_backend(backend):
            written = {"residuals": residuals, "outs": out_list}
            ops.perturb_(params, draws, coeffs, seed=2**64 - 3, **written, **arguments)
        results.append(memory)
    for i, (got, wanted) in enumerate(zip(*results, strict=True)):
        assert same_bits(got, wanted), f"memory {i}"


@pytest.mark.parametrize("k", [1, 2, 4, 16])
@pytest.mark.parametrize("storage", test_perturb.STORAGES)
@pytest.mark.parametrize("law", test_perturb.DIRECTIONS)
def test_awkward_operands_and_special_values(law, storage, k):
    test_perturb.test_backends_agree("host grid", law, storage, k)


@pytest.mark.parametrize("k", [1, 2, 4, 16])
@pytest.mark.parametrize("storage", test_perturb.STORAGES)
@pytest.mark.parametrize("law", test_perturb.DIRECTIONS)
def test_whole_blocks(law, storage, k):
    coeffs = [0.1 + 0.01 * i for i in range(k)]
    check(storage, [(2 * BLOCK, 0)], list(range(k)), coeffs, law=law)
    check(
        storage, [(2 * BLOCK, 0)], list(range(k)), coeffs, law=law, scales=[0.9, *[1.0] * (k - 1)]
    )


@pytest.mark.parametrize("storage", test_perturb.STORAGES)
@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 2047, 2049, BLOCK - 1, BLOCK + 1, 3 * BLOCK + 5])
def test_lengths(storage, numel):
    check(storage, [(numel, 0)], [5], [0.1])


@pytest.mark.parametrize("storage", test_perturb.STORAGES)
@pytest.mark.parametrize("offset", [3, 8, 13, LAST], ids=str)
@pytest.mark.parametrize("start", [0, 1, 3, 4, 8], ids=lambda start: f"start{start}")
def test_offsets_and_alignments(storage, offset, start):
    numel = 2 * BLOCK + 10
    check(storage, [(numel, start)], [5, 6], [0.1, 0.2], shards=[(offset, numel, numel)])


@pytest.mark.parametrize("storage", test_perturb.STORAGES)
@pytest.mark.parametrize(
    ("offset", "rows", "length", "stride"),
    [
        (0, 9, 1024, 2048),
        (16, 9, 1024, 4088),
        (3, 9, 1024, 1027),
        (0, 40, 7, 9),
        (5, 1000, 1, 8),
        (5, 1000, 3, 3),
        (1, 2, 9000, 9001),
        (16, 9, 1024, 1024),
        (3, 1, 9, 9),
        (8, 1, 5000, 5008),
    ],
)
def test_row_shards(storage, offset, rows, length, stride):
    """Rows in order, and such as somebody picked."""
    picked = torch.tensor([random.Random(r).randrange(1000) for r in range(rows)])
    for start in (0, offset % 8):
        layout = [(rows * length, start), (rows * length, 0)]
        shards = [(offset, length, stride)] * 2
        check(storage, layout, [5], [0.1], shards=shards)
        check(storage, layout, [5], [0.1], outs=start, shards=shards)
        check(storage, layout, [5], [0.1], shards=shards, rows=[picked, picked])
        check(storage, layout, [5], [0.1], outs=start, shards=shards, rows=[picked, None])


@pytest.mark.parametrize("storage", test_perturb.STORAGES)
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 1], ids=lambda start: f"start{start}")
def test_whole_blocks_go_out(storage, k, start):
    layout = [(2 * BLOCK + 10, 0)]
    check(storage, layout, list(range(k)), [0.1] * k, outs=start)
    check(storage, layout, list(range(k)), [0.1] * k, outs=start, scales=[0.9, *[1.0] * (k - 1)])


@pytest.mark.parametrize(("count", "k"), [(600, 1), (300, 5), (70, 16)])
def test_more_tensors_than_a_launch_takes(count, k):
    choose = random.Random(0)
    layout = [(choose.choice([0, 1, 8, 100, 257]), choose.choice([0, 0, 1])) for _ in range(count)]
    draws = [choose.getrandbits(32) for _ in range(k)]
    ids = [choose.getrandbits(56) for _ in range(count)]
    coeffs = [[choose.uniform(-1, 1) for _ in range(k)] for _ in range(count)]
    scales = [[choose.choice([1.0, 0.5]) for _ in range(k)] for _ in range(count)]
    check("bf16", layout, draws, coeffs, scales=scales, tensor_ids=ids)
    check("bf16", layout, draws, coeffs[0], tensor_ids=ids)


@pytest.mark.parametrize(("law", "storage", "form"), test_sweep_forms.CASES)
def test_forms_of_sweeps(law, storage, form):
    test_sweep_forms.test_backends_agree("host grid", law, storage, form)


@pytest.mark.parametrize("name", test_rounding.STORAGES)
def test_stochastic_rounding(name):
    test_rounding.test_every_backend_rounds_as_the_reference("host grid", name)
    test_rounding.test_the_bits_are_those_of_the_element("host grid", name)


def test_a_form_without_directions():
    test_sweep_forms.test_without_directions_a_master_is_copied("host grid")


def in_memory(value: torch.Tensor, start: int, memory: list) -> torch.Tensor:
    """A copy that begins at an element of memory of its own, which is added to the list."""
    memory.append(torch.full((start + value.numel() + 9,), 77, dtype=value.dtype))
    return memory[-1][start : start + value.numel()].copy_(value)


def check_form(storage: str, layout: list, k: int, *, masters: bool, **arguments) -> None:
    """As `check`, for a sweep with all there is, half of its draws dense directions.

    The layout is of (elements, first element of params, of masters, of momenta, of directions).
    Where k is odd, the momenta are a direction too.
    """
    dtype, residual_dtype = test_perturb.STORAGES[storage]
    count = len(layout)
    results = []
    for backend in ("native", "reference"):
        choose = random.Random(k)
        generator = torch.Generator().manual_seed(k)
        memory: list[torch.Tensor] = []

        def tensors(column, kind, generator=generator, memory=memory):
            values = [torch.randn(numel, generator=generator) for numel, *_ in layout]
            return [
                in_memory(value.to(kind), starts[column], memory)
                for value, (_, *starts) in zip(values, layout, strict=True)
            ]

        def rows(choose=choose):
            return [[choose.uniform(-0.1, 0.1) for _ in range(k)] for _ in layout]

        with_residuals = residual_dtype is not None and not masters
        params = tensors(0, dtype)
        residuals = tensors(0, residual_dtype) if with_residuals else [None] * count
        momenta = tensors(2, torch.float32)
        update = ops.Update(rows(), [0.9] * count, [0.1] * count, momenta)
        draws = [choose.getrandbits(32) for _ in range(k)]
        draws[: k // 2] = [choose.choice([~0, ~1]) for _ in range(k // 2)]
        with zokern.use_backend(backend):
            ops.perturb_(
                params,
                draws,
                rows(),
                residuals=residuals,
                masters=tensors(1, torch.float32) if masters else None,
                dense=[tensors(3, torch.bfloat16), momenta if k % 2 else tensors(3, torch.float32)],
                update=replace(update, sign=choose.random() < 0.5),
                rest=k - k // 4,
                seed=2**64 - 3,
                **arguments,
            )
        results.append(memory)
    for i, (got, wanted) in enumerate(zip(*results, strict=True)):
        assert same_bits(got, wanted), f"memory {i}"


FORMS = [(storage, False) for storage in test_perturb.STORAGES] + [
    (storage, True) for storage in ("fp32", "bf16", "fp16")
]


@pytest.mark.parametrize(("storage", "masters"), FORMS)
@pytest.mark.parametrize("offset", [0, 3, LAST], ids=str)
@pytest.mark.parametrize(
    "starts",
    [(0, 0, 0, 0), (3, 3, 3, 3), (1, 0, 0, 0), (8, 1, 0, 0), (0, 4, 1, 0), (0, 0, 0, 1)],
    ids=str,
)
def test_forms_at_offsets_and_alignments(storage, masters, offset, starts):
    numel = BLOCK + 10
    check_form(storage, [(numel, *starts)], 4, masters=masters, shards=[(offset, numel, numel)])


@pytest.mark.parametrize(("storage", "masters"), FORMS)
@pytest.mark.parametrize(
    ("offset", "rows", "length", "stride"),
    [(0, 9, 1024, 2048), (3, 9, 1024, 1027), (0, 40, 7, 9), (5, 1000, 1, 8), (1, 2, 9000, 9001)],
)
def test_forms_of_row_shards(storage, masters, offset, rows, length, stride):
    start = offset % 8
    layout = [(rows * length, *[start] * 4), (rows * length, *[0] * 4)]
    check_form(storage, layout, 3, masters=masters, shards=[(offset, length, stride)] * 2)


@pytest.mark.parametrize(("storage", "masters"), FORMS)
@pytest.mark.parametrize("k", [3, 4])
def test_forms_of_whole_blocks(storage, masters, k):
    check_form(storage, [(2 * BLOCK, 0, 0, 0, 0)], k, masters=masters)


@pytest.mark.parametrize("coeff", [0.1, 3e38], ids=["finite", "overflows"])
@pytest.mark.parametrize("outs", [None, 0], ids=["in place", "apart"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("storage", test_rounding.STORAGES)
def test_stochastic_rounding_of_whole_blocks(storage, k, outs, coeff):
    draws, coeffs = list(range(k)), [coeff] * k
    check(storage, [(2 * BLOCK, 0)], draws, coeffs, outs=outs, rounding=2**32 - 1)
    scales = [0.9] * k
    check(storage, [(2 * BLOCK, 0)], draws, coeffs, outs=outs, rounding=2**32 - 1, scales=scales)


@pytest.mark.parametrize("storage", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("k", "rest"), [(1, 0), (1, 1), (3, 0), (3, 2), (3, 3)])
@pytest.mark.parametrize("law", ["gauss16", "rademacher"])
def test_masters_of_whole_blocks(storage, k, rest, law):
    results = []
    for backend in ("native", "reference"):
        memory, (param,), _ = operands(storage, [(2 * BLOCK, 0)])
        master = in_memory(torch.linspace(-1, 1, 2 * BLOCK), 0, memory)
        with zokern.use_backend(backend):
            ops.perturb_(
                [param], list(range(k)), [0.1] * k, masters=[master], rest=rest, seed=3, law=law
            )
        results.append(memory)
    for got, wanted in zip(*results, strict=True):
        assert same_bits(got, wanted)


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize(("count", "k"), [(250, 2), (70, 33)])
def test_forms_of_more_tensors_than_a_launch_takes(count, k, masters):
    choose = random.Random(0)
    layout = [
        (choose.choice([0, 1, 8, 100, 257]), *(choose.choice([0, 0, 1]) for _ in range(4)))
        for _ in range(count)
    ]
    ids = [choose.getrandbits(56) for _ in range(count)]
    check_form("bf16", layout, k, masters=masters, tensor_ids=ids)


def test_the_bound_of_directions_of_a_form():
    check_form("bf16", [(20, 0, 0, 0, 0)], 1024, masters=True)
    with pytest.raises(RuntimeError, match=r"1025 directions.* 1024 at most"):
        check_form("bf16", [(20, 0, 0, 0, 0)], 1025, masters=True)


@pytest.mark.parametrize("law", test_perturb.DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_with_noise(law, dtype):
    test_inner_products.test_backends_agree("host grid", law, dtype)


def test_products_are_exact():
    test_inner_products.test_cancellation_leaves_the_sum_exact("host grid")


@pytest.mark.parametrize("offset", [0, 3, LAST], ids=str)
@pytest.mark.parametrize("start", [0, 1], ids=lambda start: f"start{start}")
def test_products_of_many_tensors(offset, start):
    """More than a launch takes, most of a part of a block, one of many blocks."""
    choose = random.Random(0)
    numels = [choose.choice([0, 1, 8, 100, 257]) for _ in range(600)]
    numels[300] = 3 * BLOCK + 5
    vectors = [torch.randn(start + numel)[start:] for numel in numels]
    shards = [(offset, numel, numel) for numel in numels]
    got = ops.inner_products(vectors, 5, seed=1, shards=shards)
    with zokern.use_backend("reference"):
        wanted = ops.inner_products(vectors, 5, seed=1, shards=shards)
    assert torch.equal(got.float(), wanted.float())
    assert torch.allclose(got, wanted, rtol=1e-15, atol=0)


def test_products_in_long_blocks():
    """Where there is much to do, the number of blocks stays the same; noise of ±1 counts."""
    numel = 2048 * 2 * BLOCK + 77
    ones = torch.ones(numel, dtype=torch.bfloat16)
    vv, vz, zz = ops.inner_products([ones], 5, seed=1, law="rademacher")[0].tolist()
    assert vv == zz == numel
    assert vz == noise.sample("rademacher", numel, seed=1, draw=5).sum(dtype=torch.float64)


def test_storages_mixed_in_one_call():
    def params():
        generator = torch.Generator().manual_seed(0)
        dtypes = [torch.float32, torch.bfloat16, torch.float16] * 3
        return [torch.randn(100, generator=generator).to(dtype) for dtype in dtypes]

    got, wanted = params(), params()
    ops.perturb_(got, [0], [0.1], seed=1)
    with zokern.use_backend("reference"):
        ops.perturb_(wanted, [0], [0.1], seed=1)
    assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True))


def test_long_blocks():
    """Where there is much to do, blocks are longer; the edges and a middle are checked."""
    numel = 4096 * 2 * BLOCK + 2 * BLOCK + 77
    moved = torch.zeros(numel, dtype=torch.bfloat16)
    ops.perturb_([moved], [7], [1.0], seed=1, law="rademacher")
    for begin in (0, 2 * BLOCK - 500, numel // 2, numel - 1000):
        z = noise.sample("rademacher", 1000, seed=1, draw=7, offset=begin)
        assert torch.equal(moved[begin : begin + 1000].float(), z)
    assert bool((moved.abs() == 1).all())


def test_the_bound_of_directions():
    tensor, wanted = torch.ones(20), torch.ones(20)
    ops.perturb_([tensor], range(1024), [1e-3] * 1024, seed=1)
    with zokern.use_backend("reference"):
        ops.perturb_([wanted], range(1024), [1e-3] * 1024, seed=1)
    assert same_bits(tensor, wanted)
    with pytest.raises(RuntimeError, match=r"1025 directions.* 1024 at most"):
        ops.perturb_([tensor], range(1025), [1e-3] * 1025, seed=1)
    assert same_bits(tensor, wanted)


def test_no_tensors_at_all():
    ops.perturb_([], [0], [1.0], seed=0)
    ops.perturb_([torch.empty(0), torch.empty(0, 3)], [0], [1.0], seed=0)


@pytest.mark.parametrize("law", noise.LAWS)
@pytest.mark.parametrize("offset", [0, 3, 8, 125, -3000], ids=str)
@pytest.mark.parametrize("numel", [0, 1, 8, 13, 3000], ids=str)
def test_samples(law, offset, numel):
    offset %= noise.LAWS[law].max_elements
    for start in (0, 1):
        memory = torch.full((numel + start + 2,), 77, dtype=noise.LAWS[law].dtype)
        out = memory[start : start + numel]
        _C.host_grid_sample(noise.LAWS[law].code, numel, 2**63, 5, 6, offset, out.data_ptr())
        with zokern.use_backend("reference"):
            wanted = noise.sample(law, numel, seed=2**63, draw=5, tensor_id=6, offset=offset)
        assert same_bits(out, wanted)
        assert memory[start + numel :].tolist() == [77, 77]
        assert memory[:start].tolist() == [77] * start


@pytest.mark.parametrize("masks", ["none", "random", "magnitude"])
@pytest.mark.parametrize(("votes", "combine"), test_merge_deltas.RULES)
@pytest.mark.parametrize("dtype", test_merge_deltas.DTYPES, ids=str)
def test_merges(dtype, votes, combine, masks):
    test_merge_deltas.test_backends_agree("host grid", dtype, votes, combine, masks)


@pytest.mark.parametrize("models", [1, 2, 5])
def test_merges_of_mixed_dtypes_and_without_a_base(models):
    test_merge_deltas.test_backends_agree_on_mixed_dtypes_and_without_a_base("host grid", models)


def test_merges_of_64_models():
    test_merge_deltas.test_sixty_four_models("host grid")


def test_merges_of_more_tensors_than_a_launch_takes():
    base = [torch.randn(1 + i % 20) for i in range(200)]
    models = [[tensor + torch.randn_like(tensor) for tensor in base] for _ in range(5)]
    results = []
    for name in ("native", "reference"):
        outs = [torch.empty_like(tensor) for tensor in base]
        with zokern.use_backend(name):
            ops.merge_deltas(outs, models, bases=base, limits=[1 << 31] * 5, votes="total")
        results.append(outs)
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
