"""OnDAREAdamW, OnTIESAdamW and EMAAdamW as users meet them."""

import copy
import functools
import inspect
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests.conftest import FAST, choose, each_of
from tests.same_bits import same_bits
from zokern.merging import SparseTau, dense_tau

CLASSES = {"OnDARE": zokern.OnDAREAdamW, "OnTIES": zokern.OnTIESAdamW}
both = pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)


# Triton has tests of its own below.
backend = each_of(FAST)


class Net(nn.Module):
    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(11, 24)
            self.hidden = nn.Linear(24, 37)
            self.norm = nn.LayerNorm(37)
            self.head = nn.Linear(37, 11, bias=False)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.hidden(self.embed(x)))))


def models(dtype: torch.dtype = torch.float32) -> tuple[Net, Net, Net]:
    """A policy, its reference and the base of that."""
    base, reference = Net(0, dtype), Net(0, dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in reference.parameters():
            param += (1e-3 * torch.randn(param.shape, generator=generator)).to(dtype)
    return copy.deepcopy(reference), reference, base


def give_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in model.parameters():
        param.grad = (1e-3 * torch.randn(param.shape, generator=generator)).to(param.dtype)


def train(model: nn.Module, opt, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        give_gradients(model, step)
        opt.step()


def merging(cls, policy: Net, **arguments):
    _, reference, base = models(next(policy.parameters()).dtype)
    defaults = {"lr": 1e-3, "reserve_p": 0.3, "alpha": 0.1, "use_merge": True, "seed": 5}
    return cls(policy.named_parameters(), reference=reference, base=base, **(defaults | arguments))


def weights(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def all_same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(same_bits(a, b) for a, b in zip(first, second, strict=True))


@both
def test_its_arguments_and_defaults_are_those_of_online_merging(cls):
    parameters = list(inspect.signature(cls).parameters.values())
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    wanted = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-6,
        "weight_decay": 0.0,
        # None is what the semantics have, and those of the original do correct.
        "correct_bias": None,
        "no_deprecation_warning": True,
        "reserve_p": 1,
        "param_name_map": None,
        "use_merge": False,
        "alpha": 0,
        "rescale": False,
        **({"clip_val": 1} if cls is zokern.OnDAREAdamW else {}),
        "online_step": 1,
    }
    assert [p.name for p in positional] == ["params", *wanted]
    assert {p.name: p.default for p in positional[1:]} == wanted
    assert cls([nn.Parameter(torch.ones(3))]).param_groups[0]["correct_bias"] is True


Models = tuple[nn.Module, nn.Module, nn.Module]


def after_steps(cls, given: Models, semantics: str, precision: str, steps: int) -> list[Tensor]:
    """Weights and state after steps with two groups, a schedule and gradients that are None."""
    policy, reference, base = given
    named = list(policy.named_parameters())
    groups = [
        {"params": named[:2], "lr": 3e-3, "online_step": 3},
        {"params": named[2:], "reserve_p": 0.6, "alpha": 0.01},
    ]
    if semantics == "qwen":
        groups[1] |= {"weight_decay": 0.1, "rescale": True}
    opt = cls(
        groups,
        lr=1e-3,
        reserve_p=0.25,
        alpha=0.2,
        use_merge=True,
        semantics=semantics,
        seed=3,
        precision=precision,
        reference=reference,
        base=base,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 20)
    for step in range(steps):
        give_gradients(policy, step)
        if step % 5 == 2:
            named[step % len(named)][1].grad = None
        opt.step()
        schedule.step()
    state = [
        tensor
        for param in policy.parameters()
        for _, tensor in sorted(opt.state[param].items())
        if isinstance(tensor, Tensor)
    ]
    return weights(policy) + state


def dtype_for(precision: str) -> torch.dtype:
    return torch.float32 if precision == "inplace" else torch.bfloat16


@both
@pytest.mark.parametrize("semantics", ["qwen", "paper"])
@pytest.mark.parametrize("precision", ["inplace", "split8", "split", "master"])
def test_twenty_steps_are_the_same_on_every_backend(cls, semantics, precision, native_backend):
    got = after_steps(cls, models(dtype_for(precision)), semantics, precision, 20)
    assert all_same(got, of_the_reference(cls, semantics, precision))


@functools.cache
def of_the_reference(cls, semantics: str, precision: str) -> list[Tensor]:
    with zokern.use_backend("reference"):
        return after_steps(cls, models(dtype_for(precision)), semantics, precision, 20)


def tiny_models(dtype: torch.dtype) -> Models:
    """As ``models``, of four parameters with a few dozen elements."""
    generator = torch.Generator().manual_seed(1)
    base, reference = (nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 3)) for _ in range(2))
    with torch.no_grad():
        for old, new in zip(base.parameters(), reference.parameters(), strict=True):
            old.copy_(torch.randn(old.shape, generator=generator) / 3)
            new.copy_(old + 1e-3 * torch.randn(old.shape, generator=generator))
    return copy.deepcopy(reference).to(dtype), reference.to(dtype), base.to(dtype)


