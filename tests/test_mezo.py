"""MeZO as its users meet it."""

import copy
import functools
import math
import os
import pickle
import signal
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import zokern
from tests.conftest import choose
from tests.same_bits import same_bits
from zokern import noise, ops


def make_model(dtype: torch.dtype = torch.float32, small: bool = False) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model: nn.Module = nn.Linear(10, 3)
    if not small:
        model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 3))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.3)
    return model.to(dtype)


INPUTS = torch.randn(32, 10, generator=torch.Generator().manual_seed(1))
LABELS = INPUTS[:, :3].argmax(dim=1)


def loss_of(model: nn.Module):
    dtype = next(model.parameters()).dtype
    return lambda: nn.functional.cross_entropy(model(INPUTS.to(dtype)).float(), LABELS)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(same_bits(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def train(model: nn.Module, steps: int, **arguments) -> zokern.MeZO:
    optimizer = zokern.MeZO(model.named_parameters(), **({"lr": 0.01, "seed": 3} | arguments))
    for _ in range(steps):
        optimizer.step(loss_of(model))
    return optimizer


def dense_mezo(model: nn.Module, steps: int, *, lr, eps, seed, wd=0.0, samples=1) -> None:
    """The published formula, in float64 with noise as tensors."""
    named = {name: param.detach().double() for name, param in model.named_parameters()}
    shadow = copy.deepcopy(model).double()

    def loss_at(draw, coeff):
        moved = {
            name: theta
            + coeff
            * noise.sample(
                "gauss16", theta.numel(), seed=seed, draw=draw, tensor_id=noise.tensor_id(name)
            )
            .double()
            .view(theta.shape)
            for name, theta in named.items()
        }
        logits = torch.func.functional_call(shadow, moved, (INPUTS.double(),))
        return nn.functional.cross_entropy(logits, LABELS).item()

    for step in range(steps):
        draws = range(step * samples, (step + 1) * samples)
        gradient = [(loss_at(k, eps) - loss_at(k, -eps)) / (2 * eps) for k in draws]
        for name, theta in named.items():
            update = torch.zeros_like(theta)
            for k, g in zip(draws, gradient, strict=True):
                z = noise.sample(
                    "gauss16", theta.numel(), seed=seed, draw=k, tensor_id=noise.tensor_id(name)
                )
                update += g / samples * z.double().view(theta.shape)
            named[name] = (1 - lr * wd) * theta - lr * update
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(named[name])


@pytest.mark.parametrize(
    "arguments",
    [{}, {"samples": 3}, {"weight_decay": 0.1}, {"fuse_next": True}],
    ids=["plain", "samples", "weight_decay", "fuse_next"],
)
def test_fifty_steps_are_the_formula_to_float32_rounding(arguments):
    model, dense = make_model(), make_model()
    train(model, 50, **arguments).flush()
    dense_mezo(
        dense,
        50,
        lr=0.01,
        eps=1e-3,
        seed=3,
        wd=arguments.get("weight_decay", 0.0),
        samples=arguments.get("samples", 1),
    )
    for got, wanted, start in zip(
        weights(model), weights(dense), weights(make_model()), strict=True
    ):
        # The loss is a float32: its rounding, divided by 2·eps, is the error of a step.
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-3 * (wanted - start).abs().max())


RUNS = {
    "plain": {},
    "all": {"samples": 2, "fuse_next": True, "weight_decay": 0.1},
    "bf16-inplace": {"precision": "inplace"},
    "bf16-split8": {"precision": "split8"},
    "bf16-split": {"precision": "split"},
}


def dtype_of(name: str) -> torch.dtype:
    return torch.bfloat16 if name.startswith("bf16") else torch.float32


def run_of(name: str) -> nn.Module:
    """Fifty steps; ten in half precision."""
    model = make_model(dtype_of(name))
    train(model, 50 if dtype_of(name) == torch.float32 else 10, **RUNS[name])
    return model


@functools.cache
def reference_run(name: str) -> nn.Module:
    with zokern.use_backend("reference"):
        return run_of(name)


@pytest.mark.parametrize("name", RUNS)
def test_fifty_steps_are_the_same_bits_on_every_backend(native_backend, name):
    assert same_weights(run_of(name), reference_run(name))


@pytest.mark.parametrize("name", RUNS)
def test_steps_are_the_same_bits_on_triton(name, monkeypatch):
    models = [make_model(dtype_of(name), small=True) for _ in range(2)]
    for backend, model in zip(("triton", "reference"), models, strict=True):
        choose(backend, monkeypatch)
        train(model, 5, **RUNS[name])
    assert same_weights(*models)


def test_it_learns():
    model = make_model()
    before = loss_of(model)().item()
    train(model, 300, lr=0.02)
    assert loss_of(model)().item() < 0.7 * before


def test_it_maximizes():
    model = make_model()
    before = loss_of(model)().item()
    train(model, 50, maximize=True)
    assert loss_of(model)().item() > before


@pytest.mark.parametrize(
    ("arguments", "sweeps"),
    [
        ({}, 3),
        ({"fuse_next": True}, 2),
        ({"samples": 4}, 9),
        ({"samples": 4, "fuse_next": True}, 8),
    ],
    ids=["two-sided", "fused", "4-samples", "4-samples-fused"],
)
def test_sweeps_and_evaluations_of_a_step(monkeypatch, arguments, sweeps):
    model = make_model()
    optimizer = train(model, 1, **arguments)
    calls = {"sweeps": 0, "evaluations": 0}
    backend = zokern.backends.select(torch.device("cpu"))
    sweep = backend.perturb_

    def counted(argument):
        calls["sweeps"] += 1
        sweep(argument)

    def closure():
        calls["evaluations"] += 1
        return loss_of(model)()

    monkeypatch.setattr(backend, "perturb_", counted)
    for _ in range(5):
        optimizer.step(closure)
    assert calls == {
        "sweeps": 5 * sweeps,
        "evaluations": 5 * 2 * arguments.get("samples", 1),
    }


def test_a_step_returns_the_mean_loss_and_keeps_the_details():
    model = make_model()
    seen = []

    def closure():
        seen.append(loss_of(model)())
        return seen[-1]

    optimizer = train(model, 4, samples=2)
    loss = optimizer.step(closure)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(sum(seen).item() / 4)
    assert optimizer.last.losses == tuple(x.item() for x in seen)
    assert optimizer.last.draws == (8, 9)
    for k in range(2):
        g = (seen[2 * k] - seen[2 * k + 1]).item() / 2e-3 / 2
        assert optimizer.last.projected_gradient[k] == pytest.approx(g, rel=1e-3)
    assert not optimizer.last.skipped


def test_a_closure_may_return_a_float():
    model, other = make_model(), make_model()
    train(model, 3)
    optimizer = zokern.MeZO(other.named_parameters(), lr=0.01, seed=3)
    for _ in range(3):
        optimizer.step(lambda: loss_of(other)().item())
    assert same_weights(model, other)


def perturbed_part(model: nn.Module, name: str, groups=None) -> torch.Tensor:
    """How far the first point of a step is from rest, for one weight."""
    before = dict(model.named_parameters())[name].detach().clone()
    optimizer = zokern.MeZO(groups or model.named_parameters(), lr=0.0, eps=1.0, seed=5)
    next(iter(optimizer.ask()))
    return dict(model.named_parameters())[name].detach() - before


@pytest.fixture
def single_process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_freezing_grouping_and_wrapping_do_not_change_the_noise(single_process_group):
    with torch.no_grad():
        wanted = perturbed_part(make_model(), "3.weight")

        frozen = make_model()
        frozen[0].requires_grad_(False)
        assert torch.equal(perturbed_part(frozen, "3.weight"), wanted)

        grouped = make_model()
        groups = zokern.param_groups(grouped, weight_decay=0.1)[::-1]
        assert torch.equal(perturbed_part(grouped, "3.weight", groups), wanted)

        alone = make_model()
        assert torch.equal(
            perturbed_part(alone, "3.weight", [("3.weight", alone[3].weight)]), wanted
        )

        parallel = nn.parallel.DistributedDataParallel(make_model())
        assert torch.equal(perturbed_part(parallel, "module.3.weight"), wanted)

        compiled = torch.compile(make_model())
        assert torch.equal(perturbed_part(compiled, "_orig_mod.3.weight"), wanted)


def test_frozen_parameters_stand_still_and_can_be_thawed():
    model = make_model()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = train(model, 3, fuse_next=True)
    assert torch.equal(model[0].weight, before)
    model[0].requires_grad_(True)
    model[3].requires_grad_(False)
    head = model[3].weight.detach()
    optimizer.step(loss_of(model))
    optimizer.flush()
    assert not torch.equal(model[0].weight, before)
    settled = head.clone()
    optimizer.step(loss_of(model))
    optimizer.flush()
    assert torch.equal(head, settled)


def test_everything_frozen_is_an_error():
    model = make_model().requires_grad_(False)
    with pytest.raises(RuntimeError, match="every parameter is frozen"):
        train(model, 1)


def test_groups_have_their_own_lr_and_weight_decay():
    model = make_model()
    groups = [
        {"params": [("a", model[0].weight)], "lr": 0.0, "weight_decay": 0.5},
        {"params": [("b", model[3].weight)], "lr": 0.1, "weight_decay": 0.5},
        {"params": [("c", model[3].bias)], "lr": 0.1},
    ]
    optimizer = zokern.MeZO(groups, lr=1.0, seed=1)
    before = [model[0].weight.clone(), model[3].weight.clone(), model[3].bias.clone()]
    points = list(optimizer.ask())
    optimizer.tell([2.0, 2.0])
    assert points[0].draws == points[1].draws == (0,)
    torch.testing.assert_close(model[0].weight, before[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(model[3].weight, before[1] * 0.95, rtol=0, atol=1e-6)
    torch.testing.assert_close(model[3].bias, before[2], rtol=0, atol=1e-6)


def test_param_groups_spares_biases_and_norms():
    class RMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))

    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), RMSNorm(), nn.Embedding(3, 4))
    model.append(model[0])
    decaying, others = zokern.param_groups(model, weight_decay=0.1)
    assert [name for name, _ in decaying["params"]] == ["0.weight", "3.weight"]
    assert [name for name, _ in others["params"]] == ["0.bias", "1.weight", "1.bias", "2.weight"]
    assert decaying["weight_decay"] == 0.1
    assert others["weight_decay"] == 0.0


