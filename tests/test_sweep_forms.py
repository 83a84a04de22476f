"""Sweeps with dense directions, masters and updates: every backend computes the same bits."""

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

# How each form of a sweep differs from a plain one: masters, the number of dense directions,
# where rest lies, and the update.
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
}


@dataclass
class Case:
    params: list[Tensor]
    residuals: list[Tensor | None]
    masters: list[Tensor] | None
    momenta: list[Tensor] | None
    arguments: dict
    update: ops.Update | None

    def run(self) -> list[Tensor]:
        """The written operands after the sweep, which starts from copies of them."""
        params, residuals = clone(self.params), clone(self.residuals)
        masters = None if self.masters is None else clone(self.masters)
        momenta = None if self.momenta is None else clone(self.momenta)
        update = self.update
        if update is not None:
            update = replace(update, momenta=momenta)
        ops.perturb_(params, residuals=residuals, masters=masters, update=update, **self.arguments)
        written = [*params, *residuals, *(masters or []), *(momenta or [])]
        return [tensor for tensor in written if tensor is not None]


def make_case(law: str, storage: str, form: dict, seed: object = 0) -> Case:
    choose = random.Random(f"{law}{storage}{form}{seed}")
    params, residuals, shards = make_operands(storage)
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
    draws = [choose.getrandbits(32) for _ in range(4)]
    for j in range(len(dense)):
        draws[1 + j] = ~j
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
        "dense": dense,
        "rest": form.get("rest", 4),
    }
    return Case(params, residuals, masters, momenta, arguments, update)


# The other laws differ in the noise alone.
CASES = [("gauss16", storage, form) for storage in STORAGES for form in FORMS] + [
    (law, storage, form)
    for law in DIRECTIONS
    if law != "gauss16"
    for storage, form in (("fp32", "momentum"), ("bf16", "everything"))
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
