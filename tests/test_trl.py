"""TRL's trainers take the merging optimizers as they are, and resume from their checkpoints."""

from pathlib import Path

import pytest
import torch
from torch import nn

import zokern

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from trl import DPOConfig, DPOTrainer  # noqa: E402

WORDS = ["<pad>", "<eos>", *["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]]
OPTIMIZERS = {
    "OnDARE": (zokern.OnDAREAdamW, {"reserve_p": 0.5}),
    "OnTIES": (zokern.OnTIESAdamW, {"reserve_p": 0.5}),
    "OnDARE, K = 2": (zokern.OnDAREAdamW, {"reserve_p": 0.5, "online_step": 2}),
}


def make_tokenizer():
    words = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<pad>")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    )


def make_model(seed: int):
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config)


def make_trainer(name: str, folder: Path):
    """From the same weights each time, which are also the reference; the base has others."""
    policy, reference, base = make_model(0), make_model(0), make_model(1)
    optimizer, arguments = OPTIMIZERS[name]
    pairs = [
        {"prompt": f"the {word}", "chosen": " jumps over <eos>", "rejected": " a lazy dog <eos>"}
        for word in WORDS[2:]
    ]
    return DPOTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(
            output_dir=str(folder),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="steps",
            save_steps=2,
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=make_tokenizer(),
        optimizers=(
            optimizer(
                policy.named_parameters(),
                lr=1e-3,
                use_merge=True,
                alpha=1e-3,
                reference=reference,
                base=base,
                seed=3,
                **arguments,
            ),
            None,
        ),
    )


class AtBegin(transformers.TrainerCallback):
    """What a trainer has when training begins."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.weights = weights(kwargs["model"])
        self.state = flat(kwargs["optimizer"].optimizer.state_dict())


def flat(value, name: str = "") -> dict:
    """Nested containers as one dict of their leaves; tensors are copied."""
    if isinstance(value, torch.Tensor):
        return {name: value.detach().clone()}
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, item in items for k, v in flat(item, f"{name}/{key}").items()}
    return {name: value}


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(a, second[name]) and a.dtype == second[name].dtype
        if isinstance(a, torch.Tensor)
        else a == second[name]
        for name, a in first.items()
    )


def weights(model: nn.Module) -> dict:
    return flat(dict(model.named_parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_dpo_trains_every_parameter_and_resumes_bit_for_bit(name, tmp_path):
    straight = make_trainer(name, tmp_path)
    start = weights(straight.model)
    straight.train()

    resumed, begin = make_trainer(name, tmp_path), AtBegin()
    resumed.add_callback(begin)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    saved = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert all(not torch.equal(begin.weights[key], start[key]) for key in start)
    assert all(tensor.isfinite().all() for tensor in begin.weights.values())
    assert sum(isinstance(value, torch.Tensor) for value in begin.state.values()) >= 2 * len(start)
    assert equal(begin.state, flat(saved))

    assert resumed.state.global_step == straight.state.global_step == 4
    assert equal(weights(resumed.model), weights(straight.model))
    assert equal(*(flat(each.optimizer.optimizer.state_dict()) for each in (resumed, straight)))
