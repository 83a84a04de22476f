"""The noise contract: test vectors, every level of the laws, agreement of the backends."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import zokern
from tests.same_bits import same_bits
from zokern import noise
from zokern.backends.reference import noise as reference

VECTORS = Path(__file__).parent / "vectors"
SAMPLES = np.load(VECTORS / "samples.npz")
CASES = json.loads(bytes(SAMPLES["meta"]))
LEVELS = np.load(VECTORS / "levels.npz")
TENSOR_IDS = json.loads((VECTORS / "tensor_ids.json").read_text())


def bits(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.float32:
        tensor = tensor.view(torch.int32)
    return tensor.numpy().astype(np.int64) & 0xFFFFFFFF


def test_philox_gives_the_known_answers():
    cases = [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]
    for counter, key, words in cases:
        got = reference.philox(tuple(torch.tensor([c]) for c in counter), key)
        assert " ".join(f"{int(word):08x}" for word in got) == words


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['law']}-{c['case']}")
def test_samples_are_those_of_the_vectors(backend, case):
    keys = ("numel", "seed", "draw", "tensor_id", "offset")
    got = noise.sample(case["law"], **{key: case[key] for key in keys})
    np.testing.assert_array_equal(bits(got), SAMPLES[f"case{case['case']}"])


@pytest.mark.parametrize("name", TENSOR_IDS)
def test_tensor_ids_are_those_of_the_vectors(name):
    assert noise.tensor_id(name) == TENSOR_IDS[name]


@pytest.mark.parametrize("law", ["gauss16", "gauss32"])
def test_reference_has_every_level(law):
    level = {"gauss16": reference.gauss16_level, "gauss32": reference.gauss32_level}[law]
    np.testing.assert_array_equal(bits(level(torch.arange(len(LEVELS[law])))), LEVELS[law])


def words_with_sums(weights: tuple[int, ...], base: int) -> tuple[np.ndarray, np.ndarray]:
    """Every reachable Σ weightᵢ·digitᵢ, and four digits below ``base`` that give it."""
    top = sum(weights) * (base - 1)
    reachable = [np.zeros(top + 1, dtype=bool)]
    reachable[0][0] = True
    for weight in weights:
        following = np.zeros(top + 1, dtype=bool)
        for digit in range(base):
            shift = weight * digit
            following[shift:] |= reachable[-1][: top + 1 - shift]
        reachable.append(following)
    sums = np.flatnonzero(reachable[-1])
    digits = np.zeros((len(sums), 4), dtype=np.int64)
    rest = sums.copy()
    for i in reversed(range(4)):
        found = np.zeros(len(sums), dtype=bool)
        before = rest.copy()
        for digit in range(base):
            candidate = before - weights[i] * digit
            fits = ~found & (candidate >= 0) & reachable[i][np.maximum(candidate, 0)]
            digits[fits, i], rest[fits] = digit, candidate[fits]
            found |= fits
    assert (rest == 0).all()
    return sums, digits


@pytest.mark.parametrize("capability", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("law", ["gauss16", "gauss32"])
def test_native_kernels_have_every_level(law, capability):
    native = pytest.importorskip("zokern._C", reason="built without the native core")
    if capability not in native.cpu_capabilities():
        pytest.skip(f"this processor has no {capability}")
    if law == "gauss16":
        sums, digits = words_with_sums((181, 211, 233, 251), 16)
        # The low nibbles give the even elements, the high nibbles the odd ones.
        words = (digits * 0x11) << (8 * np.arange(4))
        per_word = 2
    else:
        sums, digits = words_with_sums((55, 73, 57, 71), 256)
        words = digits << (8 * np.arange(4))
        per_word = 1
    padded = np.zeros(-(-len(sums) // 64) * 64, dtype=np.uint32)
    padded[: len(sums)] = words.sum(axis=1)
    out = np.zeros(len(padded) * per_word, dtype=np.float32)
    native.cpu_values(
        noise.LAWS[law].code, padded.ctypes.data, len(padded) // 4, out.ctypes.data, capability
    )
    got = out.view(np.uint32).reshape(-1, per_word)[: len(sums)]
    np.testing.assert_array_equal(got, np.repeat(LEVELS[law][sums], per_word).reshape(got.shape))


@pytest.mark.parametrize("law", noise.LAWS)
def test_backends_agree_beyond_the_vectors(kernel_backend, law):
    choose = random.Random(law)
    per_group = noise.LAWS[law].per_group
    for numel in (0, 1, per_group - 1, per_group, 1000, 4097):
        arguments = {
            "seed": choose.getrandbits(64),
            "draw": choose.getrandbits(32),
            "tensor_id": choose.getrandbits(56),
            "offset": choose.choice([0, 3, per_group << 20, choose.getrandbits(33)]),
        }
        got = noise.sample(law, numel, **arguments)
        with zokern.use_backend("reference"):
            assert same_bits(got, noise.sample(law, numel, **arguments)), arguments


@pytest.mark.parametrize("law", noise.LAWS)
def test_sample_reaches_the_last_group_and_no_further(backend, law):
    end = noise.LAWS[law].max_elements
    last = noise.sample(law, 9, seed=1, draw=2, tensor_id=3, offset=end - 9)
    with zokern.use_backend("reference"):
        wider = noise.sample(law, 20, seed=1, draw=2, tensor_id=3, offset=end - 20)
    assert same_bits(last, wider[-9:])
    with pytest.raises(ValueError, match=str(end)):
        noise.sample(law, 10, seed=1, draw=2, tensor_id=3, offset=end - 9)


def test_dtypes(backend):
    for law, entry in noise.LAWS.items():
        sample = noise.sample(law, 5, seed=0, draw=0)
        assert sample.dtype == (torch.float32 if entry.is_direction else torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"law": "gauss8"}, "unknown law 'gauss8'"),
        ({"numel": -1}, "numel must be at least 0"),
        ({"offset": -1}, "offset must be at least 0"),
        ({"seed": 1 << 64}, r"seed must be at least 0 and below 2\^64"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"draw": 1 << 32}, r"draw must be at least 0 and below 2\^32"),
        ({"tensor_id": 1 << 56}, r"tensor_id must be at least 0 and below 2\^56"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        noise.sample(**({"law": "gauss16", "numel": 4, "seed": 0, "draw": 0} | arguments))


def test_a_float_is_no_seed():
    with pytest.raises(TypeError, match="seed must be an integer"):
        noise.sample("gauss16", 4, seed=1.5, draw=0)


@pytest.mark.parametrize(
    "wrapped",
    [
        "module.layers.0.weight",
        "_orig_mod.layers.0.weight",
        "_orig_mod.module.layers.0.weight",
        "layers.0._checkpoint_wrapped_module.weight",
        "_fsdp_wrapped_module.layers.0._fsdp_wrapped_module.weight",
    ],
)
def test_wrappers_do_not_change_a_tensor_id(wrapped):
    assert noise.tensor_id(wrapped) == noise.tensor_id("layers.0.weight")


def test_normal_is_within_four_ulp_of_the_exact_transform():
    rng = np.random.default_rng(0)
    words = rng.integers(0, 1 << 32, size=(1 << 20, 4))
    edges = np.concatenate([np.arange(500), (1 << 32) - 1 - np.arange(500)])
    words[:1000, 0] = edges
    words[1000:2000, 1] = edges
    for i in range(1, 4):
        around = (i << 30) + np.arange(-250, 250)
        words[2000 + 500 * i : 2500 + 500 * i, 1] = around
    words[4000:4500, 0] = 3037000500 + np.arange(-250, 250)
    got = reference.VALUES["normal"](torch.from_numpy(words)).numpy()

    exact = np.longdouble
    radius = np.sqrt(-2 * np.log((words[:, 0::2] | 1).astype(exact) / 2**32))
    quarter = (words[:, 1::2] + (1 << 29)) >> 30
    two_pi = 8 * np.arctan(exact(1))
    angle = (words[:, 1::2] - (quarter << 30)).astype(exact) * two_pi / 2**32
    c, s = np.cos(angle), np.sin(angle)
    cos = np.choose(quarter % 4, [c, -s, -c, s])
    sin = np.choose(quarter % 4, [s, c, -s, -c])
    wanted = np.stack([radius * cos, radius * sin], axis=-1).reshape(len(words), 4)
    error = np.abs(got - wanted) / np.spacing(np.abs(wanted).astype(np.float32))
    assert error.max() <= 4