# Seven steps have two merges of step-K and a gradient that is None.
@both
@pytest.mark.parametrize(
    ("precision", "semantics", "steps"), [("split", "qwen", 20), ("inplace", "paper", 7)]
)
def test_steps_are_the_same_on_triton(cls, semantics, precision, steps, monkeypatch):
    results = []
    for name in ("triton", "reference"):
        choose(name, monkeypatch)
        given = tiny_models(dtype_for(precision))
        results.append(after_steps(cls, given, semantics, precision, steps))
    assert all_same(*results)


def dense_step(method, value, grad, state, group, tau, masks) -> Tensor:
    """One step in float64, by the formulas of the docstrings."""
    beta1, beta2 = group["betas"]
    state["t"] += 1
    state["m"] = beta1 * state["m"] + (1 - beta1) * grad
    state["v"] = beta2 * state["v"] + (1 - beta2) * grad**2
    step = group["lr"]
    if group["correct_bias"]:
        step *= (1 - beta2 ** state["t"]) ** 0.5 / (1 - beta1 ** state["t"])
    delta = -step * state["m"] / (state["v"].sqrt() + group["eps"])
    alpha = group["alpha"]
    if method == "dare":
        return value + alpha * tau + (1 - alpha) * delta * masks[0] / group["reserve_p"]
    if method == "dare_paper":
        return value + alpha * tau * masks[1] + (1 - alpha) * delta * masks[0]
    k = int(group["reserve_p"] * delta.numel())
    order = delta.abs().flatten().argsort(descending=True, stable=True)[:k]
    kept = torch.zeros(delta.numel(), dtype=torch.bool)
    kept[order] = True
    delta = delta * kept.view(delta.shape)
    a, b = (tau, delta) if method == "ties" else (alpha * tau, (1 - alpha) * delta)
    sign = torch.where(a + b >= 0, 1.0, -1.0)
    if method == "ties_paper":
        sign = (a + b).sign()
        return value + a * (a.sign() == sign) + b * (b.sign() == sign)
    return value + alpha * a * (a.sign() == sign) + (1 - alpha) * b * (b.sign() == sign)


@pytest.mark.parametrize("method", ["dare", "dare_paper", "ties", "ties_paper"])
def test_its_steps_are_those_of_the_formula(method, backend):
    cls = CLASSES["OnDARE" if method.startswith("dare") else "OnTIES"]
    policy = models()[0]
    semantics = "paper" if method.endswith("paper") else "qwen"
    opt = merging(cls, policy, semantics=semantics, alpha=0.3)
    param, name = policy.hidden.weight, "hidden.weight"
    value = param.detach().double()
    tau = dense_tau(opt._tau(param), param.shape).double()
    state = {"t": 0, "m": torch.zeros_like(value), "v": torch.zeros_like(value)}
    for step in range(6):
        masks = []
        for draw in (step + 1, step + 1 + (1 << 31)):
            words = zokern.noise.sample(
                "uniform32",
                param.numel(),
                seed=5,
                draw=draw,
                tensor_id=zokern.noise.tensor_id(name),
            )
            masks.append((words < int(0.3 * 2**32)).view(param.shape))
        give_gradients(policy, step)
        grad = param.grad.double()
        value = dense_step(method, value, grad, state, opt.param_groups[0], tau, masks)
        opt.step()
        assert torch.allclose(param.double(), value, rtol=1e-5, atol=1e-6)


