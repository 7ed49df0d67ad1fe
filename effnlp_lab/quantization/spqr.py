"""SpQR (Dettmers et al. 2023): low bits in small groups, and the 1% of sensitive weights beside them in 16 bits.

A weight is an outlier where taking it out of its group helps the layer most: its own error goes, and the grid of the
others gets finer. Outliers are found first; GPTQ then codes the rest, and the outliers go into a sparse matrix. The
paper also codes the scales themselves (its second level); here they are 16-bit numbers.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from effnlp_lab.errors import UsageError
from effnlp_lab.quantization.checks import check_bits, check_group_size, check_hessian, check_weight
from effnlp_lab.quantization.gptq import gptq_keeping
from effnlp_lab.quantization.grid import QuantizedWeight, encode, find_grid
from effnlp_lab.quantization.hessian import inverse_factor
from effnlp_lab.quantization.packing import PackedWeight, pack
from effnlp_lab.quantization.product import quantized_matmul


@dataclass
class SpqrWeight:
    """Codes, in which an outlier is coded as zero, and the outliers [rows, columns] in compressed rows (CSR)."""

    packed: PackedWeight
    outliers: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        dense = self.packed.unpack().dequantize(torch.float32)
        return (dense + self.outliers.to_dense().float()).to(dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., columns] @ W' in x's dtype [..., rows]: the codes' product and the sparse one."""
        sparse = self.outliers.float() @ x.reshape(-1, x.shape[-1]).T.float()
        dense = quantized_matmul(x, self.packed)
        return (dense.float() + sparse.T.reshape(dense.shape)).to(x.dtype)

    def bits_per_weight(self) -> float:
        """With scales, zero points, and 32 bits an outlier: a 16-bit value and a 16-bit column, as the paper counts."""
        rows, columns = self.outliers.shape
        share = self.outliers.values().numel() / (rows * columns)
        return self.packed.unpack().bits_per_weight() + 32 * share


def spqr_quantize(
    weight: Tensor, hessian: Tensor, bits: int = 3, group_size: int | None = 16, *, outliers: float = 0.01,
    damping: float = 0.01, scale_dtype: torch.dtype = torch.float16, outlier_dtype: torch.dtype = torch.float16,
    fused: bool | None = None, name: str = "the weight",
) -> SpqrWeight:  # fmt: skip
    """Codes by GPTQ for all but the share `outliers` of the weights [rows, columns] that gain most by staying out.

    Raises UsageError as `gptq_quantize` does, and for a share that is not in [0, 1).
    """
    check_bits(bits)
    columns = check_weight(weight, name).shape[1]
    group_size = check_group_size(group_size, columns, name)
    check_hessian(hessian, columns, name)
    if not 0 <= outliers < 1:
        raise UsageError(f"A share of {outliers} of the weights as outliers: expected at least 0 and below 1.")
    factor = inverse_factor(hessian.to(weight.device), damping, name)
    keep = most_sensitive(outlier_gain(weight, factor.diagonal(), bits, group_size), outliers)
    quantized, values = gptq_keeping(
        weight, hessian, keep, bits, group_size, damping=damping, scale_dtype=scale_dtype, fused=fused, factor=factor,
        name=name,
    )  # fmt: skip
    zero = quantized.zero.repeat_interleave(group_size, dim=1)
    codes = torch.where(keep, zero, quantized.codes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR")  # torch says once that its CSR is new
        sparse = torch.where(keep, values, 0).to(outlier_dtype).to_sparse_csr()
    return SpqrWeight(pack(QuantizedWeight(codes, quantized.scale, quantized.zero, bits, group_size)), sparse)


def outlier_gain(weight: Tensor, factor_diagonal: Tensor, bits: int, group_size: int) -> Tensor:
    """How much less the error of its group is without each weight, [rows, columns] (the paper's section 4.1).

    The error of a weight is (w - q)^2 / U_jj^2, as in GPTQ. For each place in the group a grid is found without it.
    """
    rows, columns = weight.shape
    grouped = weight.detach().float().view(rows, -1, group_size)
    importance = (factor_diagonal.float() ** -2).view(-1, group_size)

    def error(keep: Tensor | None) -> Tensor:
        scale, zero = (part[..., None] for part in find_grid(grouped, bits, keep=keep))
        rounded = scale * (encode(grouped, scale, zero, bits) - zero)
        each = (grouped - rounded) ** 2 * importance
        return each.sum(-1) if keep is None else each.masked_fill(keep, 0).sum(-1)

    whole = error(None)
    place = torch.arange(group_size, device=weight.device)
    gains = [whole - error((place == index).expand_as(grouped)) for index in range(group_size)]
    return torch.stack(gains, dim=-1).view(rows, columns)


def most_sensitive(gain: Tensor, share: float) -> Tensor:
    """bool like gain: the share of it that is largest, of what is positive."""
    count = int(share * gain.numel())
    keep = torch.zeros(gain.numel(), dtype=torch.bool, device=gain.device)
    keep[gain.flatten().topk(count).indices] = True
    return keep.view_as(gain) & (gain > 0)
