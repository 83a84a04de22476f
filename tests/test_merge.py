"""Merges of models: the numbers of mergekit, of peft and of the paper; what is wrong is named."""

import warnings

import pytest
import torch
from torch import nn

import zokern
from tests import merge_peers
from tests.conftest import FAST, choose, each_of
from tests.same_bits import same_bits
from zokern import merge

SHAPES = {"embed": (97, 32), "layer.weight": (64, 33), "layer.bias": (64,), "norm": (1,)}
WEIGHTS, DENSITIES = [0.7, 0.4, 1.2], [0.3, 0.55, 0.1]
State = dict[str, torch.Tensor]


# Triton has a test of its own.
backend = each_of(FAST)


@pytest.fixture(autouse=True)
def _few_at_a_time(monkeypatch):
    """So that some tensors are merged together and some alone."""
    monkeypatch.setattr("zokern.merge.recipe.ELEMENTS", 2500)


def state(seed: int, dtype: torch.dtype = torch.float32, near: State | None = None) -> State:
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, shape in SHAPES.items():
        value = 0.1 * torch.randn(shape, generator=generator)
        result[name] = (value if near is None else near[name].float() + value / 10).to(dtype)
    return result


def states(dtype: torch.dtype = torch.float32, count: int = 3) -> tuple[State, list[State]]:
    base = state(0, dtype)
    return base, [state(m + 1, dtype, base) for m in range(count)]


def assert_close(got: State, wanted: State, terms: list[State], ulps: float = 2) -> None:
    """Within ulps of the largest term of each tensor."""
    assert list(got) == list(wanted)
    for name, tensor in got.items():
        assert tensor.dtype == wanted[name].dtype
        largest = max(float(term[name].abs().max()) for term in [wanted, *terms])
        ulp = largest * torch.finfo(tensor.dtype).eps
        assert (tensor.float() - wanted[name].float()).abs().max() <= ulps * ulp, name


def assert_same(got: State, wanted: State) -> None:
    assert list(got) == list(wanted)
    for name, tensor in got.items():
        assert same_bits(tensor, wanted[name]), name


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@DTYPES
def test_linear_is_mergekits(backend, dtype):
    base, models = states(dtype)
    wanted = merge_peers.with_mergekit("linear", None, models, weight=WEIGHTS)
    assert_close(merge.linear(models, weights=WEIGHTS), wanted, models, ulps=1)
    wanted = merge_peers.with_mergekit("linear", None, models, weight=WEIGHTS, normalize=False)
    assert_close(merge.linear(models, weights=WEIGHTS, normalize=False), wanted, models, ulps=1)
    given = {"weight": WEIGHTS, "lambda": 0.8}
    wanted = merge_peers.with_mergekit("task_arithmetic", base, models, **given)
    got = merge.linear(models, base=base, weights=WEIGHTS, lambda_=0.8)
    assert_close(got, wanted, [base, *models], ulps=1)
    wanted = merge_peers.with_mergekit("task_arithmetic", base, models, normalize=True, **given)
    got = merge.linear(models, base=base, weights=WEIGHTS, lambda_=0.8, normalize=True)
    assert_close(got, wanted, [base, *models], ulps=1)


@DTYPES
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_ties_is_mergekits(backend, monkeypatch, dtype, normalize, rescale):
    base, models = states(dtype)
    # Of equal magnitudes, many in half precision, mergekit keeps any, zokern those that come first.
    argsort = torch.argsort
    monkeypatch.setattr(torch, "argsort", lambda *a, **b: argsort(*a, **b, stable=True))
    given = {"weight": WEIGHTS, "density": DENSITIES, "lambda": 0.8}
    options = {"normalize": normalize, "rescale": rescale}
    wanted = merge_peers.with_mergekit("ties", base, models, **given, **options)
    got = merge.ties(models, base=base, weights=WEIGHTS, density=DENSITIES, lambda_=0.8, **options)
    assert_close(got, wanted, [base, *models], ulps=1 if dtype != torch.float32 else 2)


