"""A linear layer whose weight stays in NF4: the frozen base of QLoRA (Dettmers et al. 2023, eq. 5).

Few rows, as in generation, are multiplied by a kernel that reads the codes themselves. Many rows, as in training, are
multiplied by a weight that is dequantized for that one product and thrown away; the backward pass dequantizes it again.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effnlp_lab.adapters.configurations import Targets
from effnlp_lab.adapters.double_quantization import DoubleQuantized
from effnlp_lab.adapters.injection import find_modules, own_modules, replace_module
from effnlp_lab.adapters.nf4 import BLOCK, NF4Weight, dequantize_plain, nf4_levels, quantize_nf4, unpack
from effnlp_lab.errors import UsageError

FEW_ROWS = 64
"""Up to so many rows the codes are multiplied as they are."""


class NF4Linear(nn.Module):
    """nn.Linear with its weight in NF4 and its bias as it was. Nothing but adapters on it can be trained.

    Made by `NF4Linear.from_linear` or `quantize_model`. Scales stay float32 when the model is cast.
    """

    def __init__(self, weight: NF4Weight, bias: nn.Parameter | None) -> None:
        super().__init__()
        if len(weight.shape) != 2:
            raise UsageError(f"A linear layer's weight has two dimensions, not {len(weight.shape)}.")
        self.out_features, self.in_features = weight.shape
        self.block, self.double_quantized = weight.block, isinstance(weight.scales, DoubleQuantized)
        self.register_buffer("codes", weight.codes)
        if self.double_quantized:
            self.register_buffer("absmax_codes", weight.scales.codes)
            self.register_buffer("absmax_magnitudes", weight.scales.magnitudes)
            self.register_buffer("absmax_mean", weight.scales.mean)
        else:
            self.register_buffer("absmax", weight.scales)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options) -> NF4Linear:
        """Quantize a layer's weight; options as of `quantize_nf4`, which says what it refuses."""
        return cls(quantize_nf4(linear.weight, **options), linear.bias)

    def nf4(self) -> NF4Weight:
        """The weight: its buffers, not a copy."""
        if self.double_quantized:
            scales = DoubleQuantized(self.absmax_codes, self.absmax_magnitudes, self.absmax_mean)
        else:
            scales = self.absmax
        return NF4Weight(self.codes, scales, torch.Size((self.out_features, self.in_features)), self.block)

    def forward(self, x: Tensor) -> Tensor:
        return nf4_linear(x, self.nf4(), self.bias)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, block={self.block}, double_quantized={self.double_quantized}"

    def _apply(self, fn, recurse: bool = True):
        before = {name: buffer for name, buffer in self._buffers.items() if buffer.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, buffer in before.items():  # a cast of the model is not for the scales
            if self._buffers[name].dtype != torch.float32:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self


def nf4_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias, [..., out]; x [..., in], float32, bfloat16 or float16. The gradient goes to x and to the bias."""
    dtype = compute_dtype(x)
    if x.shape[-1] != weight.shape[1]:
        raise UsageError(f"x has {x.shape[-1]} numbers a row and the weight takes {weight.shape[1]}.")
    return _NF4Linear.apply(x.to(dtype), None if bias is None else bias.to(dtype), weight)


class _NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, weight):
        ctx.weight = weight
        rows = x.reshape(-1, x.shape[-1])
        return forward_product(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        rows = gradient.reshape(-1, gradient.shape[-1])
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = backward_product(rows, ctx.weight).view(*gradient.shape[:-1], ctx.weight.shape[1])
        if ctx.needs_input_grad[1]:
            grad_bias = rows.sum(0)
        return grad_x, grad_bias, None


def forward_product(rows: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None) -> Tensor:
    """rows Wᵀ + bias, [rows, out], a new tensor, for a dense weight or one in NF4."""
    if isinstance(weight, Tensor):
        return F.linear(rows, weight, bias)
    if 0 < rows.shape[0] <= FEW_ROWS and has_kernels(rows.device, rows.dtype):
        from effnlp_lab.adapters import launch_nf4

        if launch_nf4.takes(rows, weight):
            return launch_nf4.product(rows, weight, bias)
    return F.linear(rows, dequantize_nf4(weight, rows.dtype), bias)


def product_plain(rows: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """The product kernels as PyTorch operations: levels in the rows' dtype, a block's sum times its scale in float32.

    For weights whose rows are whole blocks; any number of rows.
    """
    out, inner = weight.shape
    levels = nf4_levels(rows.device).to(rows.dtype)[unpack(weight.codes).int()].view(out, inner // weight.block, -1)
    sums = torch.einsum("mbk,nbk->mnb", rows.float().view(len(rows), -1, weight.block), levels.float())
    total = (sums * weight.absmax().view(out, -1)).sum(-1)
    return (total if bias is None else total + bias.float()).to(rows.dtype)


def backward_product(gradient: Tensor, weight: Tensor | NF4Weight) -> Tensor:
    """gradient W, [rows, in], a new tensor. A weight in NF4 is dequantized anew."""
    return gradient @ (weight if isinstance(weight, Tensor) else dequantize_nf4(weight, gradient.dtype))


def dequantize_nf4(weight: NF4Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Levels times scales, in the tensor's shape: multiplied in float32, then rounded to `dtype`.

    On a CUDA device with Triton by a kernel with the same numbers bit for bit.
    """
    if has_kernels(weight.device, dtype):
        from effnlp_lab.adapters.launch_nf4 import dequantize

        return dequantize(weight, dtype)
    return dequantize_plain(weight, dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of products of x: autocast's where it is on, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Compiled Triton on a card that has the dtype."""
    if device.type != "cuda" or dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    return _card_has(device.index or 0, dtype)


@functools.cache
def _card_has(index: int, dtype: torch.dtype) -> bool:
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    capability = torch.cuda.get_device_capability(index)
    enough = (8, 0) if dtype == torch.bfloat16 else (7, 5)
    return capability >= enough and not interpreted and importlib.util.find_spec("triton") is not None


def quantize_model(
    model: nn.Module, targets: Targets | None = None, *, block: int = BLOCK, bits: int = 4, double: bool = True
) -> list[str]:
    """Put an NF4Linear where each linear layer was, and freeze the model. Returns the names of the layers.

    targets: as for adapters; None for every linear layer but the one that gives the logits. All layers are quantized
    before the first is replaced: after an error the model is what it was. Raises UsageError as `quantize_nf4` does, and
    for names that match nothing; add adapters afterwards.
    """
    if any(getattr(type(module), "adapters_inside", None) for module in model.modules()):
        raise UsageError("This model has adapters already: quantize it first, then add them.")
    if targets is None:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        layers = own_modules(model)
        found = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear) and layer is not head}
        if not found:
            raise UsageError("This model has no dense linear layer left to quantize.")
    else:
        found = find_modules(model, targets, lambda module: isinstance(module, nn.Linear), "dense linear layer")
    made = {}
    for name, layer in found.items():
        try:
            made[name] = NF4Linear.from_linear(layer, block=block, bits=bits, double=double)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None
    for name, layer in made.items():
        replace_module(model, name, layer.train(model.training))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return list(made)
