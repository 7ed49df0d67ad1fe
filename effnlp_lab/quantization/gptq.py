"""GPTQ (Frantar et al. 2022, algorithm 1): round a column, and let the columns after it make up for the error.

Columns go in blocks of 128. Within a block each column's error is spread over the block's later columns at once; the
columns behind the block are updated when it is done, by one matrix product. Rows do not see each other: on a GPU a
program keeps a few rows of a block in registers while it goes through all of its columns (kernel_gptq.py).
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from effnlp_lab.errors import UsageError
from effnlp_lab.quantization.checks import check_bits, check_group_size, check_hessian, check_weight
from effnlp_lab.quantization.grid import QuantizedWeight, encode, find_grid
from effnlp_lab.quantization.hessian import exact_matmul, inverse_factor

BLOCK = 128


def gptq_quantize(
    weight: Tensor, hessian: Tensor, bits: int = 4, group_size: int | None = 128, *, symmetric: bool = False,
    act_order: bool = False, damping: float = 0.01, block: int = BLOCK, scale_dtype: torch.dtype = torch.float32,
    fused: bool | None = None, factor: Tensor | None = None, name: str = "the weight",
) -> QuantizedWeight:  # fmt: skip
    """Codes for weight [rows, columns] that keep ||(W - Q) X|| small, where hessian [columns, columns] is 2/n X X'.

    A group's grid is found when its first column is reached, from the weights as corrected until then. act_order: the
    columns with the largest diagonal of the Hessian first; groups then keep the grids of the original weights, the
    permutation is undone, and the result has the usual layout. fused: the Triton kernel (None: on CUDA). factor:
    `inverse_factor` of this Hessian where it is at hand (not used with act_order). float64 weights are worked on in
    float64. Raises UsageError for bits, group sizes, weights and Hessians that cannot be used.
    """
    quantized, _ = gptq_keeping(
        weight, hessian, None, bits, group_size, symmetric=symmetric, act_order=act_order, damping=damping,
        block=block, scale_dtype=scale_dtype, fused=fused, factor=factor, name=name,
    )  # fmt: skip
    return quantized


def gptq_keeping(
    weight: Tensor, hessian: Tensor, keep: Tensor | None, bits: int, group_size: int | None, *, symmetric: bool = False,
    act_order: bool = False, damping: float = 0.01, block: int = BLOCK, scale_dtype: torch.dtype = torch.float32,
    fused: bool | None = None, factor: Tensor | None = None, name: str = "the weight",
) -> tuple[QuantizedWeight, Tensor]:  # fmt: skip
    """`gptq_quantize` where some weights are not coded (SpQR). keep: bool like weight, or None.

    A kept weight is corrected for the errors of earlier columns like any other, has no error of its own, and no say in
    its group's grid. Returns the codes and the weights they stand for [rows, columns], with the kept ones among them.
    """
    check_bits(bits)
    columns = check_weight(weight, name).shape[1]
    group_size = check_group_size(group_size, columns, name)
    check_hessian(hessian, columns, name)
    if block < 1:
        raise UsageError(f"A block of {block} columns: expected at least 1, such as {BLOCK}.")
    work = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).clone()
    hessian = hessian.to(work.device)
    order = None
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        hessian, factor = hessian[order][:, order], None
    upper = inverse_factor(hessian, damping, name) if factor is None else factor
    upper = upper.to(work.device, work.dtype).contiguous()
    job = Job(work, upper, bits, group_size, symmetric, scale_dtype, order, keep)
    job.run(block, has_kernel(work) if fused is None else fused)
    scale = job.scale if scale_dtype == torch.float32 else job.scale.to(scale_dtype)
    quantized = QuantizedWeight(job.undo(job.codes), scale, job.zero.to(torch.uint8), bits, group_size)
    return quantized, job.undo(job.work)


def block_for(group_size: int, columns: int, block: int = BLOCK) -> int:
    """Columns of a block, at most `block`, such that every group begins with a block or ends inside it."""
    if group_size == columns:
        return min(block, columns)
    if group_size <= block:
        return block // group_size * group_size
    return max(size for size in range(1, block + 1) if group_size % size == 0)


@dataclass
class Job:
    """One weight on its way. After `run`, work holds the weights that the codes stand for, and what was kept.

    work: [rows, columns], in the order of `order`; upper: the inverse's factor in the same order.
    """

    work: Tensor
    upper: Tensor
    bits: int
    group_size: int
    symmetric: bool
    scale_dtype: torch.dtype
    order: Tensor | None
    keep: Tensor | None

    def __post_init__(self) -> None:
        rows, columns = self.work.shape
        self.groups = torch.arange(columns, device=self.work.device) // self.group_size
        self.scale = self.work.new_ones(rows, columns // self.group_size)
        self.zero = self.work.new_zeros(rows, columns // self.group_size)
        self.codes = torch.zeros(rows, columns, dtype=torch.uint8, device=self.work.device)
        self.fixed = self.order is not None or self.group_size == columns
        if self.fixed:  # every grid is known before the first column
            self._find(0, columns)
        if self.order is not None:
            self.groups = self.groups[self.order]
            self.work = self.work[:, self.order].contiguous()
            self.keep = None if self.keep is None else self.keep[:, self.order]

    def run(self, block: int, fused: bool) -> None:
        """All blocks, each with its update of what lies behind it."""
        columns = self.work.shape[1]
        size = block_for(self.group_size, columns, block)
        with exact_matmul():
            for start in range(0, columns, size):
                end = min(start + size, columns)
                if not self.fixed and self.group_size > size and start % self.group_size == 0:
                    self._find(start, start + self.group_size)
                errors = self._fused(start, end) if fused else self._plain(start, end)
                self.work[:, end:].addmm_(errors, self.upper[start:end, end:], alpha=-1)

    def undo(self, matrix: Tensor) -> Tensor:
        """The columns of [rows, columns] where the weight has them."""
        return matrix if self.order is None else torch.empty_like(matrix).index_copy_(1, self.order, matrix)

    def _find(self, start: int, end: int) -> None:
        """The grids of the groups in columns start to end, from the weights as they are now."""
        grouped = self.work[:, start:end].unflatten(1, (-1, self.group_size))
        keep = None if self.keep is None else self.keep[:, start:end].unflatten(1, (-1, self.group_size))
        which = slice(start // self.group_size, end // self.group_size)
        self.scale[:, which], self.zero[:, which] = find_grid(
            grouped, self.bits, self.symmetric, self.scale_dtype, keep
        )

    def _finds_inside(self, size: int) -> bool:
        return not self.fixed and self.group_size <= size

    def _plain(self, start: int, end: int) -> Tensor:
        """The columns of one block, one after another. Returns errors [rows, end - start] for what lies behind."""
        block, upper = self.work[:, start:end], self.upper[start:end, start:end]
        errors = torch.empty_like(block)
        groups = self.groups[start:end].tolist()
        for j in range(end - start):
            if self._finds_inside(end - start) and (start + j) % self.group_size == 0:
                self._find(start + j, start + j + self.group_size)
            scale, zero = self.scale[:, groups[j]], self.zero[:, groups[j]]
            codes = encode(block[:, j], scale, zero, self.bits)
            self.codes[:, start + j] = codes.to(torch.uint8)
            rounded = scale * (codes - zero)
            if self.keep is not None:
                rounded = torch.where(self.keep[:, start + j], block[:, j], rounded)
            errors[:, j] = (block[:, j] - rounded) / upper[j, j]
            block[:, j] = rounded
            block[:, j + 1 :].addr_(errors[:, j], upper[j, j + 1 :], alpha=-1)
        return errors

    def _fused(self, start: int, end: int) -> Tensor:
        from effnlp_lab.quantization.kernel_gptq import quantize_block

        find = self.group_size if self._finds_inside(end - start) else 0
        return quantize_block(
            self.work, self.upper, self.codes, self.scale, self.zero, self.groups, start, end, find=find,
            bits=self.bits, symmetric=self.symmetric, scale_dtype=self.scale_dtype, keep=self.keep,
        )  # fmt: skip


def has_kernel(weight: Tensor) -> bool:
    """float32 on a CUDA card, with Triton there and not told to interpret."""
    return weight.device.type == "cuda" and weight.dtype == torch.float32 and triton_compiles()


@functools.cache
def triton_compiles() -> bool:
    """Triton is installed, and not told to interpret."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    return not interpreted and importlib.util.find_spec("triton") is not None


def layer_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """The mean squared error of the layer's outputs on the Hessian's inputs: tr((W - Q) H (W - Q)') / 2 / rows."""
    difference = (weight - quantized).double()
    return ((difference @ hessian.double()) * difference).sum().item() / 2 / len(weight)
