"""ZOPrO's directions: what they are made of, and what is refused."""

import math

import pytest
import torch
from torch import nn

import zokern
from tests.zo import loss_of, make_model, same, vectors, weights
from zokern import noise


def make(model, **arguments):
    given = {"lr": 0.01, "seed": 3, "total_steps": 10, **vectors(model), **arguments}
    return zokern.ZOPrO(model.named_parameters(), **given)


def first_direction(optimizer, model, point=0):
    """z of each parameter: how far the first point lies, over ε."""
    before = weights(model)
    for i, _ in enumerate(optimizer.ask()):
        if i == point:
            moved = weights(model)
            break
    optimizer.flush()
    eps = optimizer.run["eps"] * (1 if point == 0 else -1)
    return [((m - b).double() / eps) for m, b in zip(moved, before, strict=True)]


def test_directions_are_normal_to_the_reward_delta_but_for_the_previous_update():
    model = make_model()
    given = vectors(model)
    optimizer = make(model, eps=1.0, precision="master")
    gamma = optimizer.gamma
    assert gamma == 1 - 1e-3
    for (name, _), z in zip(
        model.named_parameters(), first_direction(optimizer, model), strict=True
    ):
        p, r = (given[key][name].double() for key in ("previous_update", "reward_delta"))
        rest = z - gamma * p
        assert (rest * r).sum().abs() < 1e-4 * rest.norm() * r.norm()
        assert rest.norm() == pytest.approx(math.sqrt(1 - gamma**2) * p.norm().item(), rel=1e-3)


def test_gamma_falls_by_steps_or_by_hand():
    model = make_model()
    optimizer = make(model, total_steps=4)
    gammas = []
    for _ in range(6):
        gammas.append(optimizer.gamma)
        optimizer.step(loss_of(model))
    assert gammas == pytest.approx([0.999, 0.749, 0.499, 0.249, 0.0, 0.0])
    with pytest.raises(RuntimeError, match="advance='manual'"):
        optimizer.advance()

    optimizer = make(make_model(), total_steps=None, decay="exp", advance="manual")
    model = make_model()
    optimizer = make(model, total_steps=None, decay="exp", advance="manual", samples=2)
    draws = []
    for _ in range(2):
        for _ in range(3):
            draws.append({move.draws[0] for move in optimizer.ask()})
            optimizer.tell([1.0, 0.9, 0.8, 0.7])
        assert optimizer.gamma == pytest.approx(0.999 * math.exp(-optimizer.run["advances"]))
        optimizer.advance()
    assert draws == [{0, 1}] * 3 + [{2, 3}] * 3
    assert optimizer.run["advances"] == 2


@pytest.mark.parametrize("fuse_next", [False, True], ids=["", "fused"])
def test_advancing_by_hand_after_each_step_is_advancing_by_steps(fuse_next):
    models = make_model(), make_model()
    by_step, by_hand = (
        make(model, advance=advance, precision="master", fuse_next=fuse_next)
        for model, advance in zip(models, ("step", "manual"), strict=True)
    )
    for _ in range(4):
        by_step.step(loss_of(models[0]))
        by_hand.step(loss_of(models[1]))
        by_hand.advance()
    by_step.flush()
    assert same(weights(models[0]), weights(models[1]))


@pytest.mark.parametrize("zero", ["previous_update", "reward_delta"])
def test_zero_vectors_give_finite_numbers(zero, backend):
    model = make_model()
    given = vectors(model)
    given[zero] = {name: torch.zeros_like(vector) for name, vector in given[zero].items()}
    optimizer = make(model, **given, eps=1.0, precision="master")
    directions = first_direction(optimizer, model)
    names = [name for name, _ in model.named_parameters()]
    for name, z in zip(names, directions, strict=True):
        assert z.isfinite().all()
        if zero == "previous_update":
            assert not z.any()
            continue
        # Without a reward delta the noise is only scaled.
        n = noise.sample("gauss16", z.numel(), seed=3, draw=0, tensor_id=noise.tensor_id(name))
        n = n.double().view(z.shape)
        p = given["previous_update"][name].double()
        gamma = optimizer.gamma
        wanted = gamma * p + math.sqrt(1 - gamma**2) * n * p.norm() / (n.norm() + 1e-8)
        assert torch.allclose(z, wanted, atol=1e-6)


