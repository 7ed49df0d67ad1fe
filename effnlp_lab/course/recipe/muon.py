"""Muon: momentum whose update is made orthogonal (Jordan et al. 2024), with all matrices of a shape in one product.

`torch.optim.Muon` walks over the matrices one by one: some 1,200 kernels a step for 56 of them, which on a small model
takes longer than the step itself. Here matrices of one shape are stacked. Embeddings, norms and biases are not
matrices in Muon's sense: AdamW updates them, in the same optimizer, so that schedules and checkpoints see only one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, tuned for the steepest slope at zero
MATCH_ADAMW = 0.2  # the usual root mean square of an AdamW update (Liu et al. 2025, section 2.2)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the parameters of groups with `"muon": True`, AdamW (Loshchilov and Hutter 2019) for the others.

    One learning rate and weight decay serve both: an orthogonal update is scaled by 0.2 sqrt(max(rows, columns)), which
    gives its entries the size that AdamW's have (Liu et al. 2025, equation 4). Muon takes matrices only.
    """

    def __init__(
        self,
        groups: Iterable[dict],
        lr: float = 3e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps, "muon": False,
        }
        super().__init__(groups, defaults)
        for group in self.param_groups:
            wrong = [tuple(p.shape) for p in group["params"] if group["muon"] and p.ndim != 2]
            if wrong:
                raise ValueError(f"Muon updates matrices, and one of its parameters has the shape {wrong[0]}.")

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                (self._muon if group["muon"] else self._adamw)(group, params)
        return loss

    def _muon(self, group: dict, params: list[Tensor]) -> None:
        grads = [p.grad for p in params]
        momenta = [self._state(p, "momentum_buffer") for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov's look ahead
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        for indices in _by_shape(params).values():
            rows, columns = params[indices[0]].shape
            whole = orthogonalize(torch.stack([updates[i] for i in indices])).to(params[indices[0]].dtype)
            scale = MATCH_ADAMW * max(rows, columns) ** 0.5
            torch._foreach_add_([params[i] for i in indices], list(whole.unbind(0)), alpha=-group["lr"] * scale)

    def _adamw(self, group: dict, params: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        grads = [p.grad for p in params]
        first, second = ([self._state(p, name) for p in params] for name in ("exp_avg", "exp_avg_sq"))
        group["steps"] = steps = group.get("steps", 0) + 1
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        roots = torch._foreach_sqrt(second)
        torch._foreach_div_(roots, (1 - beta2**steps) ** 0.5)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(params, first, roots, -group["lr"] / (1 - beta1**steps))

    def _state(self, parameter: Tensor, name: str) -> Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter)
        return state[name]


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrices, roughly: singular values come to lie between 0.7 and 1.2 or so.

    matrices: [count, rows, columns]; returns bfloat16 of the same shape. Newton-Schulz iteration, X <- aX + (bA + cA²)X
    with A = XXᵀ, on the shorter side.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def parameter_groups(model: torch.nn.Module, muon: bool = True) -> list[dict]:
    """The model's parameters as matrices of its layers (Muon), embeddings, and vectors (no weight decay)."""
    matrices, embeddings, vectors = [], [], []
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for parameter in model.parameters():  # tied weights come once
        kind = vectors if parameter.ndim < 2 else embeddings if id(parameter) in looked_up else matrices
        kind.append(parameter)
    return [
        {"params": matrices, "muon": muon},
        {"params": embeddings},
        {"params": vectors, "weight_decay": 0.0},
    ]


def _by_shape(params: list[Tensor]) -> dict[torch.Size, list[int]]:
    found: dict[torch.Size, list[int]] = defaultdict(list)
    for index, parameter in enumerate(params):
        found[parameter.shape].append(index)
    return found
