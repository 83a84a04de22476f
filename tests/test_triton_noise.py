"""Triton's noise in its parts: words, levels, fused products, the edges of `normal`.

That its samples are those of the vectors and of the reference is in test_noise.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import choose
from tests.same_bits import same_bits
from tests.test_noise import words_with_sums
from zokern.backends import triton as backend
from zokern.backends.reference import arithmetic
from zokern.backends.reference import noise as reference

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from zokern.backends.triton import launch, noise  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEVELS = np.load(Path(__file__).parent / "vectors" / "levels.npz")


@pytest.fixture(autouse=True)
def _needs_triton(monkeypatch):
    choose("triton", monkeypatch, DEVICE)


@triton.jit
def philox_kernel(words, out):
    c0, c1, c2, c3 = tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3)
    key0, key1 = tl.load(words + 4).to(tl.uint32), tl.load(words + 5).to(tl.uint32)
    c0, c1, c2, c3 = noise.philox(
        c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32), key0, key1
    )
    tl.store(out, c0.to(tl.int64))
    tl.store(out + 1, c1.to(tl.int64))
    tl.store(out + 2, c2.to(tl.int64))
    tl.store(out + 3, c3.to(tl.int64))


@triton.jit
def gauss_kernel(words, out, LAW: tl.constexpr, COUNT: tl.constexpr, DP4A: tl.constexpr):
    word = tl.load(words + tl.arange(0, COUNT)).to(tl.uint32)
    if LAW == "gauss16":
        tl.store(out + tl.arange(0, 2 * COUNT), noise.gauss16(word, DP4A))
    else:
        tl.store(out + tl.arange(0, COUNT), noise.gauss32(word, DP4A))


@triton.jit
def normal_kernel(words, out, COUNT: tl.constexpr):
    word = tl.load(words + tl.arange(0, 2 * COUNT)).to(tl.uint32)
    radius, angle = tl.split(tl.reshape(word, [COUNT, 2]))
    tl.store(out + tl.arange(0, 2 * COUNT), noise.normal(radius, angle, False))


@triton.jit
def fma_kernel(a, b, c, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(out + i, noise.fma(tl.load(a + i), tl.load(b + i), tl.load(c + i)))


def padded(numbers) -> torch.Tensor:
    """A power of two of int64: these numbers and then zeros."""
    result = torch.zeros(triton.next_power_of_2(len(numbers)), dtype=torch.int64)
    result[: len(numbers)] = torch.as_tensor(numbers)
    return result.to(DEVICE)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0,) * 4, (0,) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers(counter, key, answer):
    out = torch.empty(4, dtype=torch.int64, device=DEVICE)
    philox_kernel[(1,)](padded([*counter, *key]), out, **launch.OPTIONS)
    assert " ".join(f"{word:08x}" for word in out.tolist()) == answer


@pytest.mark.parametrize("law", ["gauss16", "gauss32"])
def test_every_level(law):
    if law == "gauss16":
        sums, digits = words_with_sums((181, 211, 233, 251), 16)
        digits, per_word = digits * 0x11, 2  # the same sum in the low and in the high nibbles
    else:
        sums, digits = words_with_sums((55, 73, 57, 71), 256)
        per_word = 1
    words = padded((digits << (8 * np.arange(4))).sum(axis=1))
    out = torch.empty(len(words) * per_word, device=DEVICE)
    gauss_kernel[(1,)](
        words, out, LAW=law, COUNT=len(words), DP4A=launch.target().dp4a, **launch.OPTIONS
    )
    got = out.cpu().view(torch.int32).numpy().view(np.uint32)[: len(sums) * per_word]
    np.testing.assert_array_equal(got, np.repeat(LEVELS[law][sums], per_word))


def edge_words() -> list[int]:
    """Words at which `normal` changes its branch, and their neighbours."""
    edges = {0, 0xB504F334, *(1 << bit for bit in range(32)), *(i << 29 for i in range(8))}
    # Floats round up to a power of two just below it.
    edges |= {(1 << bit) - (1 << max(bit - 25, 0)) for bit in range(2, 33)}
    # √½ times a power of two, where the leading zeros change their meaning.
    edges |= {0xB504F334 >> shift for shift in range(31)}
    return sorted({(edge + step) % 2**32 for edge in edges for step in (-2, -1, 0, 1, 2)})


def test_normal_at_its_edges():
    edges = edge_words()
    others = np.random.default_rng(0).integers(0, 2**32, len(edges))
    words = padded(np.stack([[*edges, *others], [*others, *edges]], axis=1).flatten())
    out = torch.empty(len(words), device=DEVICE)
    normal_kernel[(1,)](words, out, COUNT=len(words) // 2, **launch.OPTIONS)
    assert same_bits(out, reference.VALUES["normal"](words.view(-1, 4)).flatten())


def test_products_are_fused():
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, 3.4028235e38, 1.0]
    triples = torch.cartesian_prod(*[torch.tensor(special)] * 3)
    generator = torch.Generator().manual_seed(0)
    # Sums that nearly cancel, and addends far below the product.
    a, b = torch.randn(2, 4096, generator=generator)
    near = torch.nextafter(a * b, torch.randn(4096, generator=generator))
    tiny = torch.randn(4096, generator=generator) * 2.0**-30
    columns = [
        torch.cat([triples, torch.stack([a, b, -near], 1), torch.stack([a, b, tiny], 1)])[:, i]
        for i in range(3)
    ]
    a, b, c = (column[: 1 << 13].contiguous().to(DEVICE) for column in columns)
    out = torch.empty_like(a)
    fma_kernel[(1,)](a, b, c, out, COUNT=len(a), **launch.OPTIONS)
    assert same_bits(out, arithmetic.fma(a, b, c))


def test_it_is_never_the_automatic_choice_on_a_cpu():
    assert backend.why_not_by_default(torch.device("cpu")) is not None


def run(code: str, **environment: str) -> str:
    """What a new Python prints, with the interpreter off unless the environment says otherwise."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=kept | environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


WHY_NOT = """
import torch
from zokern.backends import triton
print(triton.why_not(torch.device("{}")))
"""


def test_it_says_why_it_cannot_run_on_a_cpu():
    assert "set TRITON_INTERPRET=1 before Python starts" in run(WHY_NOT.format("cpu"))


def test_it_says_why_it_cannot_run_on_a_gpu_in_the_interpreter():
    reason = run(WHY_NOT.format("cuda"), TRITON_INTERPRET="1")
    assert "reaches only a CPU's memory" in reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_it_says_that_there_is_no_driver():
    assert "no active driver" in run(WHY_NOT.format("cuda"))


def test_it_says_that_triton_is_missing():
    reason = run("import sys; sys.modules['triton'] = None" + WHY_NOT.format("cpu"))
    assert "triton cannot be imported" in reason
