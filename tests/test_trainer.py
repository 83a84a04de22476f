"""Trainers with zeroth-order optimizers, on small models of three families built from configs."""

import os
import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import zokern
from tests import ranks
from tests.zo import same, weights

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

from transformers import TrainerCallback, TrainingArguments  # noqa: E402

from zokern.integrations.transformers import ZOTrainer  # noqa: E402

VOCABULARY = 24


def make_decoder() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        attention_dropout=0.1,
    )
    return transformers.LlamaForCausalLM(config)


def make_encoder() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def make_encoder_decoder() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


FAMILIES = {
    "decoder": make_decoder,
    "encoder": make_encoder,
    "encoder-decoder": make_encoder_decoder,
}


def make_model(family: str = "decoder") -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FAMILIES[family]()


def make_data(family: str, rows: int = 8) -> list[dict]:
    """What can be learnt: few distinct tokens, classes by the first; labels partly ignored."""
    generator = torch.Generator().manual_seed(1)
    data = []
    for row in range(rows):
        ids = torch.randint(2, 8, (6,), generator=generator)
        labels = ids.clone()
        if family == "decoder":
            # Rows with different numbers of labels, by which their losses are weighted.
            labels[1 : 1 + row % 4] = -100
        data.append({"input_ids": ids, "labels": ids[0] % 3 if family == "encoder" else labels})
    return data


def make_arguments(folder: Path, **changes) -> TrainingArguments:
    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **(defaults | changes))


def make_trainer(folder: Path, family: str = "decoder", **changes) -> ZOTrainer:
    own = ("model", "zo_optimizer", "zo_arguments", "zo_train_mode", "optimizers", "callbacks")
    given = {key: changes.pop(key) for key in own if key in changes}
    cls = changes.pop("cls", ZOTrainer)
    model = given.pop("model", None) or make_model(family)
    data = make_data(family)
    arguments = make_arguments(folder, **changes)
    return cls(model, arguments, train_dataset=data, eval_dataset=data, **given)


def as_launched(folder: Path, family: str = "decoder", **changes) -> ZOTrainer:
    """As torchrun's processes make it; they are in their group already."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return make_trainer(folder, family, **changes)


def logged(trainer: ZOTrainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize(("family", "lr"), [*zip(FAMILIES, (3e-3, 0.02, 3e-3), strict=True)])
def test_each_family_learns_without_a_backward_pass(family, lr, tmp_path, monkeypatch):
    trainer = make_trainer(
        tmp_path,
        family,
        max_steps=60,
        per_device_train_batch_size=8,
        learning_rate=lr,
        zo_arguments={"samples": 2},
    )
    monkeypatch.setattr(torch.Tensor, "backward", None)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.1
    assert all(param.grad is None for param in trainer.model.parameters())


def test_a_step_is_that_of_the_optimizer_by_itself(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, weight_decay=0.1, seed=11)
    seen: list[dict] = []
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: seen.append(collate(rows)) or seen[-1]
    trainer.train()

    model = make_model().eval()
    opt = zokern.MeZO(zokern.param_groups(model, weight_decay=0.1), lr=1e-3, seed=11)
    labels = seen[0]["labels"][:, 1:].ne(-100).sum()
    opt.step(lambda: model(**seen[0], num_items_in_batch=labels).loss)
    assert same(weights(model), weights(trainer.model))
    assert trainer.zo.last == opt.last
    assert logged(trainer, "loss") == [pytest.approx(opt.last.loss, abs=1e-6)]
    assert logged(trainer, "projected_gradient") == [abs(opt.last.projected_gradient[0])]
    assert logged(trainer, "evaluations_per_second")[0] > 0
    assert logged(trainer, "grad_norm") == []


@pytest.mark.parametrize("family", FAMILIES)
def test_micro_batches_are_one_batch_to_float_tolerance(family, tmp_path):
    once, often = (
        make_trainer(
            tmp_path, family, per_device_train_batch_size=8 // n, gradient_accumulation_steps=n
        )
        for n in (1, 4)
    )
    for trainer in (once, often):
        trainer.train()
    losses, others = logged(once, "loss"), logged(often, "loss")
    assert len(losses) == len(others) == 6
    assert others == pytest.approx(losses, abs=2e-5)
    for a, b in zip(weights(once.model), weights(often.model), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_a_micro_batch_without_labels_does_not_decide_how_others_count(tmp_path):
    losses = []
    for n in (1, 4):
        trainer = make_trainer(
            tmp_path,
            per_device_train_batch_size=4 // n,
            gradient_accumulation_steps=n,
            train_sampling_strategy="sequential",
            max_steps=2,
        )
        trainer.train_dataset[0]["labels"][:] = -100
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_step_of_an_epoch_has_fewer_micro_batches(family, tmp_path):
    """Each step sees other rows, but as the weights stand still, an epoch's losses say which."""
    trainer = make_trainer(
        tmp_path,
        family,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        learning_rate=0.0,
    )
    trainer.train()
    whole = trainer.evaluate()["eval_loss"]
    assert all(0.8 * whole < loss < 1.2 * whole for loss in logged(trainer, "loss"))


