"""How a float32 value is kept: in a parameter alone, or in a parameter and a residual.

A storage is named by its two dtypes; :mod:`zokern.backends.reference.storage` is the specification.
bfloat16 and integers are handled as bits: the interpreter does not round to bfloat16, and for a
GPU it is shorter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zokern.backends.triton.launch import INTERPRETED
from zokern.backends.triton.noise import join2, join4

# (parameter, residual) → name.
STORAGES = {
    (torch.float32, None): "fp32",
    (torch.bfloat16, None): "bf16",
    (torch.float16, None): "fp16",
    (torch.bfloat16, torch.int16): "bf16_int16",
    (torch.bfloat16, torch.int8): "bf16_int8",
    (torch.float16, torch.float16): "fp16_fp16",
}

_TYPES = {
    "fp32": tl.float32,
    "bf16": tl.uint16,
    "fp16": tl.float16,
    "int16": tl.uint16,
    "int8": tl.uint8,
    "": None,
}


def storage_of(param: Tensor, residual: Tensor | None = None) -> str:
    return STORAGES[param.dtype, None if residual is None else residual.dtype]


def alone(storage: str) -> str:
    """The parameter's storage, without the residual."""
    return storage.partition("_")[0]


@triton.constexpr_function
def _types(storage):
    """Of the parameter and of the residual, None where there is none."""
    param, _, residual = storage.partition("_")
    return _TYPES[param], _TYPES[residual]