def test_the_masks_of_dare_keep_a_share_of_p_and_are_new_on_each_step(backend):
    p = nn.Parameter(torch.zeros(20_000))
    opt = zokern.OnDAREAdamW([("p", p)], lr=1.0, reserve_p=0.1, seed=1)
    seen = []
    for _ in range(2):
        before = p.detach().clone()
        p.grad = torch.ones_like(p)
        opt.step()
        seen.append(p.detach() != before)
        assert abs(seen[-1].float().mean() - 0.1) < 0.01
        assert torch.allclose((p - before)[seen[-1]], torch.tensor(-10.0), rtol=1e-3)
    assert (seen[0] & seen[1]).float().mean() < 0.02


def test_childtuning_is_ondare_with_an_alpha_of_zero(backend):
    policies = [models()[0] for _ in range(2)]
    masked = zokern.OnDAREAdamW(policies[0].named_parameters(), lr=1e-3, reserve_p=0.3, seed=5)
    merged = merging(zokern.OnDAREAdamW, policies[1], alpha=0.0)
    train(policies[0], masked, 5)
    train(policies[1], merged, 5)
    assert all_same(weights(policies[0]), weights(policies[1]))


def test_keeping_everything_is_adam_of_huggingface(backend):
    policies = [models()[0] for _ in range(2)]
    own = zokern.OnDAREAdamW(policies[0].named_parameters(), lr=1e-3, eps=1e-20, weight_decay=0.1)
    train(policies[0], own, 10)
    torchs = torch.optim.Adam(policies[1].parameters(), lr=1e-3, eps=1e-20)
    for step in range(10):
        give_gradients(policies[1], step)
        torchs.step()
        with torch.no_grad():
            for param in policies[1].parameters():
                param.mul_(1 - 1e-3 * 0.1)
    for a, b in zip(weights(policies[0]), weights(policies[1]), strict=True):
        assert torch.allclose(a, b, atol=3e-6)


