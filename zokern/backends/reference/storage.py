"""How a float32 value is kept: in a parameter alone, or in a parameter and a residual.

=========  ========  ==============================================================
parameter  residual  value
=========  ========  ==============================================================
any        none      the parameter
bfloat16   int16     ``split``: bits = (parameter bits << 16) + residual, mod 2^32
bfloat16   int8      ``split8``: bits = (parameter bits << 16) + 256·residual
float16    float16   ``split``: parameter + residual·2^-11
=========  ========  ==============================================================
"""

import torch
from torch import Tensor

INFINITY_BITS = 0x7F800000


def _to_bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def _from_bits(bits: Tensor) -> Tensor:
    return bits.view(torch.float32)


def load(param: Tensor, residual: Tensor | None) -> Tensor:
    """The float32 value, shaped like the parameter."""
    if residual is None:
        return param.float()
    if param.dtype == torch.float16:
        return param.float() + residual.float() * 2.0**-11
    unit = 256 if residual.dtype == torch.int8 else 1
    # int32 sums wrap, as sums of bits modulo 2^32 do.
    return _from_bits(_to_bits(param.float()) + unit * residual.int())


def split(value: Tensor, param_dtype: torch.dtype, residual_dtype: torch.dtype | None) -> tuple:
    """The (parameter, residual) that keep a float32 value; the residual may be None.

    bfloat16 halves are split ties away from zero, not to even: only so does the difference always
    fit the residual.
    """
    if residual_dtype is None:
        return value.to(param_dtype), None
    if param_dtype == torch.float16:
        param = value.to(torch.float16)
        residual = ((value - param.float()) * 2.0**11).to(torch.float16)
        return param, torch.where(torch.isfinite(param), residual, 0)
    bits = _to_bits(value)
    special = bits & INFINITY_BITS == INFINITY_BITS
    if residual_dtype == torch.int8:
        bits = torch.where(special, bits, (bits + 0x80) & ~0xFF)
    high = (bits + 0x8000) & ~0xFFFF
    param = torch.where(special, value, _from_bits(high)).to(torch.bfloat16)
    unit = 256 if residual_dtype == torch.int8 else 1
    residual = torch.where(special, 0, (bits - high) // unit)
    return param, residual.to(residual_dtype)


def round_by(random: Tensor, value: Tensor, param_dtype: torch.dtype, split8: bool) -> Tensor:
    """The value rounded stochastically, by 16 random bits, to one that is stored as it is.

    The chance of rounding up is the fraction that is dropped. Infinities and NaN stay as they are.
    """
    if param_dtype == torch.float16:
        return _round_float16_by(random, value)
    dropped = 8 if split8 else 16
    bits = _to_bits(value)
    rounded = (bits + (random >> (16 - dropped)).int()) & (-1 << dropped)
    return torch.where(torch.isfinite(value), _from_bits(rounded), value)


def _round_float16_by(random: Tensor, value: Tensor) -> Tensor:
    power = _from_bits(_to_bits(value) & INFINITY_BITS)
    ulp = (power * 2.0**-10).clamp(min=2.0**-24)
    quotient = value.abs() / ulp
    n = quotient.floor()
    n += random.float() < (quotient - n) * 2.0**16
    return torch.where(value.abs() < 2.0**16, torch.copysign(n * ulp, value), value)


def store(value: Tensor, param: Tensor, residual: Tensor | None) -> None:
    new_param, new_residual = split(
        value, param.dtype, None if residual is None else residual.dtype
    )
    param.copy_(new_param)
    if residual is not None:
        residual.copy_(new_residual)
