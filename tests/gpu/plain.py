"""Plain PyTorch in the order in which kernels compute: the other half of what the tolerance rule calls usual."""

from __future__ import annotations

from torch import Tensor


def in_turn(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, one product added after the other, as a kernel's program adds them (a library splits long sums)."""
    out = a.new_zeros(*a.shape[:-1], b.shape[-1])
    for column, row in zip(a.unbind(-1), b.unbind(-2), strict=True):
        out.addcmul_(column[..., None], row[..., None, :])
    return out