def test_ema_pulls_towards_the_reference(backend):
    policy, reference, _ = models()
    twin = copy.deepcopy(policy)
    opt = zokern.EMAAdamW(
        policy.named_parameters(), lr=1e-2, weight_decay=0.1, pull=0.05, reference=reference
    )
    plain = zokern.OnDAREAdamW(twin.named_parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(5):
        train(policy, opt, 1, step)
        train(twin, plain, 1, step)
        with torch.no_grad():
            for mine, its in zip(twin.parameters(), reference.parameters(), strict=True):
                mine += 0.05 * (its - mine)
    for a, b in zip(weights(policy), weights(twin), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@both
def test_step_k_rolls_plain_steps_back_and_merges_their_sum(cls, backend):
    policy = models()[0]
    opt = merging(cls, policy, online_step=4)
    param = policy.hidden.weight
    tau = dense_tau(opt._tau(param), param.shape)
    start = param.detach().clone()
    train(policy, opt, 3)
    delta = opt.state[param]["cached_delta"].clone()
    assert torch.allclose(param - start, delta, atol=1e-7)
    train(policy, opt, 1, 3)
    assert not opt.state[param]["cached_delta"].any()
    moved = param.detach() - start
    if cls is zokern.OnDAREAdamW:
        # Where Δ is dropped nothing but α·τ is left of four steps.
        untouched = torch.isclose(moved, 0.1 * tau, atol=1e-7)
        assert 0.5 < untouched.float().mean() < 0.9
    else:
        assert 0.3 < (moved != 0).float().mean() < 0.7


@both
@pytest.mark.parametrize("precision", ["split", "master", "inplace"])
def test_a_tiny_alpha_arrives_in_half_precision(cls, precision, backend):
    policy, reference, base = models(torch.bfloat16)
    with torch.no_grad():
        for model in (policy, reference, base):
            model.head.weight.fill_(1.0 if model is not reference else 1.5)
    opt = cls(
        [("head.weight", policy.head.weight)],
        lr=0.0,
        alpha=1e-5,
        use_merge=True,
        precision=precision,
        reference=reference,
        base=base,
    )
    train(policy, opt, 100)
    param, state = policy.head.weight, opt.state[policy.head.weight]
    value = param.detach().double()
    if "master" in state:
        value = state["master"].double()
    elif "residual" in state:
        bits = param.detach().view(torch.int16).int() << 16
        value = (bits + state["residual"].int()).view(torch.float32).double()
    gained = ((value - 1.0) / (100 * 1e-5 * 0.5)).mean()
    if precision == "inplace":
        assert gained == 0
    else:
        assert abs(gained - 1) < 1e-2


@both
def test_sparse_task_vectors_take_little_and_change_nothing(cls, backend):
    policies = [models()[0] for _ in range(2)]
    opts = [merging(cls, policy, reserve_p=0.05) for policy in policies]
    for param in policies[0].parameters():
        tau = opts[0]._tau(param)
        if isinstance(tau, SparseTau):
            opts[0]._set_tau(param, dense_tau(tau, param.shape))
    sparse = [t for p in policies[1].parameters() if isinstance(t := opts[1]._tau(p), SparseTau)]
    assert sparse
    train(policies[0], opts[0], 6)
    train(policies[1], opts[1], 6)
    assert all_same(weights(policies[0]), weights(policies[1]))


def test_a_large_sparse_task_vector_costs_at_most_8_bytes_per_kept_element():
    n = 1 << 18
    p = nn.Parameter(torch.zeros(n))
    generator = torch.Generator().manual_seed(0)
    reference = {"p": torch.randn(n, generator=generator)}
    opt = zokern.OnDAREAdamW(
        [("p", p)],
        reserve_p=1e-3,
        alpha=0.1,
        use_merge=True,
        reference=reference,
        base={"p": torch.zeros(n)},
        seed=0,
    )
    tau = opt._tau(p)
    assert isinstance(tau, SparseTau)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tau)
    assert size <= 8 * len(tau.values)
    assert 200 < len(tau.values) < 330


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy", "file"])
def test_a_saved_run_goes_on_bit_for_bit(cls, dtype, way, tmp_path, backend):
    policy = models(dtype)[0]
    arguments = {"online_step": 2, "reserve_p": 0.05, "state_dtype": torch.bfloat16}
    opt = merging(cls, policy, **arguments)
    train(policy, opt, 3)
    if way in ("state_dict", "file"):
        twin, saved = copy.deepcopy(policy), opt.state_dict()
        if way == "file":
            torch.save(saved, tmp_path / "state.pt")
            saved = torch.load(tmp_path / "state.pt", weights_only=False)
        other = cls(twin.named_parameters(), lr=0.5)
        other.load_state_dict(saved)
    elif way == "pickle":
        twin, other = pickle.loads(pickle.dumps((policy, opt)))
    else:
        twin, other = copy.deepcopy((policy, opt))
    for mine, its in zip(policy.parameters(), twin.parameters(), strict=True):
        assert opt.state[mine].keys() == other.state[its].keys()
        for key, value in opt.state[mine].items():
            if isinstance(value, Tensor):
                assert same_bits(value, other.state[its][key]), key
    for group, its in zip(opt.param_groups, other.param_groups, strict=True):
        assert {**group, "params": None} == {**its, "params": None}
    train(policy, opt, 4, 3)
    train(twin, other, 4, 3)
    assert all_same(weights(policy), weights(twin))


@both
def test_a_step_that_is_capturable_is_the_same(cls, backend):
    policies = [models()[0] for _ in range(2)]
    lr = torch.tensor(1e-3)
    opts = [
        merging(cls, policies[0], online_step=3, weight_decay=0.1, lr=lr.clone()),
        merging(cls, policies[1], online_step=3, weight_decay=0.1, lr=lr, capturable=True),
    ]
    for policy, opt in zip(policies, opts, strict=True):
        for step in range(7):
            opt.param_groups[0]["lr"].fill_(1e-3 * (step + 1))
            train(policy, opt, 1, step)
        assert all(opt.state[param]["step"] == 7 for param in policy.parameters())
    assert all_same(weights(policies[0]), weights(policies[1]))


@both
def test_a_learning_rate_may_be_a_tensor_that_a_scheduler_fills(cls, backend):
    policies = [models()[0] for _ in range(2)]
    opts = [
        merging(cls, policies[0], lr=1e-2),
        merging(cls, policies[1], lr=torch.tensor(1e-2, dtype=torch.float64)),
    ]
    for policy, opt in zip(policies, opts, strict=True):
        schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
        for step in range(4):
            train(policy, opt, 1, step)
            schedule.step()
    assert all_same(weights(policies[0]), weights(policies[1]))


@both
def test_maximize_climbs(cls, backend):
    policies = [models()[0] for _ in range(2)]
    down = merging(cls, policies[0])
    up = merging(cls, policies[1], maximize=True)
    give_gradients(policies[0], 0)
    down.step()
    give_gradients(policies[1], 0)
    for param in policies[1].parameters():
        param.grad.neg_()
    up.step()
    assert all_same(weights(policies[0]), weights(policies[1]))


@both
def test_the_noise_of_a_run_does_not_depend_on_groups_or_order(cls, backend):
    policies = [models()[0] for _ in range(2)]
    first = merging(cls, policies[0])
    _, reference, base = models()
    named = list(policies[1].named_parameters())
    second = cls(
        [{"params": named[3:]}, {"params": named[:3]}],
        lr=1e-3,
        reserve_p=0.3,
        alpha=0.1,
        use_merge=True,
        seed=5,
        reference=reference,
        base=base,
    )
    train(policies[0], first, 3)
    train(policies[1], second, 3)
    assert all_same(weights(policies[0]), weights(policies[1]))


@both
def test_channels_last_weights_are_trained_in_place(cls, backend):
    def conv(memory_format):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Conv2d(5, 6, 3).to(memory_format=memory_format)

    nets = [conv(torch.contiguous_format), conv(torch.channels_last)]
    for net in nets:
        other = {name: p.detach() + 1e-3 for name, p in net.named_parameters()}
        opt = cls(
            net.named_parameters(),
            reserve_p=0.4,
            alpha=0.1,
            use_merge=True,
            seed=1,
            online_step=2,
            reference=other,
            base=net,
        )
        train(net, opt, 4)
    assert all_same(weights(nets[0]), weights(nets[1]))
    assert nets[1].weight.is_contiguous(memory_format=torch.channels_last)


@both
def test_the_reference_may_be_modules_dicts_or_files(cls, tmp_path, backend):
    from safetensors.torch import save_file

    _, reference, base = models()
    save_file(dict(reference.state_dict()), tmp_path / "reference.safetensors")
    shards = tmp_path / "base"
    shards.mkdir()
    names = list(base.state_dict())
    save_file({n: base.state_dict()[n] for n in names[:2]}, shards / "a.safetensors")
    save_file({n: base.state_dict()[n] for n in names[2:]}, shards / "b.safetensors")
    wrapped = {f"module.{name}": tensor for name, tensor in base.state_dict().items()}
    results = []
    for new, old in (
        (reference, base),
        (reference.state_dict(), wrapped),
        (tmp_path / "reference.safetensors", str(shards)),
    ):
        policy = models()[0]
        opt = cls(
            policy.named_parameters(),
            reserve_p=0.5,
            alpha=0.3,
            use_merge=True,
            seed=2,
            reference=new,
            base=old,
        )
        train(policy, opt, 2)
        results.append(weights(policy))
    assert all_same(results[0], results[1])
    assert all_same(results[0], results[2])


@both
def test_a_policy_whose_weights_somebody_loads_goes_on_from_those(cls, backend):
    policy = models(torch.bfloat16)[0]
    opt = merging(cls, policy, precision="master", lr=1e-3, alpha=0.0)
    train(policy, opt, 2)
    other = Net(7, torch.bfloat16)
    policy.load_state_dict(other.state_dict())
    train(policy, opt, 1, 2)
    for a, b in zip(weights(policy), weights(other), strict=True):
        assert (a.float() - b.float()).abs().max() < 0.02


def test_unknown_things_are_refused_and_nothing_changes(backend):
    policy, reference, _ = models()
    bad = [
        ({"reserve_p": 0.0}, r"reserve_p must be above 0 \(at least 2.-32\) and at most 1"),
        ({"reserve_p": 1.5}, "reserve_p"),
        ({"alpha": -0.1}, "alpha must be at least 0 and at most 1"),
        ({"alpha": 2}, "alpha"),
        ({"online_step": 0}, "online_step must be an integer of at least 1"),
        ({"online_step": 1.5}, "online_step"),
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": float("nan")}, "eps"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"semantics": "both"}, "semantics must be one of qwen, paper"),
        ({"precision": "half"}, "precision must be one of"),
        ({"state_dtype": torch.float64}, "state_dtype must be one of"),
        ({"seed": -1}, "seed must be an integer"),
        ({"semantics": "paper", "weight_decay": 0.1}, "neither bias correction, weight decay"),
        ({"semantics": "paper", "rescale": True}, "rescale is True"),
        ({"reference": reference}, "reference and base go together"),
    ]
    for cls in CLASSES.values():
        for arguments, message in bad:
            with pytest.raises(ValueError, match=message):
                cls(policy.named_parameters(), **arguments)
    with pytest.raises(ValueError, match="clip_val must be above 0"):
        zokern.OnDAREAdamW(policy.named_parameters(), clip_val=0)
    with pytest.raises(ValueError, match="pull must be at least 0 and at most 1"):
        zokern.EMAAdamW(policy.named_parameters(), pull=1.5)


@both
def test_names_that_do_not_match_are_listed(cls, backend):
    policy, reference, base = models()
    del reference.norm
    wrong = dict(base.state_dict())
    wrong["head.weight"] = torch.zeros(3, 3)
    opt = cls(policy.named_parameters(), reserve_p=0.5)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=r"no 'norm.weight'.*no 'norm.bias'.*\(3, 3\)"):
        opt.set_reference(reference, wrong)
    assert str(opt.state_dict()) == str(before)
    with pytest.raises(ValueError, match=r"no name for \(group, position\) \[\(0, 1\)"):
        cls(list(policy.parameters()), param_name_map={(0, 0): "embed.weight"})
    with pytest.raises(TypeError, match="must be a module, a state dict or the path"):
        opt.set_reference(3, base)


