"""NF4: sixteen levels at the quantiles of a normal distribution, a scale for each block of 64 weights.

Dettmers et al. 2023, "QLoRA: Efficient finetuning of quantized LLMs", section 3 and appendix E. Trained weights are
about normal: levels with equal probability between them waste none. Quantiles that are symmetric about zero have no
zero among them, so the positive side is cut in eight and the negative in seven, and both keep an exact zero.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from effnlp_lab.adapters.double_quantization import DoubleQuantized, double_dequantize, double_quantize
from effnlp_lab.errors import UsageError

BLOCK = 64
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
OFFSET = 0.9677083
"""The outermost probability: the mean of 1 - 1/32 and 1 - 1/30, the middles of the outermost of 16 and of 15 cells."""
SMALLEST = 1e-38
"""What an absmax of zero is taken for when it divides."""


@functools.cache
def nf4_levels(device: torch.device | str = "cpu") -> Tensor:
    """The sixteen levels, ascending, float32, from -1 to 1 with an exact 0 at index 7: equal to bitsandbytes' table."""
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in torch.linspace(OFFSET, 0.5, 9)[:-1].tolist()]
    negative = [-quantile(p) for p in torch.linspace(OFFSET, 0.5, 8)[:-1].tolist()]
    levels = torch.tensor(sorted([*negative, 0.0, *positive]), dtype=torch.float32)
    return (levels / levels.max()).to(device)


@functools.cache
def _boundaries(device: torch.device) -> Tensor:
    levels = nf4_levels(device)
    return (levels[:-1] + levels[1:]) / 2


@dataclass
class NF4Weight:
    """A tensor in NF4.

    codes [numbers / 2, rounded up] uint8, the first of two in the high half; scales: absmax [blocks] float32, or the
    same in 8 bits; shape of the tensor; block: numbers that share a scale.
    """

    codes: Tensor
    scales: Tensor | DoubleQuantized
    shape: torch.Size
    block: int = BLOCK

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.codes.nbytes + self.scales.nbytes

    def absmax(self) -> Tensor:
        """[blocks], float32."""
        return double_dequantize(self.scales) if isinstance(self.scales, DoubleQuantized) else self.scales


def block_count(numel: int, block: int = BLOCK) -> int:
    """How many blocks so many numbers have; the last may be short."""
    return -(-numel // block)


def quantize_nf4(
    x: Tensor, *, block: int = BLOCK, bits: int = 4, double: bool = True, on_grid: bool = False
) -> NF4Weight:
    """The nearest level to each number, divided by the largest magnitude of its block in memory order.

    x: float32, float16 or bfloat16, any shape. `double`: scales in 8 bits; `on_grid`: see `double_quantize`. The same
    codes and scales as bitsandbytes', which divides a short last block and multiplies whole ones by the reciprocal.
    Raises UsageError for other bits, an unknown block size, another dtype, an empty tensor, and NaN or infinity.
    """
    if bits != 4:
        raise UsageError(
            f"NF4 has 4 bits, not {bits}: it is made of sixteen normal quantiles; use integers for other widths."
        )
    if block not in BLOCKS:
        raise UsageError(f"A block of {block} is not offered: choose one of {', '.join(map(str, BLOCKS))}.")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UsageError(f"{str(x.dtype)[6:]} numbers are not quantized: give float32, float16 or bfloat16.")
    if x.numel() == 0:
        raise UsageError(f"A tensor of shape {tuple(x.shape)} has no numbers to quantize.")
    if not torch.isfinite(x).all():
        raise UsageError("The weights hold NaN or infinity, for which there is no level: load them anew.")
    flat = x.detach().float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    absmax = blocks.abs().amax(1)
    scaled = blocks * (1 / absmax.clamp(min=SMALLEST))[:, None]
    if flat.numel() % block:
        absmax[-1].clamp_(min=SMALLEST)
        scaled[-1] = blocks[-1] / absmax[-1]
    codes = torch.bucketize(scaled.clamp_(-1, 1), _boundaries(x.device), out_int32=True).to(torch.uint8).flatten()
    packed = pack(codes[: flat.numel()])
    return NF4Weight(packed, double_quantize(absmax, on_grid=on_grid) if double else absmax, x.shape, block)


def pack(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the high half; an odd last one stands beside the code of zero."""
    codes = torch.nn.functional.pad(codes, (0, codes.numel() % 2), value=7)
    return (codes[::2] << 4) | codes[1::2]


def unpack(packed: Tensor) -> Tensor:
    """The codes again, twice as many as bytes."""
    return torch.stack([packed >> 4, packed & 15], dim=-1).flatten()


def dequantize_plain(weight: NF4Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The definition, as PyTorch operations: what the kernel is compared with."""
    numel = weight.shape.numel()
    values = nf4_levels(weight.device)[unpack(weight.codes)[:numel].int()]
    values = torch.nn.functional.pad(values, (0, -numel % weight.block)).view(-1, weight.block)
    return (values * weight.absmax()[:, None]).flatten()[:numel].to(dtype).view(weight.shape)
