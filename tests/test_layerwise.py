"""Layerwise evaluation: the module shows perturbed weights, and the stored ones stay at rest."""

import concurrent.futures
import contextlib
import copy
import gc
import itertools
import linecache
import pickle
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zokern
from tests.zo import METHODS, loss_of, make_model, same, weights
from zokern import memory
from zokern.optim import layer_view, layers, layerwise, watched
from zokern.optim.watched import Watched

STORAGES = {
    "fp32": (torch.float32, {}),
    "fp16": (torch.float16, {"precision": "inplace"}),
    "bf16": (torch.bfloat16, {"precision": "inplace"}),
    "bf16-split8": (torch.bfloat16, {"precision": "split8"}),
    "bf16-split": (torch.bfloat16, {"precision": "split"}),
    "fp16-split": (torch.float16, {"precision": "split"}),
}


@pytest.fixture(autouse=True)
def embeddings_are_large(monkeypatch):
    """As those of real models, of which only the rows are written that are read."""
    monkeypatch.setattr(layers, "FEW_ROWS", 0)


def make(model: nn.Module, **arguments) -> zokern.MeZO:
    defaults = {"lr": 1e-2, "seed": 3, "module": model, "layerwise": True}
    return zokern.MeZO(model.named_parameters(), **{**defaults, **arguments})


def is_clean(model: nn.Module) -> bool:
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return not hooked and all(type(param) is nn.Parameter for param in model.parameters())


def stands_in_place(model: nn.Module, move: zokern.optim.Move, **settings) -> nn.Module:
    """A copy of the model that a sweep in place has moved from rest."""
    there = copy.deepcopy(model)
    ids = [zokern.noise.tensor_id(name) for name, _ in there.named_parameters()]
    zokern.ops.perturb_(
        list(there.parameters()), move.draws, move.coeffs, seed=move.seed, law=move.law,
        tensor_ids=ids, **settings,
    )  # fmt: skip
    return there


class Odd(nn.Module):
    """Parameters that are read in all the ways that are not a layer's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 16, padding_idx=3)
        self.positions = nn.Parameter(torch.randn(12, 16))
        # In eval mode it reads all the weights of its parts in one operation.
        self.fused = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.functional = nn.Linear(16, 16)
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.bag = nn.EmbeddingBag(50, 16)
        self.clipped = nn.Embedding(50, 16, max_norm=100.0)
        self.hidden_list = [self.functional.weight]
        self.shown = Shown()
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        h = self.tokens(x) + self.positions[: x.shape[1]] + self.bag(x)[:, None]
        h = self.fused(h)
        h = F.linear(h, self.functional.weight, self.functional.bias) + h @ self.hidden_list[0].t()
        h = self.norm.forward(h) + self.shown()
        return self.head(torch.tanh(h)) + F.linear(h, self.tokens.weight)


class Shown(nn.Module):
    """Its output is its parameter itself."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(16))

    def forward(self):
        return self.value


