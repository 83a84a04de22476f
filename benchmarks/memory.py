"""Peak memory of a step, beside that of a forward pass: each precision, MeZO's arithmetic, AdamW.

    python -m benchmarks.memory --model opt-125m --plot docs/memory.png

Each configuration runs in a process of its own. On a CPU the peak is the largest resident size
after the model was built, less what Python and torch take; on a GPU what torch's allocator says.
The weights are random: memory does not depend on them.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

MODELS = {
    "opt-125m": {"hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12},
    "opt-1.3b": {"hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24},
    "opt-13b": {"hidden_size": 5120, "ffn_dim": 20480, "num_hidden_layers": 40},
}
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

    width = MODELS[name]["hidden_size"]
    config = transformers.OPTConfig(
        **MODELS[name], num_attention_heads=width // 64, word_embed_proj_dim=width
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return transformers.OPTForCausalLM(config).eval()
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


def measure(configuration: str, args: argparse.Namespace) -> dict[str, float]:
    """Bytes of the weights, of the largest layer, and the peak of two steps."""
    on_cpu = args.device == "cpu"
    import transformers  # noqa: F401

    import zokern  # noqa: F401

    before = resident("VmRSS")
    model = build(args.model, DTYPES[args.dtype], args.device)
    tokens = torch.randint(0, model.config.vocab_size, (1, args.tokens), device=args.device)
    step = steps(configuration, model, lambda: model(tokens, labels=tokens).loss.float())
    if on_cpu:
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step()
    sizes = [sum(p.nbytes for p in m.parameters(recurse=False)) for m in model.modules()]
    return {
        "weights": sum(param.nbytes for param in model.parameters()),
        "largest_layer": max(sizes),
        "peak": resident("VmHWM") - before if on_cpu else torch.cuda.max_memory_allocated(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="opt-125m")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--only", choices=CONFIGURATIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args)))
        return
    results = {}
    for configuration in CONFIGURATIONS:
        run = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], "--only", configuration],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        results[configuration] = json.loads(run.stdout.splitlines()[-1])
        if len(results) == 1:
            print(f"{args.model}, {args.dtype}, {args.tokens} tokens, {args.device}\n")
            print("| | peak, MB | of the forward pass | less it, bytes per parameter |")
            print("|---|---|---|---|")
        print(row(configuration, results, DTYPES[args.dtype].itemsize), flush=True)
    largest = results["forward"]["largest_layer"]
    print(f"\nThe largest layer takes {largest / 1e6:.0f} MB.")
    if args.json:
        args.json.write_text(json.dumps({"settings": vars(args), "peaks": results}, default=str))
    if args.plot:
        plot(results, args)


def row(configuration: str, results: dict, itemsize: int) -> str:
    peak, forward = results[configuration]["peak"], results["forward"]["peak"]
    numel = results["forward"]["weights"] / itemsize
    more = (peak - forward) / numel
    return f"| {configuration} | {peak / 1e6:.0f} | {peak / forward:.2f} | {more:.2f} |"


def plot(results: dict, args: argparse.Namespace) -> None:
    import matplotlib.pyplot as plt

    names = list(results)[::-1]
    figure, axes = plt.subplots(figsize=(7, 3.5))
    axes.barh(names, [results[name]["peak"] / 1e6 for name in names])
    axes.axvline(results["forward"]["peak"] / 1e6, color="black", linewidth=0.8)
    axes.set_xlabel(f"peak memory of a step, MB ({args.model}, {args.dtype}, {args.device})")
    figure.tight_layout()
    figure.savefig(args.plot, dpi=150)


if __name__ == "__main__":
    main()
