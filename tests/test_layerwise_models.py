"""Layerwise evaluation of real models: nothing is missed, nothing is left behind."""

import copy
import functools

import pytest
import torch
from torch import nn

import zokern
from tests.test_layerwise import is_clean, make
from tests.test_peft import TOKENS, make_decoder, make_lora
from tests.zo import loss_of, make_model, same, weights
from zokern.optim import layers

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def word_embeddings_are_large(monkeypatch):
    """Beside those of positions, of which half are below this in half precision."""
    monkeypatch.setattr(layers, "FEW_ROWS", 3000)


SMALL = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 32}
T5 = {"decoder_start_token_id": 0}
GQA = {"num_key_value_heads": 2, "tie_word_embeddings": True}


def decoder(name: str, **more) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**SMALL, **WIDTHS, **more)
    return getattr(transformers, f"{name}ForCausalLM")(config)


MODELS = {
    "llama": lambda: decoder("Llama", **GQA),
    "qwen2": lambda: decoder("Qwen2", **GQA),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    ),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, **WIDTHS)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            **T5, vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
        )
    ),
    "mixture of experts": lambda: decoder("Mixtral", num_local_experts=4, **GQA),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name]().to(dtype).eval()


def language_loss(model: nn.Module):
    return lambda: model(input_ids=TOKENS, labels=TOKENS).loss.float()


def moved_in_place(rest: nn.Module, move: zokern.optim.Move) -> nn.Module:
    there = copy.deepcopy(rest)
    moving = {name: param for name, param in there.named_parameters() if param.requires_grad}
    ids = [zokern.noise.tensor_id(name) for name in moving]
    zokern.ops.perturb_(
        moving.values(), move.draws, move.coeffs, seed=move.seed, law=move.law, tensor_ids=ids
    )
    return there


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_are_those_of_a_sweep_in_place(name, dtype):
    model = build(name, dtype)
    optimizer = make(model, precision="inplace", stochastic_rounding=False, eps=0.1)
    rest = copy.deepcopy(model)
    with torch.no_grad():
        unmoved = language_loss(rest)()
        for move in optimizer.ask():
            loss, wanted = language_loss(model)(), language_loss(moved_in_place(rest, move))()
            assert torch.equal(loss, wanted)
            assert loss != unmoved
    optimizer.flush()
    assert same(weights(model), weights(rest))
    assert is_clean(model)


def compiled_layers(dtype: torch.dtype) -> nn.Module:
    torch._dynamo.reset()
    model = make_decoder(dtype)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def adapted(dtype: torch.dtype) -> nn.Module:
    pytest.importorskip("peft")
    return make_lora(dtype)


