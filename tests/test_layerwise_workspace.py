"""What layerwise evaluation keeps from step to step, and when it must find out anew."""

import copy
import itertools
import mmap
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import zokern
from tests.test_layerwise import is_clean, make, stands_in_place
from zokern import memory
from zokern.optim import layers

# Wide enough for buffers of their own pages.
WIDTH = 600
TOKENS = torch.arange(12).reshape(3, 4)


class Reader(nn.Module):
    """An embedding, two layers, and a head that is read in chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, WIDTH)
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 700)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.inner(self.embedding(tokens))))


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    bytes_of_a_layer = 4 * WIDTH * (WIDTH + 1)
    monkeypatch.setattr(layers, "FEW_ROWS", 0)
    monkeypatch.setitem(layers.SIZES, "cpu", layers.Sizes(*[bytes_of_a_layer] * 3))


@pytest.fixture(params=["own pages", "an allocator's memory"])
def pages(request, monkeypatch) -> bool:
    is_own = request.param == "own pages"
    if not is_own:
        monkeypatch.setattr(memory, "_pages", lambda size: None)
    elif memory._pages(1 << 20) is None:
        pytest.skip("this system has no pages that it may take back")
    return is_own


@torch.no_grad()
def evaluates(model: nn.Module, optimizer: zokern.MeZO) -> None:
    """Holds if the model shows what sweeps in place show, bit for bit, and then itself."""
    rest, x = copy.deepcopy(model), TOKENS.repeat(4, 1)
    for move in optimizer.ask():
        assert torch.equal(model(x), stands_in_place(rest, move)(x))
    optimizer.flush()
    assert is_clean(model)
    assert torch.equal(model(x), rest(x))


def free_buffers(optimizer: zokern.MeZO) -> list[memory.Buffer]:
    return optimizer._displacement._workspace.scratch._free


def kept_from_the_kernel(address: int) -> int:
    """The bytes in memory of the mapping with this address that Linux may not take.

    Where it does not say, there are none.
    """
    sizes, inside = {}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line[:1] in "0123456789abcdef":
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            inside = begin <= address < end
        elif inside:
            name, *values = line.split()
            sizes[name] = values
    return (
        (int(sizes["Rss:"][0]) - int(sizes["LazyFree:"][0])) * 1024 if "LazyFree:" in sizes else 0
    )


def test_steps_find_their_buffers_again(pages):
    model = Reader()
    optimizer = make(model, eps=0.1)
    evaluates(model, optimizer)
    first = set(free_buffers(optimizer))
    for _ in range(3):
        evaluates(model, optimizer)
    assert set(free_buffers(optimizer)) == first


def test_between_steps_buffers_have_no_memory_of_their_own(pages):
    model = Reader()
    optimizer = make(model, eps=0.1)
    evaluates(model, optimizer)
    buffers = free_buffers(optimizer)
    assert buffers
    for buffer in buffers:
        if buffer._pages is None:
            assert buffer.memory.untyped_storage().nbytes() == 0
        elif sys.platform == "linux":
            # The kernel takes note of pages in batches, of 31 at most on each processor.
            assert kept_from_the_kernel(buffer.memory.data_ptr()) <= 2 * 31 * mmap.PAGESIZE
    if pages:
        assert any(buffer._pages is not None for buffer in buffers)


def test_what_the_system_has_taken_is_written_again(pages):
    model = Reader()
    optimizer = make(model, eps=0.1)
    evaluates(model, optimizer)
    for buffer in free_buffers(optimizer):
        if buffer._pages is not None:
            # As the system would, short of memory.
            buffer._pages[:] = bytes(len(buffer._pages))
    evaluates(model, optimizer)


def test_steps_in_other_modes_share_buffers(pages):
    model = Reader()
    optimizer = make(model, eps=0.1)
    modes = [torch.inference_mode, torch.no_grad, torch.enable_grad]
    for first, then in itertools.permutations(modes, 2):
        for mode in (first, then):
            rest = copy.deepcopy(model)
            for move in optimizer.ask():
                with mode():
                    shown = model(TOKENS)
                with torch.no_grad():
                    # Whole products where gradients are wanted, chunks elsewhere.
                    torch.testing.assert_close(shown, stands_in_place(rest, move)(TOKENS))
            optimizer.flush()
            assert is_clean(model)


def other_module(model: Reader) -> None:
    """That reads the same parameters otherwise."""
    doubled = Doubled(WIDTH, WIDTH)
    doubled.weight, doubled.bias = model.inner[0].weight, model.inner[0].bias
    model.inner[0] = doubled


def other_children(model: Reader) -> None:
    model.inner = nn.Sequential(*model.inner, nn.Tanh())


def other_places(model: Reader) -> None:
    for param in model.parameters():
        param.data = param.data.clone()


def other_strides(model: Reader) -> None:
    model.inner[0].weight.data = model.inner[0].weight.data.t().contiguous().t()


def other_values(model: Reader) -> None:
    with torch.no_grad():
        model.head.weight.mul_(1.5)


def tied(model: Reader) -> None:
    """By another name, which adds no parameter."""
    model.inner.add_module("again", model.inner[2])


@pytest.mark.parametrize(
    "change",
    [other_module, other_children, other_places, other_values, other_strides, tied],
)
def test_what_changes_between_steps_is_seen(change: Callable[[Reader], None]):
    model = Reader()
    optimizer = make(model, eps=0.1)
    evaluates(model, optimizer)
    change(model)
    evaluates(model, optimizer)
    evaluates(model, optimizer)


def test_layers_that_are_compiled_between_steps_are_read_as_a_whole():
    model = Reader()
    optimizer = make(model, eps=0.1)
    evaluates(model, optimizer)
    model.head.compile(backend="eager")
    evaluates(model, optimizer)


@torch.no_grad()
def test_norms_are_written_once_for_the_whole_model_and_by_themselves_without_it():
    model = nn.Sequential(*[nn.Sequential(nn.LayerNorm(WIDTH), Reader().inner) for _ in range(3)])
    optimizer = make(model, eps=0.1)
    x, rest = torch.randn(16, WIDTH), copy.deepcopy(model)
    for move in optimizer.ask():
        whole, *others = optimizer._displacement._workspace.layers
        assert whole.module is model
        assert len(whole.members) == 6
        assert not any(isinstance(layer.module, nn.LayerNorm) for layer in others)
        there = stands_in_place(rest, move)
        assert torch.equal(model(x), there(x))
        assert torch.equal(model[1](x), there[1](x))
        assert torch.equal(model[1][0](x), there[1][0](x))
    optimizer.flush()


class WithMore(nn.Module):
    """Reads one layer and, of another module, those in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.more = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, *self.more):
            x = layer(x)
        return x