def test_ties_is_mergekits_bit_for_bit_where_nothing_is_rescaled(backend):
    base, models = states()
    wanted = merge_peers.with_mergekit("ties", base, models, weight=WEIGHTS, density=DENSITIES)
    assert_same(merge.ties(models, base=base, weights=WEIGHTS, density=DENSITIES), wanted)


@DTYPES
@pytest.mark.parametrize("method", ["dare", "dare_ties"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_dare_is_mergekits(backend, monkeypatch, dtype, method, normalize, rescale):
    base, models = states(dtype)
    given = {"weight": WEIGHTS, "density": DENSITIES, "lambda": 0.8}
    options = {"normalize": normalize, "rescale": rescale}
    name = "dare_linear" if method == "dare" else method
    with merge_peers.our_masks(list(base), DENSITIES, 5, monkeypatch):
        wanted = merge_peers.with_mergekit(name, base, models, **given, **options)
    got = getattr(merge, method)(
        models, base=base, weights=WEIGHTS, density=DENSITIES, lambda_=0.8, seed=5, **options
    )
    assert_close(got, wanted, [base, *models], ulps=1 if dtype != torch.float32 else 2)


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.filterwarnings("ignore:The density")
def test_peft_merges_adapters(backend, monkeypatch, density, sign):
    _, adapters = states()
    densities = [density] * 3
    given = {"weights": WEIGHTS, "semantics": "peft"}
    wanted = merge_peers.with_peft("task_arithmetic", adapters, WEIGHTS)
    assert_close(merge.linear(adapters, **given), wanted, adapters)
    given["density"] = density
    wanted = merge_peers.with_peft("ties", adapters, WEIGHTS, density, sign)
    got = merge.ties(adapters, majority_sign=sign, **given)
    assert_same(got, wanted)
    with merge_peers.our_masks(list(adapters[0]), densities, 5, monkeypatch):
        wanted = merge_peers.with_peft("dare_linear", adapters, WEIGHTS, density)
    assert_close(merge.dare(adapters, seed=5, **given), wanted, [wanted])
    with merge_peers.our_masks(list(adapters[0]), densities, 5, monkeypatch):
        wanted = merge_peers.with_peft("dare_ties", adapters, WEIGHTS, density, sign)
    got = merge.dare_ties(adapters, seed=5, majority_sign=sign, **given)
    assert_close(got, wanted, [wanted])


def test_peft_over_a_base(backend):
    base, models = states()
    deltas = [{name: model[name] - base[name] for name in base} for model in models]
    delta = merge_peers.with_peft("ties", deltas, WEIGHTS, 0.3, "total")
    wanted = {name: base[name] + 0.5 * delta[name] for name in base}
    got = merge.ties(models, base=base, weights=WEIGHTS, density=0.3, lambda_=0.5, semantics="peft")
    assert_same(got, wanted)


@pytest.mark.parametrize("how", ["mean", "sum", "max"])
@pytest.mark.parametrize("density", [0.01, 0.2, 0.9])
def test_ties_is_the_papers(backend, how, density):
    base, models = states()
    for model in models[:2]:
        model["embed"] = base["embed"] + (model["embed"] - base["embed"]).sign() / 8
    base["layer.bias"] = torch.zeros(64)
    # Sums of exactly 0, which the majority decides.
    models[0]["layer.bias"], models[1]["layer.bias"] = torch.ones(64), -torch.ones(64)
    models[2]["layer.bias"] = torch.zeros(64)
    for shift in (0.05, -0.05):
        shifted = [model | {"layer.weight": model["layer.weight"] + shift} for model in models]
        wanted = merge_peers.with_paper(base, shifted, density, how, 0.7)
        got = merge.ties(
            shifted, base=base, density=density, lambda_=0.7, semantics="ties", combine=how
        )
        assert_close(got, wanted, [base, *shifted], ulps=1)
        # One of those that cancel each other out decides.
        assert bool((got["layer.bias"] > 0).all()) == (shift > 0)


def test_defaults(backend):
    base, models = states(count=2)
    mean = {name: (models[0][name] + models[1][name]) / 2 for name in base}
    assert_close(merge.linear(models), mean, [])
    total = {n: base[n] + ((models[0][n] - base[n]) + (models[1][n] - base[n])) for n in base}
    assert_same(merge.linear(models, base=base), total)
    assert_same(merge.ties([models[0]], base=base, density=1), _moved(base, models[0]))
    assert_same(merge.dare([models[0]], base=base, density=1), _moved(base, models[0]))


def _moved(base: State, model: State) -> State:
    return {name: base[name] + (model[name] - base[name]) for name in base}


def test_a_seed_says_which_elements_are_kept(backend):
    base, models = states()
    given = {"base": base, "density": 0.5}
    assert_same(merge.dare(models, seed=3, **given), merge.dare(models, seed=3, **given))
    other = merge.dare(models, seed=4, **given)
    assert not same_bits(other["embed"], merge.dare(models, seed=3, **given)["embed"])
    # Neither what else is merged nor the wrappers of the name count.
    part = [{"module.embed": model["embed"]} for model in models]
    alone = merge.dare(part, base={"embed": base["embed"]}, density=0.5, seed=3)
    assert same_bits(alone["embed"], merge.dare(models, seed=3, **given)["embed"])


def test_dtypes_may_differ(backend):
    base, models = states()
    halves = [{name: tensor.half() for name, tensor in model.items()} for model in models]
    got = merge.ties([models[0], halves[1]], base=base, density=0.4)
    with zokern.use_backend("reference"):
        assert_same(got, merge.ties([models[0], halves[1]], base=base, density=0.4))
    assert {tensor.dtype for tensor in got.values()} == {torch.float32}
    got = merge.linear([halves[0], models[1]], base=halves[2])
    assert {tensor.dtype for tensor in got.values()} == {torch.float16}


@pytest.mark.parametrize("semantics", ["mergekit", "peft", "ties"])
def test_triton_merges_the_same(monkeypatch, semantics):
    base, models = (
        {"w": torch.randn(5, 40).bfloat16(), "b": torch.randn(7)},
        [{"w": torch.randn(5, 40).bfloat16(), "b": torch.randn(7)} for _ in range(2)],
    )
    given = {"base": base, "density": 0.4, "weights": [0.3, 1.2], "semantics": semantics}
    methods = [merge.ties] if semantics == "ties" else [merge.ties, merge.dare_ties]
    results = []
    for name in ("triton", "reference"):
        choose(name, monkeypatch)
        results.append([method(models, **given) for method in methods])
    for got, wanted in zip(*results, strict=True):
        assert_same(got, wanted)


class Tied(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight


def test_modules_with_tied_weights():
    base, models = Tied(0), [Tied(1), nn.DataParallel(Tied(2))]
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    result = merge.ties(models, base=base, density=0.5)
    assert list(result) == list(base.state_dict())
    assert result["head.weight"] is result["embed.weight"]
    assert_same(base.state_dict(), before)
    base.load_state_dict(result)
    assert base.head.weight is base.embed.weight
    # A checkpoint may hold either of the names.
    part = {name: t for name, t in models[0].state_dict().items() if name != "embed.weight"}
    assert_same(merge.ties([part, models[1]], base=before_tied(before), density=0.5), result)


def before_tied(before: State) -> State:
    return before | {"head.weight": before["embed.weight"]}


def test_integers_are_copied_with_a_warning_where_they_differ():
    base, models = Tied(0), [Tied(1), Tied(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge.linear(models, base=base)
    models[1].norm.num_batches_tracked += 3
    base.norm.num_batches_tracked += 5
    with pytest.warns(
        UserWarning, match=r"differ between the models: norm.num_batches_tracked"
    ) as warned:
        assert merge.linear(models, base=base)["norm.num_batches_tracked"] == 5
    assert [warning.filename for warning in warned] == [__file__]
    with pytest.warns(UserWarning, match="from the first model"):
        assert merge.linear(models)["norm.num_batches_tracked"] == 0


def test_awkward_tensors(backend):
    base = {"t": torch.randn(8, 5).t(), "none": torch.empty(0, 3), "one": torch.tensor(2.0)}
    model = {name: tensor + 1 for name, tensor in base.items()}
    got = merge.ties([model], base=base, density=0.5)
    assert got["none"].shape == (0, 3)
    assert got["one"] == 3
    assert (got["t"] == base["t"]).sum() == 20
    big = {"w": torch.tensor([float("inf"), 1.0, -2.0])}
    assert merge.ties([big], density=0.4, semantics="peft")["w"].tolist() == [torch.inf, 0, 0]


def test_a_nan_is_passed_on_or_named(backend):
    base, models = states(count=2)
    models[1]["embed"][3, 4] = float("nan")
    got = merge.dare(models, base=base, density=1)
    assert got["embed"].isnan().sum() == 1
    for semantics in ("mergekit", "ties"):
        with pytest.raises(ValueError, match=r"embed of models\[1\], less the base, has NaN"):
            merge.ties(models, base=base, density=0.5, semantics=semantics)


def test_bad_arguments_are_named():
    base, models = states(count=2)
    lacking = {name: t for name, t in models[0].items() if name != "norm"}
    complex_ = base | {"norm": torch.zeros(1, dtype=torch.complex64)}
    given = {"base": base, "density": 0.5}
    for message, call in [
        ("models is empty", lambda: merge.linear([])),
        ("models must be a list", lambda: merge.linear(base)),
        (r"models\[1\] must be a module, a state dict or a path", lambda: merge.linear([base, 3])),
        (r"models\[0\]\['a'\] must be a tensor", lambda: merge.linear([{"a": 3}])),
        (r"models\[0\] has no tensors", lambda: merge.linear([{}])),
        ("weights must be one number or 2", lambda: merge.linear(models, weights=[1.0])),
        ("weights must be finite", lambda: merge.linear(models, weights=float("inf"))),
        ("cannot be normalized", lambda: merge.linear(models, weights=[1, -1])),
        ("density must be above 0", lambda: merge.ties(models, base=base, density=0)),
        ("density must be above 0", lambda: merge.dare(models, base=base, density=[0.5, 1.1])),
        ("density must be one number or 2",
         lambda: merge.ties(models, base=base, density=[0.5] * 3)),
        ("none of those that have random masks",
         lambda: merge.dare(models, semantics="ties", **given)),
        ("none of those that have TIES", lambda: merge.ties(models, semantics="all", **given)),
        ("normalize is an option of semantics='mergekit'",
         lambda: merge.ties(models, semantics="peft", normalize=True, **given)),
        ("combine is an option of semantics='ties'",
         lambda: merge.ties(models, combine="max", **given)),
        ("majority_sign must be", lambda: merge.ties(
            models, semantics="peft", majority_sign="some", **given)),
        ("give base=", lambda: merge.ties(models, density=0.5)),
        ("seed must be at least 0", lambda: merge.dare(models, seed=-1, **given)),
        ("lambda_ must be finite", lambda: merge.linear(models, lambda_=float("nan"))),
        (r"models\[0\] has no 'norm'", lambda: merge.linear([lacking], base=base)),
        (r"base has no 'norm', which models\[0\] has", lambda: merge.linear(models, base=lacking)),
        (r"norm has the shape \(1,\) in base, \(2,\) in models\[0\]",
         lambda: merge.linear([models[0] | {"norm": torch.zeros(2)}], base=base)),
        ("norm is torch.complex64: float32", lambda: merge.linear([complex_, complex_])),
        ("norm is torch.float64: float32",
         lambda: merge.linear([base | {"norm": torch.zeros(1).double()}])),
        ("norm is torch.float32 in base, torch.int64 in models",
         lambda: merge.linear([base | {"norm": torch.zeros(1).long()}], base=base)),
        ("two tensors of the name 'a'",
         lambda: merge.linear([{"a": torch.ones(1), "module.a": torch.zeros(1)}])),
        ("up to 64 models", lambda: merge.linear([base] * 65)),
    ]:  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=message):
            call()
