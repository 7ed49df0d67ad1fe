"""Affine int8: real = scale * (code - zero), and products of such codes with int32 sums (Jacob et al. 2018, section 2).

A product of two int8 codes needs up to 15 bits and a sum over k of them log2(k) more: int8 and int16 overflow at once,
float16 loses whole numbers above 2048, and int32 holds the sum of 2^17 products of any size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effnlp_lab.errors import UsageError

LOWEST, HIGHEST = -128, 127
MOST_TERMS = 1 << 17
"""Products of two codes, at most 2^14 in magnitude, that an int32 surely holds the sum of."""


@dataclass
class AffineInt8:
    """codes: int8 of any shape; scale: float32 and zero: int32, of a shape that is broadcast with it."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return ((self.codes.to(torch.int32) - self.zero).to(torch.float32) * self.scale).to(dtype)


def affine_quantize(x: Tensor, *, dim: int | None = None, symmetric: bool = False) -> AffineInt8:
    """x in int8, with one scale and zero point, or one for each slice along the other dimensions than `dim`.

    dim: the dimension that a product sums over (each row of a matrix its own scale: dim=1). The range covers zero, so
    that zero is coded exactly. Symmetric: zero point 0 and codes in [-127, 127]. Raises UsageError unless x is finite.
    """
    if not x.is_floating_point() or not torch.isfinite(x).all():
        raise UsageError("affine_quantize was given NaN, infinity or integers: expected finite floats.")
    values = x.float()
    low, high = (values.amin(), values.amax()) if dim is None else (v(dim, True) for v in (values.amin, values.amax))
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        scale = torch.maximum(high, -low) / HIGHEST
        zero = torch.zeros_like(scale)
    else:
        scale = (high - low) / (HIGHEST - LOWEST)
        scale = torch.where(scale > 0, scale, 1)
        zero = LOWEST - (low / scale).round()
    scale = torch.where(scale > 0, scale, 1)
    lowest = -HIGHEST if symmetric else LOWEST
    codes = ((values / scale).round() + zero).clamp(lowest, HIGHEST)
    return AffineInt8(codes.to(torch.int8), scale, zero.to(torch.int32))


def affine_matmul(a: AffineInt8, b: AffineInt8) -> Tensor:
    """a @ b.T in float32 [m, n], of codes a [m, k] and b [n, k] with a scale each, or one a row.

    Multiplied out, (A - za)(B - zb)' = AB' - za sum(B) - zb sum(A) + k za zb: only AB' is a product of matrices, and it
    is one of int8 with int32 sums. Raises UsageError where an int32 could overflow.
    """
    k = a.codes.shape[1]
    if k != b.codes.shape[1]:
        raise UsageError(f"Codes of {k} and {b.codes.shape[1]} columns cannot be multiplied: a @ b.T needs as many.")
    if k > MOST_TERMS:
        raise UsageError(f"A sum of {k} products may overflow an int32: at most {MOST_TERMS} columns at a time.")
    za, zb = a.zero.reshape(-1, 1).to(torch.int64), b.zero.reshape(1, -1).to(torch.int64)
    sums_a, sums_b = a.codes.sum(1, dtype=torch.int64)[:, None], b.codes.sum(1, dtype=torch.int64)[None, :]
    total = int8_matmul(a.codes, b.codes).to(torch.int64) - za * sums_b - zb * sums_a + k * za * zb
    return total.float() * a.scale.reshape(-1, 1) * b.scale.reshape(1, -1)


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] @ b.T for b [n, k], both int8, in int32 [m, n]: cuBLAS on a GPU, which wants multiples of 8."""
    m, n = a.shape[0], b.shape[0]
    if a.device.type != "cuda":
        return torch._int_mm(a.contiguous(), b.T.contiguous())
    short = -a.shape[1] % 8
    a = torch.nn.functional.pad(a, (0, short, 0, max(32 - m, -m % 8)))
    b = torch.nn.functional.pad(b, (0, short, 0, -n % 8))
    return torch._int_mm(a, b.T)[:m, :n]