def test_schedulers_change_the_learning_rate():
    model = make_model()
    optimizer = zokern.MeZO(model.named_parameters(), lr=1.0, seed=3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(loss_of(model))
        scheduler.step()
    before = weights(model)
    optimizer.step(loss_of(model))
    for a, b in zip(weights(model), before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_the_learning_rate_may_be_a_tensor():
    model, other = make_model(), make_model()
    train(model, 3)
    train(other, 3, lr=torch.tensor(0.01, dtype=torch.float64))
    assert same_weights(model, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "arguments", [{}, {"fuse_next": True, "samples": 2}], ids=["plain", "fused"]
)
@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_a_run_goes_on_bit_for_bit(tmp_path, dtype, arguments, how):
    model = make_model(dtype)
    optimizer = train(model, 5, **arguments)
    # Taking the state brings the weights to rest, which with fuse_next is a sweep of its own.
    state = optimizer.state_dict()
    if how == "state_dict":
        torch.save({"model": model.state_dict(), "optimizer": state}, tmp_path / "state.pt")
        saved = torch.load(tmp_path / "state.pt")
        resumed_model = make_model(dtype)
        resumed_model.load_state_dict(saved["model"])
        resumed = zokern.MeZO(resumed_model.named_parameters(), lr=1.0)
        resumed.load_state_dict(saved["optimizer"])
    elif how == "pickle":
        resumed_model, resumed = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        resumed_model, resumed = copy.deepcopy((model, optimizer))
    for which, opt in ((model, optimizer), (resumed_model, resumed)):
        for _ in range(5):
            opt.step(loss_of(which))
        opt.flush()
    assert same_weights(model, resumed_model)
    for a, b in zip(model.parameters(), resumed_model.parameters(), strict=True):
        ours, theirs = optimizer.state[a], resumed.state[b]
        assert ours.keys() == theirs.keys()
        assert all(same_bits(ours[key], theirs[key]) for key in ours)


def test_copies_made_while_displaced_go_on_too():
    model = make_model()
    optimizer = train(model, 3, fuse_next=True)
    resumed_model, resumed = copy.deepcopy((model, optimizer))
    for which, opt in ((model, optimizer), (resumed_model, resumed)):
        opt.step(loss_of(which))
        opt.flush()
    assert same_weights(model, resumed_model)


def test_state_of_another_optimizer_is_refused():
    model = make_model()
    optimizer = train(model, 1)
    with pytest.raises(ValueError, match="not a state of MeZO: it has no eps"):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=1.0).state_dict())
    with pytest.raises(ValueError, match="not a state of MeZO"):
        optimizer.load_state_dict({})
    renamed = zokern.MeZO([(f"x.{n}", p) for n, p in make_model().named_parameters()], lr=1.0)
    with pytest.raises(ValueError, match="other names"):
        optimizer.load_state_dict(renamed.state_dict())