@both
def test_bad_steps_leave_weights_and_state_untouched(cls, backend):
    policy, reference, base = models()
    opt = cls(policy.named_parameters(), use_merge=True, alpha=0.1, reserve_p=0.5)
    give_gradients(policy, 0)
    before = weights(policy)
    with pytest.raises(RuntimeError, match=r"no reference for embed.weight, hidden.weight"):
        opt.step()
    opt.set_reference(reference, base)
    policy.embed.weight.grad = policy.embed.weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match=r"real gradients; that of embed.weight is sparse"):
        opt.step()
    give_gradients(policy, 0)
    opt.param_groups[0]["reserve_p"] = 7
    with pytest.raises(ValueError, match="reserve_p"):
        opt.step()
    assert all_same(before, weights(policy))
    assert all(opt.state[param]["step"] == 0 for param in policy.parameters())
    with pytest.raises(TypeError, match="complex64"):
        cls([nn.Parameter(torch.zeros(3, dtype=torch.complex64))])


@both
def test_states_of_others_are_refused(cls, backend):
    policy = models()[0]
    opt = merging(cls, policy)
    with pytest.raises(ValueError, match="not a state of"):
        opt.load_state_dict(torch.optim.AdamW(policy.parameters()).state_dict())
    other = CLASSES["OnTIES" if cls is zokern.OnDAREAdamW else "OnDARE"]
    with pytest.raises(ValueError, match="not a state of"):
        opt.load_state_dict(merging(other, policy).state_dict())
    renamed = cls([(f"x.{n}", p) for n, p in policy.named_parameters()])
    with pytest.raises(ValueError, match="other names"):
        renamed.load_state_dict(opt.state_dict())