@torch.no_grad()
@pytest.mark.parametrize("order", ["compiled first", "shared first"])
def test_a_layer_that_comes_into_a_compiled_module_is_read_there_and_outside(order):
    compiled, shared = WithMore(), nn.Linear(8, 8)
    compiled.compile(backend="eager")
    model = nn.Sequential(*[compiled, shared][:: 1 if order == "compiled first" else -1])
    names = [name for name, _ in model.named_parameters()]
    optimizer = make(model, eps=0.1)
    x = torch.randn(16, 8)
    for comes in (False, True):
        if comes:
            compiled.more.append(shared)
        for move in optimizer.ask():
            there = copy.deepcopy(model)
            params = optimizer.param_groups[0]["params"]
            twins = {id(p): twin for p, twin in zip(
                model.parameters(), there.parameters(), strict=True)}  # fmt: skip
            zokern.ops.perturb_(
                [twins[id(p)] for p in params], move.draws, move.coeffs, seed=move.seed,
                law=move.law, tensor_ids=[zokern.noise.tensor_id(name) for name in names],
            )  # fmt: skip
            assert torch.equal(model(x), there(x))
        optimizer.flush()


def test_a_module_that_is_scripted_between_steps_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    optimizer = make(model)
    step = lambda: model(torch.ones(4, 8)).sum()  # noqa: E731
    optimizer.step(step)
    model[1] = torch.jit.script(nn.Tanh())
    with pytest.raises(ValueError, match="1 is scripted"):
        optimizer.step(step)
    assert is_clean(model)


def test_two_optimizers_of_one_compiled_layer_take_turns():
    model = nn.Linear(8, 8)
    model.compile(backend="eager")
    weight, bias = model.named_parameters()
    one = zokern.MeZO([weight], 0.1, module=model, layerwise=True)
    other = zokern.MeZO([bias], 0.1, module=model, layerwise=True)
    next(iter(one.ask()))
    with pytest.raises(RuntimeError, match="is compiled, and is being evaluated layerwise by"):
        next(iter(other.ask()))
    other.flush()
    one.flush()
    for optimizer in (one, other):
        optimizer.step(lambda: model(torch.ones(4, 8)).sum())
    assert is_clean(model)