def test_nothing_is_left_of_the_noise_of_a_single_element(backend):
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = zokern.ZOPrO(
        [("w", weight)],
        0.1,
        1.0,
        seed=3,
        total_steps=10,
        previous_update={"w": torch.tensor([3.0])},
        reward_delta={"w": torch.tensor([-0.7])},
    )
    next(optimizer.ask())
    assert weight.item() == pytest.approx(2 + (1 - 1e-3) * 3)


def test_vectors_come_by_name_or_parameter_in_any_dtype():
    results = []
    for convert in (
        lambda model, v: v,
        lambda model, v: {f"module.{name}": t.double() for name, t in v.items()},
        lambda model, v: {p: v[name] for name, p in model.named_parameters()},
    ):
        model = make_model()
        given = {key: convert(model, value) for key, value in vectors(model).items()}
        optimizer = make(model, **given)
        for _ in range(3):
            optimizer.step(loss_of(model))
        results.append(weights(model))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_the_vectors_are_copies_in_the_dtype_they_came_in():
    model = make_model()
    given = {
        key: {name: t.bfloat16() for name, t in value.items()}
        for key, value in vectors(model).items()
    }
    optimizer = make(model, **given)
    param = next(model.parameters())
    kept = optimizer.state[param]["reward_delta"]
    assert kept.dtype == torch.bfloat16
    given["reward_delta"]["0.weight"].zero_()
    assert kept.any()


def changed(model, key, name, value):
    given = vectors(model)
    if value is None:
        del given[key][name]
    else:
        given[key][name] = value
    return given