def test_what_the_published_onties_does_silently_is_warned_about():
    with pytest.warns(UserWarning, match="still needs the reference") as warned:
        zokern.OnTIESAdamW([("p", nn.Parameter(torch.ones(4)))])
    policy = models()[0]
    with pytest.warns(UserWarning, match="is less than one") as masked:
        merging(zokern.OnTIESAdamW, policy, reserve_p=1e-3)
    assert [warning.filename for warning in (*warned, *masked)] == [__file__] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = merging(zokern.OnTIESAdamW, policy, reserve_p=1e-3, semantics="paper")
        train(policy, opt, 1)


def test_plain_top_p_adam_of_the_paper_needs_no_reference(backend):
    p = nn.Parameter(torch.zeros(1000))
    opt = zokern.OnTIESAdamW([("p", p)], lr=1.0, reserve_p=0.1, semantics="paper")
    p.grad = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    opt.step()
    assert int((p != 0).sum()) == 100


@pytest.mark.gpu
@both
@pytest.mark.parametrize("rescale", [False, True])
def test_no_host_waits_for_a_step_on_a_gpu(cls, rescale):
    policy, reference, base = (model.cuda() for model in models())
    opt = cls(
        policy.named_parameters(),
        lr=torch.tensor(1e-3, device="cuda"),
        reserve_p=0.3,
        alpha=0.1,
        use_merge=True,
        rescale=rescale,
        reference=reference,
        base=base,
        capturable=True,
    )
    for param in policy.parameters():
        param.grad = torch.full_like(param, 1e-3)
    opt.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@both