def test_distributed_checkpoint_takes_the_state(single_process_group):
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model = make_model(torch.bfloat16)
    optimizer = train(model, 3)
    state = get_optimizer_state_dict(model, optimizer)
    resumed_model = copy.deepcopy(model)
    resumed = zokern.MeZO(resumed_model.named_parameters(), lr=1.0)
    set_optimizer_state_dict(resumed_model, resumed, state)
    for which, opt in ((model, optimizer), (resumed_model, resumed)):
        opt.step(loss_of(which))
    assert same_weights(model, resumed_model)


def test_add_param_group():
    model = make_model()
    optimizer = zokern.MeZO(model[3].named_parameters(prefix="3"), lr=0.01, seed=3, fuse_next=True)
    optimizer.step(loss_of(model))
    optimizer.add_param_group({"params": list(model[0].named_parameters(prefix="0")), "lr": 0.02})
    before = model[0].weight.clone()
    optimizer.step(loss_of(model))
    optimizer.flush()
    assert not torch.equal(model[0].weight, before)
    assert optimizer.param_groups[1]["step"] == 2
    assert optimizer.param_groups[1]["seed"] == 3


@pytest.mark.parametrize("key", ["eps", "samples", "seed", "law", "precision"])
def test_settings_of_the_run_in_a_group_are_refused(key):
    model = make_model()
    with pytest.raises(ValueError, match=f"{key} belongs to the optimizer"):
        zokern.MeZO([{"params": model.parameters(), key: 1}], lr=0.1)


