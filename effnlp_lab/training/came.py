"""CAME: Adafactor's factored state, and a second one for how far each update strays from its own momentum.

Luo et al. 2023, "CAME: confidence-guided adaptive memory efficient optimization", algorithm 2. Where the momentum and
the present update disagree, confidence is low and the step small. The first moment is kept in full: the state is
n m + 2 (n + m) numbers for a matrix of n by m.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from effnlp_lab.errors import UsageError
from effnlp_lab.training.adafactor import clip_divisor, factored_rsqrt, start_factors
from effnlp_lab.training.optimizer_base import ExactOptimizer, check_betas, write_back


class CAME(ExactOptimizer):
    """lr; betas of momentum, squared gradient and instability; eps added to squared gradient and to instability.

    clip_threshold: largest RMS of an update before the momentum. Vectors have no factors, and move by their momentum
    alone. Weight decay is decoupled. Raises UsageError for numbers out of range and for integer parameters.
    """

    def __init__(self, params: Iterable[Any], lr: float = 2e-4, *,
                 betas: tuple[float, float, float] = (0.9, 0.999, 0.9999), eps: tuple[float, float] = (1e-30, 1e-16),
                 clip_threshold: float = 1.0, weight_decay: float = 0.0) -> None:  # fmt: skip
        if len(eps) != 2:
            raise UsageError(f"eps is {eps}: expected two numbers, for the squared gradient and for the instability.")
        super().__init__(params, {
            "lr": lr, "betas": check_betas(betas, 3), "eps": tuple(eps), "clip_threshold": clip_threshold,
            "weight_decay": weight_decay,
        })  # fmt: skip

    def _update(self, group: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        beta1, beta2, beta3 = group["betas"]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter, dtype=torch.float32)
                state |= start_factors(parameter)
                state |= start_factors(parameter, "_of_instability") if parameter.ndim >= 2 else {}
            gradient, weight = parameter.grad.float(), parameter.float()
            squares = gradient.square().add_(group["eps"][0])
            if "row" in state:
                update = factored_rsqrt(state["row"], state["column"], squares, beta2).mul_(gradient)
            else:
                update = state["square"].lerp_(squares, 1 - beta2).rsqrt().mul_(gradient)
            update.div_(clip_divisor(update, group["clip_threshold"]))
            momentum = state["momentum"].lerp_(update, 1 - beta1)
            step = momentum
            if "row" in state:
                instability = update.sub_(momentum).square_().add_(group["eps"][1])
                row, column = state["row_of_instability"], state["column_of_instability"]
                step = factored_rsqrt(row, column, instability, beta3).mul_(momentum)
            weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-group["lr"])
            write_back([parameter], [weight])
