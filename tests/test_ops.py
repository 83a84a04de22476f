"""The operators: registered as torch wants them, and refusing what they cannot do."""

import pytest
import torch

import zokern
from zokern import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def flat_arguments(dtype, residual_dtype=None, law="gauss16"):
    params = [torch.randn(5, 3).to(dtype), torch.randn(2, 9).to(dtype)]
    residuals = [] if residual_dtype is None else [torch.zeros(2, 9, dtype=residual_dtype)]
    slots = [-1, 0 if residuals else -1]
    shards = [0, 15, 15, 3, 9, 20]
    numbers = ([0, 1], [0.1, 0.2], [0.5, 1.0], 2)
    return (
        *(params, residuals, slots, [], [], [], [], *numbers),
        *([], [], [], False, -7, law, [3, 4], shards, [], [-1, -1], None),
    )


def flat_arguments_of_an_update(dtype):
    params = [torch.randn(5, 3).to(dtype), torch.randn(2, 9).to(dtype)]
    masters, momenta = ([param.float() for param in params] for _ in range(2))
    dense = [torch.randn_like(param) for param in params]
    numbers = ([0, ~0, 1], [0.1, 0.2, 0.3], [], 2, [0.3, 0.1, 0.0], [0.9, 0.9], [-0.1, -0.2], True)
    shards = [0, 15, 15, 3, 9, 20]
    operands = (params, [], [-1, -1], masters, momenta, [], dense)
    return (*operands, *numbers, 7, "gauss16", [3, 4], shards, [], [-1, -1], None)