def test_ask_and_tell_are_a_step():
    model, other = make_model(), make_model()
    train(model, 4, samples=2)
    optimizer = zokern.MeZO(other.named_parameters(), lr=0.01, seed=3, samples=2)
    for _ in range(4):
        losses = []
        for point in optimizer.ask():
            with torch.no_grad():
                losses.append(loss_of(other)())
            assert point.coeffs in {(1e-3,), (-1e-3,)}
        result = optimizer.tell(losses)
        assert result is optimizer.last
    assert same_weights(model, other)


def test_a_point_is_all_that_another_holder_of_the_weights_needs():
    model, remote = make_model(), make_model()
    optimizer = zokern.MeZO(model.named_parameters(), lr=0.01, seed=3)
    point = next(iter(optimizer.ask()))
    ops.perturb_(
        list(remote.parameters()),
        point.draws,
        point.coeffs,
        seed=point.seed,
        law=point.law,
        tensor_ids=[noise.tensor_id(name) for name, _ in remote.named_parameters()],
    )
    assert same_weights(model, remote)


def test_ask_and_tell_in_the_wrong_order():
    model = make_model()
    before = weights(model)
    optimizer = zokern.MeZO(model.named_parameters(), lr=0.01, seed=3)
    with pytest.raises(RuntimeError, match="no step is open"):
        optimizer.tell([1.0, 2.0])
    for _ in optimizer.ask():
        pass
    with pytest.raises(RuntimeError, match="tell the losses of the last ask first"):
        optimizer.ask()
    with pytest.raises(RuntimeError, match="a step is open"):
        optimizer.step(loss_of(model))
    with pytest.raises(ValueError, match="got 3 losses for 2 points"):
        optimizer.tell([1.0, 2.0, 3.0])
    optimizer.flush()
    for a, b in zip(weights(model), before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert optimizer.run["step"] == 0


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("eps", 0, "eps must be positive and finite in float32, not 0"),
        ("eps", "small", "eps must be positive"),
        ("samples", 0, "samples must be an integer of at least 1"),
        ("lr", math.nan, "lr must be finite in float32, not nan"),
        ("lr", 1e39, "lr must be finite in float32, not 1e"),
        ("weight_decay", math.inf, "weight_decay must be finite"),
        ("momentum", 1.5, "momentum must be at least 0 and below 1, not 1.5"),
    ],
)
@pytest.mark.parametrize("fuse_next", [False, True])
def test_what_is_written_into_groups_between_steps_is_checked(setting, value, said, fuse_next):
    model = make_model()
    optimizer = zokern.MeZO(model.named_parameters(), lr=0.1, seed=3, fuse_next=fuse_next)
    optimizer.step(loss_of(model))
    optimizer.flush()
    before, good = weights(model), optimizer.run[setting]
    optimizer.run[setting] = value
    with pytest.raises(ValueError, match=said):
        optimizer.step(loss_of(model))
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    optimizer.run[setting] = good
    optimizer.step(loss_of(model))
    assert optimizer.run["step"] == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("fuse_next", [False, True])