def test_the_learning_rate_follows_its_schedule_once_a_step(tmp_path):
    trainer = make_trainer(
        tmp_path,
        lr_scheduler_type="linear",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        warmup_steps=2,
    )
    trainer.train()
    wanted = [0, 5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4]
    assert logged(trainer, "learning_rate") == pytest.approx(wanted)
    assert trainer.zo.param_groups[0]["lr"] == 0.0
    assert trainer.zo.run["step"] == 6


class Killed(BaseException):
    pass


class KilledTrainer(ZOTrainer):
    """Is killed in some step, in the second evaluation."""

    steps_made = 0
    calls = 0

    def compute_loss(self, *args, **kwargs):
        self.calls += self.state.global_step == self.steps_made
        if self.calls == 4:
            raise Killed
        return super().compute_loss(*args, **kwargs)


RESUMED = {
    "momentum, fuse_next": (
        zokern.MeZO, {"momentum": 0.9, "fuse_next": True}, torch.float32, {"weight_decay": 0.1}
    ),
    "gv in train mode": (zokern.MeZOGV, {"candidates": 2}, torch.float32, {"zo_train_mode": True}),
    "conmezo": (zokern.ConMeZO, {}, torch.float32, {}),
    "layerwise bfloat16": (zokern.MeZO, {}, torch.bfloat16, {}),
    "split bfloat16": (zokern.FZOO, {"precision": "split", "eps": 0.01}, torch.bfloat16, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", RESUMED)
def test_a_killed_run_goes_on_bit_for_bit(name, tmp_path):
    optimizer, own, dtype, changes = RESUMED[name]

    def make(cls, folder):
        return make_trainer(
            tmp_path / folder,
            cls=cls,
            model=make_model().to(dtype),
            zo_optimizer=optimizer,
            zo_arguments=own,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            lr_scheduler_type="linear",
            save_strategy="steps",
            save_steps=3,
            logging_steps=100,
            **changes,
        )

    straight = make(ZOTrainer, "straight")
    straight.train()
    killed = make(KilledTrainer, "killed")
    # Somewhere after the checkpoint.
    killed.steps_made = random.Random(name).randrange(3, 6)
    with pytest.raises(Killed):
        killed.train()
    assert killed.state.global_step == killed.steps_made
    resumed = make(ZOTrainer, "killed")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert same(weights(resumed.model), weights(straight.model))
    assert not same(weights(resumed.model), weights(make_model().to(dtype)))
    states = [trainer.zo.state_dict() for trainer in (straight, resumed)]
    assert str(states[0]) == str(states[1])


@pytest.mark.parametrize("given", ["made", "given"])
def test_with_fuse_next_all_that_looks_at_the_model_finds_it_at_rest(given, tmp_path):
    """Masters make both runs bit for bit equal, wherever the weights stand in between."""
    trainers = []
    for fuse_next in (False, True):
        model = make_model()
        own = {"precision": "master", "fuse_next": fuse_next, "seed": 4}
        optimizer = zokern.MeZO(model.named_parameters(), lr=1e-3, **own)
        trainers.append(
            make_trainer(
                tmp_path / str(fuse_next),
                model=model,
                eval_strategy="steps",
                save_strategy="steps",
                eval_steps=2,
                save_steps=3,
                **({"zo_arguments": own} if given == "made" else {"optimizers": (optimizer, None)}),
            )
        )
        trainers[-1].train()
    plain, fused = trainers
    assert fused.zo.run["fuse_next"]
    assert len(logged(fused, "eval_loss")) == 3
    assert logged(fused, "eval_loss") == logged(plain, "eval_loss")
    assert logged(fused, "loss") == logged(plain, "loss")
    assert same(weights(fused.model), weights(plain.model))
    for step in (3, 6):
        files = [tmp_path / f / f"checkpoint-{step}/model.safetensors" for f in ("True", "False")]
        assert files[0].read_bytes() == files[1].read_bytes()
    fused.model.save_pretrained(tmp_path / "saved")
    saved = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert same(weights(saved), weights(plain.model))


class DisplacedWeights(TrainerCallback):
    """Whether the weights stand displaced after each step."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seen.append(not kwargs["optimizer"].optimizer._displacement.at_rest)


def test_fuse_next_fuses(tmp_path):
    callback = DisplacedWeights()
    trainer = make_trainer(tmp_path, zo_arguments={"fuse_next": True}, callbacks=[callback])
    trainer.train()
    assert callback.seen == [True] * 6
    assert trainer.zo._displacement.at_rest


@pytest.mark.parametrize("own", [{"fuse_next": True}, {"precision": "master"}], ids=str)
def test_the_best_model_is_loaded_and_trained_on(own, tmp_path):
    trainer = make_trainer(
        tmp_path,
        learning_rate=0.1,
        zo_arguments=own,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    losses = logged(trainer, "eval_loss")
    best = losses.index(min(losses)) + 1
    assert best < 6
    saved = transformers.LlamaForCausalLM.from_pretrained(tmp_path / f"checkpoint-{best}")
    assert same(weights(trainer.model), weights(saved))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses))
    before = weights(trainer.model)
    for group in trainer.zo.param_groups:
        group["lr"] = 0.0
    trainer.zo.step(lambda: trainer.model(**trainer.data_collator(trainer.train_dataset)).loss)
    trainer.zo.flush()
    assert all(
        torch.allclose(a, b, atol=1e-5) for a, b in zip(before, weights(trainer.model), strict=True)
    )


def make_adapted() -> nn.Module:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return peft.get_peft_model(make_model(), config)


def test_adapters_are_trained_saved_and_resumed(tmp_path):
    def make():
        return make_trainer(
            tmp_path,
            model=make_adapted(),
            max_steps=20,
            per_device_train_batch_size=8,
            learning_rate=0.03,
            save_strategy="steps",
            save_steps=10,
            eval_strategy="steps",
            eval_steps=10,
            load_best_model_at_end=True,
            zo_arguments={"fuse_next": True},
        )

    straight = make()
    before = straight.evaluate()["eval_loss"]
    straight.train()
    assert straight.evaluate()["eval_loss"] < before - 0.005
    trained = {n: p for n, p in straight.model.named_parameters() if p.requires_grad}
    assert {name for group in straight.zo.param_groups for name in group["param_names"]} == {
        *trained
    }
    assert all("lora" in name for name in trained)
    base = make_model()
    assert same(weights(straight.model.unload()), weights(base))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "checkpoint-20", is_trainable=True)
    assert same([p for p in loaded.parameters() if p.requires_grad], [*trained.values()])

    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert same([p for p in resumed.model.parameters() if p.requires_grad], [*trained.values()])


class Dropout(nn.Module):
    """A model with dropout in a layer and in its own forward; it notes whether they drop."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen.append((self.training, self.layer[1].training))
        return {"loss": nn.functional.dropout(self.layer(x), 0.5, self.training).square().mean()}


class Watching(ZOTrainer):
    """Notes what the model says of its mode to whoever asks in compute_loss, as TRL does."""

    asked: frozenset = frozenset()

    def compute_loss(self, model, *args, **kwargs):
        self.asked |= {self.model.training}
        return super().compute_loss(model, *args, **kwargs)


@pytest.mark.parametrize("train_mode", [False, True])
def test_the_forward_pass_is_in_the_mode_that_was_asked_for(train_mode, tmp_path):
    model = Dropout()
    rows = [{"x": torch.ones(4)}] * 4
    trainer = Watching(
        model, make_arguments(tmp_path, max_steps=2), train_dataset=rows, zo_train_mode=train_mode
    )
    trainer.train()
    assert model.seen == [(train_mode, train_mode)] * 4
    assert trainer.asked == {True}
    assert model.training
    assert model.layer[1].training
    if train_mode:
        assert trainer.zo.run["common_random_numbers"]


def test_an_optimizer_and_a_scheduler_may_be_given(tmp_path):
    model = make_model()
    optimizer = zokern.MeZO(model.named_parameters(), lr=1e-3, seed=0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    trainer = make_trainer(tmp_path, model=model, optimizers=(optimizer, scheduler), max_steps=3)
    trainer.train()
    assert trainer.zo is optimizer
    assert logged(trainer, "learning_rate") == pytest.approx([1e-3, 5e-4, 2.5e-4])


def test_a_trajectory_is_recorded_and_replays(tmp_path):
    path = tmp_path / "run.zok"
    trainer = make_trainer(
        tmp_path,
        zo_arguments={"trajectory": zokern.Trajectory(path), "precision": "master"},
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=3,
        save_steps=3,
        load_best_model_at_end=True,
    )
    trainer.train()
    replayed = make_model()
    zokern.replay(replayed, path)
    saved = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    assert same(weights(replayed), weights(saved))
    # A run that begins anew does not make off with the record of another.
    recorded = {"trajectory": zokern.Trajectory(path), "precision": "master"}
    again = make_trainer(tmp_path, zo_arguments=recorded)
    with pytest.raises(zokern.TrajectoryError, match="holds 6 steps already"):
        again.train()
    assert len(zokern.Trajectory.load(path)) == 6


def test_what_cannot_work_is_refused(tmp_path):
    model = make_model()
    adam = torch.optim.AdamW(model.parameters())
    with pytest.raises(TypeError, match=r"needs a zokern.ZOOptimizer .* not AdamW"):
        make_trainer(tmp_path, model=model, optimizers=(adam, None))
    mezo = zokern.MeZO(model.named_parameters(), lr=1e-3)
    with pytest.raises(ValueError, match="not both"):
        make_trainer(tmp_path, model=model, optimizers=(mezo, None), zo_arguments={})
    with pytest.raises(ValueError, match="takes zo_optimizer= and zo_arguments= instead"):
        ZOTrainer(model, make_arguments(tmp_path), optimizer_cls_and_kwargs=(torch.optim.AdamW, {}))
    for setting, said in [({"fp16": True}, "fp16=True"), ({"fsdp": "full_shard"}, "FSDP")]:
        arguments = make_arguments(tmp_path)
        vars(arguments).update(setting)
        with pytest.raises(ValueError, match=said):
            ZOTrainer(model, arguments)
    with pytest.raises(RuntimeError, match="made when training begins"):
        ZOTrainer(model, make_arguments(tmp_path)).zo  # noqa: B018


SEVERAL = {
    "decoder": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    # It accepts num_items_in_batch and ignores it.
    "encoder": {"per_device_train_batch_size": 2},
}


def train_on_ranks(folder: Path) -> list[tuple]:
    found = []
    for family, changes in SEVERAL.items():
        trainer = as_launched(folder, family, max_steps=2, learning_rate=0.01, seed=3, **changes)
        if dist.get_rank() == 1:
            for param in trainer.model.parameters():
                # Where nobody sets a seed, a head is another on each rank.
                nn.init.zeros_(param)
        batches: list[dict] = []
        collate = trainer.data_collator
        trainer.data_collator = lambda rows, f=collate, to=batches: to.append(f(rows)) or to[-1]
        trainer.train()
        assert type(trainer.model_wrapped) is type(trainer.model)
        found.append((weights(trainer.model), batches, logged(trainer, "loss"), trainer.zo.last))
    return found


def test_several_processes_are_one_that_takes_the_mean_of_their_losses(tmp_path):
    of_ranks = ranks.run(train_on_ranks, 2, tmp_path, tmp_path / "out")
    for i, (family, changes) in enumerate(SEVERAL.items()):
        (found, own, losses, last), (other, others, _, _) = (of_rank[i] for of_rank in of_ranks)
        assert same(found, other)
        model = make_model(family).eval()
        n = changes.get("gradient_accumulation_steps", 1)
        opt = zokern.MeZO(zokern.param_groups(model, weight_decay=0.0), lr=0.01, seed=3)
        for step in range(2):
            parts = [batches[n * step : n * step + n] for batches in (own, others)]
            assert not torch.equal(parts[0][0]["input_ids"], parts[1][0]["input_ids"])

            def closure(parts=parts, model=model, family=family) -> float:
                return sum(of_one_rank(model, family, part, parts) for part in parts) / 2

            opt.step(closure)
        assert same(found, weights(model)), family
        assert last == opt.last
        assert losses[-1] == pytest.approx(opt.last.loss, abs=1e-6)


def of_one_rank(model: nn.Module, family: str, part: list[dict], parts: list[list[dict]]) -> float:
    """A decoder's losses count labels, of which a rank has a share; others are means of rows."""
    if family != "decoder":
        return float(torch.stack([model(**batch).loss for batch in part]).mean())
    items = sum(batch["labels"][:, 1:].ne(-100).sum() for own in parts for batch in own)
    losses = [model(**batch, num_items_in_batch=items).loss * len(parts) for batch in part]
    return float(torch.stack(losses).sum())


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}


def resume_on_ranks(folder: Path) -> list[list[torch.Tensor]]:
    def make(cls, name, own, changes):
        return as_launched(
            folder / name,
            cls=cls,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            lr_scheduler_type="linear",
            zo_arguments=own,
            save_strategy="steps",
            save_steps=2,
            **changes,
        )

    found = []
    for case in [({"momentum": 0.9}, EVALUATED), ({"fuse_next": True}, {})]:
        straight = make(ZOTrainer, f"straight-{len(found)}", *case)
        straight.train()
        killed = make(KilledTrainer, f"killed-{len(found)}", *case)
        killed.steps_made = 3
        with pytest.raises(Killed):
            killed.train()
        dist.barrier()
        resumed = make(ZOTrainer, f"killed-{len(found)}", *case)
        resumed.train(resume_from_checkpoint=True)
        assert logged(resumed, "eval_loss") == logged(straight, "eval_loss")
        assert same(weights(resumed.model), weights(straight.model))
        found.append(weights(resumed.model))
    return found


def test_a_run_of_several_processes_that_was_killed_goes_on_bit_for_bit(tmp_path):
    of_ranks = ranks.run(resume_on_ranks, 2, tmp_path, tmp_path)
    for found, other in zip(*of_ranks, strict=True):
        assert same(found, other)
        assert not same(found, weights(make_model()))
    checkpoint = tmp_path / "straight-1" / "checkpoint-6"
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in checkpoint.iterdir()}


def refused_on_ranks(folder: Path) -> list[str]:
    said = []
    model = make_model()
    group, own = dist.group.WORLD, {"lr": 1e-3, "seed": 0}
    for changes in ({}, {"process_group": group, "parallel": "population"}):
        opt = zokern.MeZO(model.named_parameters(), **own, **changes)
        with pytest.raises(ValueError, match=r"processes|parallel") as caught:
            as_launched(folder, model=model, optimizers=(opt, None))
        said.append(str(caught.value))
    # Their weights are the caller's.
    model = make_model()
    opt = zokern.MeZO(model.named_parameters(), process_group=group, **own)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += dist.get_rank()
    with pytest.raises(RuntimeError, match="has drifted") as caught:
        as_launched(folder, model=model, optimizers=(opt, None)).train()
    said.append(str(caught.value))
    return said


def test_optimizers_that_do_not_fit_several_processes_are_refused(tmp_path):
    for said in ranks.run(refused_on_ranks, 2, tmp_path, tmp_path):
        assert "2 processes, and the optimizer knows of 1: give it process_group=" in said[0]
        assert "parallel='population' needs one batch for all" in said[1]
        assert said[2] == "rank 1 has drifted from the others, in lm_head.weight"


def test_what_only_train_mode_does_is_refused_in_eval_mode(tmp_path):
    with pytest.raises(ValueError, match=r"neftune_noise_alpha adds no noise: .*zo_train_mode"):
        make_trainer(tmp_path, neftune_noise_alpha=5.0)
    losses = []
    for alpha in (None, 5.0):
        trainer = make_trainer(
            tmp_path, neftune_noise_alpha=alpha, zo_train_mode=True, max_steps=1, seed=3
        )
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] != losses[1]


def test_a_loss_in_half_precision_is_refused_with_what_to_do(tmp_path):
    def make(**changes):
        model = make_model("encoder").to(torch.bfloat16)
        return make_trainer(tmp_path, "encoder", model=model, max_steps=2, **changes)

    with pytest.raises(TypeError, match=r"its loss in torch.bfloat16, .* bf16=True"):
        make().train()
    trainer = make(bf16=True)
    trainer.train()
    assert trainer.zo.run["step"] == 2
