"""The examples of the documents are Python, and run with the names that they take for granted."""

import copy
import re
import socket
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import zokern

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = [
    pytest.param(file, match[1], id=f"{file.stem}-{number}")
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for number, match in enumerate(BLOCK.finditer(file.read_text(encoding="utf-8")))
]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def names(folder: Path) -> dict:
    """What the examples do not make themselves."""
    model, models = network(), [network() for _ in range(3)]
    (folder / "folder_c").mkdir()
    save_file(models[1].state_dict(), folder / "b.safetensors")
    save_file(models[2].state_dict(), folder / "folder_c" / "model.safetensors")
    (folder / "base").mkdir()
    save_file(models[0].state_dict(), folder / "base" / "model.safetensors")
    x, y = torch.randn(8, 4), torch.randint(2, (8,))
    optimizer = zokern.MeZO(model.named_parameters(), lr=1e-3, seed=0, precision="master")
    return {
        "torch": torch,
        "zokern": zokern,
        "opt": zokern.MeZO(model.named_parameters(), lr=1e-3, seed=0),
        "model": model,
        "x": x,
        "y": y,
        "loss_fn": nn.functional.cross_entropy,
        "own_x": x,
        "own_y": y,
        "messages": [],
        "copy_of_model": copy.deepcopy(model),
        "evaluate": lambda point: nn.functional.cross_entropy(model(x), y).item(),
        "checkpoint": {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
        "base": models[0].state_dict(),
        "base_model": network(),
        "policy": network(),
        "ref_model": network(),
        "sft_model": network(),
        "DPOTrainer": lambda *models, optimizers: optimizers,
        **{name: models[0].state_dict() for name in ("model_a", "a", "lora_a")},
        **{name: models[1].state_dict() for name in ("b", "lora_b")},
    }


def record(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """Write run.zok, the first step of a run from these weights."""
    rest = {name: value.clone() for name, value in model.state_dict().items()}
    run = zokern.Trajectory("run.zok")
    opt = zokern.MeZO(model.named_parameters(), lr=1e-3, seed=0, precision="master", trajectory=run)
    opt.step(lambda: nn.functional.cross_entropy(model(x), y))
    model.load_state_dict(rest)


def for_a_trainer() -> dict:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8,
    )  # fmt: skip
    return {
        "TrainingArguments": partial(
            transformers.TrainingArguments, use_cpu=True, max_steps=2, report_to="none"
        ),
        "model": transformers.BertForSequenceClassification(config),
        "DPOTrainer": transformers.Trainer,
        "dataset": [{"input_ids": [i, i + 1], "labels": i % 2} for i in range(16)],
    }


@pytest.fixture
def alone(monkeypatch):
    """What torchrun tells a process that has the group for itself."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    told = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("file", "code"), EXAMPLES)
def test_examples_run(file, code, tmp_path, monkeypatch, alone):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    given = names(tmp_path)
    if "zokern.replay(" in code:
        record(given["base_model"], given["x"], given["y"])
    if "ZOTrainer" in code:
        given |= for_a_trainer()
    exec(compile(code, str(file), "exec"), given)


def test_there_are_examples():
    assert len(EXAMPLES) > 10
