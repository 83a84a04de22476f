"""docstring_areas.py through transformers' Trainer: the same steps, with its logs and checkpoints.

The run can be stopped at any time; --resume goes on from the last checkpoint, bit for bit.

    python examples/docstring_areas_trainer.py --out runs/docstrings
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from docstring_areas import MODEL, TEMPERATURE, Examples, Task, batches
from torch import nn
from transformers import AutoModel, TrainingArguments

import zokern
from zokern.integrations.transformers import ZOTrainer


class AreaClassifier(nn.Module):
    """Scores docstrings against the areas, both embedded by one encoder."""

    def __init__(self, area_ids: list[list[int]]) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(MODEL, add_pooling_layer=False)
        self.areas = pad(area_ids)

    def embed(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return F.normalize((states * attention_mask[..., None]).sum(1), dim=-1)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        areas = {name: tensor.to(input_ids.device) for name, tensor in self.areas.items()}
        docstrings = self.embed(input_ids, attention_mask)
        logits = TEMPERATURE * docstrings @ self.embed(**areas).T
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def pad(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [0] * (length - len(row)) for row in rows]),
        "attention_mask": torch.tensor(
            [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        ),
    }


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Batches that are batched already, docstrings of like length together, come one at a time."""
    ids = [ids for row in rows for ids in row["ids"]]
    return pad(ids) | {"labels": torch.cat([row["areas"] for row in rows])}


def rows_of(examples: Examples, parts: list[list[int]]) -> list[dict]:
    return [{"ids": [examples.ids[i] for i in p], "areas": examples.areas[p]} for p in parts]


def accuracy(predictions) -> dict[str, float]:
    return {"accuracy": float((predictions.predictions.argmax(-1) == predictions.label_ids).mean())}


def make_trainer(args: argparse.Namespace) -> ZOTrainer:
    task = Task()
    train = itertools.islice(batches(task.train.ids, args.batch_size, args.seed), args.steps)
    order = sorted(range(len(task.held_out)), key=lambda i: len(task.held_out.ids[i]))
    held_out = [order[i : i + 64] for i in range(0, len(order), 64)]
    model = AreaClassifier(task.area_ids)
    # By the encoder's own names, which decide on the noise.
    optimizer = zokern.MeZO(
        model.encoder.named_parameters(), lr=args.lr, eps=args.eps, seed=args.seed
    )
    return ZOTrainer(
        model,
        TrainingArguments(
            str(args.out),
            max_steps=args.steps,
            per_device_train_batch_size=1,
            per_device_eval_batch_size=1,
            learning_rate=args.lr,
            lr_scheduler_type="linear",
            seed=args.seed,
            logging_steps=10,
            eval_strategy="steps",
            eval_steps=70,
            eval_on_start=True,
            save_strategy="steps",
            save_steps=70,
            save_total_limit=2,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            report_to="none",
        ),
        data_collator=collate,
        train_dataset=rows_of(task.train, list(train)),
        eval_dataset=rows_of(task.held_out, held_out),
        compute_metrics=accuracy,
        optimizers=(optimizer, None),
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=420)
    parser.add_argument("--lr", type=float, default=1.8e-4, help="falls to 0 linearly")
    parser.add_argument("--eps", type=float, default=1e-3, help="size of perturbations")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docstring_areas"), help="checkpoints")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    trainer = make_trainer(args)
    trainer.train(resume_from_checkpoint=args.resume)
    metrics = trainer.evaluate()
    print(f"accuracy on held-out docstrings: {metrics['eval_accuracy']:.1%}")


if __name__ == "__main__":
    main()
