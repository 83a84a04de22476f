"""torch.compile around a model that is trained, and around the steps that train it."""

import pytest
import torch
from torch import nn

import zokern

ZO = [zokern.MeZO, zokern.MeZOGV, zokern.FZOO, zokern.ConMeZO]
MERGING = [zokern.OnDAREAdamW, zokern.OnTIESAdamW]
X = torch.linspace(-1, 1, 32).view(8, 4)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def optimizer(cls, module: nn.Module):
    named = list(module.named_parameters())
    if cls in ZO:
        return cls(named, lr=1e-2, seed=0)
    taus = {"reference": {name: param + 0.1 for name, param in named}, "base": dict(named)}
    return cls(named, lr=1e-2, seed=0, reserve_p=0.5, use_merge=True, **taus)


def training(opt, evaluate, step=None):
    """A function that makes one step and returns its loss."""
    step = step or opt.step

    def loss():
        return (evaluate(X) - 1).square().mean()

    def closure():
        opt.zero_grad()
        value = loss()
        value.backward()
        return value

    return (lambda: step(loss)) if isinstance(opt, zokern.ZOOptimizer) else (lambda: step(closure))


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("cls", [*ZO, *MERGING])
def test_a_compiled_model_is_not_compiled_again_from_step_to_step(cls):
    module = model()
    opt = optimizer(cls, module)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    step = training(opt, torch.compile(module, backend="eager"))
    step()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            schedule.step()
            step()


@pytest.mark.parametrize("cls", [*ZO, *MERGING])
def test_a_compiled_step_is_the_step_as_it_is(cls):
    plain, other = model(), model()
    step = training(optimizer(cls, plain), plain)
    opt = optimizer(cls, other)
    compiled = training(opt, other, torch.compile(opt.step, backend="eager"))
    losses = [(step().item(), compiled().item()) for _ in range(3)]
    assert len({loss for loss, _ in losses}) == 3
    assert all(a == b for a, b in losses)
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cls", MERGING)
def test_a_training_step_can_be_compiled_around_the_optimizer(cls):
    """The graph breaks at the optimizer, as it does around those of torch that count in Python."""
    plain, other = model(), model()
    step = training(optimizer(cls, plain), plain)
    opt = optimizer(cls, other)

    @torch.compile(backend="eager")
    def compiled():
        opt.zero_grad()
        loss = (other(X) - 1).square().mean()
        loss.backward()
        opt.step()
        return loss

    for _ in range(3):
        assert step().item() == compiled().item()
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cls", [zokern.MeZO, zokern.OnDAREAdamW])
def test_a_step_without_a_break_of_the_graph_is_refused_with_the_way_out(cls):
    module = model()
    before = [param.clone() for param in module.parameters()]
    opt = optimizer(cls, module)
    step = training(opt, module, torch.compile(opt.step, backend="eager", fullgraph=True))
    with pytest.raises(RuntimeError, match=r"compile the model, torch\.compile\(model\)"):
        step()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))