def test_an_alias_that_appears_between_steps_is_refused():
    model = Reader()
    optimizer = make(model, eps=0.1)
    evaluates(model, optimizer)
    model.inner[0].kept = [model.head.weight.detach()]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"kept\[0\] shares memory with the parameter head\."):
        evaluates(model, optimizer)
    optimizer.flush()
    assert is_clean(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    del model.inner[0].kept
    evaluates(model, optimizer)


def test_parameters_that_are_replaced_between_steps_are_refused_until_they_are_back():
    model = Reader()
    optimizer = make(model, eps=0.1)
    evaluates(model, optimizer)
    own = model.head.weight
    model.head.weight = nn.Parameter(own.detach().clone())
    with pytest.raises(ValueError, match=r"no longer in module="):
        evaluates(model, optimizer)
    optimizer.flush()
    model.head.weight = own
    evaluates(model, optimizer)


def test_a_tensor_that_a_closure_keeps_is_not_written_again(pages):
    """Its buffer is the closure's from then on."""
    model = Reader()
    optimizer = make(model, eps=0.1, layerwise=True)
    kept = []
    model.inner[2].register_forward_hook(lambda module, *_: kept.append(module.weight.data))
    with torch.no_grad():
        for _ in optimizer.ask():
            model(TOKENS)
        optimizer.flush()
    values = [tensor.clone() for tensor in kept]
    with torch.no_grad():
        for _ in optimizer.ask():
            model(TOKENS)
        optimizer.flush()
    assert not torch.equal(values[0], values[1])
    assert all(torch.equal(a, b) for a, b in zip(kept, values, strict=False))


@torch.no_grad()
def test_a_storage_that_a_closure_keeps_is_not_written_again(pages):
    model = Reader()
    optimizer = make(model, eps=0.1)
    kept: dict[torch.UntypedStorage, Tensor] = {}

    def content(storage: torch.UntypedStorage) -> Tensor:
        return torch.empty(0, dtype=torch.uint8).set_(storage).clone()

    def keep(module: nn.Module, *_: object) -> None:
        storage = module.weight.untyped_storage()
        kept[storage] = content(storage)

    for layer in (model.inner[2], model.norm):
        layer.register_forward_hook(keep)
    for _ in range(2):
        for _ in optimizer.ask():
            model(TOKENS)
        optimizer.flush()
    assert len(kept) == 8
    assert all(torch.equal(content(storage), values) for storage, values in kept.items())


@torch.no_grad()
def test_weights_that_a_closure_shares_between_processes_are_not_written_again(pages):
    model = Reader()
    optimizer = make(model, eps=0.1)
    kept: list[tuple[Tensor, Tensor]] = []

    def share(module: nn.Module, *_: object) -> None:
        shared = module.weight.data.share_memory_()
        kept.append((shared, shared.clone()))

    for layer in (model.inner[2], model.norm):
        layer.register_forward_hook(share)
    for _ in range(3):
        for _ in optimizer.ask():
            model(TOKENS)
        optimizer.flush()
    assert len({shared.data_ptr() for shared, _ in kept}) == 12
    assert all(torch.equal(shared, values) for shared, values in kept)


@torch.no_grad()
def test_gradients_with_respect_to_inputs_of_layers_that_are_read_in_chunks():
    model = Reader()
    optimizer = make(model, eps=0.1)
    x, rest = torch.randn(16, WIDTH), copy.deepcopy(model)
    evaluates(model, optimizer)
    for move in optimizer.ask():
        there = stands_in_place(rest, move)
        for transform in (torch.func.grad, torch.func.hessian):
            given, wanted = (
                transform(lambda z, m=m: m.head(m.inner(z)).square().mean())(x[:2])
                for m in (model, there)
            )
            torch.testing.assert_close(given, wanted)
    optimizer.flush()


def test_one_element_that_is_written_behind_torchs_back_is_unknown_again_in_the_next_step():
    write = torch.jit.script(_fill)
    read = torch.jit.script(_plus_one)
    model = nn.Module()
    model.written, model.read = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = make(model, eps=0.1)
    with pytest.raises(RuntimeError, match="written to"):
        optimizer.step(lambda: write(model.written).sum())
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step(lambda: read(model.read).sum())


def _fill(w: Tensor) -> Tensor:
    return w.fill_(3.0)


def _plus_one(w: Tensor) -> Tensor:
    return w + 1


def test_layers_of_two_dtypes_and_odd_sizes_share_buffers():
    model = nn.Sequential(nn.Linear(33, 31).bfloat16(), nn.Linear(31, 15, bias=False).float())
    optimizer = make(model, eps=0.1, precision="inplace")
    x = torch.randn(16, 33).bfloat16()
    rest = copy.deepcopy(model)
    with torch.no_grad():
        for move in optimizer.ask():
            shown = stands_in_place(rest, move, rounding=None)
            assert torch.equal(model[1](model[0](x).float()), shown[1](shown[0](x).float()))
    optimizer.flush()
