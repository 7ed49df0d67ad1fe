"""LLM.int8 (Dettmers et al. 2022): products in int8, but for the few input columns that hold outliers.

From some billions of parameters on, a few hidden dimensions are tens of times larger than the rest, in every token.
One such number takes the whole int8 range of its row. They are 0.1% of the columns: those are multiplied in 16 bits,
the others in int8 with a scale for each row of the inputs and of the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effnlp_lab.errors import UsageError
from effnlp_lab.quantization.affine import int8_matmul
from effnlp_lab.quantization.checks import check_weight

THRESHOLD = 6.0


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [rows, columns] and the largest magnitude of each row, float32 [rows]; x is codes * absmax / 127."""
    x = x.float()
    absmax = x.abs().amax(1)
    scale = torch.where(absmax > 0, 127 / absmax, 0)
    return (x * scale[:, None]).round().to(torch.int8), absmax


def quantize_int8_weight(weight: Tensor, name: str = "the weight") -> tuple[Tensor, Tensor]:
    """`int8_rows` of a weight [rows, columns]. Raises UsageError unless it is a finite matrix."""
    return int8_rows(check_weight(weight, name).detach())


def outlier_columns(x: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """The columns of x [rows, columns] in which some magnitude reaches the threshold, int64 [outliers]."""
    return (x.abs() >= threshold).any(0).nonzero()[:, 0]


def llm_int8_linear(
    x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None = None, *, threshold: float = THRESHOLD,
    weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [..., columns] @ W' + bias in x's dtype, for W in int8 codes [rows, columns] with absmax [rows].

    Columns of x with outliers are multiplied in x's dtype, by those of `weight` where the 16-bit weights are at hand
    (the paper), else by what the codes stand for, which needs no second copy in memory. threshold 0: no decomposition.
    Raises UsageError for inputs of another width and a negative threshold.
    """
    if x.shape[-1] != codes.shape[1]:
        raise UsageError(f"Inputs of {x.shape[-1]} numbers for a weight of {codes.shape[1]} columns.")
    if threshold < 0:
        raise UsageError(f"A threshold of {threshold}: expected a magnitude such as {THRESHOLD}, or 0 for none.")
    rows = x.reshape(-1, x.shape[-1])
    columns = outlier_columns(rows, threshold) if threshold else rows.new_zeros(0, dtype=torch.int64)
    ordinary = rows.masked_fill(rows.abs() >= threshold, 0) if threshold else rows
    ordinary_codes, row_absmax = int8_rows(ordinary)
    ordinary_codes[:, columns] = 0
    total = int8_matmul(ordinary_codes, codes).float() * (row_absmax[:, None] * absmax[None, :] / 127**2)
    out = total.to(x.dtype)
    if len(columns):
        own = codes[:, columns] * (absmax[:, None] / 127) if weight is None else weight[:, columns]
        out += rows[:, columns] @ own.to(x.dtype).T
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], codes.shape[0])