@pytest.mark.parametrize(
    "residual", [None, torch.int16, torch.int8], ids=["none", "split", "split8"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_perturb_passes_opcheck(dtype, residual):
    if residual is not None and dtype != torch.bfloat16:
        residual = torch.float16 if dtype == torch.float16 else None
    torch.library.opcheck(torch.ops.zokern.perturb_, flat_arguments(dtype, residual))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_update_passes_opcheck(dtype):
    torch.library.opcheck(torch.ops.zokern.perturb_, flat_arguments_of_an_update(dtype))


def test_a_sweep_into_outputs_passes_opcheck():
    params = [torch.randn(5, 3).bfloat16(), torch.randn(2, 9).bfloat16()]
    outs = [torch.empty_like(param) for param in params]
    numbers = ([0], [0.1], [], 1, [], [], [], False, 7, "gauss16", [3, 4])
    rows = ([torch.tensor([5, 1])], [-1, 0])
    operands = (params, [], [-1, -1], [], [], outs, [])
    arguments = (*operands, *numbers, [0, 15, 15, 3, 9, 20], *rows, 5)
    torch.library.opcheck(torch.ops.zokern.perturb_, arguments)


@pytest.mark.parametrize("law", zokern.noise.LAWS)
def test_sample_passes_opcheck(law):
    arguments = (law, 100, -3, 1, 2, 5, torch.device("cpu"))
    torch.library.opcheck(torch.ops.zokern.noise_sample, arguments)


def test_version_counters_go_up(backend):
    param, residual = torch.zeros(5, dtype=torch.bfloat16), torch.zeros(5, dtype=torch.int16)
    before = param._version, residual._version
    ops.perturb_([param], [0], [1.0], seed=0, residuals=[residual])
    assert param._version > before[0]
    assert residual._version > before[1]


def test_autograd_notices_the_change():
    weight = torch.ones(3, requires_grad=True)
    product = weight * weight
    ops.perturb_([weight], [0], [1.0], seed=0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_it_compiles():
    def move(x):
        operands = ([x], [], [-1], [], [], [], [])
        update = ([], [], [], False)
        torch.ops.zokern.perturb_(
            *operands, [0], [1.0], [], 1, *update, 3, "gauss16", [0], [0, 6, 6], [], [-1], None
        )
        return x + 1

    moved = torch.compile(move, backend="aot_eager")(torch.zeros(6))
    wanted = torch.zeros(6)
    ops.perturb_([wanted], [0], [1.0], seed=3)
    assert torch.equal(moved, wanted + 1)


def bad_operands():
    base = torch.zeros(8, 8)
    complex_base = torch.zeros(4, dtype=torch.complex64)
    yield "integer", torch.zeros(3, dtype=torch.int64), TypeError, r"params\[1\].*int64.*dtype"
    yield "float64", torch.zeros(3, dtype=torch.float64), TypeError, r"params\[1\].*float64"
    yield "complex", complex_base, TypeError, r"params\[1\].*complex64"
    yield "holes", base[:, ::2], ValueError, r"params\[1\].*holes"
    yield "overlapping", torch.zeros(3).expand(4, 3), ValueError, r"params\[1\].*overlapping"
    yield "sparse", base.to_sparse(), TypeError, r"params\[1\].*layout is torch.sparse_coo"
    yield "negated", complex_base.conj().imag, ValueError, r"params\[1\].*negated"
    yield "not a tensor", 3.0, TypeError, r"params\[1\] must be a tensor, not float"


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [pytest.param(*rest, id=name) for name, *rest in bad_operands()],
)
def test_what_cannot_be_swept_is_named_before_anything_is_written(backend, tensor, error, message):
    first = torch.ones(5)
    with pytest.raises(error, match=message):
        ops.perturb_([first, tensor], [0], [1.0], seed=0)
    assert torch.equal(first, torch.ones(5))


def test_shared_memory_is_refused():
    base = torch.zeros(10)
    with pytest.raises(ValueError, match=r"params\[0\] and params\[1\] share memory"):
        ops.perturb_([base[:6], base[5:]], [0], [1.0], seed=0)
    with pytest.raises(ValueError, match="share memory"):
        ops.perturb_([base, base], [0], [1.0], seed=0)
    ops.perturb_([base[:5], base[5:]], [0], [1.0], seed=0)


def half():
    return torch.zeros(4, 6, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("residual", "error", "message"),
    [
        (torch.zeros(4, 6, dtype=torch.int32), TypeError, "int16 or torch.int8"),
        (torch.zeros(6, 4, dtype=torch.int16), ValueError, "shape"),
        (torch.zeros(6, 4, dtype=torch.int16).t(), ValueError, "strides"),
    ],
)
def test_residuals_that_do_not_fit_are_refused(residual, error, message):
    param = half()
    with pytest.raises(error, match=message):
        ops.perturb_([param], [0], [1.0], seed=0, residuals=[residual])
    assert not param.any()


def test_float32_takes_no_residual():
    with pytest.raises(TypeError, match="takes no residual"):
        ops.perturb_(
            [torch.zeros(3)], [0], [1.0], seed=0, residuals=[torch.zeros(3, dtype=torch.int16)]
        )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"draws": []}, ValueError, "draws is empty"),
        ({"draws": [-1]}, ValueError, r"draws\[0\] is -1, but there are 0 dense directions"),
        ({"draws": [1 << 32]}, ValueError, r"below 2\^32"),
        ({"draws": [0.5]}, TypeError, r"draws\[0\] must be an integer"),
        ({"coeffs": [1.0, 2.0]}, ValueError, "coeffs must be 1 numbers"),
        ({"coeffs": [[1.0]]}, ValueError, "for each of the 2 params"),
        ({"coeffs": [float("nan")]}, ValueError, "finite"),
        ({"coeffs": [None]}, ValueError, "finite float32"),
        ({"coeffs": [1e39]}, ValueError, "finite float32"),
        ({"coeffs": ["a"]}, ValueError, "coeffs must be 1 numbers"),
        ({"scales": [float("inf")]}, ValueError, "scales must be finite"),
        ({"seed": 1 << 64}, ValueError, "seed"),
        ({"law": "gauss"}, ValueError, "'gauss' gives no directions"),
        ({"law": "uniform32"}, ValueError, "gives no directions"),
        ({"tensor_ids": [1]}, ValueError, "tensor_ids has 1 entries for 2 params"),
        ({"tensor_ids": [1, 1 << 56]}, ValueError, r"below 2\^56"),
        ({"shards": [None]}, ValueError, "shards has 1 entries"),
        ({"shards": [None, (0, 2)]}, ValueError, r"shards\[1\] must be"),
        ({"shards": [None, (0, 2, 2)]}, ValueError, "row_length"),
        ({"shards": [None, (0, 1, 0)]}, ValueError, "row_stride"),
        ({"shards": [None, (-1, 3, 3)]}, ValueError, r"shards\[1\]"),
        ({"shards": [None, (1 << 35, 3, 3)]}, ValueError, "gauss16 counts elements below"),
        ({"residuals": [None]}, ValueError, "residuals has 1 entries"),
        ({"params": torch.zeros(2, 3)}, TypeError, "list of tensors"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_before_anything_is_written(arguments, error, message):
    params = [torch.zeros(3), torch.zeros(3)]
    with pytest.raises(error, match=message):
        ops.perturb_(**({"params": params, "draws": [0], "coeffs": [1.0], "seed": 0} | arguments))
    assert not any(param.any() for param in params)


def test_the_operator_is_as_safe_as_its_door():
    plain = ([], [-1], [], [], [], [], [0], [1.0], [], 1, [], [], [], False, 3, "gauss16", [0])
    with pytest.raises(ValueError, match="shards"):
        torch.ops.zokern.perturb_([torch.zeros(3)], *plain, [0, 6], [], [-1], None)
    with pytest.raises(ValueError, match="row_of must name each of the 1 rows once"):
        torch.ops.zokern.perturb_([torch.zeros(3)], *plain, [0, 3, 3], [torch.zeros(1)], [-1], None)
    with pytest.raises(TypeError, match="dtype"):
        torch.ops.zokern.perturb_([torch.zeros(3).int()], *plain, [0, 3, 3], [], [-1], None)


def test_the_choice_of_backend():
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        zokern.use_backend("cuda")
    with zokern.use_backend("reference"):
        assert zokern.backends.chosen() == "reference"
    assert zokern.backends.chosen() is None
    zokern.use_backend("reference")
    assert zokern.backends.chosen() == "reference"


def test_an_unknown_backend_in_the_environment_is_an_error(monkeypatch):
    monkeypatch.setenv("ZOKERN_BACKEND", "cuda")
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        ops.perturb_([torch.zeros(3)], [0], [1.0], seed=0)