def make_odd() -> tuple[nn.Module, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Odd().eval(), torch.randint(0, 50, (4, 12))


@torch.no_grad()
@pytest.mark.parametrize("storage", STORAGES)
def test_it_evaluates_at_the_points_of_a_sweep_in_place(backend, storage):
    dtype, arguments = STORAGES[storage]
    model = make_model(dtype)
    optimizer = make(model, samples=2, stochastic_rounding=False, **arguments)
    rest = copy.deepcopy(model)
    for move in optimizer.ask():
        assert torch.equal(loss_of(model)(), loss_of(stands_in_place(rest, move))())
        there = stands_in_place(rest, move).state_dict()
        assert same([*model.state_dict().values()], [*there.values()])
    optimizer.flush()
    assert same(weights(model), weights(rest))
    assert is_clean(model)


@torch.no_grad()
def test_every_way_to_read_a_parameter_sees_it_perturbed():
    model, x = make_odd()
    model.clipped.weight.requires_grad_(False)
    optimizer = make(model, eps=0.1)
    unmoved, there = model(x), make_odd()[0]
    for _ in optimizer.ask():
        there.load_state_dict(model.state_dict())
        assert torch.equal(model(x), there(x))
        assert not torch.equal(model(x), unmoved)
    optimizer.flush()
    assert torch.equal(model(x), unmoved)
    assert is_clean(model)


@torch.no_grad()
@pytest.mark.parametrize(
    "read",
    [
        lambda m, x: F.linear(x, m.weight),
        lambda m, x: x @ m.weight.T,
        lambda m, x: torch.einsum("bi,oi->bo", x, m.weight),
        lambda m, x: m.forward(x),
        lambda m, x: torch.func.functional_call(m, {"weight": m.weight, "bias": m.bias}, (x,)),
        lambda m, x: torch.nn.utils.parameters_to_vector(m.parameters()),
        lambda m, x: torch.stack(list(m.weight)),
        lambda m, x: m.weight.numpy(),
        lambda m, x: m.state_dict()["weight"],
        lambda m, x: m.weight.data,
        lambda m, x: m.weight.norm(),
    ],
)
def test_reads_outside_a_forward(read):
    model = nn.Linear(10, 4)
    x = torch.randn(3, 10)
    optimizer = make(model, eps=0.1)
    rest = copy.deepcopy(model)
    for move in optimizer.ask():
        wanted = read(stands_in_place(rest, move), x)
        assert torch.equal(torch.as_tensor(read(model, x)), torch.as_tensor(wanted))
        assert (model.weight.shape, model.weight.dtype) == ((4, 10), torch.float32)
    optimizer.flush()


@pytest.mark.parametrize(
    ("touch", "message"),
    [
        (lambda m: m.weight.data_ptr(), "weight is read by its address"),
        (lambda m: m.weight.mul_(2), "weight was written to"),
        (lambda m: setattr(m.weight, "data", torch.zeros(4, 10)), "weight was written to"),
    ],
)
def test_what_cannot_be_followed_is_an_error_and_changes_nothing(touch, message):
    model = nn.Linear(10, 4)
    before = weights(model)
    optimizer = make(model)

    def closure():
        touch(model)
        return model(torch.ones(2, 10)).sum()

    with pytest.raises(RuntimeError, match=message):
        optimizer.step(closure)
    assert same(weights(model), before)
    assert is_clean(model)


def scripted(weight):
    return weight + 0


UNNOTICED = {
    "torch.tensor": lambda w: torch.tensor(w),
    "torch.as_tensor": lambda w: torch.as_tensor(w, dtype=torch.float64),
    "torch.asarray": lambda w: torch.asarray(w, copy=True, requires_grad=False),
    "torch.Tensor": lambda w: torch.Tensor(w),
    "new_tensor": lambda w: torch.ones(1).new_tensor(w),
    "DLPack": lambda w: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(w)),
    "a scripted function": lambda w: torch.jit.script(scripted)(w),
    "a traced function": lambda w: torch.jit.trace(scripted, torch.ones(4, 10))(w),
    "vmap": lambda w: torch.func.vmap(scripted)(w),
}


@pytest.mark.parametrize("name", UNNOTICED)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*copy construct.*:UserWarning")
def test_what_reads_a_parameter_behind_torchs_back_finds_nan(name):
    model, read = nn.Linear(10, 4), UNNOTICED[name]
    optimizer, before = make(model), weights(model)
    with torch.no_grad():
        assert torch.equal(read(model.weight).float(), before[0])
    with pytest.warns(RuntimeWarning, match=r"not finite.*take layerwise=False"):
        optimizer.step(lambda: read(model.weight).float().sum())
    assert optimizer.last.skipped
    assert same(weights(model), before)


def test_a_parameter_that_is_watched_has_the_layout_that_it_is_stored_in():
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    strides = model.weight.stride()
    optimizer = make(model)
    for _ in optimizer.ask():
        assert isinstance(model.weight, Watched)
        assert model.weight.stride() == strides
        assert model.weight.is_contiguous(memory_format=torch.channels_last)
        assert model.weight.data.shape == (4, 3, 3, 3)
    optimizer.flush()
    assert model.weight.stride() == strides


