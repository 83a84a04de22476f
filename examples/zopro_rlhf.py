"""Align a small language model by ZOPrO: after a first-order round, with forward passes only.

The base is a small causal language model, pretrained for a minute on the docstrings of the Python
that runs the script. A preference for completions that end in a full stop trains a reward model.
Round 1 maximizes its reward by clipped RLOO and AdamW; the rounds after it do so by zokern.ZOPrO,
whose noise follows the update of the round before, and, from the same point and with as many
evaluations, by zokern.MeZO. As the rule behind the preference is known, both the reward model's
reward and the share of completions that keep the rule are reported.

Nothing is downloaded unless --model names a model on a hub.

    make zopro
    python examples/zopro_rlhf.py --seeds 0 --batches 5 --out curves.png
    python examples/zopro_rlhf.py --model some/model --lora --adamw-lr 2e-3
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import random
import re
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm, trange
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

import zokern

HELD_OUT = 512  # docstrings
PROMPT = 6  # tokens; all prompts are as long, which spares padding on the left
COMPLETION = 12  # tokens at most
COPIES = 4  # completions of a prompt in a rollout batch
PROMPTS = 64  # in a rollout batch
FIRST_BATCHES = 2  # rollout batches of round 1
EPOCHS = 2
MINIBATCH = 128
CLIP = 0.2


@dataclass
class Measures:
    """Means over completions; full_stops is the share that end in one, kl that from the base."""

    reward: float
    full_stops: float
    kl: float


@dataclass
class Rollouts:
    tokens: Tensor
    log_probs: Tensor
    advantages: Tensor
    measures: Measures


@dataclass
class Measurement:
    """``batch`` counts rollout batches from the start of the run; None is the held-out prompts."""

    seed: int
    method: str
    round: int
    batch: int | None
    measures: Measures


def docstrings() -> list[str]:
    """The first paragraphs of the standard library's docstrings, in one order everywhere."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = set()
    for path in library.rglob("*.py"):
        if {"test", "tests", "idlelib", "site-packages"} & set(path.relative_to(library).parts):
            continue
        try:
            nodes = list(ast.walk(ast.parse(path.read_bytes())))
        except (SyntaxError, ValueError):
            continue
        for node in nodes:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if len(re.findall(r"[A-Za-z]{2,}", text)) >= 4:
                    found.add(text)
    texts = sorted(found)
    random.Random(0).shuffle(texts)
    return texts


