"""Products of 16-bit inputs with weights of 2, 3, 4 and 8 bits: which way for how many rows.

Few rows are bound by reading the weights: one kernel reads the codes and multiplies (kernel_product.py). Many rows are
bound by arithmetic: there the codes are first turned into 16-bit weights, once for all rows, and cuBLAS multiplies.
Without a GPU, or for groups that 16 does not divide, plain PyTorch does both.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from effnlp_lab.errors import UsageError
from effnlp_lab.quantization.gptq import triton_compiles
from effnlp_lab.quantization.packing import PackedWeight

FEW_ROWS = 128
"""Rows up to which the codes are read by the product itself."""


def quantized_matmul(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x [..., columns] @ weight.T + bias in x's dtype [..., rows], sums in float32. No gradient goes to x.

    Raises UsageError for inputs of another width.
    """
    if x.shape[-1] != weight.columns:
        raise UsageError(f"Inputs of {x.shape[-1]} numbers for a weight of {weight.columns} columns.")
    if _has_kernel(x, weight):
        if x.numel() // weight.columns <= FEW_ROWS and not (torch.is_grad_enabled() and x.requires_grad):
            from effnlp_lab.quantization.launch_product import product

            return product(x.reshape(-1, weight.columns), weight, bias).view(*x.shape[:-1], weight.rows)
    return F.linear(x, dequantize_packed(weight, x.dtype), bias)


def dequantize_packed(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weights [rows, columns] that the codes stand for."""
    if weight.scale.device.type == "cuda" and triton_compiles() and dtype != torch.float64 and weight.group_size >= 16:
        from effnlp_lab.quantization.launch_product import dequantize

        return dequantize(weight, dtype)
    return weight.unpack().dequantize(dtype)


def _has_kernel(x: Tensor, weight: PackedWeight) -> bool:
    if x.device.type != "cuda" or x.dtype == torch.float64 or weight.group_size % 16 or not triton_compiles():
        return False
    return x.dtype != torch.bfloat16 or torch.cuda.get_device_capability(x.device) >= (8, 0)
