"""What align_merging.py trains on and is judged by: text, questions, preferences, two models.

The text is the documentation topics that Python carries in pydoc_data. The model is pretrained on
it, then instruction-tuned on questions made of it: continue this sentence, name this topic. The
preference goes against what the model has learned: of two continuations of a sentence, the one in
plain words, without quotes, asterisks, backticks and parentheses, is preferred to the one as the
documentation writes it.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from zopro_rlhf import small_model, small_tokenizer

HELD_OUT = 160  # paragraphs
JUDGED = 100  # held-out pairs, and questions
WORDS = 16  # in a paragraph at least; no passage is longer
WINDOW = 64  # tokens of documentation in a row
BATCH = 16  # windows or questions in a step
MARKS = re.compile(r"[\"'`*“”‘’()]+")

Weights = dict[str, Tensor]
Batch = dict[str, Tensor]


@dataclass
class Figures:
    """What held-out text says of a model; the taxes are rises since instruction tuning, in nats."""

    plain: float  # share of pairs whose preferred answer is the likelier one
    margin: float  # of preferred over rejected log-likelihood, since instruction tuning
    tax: float  # of the loss on the documentation
    answers: float  # of the loss on the answers of instruction tuning


def paragraphs() -> list[tuple[str, str]]:
    """Each long enough paragraph with its topic, once, in one order everywhere."""
    topic_of: dict[str, str] = {}
    for topic, text in sorted(topics.items()):
        for paragraph in re.split(r"\n\s*\n", text):
            line = " ".join(paragraph.split())
            if len(line.split()) >= WORDS:
                topic_of.setdefault(line, topic)
    found = [(topic, line) for line, topic in topic_of.items()]
    random.Random(0).shuffle(found)
    return found


class Questions:
    """Questions on paragraphs, and pairs of answers to them, drawn at random."""

    def __init__(self, paragraphs: list[tuple[str, str]], seed: int) -> None:
        self.paragraphs, self.random = paragraphs, random.Random(seed)

    def passage(self) -> tuple[str, list[str]]:
        topic, line = self.random.choice(self.paragraphs)
        words = line.split()
        start = self.random.randrange(len(words) - WORDS + 1)
        return topic, words[start : start + WORDS]

    def sentence(self) -> tuple[str, str]:
        """The beginning of a passage, and how it goes on."""
        words = self.passage()[1]
        cut = self.random.randrange(4, 8)
        return f"Continue: {' '.join(words[:cut])}\nAnswer:", f" {' '.join(words[cut : cut + 8])}"

    def question(self) -> tuple[str, str]:
        if self.random.random() < 0.5:
            return self.sentence()
        topic, words = self.passage()
        return f"Which topic: {' '.join(words)}\nAnswer:", f" {topic}"

    def pair(self) -> dict[str, str]:
        while True:
            prompt, answer = self.sentence()
            plain = MARKS.sub("", answer)
            if plain != answer and plain.strip():
                return {"prompt": prompt, "chosen": plain, "rejected": answer}


def padded(rows: list[list[int]], skipped: list[int], pad: int) -> Batch:
    """A batch whose labels leave out the padding and the first ``skipped`` tokens of each row."""
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, pad)
    places = torch.arange(tokens.shape[1])
    inside = places < torch.tensor([len(row) for row in rows])[:, None]
    scored = inside & (places >= torch.tensor(skipped)[:, None])
    return {
        "input_ids": tokens,
        "attention_mask": inside.long(),
        "labels": tokens.masked_fill(~scored, -100),
    }


def weights(model: nn.Module) -> Weights:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def fit(model: nn.Module, batches: Iterator[Batch], steps: int, lr: float, progress: tqdm) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        loss = model(**next(batches)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.update()
        progress.set_postfix(loss=f"{loss.item():.2f}")
    progress.set_postfix()


class School:
    """A seed's base and instruction-tuned model, and the held-out text that judges others.

    Attributes:
        base: the weights after pretraining.
        sft: the instruction-tuned model; ``start`` are its weights.
    """

    def __init__(self, seed: int, base_steps: int, sft_steps: int, progress: tqdm) -> None:
        found = paragraphs()
        self.seed, self.known, self.unread = seed, found[HELD_OUT:], found[:HELD_OUT]
        self.tokenizer = small_tokenizer([line for _, line in self.known])
        torch.manual_seed(seed)
        self.sft = small_model(self.tokenizer)
        progress.set_description(f"seed {seed}, base")
        fit(self.sft, self.windows(), base_steps, 2e-3, progress)
        self.base = weights(self.sft)
        progress.set_description(f"seed {seed}, instruction tuning")
        fit(self.sft, self.lessons(), sft_steps, 1e-3, progress)
        self.start = weights(self.sft)
        self.judge = Judge(self)

    def pairs(self, count: int) -> list[dict[str, str]]:
        questions = Questions(self.known, self.seed + 1)
        return [questions.pair() for _ in range(count)]

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text).input_ids

    def answered(self, pairs: list[tuple[str, str]]) -> Batch:
        """Prompts with their answers, of which only those count."""
        prompts = [self.tokens(prompt) for prompt, _ in pairs]
        answers = [[*self.tokens(answer), self.tokenizer.eos_token_id] for _, answer in pairs]
        rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        return padded(rows, [len(prompt) for prompt in prompts], self.tokenizer.pad_token_id)

    def windows(self) -> Iterator[Batch]:
        stream = []
        for _, line in self.known:
            stream += [*self.tokens(line), self.tokenizer.eos_token_id]
        draw = random.Random(self.seed)
        while True:
            starts = [draw.randrange(len(stream) - WINDOW) for _ in range(BATCH)]
            rows = [stream[start : start + WINDOW] for start in starts]
            yield padded(rows, [0] * BATCH, self.tokenizer.pad_token_id)

    def lessons(self) -> Iterator[Batch]:
        """Questions, and every other time documentation, so that it is not forgotten here yet."""
        questions = Questions(self.known, self.seed)
        for window in self.windows():
            yield self.answered([questions.question() for _ in range(BATCH)])
            yield window


class Judge:
    """Held-out paragraphs, their pairs and their questions; they are the same for all seeds."""

    def __init__(self, school: School) -> None:
        questions = Questions(school.unread, 0)
        pairs = [questions.pair() for _ in range(JUDGED)]
        self.pairs = school.answered(
            [(pair["prompt"], pair[which]) for which in ("chosen", "rejected") for pair in pairs]
        )
        rows = [school.tokens(line)[:WINDOW] for _, line in school.unread]
        self.text = padded(rows, [0] * len(rows), school.tokenizer.pad_token_id)
        self.questions = school.answered([questions.question() for _ in range(JUDGED)])
        self.model = copy.deepcopy(school.sft).eval()
        self.likely = self.likelihoods()
        self.losses = self.loss(self.text), self.loss(self.questions)

    def figures(self, weights: Weights) -> Figures:
        self.model.load_state_dict(weights, strict=False)  # the tied head is not among them
        likely = self.likelihoods()
        preferred, rejected = likely - self.likely
        return Figures(
            plain=(likely[0] > likely[1]).float().mean().item(),
            margin=(preferred - rejected).mean().item(),
            tax=self.loss(self.text) - self.losses[0],
            answers=self.loss(self.questions) - self.losses[1],
        )

    @torch.no_grad()
    def likelihoods(self) -> Tensor:
        """The logarithms, of the preferred answers and of the rejected ones."""
        logits = self.model(**self.pairs).logits[:, :-1]
        labels = self.pairs["labels"][:, 1:]
        each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return -each.sum(1).view(2, -1)

    @torch.no_grad()
    def loss(self, batch: Batch) -> float:
        return self.model(**batch).loss.item()
