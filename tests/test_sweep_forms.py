"""Sweeps with dense directions, masters, updates, outputs: every backend computes the same bits."""

import functools
import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import zokern
from tests.same_bits import same_bits
from tests.test_perturb import DIRECTIONS, SPECIAL_VALUES, STORAGES, clone, make_operands
from zokern import ops
from zokern.backends.reference.storage import load

# How each form of a sweep differs from a plain one: masters, outs, rows that somebody picked, the
# number of dense directions, where rest lies, the update, and stochastic rounding.
FORMS = {
    "dense": {"dense": 2},
    "master evaluates": {"masters": True, "rest": 0},
    "master updates": {"masters": True, "rest": 2},
    "master stays": {"masters": True, "rest": 4},
    "momentum": {"update": "momentum", "rest": 2},
    "momentum, all": {"update": "momentum", "rest": 4, "dense": 2},
    "sign": {"update": "sign", "rest": 2},
    "signed momentum": {"update": "signed momentum", "rest": 3, "dense": 1},
    "everything": {"masters": True, "update": "momentum", "rest": 3, "dense": 2},
    "outs": {"outs": True},
    "outs, dense": {"outs": True, "dense": 1},
    "rows": {"rows": True, "outs": True},
    "rows, dense": {"rows": True, "outs": True, "dense": 1},
    "rounding": {"rounding": True, "update": "momentum", "rest": 2, "dense": 1},
    "rounding, outs": {"rounding": True, "rows": True, "outs": True},
    "one evaluates": {"draws": 1, "masters": True, "rest": 0},
    "one updates": {"draws": 1, "masters": True, "update": "momentum", "rest": 1},
    "one, rounding": {"draws": 1, "rounding": True, "rest": 1},
    "one dense": {"draws": 1, "dense": 1, "rest": 1},
}


@dataclass
class Case:
    params: list[Tensor]
    residuals: list[Tensor | None]
    masters: list[Tensor] | None
    momenta: list[Tensor] | None
    outs: bool
    arguments: dict
    update: ops.Update | None

    def run(self) -> list[Tensor]:
        """The operands that may be written, after the sweep, which starts from copies of them."""
        params, residuals = clone(self.params), clone(self.residuals)
        masters = None if self.masters is None else clone(self.masters)
        momenta = None if self.momenta is None else clone(self.momenta)
        update = self.update
        if update is not None:
            update = replace(update, momenta=momenta)
        outs = None
        if self.outs:
            outs = [torch.full(p.shape, 77, dtype=p.dtype, device=p.device) for p in params]
        operands = {"residuals": residuals, "masters": masters, "outs": outs, "update": update}
        ops.perturb_(params, **operands, **self.arguments)
        written = [*params, *residuals, *(masters or []), *(momenta or []), *(outs or [])]
        return [tensor for tensor in written if tensor is not None]


