"""Peak memory of a step, beside that of a forward pass: each precision, MeZO's arithmetic, AdamW.

    python -m benchmarks.memory --plot docs/memory.png

Each configuration runs in a process of its own. On a CPU the peak is the largest resident size
after the model was built, less what Python and torch take; on a GPU what torch's allocator says.
The weights are random: memory does not depend on them. A layerwise step should take no more than
1.05 times the forward pass and the largest layer.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


def opt(width: int, layers: int) -> dict[str, int]:
    return {
        "hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width,
        "num_hidden_layers": layers, "num_attention_heads": width // 64,
    }  # fmt: skip


# Class, configuration and what is not its default.
MODELS: dict[str, tuple[str, str, dict]] = {
    "opt-125m": ("OPTForCausalLM", "OPTConfig", opt(768, 12)),
    "opt-1.3b": ("OPTForCausalLM", "OPTConfig", opt(2048, 24)),
    "opt-13b": ("OPTForCausalLM", "OPTConfig", opt(5120, 40)),
    "qwen2-0.5b": (
        "Qwen2ForCausalLM", "Qwen2Config",
        {
            "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
            "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "llama-3.2-1b": (
        "LlamaForCausalLM", "LlamaConfig",
        {
            "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
            "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
    ),
    "bert-base": ("BertForMaskedLM", "BertConfig", {}),
    "t5-base": (
        "T5ForConditionalGeneration", "T5Config",
        {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12,
         "decoder_start_token_id": 0},
    ),
}  # fmt: skip
MEASURED = ("opt-125m", "qwen2-0.5b", "bert-base", "t5-base")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OURS = {
    "in place": {"precision": "inplace", "stochastic_rounding": False},
    "layerwise": {"precision": "inplace", "layerwise": True},
    "split8": {"precision": "split8"},
    "split8, layerwise": {"precision": "split8", "layerwise": True},
    "split": {"precision": "split"},
    "split, layerwise": {"precision": "split", "layerwise": True},
    "master": {"precision": "master"},
}
CONFIGURATIONS = ("forward", "MeZO's arithmetic", *OURS, "AdamW")


def build(name: str, dtype: torch.dtype, device: str) -> nn.Module:
    import transformers

    cls, config, settings = MODELS[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return getattr(transformers, cls)(getattr(transformers, config)(**settings)).eval()
    finally:
        torch.set_default_dtype(before)


def eager_mezo(model: nn.Module, loss: Callable[[], Tensor], eps: float = 1e-3) -> None:
    """The published arithmetic: a seeded loop over the parameters for each of four moves."""

    def move(scale: float) -> None:
        torch.manual_seed(0)
        for param in model.parameters():
            param.data = param.data + scale * torch.normal(0, 1, param.shape).to(param)

    move(eps)
    loss()
    move(-2 * eps)
    loss()
    move(eps)
    move(-1e-6)


def steps(configuration: str, model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], object]:
    """What is measured."""
    import zokern

    if configuration == "forward":
        return torch.no_grad()(loss)
    if configuration == "MeZO's arithmetic":
        return torch.no_grad()(lambda: eager_mezo(model, loss))
    if configuration == "AdamW":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

        def step() -> None:
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step
    zo = zokern.MeZO(
        model.named_parameters(), lr=1e-6, seed=0, module=model,
        **{"layerwise": False, **OURS[configuration]},
    )  # fmt: skip
    return lambda: zo.step(loss)


def resident(which: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(which))


def measure(name: str, configuration: str, args: argparse.Namespace) -> dict[str, float]:
    """The number of weights, the bytes of the largest layer, and those of the peak of two steps."""
    on_cpu = args.device == "cpu"
    import transformers  # noqa: F401

    import zokern  # noqa: F401

    before = resident("VmRSS")
    model = build(name, DTYPES[args.dtype], args.device)
    tokens = torch.randint(0, model.config.vocab_size, (1, args.tokens), device=args.device)
    step = steps(configuration, model, lambda: model(input_ids=tokens, labels=tokens).loss.float())
    if on_cpu:
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step()
    sizes = [sum(p.nbytes for p in m.parameters(recurse=False)) for m in model.modules()]
    return {
        "numel": sum(param.numel() for param in model.parameters()),
        "largest_layer": max(sizes),
        "peak": resident("VmHWM") - before if on_cpu else torch.cuda.max_memory_allocated(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MEASURED)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--only", choices=CONFIGURATIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.models[0], args.only, args)))
        return
    print(f"Peak memory of a step in MB; {args.dtype}, {args.tokens} tokens, {args.device}\n")
    print("| |", " | ".join(CONFIGURATIONS), "| bound of layerwise | |")
    print("|---" * (len(CONFIGURATIONS) + 3) + "|")
    results: dict[str, dict[str, dict]] = {}
    for name in args.models:
        results[name] = {it: in_a_process(name, it) for it in CONFIGURATIONS}
        print(row(name, results[name]), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"settings": vars(args), "peaks": results}, default=str))
    if args.plot:
        plot(results, args)


def in_a_process(name: str, configuration: str) -> dict[str, float]:
    run = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.memory", *sys.argv[1:]),
            *("--models", name, "--only", configuration),
        ],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(run.stdout.splitlines()[-1])


def row(name: str, results: dict[str, dict]) -> str:
    forward, layerwise = results["forward"], results["layerwise"]
    bound = 1.05 * (forward["peak"] + forward["largest_layer"])
    peaks = " | ".join(f"{result['peak'] / 1e6:.0f}" for result in results.values())
    holds = "holds" if layerwise["peak"] <= bound else "missed"
    size = f"{forward['numel'] / 1e6:.0f}M"
    return f"| {name} ({size}) | {peaks} | {bound / 1e6:.0f} | {holds} |"


def plot(results: dict[str, dict[str, dict]], args: argparse.Namespace) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    height = 0.8 / len(results)
    for i, (name, peaks) in enumerate(results.items()):
        ratios = [peaks[it]["peak"] / peaks["forward"]["peak"] for it in CONFIGURATIONS]
        axes.barh([y + i * height for y in range(len(ratios))], ratios, height, label=name)
    axes.set_yticks([y + 0.4 - height / 2 for y in range(len(CONFIGURATIONS))], CONFIGURATIONS)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel(f"peak memory of a step, of the forward pass's ({args.dtype}, {args.device})")
    axes.legend()
    figure.tight_layout()
    figure.savefig(args.plot, dpi=150)


if __name__ == "__main__":
    main()
