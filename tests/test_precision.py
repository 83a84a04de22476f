"""How weights are kept: updates that arrive, restores that are exact, weights that others load."""

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import nn

import zokern
from tests.zo import METHODS, loss_of, make_model, same, weights
from zokern import noise


def value_of(optimizer: zokern.ZOOptimizer, weight: nn.Parameter) -> torch.Tensor:
    state = optimizer.state[weight]
    if "master" in state:
        return state["master"]
    if "residual" not in state:
        return weight.detach()
    unit = 256 if state["residual"].dtype == torch.int8 else 1
    bits = weight.detach().float().view(torch.int32) + unit * state["residual"].int()
    return bits.view(torch.float32)


def gain_and_drift(
    update: float, steps: int, numel: int, dtype: torch.dtype = torch.bfloat16, **arguments
) -> tuple[float, float]:
    """Of updates of a size on weights of scale 0.02, at ε = 1e-3."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter((torch.randn(numel, generator=generator) * 0.02).to(dtype))
    module = nn.ParameterDict({"w": weight})
    optimizer = zokern.MeZO(
        module.named_parameters(), lr=update, eps=1e-3, seed=1, module=module, **arguments
    )
    start = weight.detach().double()
    for _ in range(steps):
        list(optimizer.ask())
        # Losses that make the projected gradient 1.
        optimizer.tell([2e-3, 0.0])
    intended = torch.zeros(numel, dtype=torch.float64)
    for draw in range(steps):
        z = noise.sample("gauss16", numel, seed=1, draw=draw, tensor_id=noise.tensor_id("w"))
        intended -= update * z.double()
    applied = value_of(optimizer, weight).double() - start
    gain = (applied @ intended / (intended @ intended)).item()
    return gain, ((applied - gain * intended).norm() / intended.norm()).item()


SPLIT8 = {"precision": "split8"}


@pytest.mark.parametrize(
    ("arguments", "update", "gain_bound", "drift_bound"),
    [
        ({"precision": "split"}, 1e-6, 0.02, 0.01),
        ({"precision": "master"}, 1e-6, 0.02, 0.01),
        ({**SPLIT8, "stochastic_rounding": False}, 1e-6, 0.02, 0.35),
        (SPLIT8, 1e-6, 0.02, 0.5),
        ({**SPLIT8, "layerwise": True}, 1e-6, 0.02, 0.2),
        ({**SPLIT8, "layerwise": True}, 1e-5, 0.02, 0.02),
        ({}, 1e-6, 0.1, 10.0),
        ({}, 1e-5, 0.03, 3.0),
    ],
    ids=str,
)
def test_small_updates_arrive_in_bf16(arguments, update, gain_bound, drift_bound):
    gain, drift = gain_and_drift(update, 1000, 1 << 16, **arguments)
    assert abs(gain - 1) <= gain_bound
    assert drift <= drift_bound


def test_small_updates_arrive_in_fp16():
    gain, drift = gain_and_drift(1e-6, 1000, 1 << 16, torch.float16)
    assert abs(gain - 1) <= 0.05
    assert drift <= 5


def test_without_stochastic_rounding_they_are_lost():
    gain, _ = gain_and_drift(1e-6, 300, 1 << 16, layerwise=True, stochastic_rounding=False)
    assert abs(gain) < 0.05


def test_in_place_bf16_drifts():
    """What the other precisions are for."""
    assert gain_and_drift(1e-6, 300, 1 << 16, precision="inplace", layerwise=False)[1] > 10


def test_stochastic_rounding_goes_on_from_a_checkpoint():
    model = make_model(torch.bfloat16)
    optimizer = zokern.MeZO(model.named_parameters(), 0.01, seed=1, module=model)
    optimizer.step(loss_of(model))
    other = copy.deepcopy(model)
    resumed = zokern.MeZO(other.named_parameters(), 0.01, module=other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.run["roundings"] == 1
    for _ in range(2):
        optimizer.step(loss_of(model))
        resumed.step(loss_of(other))
    assert same(weights(model), weights(other))


def test_a_model_of_several_dtypes_rounds_those_in_half_precision():
    model = nn.Sequential(nn.Linear(10, 16).bfloat16(), nn.Linear(16, 4))
    optimizer = zokern.MeZO(model.named_parameters(), 0.01, seed=1, module=model)
    x = torch.randn(8, 10).bfloat16()
    for _ in range(3):
        optimizer.step(lambda: model[1](model[0](x).float()).square().mean())
    assert optimizer.run["stochastic_rounding"]


@pytest.mark.parametrize("precision", ["split", "master", "auto"])
def test_stochastic_rounding_is_refused_where_nothing_is_lost(precision):
    model = make_model(torch.bfloat16)
    with pytest.raises(ValueError, match=r"stochastic_rounding=True is for .*'inplace'"):
        zokern.MeZO(model.named_parameters(), 0.01, precision=precision, stochastic_rounding=True)


@pytest.mark.parametrize("precision", ["inplace", "split", "split8", "master"])
def test_the_probe_is_as_good_as_the_dtype(precision):
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter((torch.randn(1 << 16, generator=generator) * 0.02).bfloat16())

    def make(eps: float, param: nn.Parameter = weight) -> zokern.MeZO:
        return zokern.MeZO([("w", param)], 0.01, eps=eps, seed=1, precision=precision)

    measured = [make(eps).probe_fidelity() for eps in (1e-3, 1e-4, 1e-5)]
    assert measured == pytest.approx([0.9994, 0.95, 0.46], abs=0.01)
    with pytest.warns(RuntimeWarning, match=r"eps=0.0001 rounded .* cosine of 0.9\d"):
        make(1e-4).step(lambda: weight.float().sum())
    if precision != "split8":
        assert make(1e-4, nn.Parameter(weight.detach().float())).probe_fidelity() > 0.99999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_master_keeps_the_weights_bit_for_bit(dtype):
    model = make_model(dtype)
    optimizer = zokern.MeZO(model.named_parameters(), 0.0, seed=1, precision="master")
    before = weights(model)
    for _ in range(100):
        for _ in optimizer.ask():
            assert not same(weights(model), before)
        optimizer.flush()
        assert same(weights(model), before)
    for name, param in model.named_parameters():
        assert optimizer.state[param]["master"].dtype == torch.float32, name
        assert torch.equal(optimizer.state[param]["master"], param.float())


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_master_restores_exactly_whenever_the_closure_raises(method):
    model = make_model(torch.bfloat16)
    optimizer = method.make(model, precision="master", weight_decay=0.1)
    for _ in range(2):
        optimizer.step(loss_of(model))
    before, run = weights(model), dict(optimizer.run)
    masters = copy.deepcopy([optimizer.state[p]["master"] for p in model.parameters()])
    for at in range(method.evaluations):
        calls = 0

        def closure():
            nonlocal calls
            calls += 1
            if calls > at:  # noqa: B023
                raise KeyboardInterrupt
            return loss_of(model)()

        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure)
        assert same(weights(model), before)
        assert same([optimizer.state[p]["master"] for p in model.parameters()], masters)
        assert optimizer.run == run


def test_an_update_of_a_master_is_what_float32_weights_would_make_of_it():
    model, half = make_model(), make_model(torch.bfloat16)
    with torch.no_grad():
        for a, b in zip(model.parameters(), half.parameters(), strict=True):
            a.copy_(b)
    optimizers = [
        zokern.MeZO(m.named_parameters(), 0.01, seed=1, weight_decay=0.1, precision="master")
        for m in (model, half)
    ]
    for step in range(5):
        for optimizer in optimizers:
            list(optimizer.ask())
            optimizer.tell([0.1 * step, 0.05])
    for a, b in zip(model.parameters(), half.parameters(), strict=True):
        assert torch.equal(optimizers[1].state[b]["master"], a)
        assert torch.equal(b, a.bfloat16())


@pytest.mark.parametrize("precision", ["split", "split8", "master"])
@pytest.mark.parametrize("fuse_next", [False, True], ids=["", "fused"])
def test_weights_that_are_loaded_are_not_overwritten(precision, fuse_next):
    model, other = make_model(torch.bfloat16), make_model(torch.bfloat16)
    with torch.no_grad():
        for param in other.parameters():
            param.add_(1.0)
    optimizer = zokern.MeZO(
        model.named_parameters(), 0.01, seed=1, precision=precision, fuse_next=fuse_next
    )
    for _ in range(3):
        optimizer.step(loss_of(model))
    model.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match=r"0\.weight .*refresh\(\)"):
        optimizer.step(loss_of(model))
    assert same(weights(model), weights(other))
    if fuse_next:
        with pytest.raises(RuntimeError, match="stands displaced"):
            optimizer.state_dict()

    optimizer.refresh()
    assert same(weights(model), weights(other))
    twin = zokern.MeZO(
        other.named_parameters(), 0.01, seed=1, precision=precision, fuse_next=fuse_next
    )
    for group in twin.param_groups:
        group.update(draws=3, step=3, roundings=optimizer.run["roundings"])
    for m, o in ((model, optimizer), (other, twin)):
        o.step(loss_of(m))
        o.flush()
    assert same(weights(model), weights(other))


@pytest.mark.parametrize("precision", ["inplace", "split", "master"])
def test_weights_that_are_loaded_before_the_first_step_are_simply_taken(precision):
    model, other = make_model(torch.bfloat16), make_model(torch.bfloat16)
    optimizer = zokern.MeZO(model.named_parameters(), 0.0, seed=1, precision=precision)
    with torch.no_grad():
        for param in other.parameters():
            param.mul_(2.0)
    model.load_state_dict(other.state_dict())
    optimizer.step(loss_of(model))
    for a, b in zip(weights(model), weights(other), strict=True):
        assert torch.equal(a, b) if precision == "master" else torch.allclose(a, b, atol=0.01)


def test_weights_in_place_may_be_changed_between_steps():
    model = make_model()
    optimizer = zokern.MeZO(model.named_parameters(), 0.01, seed=1)
    optimizer.step(loss_of(model))
    with torch.no_grad():
        for param in model.parameters():
            param.clamp_(-1, 1)
    optimizer.step(loss_of(model))


def test_a_copy_swapped_in_and_out_is_fine_with_masters():
    """As for an evaluation with averaged weights."""
    model = make_model(torch.bfloat16)
    optimizer = zokern.MeZO(model.named_parameters(), 0.01, seed=1, precision="master")
    optimizer.step(loss_of(model))
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    model.load_state_dict(kept)
    optimizer.step(loss_of(model))


@pytest.mark.parametrize("first", ["module", "optimizer"])
def test_checkpoints_load_in_either_order(first):
    model = make_model(torch.bfloat16)
    optimizer = zokern.MeZO(model.named_parameters(), 0.01, seed=1, precision="master")
    optimizer.step(loss_of(model))
    module_state = copy.deepcopy(model.state_dict())
    optimizer_state = copy.deepcopy(optimizer.state_dict())
    optimizer.step(loss_of(model))
    after = weights(model)
    optimizer.step(loss_of(model))
    if first == "module":
        model.load_state_dict(module_state)
        optimizer.load_state_dict(optimizer_state)
    else:
        optimizer.load_state_dict(optimizer_state)
        model.load_state_dict(module_state)
    optimizer.step(loss_of(model))
    assert same(weights(model), after)


def test_the_state_of_other_weights_is_noticed():
    model = make_model(torch.bfloat16)
    optimizer = zokern.MeZO(model.named_parameters(), 0.01, seed=1, precision="master")
    optimizer.step(loss_of(model))
    fresh = make_model(torch.bfloat16)
    again = zokern.MeZO(fresh.named_parameters(), 0.01, precision="master")
    again.load_state_dict(optimizer.state_dict())
    before = weights(fresh)
    with pytest.raises(RuntimeError, match="has a master in the optimizer"):
        again.step(loss_of(fresh))
    assert same(weights(fresh), before)


def test_momentum_is_float32_and_made_when_it_is_wanted():
    model = make_model(torch.bfloat16)
    optimizer = zokern.MeZO(model.named_parameters(), 0.01, seed=1)
    assert all("momentum" not in state for state in optimizer.state.values())
    optimizer.param_groups[0]["momentum"] = 0.5
    optimizer.step(loss_of(model))
    for param in model.parameters():
        assert optimizer.state[param]["momentum"].dtype == torch.float32
        assert optimizer.state[param]["momentum"].any()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        zokern.MeZO(make_model().named_parameters(), 0.01, momentum=0.9), 0.01, total_steps=10
    )
    assert scheduler.optimizer.param_groups[0]["momentum"] == pytest.approx(0.95)


def test_nan_weights_with_masters_are_no_reason_to_stop():
    weight = nn.Parameter(torch.tensor([math.nan, 1.0]))
    optimizer = zokern.MeZO([("w", weight)], 0.1, precision="master")
    for _ in range(2):
        optimizer.step(lambda: weight[1])
    assert weight[0].isnan()


def test_copies_of_a_displaced_optimizer_know_where_they_stand():
    model = make_model()
    optimizer = METHODS["mezo"].make(model, precision="master", fuse_next=True)
    optimizer.step(loss_of(model))
    other, copied = copy.deepcopy((model, optimizer))
    copied.flush()
    optimizer.flush()
    assert same(weights(model), weights(other))


def test_values_that_are_not_changed_are_no_reason_to_stop_either():
    weight = nn.Parameter(torch.tensor([math.nan, 1.0]))
    optimizer = zokern.MeZO([("w", weight)], 0.1, precision="master")
    optimizer.step(lambda: weight[1])
    with torch.no_grad():
        weight.mul_(1)
    optimizer.step(lambda: weight[1])


class Counting(nn.Module):
    """Its forward writes to a frozen parameter, as codebooks and momentum encoders do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.mean = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, x):
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(), alpha=0.1)
        return self.layer(x) - self.mean