def test_a_state_can_be_loaded_again_and_by_trainers(cls, backend):
    policy = models()[0]
    opt = merging(cls, policy)
    train(policy, opt, 2)
    saved = copy.deepcopy(opt.state_dict())
    for other in (opt, opt, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        other.load_state_dict(saved)


@both
@pytest.mark.parametrize("precision", ["master", "split"])
@pytest.mark.parametrize("when", ["before the first step", "later", "after a load", "in a copy"])
def test_weights_that_are_loaded_are_those_that_are_trained(cls, precision, when, backend):
    policy = models(torch.bfloat16)[0]
    opt = merging(cls, policy, precision=precision, lr=0.0, alpha=0.0, online_step=2)
    if when != "before the first step":
        train(policy, opt, 1)
    if when == "after a load":
        opt.load_state_dict(opt.state_dict())
    if when == "in a copy":
        policy, opt = copy.deepcopy((policy, opt))
    other = Net(7, torch.bfloat16)
    policy.load_state_dict(other.state_dict())
    train(policy, opt, 2, 1)
    assert all_same(weights(policy), weights(other))


@both
def test_refresh_forgets_what_was_added_since_the_last_merge(cls, backend):
    policy = models()[0]
    opt = merging(cls, policy, lr=0.1, alpha=0.0, online_step=2, reserve_p=1.0)
    train(policy, opt, 1)
    other = Net(7)
    policy.load_state_dict(other.state_dict())
    for group in opt.param_groups:
        group["lr"] = 0.0
    train(policy, opt, 1, 1)
    assert all_same(weights(policy), weights(other))


def test_a_step_that_fails_in_one_group_has_not_taken_the_other(backend):
    first, second = (nn.Parameter(torch.ones(4)) for _ in range(2))
    opt = zokern.OnDAREAdamW(
        [{"params": [("a", first)]}, {"params": [("b", second)], "online_step": 2}], lr=0.1
    )
    for param in (first, second):
        param.grad = torch.ones(4)
    opt.step()
    before = first.detach().clone()
    second.grad_dtype = None
    second.grad = torch.ones(4, dtype=torch.float64)
    with pytest.raises(TypeError, match="float64"):
        opt.step()
    assert same_bits(before, first.detach())
    assert opt.state[first]["step"] == 1


@both
def test_a_reference_that_cannot_be_used_changes_nothing(cls, backend):
    policy, reference, base = models()
    opt = merging(cls, policy)
    before = {name: dense_tau(opt._tau(p), p.shape) for name, p in policy.named_parameters()}
    bad = dict(reference.state_dict())
    bad["head.weight"] = torch.full_like(bad["head.weight"], float("nan"))
    with pytest.raises(ValueError, match=r"NaN in 'head.weight'"):
        opt.set_reference(bad, base)
    bad["head.weight"] = reference.head.weight.detach().to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"'head.weight' is torch.float8"):
        opt.set_reference(bad, base)
    bad["head.weight"] = reference.head.weight.detach()
    bad["module.head.weight"] = base.head.weight.detach()
    with pytest.raises(ValueError, match=r"several tensors called 'head.weight'"):
        opt.set_reference(bad, base)
    for name, param in policy.named_parameters():
        assert same_bits(before[name], dense_tau(opt._tau(param), param.shape))
    unnamed = cls(list(policy.parameters()))
    with pytest.raises(ValueError, match="the parameters have none: give named_parameters"):
        unnamed.set_reference(reference, base)


