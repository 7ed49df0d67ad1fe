"""Double quantization: the absmax of each block, itself in 8 bits, so that a scale costs 8.5 bits a block and not 32.

Dettmers et al. 2023, "QLoRA", section 3. The magnitudes are positive and close together: their mean is taken away
first, so that the signed code is used on both sides. Blocks of 256 of what is left share one float32 magnitude. With
blocks of 64 weights that is 8/64 + 32/(64*256) = 0.127 bits a weight in place of 0.5.

The code is the dynamic one of Dettmers 2016: decade d below 1 is cut in 64, 32, ..., 1 equal cells, and a number is
replaced by the nearest of 256 values.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from effnlp_lab.errors import UsageError

BLOCK = 256
DECADES = 7
GRID = 32767.5
"""Points to each side of zero on which bitsandbytes' CPU code looks numbers up."""


@functools.cache
def dynamic_values(device: torch.device | str = "cpu") -> Tensor:
    """The 256 values, ascending, float32, in [-0.993, 1]."""
    values = [0.0, 1.0]
    for decade in range(DECADES):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (10 ** (decade - DECADES + 1) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += [sign * middle for middle in middles for sign in (1, -1)]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@functools.cache
def _boundaries(device: torch.device) -> Tensor:
    values = dynamic_values(device)
    return (values[:-1] + values[1:]) / 2


@dataclass
class DoubleQuantized:
    """codes [blocks] uint8, magnitudes [blocks / 256, rounded up] float32, mean [] float32."""

    codes: Tensor
    magnitudes: Tensor
    mean: Tensor

    def to(self, device: torch.device | str) -> DoubleQuantized:
        """The same on another device."""
        return DoubleQuantized(self.codes.to(device), self.magnitudes.to(device), self.mean.to(device))

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.codes.nbytes + self.magnitudes.nbytes + self.mean.nbytes


def double_quantize(absmax: Tensor, *, on_grid: bool = False) -> DoubleQuantized:
    """absmax [blocks] float32, centred and in 8 bits.

    Codes are those of the nearest values, as bitsandbytes finds them on a GPU. Its CPU code first moves a number to the
    nearest of 65,536 evenly spaced points; `on_grid` does the same. Raises UsageError for another dtype, and for NaN or
    infinity.
    """
    if absmax.dtype != torch.float32 or absmax.dim() != 1:
        raise UsageError(
            f"absmax is {tuple(absmax.shape)} {str(absmax.dtype)[6:]}: expected one float32 number a block."
        )
    if not torch.isfinite(absmax).all():
        raise UsageError("absmax holds NaN or infinity: so did the weights, which cannot be quantized; load them anew.")
    mean = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    rest = absmax - mean
    blocks = torch.nn.functional.pad(rest, (0, -rest.numel() % BLOCK)).view(-1, BLOCK)
    magnitudes = blocks.abs().amax(1) if rest.numel() else rest
    scaled = (blocks * (1 / magnitudes)[:, None]).clamp(-1, 1).nan_to_num(0.0)  # 0 inf in a block of zeros
    if on_grid:
        scaled = torch.floor((scaled + 1) * GRID + 0.5) / GRID - 1
        scaled = torch.where(magnitudes[:, None] == 0, -1.0, scaled)  # a block of zeros has code 0 there
    codes = torch.bucketize(scaled, _boundaries(absmax.device), out_int32=True).to(torch.uint8)
    return DoubleQuantized(codes.flatten()[: rest.numel()].contiguous(), magnitudes, mean)


def double_dequantize(scales: DoubleQuantized) -> Tensor:
    """absmax [blocks], float32."""
    values = dynamic_values(scales.codes.device)[scales.codes.int()]
    return values * scales.magnitudes.repeat_interleave(BLOCK)[: values.numel()] + scales.mean