def test_a_loss_that_is_not_finite_skips_the_update(bad, fuse_next):
    model = make_model(torch.bfloat16)
    optimizer = zokern.MeZO(model.named_parameters(), lr=0.1, seed=3, fuse_next=fuse_next)
    before = weights(model)
    with pytest.warns(RuntimeWarning, match="not finite"):
        loss = optimizer.step(lambda: torch.tensor(bad))
    assert not math.isfinite(loss.item())
    assert optimizer.last.skipped
    assert optimizer.run["skipped"] == 1
    assert optimizer.run["draws"] == 1
    optimizer.flush()
    for a, b in zip(weights(model), before, strict=True):
        assert torch.equal(a, b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: bad)
    assert optimizer.run["skipped"] == 2


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
@pytest.mark.parametrize("fuse_next", [False, True])
def test_a_closure_that_raises_leaves_everything_as_it_was(error, at, fuse_next):
    model = make_model(torch.bfloat16)
    optimizer = train(model, 2, samples=2, fuse_next=fuse_next)
    optimizer.flush()
    before, run = weights(model), dict(optimizer.run)
    calls = iter(range(4))

    def closure():
        if next(calls) == at:
            raise error
        return loss_of(model)()

    with pytest.raises(error):
        optimizer.step(closure)
    for a, b in zip(weights(model), before, strict=True):
        assert torch.equal(a, b)
    assert {key: optimizer.run[key] for key in ("step", "draws")} == {
        key: run[key] for key in ("step", "draws")
    }
    optimizer.step(loss_of(model))