@both
def test_references_in_float64_are_taken(cls, backend):
    policies = [models()[0] for _ in range(2)]
    _, reference, base = models()
    for policy, double in zip(policies, (False, True), strict=True):
        models_given = [
            {n: p.double() if double else p for n, p in model.state_dict().items()}
            for model in (reference, base)
        ]
        opt = cls(
            policy.named_parameters(),
            reserve_p=0.5,
            alpha=0.3,
            use_merge=True,
            seed=1,
            reference=models_given[0],
            base=models_given[1],
        )
        train(policy, opt, 2)
    assert all_same(weights(policies[0]), weights(policies[1]))


@both
def test_states_that_do_not_fit_are_refused_before_anything_is_lost(cls, backend):
    policy = models(torch.bfloat16)[0]
    opt = merging(cls, policy, reserve_p=0.05)
    train(policy, opt, 1)
    saved = opt.state_dict()
    before = weights(policy)
    for key, value, message in (
        ("exp_avg_sq", torch.zeros(3), "exp_avg_sq of .* has the shape"),
        ("residual", torch.zeros(37, 24, dtype=torch.float16), "residual of hidden.weight is"),
        ("tau_places", torch.zeros(1, dtype=torch.int16), "τ of hidden.weight is damaged"),
    ):
        bad = copy.deepcopy(saved)
        bad["state"][1][key] = value
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(bad)
    bad = copy.deepcopy(saved)
    del bad["state"][1]["exp_avg"]
    with pytest.raises(ValueError, match=r"the state of hidden.weight has no exp_avg"):
        opt.load_state_dict(bad)
    bad = copy.deepcopy(saved)
    bad["param_groups"][0]["reserve_p"] = 5
    with pytest.raises(ValueError, match="reserve_p"):
        opt.load_state_dict(bad)
    assert all_same(before, weights(policy))
    train(policy, opt, 1, 1)


@both
def test_capturable_may_be_switched_in_the_middle_of_a_run(cls, backend):
    policies = [models()[0] for _ in range(2)]
    opts = [merging(cls, policy) for policy in policies]
    for step in range(6):
        opts[1].param_groups[0]["capturable"] = step in (2, 3)
        for policy, opt in zip(policies, opts, strict=True):
            train(policy, opt, 1, step)
    assert all_same(weights(policies[0]), weights(policies[1]))