@pytest.mark.parametrize("fuse_next", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("recorded", [False, True], ids=["", "recorded"])
def test_frozen_parameters_may_be_written_to(fuse_next, recorded):
    model, x = Counting(), torch.randn(8, 4)
    trajectory = zokern.Trajectory() if recorded else None
    optimizer = METHODS["mezo"].make(model, fuse_next=fuse_next, trajectory=trajectory)
    for _ in range(3):
        optimizer.step(lambda: model(x).square().mean())
        with torch.no_grad():
            model.mean.zero_()


def test_weights_that_a_forward_changes_are_refused_and_the_others_restored():
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=0.5), nn.Linear(4, 1))
    tokens = torch.arange(5)
    optimizer = METHODS["mezo"].make(model, precision="master", eps=0.1)
    before = weights(model[1])
    with pytest.raises(RuntimeError, match=r"0\.weight stands displaced.* max_norm.* freeze"):
        optimizer.step(lambda: model(tokens).square().mean())
    assert same(weights(model[1]), before)
    optimizer.refresh()
    assert same(weights(model[1]), before)


def test_refresh_in_the_middle_of_a_step_keeps_the_weights_that_nobody_touched():
    model = make_model()
    optimizer = METHODS["mezo"].make(model, precision="master", eps=0.5)
    before = weights(model)
    next(optimizer.ask())
    with torch.no_grad():
        model[0].weight.fill_(3.0)
    optimizer.refresh()
    assert torch.equal(model[0].weight, torch.full_like(model[0].weight, 3.0))
    assert same(weights(model)[1:], before[1:])


