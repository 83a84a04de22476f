"""The noise contract in Triton: Philox4x32-10 and the laws that turn its words into numbers.

Noise is made by octets: eight elements of the full tensor in a row, the first of them a multiple of
eight. That is what one group of gauss16 gives, and 16 bytes of a half-precision parameter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zokern.backends.triton.launch import FUSED_FMA, OPTIONS, on, target
from zokern.laws import LAWS

# Octets that a block of the sampling kernel makes.
OCTETS = 256


@triton.constexpr_function
def _code(law):
    return LAWS[law].code


@triton.constexpr_function
def _floats(*numbers):
    return tuple(float.fromhex(number) for number in numbers)


@triton.jit
def fma(a, b, c):
    """a·b + c in float32 with a single rounding."""
    if FUSED_FMA:
        return tl.fma(a, b, c)
    else:
        # As in the reference: the product is exact in float64, and the sum is rounded to odd
        # there, so that rounding it once more does no harm.
        product = a.to(tl.float64) * b.to(tl.float64)
        addend = c.to(tl.float64)
        total = product + addend
        back = total - product
        error = (product - (total - back)) + (addend - back)
        bits = total.to(tl.int64, bitcast=True)
        odd = tl.where((error > 0) == (total > 0), bits + 1, bits - 1)
        # The error of an infinite sum is NaN, and such a sum stays as it is.
        inexact = (tl.abs(error) > 0) & (bits & 1 == 0)
        return tl.where(inexact, odd, bits).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def _horner(COEFFICIENTS: tl.constexpr, x):
    """The polynomial with these coefficients, highest power first."""
    total = tl.full([], COEFFICIENTS[0], tl.float32)
    for i in tl.static_range(1, len(COEFFICIENTS)):
        total = fma(total, x, tl.full([], COEFFICIENTS[i], tl.float32))
    return total


@triton.jit
def philox(c0, c1, c2, c3, key0, key1):
    """Philox4x32-10: four words for each counter."""
    for _ in tl.static_range(10):
        # A product of 64 bits is one instruction, and gives both of its halves.
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ key0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ key1, p0.to(tl.uint32)
        key0 = tl.add(key0, 0x9E3779B9, sanitize_overflow=False)
        key1 = tl.add(key1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def join2(a, b):
    return tl.reshape(tl.join(a, b), [2 * a.shape[0]])


@triton.jit
def join4(a, b, c, d):
    """a₀ b₀ c₀ d₀ a₁ …; joined in bit-reversed order, each thread keeps its own values."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [4 * a.shape[0]])


@triton.jit
def _join8(a, b, c, d, e, f, g, h):
    even = tl.join(tl.join(a, e), tl.join(c, g))
    odd = tl.join(tl.join(b, f), tl.join(d, h))
    return tl.reshape(tl.join(even, odd), [8 * a.shape[0]])