def test_ctrl_c_during_a_sweep_waits_for_its_end(monkeypatch):
    model = make_model(torch.bfloat16)
    optimizer = train(model, 1)
    before = weights(model)
    backend = zokern.backends.select(torch.device("cpu"))
    perturb_ = backend.perturb_

    def interrupted(sweep):
        perturb_(sweep)
        os.kill(os.getpid(), signal.SIGINT)
        assert True, "bytecode at which the interrupt would arrive"

    monkeypatch.setattr(backend, "perturb_", interrupted)
    # A process in the background may ignore the signal.
    before_the_test = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(loss_of(model))
    signal.signal(signal.SIGINT, before_the_test)
    monkeypatch.undo()
    optimizer.flush()
    for a, b in zip(weights(model), before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (torch.tensor(1.0, dtype=torch.bfloat16), "the loss is torch.bfloat16.*float32"),
        (torch.tensor(1.0, dtype=torch.float16), "the loss is torch.float16.*float32"),
        (torch.ones(3), r"scalar loss, not a tensor of shape \(3,\)"),
        (None, "scalar loss, not NoneType"),
        (np.float16(1.0), "float32 scalar loss, not float16"),
        ("1.0", "scalar loss, not str"),
    ],
)
def test_losses_that_are_no_float32_scalar_are_refused(loss, message):
    model = make_model()
    before = weights(model)
    optimizer = zokern.MeZO(model.named_parameters(), lr=0.1)
    with pytest.raises(TypeError, match=message):
        optimizer.step(lambda: loss)
    for a, b in zip(weights(model), before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_losses_that_never_differ_are_warned_about_once():
    model = make_model()
    optimizer = zokern.MeZO(model.named_parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: 1.0)
        optimizer.step(lambda: 1.0)
    with pytest.warns(RuntimeWarning, match="equal bit for bit") as warned:
        optimizer.step(lambda: 1.0)
    assert [warning.filename for warning in warned] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            optimizer.step(lambda: 1.0)


def test_an_outer_autocast_sees_the_moved_weights():
    model = make_model()
    optimizer = zokern.MeZO(model.named_parameters(), lr=0.0, eps=0.1, seed=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_of(model)()
        optimizer.step(loss_of(model))
    plus, minus = optimizer.last.losses
    assert plus != minus


def test_no_closure():
    optimizer = zokern.MeZO(make_model().parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"MeZO.step needs a closure"):
        optimizer.step()


def test_a_grad_scaler_is_refused():
    optimizer = zokern.MeZO(make_model().parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="without a GradScaler"):
        scaler.step(optimizer, lambda: 1.0)


def test_integers_of_numpy_are_integers():
    optimizer = zokern.MeZO(
        make_model().parameters(), lr=0.1, seed=np.int64(3), samples=np.int32(2)
    )
    assert (optimizer.run["seed"], optimizer.run["samples"]) == (3, 2)
    assert type(optimizer.run["seed"]) is int


def test_a_seed_comes_from_torchs_generator():
    seeds = []
    for _ in range(2):
        torch.manual_seed(7)
        seeds += [zokern.MeZO(make_model().parameters(), lr=0.1).run["seed"] for _ in range(2)]
    assert seeds[0] != seeds[1]
    assert seeds[:2] == seeds[2:]


def test_the_module_given_is_saved_at_rest():
    model = make_model()
    optimizer = train(model, 3, fuse_next=True, module=model)
    saved = model.state_dict()
    assert optimizer._displacement.at_rest
    assert all(torch.equal(saved[name], param) for name, param in model.named_parameters())
    copy.deepcopy(model).state_dict()
    pickle.loads(pickle.dumps(model)).state_dict()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be at least 0"),
        ({"lr": math.nan}, ValueError, "lr must be at least 0"),
        ({"eps": 0.0}, ValueError, "eps must be positive"),
        ({"eps": math.inf}, ValueError, "eps must be positive and finite"),
        ({"eps": 1e-60}, ValueError, "eps must be positive and finite in float32"),
        ({"eps": "1e-3"}, ValueError, "eps must be positive"),
        ({"lr": "1e-3"}, ValueError, "lr must be at least 0 and finite, not '1e-3'"),
        ({"weight_decay": "0.1"}, ValueError, "weight_decay must be at least 0"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be at least 0"),
        ({"samples": 0}, ValueError, "samples must be an integer of at least 1"),
        ({"samples": 1.5}, ValueError, "samples must be an integer"),
        ({"seed": -1}, ValueError, "seed must be an integer"),
        ({"seed": 1 << 64}, ValueError, r"below 2\^64"),
        ({"law": "uniform32"}, ValueError, "law must be one of gauss16"),
        ({"precision": "half"}, ValueError, "precision must be one of auto"),
        ({"module": 3}, TypeError, "module must be an nn.Module, not int"),
        ({"params": []}, ValueError, "empty parameter list"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        zokern.MeZO(**({"params": make_model().parameters(), "lr": 0.1} | arguments))


def test_parameters_that_cannot_move_are_named():
    with pytest.raises(TypeError, match=r"w is torch.float64"):
        zokern.MeZO([("w", nn.Parameter(torch.zeros(3, dtype=torch.float64)))], lr=0.1)
    with pytest.raises(ValueError, match="w is not dense"):
        zokern.MeZO([("w", nn.Parameter(torch.zeros(3, 1).expand(3, 4)))], lr=0.1)
    with pytest.raises(ValueError, match=r"split8.*bfloat16"):
        zokern.MeZO([nn.Parameter(torch.zeros(3).half())], lr=0.1, precision="split8")


def test_names_with_one_noise_are_refused():
    twins = [("module.w", nn.Parameter(torch.zeros(3))), ("w", nn.Parameter(torch.zeros(3)))]
    with pytest.raises(ValueError, match=r"'module.w' and 'w' have the same tensor id"):
        zokern.MeZO(twins, lr=0.1)


def test_the_bytes_that_precision_adds_are_logged(caplog):
    with caplog.at_level("INFO", logger="zokern"):
        zokern.MeZO([nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))], lr=0.1)
    assert "precision='auto' adds 2.00 bytes per parameter" in caplog.text