@pytest.mark.parametrize(
    ("key", "name", "value", "message"),
    [
        ("previous_update", "0.bias", None, r"previous_update has no entry for \['0.bias'\]"),
        ("reward_delta", "3.weight", None, r"reward_delta has no entry for \['3.weight'\]"),
        ("reward_delta", "0.bias", torch.zeros(3), r"reward_delta\['0.bias'\] has shape \(3,\)"),
        ("previous_update", "5.bias", torch.zeros(3), r"previous_update has entries for no"),
        ("previous_update", "0.bias", torch.full((16,), math.nan), "NaN or infinite"),
    ],
)
def test_entries_that_do_not_fit_are_named(key, name, value, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        make(model, **changed(model, key, name, value))
    optimizer = make(model)
    before = optimizer.state[next(model.parameters())]["reward_delta"].clone()
    with pytest.raises(ValueError, match=message):
        optimizer.set_round(**changed(model, key, name, value))
    assert torch.equal(optimizer.state[next(model.parameters())]["reward_delta"], before)


def test_the_reward_models_score_head_is_passed_over():
    model = make_model()
    make(model, **changed(model, "reward_delta", "score.weight", torch.zeros(1, 4)))


def test_frozen_parameters_need_no_vectors():
    model = make_model()
    given = vectors(model)
    model[0].weight.requires_grad_(False)
    del given["reward_delta"]["0.weight"]
    optimizer = make(model, **given)
    optimizer.step(loss_of(model))
    model[0].weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"0\.weight.*set_round"):
        optimizer.step(loss_of(model))
    optimizer.set_round(**vectors(model))
    optimizer.step(loss_of(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": None}, "needs total_steps"),
        ({"total_steps": 0}, "total_steps must be an integer of at least 1"),
        ({"decay": "cosine"}, "decay must be 'linear' or 'exp'"),
        ({"advance": "round"}, "advance must be 'step' or 'manual'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(make_model(), **arguments)


def test_later_groups_have_no_vectors():
    optimizer = make(make_model())
    with pytest.raises(RuntimeError, match="at construction"):
        optimizer.add_param_group({"params": [("w", nn.Parameter(torch.zeros(2)))]})


def test_delta_is_the_difference_of_what_both_have():
    old, new = make_model(), make_model()
    with torch.no_grad():
        for param in new.parameters():
            param.add_(0.5)
    new.add_module("score", nn.Linear(4, 1))
    got = zokern.zopro.delta(new, old.state_dict())
    assert set(got) == set(dict(old.named_parameters()))
    for value in got.values():
        assert value.dtype == torch.float32
        assert torch.allclose(value, torch.full_like(value, 0.5))
    with pytest.raises(ValueError, match=r"0\.weight has shape"):
        zokern.zopro.delta({"0.weight": torch.zeros(2)}, old)
    with pytest.raises(ValueError, match="no tensor in common"):
        zokern.zopro.delta({"x": torch.zeros(2)}, old)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("base_model.model.h.0.lora_A.default.weight", "h.0.lora_A.weight"),
        ("base_model.model.h.0.lora_A.weight", "h.0.lora_A.weight"),
        ("h.0.lora_embedding_A.other", "h.0.lora_embedding_A"),
        ("base_model.model.score.modules_to_save.default.weight", "score.weight"),
        ("module.h.0.c_attn.weight", "h.0.c_attn.weight"),
        ("h.0.c_attn.bias", "h.0.c_attn.bias"),
    ],
)
def test_names_of_adapters(name, plain):
    assert zokern.zopro.plain_name(name) == plain


def test_a_new_round_goes_on_with_gamma():
    model = make_model()
    optimizer = make(model, fuse_next=True)
    for _ in range(3):
        optimizer.step(loss_of(model))
    gamma = optimizer.gamma
    optimizer.set_round(**vectors(model, seed=8))
    assert optimizer.gamma == gamma
    optimizer.step(loss_of(model))


def test_the_recipe_for_a_language_model_with_a_tied_head():
    """Its state dict has the head twice; its parameters do not, and the optimizer's neither."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embedding.weight

    base, policy, reward = Tied(), Tied(), nn.Module()
    reward.embedding, reward.score = nn.Embedding(5, 3), nn.Linear(3, 1)
    zokern.ZOPrO(
        policy.named_parameters(),
        0.1,
        previous_update=zokern.zopro.delta(policy, base),
        reward_delta=zokern.zopro.delta(reward, base),
        total_steps=3,
    )


def test_of_a_module_the_trained_parameters_count():
    base, policy = make_model(), make_model()
    policy[0].requires_grad_(False)
    assert set(zokern.zopro.delta(policy, base)) == {"1.weight", "1.bias", "3.weight", "3.bias"}
    policy.requires_grad_(False)
    assert len(zokern.zopro.delta(policy, base)) == 6


def test_two_adapters_are_not_taken_for_one():
    one, two = torch.ones(2), torch.full((2,), 9.0)
    both = {"a.lora_A.policy.weight": one, "a.lora_A.reference.weight": two}
    with pytest.raises(ValueError, match="the tensors of one adapter"):
        zokern.zopro.delta(both, both)
    params = [(name, nn.Parameter(tensor.clone())) for name, tensor in both.items()]
    optimizer = zokern.ZOPrO(params, 0.1, previous_update=both, reward_delta=both, total_steps=3)
    for name, param in params:
        assert torch.equal(optimizer.state[param]["previous_update"], both[name])
    with pytest.raises(ValueError, match=r"has several entries for 'a\.lora_A\.weight'"):
        zokern.ZOPrO(
            [("a.lora_A.weight", nn.Parameter(one.clone()))],
            0.1,
            previous_update=both,
            reward_delta=both,
            total_steps=3,
        )


def test_what_is_no_tensor_is_named():
    model = make_model()
    with pytest.raises(TypeError, match=r"reward_delta must map .* '0.bias' to 3.0"):
        make(model, **changed(model, "reward_delta", "0.bias", 3.0))


def test_no_new_round_in_an_open_step():
    model = make_model()
    optimizer = make(model)
    list(optimizer.ask())
    with pytest.raises(RuntimeError, match="a step is open"):
        optimizer.set_round(**vectors(model))
