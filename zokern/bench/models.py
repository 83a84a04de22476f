"""Models of transformers by name: their tensors, or themselves, with as many layers as fit."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from zokern.bench.comparison import Unavailable


def _opt(width: int, layers: int, **others: Any) -> tuple[str, dict[str, Any]]:
    return "OPT", {
        "hidden_size": width,
        "ffn_dim": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "word_embed_proj_dim": width,
        **others,
    }


# The class of transformers, without its ending, and what differs from its configuration.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt-tiny": _opt(64, 2, vocab_size=256, max_position_embeddings=64),
    "opt-125m": _opt(768, 12),
    "opt-1.3b": _opt(2048, 24),
    "opt-13b": _opt(5120, 40, num_attention_heads=40),
    "qwen2-0.5b": (
        "Qwen2",
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "llama-3-8b": (
        "Llama",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
        },
    ),
}


def layers_of(name: str) -> int:
    return MODELS[name][1]["num_hidden_layers"]


def shapes(name: str, layers: int) -> dict[str, torch.Size]:
    """Of its parameters, by name; a tensor that two modules share counts once."""
    model = build(name, layers, torch.device("meta"), torch.float32)
    return {key: param.shape for key, param in model.named_parameters()}


def layers_that_fit(name: str, parameters: float) -> int:
    """As many layers as make up that many parameters; at least one."""
    one, two = (sum(shape.numel() for shape in shapes(name, layers).values()) for layers in (1, 2))
    return max(1, min(layers_of(name), 1 + int((parameters - one) // (two - one))))


def build(name: str, layers: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model with random weights, for evaluation.

    Raises:
        Unavailable: without transformers.
    """
    try:
        import transformers
    except ImportError:
        raise Unavailable("transformers is not installed") from None
    family, settings = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**settings, "num_hidden_layers": layers})
    with _default_dtype(dtype), device:
        return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
