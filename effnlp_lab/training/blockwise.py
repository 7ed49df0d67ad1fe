"""Blockwise 8-bit numbers with a dynamic code: how optimizer state fits in one byte a number.

Dettmers et al. 2022, "8-bit optimizers via block-wise quantization", and Dettmers 2016 for the code. A block of 256
numbers is divided by its largest magnitude, and each is replaced by the nearest of 256 values. Those are not evenly
spaced: decade d below 1 (10^-d to 10^-(d-1), seven of them) is cut in 64, 32, ..., 1 equal cells (twice as many without
a sign), so that small numbers keep their order of magnitude and large ones two digits. An outlier spoils its own block
alone.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from effnlp_lab.errors import UsageError

BLOCK = 256
DECADES = 7
SMALLEST = 1e-37
"""Blocks whose largest magnitude is below this come back as zeros or less: its reciprocal would not be finite."""


@functools.cache
def dynamic_map(signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """The 256 values of the code, ascending, float32, in [-1, 1] (signed) or [0, 1]: bitsandbytes' own numbers."""
    values = [0.0, 1.0]
    for decade in range(DECADES):
        edges = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1, dtype=torch.float32)
        middles = (10 ** (decade - DECADES + 1) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += middles
        if signed:
            values += [-middle for middle in middles]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@functools.cache
def _boundaries(signed: bool, device: torch.device) -> Tensor:
    """Halfway between neighbouring values: 255 numbers."""
    values = dynamic_map(signed, device)
    return (values[:-1] + values[1:]) / 2


def block_count(numel: int) -> int:
    """How many blocks a tensor of so many numbers has; the last may be short."""
    return -(-numel // BLOCK)


def quantize_blockwise(x: Tensor, signed: bool = True) -> tuple[Tensor, Tensor]:
    """Codes (uint8, the shape of x) and the largest magnitude of each block of 256 in memory order (float32).

    Raises UsageError for a tensor that is not floating.
    """
    if not x.is_floating_point():
        raise UsageError(f"Only floating numbers are quantized; this tensor is {str(x.dtype)[6:]}.")
    blocks = torch.nn.functional.pad(x.float().flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1) if x.numel() else blocks.new_zeros(0)
    scaled = blocks / absmax.clamp(min=SMALLEST)[:, None]
    codes = torch.bucketize(scaled, _boundaries(signed, x.device), out_int32=True).to(torch.uint8)
    return codes.flatten()[: x.numel()].view(x.shape), absmax


def dequantize_blockwise(codes: Tensor, absmax: Tensor, signed: bool = True) -> Tensor:
    """Float32 numbers of the shape of the codes."""
    if codes.dtype != torch.uint8:
        raise UsageError(f"Codes are uint8, not {str(codes.dtype)[6:]}.")
    if absmax.numel() != block_count(codes.numel()):
        raise UsageError(f"{codes.numel()} codes have {block_count(codes.numel())} blocks, not {absmax.numel()}.")
    values = dynamic_map(signed, codes.device)[codes.flatten().int()]
    scales = absmax.repeat_interleave(BLOCK)[: codes.numel()]
    return (values * scales).view(codes.shape)