def small_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1024,
            special_tokens=["<pad>", "<eos>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def small_model(tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config)


def pretrain(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: list[str], steps: int
) -> None:
    rows = tokenizer([text + tokenizer.eos_token for text in texts]).input_ids
    rows = [torch.tensor(row[: PROMPT + COMPLETION + 2]) for row in rows]
    shuffle = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 4e-3, total_steps=steps, pct_start=0.1
    )
    with trange(steps, desc="base", unit="step") as progress:
        for _ in progress:
            batch = nn.utils.rnn.pad_sequence(
                shuffle.sample(rows, 64), True, tokenizer.pad_token_id
            )
            labels = batch.masked_fill(batch == tokenizer.pad_token_id, -100)
            loss = model(input_ids=batch, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.set_postfix(loss=f"{loss.item():.2f}")


def reward_model_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """The model's backbone under a new head with one output."""
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    config.pad_token_id = tokenizer.pad_token_id
    reward_model = AutoModelForSequenceClassification.from_config(config)
    missing = reward_model.load_state_dict(model.state_dict(), strict=False).missing_keys
    if any(name.startswith(model.base_model_prefix) for name in missing):
        raise SystemExit(f"{type(model).__name__} and its classifier name their backbones apart")
    return reward_model.float()


def with_adapters(model: nn.Module, reward_model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Both under LoRA, from one initialisation: a difference of adapters needs a common start."""
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
    reward_model = get_peft_model(reward_model, LoraConfig(task_type="SEQ_CLS"))
    reward_model.load_state_dict(trainable(model), strict=False)
    return model, reward_model


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in trainable(model).items()}


class Task:
    """Prompts, and what completions of them are worth."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        texts: list[str],
        base: nn.Module,
        reward_model: nn.Module,
    ) -> None:
        self.tokenizer, self.base, self.reward_model = tokenizer, base, reward_model
        self.held_out = self.beginnings(texts[:HELD_OUT])
        self.prompts = self.beginnings(texts[HELD_OUT:])
        self.shift, self.scale = 0.0, 1.0

    def beginnings(self, texts: list[str]) -> Tensor:
        rows = self.tokenizer(texts).input_ids
        return torch.tensor([row[:PROMPT] for row in rows if len(row) > PROMPT])

    @torch.no_grad()
    def complete(self, policy: nn.Module, prompts: Tensor, copies: int = 1) -> Tensor:
        """Sampled completions behind their prompts, those of one prompt in a row."""
        return policy.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=COMPLETION,
            num_return_sequences=copies,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def log_probs(self, policy: nn.Module, tokens: Tensor) -> Tensor:
        """Of each whole completion, its end of text included."""
        completion = tokens[:, PROMPT:]
        logits = policy(input_ids=tokens).logits[:, PROMPT - 1 : -1].float()
        each = logits.log_softmax(-1).gather(-1, completion[..., None])[..., 0]
        ends = completion == self.tokenizer.eos_token_id
        padding = ends.cumsum(1) - ends.long() > 0
        return each.masked_fill(padding, 0.0).sum(1)

    def texts(self, tokens: Tensor) -> list[str]:
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def full_stops(self, tokens: Tensor) -> Tensor:
        """The rule behind the preference: 1 where a completion ends in a full stop."""
        texts = self.texts(tokens[:, PROMPT:])
        return torch.tensor([float(text.rstrip().endswith(".")) for text in texts])

    def pairs(self, batches: int) -> tuple[Tensor, Tensor]:
        """Preferred and rejected completions of the same prompts."""
        preferred, rejected = [], []
        for _ in trange(batches, desc="pairs", unit="batch"):
            tokens = self.complete(self.base, self.sampled_prompts(256), 2)
            missing = PROMPT + COMPLETION - tokens.shape[1]
            tokens = F.pad(tokens, (0, missing), value=self.tokenizer.pad_token_id)
            first, second = tokens[0::2], tokens[1::2]
            better = self.full_stops(first) - self.full_stops(second)
            preferred += [first[better > 0], second[better < 0]]
            rejected += [second[better > 0], first[better < 0]]
        return torch.cat(preferred), torch.cat(rejected)

    def train_reward_model(self, lr: float) -> None:
        """By the Bradley-Terry loss, for an epoch; reports the accuracy on pairs left out."""
        preferred, rejected = self.pairs(10)
        held_out = len(preferred) // 10
        order = torch.randperm(len(preferred) - held_out) + held_out
        optimizer = torch.optim.AdamW(trainable(self.reward_model).values(), lr=lr)
        with tqdm(order.split(32), desc="reward model", unit="step") as progress:
            for rows in progress:
                loss = -F.logsigmoid(self.margin(preferred[rows], rejected[rows])).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                progress.set_postfix(loss=f"{loss.item():.2f}")
        with torch.no_grad():
            margin = self.margin(preferred[:held_out], rejected[:held_out])
        right = (margin > 0).float().mean()
        print(f"reward model: {right:.1%} of {held_out} held-out pairs in the right order")
        self.standardize()

    def margin(self, preferred: Tensor, rejected: Tensor) -> Tensor:
        better, worse = (self.reward_model(tokens).logits for tokens in (preferred, rejected))
        return (better - worse).float()

    def standardize(self) -> None:
        """From now on the base's completions have rewards of mean 0 and standard deviation 1."""
        rewards = self.rewards(self.complete(self.base, self.sampled_prompts(1024)))
        self.shift, self.scale = rewards.mean(), rewards.std()

    @torch.no_grad()
    def rewards(self, tokens: Tensor) -> Tensor:
        return (self.reward_model(tokens).logits[:, 0].float() - self.shift) / self.scale

    @torch.no_grad()
    def rollouts(self, policy: nn.Module, prompts: Tensor, copies: int, kl: float) -> Rollouts:
        tokens = self.complete(policy, prompts, copies)
        log_probs, rewards = self.log_probs(policy, tokens), self.rewards(tokens)
        log_ratios = log_probs - self.log_probs(self.base, tokens)
        returns = (rewards - kl * log_ratios).view(-1, copies)
        others = (returns.sum(1, keepdim=True) - returns) / max(copies - 1, 1)
        measures = (rewards, self.full_stops(tokens), log_ratios)
        return Rollouts(
            tokens,
            log_probs,
            (returns - others).flatten(),
            Measures(*(each.mean().item() for each in measures)),
        )

    def loss(self, policy: nn.Module, rollouts: Rollouts, rows: Tensor) -> Tensor:
        """RLOO with the ratio of PPO, clipped; a completion is one action."""
        ratio = (self.log_probs(policy, rollouts.tokens[rows]) - rollouts.log_probs[rows]).exp()
        advantages = rollouts.advantages[rows]
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        return -torch.minimum(ratio * advantages, clipped * advantages).mean()

    def sampled_prompts(self, count: int) -> Tensor:
        return self.prompts[torch.randperm(len(self.prompts))[:count]]


def minibatches() -> Iterator[Tensor]:
    for _ in range(EPOCHS):
        yield from torch.randperm(PROMPTS * COPIES).split(MINIBATCH)


class Run:
    """The rounds of one seed."""

    def __init__(self, task: Task, seed: int, args: argparse.Namespace) -> None:
        self.task, self.seed, self.args = task, seed, args
        self.measurements: list[Measurement] = []

    def measure(self, method: str, number: int, batch: int | None, measures: Measures) -> None:
        self.measurements.append(Measurement(self.seed, method, number, batch, measures))

    def on_held_out(self, policy: nn.Module) -> Measures:
        return self.task.rollouts(policy, self.task.held_out, 1, 0.0).measures

    def all_rounds(self) -> None:
        torch.manual_seed(self.seed)
        self.measure("base", 0, None, self.on_held_out(self.task.base))
        policy = self.first_round()
        for method in (self.zopro, self.mezo):
            torch.manual_seed(self.seed)
            method(copy.deepcopy(policy))

    def first_round(self) -> nn.Module:
        policy = copy.deepcopy(self.task.base)
        optimizer = torch.optim.AdamW(
            trainable(policy).values(), lr=self.args.adamw_lr, weight_decay=0.0
        )

        def step(loss: Callable[[], Tensor]) -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        self.round("AdamW", 1, policy, FIRST_BATCHES, step)
        return policy

    def zopro(self, policy: nn.Module) -> None:
        args, before = self.args, trainable(self.task.base)
        optimizer = zokern.ZOPrO(
            trainable(policy).items(),
            lr=args.lr,
            eps=args.eps,
            total_steps=args.total_steps,
            advance="manual",
            seed=self.seed,
            **self.vectors(policy, before),
        )
        for number in range(2, args.rounds + 1):
            if number > 2:
                optimizer.set_round(**self.vectors(policy, before))
            before = snapshot(policy)
            self.round("ZOPrO", number, policy, args.batches, optimizer.step, optimizer.advance)

    def vectors(self, policy: nn.Module, before: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """What ZOPrO is guided by: the policy's last update, and the reward model's difference."""
        base, reward_model = trainable(self.task.base), trainable(self.task.reward_model)
        # A tensor that the reward model lacks, as an output head that is not tied, differs by 0.
        zeros = zokern.zopro.delta(base, base)
        return {
            "previous_update": zokern.zopro.delta(trainable(policy), before),
            "reward_delta": zeros | zokern.zopro.delta(reward_model, base),
        }

    def mezo(self, policy: nn.Module) -> None:
        args = self.args
        optimizer = zokern.MeZO(
            trainable(policy).items(), lr=args.mezo_lr, eps=args.mezo_eps, seed=self.seed
        )
        for number in range(2, args.rounds + 1):
            self.round("MeZO", number, policy, args.batches, optimizer.step)

    def round(
        self,
        method: str,
        number: int,
        policy: nn.Module,
        batches: int,
        step: Callable[[Callable[[], Tensor]], object],
        advance: Callable[[], None] = lambda: None,
    ) -> None:
        """Rollout batches with a step for every mini-batch; then the held-out prompts."""
        task = self.task
        before = FIRST_BATCHES + (number - 2) * batches if number > 1 else 0
        with trange(batches, desc=f"seed {self.seed}, round {number}, {method}") as progress:
            for batch in progress:
                prompts = task.sampled_prompts(PROMPTS)
                rollouts = task.rollouts(policy, prompts, COPIES, self.args.kl)
                for rows in minibatches():
                    step(lambda: task.loss(policy, rollouts, rows))  # noqa: B023
                advance()
                now = rollouts.measures
                self.measure(method, number, before + batch, now)
                progress.set_postfix(reward=f"{now.reward:.2f}", full_stops=f"{now.full_stops:.0%}")
        self.measure(method, number, None, self.on_held_out(policy))


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def grouped(
    measurements: list[Measurement], key: Callable[[Measurement], tuple]
) -> dict[tuple, list[Measures]]:
    groups: dict[tuple, list[Measures]] = {}
    for one in measurements:
        groups.setdefault(key(one), []).append(one.measures)
    return groups


def table(measurements: list[Measurement], args: argparse.Namespace) -> str:
    """A line for each round and method: mean and standard deviation over the seeds."""
    held_out = [one for one in measurements if one.batch is None]
    groups = grouped(held_out, lambda one: (one.round, one.method))
    lines = [
        f"held-out prompts at the end of each round, mean ± deviation over {len(args.seeds)} seeds",
        "round  method  evaluations         reward       full stops             KL",
    ]
    steps = EPOCHS * PROMPTS * COPIES // MINIBATCH
    for (number, method), found in sorted(groups.items(), key=lambda item: item[0][0]):
        evaluations = 2 * steps * args.batches * max(number - 1, 0)
        reward, stops, kl = (
            mean_and_spread([getattr(each, name) for each in found])
            for name in ("reward", "full_stops", "kl")
        )
        lines.append(
            f"{number:>5} {method:>7} {evaluations:>12} {reward[0]:>7.2f} ± {reward[1]:.2f} "
            f"{100 * stops[0]:>8.1f} ± {100 * stops[1]:.1f} % {kl[0]:>7.2f} ± {kl[1]:.2f}"
        )
    return "\n".join(lines)


def plot(measurements: list[Measurement], args: argparse.Namespace) -> None:
    sampled = [one for one in measurements if one.batch is not None]
    groups = grouped(sampled, lambda one: (one.method, one.batch))
    figure, axes = plt.subplots(2, 1, figsize=(7, 6.5), sharex=True)
    for method, color in (("AdamW", "C7"), ("ZOPrO", "C0"), ("MeZO", "C1")):
        batches = sorted(batch for name, batch in groups if name == method)
        for ax, name, factor in zip(axes, ("reward", "full_stops"), (1, 100), strict=True):
            curves = [
                mean_and_spread([factor * getattr(each, name) for each in groups[method, batch]])
                for batch in batches
            ]
            ax.plot(batches, [m for m, _ in curves], ".-", color=color, label=method)
            low, high = [m - s for m, s in curves], [m + s for m, s in curves]
            ax.fill_between(batches, low, high, color=color, alpha=0.2, lw=0)
    for ax in axes:
        for number in range(2, args.rounds + 1):
            ax.axvline(FIRST_BATCHES + (number - 2) * args.batches - 0.5, color="gray", lw=0.8)
        ax.grid(alpha=0.3)
    axes[0].set(ylabel="reward", title="Clipped RLOO: round 1 by gradients, then forward passes")
    axes[1].set(xlabel="rollout batch", ylabel="end in a full stop, %")
    axes[1].xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(args.out, dpi=110)
    plt.close(figure)


def load(args: argparse.Namespace, texts: list[str]) -> tuple[PreTrainedTokenizerBase, nn.Module]:
    """Tokenizer and base: --model's, or small ones made for the occasion."""
    if args.model is None:
        tokenizer = small_tokenizer(texts)
        model = small_model(tokenizer)
        pretrain(model, tokenizer, texts[HELD_OUT:], 400)
        return tokenizer, model
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)


def make_task(args: argparse.Namespace) -> Task:
    torch.manual_seed(0)
    texts = docstrings()
    tokenizer, base = load(args, texts)
    reward_model = reward_model_of(base, tokenizer)
    if args.lora:
        base, reward_model = with_adapters(base, reward_model)
    # Without dropout, also where there are gradients: ratios compare one policy with another.
    task = Task(tokenizer, texts, base.eval(), reward_model.eval())
    task.train_reward_model(args.reward_lr)
    return task


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="a run for each"
    )
    parser.add_argument("--rounds", type=int, default=3, help="the first is first order")
    parser.add_argument("--batches", type=int, default=8, help="rollout batches of later rounds")
    parser.add_argument("--model", help="name on a hub or folder of a causal language model")
    parser.add_argument("--lora", action="store_true", help="tune adapters only")
    parser.add_argument("--reward-lr", type=float, default=1e-3, help="of the reward model")
    parser.add_argument("--adamw-lr", type=float, default=1e-4, help="of round 1; LoRA wants more")
    parser.add_argument("--lr", type=float, default=1.0, help="of ZOPrO")
    parser.add_argument("--eps", type=float, default=0.1, help="of ZOPrO, in last updates")
    parser.add_argument("--mezo-lr", type=float, default=1e-4, help="of MeZO")
    parser.add_argument("--mezo-eps", type=float, default=1e-3, help="of MeZO")
    parser.add_argument("--kl", type=float, default=0.05, help="weight of the KL penalty")
    parser.add_argument("--out", type=Path, default=Path("zopro_rlhf.png"), help="the plot")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument(
        "--total-steps", type=int, help="rollout batches over which γ falls to 0; all if not given"
    )
    args = parser.parse_args()
    args.total_steps = args.total_steps or (args.rounds - 1) * args.batches
    if args.rounds < 2 or args.batches < 1:
        parser.error("at least two rounds, and one rollout batch in each")
    for path in filter(None, (args.out, args.json)):
        if not path.resolve().parent.is_dir():
            parser.error(f"there is no folder {path.resolve().parent} to write {path.name} into")
    return args


def main() -> None:
    args = parse_arguments()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    began = time.perf_counter()
    task = make_task(args)
    measurements: list[Measurement] = []
    for seed in args.seeds:
        run = Run(task, seed, args)
        run.all_rounds()
        measurements += run.measurements
    print(table(measurements, args))
    print(f"{time.perf_counter() - began:.0f} s")
    plot(measurements, args)
    print(f"curves: {args.out}")
    if args.json:
        args.json.write_text(json.dumps([asdict(one) for one in measurements], indent=1))


if __name__ == "__main__":
    main()
