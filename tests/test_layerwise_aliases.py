"""Tensors of a module that lie in a parameter's memory: layerwise evaluation refuses them."""

import collections
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.test_layerwise import is_clean, make
from tests.test_layerwise_models import MODELS, build, language_loss
from tests.test_peft import make_lora
from tests.zo import same, weights
from zokern.optim.aliases import Places


class Plain(nn.Module):
    """Two layers, and whatever a test adds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def buffer(model: Plain) -> None:
    model.second.register_buffer("kept", model.first.weight.detach())


def attribute(model: Plain) -> None:
    model.kept = model.first.weight.data


def part(model: Plain) -> None:
    model.kept = model.first.weight[2:4, 1:3]


def item(model: Plain) -> None:
    model.kept = [torch.ones(3), model.first.weight.detach().t()]


def entry(model: Plain) -> None:
    model.kept = collections.OrderedDict(rows=(model.first.weight.detach().flatten(),))


def parameter(model: Plain) -> None:
    model.second.weight = nn.Parameter(model.first.weight.data, requires_grad=False)


def hidden_module(model: Plain) -> None:
    inner = nn.Linear(6, 6)
    inner.kept = model.first.weight.detach()
    model.hidden = [inner]


def flat(model: Plain) -> None:
    model.flat = torch.randn(36 + 6)
    model.first.weight = nn.Parameter(model.flat[:36].view(6, 6))
    model.first.bias = nn.Parameter(model.flat[36:])


ALIASES = {
    buffer: r"second\.kept",
    attribute: "kept",
    part: "kept",
    item: r"kept\[1\]",
    entry: r"kept\['rows'\]\[0\]",
    parameter: r"second\.weight",
    hidden_module: r"hidden\[0\]\.kept",
    flat: "flat",
}


MESSAGE = r"^{} shares memory with the parameter first\.(weight|bias), .*take layerwise=False$"


@pytest.mark.parametrize("add", ALIASES, ids=lambda add: add.__name__)
def test_a_tensor_that_shares_a_parameters_memory_is_refused(add):
    model = Plain()
    add(model)
    with pytest.raises(ValueError, match=MESSAGE.format(ALIASES[add])):
        make(model)


@pytest.mark.parametrize("add", [add for add in ALIASES if add is not flat])
def test_one_that_comes_later_is_refused_by_the_next_step(add):
    model, x = Plain(), torch.randn(3, 6)
    optimizer = make(model)
    optimizer.step(lambda: model(x).sum())
    add(model)
    before = weights(model)
    with pytest.raises(ValueError, match=MESSAGE.format(ALIASES[add])):
        optimizer.step(lambda: model(x).sum())
    assert same(weights(model), before)
    assert is_clean(model)


def test_what_shares_no_memory_with_a_moving_parameter_is_taken():
    model = Plain()
    model.register_buffer("copied", model.first.weight.detach().clone())
    model.itself = {"weights": [model.first.weight], "layer": model.first}
    model.second.weight = model.first.weight
    model.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
    model.of_frozen = model.frozen.data
    model.nothing = model.first.weight.detach()[:0]
    model.sparse = torch.eye(3).to_sparse()
    neighbours = torch.randn(8)
    model.left, model.right = nn.Parameter(neighbours[:4]), neighbours[4:]
    optimizer = make(model, eps=0.1)
    optimizer.step(lambda: model(torch.ones(6)).sum() + (model.left * model.right).sum())
    assert len(set(optimizer.last.losses)) == 2
    model.frozen.requires_grad_(True)
    with pytest.raises(ValueError, match="of_frozen shares memory with the parameter frozen"):
        optimizer.step(lambda: model(torch.ones(6)).sum())


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("wrap", ["spectral_norm", "weight_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_weights_that_a_hook_computes_are_no_aliases(wrap, evaluated):
    model, rest = (getattr(nn.utils, wrap)(nn.Linear(6, 4)).eval() for _ in range(2))
    x = torch.randn(3, 6)
    if evaluated:
        model(x)
    optimizer = make(model, eps=0.1)
    with torch.no_grad():
        for _ in optimizer.ask():
            rest.load_state_dict(model.state_dict())
            assert torch.equal(model(x), rest(x))
    optimizer.flush()


@pytest.mark.parametrize("cls", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers(cls):
    """They keep a list of their parameters."""
    model, x = cls(6, 5, num_layers=2, bidirectional=True, batch_first=True), torch.randn(3, 4, 6)
    plain = copy.deepcopy(model)
    settings = {"eps": 0.1, "lr": 1e-3}
    optimizers = [make(plain, layerwise=False, **settings), make(model, **settings)]
    for _ in range(2):
        for optimizer, module in zip(optimizers, (plain, model), strict=True):
            optimizer.step(lambda: module(x)[0].square().mean())  # noqa: B023
    assert optimizers[0].last.losses == pytest.approx(optimizers[1].last.losses, rel=1e-4)
    assert len(set(optimizers[1].last.losses)) == 2
    assert is_clean(model)


def test_convolutions_in_another_memory_format():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)).to(
        memory_format=torch.channels_last
    )
    make(model).step(lambda: model(torch.ones(1, 3, 8, 8)).sum())
    model[1].kept = model[0].weight.detach()
    with pytest.raises(ValueError, match=r"1\.kept shares memory with the parameter 0\.weight"):
        make(model)


@pytest.mark.parametrize("name", MODELS)
def test_real_models_hold_no_aliases(name):
    model = build(name)
    Places(model.parameters()).check(model)
    language_loss(model)()
    Places(model.parameters()).check(model)


def test_adapters_hold_no_aliases():
    pytest.importorskip("peft")
    model = make_lora()
    Places(model.parameters()).check(model)


def test_a_functional_call_of_another_layer_is_no_alias():
    model, x = Plain(), torch.randn(3, 6)
    optimizer = make(model, eps=0.1)
    optimizer.step(lambda: F.linear(x, model.first.weight).sum())
    assert len(set(optimizer.last.losses)) == 2