def test_an_optimizer_is_freed_when_it_is_dropped():
    """Steps that are dropped or only looked at hold it in no cycle."""
    model = make_model()
    METHODS["mezo"].make(make_model())  # torch's imports hold the first one of a process
    optimizer = METHODS["mezo"].make(model, fuse_next=True)
    gc.disable()
    try:
        optimizer.step(loss_of(model))
        next(optimizer.ask())
        optimizer.flush()
        alive = weakref.ref(optimizer)
        del optimizer
        assert alive() is None
    finally:
        gc.enable()


KEPT = [
    {"precision": "split"},
    {"precision": "split8", "layerwise": True},
    {"precision": "split8"},
    {"precision": "master"},
]


@pytest.mark.parametrize("arguments", KEPT, ids=lambda given: " ".join(map(str, given.values())))
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.float(),
        lambda model: setattr(model[0].weight, "data", torch.zeros_like(model[0].weight)),
    ],
    ids=["float32", "other data"],
)
def test_weights_of_another_kind_or_place_need_a_refresh(arguments, change):
    # In bfloat16 a smaller ε may not be seen, and nothing be learned.
    arguments = arguments | {"eps": 0.1}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).bfloat16()
    optimizer = zokern.MeZO(model.named_parameters(), 1e-2, seed=0, module=model, **arguments)

    def loss() -> torch.Tensor:
        return model(torch.ones(2, 4, dtype=model[0].weight.dtype)).float().square().mean()

    optimizer.step(loss)
    change(model)
    changed = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"0\.weight has a .*refresh"):
        optimizer.step(loss)
    assert all(map(torch.equal, model.parameters(), changed.parameters()))
    optimizer.refresh()
    fresh = zokern.MeZO(changed.named_parameters(), 1e-2, seed=0, module=changed, **arguments)
    fresh.run.update(draws=optimizer.run["draws"], roundings=optimizer.run["roundings"])
    optimizer.step(loss)
    model, trained = changed, model
    fresh.step(loss)
    assert all(map(torch.equal, trained.parameters(), changed.parameters()))


def test_layerwise_weights_that_became_float32():
    model = nn.Linear(4, 3).bfloat16()
    optimizer = zokern.MeZO(model.named_parameters(), 1e-2, seed=0, module=model)
    optimizer.step(lambda: model(torch.ones(2, 4).bfloat16()).float().square().mean())
    model.float()
    before = model.weight.detach().clone()
    optimizer.step(lambda: model(torch.ones(2, 4)).square().mean())
    assert not torch.equal(model.weight, before)
