"""Codes of few bits without gaps: two codes of 4 bits in a byte, eight of 3 bits in three bytes.

`pack_bits` writes a plain stream, to explain and to exchange. `PackedWeight` is what the product's kernels read: codes
in int32 words, ordered so that one shift of a tile of words gives a tile of weights whose columns lie in a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from effnlp_lab.errors import UsageError
from effnlp_lab.quantization.checks import check_bits
from effnlp_lab.quantization.grid import QuantizedWeight

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""The bits of a code that each plane of words holds, lowest first: three bits are a plane of two and one of one."""


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., n] as a dense stream of bytes [..., ceil(n * bits / 8)]; the first code in the lowest bits.

    With 4 bits the even columns are the low halves. With 3 bits the eight codes of three bytes follow without a gap,
    so that the third and the sixth lie across a byte's edge. Raises UsageError for a code that does not fit.
    """
    check_bits(bits)
    if codes.numel() and (codes.dtype != torch.uint8 or int(codes.max()) >> bits):
        raise UsageError(f"pack_bits takes uint8 codes below {1 << bits} for {bits} bits: these do not fit.")
    single = (codes[..., None] >> torch.arange(bits, device=codes.device, dtype=torch.uint8)) & 1
    stream = single.flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (stream << torch.arange(8, device=codes.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The uint8 codes [..., count] of `pack_bits`."""
    check_bits(bits)
    single = (packed[..., None] >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1
    stream = single.flatten(-2)[..., : count * bits].unflatten(-1, (count, bits))
    return (stream << torch.arange(bits, device=packed.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


@dataclass
class PackedWeight:
    """A quantized weight in the kernels' order.

    planes: int32 [blocks, rows, run] each (see PLANES). A plane of p bits has 32/p codes in a word; a block covers
    32/p * run columns, and code i of word j is column block * (32/p * run) + i * run + j. So a tile of words, shifted
    by i * p, is a tile of codes of `run` columns in a row. scale, zero: [groups, rows]. Columns beyond `columns` are
    padding with code 0, which a product multiplies by zero.
    """

    planes: tuple[Tensor, ...]
    scale: Tensor
    zero: Tensor
    bits: int
    group_size: int
    columns: int
    run: int = field(init=False)

    def __post_init__(self) -> None:
        self.run = self.planes[0].shape[2]

    @property
    def rows(self) -> int:
        return self.scale.shape[1]

    def unpack(self) -> QuantizedWeight:
        """The codes again, [rows, columns]."""
        codes, shift = 0, 0
        for plane, bits in zip(self.planes, PLANES[self.bits], strict=True):
            codes = codes | (_codes_of(plane, bits, self.columns) << shift)
            shift += bits
        return QuantizedWeight(codes.to(torch.uint8), self.scale.T, self.zero.T, self.bits, self.group_size)

    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.planes, self.scale, self.zero))


def pack(weight: QuantizedWeight) -> PackedWeight:
    """The codes in the order that the kernels read."""
    run = run_for(weight.group_size)
    planes, shift = [], 0
    block = max(32 // bits for bits in PLANES[weight.bits]) * run
    codes = torch.nn.functional.pad(weight.codes, (0, -weight.codes.shape[1] % block))
    for bits in PLANES[weight.bits]:
        planes.append(_words_of((codes >> shift) & ((1 << bits) - 1), bits, run))
        shift += bits
    scale, zero = weight.scale.T.contiguous(), weight.zero.T.contiguous()
    return PackedWeight(tuple(planes), scale, zero, weight.bits, weight.group_size, weight.codes.shape[1])


def run_for(group_size: int) -> int:
    """Columns that are multiplied at once: 32 where a group is made of such, else 16.

    Groups that 16 does not divide are served without the kernels.
    """
    return 32 if group_size % 32 == 0 else 16


def _words_of(codes: Tensor, bits: int, run: int) -> Tensor:
    """uint8 codes [rows, columns] -> int32 [blocks, rows, run]."""
    rows, count = codes.shape[0], 32 // bits
    parts = codes.to(torch.int64).view(rows, -1, count, run)
    shifts = torch.arange(0, 32, bits, device=codes.device)[:, None]
    words = (parts << shifts).sum(2)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return words.to(torch.int32).transpose(0, 1).contiguous()


def _codes_of(plane: Tensor, bits: int, columns: int) -> Tensor:
    """int32 [blocks, rows, run] -> int32 codes [rows, columns]."""
    shifts = torch.arange(0, 32, bits, device=plane.device, dtype=torch.int32)[:, None]
    codes = (plane.transpose(0, 1)[:, :, None, :] >> shifts) & ((1 << bits) - 1)
    return codes.reshape(plane.shape[1], -1)[:, :columns]
