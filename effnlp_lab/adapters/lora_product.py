"""A frozen linear layer and its low-rank update as one step of autograd, for a dense weight and for one in NF4.

    forward     y = x Wᵀ + bias + h Bᵀ          h = s x Aᵀ, [tokens, r]
    backward    dx = g W + u A                   u = s g B, [tokens, r]
                dB = gᵀ h,  dA = uᵀ x

Everything of the update but two products is r numbers a token wide: the scale is applied there, and the two wide terms
are added by the products themselves (`addmm_`), so that no separate pass reads or writes an activation. Saved are x and
h. The weight is not: it is used again where it lies, and one in NF4 is dequantized again (Dettmers et al. 2023, section
3).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effnlp_lab.adapters.nf4_layer import NF4Linear, backward_product, compute_dtype, forward_product


def lora_linear(x: Tensor, base: nn.Module, a: Tensor, b: Tensor, scaling: float, dropout: float = 0.0) -> Tensor:
    """base(x) + scaling * dropout(x) Aᵀ Bᵀ, [..., out_features].

    x [..., in_features]; base an nn.Linear or NF4Linear; a [r, in_features]; b [out_features, r]. Under autocast, and
    where A and B are wider than x, products are in the narrower dtype; gradients of A and B come back in their own.
    """
    dtype = compute_dtype(x)
    if dropout > 0 or _trained(base):  # the update's input is another than the base's, or the base takes gradients
        low = F.linear(F.dropout(x.to(dtype), dropout), a.to(dtype)) * scaling
        return base(x) + F.linear(low, b.to(dtype))
    bias = None if base.bias is None else base.bias.to(dtype)
    weight = base.nf4() if isinstance(base, NF4Linear) else base.weight.to(dtype)
    return _LoRALinear.apply(x.to(dtype), a.to(dtype), b.to(dtype), bias, weight, scaling)


def _trained(base: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in base.parameters())


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a, b, bias, weight, scaling):
        rows = x.reshape(-1, x.shape[-1])
        low = (rows @ a.T).mul_(scaling)
        out = forward_product(rows, weight, bias).addmm_(low, b.T)
        ctx.save_for_backward(rows, low, a, b)
        ctx.weight, ctx.scaling, ctx.shape = weight, scaling, x.shape
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        rows, low, a, b = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        low_gradient = (gradient @ b).mul_(ctx.scaling)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[2]:
            grad_b = gradient.T @ low
        if ctx.needs_input_grad[1]:
            grad_a = low_gradient.T @ rows
        if ctx.needs_input_grad[0]:
            grad_x = backward_product(gradient, ctx.weight).addmm_(low_gradient, a).view(ctx.shape)
        return grad_x, grad_a, grad_b, None, None, None
