"""The zeroth-order methods: each is its formula, in the evaluations and sweeps that it promises."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import zokern
from tests.zo import METHODS, CountOps, loss_of, make_model, same, vectors, watched, weights
from zokern import noise

EVERY_METHOD = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def directions(model: nn.Module, draw: int, law: str = "gauss16", seed: int = 3) -> list:
    """The noise of a draw, for each parameter, in float64."""
    return [
        noise.sample(law, p.numel(), seed=seed, draw=draw, tensor_id=noise.tensor_id(name))
        .double()
        .view(p.shape)
        for name, p in model.named_parameters()
    ]


def combination(parts: list[tuple[float, list]]) -> list:
    return [
        sum(c * z for (c, _), z in zip(parts, zs, strict=True))
        for zs in zip(*(z for _, z in parts), strict=True)
    ]


class Dense:
    """A method computed densely in float64, but for the losses, which the optimizer has seen."""

    def __init__(self, model: nn.Module, groups: list[dict], law: str = "gauss16") -> None:
        self.model, self.groups, self.law = model, groups, law
        self.theta = [p.detach().double().clone() for p in model.parameters()]
        self.momentum = [torch.zeros_like(t) for t in self.theta]

    def z(self, draw: int) -> list:
        return directions(self.model, draw, self.law)

    def apply(self, gradient: list, *, momentum: float = 0.0, sign: bool = False) -> None:
        for i, (g, group) in enumerate(zip(gradient, self.groups, strict=True)):
            step = gradient[i]
            if momentum:
                self.momentum[i] = step = momentum * self.momentum[i] + g
            step = step.sign() if sign else step
            direction = 1 if group["maximize"] else -1
            decay = 1 - group["lr"] * group["weight_decay"]
            self.theta[i] = decay * self.theta[i] + direction * group["lr"] * step

    def check(self, tolerance: float = 2e-6) -> None:
        for i, (theta, param) in enumerate(zip(self.theta, self.model.parameters(), strict=True)):
            scale = theta.abs().max().clamp(min=1)
            error = (param.double() - theta).abs().max() / scale
            assert error < tolerance, f"parameter {i}: {error:.2g}"
            # Rounding must not add up over the steps.
            self.theta[i] = param.detach().double().clone()


def two_groups(model: nn.Module, maximize: bool) -> tuple[list[dict], list[dict]]:
    """Groups for the optimizer, and the settings of each parameter."""
    settings = [
        {"lr": 0.02, "weight_decay": 0.1, "maximize": maximize},
        {"lr": 0.005, "weight_decay": 0.0, "maximize": maximize},
    ]
    named = list(model.named_parameters())
    chosen = [[n for n in named if n[1].ndim > 1], [n for n in named if n[1].ndim <= 1]]
    groups = [{"params": p, **s} for p, s in zip(chosen, settings, strict=True)]
    return groups, [settings[0 if p.ndim > 1 else 1] for _, p in named]


def two_sided(eps: float, plus: float, minus: float) -> float:
    return (plus - minus) / (2 * eps)


def mezo_gradient(dense: Dense, losses: list, step: int, state: dict) -> list:
    draws = [2 * step, 2 * step + 1]
    return combination(
        [
            (two_sided(1e-3, losses[2 * k], losses[2 * k + 1]) / 2, dense.z(draw))
            for k, draw in enumerate(draws)
        ]
    )


def gv_gradient(dense: Dense, losses: list, step: int, state: dict) -> list:
    m, maximize = 4, dense.groups[0]["maximize"]
    fresh = m if "best" not in state else m - 1
    first = state.get("next", 0)
    pool = [state["best"]] if "best" in state else []
    pool += range(first, first + fresh)
    order = [d for _, d in sorted(zip(losses[:m], pool, strict=True), reverse=maximize)]
    state.update(best=order[0], next=first + fresh)
    v = combination(
        [(1 / 2, dense.z(d)) for d in order[:2]] + [(-1 / 2, dense.z(d)) for d in order[2:]]
    )
    g = two_sided(1e-3, losses[m], losses[m + 1])
    return [g * x for x in v]


def greedy_gradient(dense: Dense, losses: list, step: int, state: dict) -> list:
    pool = losses[:3]
    best = (max if dense.groups[0]["maximize"] else min)(range(3), key=pool.__getitem__)
    g = two_sided(1e-3, pool[best], losses[3])
    return [g * z for z in dense.z(3 * step + best)]


def fzoo_gradient(dense: Dense, losses: list, step: int, state: dict) -> list:
    at_rest, moved = losses[0], torch.tensor(losses[1:], dtype=torch.float64)
    parts = [
        (((loss - at_rest) / (1e-3 * 5)).item(), dense.z(5 * step + i))
        for i, loss in enumerate(moved)
    ]
    return [g / moved.std().item() for g in combination(parts)]


def conmezo_gradient(dense: Dense, losses: list, step: int, state: dict) -> list:
    n, m = dense.z(step), state.setdefault("m", [torch.zeros_like(t) for t in dense.theta])
    norm = math.sqrt(sum((x * x).sum().item() for x in m))
    d = sum(t.numel() for t in dense.theta)
    z = n
    if norm > 0:
        z = [
            math.sqrt(d) * math.cos(1.35) * x / norm + math.sin(1.35) * y
            for x, y in zip(m, n, strict=True)
        ]
    gradient = [two_sided(1e-3, *losses) * x for x in z]
    state["m"] = [0.95 * x + 0.05 * g for x, g in zip(m, gradient, strict=True)]
    return gradient


def zopro_gradient(dense: Dense, losses: list, step: int, state: dict) -> list:
    gamma = 1 - 1e-3 - step / 50
    given = vectors(dense.model)
    z = []
    for (name, _), n in zip(dense.model.named_parameters(), dense.z(step), strict=True):
        p, r = (given[key][name].double() for key in ("previous_update", "reward_delta"))
        v = r / r.norm()
        n = n - (v * n).sum() * v
        n = n * p.norm() / (n.norm() + 1e-8)
        z.append(gamma * p + math.sqrt(1 - gamma**2) * n)
    return [two_sided(1e-3, *losses) * x for x in z]


FORMULAS = {
    "mezo": (zokern.MeZO, {"samples": 2}, mezo_gradient),
    "gv": (zokern.MeZOGV, {"candidates": 4}, gv_gradient),
    "greedy": (zokern.MeZOGreedy, {"candidates": 3}, greedy_gradient),
    "fzoo": (zokern.FZOO, {"candidates": 5}, fzoo_gradient),
    "conmezo": (zokern.ConMeZO, {}, conmezo_gradient),
    "zopro": (zokern.ZOPrO, {"total_steps": 50}, zopro_gradient),
}
RULES = {
    "sgd": {},
    "momentum": {"momentum": 0.9},
    "sign": {"sign": True},
    "signed momentum": {"momentum": 0.5, "sign": True},
}


@pytest.mark.parametrize("maximize", [False, True], ids=["min", "max"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", FORMULAS)
def test_a_step_is_its_formula(name, rule, maximize):
    cls, arguments, formula = FORMULAS[name]
    if cls is zokern.ConMeZO and rule != "sgd":
        with pytest.raises(ValueError, match="ConMeZO does not take"):
            cls(make_model().named_parameters(), 0.1, **RULES[rule])
        return
    model = make_model()
    groups, settings = two_groups(model, maximize)
    if cls is zokern.ZOPrO:
        arguments = {**arguments, **vectors(model)}
    optimizer = cls(groups, 0.1, 1e-3, seed=3, **RULES[rule], **arguments)
    dense = Dense(model, settings, law=optimizer.run["law"])
    state: dict = {}
    with watched(loss_of(model)) as (closure, seen):
        for step in range(4):
            seen.clear()
            optimizer.step(closure)
            dense.apply(formula(dense, list(seen), step, state), **RULES[rule])
            # A sign may differ where the estimate is 0 to rounding, which it is nowhere here.
            dense.check(tolerance=2e-5 if cls is zokern.FZOO else 3e-6)


@EVERY_METHOD
@pytest.mark.parametrize("precision", ["inplace", "master"])
@pytest.mark.parametrize("fuse_next", [False, True], ids=["", "fused"])
def test_sweeps_and_evaluations_of_a_step(method, precision, fuse_next):
    if fuse_next and method.fused_sweeps is None:
        with pytest.raises(ValueError, match="fuse_next"):
            method.make(make_model(), fuse_next=True)
        return
    model = make_model()
    optimizer = method.make(model, precision=precision, fuse_next=fuse_next)
    with watched(loss_of(model)) as (closure, seen):
        optimizer.step(closure)
        seen.clear()
        with CountOps() as counted:
            for _ in range(3):
                optimizer.step(closure)
    sweeps = method.fused_sweeps if fuse_next else method.sweeps
    assert len(seen) == 3 * method.evaluations
    assert counted.sweeps == 3 * sweeps
    directions_a_step = optimizer.run["samples"] if optimizer.DENSE else 0
    assert counted.reductions == 3 * directions_a_step


@EVERY_METHOD
def test_ask_and_tell_is_step(method):
    models = make_model(), make_model()
    by_step, by_hand = (method.make(model) for model in models)
    for _ in range(3):
        by_step.step(loss_of(models[0]))
        result = None
        while result is None:
            result = by_hand.tell([loss_of(models[1])() for _ in by_hand.ask()])
        assert result == by_step.last
    assert same(weights(models[0]), weights(models[1]))


def worker(pipe) -> None:
    """Another process: it has the base weights, and moves by draws and coefficients alone."""
    torch.set_num_threads(1)
    while (base := pipe.recv()) is not None:
        model = make_model()
        params = list(model.parameters())
        rest = [torch.tensor(values) for values in base]
        ids = [noise.tensor_id(name) for name, _ in model.named_parameters()]
        given = vectors(model)
        dense = [list(given[key].values()) for key in ("previous_update", "reward_delta")]
        while (message := pipe.recv()) is not None:
            kind, move = message
            same = {"seed": move.seed, "law": move.law, "tensor_ids": ids, "scales": move.scales}
            if any(draw < 0 for draw in move.draws):
                same["dense"] = dense
            to = (move.draws, move.coeffs)
            if kind == "point":
                zokern.ops.perturb_(params, *to, masters=rest, rest=0, **same)
                with torch.no_grad():
                    pipe.send(float(loss_of(model)()))
            else:
                zokern.ops.perturb_(rest, *to, **same)
        pipe.send([tensor.tolist() for tensor in rest])


@pytest.fixture(scope="module")
def other_process():
    """The pipe to a worker, which takes one run after the other."""
    context = torch.multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=worker, args=(theirs,))
    process.start()
    yield pipe
    pipe.send(None)
    process.join()


@pytest.mark.parametrize("name", ["mezo", "gv", "greedy", "fzoo", "zopro"])
def test_a_worker_moves_by_draws_and_coefficients(name, other_process):
    """One process holds the optimizer, the other one the base weights and nothing else."""
    method, pipe = METHODS[name], other_process
    model = make_model()
    optimizer = method.make(model, precision="master", weight_decay=0.1)
    pipe.send([tensor.tolist() for tensor in weights(model)])
    for _ in range(3):
        result = None
        while result is None:
            losses = []
            for move in optimizer.ask():
                pipe.send(("point", move))
                losses.append(pipe.recv())
                assert losses[-1] == float(loss_of(model)().detach())
            result = optimizer.tell(losses)
        pipe.send(("update", result.update))
    pipe.send(None)
    rest = [torch.tensor(values) for values in pipe.recv()]
    assert same(rest, weights(model))


FUSABLE = [
    pytest.param(method, fuse_next, id=f"{name}{', fused' * fuse_next}")
    for name, method in METHODS.items()
    for fuse_next in (False, True)
    if not (fuse_next and method.fused_sweeps is None)
]


@pytest.mark.parametrize(("method", "fuse_next"), FUSABLE)
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float32, "inplace"), (torch.bfloat16, "split"), (torch.bfloat16, "master")],
    ids=["fp32", "bf16-split", "bf16-master"],
)
def test_a_run_goes_on_from_its_state(tmp_path, method, fuse_next, dtype, precision):
    """Bit for bit, through a file, as the run that was not interrupted but saved there too."""
    model = make_model(dtype)
    optimizer = method.make(model, precision=precision, fuse_next=fuse_next, weight_decay=0.1)
    for _ in range(3):
        optimizer.step(loss_of(model))
    state = {"optimizer": optimizer.state_dict(), "model": model.state_dict()}
    torch.save(state, tmp_path / "state.pt")
    for _ in range(3):
        optimizer.step(loss_of(model))
    optimizer.flush()

    other = make_model(dtype)
    again = method.make(other, precision=precision, fuse_next=fuse_next, seed=99)
    loaded = torch.load(tmp_path / "state.pt")
    other.load_state_dict(loaded["model"])
    again.load_state_dict(loaded["optimizer"])
    for _ in range(3):
        again.step(loss_of(other))
    again.flush()
    assert same(weights(model), weights(other))
    assert again.run == {**optimizer.run, "params": again.run["params"]}


@EVERY_METHOD
def test_copies_go_on_alike(method):
    model = make_model()
    optimizer = method.make(model)
    optimizer.step(loss_of(model))
    copied_model, copied = copy.deepcopy((model, optimizer))
    pickled_model, pickled = pickle.loads(pickle.dumps((model, optimizer)))
    for m, o in ((model, optimizer), (copied_model, copied), (pickled_model, pickled)):
        o.step(loss_of(m))
    assert same(weights(model), weights(copied_model))
    assert same(weights(model), weights(pickled_model))


@EVERY_METHOD
def test_a_loss_that_is_not_finite_skips_the_update(method):
    model = make_model()
    optimizer = method.make(model, precision="master", weight_decay=0.1)
    optimizer.step(loss_of(model))
    before, draws = weights(model), optimizer.run["draws"]
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step(lambda: torch.tensor(math.nan))
    assert same(weights(model), before)
    assert optimizer.run["skipped"] == 1
    assert optimizer.run["draws"] > draws
    if isinstance(optimizer, zokern.ZOPrO):
        assert optimizer.run["advances"] == 2
    optimizer.step(loss_of(model))
    assert not same(weights(model), before)


@pytest.mark.parametrize("name", ["gv", "fzoo", "zopro", "conmezo", "momentum"])
def test_backends_agree(name, kernel_backend):
    method = METHODS[name]
    models = [make_model(), make_model()]
    # Triton's interpreter takes its time for every tensor.
    trained = [model[-1] if kernel_backend == "triton" else model for model in models]
    optimizers = [method.make(module, precision="master") for module in trained]
    for _ in range(2):
        losses = []
        for model, optimizer, backend in zip(models, optimizers, (None, "reference"), strict=True):
            with zokern.use_backend(backend):
                optimizer.step(loss_of(model))
            losses.append(optimizer.last.losses)
        assert losses[0] == losses[1]
    assert same(weights(models[0]), weights(models[1]))


def cos2_times_d(make, d: int, steps: int) -> float:
    """Mean squared cosine between the estimate and the gradient of a linear loss, times d."""
    slope = torch.randn(d, generator=torch.Generator().manual_seed(0)).double()
    weight = nn.Parameter(torch.zeros(d))
    optimizer = make([("weight", weight)])
    total = 0.0
    for _ in range(steps):
        before = weight.detach().double()
        optimizer.step(lambda: weight.detach().double() @ slope)
        moved = weight.detach().double() - before
        cosine = (moved @ slope) / (moved.norm() * slope.norm())
        total += (cosine**2).item()
    return d * total / steps


# What theory says, and the steps after which the sampling error of the mean is 2.2 to 2.7 per cent:
# the more candidates, the less cosines scatter.
ALIGNMENTS = {
    "mezo": (zokern.MeZO, {}, 1.00, 3000),
    "gv 2": (zokern.MeZOGV, {"candidates": 2, "history": False}, 1.00, 3000),
    "gv 4": (zokern.MeZOGV, {"candidates": 4, "history": False}, 2.10, 1100),
    "gv 8": (zokern.MeZOGV, {"candidates": 8, "history": False}, 4.55, 600),
    "greedy 2": (zokern.MeZOGreedy, {"candidates": 2}, 1.00, 3000),
    "greedy 4": (zokern.MeZOGreedy, {"candidates": 4}, 1.55, 1700),
    "greedy 8": (zokern.MeZOGreedy, {"candidates": 8}, 2.40, 900),
}


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_alignment_with_the_gradient(name):
    """Within five per cent of theory."""
    cls, arguments, wanted, steps = ALIGNMENTS[name]
    got = cos2_times_d(lambda p: cls(p, lr=1.0, eps=1.0, seed=1, **arguments), 1024, steps)
    assert got == pytest.approx(wanted, rel=0.05)


def test_draws_are_taken_in_order():
    model = make_model()
    gv = METHODS["gv"].make(model)
    points = [[p.draws[0] for p in gv.ask()]]
    gv.tell([0.4, 0.1, 0.3, 0.2])
    assert list(next(gv.ask()).draws) == [1, 3, 2, 0]  # the elite, then the others
    gv.flush()
    optimizer = METHODS["gv"].make(make_model())
    for _ in range(3):
        points.append([p.draws[0] for p in optimizer.ask()])
        optimizer.tell([0.4, 0.1, 0.3, 0.2])
        list(optimizer.ask())
        optimizer.tell([0.2, 0.1])
    # The best of each step comes back: draw 1, the second of the first pool, and so on.
    assert points == [[0, 1, 2, 3], [0, 1, 2, 3], [1, 4, 5, 6], [4, 7, 8, 9]]
    for name, draws in (("greedy", 3), ("fzoo", 8), ("zopro", 1), ("mezo, 3 samples", 3)):
        optimizer = METHODS[name].make(make_model())
        for step in range(3):
            assert optimizer.run["draws"] == draws * step
            optimizer.step(loss_of(make_model()))


def test_points_of_several_groups_have_one_row():
    model = make_model()
    groups, _ = two_groups(model, maximize=False)
    optimizer = zokern.MeZO(groups, 0.1, seed=1)
    moves = list(optimizer.ask())
    assert [move.coeffs for move in moves] == [(1e-3,), (-1e-3,)]
    assert moves[0].scales is None
    update = optimizer.tell([1e-3, 0.0]).update
    assert [row[0] for row in update.coeffs] == pytest.approx([-0.01] * 2 + [-0.0025] * 4)
    assert update.scales[0] == (pytest.approx(1 - 0.02 * 0.1),)


@pytest.mark.parametrize("call", ["state_dict", "flush", "refresh"])
@pytest.mark.parametrize("precision", ["inplace", "master"])
def test_a_closure_does_not_change_the_optimizer(call, precision):
    model = make_model()
    optimizer = METHODS["mezo"].make(model, precision=precision)
    before = weights(model)

    def closure():
        getattr(optimizer, call)()
        return loss_of(model)()

    with pytest.raises(RuntimeError, match="while a step evaluates its closure"):
        optimizer.step(closure)
    for a, b in zip(weights(model), before, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    optimizer.step(loss_of(model))


@pytest.mark.parametrize("precision", ["inplace", "split", "master"])
@pytest.mark.parametrize("how", ["flush", "tell", "ask", "closure"])
def test_weights_loaded_in_the_middle_of_a_step_are_not_overwritten(precision, how):
    model, other = (make_model(torch.bfloat16) for _ in range(2))
    with torch.no_grad():
        for param in other.parameters():
            param.add_(1.0)
    optimizer = METHODS["mezo"].make(model, precision=precision)

    def load():
        model.load_state_dict(other.state_dict())
        raise KeyboardInterrupt

    if how == "closure":
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(load)
    else:
        points = optimizer.ask()
        next(points)
        if how == "tell":
            next(points)
        model.load_state_dict(other.state_dict())
        with pytest.raises(RuntimeError, match=r"stands displaced.*refresh\(\)"):
            {
                "flush": optimizer.flush,
                "tell": lambda: optimizer.tell([1.0, 1.1]),
                "ask": lambda: next(points),
            }[how]()
    assert same(weights(model), weights(other))
    optimizer.refresh()
    optimizer.step(loss_of(model))


def test_an_ask_that_is_over_moves_nothing():
    model = make_model()
    optimizer = METHODS["mezo"].make(model, precision="master")
    before = weights(model)
    points = optimizer.ask()
    next(points)
    optimizer.flush()
    with pytest.raises(RuntimeError, match="the step of this ask is over"):
        next(points)
    assert same(weights(model), before)


def test_all_points_are_visited_before_tell():
    optimizer = METHODS["mezo"].make(make_model())
    next(optimizer.ask())
    with pytest.raises(RuntimeError, match="at 1 of them"):
        optimizer.tell([1.0, 0.9])


def test_two_parameters_of_one_name_are_refused():
    a, b = nn.Linear(5, 7), nn.Linear(5, 7)
    with pytest.raises(ValueError, match="two parameters have the name 'weight'"):
        zokern.MeZO([{"params": a.named_parameters()}, {"params": b.named_parameters()}], 0.1)


def test_a_state_is_of_one_method():
    states = {name: METHODS[name].make(make_model()).state_dict() for name in ("gv", "fzoo")}
    for state in states.values():
        with pytest.raises(ValueError, match=r"not a state of MeZO, but of|has no"):
            METHODS["mezo"].make(make_model()).load_state_dict(state)
    bad = METHODS["mezo"].make(make_model()).state_dict()
    bad["param_groups"][0]["eps"] = 0.0
    with pytest.raises(ValueError, match="eps must be positive"):
        METHODS["mezo"].make(make_model()).load_state_dict(bad)
    wide = zokern.MeZO(nn.Linear(9, 9).named_parameters(), 0.1, precision="master").state_dict()
    narrow = zokern.MeZO(nn.Linear(3, 9).named_parameters(), 0.1, precision="master")
    with pytest.raises(ValueError, match="the state's master of weight has shape"):
        narrow.load_state_dict(wide)


def test_a_seed_changed_while_displaced_leads_back_to_rest():
    model = make_model()
    optimizer = METHODS["mezo"].make(model, eps=0.5, lr=0.0, fuse_next=True)
    before = weights(model)
    optimizer.step(loss_of(model))
    optimizer.param_groups[0]["seed"] = 99
    optimizer.flush()
    for a, b in zip(weights(model), before, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_conmezo_under_a_scheduler_that_cycles_momentum():
    model = make_model()
    optimizer = METHODS["conmezo"].make(model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=100)
    before = weights(model)
    for _ in range(20):
        optimizer.step(loss_of(model))
        scheduler.step()
    assert max((a - b).abs().max() for a, b in zip(weights(model), before, strict=True)) > 1e-3
    with pytest.raises(ValueError, match="does not take momentum"):
        zokern.ConMeZO([{"params": make_model().named_parameters(), "momentum": 0.9}], 0.1)


def test_the_elite_is_that_of_the_decimal_that_was_meant():
    for elite, m, count in ((0.57, 100, 57), (0.29, 100, 29), (0.58, 50, 29), (0.5, 5, 2)):
        optimizer = zokern.MeZOGV(make_model().parameters(), 0.1, candidates=m, elite=elite)
        assert optimizer._elite_count() == count


def test_equal_losses_prefer_the_earlier_draw():
    optimizer = METHODS["greedy"].make(make_model())
    list(optimizer.ask())
    optimizer.tell([0.5, 0.2, 0.2])
    point = next(optimizer.ask())
    assert point.draws == (1,)
    assert point.coeffs == (-1e-3,)


def test_fzoo_stands_still_where_losses_do_not_differ():
    model = make_model()
    optimizer = METHODS["fzoo"].make(model, precision="master")
    before = weights(model)
    optimizer.step(lambda: 1.0)
    assert same(weights(model), before)


def test_dropout_is_the_same_for_all_points_of_a_step():
    """Else the difference of two losses is the noise of dropout, 1/2ε times over."""

    def make():
        return nn.Sequential(make_model(), nn.Dropout(0.5))

    def projected(**arguments):
        model = make()
        optimizer = zokern.MeZO(model.named_parameters(), 0.0, seed=3, samples=20, **arguments)
        torch.manual_seed(5)
        optimizer.step(loss_of(model))
        return torch.tensor(optimizer.last.projected_gradient).norm(), torch.get_rng_state()

    common, after = projected()
    torch.manual_seed(5)
    loss_of(make())()
    assert torch.equal(after, torch.get_rng_state())
    without = zokern.MeZO((model := make_model()).named_parameters(), 0.0, seed=3, samples=20)
    without.step(loss_of(model))
    wanted = torch.tensor(without.last.projected_gradient).norm()
    assert 0.5 * wanted < common < 2 * wanted
    assert projected(common_random_numbers=False)[0] > 10 * wanted


def test_gradient_accumulation_is_a_closure_over_micro_batches():
    models = make_model(), make_model()
    whole, parts = (zokern.MeZO(m.named_parameters(), 0.01, seed=1) for m in models)
    from tests.zo import X, Y

    def accumulated():
        losses = [
            nn.functional.cross_entropy(models[1](x), y)
            for x, y in zip(X.split(16), Y.split(16), strict=True)
        ]
        return torch.stack(losses).mean()

    for _ in range(3):
        whole.step(loss_of(models[0]))
        parts.step(accumulated)
    for a, b in zip(weights(models[0]), weights(models[1]), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


class LastGood(zokern.MeZO):
    """A method of a user's own: keep going along the last direction while it helps."""

    STATE = {"direction": None}  # noqa: RUF012

    def _method(self, step):
        draw = self.run["direction"]
        if draw is None:
            (draw,) = step.take_draws(1)
        eps = self.run["eps"]
        plus, minus = yield [{draw: eps}, {draw: -eps}]
        g = (plus - minus) / (2 * eps)
        kept = draw if abs(g) > 0.1 else None
        return zokern.optim.Estimate({draw: g}, (plus, minus), {"direction": kept})


