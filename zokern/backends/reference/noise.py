"""The noise contract: counter-based Gaussians, signs and words, as tensors.

Philox4x32-10 (Salmon et al., SC'11) is keyed by the run's seed and counts over
(group of elements, tensor id, law, draw). Unsigned 32-bit words are held in int64.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from zokern.backends.reference.arithmetic import fma, sqrt
from zokern.laws import LAWS

MASK32 = 0xFFFFFFFF

# Elements drawn at a time: bounds the memory of the int64 intermediates.
CHUNK = 1 << 22


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10: four words for each counter."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The int64 product wraps modulo 2^64, which leaves its 64 bits those of the unsigned one.
        p0 = c0 * 0xD2511F53
        p1 = c2 * 0xCD9E8D57
        c0, c1 = (p1 >> 32) & MASK32 ^ c1 ^ k0, p1 & MASK32
        c2, c3 = (p0 >> 32) & MASK32 ^ c3 ^ k1, p0 & MASK32
        k0 = (k0 + 0x9E3779B9) & MASK32
        k1 = (k1 + 0xBB67AE85) & MASK32
    return [c0, c1, c2, c3]


def _horner(coefficients: list[str], x: Tensor) -> Tensor:
    """The polynomial with these coefficients, highest power first, each step one fma."""
    constants = [torch.tensor(float.fromhex(c), device=x.device) for c in coefficients]
    total = constants[0].expand_as(x)
    for constant in constants[1:]:
        total = fma(total, x, constant)
    return total


def _gauss(weighted_sum: Tensor, centre: int, shift: int, coefficients: list[str]) -> Tensor:
    """z = x·q(x²) with x = (S - centre)·2^-shift."""
    x = (weighted_sum - centre).float() * 2.0**-shift
    return _horner(coefficients, x * x) * x


def gauss16_level(weighted_sum: Tensor) -> Tensor:
    """z of gauss16 for an integer sum 0 ≤ S ≤ 13140."""
    coefficients = [
        "0x1.9e1758p+3",
        "-0x1.eaff4cp+2",
        "0x1.226b62p+1",
        "0x1.49af68p-1",
        "0x1.eec002p+1",
    ]
    return _gauss(weighted_sum, centre=6570, shift=13, coefficients=coefficients)


def gauss32_level(weighted_sum: Tensor) -> Tensor:
    """z of gauss32 for an integer sum 0 ≤ S ≤ 65280."""
    coefficients = [
        "0x1.66ffaep+1",
        "-0x1.2e61b8p+1",
        "0x1.0c873ap+0",
        "0x1.8c8928p-2",
        "0x1.a620b6p+1",
    ]
    return _gauss(weighted_sum, centre=32640, shift=15, coefficients=coefficients)


def _gauss16(words: Tensor) -> Tensor:
    nibbles = torch.stack([words >> shift & 15 for shift in range(0, 32, 4)], dim=-1)
    weights = torch.tensor([181, 211, 233, 251], device=words.device)
    low = (nibbles[..., 0::2] * weights).sum(dim=-1)
    high = (nibbles[..., 1::2] * weights).sum(dim=-1)
    return gauss16_level(torch.stack([low, high], dim=-1).flatten(1))


def _gauss32(words: Tensor) -> Tensor:
    bytes_ = torch.stack([words >> shift & 255 for shift in range(0, 32, 8)], dim=-1)
    weights = torch.tensor([55, 73, 57, 71], device=words.device)
    return gauss32_level((bytes_ * weights).sum(dim=-1))


def _rademacher(words: Tensor) -> Tensor:
    bits = words[..., None] >> torch.arange(32, device=words.device) & 1
    return (1 - 2 * bits).flatten(1).float()


def _uniform32(words: Tensor) -> Tensor:
    return words


def _rounding16(words: Tensor) -> Tensor:
    return torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten(1)


def _normal_radius(word: Tensor) -> Tensor:
    """√(-2·ln u) with u = (word | 1)·2^-32, which is never 0 or 1."""
    n = word | 1
    # u = (1 + r)·2^-halvings with 1 + r in [√½, √2): r is an integer times 2^-32 and exact until
    # it is rounded to float32, also where u is close to 1 and ln u close to 0.
    zeros = 32 - torch.frexp(n.double()).exponent.long()
    shifted = n << zeros
    low = (shifted < math.ceil(math.sqrt(0.5) * 2**32)).long()
    r = ((shifted << low) - (1 << 32)).float() * 2.0**-32
    log1p_coefficients = [
        "-0x1.383d96p-4",
        "0x1.084e02p-3",
        "-0x1.0f375cp-3",
        "0x1.22709cp-3",
        "-0x1.54274ap-3",
        "0x1.99a402p-3",
        "-0x1.000428p-2",
        "0x1.55555p-2",
        "-0x1.fffff8p-2",
    ]
    log1p = fma(r * r, _horner(log1p_coefficients, r), r)
    ln2 = torch.tensor(float.fromhex("0x1.62e43p-1"), device=word.device)
    minus_log = fma((zeros + low).float(), ln2, -log1p)
    return sqrt(minus_log + minus_log)


def _normal_angle(word: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of 2π·word·2^-32."""
    quarter = (word + (1 << 29)) >> 30
    t = (word - (quarter << 30)).float() * 2.0**-29
    square = t * t
    quarter_pi = torch.tensor(float.fromhex("0x1.921fb6p-1"), device=word.device)
    sine = _horner(
        ["-0x1.2d9302p-15", "0x1.465e92p-9", "-0x1.4abbbap-4", "-0x1.777a5cp-26"], square
    )
    sine = fma(t, quarter_pi, t * sine)
    cosine = _horner(
        ["0x1.d99f54p-19", "-0x1.55c4eap-12", "0x1.03c1dap-6", "-0x1.3bd3ccp-2", "0x1p+0"], square
    )
    quarter = quarter % 4
    swap = quarter % 2 == 1
    cos, sin = torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)
    cos = torch.where((quarter == 1) | (quarter == 2), -cos, cos)
    sin = torch.where(quarter >= 2, -sin, sin)
    return cos, sin