@torch.no_grad()
def test_an_embedding_is_made_of_the_rows_that_are_read(monkeypatch):
    table = nn.Embedding(1000, 8)
    model = nn.Sequential(table, nn.Linear(8, 1))
    optimizer = make(model)
    swept = []
    backend = zokern.backends.select(torch.device("cpu"))
    real = backend.perturb_
    monkeypatch.setattr(
        backend,
        "perturb_",
        lambda sweep: swept.append([p.shape for p in sweep.params]) or real(sweep),
    )
    x = torch.tensor([[5, 5, 999], [0, 5, 7]])
    rest = copy.deepcopy(model)
    for move in optimizer.ask():
        wanted = stands_in_place(rest, move)
        swept.clear()
        assert torch.equal(model(x), wanted(x))
        assert [(4, 8)] in swept
        assert not any((1000, 8) in shapes for shapes in swept)
    optimizer.flush()


@torch.no_grad()
def test_another_law_between_steps():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    optimizer, x = make(model), torch.randn(3, 8)
    for law in ("gauss16", "rademacher", "gauss16"):
        for group in optimizer.param_groups:
            group["law"] = law
        rest = copy.deepcopy(model)
        for move in optimizer.ask():
            assert move.law == law
            assert torch.equal(model(x), stands_in_place(rest, move)(x))
        optimizer.flush()


@torch.no_grad()
def test_a_small_embedding_is_made_as_a_whole(monkeypatch):
    monkeypatch.undo()
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 1))
    optimizer = make(model)
    real, read = layer_view.LayerView._embedding, []
    monkeypatch.setattr(
        layer_view.LayerView, "_embedding", lambda *given: read.append(given) or real(*given)
    )
    x, rest = torch.tensor([[5, 5, 49]]), copy.deepcopy(model)
    for move in optimizer.ask():
        assert torch.equal(model(x), stands_in_place(rest, move)(x))
    assert not read
    optimizer.flush()


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("precision", ["inplace", "split8"])
def test_a_large_head_is_evaluated_in_chunks(monkeypatch, bias, precision):
    chunk = 100 * 16 * 2
    monkeypatch.setitem(layers.SIZES, "cpu", layers.Sizes(chunk, chunk, chunk))
    head = nn.Linear(16, 1031, bias=bias).bfloat16()
    x, rest = torch.randn(2, 3, 16).bfloat16(), copy.deepcopy(head)
    optimizer = make(head, precision=precision, stochastic_rounding=False, eps=0.1)
    largest = []
    real = memory.Scratch.lend
    monkeypatch.setattr(
        memory.Scratch, "lend",
        lambda self, size, device: largest.append(size) or real(self, size, device),
    )  # fmt: skip
    for move in optimizer.ask():
        largest.clear()
        given = head(x)
        assert max(largest) <= chunk + memory.ALIGNMENT
        wanted = stands_in_place(rest, move)(x)
        torch.testing.assert_close(given, wanted, rtol=2**-7, atol=1e-3)
    optimizer.flush()


