"""A linear layer whose weights are codes: what takes a torch.nn.Linear's place in a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effnlp_lab.quantization.grid import QuantizedWeight
from effnlp_lab.quantization.packing import PLANES, PackedWeight, pack, run_for
from effnlp_lab.quantization.product import quantized_matmul


class QuantizedLinear(nn.Module):
    """y = x W' + b, where W [out_features, in_features] is held as codes of 2, 3, 4 or 8 bits.

    Its buffers are those of a PackedWeight, and are saved with the model: plane0 (and plane1 with 3 bits), scale, zero,
    and the bias where there is one. The weights are not trained; gradients flow to x.
    """

    def __init__(
        self, in_features: int, out_features: int, bits: int, group_size: int, *, bias: bool = False,
        dtype: torch.dtype = torch.float32, scale_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features, self.bits, self.group_size = in_features, out_features, bits, group_size
        run, groups = run_for(group_size), in_features // group_size
        widest = max(32 // plane for plane in PLANES[bits]) * run
        padded = -(-in_features // widest) * widest
        for index, plane in enumerate(PLANES[bits]):
            blocks = padded // (32 // plane * run)
            words = torch.empty(blocks, out_features, run, dtype=torch.int32, device=device)
            self.register_buffer(f"plane{index}", words)
        self.register_buffer("scale", torch.empty(groups, out_features, dtype=scale_dtype, device=device))
        self.register_buffer("zero", torch.empty(groups, out_features, dtype=torch.uint8, device=device))
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def of(cls, weight: QuantizedWeight, bias: Tensor | None = None) -> QuantizedLinear:
        """A layer with these codes, where they are."""
        packed = pack(weight)
        layer = cls(
            packed.columns, packed.rows, weight.bits, weight.group_size, bias=bias is not None,
            dtype=torch.float32 if bias is None else bias.dtype, scale_dtype=packed.scale.dtype, device="meta",
        )  # fmt: skip
        for index, plane in enumerate(packed.planes):
            setattr(layer, f"plane{index}", plane)
        layer.scale, layer.zero = packed.scale, packed.zero
        layer.bias = None if bias is None else bias.detach().clone()
        return layer

    @property
    def weight(self) -> PackedWeight:
        """The codes, as the products read them."""
        planes = tuple(getattr(self, f"plane{index}") for index in range(len(PLANES[self.bits])))
        return PackedWeight(planes, self.scale, self.zero, self.bits, self.group_size, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return quantized_matmul(x, self.weight, self.bias)

    def _apply(self, function: Any, recurse: bool = True) -> QuantizedLinear:
        """`model.half()` and its like turn floats into another type: not the scale, to which the codes were fitted."""
        scale_dtype = self.scale.dtype
        before = self.scale
        super()._apply(function, recurse)
        if self.scale.dtype != scale_dtype:
            self.scale = before.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, bias={self.bias is not None}"
        )
