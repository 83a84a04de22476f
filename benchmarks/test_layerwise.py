"""A MeZO step that evaluates layerwise beside one that moves the weights. Run: ``make bench``.

Rounds of both, and of the two forward passes that a step makes, follow each other; what is compared
is the optimizer's own time, the step less the forward passes. Nothing is asserted.
"""

import statistics
import time

import pytest
import torch

import zokern

transformers = pytest.importorskip("transformers")

ROUNDS = 41


def encoder(dtype: torch.dtype) -> torch.nn.Module:
    """22.7M parameters, as a small sentence encoder."""
    config = transformers.BertConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12
    )
    return transformers.BertForMaskedLM(config).to(dtype).eval()


def decoder(dtype: torch.dtype) -> torch.nn.Module:
    """OPT-125m."""
    config = transformers.OPTConfig(
        hidden_size=768, ffn_dim=3072, num_hidden_layers=12, num_attention_heads=12,
        word_embed_proj_dim=768,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config).to(dtype).eval()


@pytest.mark.parametrize("make", [encoder, decoder])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_against_in_place(benchmark, capsys, make, dtype):
    model = make(dtype)
    tokens = torch.randint(0, model.config.vocab_size, (2, 8))
    common = {"lr": 1e-6, "seed": 0, "precision": "inplace", "stochastic_rounding": False}

    def loss() -> torch.Tensor:
        return model(input_ids=tokens, labels=tokens).loss.float()

    in_place = zokern.MeZO(model.named_parameters(), **common)
    layerwise = zokern.MeZO(model.named_parameters(), module=model, layerwise=True, **common)
    seconds: dict[str, list[float]] = {"forward": [], "in place": []}

    def others() -> None:
        with torch.no_grad():
            begin = time.perf_counter()
            loss()
            loss()
            seconds["forward"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        in_place.step(loss)
        seconds["in place"].append(time.perf_counter() - begin)

    benchmark.pedantic(lambda: layerwise.step(loss), setup=others, rounds=ROUNDS, warmup_rounds=1)
    forward, plain = (statistics.median(times[1:]) for times in seconds.values())
    own = benchmark.stats.stats.median
    benchmark.extra_info |= {"forward_median_s": forward, "in_place_median_s": plain}
    with capsys.disabled():
        print(
            f"\n{benchmark.name}: the optimizer takes {(own - forward) * 1e3:.0f} ms of a step of "
            f"{own * 1e3:.0f}; in place {(plain - forward) * 1e3:.0f} ms: "
            f"{(own - forward) / (plain - forward):.2f} times as long"
        )