@triton.constexpr_function
def sizes(storage):
    """The bytes of a parameter and of a residual."""
    return tuple(0 if t is None else t.primitive_bitwidth // 8 for t in _types(storage))


@triton.constexpr_function
def _sign_bit(storage):
    """Of an integer residual."""
    return {"bf16_int16": 0x8000, "bf16_int8": 0x80}.get(storage, 0)


@triton.jit
def _read(address, dtype: tl.constexpr, at, mask, FLIP: tl.constexpr):
    """The numbers at these places; integers in 32 bits, with the bits of FLIP flipped."""
    x = tl.load(address.to(tl.pointer_type(dtype)) + at, mask)
    if dtype == tl.float32 or dtype == tl.float16:
        return x
    else:
        return x.to(tl.uint32) ^ FLIP


@triton.jit
def _read_aligned(address, dtype: tl.constexpr, octet, OCTETS: tl.constexpr, FLIP: tl.constexpr):
    """The numbers of OCTETS octets from ``octet`` on, in vectors of up to 16 bytes."""
    # Words are taken apart in fewer instructions than vectors of short integers.
    WORDS: tl.constexpr = dtype == tl.uint16 or dtype == tl.uint8
    start = tl.multiple_of(address.to(tl.pointer_type(tl.uint32 if WORDS else dtype)), 16)
    if dtype == tl.uint16:
        words = tl.load(start + (octet * 4 + tl.arange(0, OCTETS * 4))) ^ FLIP * 0x10001
        return join2(words & 0xFFFF, words >> 16)
    elif dtype == tl.uint8:
        words = tl.load(start + (octet * 2 + tl.arange(0, OCTETS * 2))) ^ FLIP * 0x1010101
        return join4(words & 0xFF, words >> 8 & 0xFF, words >> 16 & 0xFF, words >> 24)
    else:
        return tl.load(start + (octet * 8 + tl.arange(0, OCTETS * 8)))


@triton.jit
def load(STORAGE: tl.constexpr, param, residual, at, mask):
    """The float32 values at these places behind the addresses."""
    TYPES: tl.constexpr = _types(STORAGE)
    high = _read(param, TYPES[0], at, mask, 0)
    if TYPES[1] is None:
        return _decode(STORAGE, high, None)
    else:
        return _decode(STORAGE, high, _read(residual, TYPES[1], at, mask, _sign_bit(STORAGE)))


@triton.jit
def load_aligned(STORAGE: tl.constexpr, param, residual, octet, OCTETS: tl.constexpr):
    """The values of OCTETS octets from ``octet`` on; the addresses are multiples of 16."""
    TYPES: tl.constexpr = _types(STORAGE)
    high = _read_aligned(param, TYPES[0], octet, OCTETS, 0)
    if TYPES[1] is None:
        return _decode(STORAGE, high, None)
    else:
        low = _read_aligned(residual, TYPES[1], octet, OCTETS, _sign_bit(STORAGE))
        return _decode(STORAGE, high, low)


@triton.jit
def round_by(STORAGE: tl.constexpr, random, value):
    """The value rounded stochastically, by 16 random bits, to one that is stored as it is."""
    bits = value.to(tl.uint32, bitcast=True)
    if STORAGE == "fp16":
        # Powers of two by their bits: the spacing, which is not below 2^-24, and its inverse.
        ulp = tl.maximum(bits & 0x7F800000, 0x38800000) - (10 << 23)
        quotient = tl.abs(value) * ((254 << 23) - ulp).to(tl.float32, bitcast=True)
        n = tl.floor(quotient)
        n += (random.to(tl.float32) < (quotient - n) * 2.0**16).to(tl.float32)
        rounded = (n * ulp.to(tl.float32, bitcast=True)).to(tl.uint32, bitcast=True)
        rounded |= bits & 0x80000000
        kept = tl.abs(value) < 2.0**16
    else:
        DROPPED: tl.constexpr = 16 if STORAGE == "bf16" else 8
        rounded = bits + (random >> (16 - DROPPED)) >> DROPPED << DROPPED
        kept = tl.abs(value) < float("inf")
    return tl.where(kept, rounded, bits).to(tl.float32, bitcast=True)


@triton.jit
def store(STORAGE: tl.constexpr, param, residual, at, mask, value, ALIGNMENT: tl.constexpr):
    """Keep the values at these places behind the addresses, which are multiples of ALIGNMENT."""
    TYPES: tl.constexpr = _types(STORAGE)
    param = tl.multiple_of(param.to(tl.pointer_type(TYPES[0])), ALIGNMENT)
    if TYPES[1] is None:
        tl.store(param + at, _round(STORAGE, value), mask)
    else:
        residual = tl.multiple_of(residual.to(tl.pointer_type(TYPES[1])), ALIGNMENT)
        high, low = _split(STORAGE, value)
        tl.store(param + at, high, mask)
        tl.store(residual + at, low, mask)


@triton.jit
def load_tile(STORAGE: tl.constexpr, address, residual, access, OCTETS: tl.constexpr):
    """The values of a tile, accessed by (first octet, places, mask); no mask, whole octets."""
    octet, at, mask = access
    if mask is None:
        return load_aligned(STORAGE, address, residual, octet, OCTETS)
    else:
        return load(STORAGE, address, residual, at, mask)


@triton.jit
def store_tile(STORAGE: tl.constexpr, address, residual, access, value):
    _, at, mask = access
    store(STORAGE, address, residual, at, mask, value, 16 if mask is None else 1)


@triton.jit
def _decode(STORAGE: tl.constexpr, param, residual):
    """The float32 value; a storage without a residual does not look at it."""
    if STORAGE == "fp32" or STORAGE == "fp16":
        return param.to(tl.float32)
    elif STORAGE == "fp16_fp16":
        # The product is exact.
        return param.to(tl.float32) + residual.to(tl.float32) * 2.0**-11
    else:
        bits = param << 16
        # With its sign bit flipped a residual is not negative, but adds 2^15 too much.
        if STORAGE == "bf16_int16":
            bits = (bits | residual) - 0x8000
        elif STORAGE == "bf16_int8":
            bits = (bits | residual << 8) - 0x8000
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def _round(STORAGE: tl.constexpr, value):
    """The parameter nearest to a float32 value, ties to even."""
    if STORAGE == "fp32":
        return value
    elif STORAGE == "fp16":
        return value.to(tl.float16)
    elif INTERPRETED:
        bits = value.to(tl.uint32, bitcast=True)
        nan = bits & 0x7FFFFFFF > 0x7F800000
        rounded = tl.where(nan, bits | 0x400000, bits + 0x7FFF + (bits >> 16 & 1))
        return (rounded >> 16).to(tl.uint16)
    else:
        return value.to(tl.bfloat16).to(tl.uint16, bitcast=True)


@triton.jit
def rounded(STORAGE: tl.constexpr, value):
    """A float32 value rounded to a storage without a residual, as float32 again."""
    if STORAGE == "fp32":
        return value
    elif STORAGE == "fp16":
        return value.to(tl.float16).to(tl.float32)
    else:
        return _decode(STORAGE, _round(STORAGE, value).to(tl.uint32), None)


@triton.jit
def _split(STORAGE: tl.constexpr, value):
    """The parameter and the residual that keep a float32 value."""
    if STORAGE == "fp16_fp16":
        param = value.to(tl.float16)
        finite = tl.abs(param.to(tl.float32)) < float("inf")
        residual = (value - param.to(tl.float32)) * 2.0**11
        return param, tl.where(finite, residual, 0.0).to(tl.float16)
    else:
        bits = value.to(tl.uint32, bitcast=True)
        # Infinities and NaN have no residual and must not be rounded. What comes out of arithmetic
        # is a quiet NaN, which its upper half alone says.
        bits = tl.where(tl.abs(value) < float("inf"), bits, bits & 0xFFFF0000)
        # Ties go away from zero, so the residual is the lower half, with its sign.
        if STORAGE == "bf16_int16":
            return (bits + 0x8000 >> 16).to(tl.uint16), bits.to(tl.uint16)
        else:
            return (bits + 0x8080 >> 16).to(tl.uint16), (bits + 0x80 >> 8).to(tl.uint8)
