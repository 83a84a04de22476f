"""Real models: LoRA adapters of a transformers decoder train with every method, unmodified."""

import pytest
import torch

import zokern
from tests.zo import METHODS, same

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TOKENS = torch.randint(0, 60, (4, 12), generator=torch.Generator().manual_seed(0))


def make_decoder(dtype: torch.dtype = torch.float32):
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).to(dtype)
    return model.eval()


def make_lora(dtype: torch.dtype = torch.float32):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return peft.get_peft_model(make_decoder(dtype), config).eval()


def trainable(model) -> list:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def loss_of(model):
    return lambda: model(input_ids=TOKENS, labels=TOKENS).loss.float()


def adapter_vectors(model, scale: float) -> dict:
    generator = torch.Generator().manual_seed(3)
    state = peft.get_peft_model_state_dict(model)
    moved = {n: t + scale * torch.randn(t.shape, generator=generator) for n, t in state.items()}
    return zokern.zopro.delta(moved, model)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_train_with_every_method(method, dtype):
    model = make_lora(dtype)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = {n: p.detach().clone() for n, p in trainable(model)}
    arguments = {"lr": method.arguments.get("lr", 0.01)}
    if method.cls is zokern.ZOPrO:
        vectors = {key: adapter_vectors(model, 0.1) for key in ("previous_update", "reward_delta")}
        arguments |= vectors
        optimizer = zokern.ZOPrO(trainable(model), total_steps=10, seed=1, **arguments)
    else:
        optimizer = method.make(model, params=trainable(model), **arguments)
    for _ in range(3):
        optimizer.step(loss_of(model))
    assert all(not torch.equal(p, before[name]) for name, p in trainable(model))
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert loss_of(model)().isfinite()


def test_a_decoder_with_tied_embeddings_learns():
    model = make_decoder()
    groups = zokern.param_groups(model, weight_decay=0.01)
    optimizer = zokern.MeZO(groups, lr=3e-4, eps=1e-3, samples=2, momentum=0.9, seed=1)
    before = loss_of(model)().item()
    for _ in range(150):
        optimizer.step(loss_of(model))
    assert loss_of(model)().item() < before - 0.3


def test_a_trained_adapter_is_saved_and_replayed(tmp_path):
    model, trajectory = make_lora(), zokern.Trajectory()
    optimizer = zokern.MeZO(
        trainable(model), 0.01, seed=1, precision="master", trajectory=trajectory
    )
    for _ in range(3):
        optimizer.step(loss_of(model))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_decoder(), tmp_path)
    assert torch.equal(loss_of(loaded.eval())(), loss_of(model)())
    base = make_lora()
    zokern.replay(base, trajectory)
    assert same([p for _, p in trainable(base)], [p for _, p in trainable(model)])


@pytest.mark.parametrize("cls", [zokern.OnDAREAdamW, zokern.OnTIESAdamW])
@pytest.mark.parametrize("given", ["modules", "state dicts"])
def test_a_policys_adapter_is_merged_with_that_of_its_reference(cls, given):
    policy, reference, base = make_lora(), make_lora(), make_lora()
    reference.add_adapter("sft", reference.peft_config["default"])
    reference.set_adapter("sft")
    reference.delete_adapter("default")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, param in trainable(reference):
            param.copy_(0.1 * torch.randn(param.shape, generator=generator))
    if given == "modules":
        sources = reference, base
    else:
        sources = (
            peft.get_peft_model_state_dict(reference, adapter_name="sft"),
            peft.get_peft_model_state_dict(base),
        )
    opt = cls(
        policy.named_parameters(),
        lr=0.0,
        alpha=0.25,
        use_merge=True,
        reference=sources[0],
        base=sources[1],
    )
    before = {name: param.detach().clone() for name, param in trainable(policy)}
    loss_of(policy)().backward()
    opt.step()
    wanted = dict(zip(before, [p for _, p in trainable(reference)], strict=True))
    for name, param in trainable(policy):
        tau = wanted[name] - before[name]
        assert torch.allclose(param, before[name] + 0.25 * tau, atol=1e-6), name