def pick_rows(params: list[Tensor], shards: list, choose: random.Random) -> tuple[list, list]:
    """Shards and rows of them, but for every fourth tensor, which stays as it is."""
    shards, rows = list(shards), [None] * len(params)
    for i, param in enumerate(params):
        if i % 4 != 2:
            length = param.shape[-1] if param.numel() > 0 and param.dim() > 0 else 1
            stride = choose.choice([length, length + 8, length + -length % 8, length + 3])
            shards[i] = (choose.choice([0, 8, 5]), length, stride)
            numbers = [choose.randrange(1000) for _ in range(param.numel() // length)]
            rows[i] = torch.tensor(numbers, dtype=torch.int64)
    return shards, rows


def make_case(law: str, storage: str, form: dict, seed: object = 0) -> Case:
    choose = random.Random(f"{law}{storage}{form}{seed}")
    params, residuals, shards = make_operands(storage)
    picked = None
    if form.get("rows"):
        shards, picked = pick_rows(params, shards, choose)
    count = len(params)
    generator = torch.Generator().manual_seed(choose.getrandbits(32))

    def like(param: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        values = torch.randn(param.shape, generator=generator)
        return torch.empty_like(param, dtype=dtype).copy_(values)

    masters = [like(param) for param in params] if form.get("masters") else None
    if masters is not None:
        residuals = [None] * count
        masters[-1] = params[-1].float()
    dense = [
        [
            like(param, choose.choice([torch.float32, torch.bfloat16, torch.float16]))
            for param in params
        ]
        for _ in range(form.get("dense", 0))
    ]
    draws = [choose.getrandbits(32) for _ in range(form.get("draws", 4))]
    for j in range(len(dense)):
        draws[(1 + j) % len(draws)] = ~j
    kind = form.get("update", "")
    momenta = [like(param) for param in params] if "momentum" in kind else None

    def rows() -> list[list[float]]:
        return [[choose.uniform(-0.1, 0.1) for _ in draws] for _ in params]

    update = None
    if kind:
        update = ops.Update(
            gradient=rows(),
            decays=[choose.uniform(0, 1) for _ in params],
            steps=[choose.uniform(-0.1, 0.1) for _ in params],
            momenta=momenta,
            sign="sign" in kind,
        )
    arguments = {
        "draws": draws,
        "coeffs": rows(),
        "scales": [[choose.choice([1.0, 0.9]) for _ in draws] for _ in params],
        "seed": choose.getrandbits(64),
        "law": law,
        "tensor_ids": [choose.getrandbits(56) for _ in params],
        "shards": shards,
        "rows": picked,
        "dense": dense,
        "rest": form.get("rest", 4),
        "rounding": choose.getrandbits(32) if form.get("rounding") else None,
    }
    outs = form.get("outs", False)
    return Case(params, residuals, masters, momenta, outs, arguments, update)


def has_form(storage: str, form: dict) -> bool:
    """Not all that is kept can be rounded stochastically."""
    kept = storage.partition("-")[0] if form.get("outs") else storage
    return not form.get("rounding") or kept in ("bf16", "fp16", "bf16-split8")


# The other laws differ in the noise alone.
CASES = [
    ("gauss16", storage, name)
    for storage in STORAGES
    for name, form in FORMS.items()
    if has_form(storage, form)
] + [
    (law, storage, form)
    for law in DIRECTIONS
    if law != "gauss16"
    for storage, form in (
        ("fp32", "momentum"),
        ("bf16", "everything"),
        ("bf16", "rows"),
        ("bf16", "rounding"),
    )
]


@pytest.mark.parametrize(("law", "storage", "form"), CASES)
def test_backends_agree(native_backend, law, storage, form):
    """For Triton, which is slow, a test in test_triton_perturb.py goes through the forms."""
    got = make_case(law, storage, FORMS[form]).run()
    wanted = swept_by_the_reference(law, storage, form)
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert same_bits(a, b), f"operand {i}"


@functools.cache
def swept_by_the_reference(law: str, storage: str, form: str) -> list[Tensor]:
    with zokern.use_backend("reference"):
        return make_case(law, storage, FORMS[form]).run()


def test_a_sweep_with_an_update_is_its_formula(backend):
    """m ← β·m + Σ g·z, θ ← (1 - lr·wd)·θ - lr·m, in float64 from the sampled noise."""
    theta, m = torch.randn(1000), torch.randn(1000)
    noise = [zokern.noise.sample("gauss16", 1000, seed=5, draw=d).double() for d in (0, 1)]
    update = ops.Update([0.3, -0.2], 0.9, -0.1, [m.clone()])
    got = theta.clone()
    ops.perturb_([got], [0, 1], [0.0, 0.0], seed=5, scales=[0.98, 1.0], update=update)
    wanted_m = 0.9 * m.double() + 0.3 * noise[0] - 0.2 * noise[1]
    assert torch.allclose(update.momenta[0].double(), wanted_m, atol=1e-6)
    assert torch.allclose(got.double(), 0.98 * theta.double() - 0.1 * wanted_m, atol=1e-6)


def test_a_master_is_only_read_before_rest(backend):
    master = torch.randn(1000)
    before = master.clone()
    param = torch.zeros(1000, dtype=torch.bfloat16)
    ops.perturb_([param], [3], [0.5], seed=1, masters=[master], rest=0)
    z = zokern.noise.sample("gauss16", 1000, seed=1, draw=3)
    assert torch.equal(master, before)
    assert torch.equal(param, (master + 0.5 * z).bfloat16())


def test_without_directions_a_master_is_copied(backend):
    """Bit for bit: also its negative zeros."""
    master = torch.tensor([*SPECIAL_VALUES, *torch.randn(3000).tolist()])
    param = torch.ones(len(master))
    ops.perturb_([param], [], [], seed=1, masters=[master], rest=0)
    assert same_bits(param, master)
    with pytest.raises(ValueError, match="draws is empty"):
        ops.perturb_([param], [], [], seed=1)


def test_a_momentum_may_be_a_direction_as_it_was(backend):
    """θ moves along the momentum of before, and the momentum is updated in the same sweep."""
    theta, m = torch.randn(500), torch.randn(500)
    got, momentum = theta.clone(), m.clone()
    update = ops.Update([0.0, 0.25], 0.5, 0.0, [momentum])
    ops.perturb_([got], [~0, 7], [2.0, 0.0], seed=1, dense=[[momentum]], update=update)
    z = zokern.noise.sample("gauss16", 500, seed=1, draw=7)
    assert torch.equal(got, theta + 2 * m)
    assert torch.allclose(momentum, 0.5 * m + 0.25 * z)


@pytest.mark.parametrize("storage", ["fp32", "bf16", "bf16-split8", "fp16-split"])
def test_what_goes_out_is_what_would_be_kept_rounded_once(backend, storage):
    """Out of place, and in place in float32, from the same values; what is read stays."""
    params, residuals, shards = make_operands(storage)
    arguments = {"draws": [3], "coeffs": [0.1], "seed": 1, "shards": shards}
    values = [load(param, residual) for param, residual in zip(params, residuals, strict=True)]
    values, before = clone(values), clone([*params, *residuals])
    outs = [torch.empty(param.shape, dtype=param.dtype) for param in params]
    ops.perturb_(params, residuals=residuals, outs=outs, **arguments)
    ops.perturb_(values, **arguments)
    for a, b in zip([*params, *residuals], before, strict=True):
        assert a is b or same_bits(a, b)
    for out, value in zip(outs, values, strict=True):
        assert same_bits(out, value.to(out.dtype))


def test_params_that_are_only_read_may_have_holes_and_share_memory(backend):
    base, outs = torch.randn(10, 12), [torch.zeros(10, 6), torch.zeros(12)]
    version, base_version = outs[0]._version, base._version
    ops.perturb_([base[:, ::2], base[3]], [0], [1.0], seed=3, outs=outs)
    noise = [
        zokern.noise.sample("gauss16", out.numel(), seed=3, draw=0, tensor_id=i).view(out.shape)
        for i, out in enumerate(outs)
    ]
    assert torch.equal(outs[0], base[:, ::2] + noise[0])
    assert torch.equal(outs[1], base[3] + noise[1])
    assert outs[0]._version > version
    assert base._version == base_version


ROWS = torch.tensor([0, 1])
BAD_FORMS = {
    "rest": ({"rest": 3}, ValueError, "rest must be between 0 and the 1 directions"),
    "slot": ({"draws": [~0]}, ValueError, "there are 0 dense directions"),
    "shape": ({"dense": [[torch.zeros(3)]], "draws": [~0]}, ValueError, r"dense\[0\]\[0\].*shape"),
    "dtype": ({"dense": [[torch.zeros(4).double()]]}, TypeError, r"dense\[0\]\[0\].*dtype"),
    "too many": ({"dense": [[torch.zeros(4)]] * 3}, ValueError, "2 dense directions, not 3"),
    "master dtype": ({"masters": [torch.zeros(4).half()]}, TypeError, r"masters\[0\].*float32"),
    "momentum shape": (
        {"update": ops.Update([1.0], 0.9, 0.1, [torch.zeros(5)])},
        ValueError,
        r"momenta\[0\].*shape",
    ),
    "gradient": ({"update": ops.Update([1.0, 2.0], 0.9, 0.1)}, ValueError, "gradient must be 1"),
    "update": ({"update": ops.Update([1.0], 0.9, 0.1), "rest": 0}, ValueError, "at least 1"),
    "rows": ({"rows": []}, ValueError, "rows has 0 entries for 1 params"),
    "row dtype": ({"rows": [ROWS.int()], "shards": [(0, 2, 2)]}, TypeError, r"rows\[0\].*int64"),
    "row shape": (
        {"rows": [ROWS[:, None]], "shards": [(0, 2, 2)]},
        ValueError,
        r"rows\[0\].*one dimension",
    ),
    "row count": (
        {"rows": [ROWS], "shards": [(0, 4, 4)]},
        ValueError,
        r"rows\[0\].*rows of 4 elements",
    ),
    "row stride": (
        {"rows": [ROWS[:1]], "shards": [(0, 4, 3)]},
        ValueError,
        "row_stride be at least row_length",
    ),
    "row bound": (
        {"rows": [ROWS[:1]], "shards": [((8 << 32) - 3, 4, 4)]},
        ValueError,
        "gauss16 counts elements below",
    ),
    "rounding": ({"rounding": -1}, ValueError, "rounding must be at least 0"),
    "rounding float32": ({"rounding": 0}, ValueError, r"params\[0\].*is rounded stochastically"),
    "rounding and master": (
        {"rounding": 0, "masters": [torch.zeros(4)]},
        ValueError,
        "with masters nothing is rounded stochastically",
    ),
    "outs": ({"outs": []}, ValueError, "outs has 0 entries for 1 params"),
    "out dtype": ({"outs": [torch.zeros(4).half()]}, TypeError, r"outs\[0\].*be torch.float32"),
    "out shape": ({"outs": [torch.zeros(2, 2)]}, ValueError, r"outs\[0\].*shape"),
    "out strides": ({"outs": [torch.zeros(8)[::2]]}, ValueError, r"outs\[0\].*contiguous"),
    "out and master": (
        {"outs": [torch.zeros(4)], "masters": [torch.zeros(4)]},
        ValueError,
        "no masters and no update",
    ),
    "out and update": (
        {"outs": [torch.zeros(4)], "update": ops.Update([1.0], 0.9, 0.1)},
        ValueError,
        "no masters and no update",
    ),
}


@pytest.mark.parametrize("name", BAD_FORMS)
def test_what_is_wrong_is_said_before_anything_is_written(name):
    changes, error, message = BAD_FORMS[name]
    param = torch.zeros(4)
    arguments = {"draws": [0], "coeffs": [1.0], "seed": 0} | changes
    with pytest.raises(error, match=message):
        ops.perturb_([param], **arguments)
    assert not param.any()


def test_memory_may_be_shared_only_by_what_is_read():
    theta, direction = torch.zeros(4), torch.ones(8)
    ops.perturb_([theta], [~0, ~1], [1.0, 1.0], seed=0, dense=[[direction[:4]], [direction[2:6]]])
    assert torch.equal(theta, torch.full((4,), 2.0))
    with pytest.raises(ValueError, match="share memory"):
        ops.perturb_([theta], [~0], [1.0], seed=0, dense=[[theta]])
    with pytest.raises(ValueError, match="share memory"):
        ops.perturb_([direction[:4]], [0], [1.0], seed=0, masters=[direction[3:7]], rest=0)
    with pytest.raises(ValueError, match=r"params\[0\] and outs\[0\] share memory"):
        ops.perturb_([direction[:4]], [0], [1.0], seed=0, outs=[direction[3:7]])
    with pytest.raises(ValueError, match=r"outs\[0\] and outs\[1\] share memory"):
        ops.perturb_([theta, theta], [0], [1.0], seed=0, outs=[direction[:4], direction[:4]])
