"""The noise contract in Triton: Philox4x32-10 and the laws that turn its words into numbers.

Noise is made by octets, eight elements in a row of the full tensor, one octet for each thread: an
octet is what one group of gauss16 gives, and 16 bytes of a half-precision parameter.
"""

import triton
import triton.language as tl

# Triton's own library is decorated when Triton is imported: that is when TRITON_INTERPRET counts.
INTERPRETED = tl.constexpr(not isinstance(tl.interleave, triton.JITFunction))


def _floats(*numbers: str) -> tl.constexpr:
    return tl.constexpr(tuple(float.fromhex(number) for number in numbers))


# Coefficients, highest power first.
_GAUSS16 = _floats(
    "0x1.9e1758p+3", "-0x1.eaff4cp+2", "0x1.226b62p+1", "0x1.49af68p-1", "0x1.eec002p+1"
)
_GAUSS32 = _floats(
    "0x1.66ffaep+1", "-0x1.2e61b8p+1", "0x1.0c873ap+0", "0x1.8c8928p-2", "0x1.a620b6p+1"
)
_LOG1P = _floats(
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
_SINE = _floats("-0x1.2d9302p-15", "0x1.465e92p-9", "-0x1.4abbbap-4", "-0x1.777a5cp-26")
_COSINE = _floats(
    "0x1.d99f54p-19", "-0x1.55c4eap-12", "0x1.03c1dap-6", "-0x1.3bd3ccp-2", "0x1p+0"
)
_LN2 = tl.constexpr(float.fromhex("0x1.62e43p-1"))
_QUARTER_PI = tl.constexpr(float.fromhex("0x1.921fb6p-1"))


@triton.jit
def fma(a, b, c):
    """a·b + c in float32 with a single rounding."""
    if INTERPRETED:
        # Some interpreters round twice. As in the reference: the product is exact in float64, and
        # the sum is rounded to odd there, so that rounding it once more is harmless.
        product = a.to(tl.float64) * b.to(tl.float64)
        addend = c.to(tl.float64)
        total = product + addend
        back = total - product
        error = (product - (total - back)) + (addend - back)
        bits = total.to(tl.int64, bitcast=True)
        odd = tl.where((error > 0) == (total > 0), bits + 1, bits - 1)
        # The error of an infinite sum is NaN.
        inexact = (tl.abs(error) > 0) & (bits & 1 == 0)
        return tl.where(inexact, odd, bits).to(tl.float64, bitcast=True).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def _horner(COEFFICIENTS: tl.constexpr, x):
    total = tl.full([], COEFFICIENTS[0], tl.float32)
    for i in tl.static_range(1, len(COEFFICIENTS)):
        total = fma(total, x, tl.full([], COEFFICIENTS[i], tl.float32))
    return total


@triton.jit
def philox(c0, c1, c2, c3, key0, key1):
    """Philox4x32-10: four words for each counter."""
    for _ in tl.static_range(10):
        # One wide multiplication gives both halves of a product.
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ key0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ key1, p0.to(tl.uint32)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _join4(a, b, c, d):
    """a₀ b₀ c₀ d₀ a₁ …: joined in bit-reversed order, a thread's values stay its own, in place."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def _join8(a, b, c, d, e, f, g, h):
    return tl.interleave(_join4(a, c, e, g), _join4(b, d, f, h))


@triton.jit
def _dot_bytes(words, WEIGHTS: tl.constexpr, START: tl.constexpr, DP4A: tl.constexpr):
    """START plus the sum of the four bytes of each word, lowest first, each times its weight."""
    if DP4A:
        packed: tl.constexpr = (
            WEIGHTS[0] | WEIGHTS[1] << 8 | WEIGHTS[2] << 16 | WEIGHTS[3] << 24
        )
        return tl.inline_asm_elementwise(
            "dp4a.u32.u32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [words, tl.full([], packed, tl.uint32), tl.full([], START, tl.uint32)],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    else:
        total = tl.full([], START, tl.uint32)
        for i in tl.static_range(4):
            total += (words >> 8 * i & 0xFF) * WEIGHTS[i]
        return total


@triton.jit
def _scaled_sum(words, WEIGHTS: tl.constexpr, CENTRE: tl.constexpr, BASE: tl.constexpr,
                SHIFT: tl.constexpr, DP4A: tl.constexpr):  # fmt: skip
    """(S - CENTRE)·2^-SHIFT for the weighted sum S of each word's bytes.

    No integer is converted, which GPUs do slowly: where BASE is the power of two with the unit in
    the last place 2^-SHIFT, adding S to its bits adds S·2^-SHIFT to it. Everything is exact.
    """
    bits: tl.constexpr = (127 + 23 - SHIFT) << 23
    biased = _dot_bytes(words, WEIGHTS, bits, DP4A).to(tl.float32, bitcast=True)
    return biased - (2.0 ** (23 - SHIFT) + CENTRE * 2.0**-SHIFT)