def _normal(words: Tensor) -> Tensor:
    """Box-Muller: elements 4G, 4G+1 from words 0 and 1, elements 4G+2, 4G+3 from 2 and 3."""
    radius = _normal_radius(words[:, 0::2])
    cos, sin = _normal_angle(words[:, 1::2])
    return torch.stack([radius * cos, radius * sin], dim=-1).flatten(1)


# Words of shape (groups, 4) → values of shape (groups, elements per group).
VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "gauss16": _gauss16,
    "gauss32": _gauss32,
    "rademacher": _rademacher,
    "uniform32": _uniform32,
    "rounding16": _rounding16,
    "normal": _normal,
}


def _values_at(law: str, elements: Tensor, seed: int, draw: int, tensor_id: int) -> Tensor:
    per_group = LAWS[law].per_group
    groups, which = torch.unique_consecutive(elements // per_group, return_inverse=True)
    c2 = (tensor_id & 0xFFFFFF) | LAWS[law].code << 24
    counter = (
        groups,
        torch.full_like(groups, tensor_id >> 24),
        torch.full_like(groups, c2),
        torch.full_like(groups, draw),
    )
    words = philox(counter, (seed & MASK32, seed >> 32))
    return VALUES[law](torch.stack(words, dim=-1))[which, elements % per_group]


def values_at(law: str, elements: Tensor, *, seed: int, draw: int, tensor_id: int) -> Tensor:
    """The noise of these elements (int64 indices into the full tensor), in their order."""
    pieces = [
        _values_at(law, piece, seed, draw, tensor_id) for piece in elements.flatten().split(CHUNK)
    ]
    return torch.cat(pieces)


def sample(
    law: str,
    numel: int,
    *,
    seed: int,
    draw: int,
    tensor_id: int,
    offset: int,
    device: torch.device,
) -> Tensor:
    elements = torch.arange(offset, offset + numel, device=device)
    return values_at(law, elements, seed=seed, draw=draw, tensor_id=tensor_id)
