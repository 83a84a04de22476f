"""TRL's trainers: the merging optimizers as they are, and zeroth-order ones through the mixin."""

from pathlib import Path

import pytest
import torch
from torch import nn

import zokern

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from trl import (  # noqa: E402
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from zokern.integrations.transformers import ZOMixin  # noqa: E402

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


def make_data(config) -> "datasets.Dataset":
    prompts, chosen, rejected = (
        [f"the {w}" for w in WORDS[2:]],
        " jumps over <eos>",
        " a lazy dog",
    )
    if config is KTOConfig:
        rows = [
            {"prompt": prompt, "completion": completion, "label": label}
            for prompt in prompts
            for completion, label in ((chosen, True), (rejected, False))
        ]
    elif config is SFTConfig:
        rows = [{"prompt": prompt, "completion": chosen} for prompt in prompts]
    else:
        rows = [{"prompt": p, "chosen": chosen, "rejected": rejected} for p in prompts]
    return datasets.Dataset.from_list(rows)


def make_config(config, folder: Path, **changes):
    defaults = {
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return config(output_dir=str(folder), **(defaults | changes))


def make_trainer(name: str, folder: Path, trainer=DPOTrainer, config=DPOConfig, **changes):
    """From the same weights each time, which are also the reference; the base has others."""
    policy, reference, base = make_model(0), make_model(0), make_model(1)
    optimizer, arguments = OPTIMIZERS[name]
    return trainer(
        model=policy,
        ref_model=reference,
        args=make_config(config, folder, **changes),
        train_dataset=make_data(config),
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
    saved_twice = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = make_trainer(name, tmp_path, **saved_twice)
    start = weights(straight.model)
    straight.train()

    resumed, begin = make_trainer(name, tmp_path, **saved_twice), AtBegin()
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


def mean_losses(trainer, steps: int) -> tuple[float, float]:
    """Of the first steps and of the last."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return sum(losses[:steps]) / steps, sum(losses[-steps:]) / steps


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("trainer", "config"), [(DPOTrainer, DPOConfig), (KTOTrainer, KTOConfig)], ids=["DPO", "KTO"]
)
def test_merging_optimizers_align_in_twenty_steps(name, trainer, config, tmp_path):
    made = make_trainer(name, tmp_path, trainer, config, max_steps=20, logging_steps=1)
    made.train()
    assert len(made.state.log_history) == 21
    first, last = mean_losses(made, 5)
    assert last < first - 0.01


class ZODPOTrainer(ZOMixin, DPOTrainer):
    pass


class ZOKTOTrainer(ZOMixin, KTOTrainer):
    pass


class ZOSFTTrainer(ZOMixin, SFTTrainer):
    pass


class ZORewardTrainer(ZOMixin, RewardTrainer):
    pass


ZO = {
    "DPO": (ZODPOTrainer, DPOConfig, 0.01, "rewards/margins"),
    "KTO": (ZOKTOTrainer, KTOConfig, 0.01, "rewards/margins"),
    "SFT": (ZOSFTTrainer, SFTConfig, 0.003, "mean_token_accuracy"),
    "Reward": (ZORewardTrainer, RewardConfig, 0.003, "margin"),
}


@pytest.mark.parametrize("name", ZO)
def test_zeroth_order_training_by_each_trainer(name, tmp_path):
    trainer, config, lr, metric = ZO[name]
    model = make_model(0)
    if config is RewardConfig:
        model.config.num_labels = 1
        model = transformers.LlamaForSequenceClassification(model.config)
    data = make_data(config)
    made = trainer(
        model=model,
        args=make_config(
            config,
            tmp_path,
            max_steps=14,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=3,
            learning_rate=lr,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=7,
        ),
        train_dataset=data,
        eval_dataset=data,
        processing_class=make_tokenizer(),
        zo_arguments={"fuse_next": True},
        **({"ref_model": make_model(0)} if name in ("DPO", "KTO") else {}),
    )
    made.train()
    evaluations = [e["eval_loss"] for e in made.state.log_history if "eval_loss" in e]
    assert len(evaluations) == 2
    first, last = mean_losses(made, 5)
    assert last < first
    assert evaluations[1] < evaluations[0]
    assert sum(metric in entry for entry in made.state.log_history) == 14
    assert sum(f"eval_{metric}" in entry for entry in made.state.log_history) == 2


class ZOGRPOTrainer(ZOMixin, GRPOTrainer):
    pass


def test_trainers_that_generate_within_their_steps_are_refused(tmp_path):
    with pytest.raises(TypeError, match="ZOGRPOTrainer: ZOMixin replaces the training_step"):
        ZOGRPOTrainer(
            model=make_model(0),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=make_config(GRPOConfig, tmp_path, per_device_train_batch_size=8),
            train_dataset=make_data(DPOConfig),
            processing_class=make_tokenizer(),
        )
