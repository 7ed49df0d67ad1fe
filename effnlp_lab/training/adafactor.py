"""Adafactor: the second moment of a matrix kept as one number a row and one a column.

Shazeer and Stern 2018, "Adafactor: adaptive learning rates with sublinear memory cost", algorithms 4 and 5. For a
matrix of n by m the state is n + m numbers in place of AdamW's 2 n m. Of all matrices of rank one, R C / sum(R) has the
least divergence from the squared gradients, whose row and column sums are R and C (section 3).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from effnlp_lab.errors import UsageError
from effnlp_lab.training.optimizer_base import ExactOptimizer, write_back


class Adafactor(ExactOptimizer):
    """Algorithm 4 for matrices (the last two dimensions of a tensor), algorithm 5 for vectors; as in transformers.

    lr: None takes relative steps min(1e-2, 1 / sqrt(t)), or with `warmup_init` min(1e-6 t, 1 / sqrt(t)). With
    `scale_parameter` the step is multiplied by max(eps[1], RMS of the parameter). eps: (added to the squared gradient,
    least scale). clip_threshold: largest RMS of an update. decay_rate: beta2 of step t is 1 - t^decay_rate. beta1: None
    keeps no first moment. Raises UsageError for numbers out of range and for integer parameters.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        *,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        warmup_init: bool = False,
    ) -> None:
        if lr is not None and warmup_init:
            raise UsageError("warmup_init belongs to relative steps: give lr=None with it.")
        if beta1 is not None and not 0 <= beta1 < 1:
            raise UsageError(f"beta1 is {beta1}: it must be at least 0 and below 1, or None for no first moment.")
        if decay_rate > 0:
            raise UsageError(f"decay_rate is {decay_rate}: beta2 = 1 - t^decay_rate needs it to be 0 or less.")
        super().__init__(params, {
            "lr": lr, "eps": eps, "clip_threshold": clip_threshold, "decay_rate": decay_rate, "beta1": beta1,
            "weight_decay": weight_decay, "scale_parameter": scale_parameter, "warmup_init": warmup_init,
        })  # fmt: skip

    def _update(self, group: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        for parameter in parameters:
            gradient, weight = parameter.grad.float(), parameter.float()
            state = self.state[parameter] or self._start(parameter, group["beta1"] is not None)
            state["step"] += 1
            rate = self._rate(group, state["step"])
            if group["scale_parameter"]:
                rate = rate * _rms(weight).clamp(min=group["eps"][1])
            beta2 = 1.0 - math.pow(state["step"], group["decay_rate"])
            squares = gradient.square().add_(group["eps"][0])
            if "row" in state:
                update = factored_rsqrt(state["row"], state["column"], squares, beta2).mul_(gradient)
            else:
                update = state["square"].lerp_(squares, 1 - beta2).rsqrt().mul_(gradient)
            update.mul_(rate / clip_divisor(update, group["clip_threshold"]))
            if "momentum" in state:
                update = state["momentum"].lerp_(update, 1 - group["beta1"])
            weight.mul_(1 - group["weight_decay"] * rate).sub_(update)
            write_back([parameter], [weight])

    def _start(self, parameter: Tensor, momentum: bool) -> dict[str, Any]:
        state = self.state[parameter]
        state["step"] = 0
        state |= start_factors(parameter)
        if momentum:
            state["momentum"] = torch.zeros_like(parameter, dtype=torch.float32)
        return state

    @staticmethod
    def _rate(group: dict[str, Any], step: int) -> float:
        if group["lr"] is not None:
            return group["lr"]
        return min(1e-6 * step if group["warmup_init"] else 1e-2, 1.0 / math.sqrt(step))


def start_factors(parameter: Tensor, suffix: str = "") -> dict[str, Tensor]:
    """Zero means of rows [..., n] and columns [..., m] of a tensor [..., n, m]; of every entry where it is a vector."""

    def zeros(shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=parameter.device)

    shape = tuple(parameter.shape)
    if len(shape) < 2:
        return {"square" + suffix: zeros(shape)}
    return {"row" + suffix: zeros(shape[:-1]), "column" + suffix: zeros(shape[:-2] + shape[-1:])}


def factored_rsqrt(row: Tensor, column: Tensor, squares: Tensor, beta: float) -> Tensor:
    """Move the means of rows and columns on by one step, in place, and return 1 / sqrt(row column / mean(row)).

    row [..., n], column [..., m], squares [..., n, m]; returns [..., n, m].
    """
    row.lerp_(squares.mean(-1), 1 - beta)
    column.lerp_(squares.mean(-2), 1 - beta)
    row_factor = (row / row.mean(-1, keepdim=True)).rsqrt()
    return row_factor.unsqueeze(-1) * column.rsqrt().unsqueeze(-2)


def clip_divisor(update: Tensor, threshold: float) -> Tensor:
    """max(1, RMS(update) / threshold): what to divide an update by so that its RMS is at most the threshold."""
    return (_rms(update) / threshold).clamp(min=1.0)


def _rms(tensor: Tensor) -> Tensor:
    return tensor.norm() / max(1, tensor.numel()) ** 0.5