@triton.jit
def _centred_sum(words, WEIGHTS: tl.constexpr, CENTRE: tl.constexpr, SHIFT: tl.constexpr,
                 DP4A: tl.constexpr):  # fmt: skip
    """(S - CENTRE)·2^-SHIFT, exactly, for the weighted sum S of each word's bytes, lowest first."""
    # Added to the bits of a float whose last place is worth 2^-SHIFT, S needs no conversion.
    bits = tl.full([], 127 + 23 - SHIFT << 23, tl.uint32)
    if DP4A:
        weights: tl.constexpr = WEIGHTS[0] | WEIGHTS[1] << 8 | WEIGHTS[2] << 16 | WEIGHTS[3] << 24
        bits = tl.inline_asm_elementwise(
            "dp4a.u32.u32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [words, tl.full([], weights, tl.uint32), bits],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    else:
        for i in tl.static_range(4):
            product = tl.mul(words >> 8 * i & 0xFF, WEIGHTS[i], sanitize_overflow=False)
            bits = tl.add(bits, product, sanitize_overflow=False)
    return bits.to(tl.float32, bitcast=True) - (2.0 ** (23 - SHIFT) + CENTRE * 2.0**-SHIFT)


@triton.jit
def gauss16(words, DP4A: tl.constexpr):
    """Two values for each word: of its low nibbles, then of its high ones."""
    WEIGHTS: tl.constexpr = (181, 211, 233, 251)
    low = _centred_sum(words & 0x0F0F0F0F, WEIGHTS, 6570, 13, DP4A)
    # A high nibble in its place is sixteen times itself.
    high = _centred_sum(words & 0xF0F0F0F0, WEIGHTS, 6570 * 16, 13 + 4, DP4A)
    x = join2(low, high)
    COEFFICIENTS: tl.constexpr = _floats(
        "0x1.9e1758p+3", "-0x1.eaff4cp+2", "0x1.226b62p+1", "0x1.49af68p-1", "0x1.eec002p+1"
    )
    return _horner(COEFFICIENTS, x * x) * x


@triton.jit
def gauss32(words, DP4A: tl.constexpr):
    x = _centred_sum(words, (55, 73, 57, 71), 32640, 15, DP4A)
    COEFFICIENTS: tl.constexpr = _floats(
        "0x1.66ffaep+1", "-0x1.2e61b8p+1", "0x1.0c873ap+0", "0x1.8c8928p-2", "0x1.a620b6p+1"
    )
    return _horner(COEFFICIENTS, x * x) * x


@triton.jit
def _sqrt_in_range(x, NVIDIA: tl.constexpr):
    """√x for 2^-101 ≤ x, correctly rounded."""
    if NVIDIA:
        # What a root is made of on NVIDIA's GPUs, less the test for smaller arguments.
        inverse = tl.inline_asm_elementwise(
            "rsqrt.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        root = x * inverse
        return fma(fma(-root, root, x), 0.5 * inverse, root)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _normal_radius(word, NVIDIA: tl.constexpr):
    """√(-2·ln u) with u = (word | 1)·2^-32."""
    n = word | 1
    # Where the conversion rounds up to a power of two there is one leading zero too few, and the
    # word counts as low instead, which comes to the same.
    exponent = tl.minimum(n.to(tl.float32).to(tl.uint32, bitcast=True) >> 23, 127 + 31)
    zeros = 127 + 31 - exponent
    shifted = n << zeros
    low = (shifted < 0xB504F334).to(tl.uint32)  # ⌈√½·2^32⌉
    # u = (1 + r)·2^-halvings: the shifted word, less 2^32, is r·2^32, exactly.
    r = (shifted << low).to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-32
    halvings = (zeros + low).to(tl.float32)
    LOG1P: tl.constexpr = _floats(
        "-0x1.383d96p-4",
        "0x1.084e02p-3",
        "-0x1.0f375cp-3",
        "0x1.22709cp-3",
        "-0x1.54274ap-3",
        "0x1.99a402p-3",
        "-0x1.000428p-2",
        "0x1.55555p-2",
        "-0x1.fffff8p-2",
    )
    log1p = fma(r * r, _horner(LOG1P, r), r)
    LN2: tl.constexpr = _floats("0x1.62e43p-1")
    minus_log = fma(halvings, tl.full([], LN2[0], tl.float32), -log1p)
    return _sqrt_in_range(minus_log + minus_log, NVIDIA)


@triton.jit
def _flip_sign(x, flip):
    """-x where the bit is 1, x where it is 0."""
    return (x.to(tl.uint32, bitcast=True) ^ flip << 31).to(tl.float32, bitcast=True)


@triton.jit
def _normal_angle(word):
    """cos and sin of 2π·word·2^-32."""
    quarter = word + 0x20000000 >> 30
    t = (word - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-29
    square = t * t
    SINE: tl.constexpr = _floats(
        "-0x1.2d9302p-15", "0x1.465e92p-9", "-0x1.4abbbap-4", "-0x1.777a5cp-26"
    )
    COSINE: tl.constexpr = _floats(
        "0x1.d99f54p-19", "-0x1.55c4eap-12", "0x1.03c1dap-6", "-0x1.3bd3ccp-2", "0x1p+0"
    )
    QUARTER_PI: tl.constexpr = _floats("0x1.921fb6p-1")
    sine = fma(t, tl.full([], QUARTER_PI[0], tl.float32), t * _horner(SINE, square))
    cosine = _horner(COSINE, square)
    swap = quarter & 1 == 1
    cos = _flip_sign(tl.where(swap, sine, cosine), quarter + 1 >> 1 & 1)
    sin = _flip_sign(tl.where(swap, cosine, sine), quarter >> 1)
    return cos, sin


@triton.jit
def normal(radius_words, angle_words, NVIDIA: tl.constexpr):
    """Box-Muller: two values for each pair of words."""
    radius = _normal_radius(radius_words, NVIDIA)
    cos, sin = _normal_angle(angle_words)
    return join2(radius * cos, radius * sin)


@triton.jit
def rademacher(words, octet):
    """The signs in the octet's byte of its group's sixteen."""
    w0, w1, w2, w3 = words
    which = octet >> 2 & 3
    word = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
    byte = word >> ((octet & 3) * 8).to(tl.uint32)
    bits = _join8(byte, byte >> 1, byte >> 2, byte >> 3, byte >> 4, byte >> 5, byte >> 6, byte >> 7)
    return (0x3F800000 | bits << 31).to(tl.float32, bitcast=True)


@triton.jit
def _group_words(LAW: tl.constexpr, group, stream, draw):
    """The four words of each group."""
    seed_low, seed_high, tensor_id = stream
    c1 = (tensor_id >> 24).to(tl.uint32)
    c2 = (tensor_id & 0xFFFFFF | _code(LAW) << 24).to(tl.uint32)
    return philox(group.to(tl.uint32), c1, c2, draw.to(tl.uint32), seed_low, seed_high)


@triton.jit
def octet_values(LAW: tl.constexpr, octet, stream, draw, DP4A: tl.constexpr):
    """The noise of these octets (int64 indices), eight values for each.

    The stream is (low and high word of the seed, tensor id). With DP4A weighted sums of bytes are
    that instruction of NVIDIA's GPUs, and roots are made of theirs.
    """
    if LAW == "gauss16":
        w0, w1, w2, w3 = _group_words(LAW, octet, stream, draw)
        return gauss16(join4(w0, w1, w2, w3), DP4A)
    elif LAW == "rounding16":
        w0, w1, w2, w3 = _group_words(LAW, octet, stream, draw)
        words = join4(w0, w1, w2, w3)
        return join2(words & 0xFFFF, words >> 16)
    elif LAW == "rademacher":
        return rademacher(_group_words(LAW, octet >> 4, stream, draw), octet)
    else:
        a0, a1, a2, a3 = _group_words(LAW, octet * 2, stream, draw)
        b0, b1, b2, b3 = _group_words(LAW, octet * 2 + 1, stream, draw)
        if LAW == "normal":
            return normal(join4(a0, a2, b0, b2), join4(a1, a3, b1, b3), DP4A)
        else:
            words = _join8(a0, a1, a2, a3, b0, b1, b2, b3)
            if LAW == "gauss32":
                return gauss32(words, DP4A)
            else:
                tl.static_assert(LAW == "uniform32")
                return words


@triton.jit(do_not_specialize=["numel", "offset", "seed_low", "seed_high", "tensor_id", "draw"])
def sample_kernel(
    out,
    numel: tl.int64,
    offset: tl.int64,
    seed_low: tl.uint32,
    seed_high: tl.uint32,
    tensor_id: tl.int64,
    draw: tl.uint32,
    LAW: tl.constexpr,
    OCTETS: tl.constexpr,
    DP4A: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * OCTETS + tl.arange(0, OCTETS)
    # The interpreter mistakes the sign of int64 arguments between 2^31 and 2^32.
    offset = offset.to(tl.uint64).to(tl.int64)
    tensor_id = tensor_id.to(tl.uint64).to(tl.int64)
    stream = (seed_low.to(tl.uint32), seed_high.to(tl.uint32), tensor_id)
    values = octet_values(LAW, (offset >> 3) + place, stream, draw, DP4A)
    # The first octet may begin before the first element.
    element = (place * 8 - (offset & 7))[:, None] + tl.arange(0, 8)[None, :]
    mask = (element >= 0) & (element < numel)
    tl.store(out + element, tl.reshape(values, [OCTETS, 8]), mask)


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
    dtype = torch.int64 if law in ("uniform32", "rounding16") else torch.float32
    out = torch.empty(numel, dtype=dtype, device=device)
    if numel == 0:
        return out
    octets = (offset % 8 + numel + 7) // 8
    with on(out.device):
        sample_kernel[(-(-octets // OCTETS),)](
            out,
            numel,
            offset,
            seed & 0xFFFFFFFF,
            seed >> 32,
            tensor_id,
            draw,
            LAW=law,
            OCTETS=OCTETS,
            DP4A=target().dp4a,
            num_warps=128 // target().warp_size,
            **OPTIONS,
        )
    return out
