"""The Hessian of a layer's squared error, from calibration inputs, and the factor of its inverse that GPTQ walks along.

For one output row w the error on inputs X is ||(w - q) X||^2, whose second derivative is H = 2 X X': the same for every
row (Frantar et al. 2022, section 3). Any constant factor leaves the codes as they are, so the mean is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from effnlp_lab.errors import UsageError


class Hessian:
    """2/n times the sum of x x' over n inputs x of `columns` numbers, in float32 (float64 for float64 inputs)."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.count = 0
        self.total: Tensor | None = None

    def add(self, inputs: Tensor) -> None:
        """inputs: [..., columns], as the layer receives them. Raises UsageError for another width."""
        if inputs.shape[-1] != self.columns:
            raise UsageError(f"Inputs of {inputs.shape[-1]} numbers for a Hessian of {self.columns} columns.")
        x = inputs.detach().reshape(-1, self.columns)
        if self.total is None:
            dtype = torch.promote_types(x.dtype, torch.float32)
            self.total = torch.zeros(self.columns, self.columns, dtype=dtype, device=x.device)
        self.count += len(x)
        if x.device.type == "cuda" and x.element_size() == 2:  # 16-bit products are exact in float32's sums
            self.total += torch.mm(x.T, x, out_dtype=torch.float32)
        else:
            with exact_matmul():
                x = x.to(self.total.dtype)
                self.total.addmm_(x.T, x)

    @property
    def matrix(self) -> Tensor:
        """H, [columns, columns]. Raises UsageError before the first input."""
        if self.total is None or not self.count:
            raise UsageError("The Hessian has seen no inputs: run calibration text through the layer first.")
        return self.total * (2 / self.count)


def inverse_factor(hessian: Tensor, damping: float = 0.01, name: str = "the weight") -> Tensor:
    """The upper triangular U, in float64, with U'U the inverse of H + damping * mean(diag H) * I.

    Row j of U, divided by U[j, j], is the row of the inverse of what is left of H when columns before j are fixed: all
    the inverses that the column loop needs, at once (section 3.4, step 3). With H turned around in both directions and
    its Cholesky factor turned back, H = A A' for an upper A, and U is A's inverse: one factorization in place of three
    steps. An input that was always zero gets a one on the diagonal: its column is rounded and corrects no other.
    Raises UsageError for a Hessian that is not finite, or not positive definite with this damping.
    """
    if not 0 <= damping < float("inf"):
        raise UsageError(f"damping is {damping}: expected a number of at least 0, such as 0.01.")
    damped = hessian.double()
    damped = damped.clone() if damped is hessian else damped
    diagonal = damped.diagonal()
    if not torch.isfinite(diagonal).all() or not torch.isfinite(damped.sum()):
        raise UsageError(f"The Hessian of {name} is not finite: the calibration inputs hold NaN or infinity.")
    mean = diagonal.mean().clone()
    diagonal[diagonal == 0] = 1
    diagonal += damping * mean
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    del damped
    if failed.item():
        raise UsageError(
            f"The Hessian of {name} is not positive definite with damping {damping}: raise the damping (0.01 is usual) "
            "or give more calibration text."
        )
    upper = lower.flip(0, 1)
    eye = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, eye, upper=True)


@contextmanager
def exact_matmul() -> Iterator[None]:
    """Products of float32 in float32, whatever the program allows elsewhere (TF32 keeps three decimal digits)."""
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