def test_a_method_of_ones_own_is_a_generator():
    model = make_model()
    optimizer = LastGood(model.named_parameters(), lr=0.05, momentum=0.5, seed=2)
    before = loss_of(model)()
    for _ in range(100):
        optimizer.step(loss_of(model))
    assert loss_of(model)() < before
    assert 0 < optimizer.run["draws"] < 100
    again = LastGood(make_model().named_parameters(), lr=0.05)
    again.load_state_dict(optimizer.state_dict())
    assert again.run["direction"] == optimizer.run["direction"]


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (zokern.MeZOGV, {"candidates": 1}, "candidates must be an integer of at least 2"),
        (zokern.MeZOGV, {"elite": 1.0}, "makes 2 of 2 candidates the elite"),
        (zokern.MeZOGV, {"elite": 0.1}, "makes 0 of 2 candidates the elite"),
        (zokern.MeZOGV, {"elite": "a"}, "elite must be a number between 0 and 1"),
        (zokern.MeZOGreedy, {"candidates": 2.5}, "candidates must be an integer"),
        (zokern.FZOO, {"candidates": 1}, "candidates must be an integer of at least 2"),
        (zokern.MeZO, {"momentum": 1.0}, "momentum must be at least 0 and below 1"),
        (zokern.MeZO, {"momentum": -0.1}, "momentum must be at least 0 and below 1"),
        (zokern.ConMeZO, {"beta": 1.0}, "beta must be at least 0 and below 1"),
        (zokern.ConMeZO, {"angle": 2.0}, "angle must be between 0 and π/2"),
    ],
)
def test_bad_arguments_are_refused(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(make_model().named_parameters(), 0.1, **arguments)


def test_candidates_are_ranked_by_one_maximize():
    model = make_model()
    groups = [{"params": [p], "maximize": i % 2 == 0} for i, p in enumerate(model.parameters())]
    with pytest.raises(ValueError, match="maximize must be the same in all groups"):
        zokern.MeZOGreedy(groups, 0.1)
    zokern.MeZO(groups, 0.1)