class Scaled(nn.Module):
    """With a small parameter of its own, lent while the layers inside it run."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
        self.scale = nn.Parameter(torch.rand(64))

    def forward(self, x):
        return self.layers(x) * self.scale


def test_a_step_takes_the_memory_of_its_largest_layer(monkeypatch):
    model, x = Scaled(), torch.randn(2, 64)
    optimizer = make(model)
    made, real = [], memory.Buffer
    monkeypatch.setattr(
        memory, "Buffer", lambda size, device: made.append(size) or real(size, device)
    )
    optimizer.step(lambda: model(x).square().mean())
    # Of a layer's weight and its bias, and of the scale.
    assert sum(made) == model.layers[0].weight.nbytes + memory.ALIGNMENT + memory.ALIGNMENT


@pytest.mark.parametrize("name", [n for n in METHODS if n != "gv, 2 samples"])
def test_every_method_takes_the_steps_that_it_takes_in_place(name):
    model, layered = make_model(), make_model()
    plain = METHODS[name].make(model)
    optimizer = METHODS[name].make(layered, module=layered, layerwise=True)
    for _ in range(3):
        plain.step(loss_of(model))
        optimizer.step(loss_of(layered))
    for a, b in zip(weights(model), weights(layered), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)
    assert is_clean(layered)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("inside", [True, False], ids=["in a forward", "after it"])
def test_a_closure_that_raises_leaves_nothing_behind(error, at, inside):
    model = make_model(torch.bfloat16)
    optimizer = make(model, samples=2)
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    calls = []

    def fail(*_):
        raise error("stop")

    def closure():
        calls.append(1)
        if len(calls) == at + 1:
            if not inside:
                fail()
            model[2].forward = fail
        return loss_of(model)()

    with pytest.raises(error):
        optimizer.step(closure)
    model[2].__dict__.pop("forward", None)
    assert same(weights(model), before)
    assert is_clean(model)
    assert optimizer.state_dict() == state
    optimizer.step(loss_of(model))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("recorded", [False, True])
def test_a_run_goes_on_after_a_closure_that_raises_as_if_nothing_had_been(
    storage, recorded, tmp_path
):
    dtype, precision = STORAGES[storage]
    runs = []
    for fails in (False, True):
        model = make_model(dtype)
        model.register_parameter("empty", nn.Parameter(torch.empty(0, dtype=dtype)))
        if recorded:
            precision = {**precision, "trajectory": zokern.Trajectory(tmp_path / f"{fails}.zo")}
        optimizer = make(model, **precision)
        losses = []
        for i in range(4):
            if fails and i == 2:
                raising = iter([loss_of(model)])
                with pytest.raises(StopIteration):
                    optimizer.step(lambda left=raising: next(left)())
            losses.append(optimizer.step(loss_of(model)))
        kept = [value for state in optimizer.state.values() for value in state.values()]
        runs.append((losses, weights(model), [t for t in kept if isinstance(t, torch.Tensor)]))
    (losses, ours, kept), (others_losses, others, others_kept) = runs
    assert losses == others_losses
    assert same(ours, others)
    assert same(kept, others_kept)


class Interrupt:
    """Ctrl-C at the n-th line of the files that swap parameters."""

    FILES = (layerwise.__file__, layer_view.__file__, watched.__file__)

    def __init__(self, line: int) -> None:
        self.left = line

    def __call__(self, frame, event, _):
        if frame.f_code.co_filename not in self.FILES:
            return None
        # Signals are not looked at between the end of a block and its __exit__, as traces are.
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if event == "line" and not line.startswith("with") and not self._is_put_off(frame):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self

    def _is_put_off(self, frame) -> bool:
        """Whether the line is within ``uninterrupted()``."""
        while frame is not None:
            if frame.f_code.co_name == "move":
                return True
            frame = frame.f_back
        return False


def test_an_interrupt_at_any_line_leaves_nothing_behind():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 50))
    before, x = weights(model), torch.tensor([[1, 2, 3]])
    interrupted = 0
    for line in range(1, 2000, 3):
        optimizer = make(model, lr=0.0)
        tracer = Interrupt(line)
        sys.settrace(tracer)
        try:
            optimizer.step(lambda: F.linear(model(x), model[3].weight.T).sum())
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(None)
        assert same(weights(model), before)
        assert is_clean(model)
        assert not watched._readers
        if tracer.left > 0:
            break
    assert interrupted > 50


def test_gradients_of_inputs_are_those_at_the_point():
    """Of weights that a graph remembers; and by torch.func."""
    model = nn.Sequential(nn.Conv1d(1, 2, 1), nn.Tanh(), nn.Conv1d(2, 1, 1, bias=False))
    x = torch.ones(1, 1, 1)

    def force(model: nn.Module) -> torch.Tensor:
        with torch.enable_grad():
            z = x.clone().requires_grad_()
            return torch.autograd.grad(model(z).sum(), z)[0].sum()

    def force_of_func(model: nn.Module) -> torch.Tensor:
        return torch.func.grad(lambda z: model(z).sum())(x).sum()

    for closure in (force, force_of_func):
        plain, layered = copy.deepcopy(model), copy.deepcopy(model)
        optimizers = [make(plain, layerwise=False, eps=0.1), make(layered, eps=0.1)]
        for module, optimizer in zip((plain, layered), optimizers, strict=True):
            optimizer.step(lambda: closure(module).detach())  # noqa: B023
        assert optimizers[0].last.losses == pytest.approx(optimizers[1].last.losses, rel=1e-5)
        assert len(set(optimizers[1].last.losses)) == 2
        assert is_clean(layered)


def test_other_threads_are_refused():
    model = make_model()
    before, optimizer = weights(model), make(model)
    pool = concurrent.futures.ThreadPoolExecutor(1)
    with pool, pytest.raises(RuntimeError, match="for one thread"):
        optimizer.step(lambda: pool.submit(loss_of(model)).result())
    assert same(weights(model), before)


def test_copies_in_the_middle_of_a_step_are_of_the_weights():
    model = make_model()
    optimizer, before = make(model, eps=0.1), weights(model)
    next(optimizer.ask())
    other_model, other = copy.deepcopy((model, optimizer))
    loaded = pickle.loads(pickle.dumps(model))
    other.flush()
    optimizer.flush()
    for module in (model, other_model, loaded):
        assert same(weights(module), before)
        loss_of(module)()


def test_a_copy_made_by_the_closure_is_a_module_like_others():
    model, kept = make_model(), {}
    optimizer = make(model, eps=0.1)

    def closure():
        reference = kept.setdefault("reference", copy.deepcopy(model))
        return loss_of(model)() - loss_of(reference)()

    for _ in range(2):
        optimizer.step(closure)
    assert len(set(optimizer.last.losses)) == 2
    assert all(type(param) is nn.Parameter for param in kept["reference"].parameters())
    pickle.dumps(kept["reference"])


class Stop(BaseException):
    pass


def stop(*_):
    raise Stop


def test_an_exception_that_the_closure_catches_ends_no_evaluation():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    optimizer, x = make(model, eps=0.1), torch.ones(4)

    def closure():
        handle = model[0].register_forward_pre_hook(stop)
        with contextlib.suppress(Stop):
            model(x)
        handle.remove()
        return model(x).sum()

    optimizer.step(closure)
    assert len(set(optimizer.last.losses)) == 2


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_token_ids_may_be_of_either_dtype(dtype):
    model = nn.Embedding(20, 8)
    make(model).step(lambda: model(torch.arange(5, dtype=dtype)).sum())


def test_two_optimizers_of_one_module_at_once_are_refused():
    model = make_model()
    outer, inner, before = make(model), make(model), weights(model)
    with pytest.raises(RuntimeError, match=r"0\.weight is being evaluated layerwise by another"):
        outer.step(lambda: inner.step(loss_of(model)))
    assert same(weights(model), before)
    assert is_clean(model)


def test_a_state_of_the_other_kind_is_refused():
    model = make_model(torch.bfloat16)
    plain = zokern.MeZO(model.named_parameters(), 1e-3)
    with pytest.raises(ValueError, match="layerwise=True, and this MeZO has layerwise=False"):
        plain.load_state_dict(make(model).state_dict())


def test_nothing_is_left_after_a_step():
    model = make_model()
    optimizer = make(model)
    views = []

    def closure():
        views.append(weakref.ref(optimizer._displacement._view))
        return loss_of(model)()

    optimizer.step(closure)
    assert is_clean(model)
    gc.collect()
    assert [view() for view in views] == [None] * 2


def test_between_ask_and_tell_the_module_shows_the_point():
    model = make_model()
    optimizer = make(model, eps=0.1)
    plain = loss_of(model)()
    losses = [loss_of(model)() for _ in optimizer.ask()]
    assert plain not in losses
    assert isinstance(model[0].weight, Watched)
    with pytest.raises(RuntimeError, match="tell the losses"):
        optimizer.ask()
    optimizer.tell([loss.float() for loss in losses])
    assert is_clean(model)


def test_copies_and_pickles_show_the_weights_at_rest():
    model = make_model()
    optimizer = make(model)
    optimizer.step(loss_of(model))
    loaded_model, loaded = pickle.loads(pickle.dumps((model, optimizer)))
    copied_model, copied = copy.deepcopy((model, optimizer))
    for other_model, other in ((loaded_model, loaded), (copied_model, copied)):
        other.step(loss_of(other_model))
        assert is_clean(other_model)
    optimizer.step(loss_of(model))
    assert same(weights(model), weights(loaded_model))
    assert same(weights(model), weights(copied_model))


def test_a_checkpoint_goes_on():
    model = make_model(torch.bfloat16)
    optimizer = make(model, momentum=0.9)
    optimizer.step(loss_of(model))
    other_model = make_model(torch.bfloat16)
    other_model.load_state_dict(model.state_dict())
    other = make(other_model, momentum=0.9, seed=8)
    other.load_state_dict(optimizer.state_dict())
    for _ in range(2):
        optimizer.step(loss_of(model))
        other.step(loss_of(other_model))
    assert same(weights(model), weights(other_model))


def test_an_optimizer_that_is_dropped_lets_its_module_go():
    model = make_model()
    optimizer = make(model)
    next(iter(optimizer.ask()))
    optimizer.flush()
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None
    assert is_clean(model)


@pytest.mark.parametrize("interrupted", [False, True])
def test_one_that_is_dropped_in_the_middle_of_a_step_leaves_nothing_behind(interrupted):
    model = make_model()
    before, optimizer = weights(model), make(model, eps=0.1)
    moves = optimizer.ask()
    next(moves)
    if interrupted:
        # After a forward that has ended without its hooks.
        handle = model[2].register_forward_pre_hook(stop)
        with pytest.raises(Stop):
            loss_of(model)()
        handle.remove()
    scratch = weakref.ref(optimizer._displacement._view._scratch)
    del optimizer, moves
    gc.collect()
    assert is_clean(model)
    assert not watched._readers
    assert same(weights(model), before)
    assert scratch() is None
    make(model).step(loss_of(model))


class Drop:
    """Lets go of what a list holds at the n-th line of the file that swaps parameters."""

    def __init__(self, line: int, kept: list) -> None:
        self.left, self.kept = line, kept

    def __call__(self, frame, event, _):
        if frame.f_code.co_filename != layer_view.__file__:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                self.kept.clear()
        return self


@torch.no_grad()
def test_one_that_is_dropped_in_the_middle_of_a_forward_leaves_nothing_behind():
    """Whenever the garbage collector comes."""
    model = make_model()
    before, wanted = weights(model), loss_of(model)()
    for line in itertools.count(1):
        optimizer = make(model, eps=0.1)
        next(optimizer.ask())
        kept = [optimizer.__dict__.pop("_displacement")]
        sys.settrace(Drop(line, kept))
        try:
            loss_of(model)()
        finally:
            sys.settrace(None)
        if kept:
            break
        assert is_clean(model)
        assert not watched._readers
        assert same(weights(model), before)
        assert loss_of(model)() == wanted
    assert line > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"module": None}, "layerwise=True needs module="),
        ({"fuse_next": True}, "nothing to fuse"),
        ({"precision": "master"}, "leave the weights at rest already"),
        ({"stochastic_rounding": True}, "float32 is stored as"),
        ({"layerwise": "yes"}, "layerwise must be True, False or None"),
        ({"module": nn.Linear(2, 2)}, "0.weight, 0.bias.* are not among them"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(make_model(), **arguments)


def test_half_precision_is_layerwise_where_the_module_is_given(caplog):
    with caplog.at_level("INFO", "zokern"):
        model = make_model(torch.bfloat16)
        optimizer = zokern.MeZO(model.named_parameters(), lr=1e-3, module=model)
    assert "layerwise" in caplog.text
    assert "stochastic rounding adds 0.00 bytes" in caplog.text
    assert (optimizer.run["precision"], optimizer.run["stochastic_rounding"]) == ("inplace", True)
    assert not any(optimizer.state.values())
    before = weights(model)
    losses = [loss_of(model)() for _ in optimizer.ask()]
    assert losses[0] != losses[1]
    optimizer.flush()
    assert same(weights(model), before)
    without = zokern.MeZO(make_model(torch.bfloat16).named_parameters(), lr=1e-3)
    assert (without.run["precision"], without.run["stochastic_rounding"]) == ("auto", False)


@pytest.mark.parametrize("assigned", [True, False])
def test_parameters_that_were_replaced_are_named(assigned):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = make(model)
    if assigned:
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    else:
        model[1] = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=rf"{4 if assigned else 2} of the optimizer's 4 param"):
        optimizer.step(lambda: model(torch.ones(2, 4)).square().mean())
