"""Lion: the sign of an interpolated momentum, with one state per parameter.

Chen et al. 2023, "Symbolic discovery of optimization algorithms", algorithm 2. Every entry moves by the learning rate,
so that should be 3 to 10 times smaller than AdamW's, and weight decay as much larger.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from effnlp_lab.training.optimizer_base import ExactOptimizer, check_betas, float32_of, write_back


class Lion(ExactOptimizer):
    """lr, betas (of the update and of the momentum) and decoupled weight decay; float32 momentum for every dtype.

    Raises UsageError for numbers out of range and for integer parameters.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99),
                 weight_decay: float = 0.0) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": check_betas(betas, 2), "weight_decay": weight_decay})

    def _update(self, group: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter, dtype=torch.float32)
        for same in by_device(parameters):
            weights, gradients = float32_of(same), float32_of([p.grad for p in same])
            momenta = [self.state[p]["momentum"] for p in same]
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            direction = torch._foreach_mul(momenta, beta1)
            torch._foreach_add_(direction, gradients, alpha=1 - beta1)
            torch._foreach_sign_(direction)
            torch._foreach_add_(weights, direction, alpha=-group["lr"])
            torch._foreach_mul_(momenta, beta2)
            torch._foreach_add_(momenta, gradients, alpha=1 - beta2)
            write_back(same, weights)


def by_device(parameters: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    """Lists of parameters on one device and of one dtype, for the operations on whole lists."""
    lists: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        lists.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    return lists.values()