def score_of_generated(model: nn.Module):
    """How likely what the model generates is; it reads its weights for each token anew."""

    def closure() -> torch.Tensor:
        out = model.generate(
            TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        return torch.stack(out.scores).float().logsumexp(-1).mean()

    return closure


# What else is evaluated, and how.
EVALUATED = {name: (functools.partial(build, name), language_loss) for name in MODELS} | {
    "adapters": (adapted, language_loss),
    "compiled layers": (compiled_layers, language_loss),
    "generation with a cache": (make_decoder, score_of_generated),
}


@pytest.mark.parametrize("where", ["in the forward", "after it", "never"])
@pytest.mark.parametrize("name", EVALUATED)
def test_evaluations_leave_the_stored_weights_alone(name, where):
    make_model, closure_of = EVALUATED[name]
    model = make_model(torch.bfloat16)
    before = [param.detach().clone() for param in model.parameters()]
    stored = [param.data for param in model.parameters()]
    trained = [(n, param) for n, param in model.named_parameters() if param.requires_grad]
    optimizer = zokern.MeZO(trained, lr=1e-2, eps=0.1, samples=2, module=model)
    assert optimizer.run["layerwise"]
    evaluate, losses, failing = closure_of(model), [], []

    def fail(*_):
        if failing:
            raise RuntimeError("stop")

    def closure(at: int) -> torch.Tensor:
        is_last = len(losses) == at
        if is_last and where == "in the forward":
            failing.append(at)
        losses.append(evaluate())
        assert same(stored, before)
        if is_last:
            raise RuntimeError("stop")
        return losses[-1]

    handle = model.get_output_embeddings().register_forward_pre_hook(fail)
    for at in range(4) if where != "never" else ():
        with pytest.raises(RuntimeError, match="stop"):
            optimizer.step(lambda: closure(at))  # noqa: B023
        assert len(losses) == at + (where == "after it")
        assert same(weights(model), before)
        losses.clear()
        failing.clear()
    handle.remove()
    for _ in optimizer.ask():
        losses.append(evaluate().item())
        assert same(stored, before)
    optimizer.flush()
    assert len(set(losses)) > 1
    assert same(weights(model), before)
    assert is_clean(model)


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_and_saves_plain_weights(name, tmp_path):
    model = build(name, torch.bfloat16)
    optimizer = zokern.MeZO(model.named_parameters(), lr=1e-3, eps=1e-2, seed=1, module=model)
    for _ in range(3):
        optimizer.step(language_loss(model))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert same(weights(model), weights(loaded))
    assert is_clean(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters(dtype):
    pytest.importorskip("peft")
    model = make_lora(dtype)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = zokern.MeZO(trained, lr=1e-3, eps=0.1, module=model, layerwise=True)
    rest = copy.deepcopy(model)
    with torch.no_grad():
        for move in optimizer.ask():
            wanted = language_loss(moved_in_place(rest, move))()
            assert torch.equal(language_loss(model)(), wanted)
    optimizer.flush()
    assert same(weights(model), weights(rest))


@torch.no_grad()
def test_generation_with_a_cache():
    model = make_decoder()
    optimizer = make(model, eps=0.05)
    rest = copy.deepcopy(model)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for move in optimizer.ask():
        wanted = moved_in_place(rest, move).generate(TOKENS, **settings)
        assert torch.equal(model.generate(TOKENS, **settings), wanted)
    optimizer.flush()
    assert is_clean(model)


@pytest.mark.parametrize("how", ["wrapped layers", "layers in place", "as a whole", "its forward"])
def test_compiled_layers(how):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model = make_decoder()
    plain = copy.deepcopy(model)
    counter = CompileCounter()
    if how == "as a whole":
        model = torch.compile(model, backend=counter)
    elif how == "its forward":
        model.forward = torch.compile(model.forward, backend=counter)
    for i in range(len(plain.model.layers)):
        if how == "wrapped layers":
            model.model.layers[i] = torch.compile(model.model.layers[i], backend=counter)
        elif how == "layers in place":
            model.model.layers[i].compile(backend=counter)
    optimizers = []
    for module in (plain, model):
        optimizers.append(make(module, lr=1e-3))
        optimizers[-1].step(language_loss(module))
    compiled_once = counter.frame_count
    for optimizer, module in zip(optimizers, (plain, model), strict=True):
        for _ in range(3):
            optimizer.step(language_loss(module))
    assert counter.frame_count == compiled_once > 0
    for a, b in zip(weights(plain), weights(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert all(type(param) is nn.Parameter for param in model.parameters())


AROUND = {
    "a model": lambda model, compile: compile(model),
    "a function": lambda model, compile: compile(lambda *args: model(*args) + 1),
    "its forward without its hooks": lambda model, compile: compile(model.forward),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.filterwarnings("error")
def test_what_is_compiled_around_a_model_that_was_not_is_refused(around, evaluated, fullgraph):
    torch._dynamo.reset()
    model = make_model()
    before = weights(model)
    evaluate = AROUND[around](
        model, functools.partial(torch.compile, backend="eager", fullgraph=fullgraph)
    )
    if evaluated:
        with torch.no_grad():
            evaluate(torch.ones(2, 10))
    optimizer = make(model)
    with pytest.raises(RuntimeError, match=r"give the model compiled, module=.*layerwise=False"):
        optimizer.step(lambda: evaluate(torch.ones(2, 10)).sum())
    assert same(weights(model), before)
    assert is_clean(model)
    optimizer.step(loss_of(model))


def test_a_compiled_function_that_reads_a_parameter_is_refused():
    torch._dynamo.reset()
    model = make_model()
    before, optimizer = weights(model), make(model)
    read = torch.compile(lambda x: x @ model[0].weight.t(), backend="eager")
    with pytest.raises(RuntimeError, match=r"0\.weight is read by its address.*layerwise=False"):
        optimizer.step(lambda: read(torch.ones(2, 10)).sum())
    assert same(weights(model), before)
    assert is_clean(model)


@pytest.mark.parametrize("how", ["wrapped", "in place", "its forward"])
def test_an_embedding_in_a_compiled_module(how):
    """Inside, no operation can be given the rows that it reads."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 1))
    plain, x = copy.deepcopy(model), torch.arange(5)
    if how == "wrapped":
        model = nn.Sequential(torch.compile(model, backend="eager"))
        plain = nn.Sequential(nn.ModuleDict({"_orig_mod": plain}))
        plain.forward = plain[0]["_orig_mod"].forward
    elif how == "in place":
        model.compile(backend="eager")
    else:
        model.forward = torch.compile(model.forward, backend="eager")
    optimizers = [make(module, eps=0.1) for module in (plain, model)]
    for optimizer, module in zip(optimizers, (plain, model), strict=True):
        optimizer.step(lambda: module(x).sum())  # noqa: B023
    assert optimizers[0].last.losses == pytest.approx(optimizers[1].last.losses, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_scripted_module_is_refused():
    model = nn.Sequential(torch.jit.script(nn.Linear(10, 4)))
    with pytest.raises(ValueError, match="0 is scripted"):
        make(model)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_closure_may_have_a_mode_of_its_own(mode):
    model = make_model()

    def closure():
        with mode():
            return loss_of(model)().detach()

    optimizer = make(model)
    for _ in range(2):
        optimizer.step(closure)
    assert is_clean(model)
    assert all(not param.is_inference() for param in model.parameters())


def test_autocast_keeps_no_cast_of_a_point():
    model = make_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer = make(model, eps=0.5)
        optimizer.step(lambda: loss_of(model)().float())
    assert len(set(optimizer.last.losses)) == 2
