"""The grid that weights are rounded to: scale and zero point by group of input columns; round to nearest.

A code q of `bits` bits stands for scale * (q - zero). A group is a run of input columns of one row, as a product sums
over them: its scale can then be taken out of the sum. Conventions of Frantar et al. 2022 (their code's quantizer).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effnlp_lab.errors import UsageError
from effnlp_lab.quantization.checks import check_bits, check_group_size, check_weight

WIDER = 1 + 2**-12
"""Of a symmetric grid: its range would end halfway between two codes, where rounding noise decides."""


@dataclass
class QuantizedWeight:
    """codes: uint8 [rows, columns]; scale: float [rows, groups]; zero: uint8 [rows, groups].

    Column j belongs to group j // group_size.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group_size: int

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights that the codes stand for, [rows, columns]."""
        rows, columns = self.codes.shape
        exact = torch.promote_types(self.scale.dtype, torch.float32)
        codes = self.codes.to(exact).view(rows, -1, self.group_size)
        values = (codes - self.zero.to(exact)[:, :, None]) * self.scale.to(exact)[:, :, None]
        return values.view(rows, columns).to(dtype)

    def bits_per_weight(self) -> float:
        """What a weight costs on average, with its share of scale and zero point."""
        return self.bits + (8 * self.scale.element_size() + 8) / self.group_size


def find_grid(
    weight: Tensor, bits: int, symmetric: bool = False, scale_dtype: torch.dtype | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scale and zero point of each row of `weight` [..., group], so that the grid spans its weights and zero.

    Symmetric: the range is [-max|w|, max|w|], a little wider, and the zero point 2^(bits-1). The scale is first
    rounded to `scale_dtype`, in which it will be kept: codes then fit the grid that they are read with. keep: bool
    like weight, what is not to be coded and has no say. Returns scale and zero, in the weight's dtype, of shape [...].
    """
    highest = check_bits(bits)
    seen = weight if keep is None else weight.masked_fill(keep, 0)
    low, high = seen.amin(-1).clamp(max=0), seen.amax(-1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high) * WIDER
        low = -high
    flat = high == low  # all weights are zero: any grid will do
    scale = torch.where(flat, 1, (high - low) / highest)
    if scale_dtype is not None:
        scale = round_scale(scale, scale_dtype)
    zero = torch.full_like(scale, (highest + 1) // 2) if symmetric else (-low / scale).round().clamp(0, highest)
    return scale, zero


def round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest scale that `dtype` has, and never zero. Raises UsageError for one beyond its largest number."""
    if dtype.itemsize >= 4:  # float64 work, which tests compare with definitions, stays in float64
        return scale
    if scale.numel() and scale.max() > torch.finfo(dtype).max:
        raise UsageError(
            f"A scale of {scale.max().item():.3g} does not fit into {str(dtype)[6:]}: pass scale_dtype=torch.float32."
        )
    least = torch.finfo(dtype).smallest_normal
    return scale.clamp(min=least).to(dtype).to(scale.dtype)


def encode(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest code of each weight, as a float of the weight's dtype; scale and zero are broadcast."""
    return ((weight / scale).round() + zero).clamp(0, (1 << bits) - 1)


def round_to_nearest(
    weight: Tensor, bits: int = 4, group_size: int | None = 128, *, symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float32, name: str = "the weight",
) -> QuantizedWeight:  # fmt: skip
    """Each weight [rows, columns] to the nearest code of its group's grid: no data, no compensation.

    group_size: input columns that share a scale; None: the whole row. Raises UsageError for bits that are not offered,
    a group size that does not divide the columns, and weights that are not finite.
    """
    check_bits(bits)
    rows, columns = check_weight(weight, name).shape
    group_size = check_group_size(group_size, columns, name)
    grouped = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).view(rows, -1, group_size)
    scale, zero = find_grid(grouped, bits, symmetric, scale_dtype)
    codes = encode(grouped, scale[:, :, None], zero[:, :, None], bits)
    return QuantizedWeight(codes.view(rows, columns).to(torch.uint8), _kept(scale, scale_dtype), zero.to(torch.uint8),
                           bits, group_size)  # fmt: skip


def _kept(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale in `dtype`, but for float64 where float32 was asked for."""
    return scale if dtype == torch.float32 else scale.to(dtype)
