"""Mixed precision: a dynamic loss scale for float16, and what autocast leaves in float32.

Micikevicius et al. 2018. float16 ends at 65,504 above and 6e-8 below, and most gradients of a language model are
smaller than that. The loss is multiplied by a scale before backward, and the gradients are divided by it before
anything looks at them: before clipping, which would otherwise clip the scaled norm. bfloat16 has float32's range and
needs no scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effnlp_lab.errors import UsageError


class LossScaler:
    """Doubles its scale after `growth_interval` good steps, halves it and skips the step when a gradient overflowed.

    scaler.scale(loss).backward(); scaler.unscale_(optimizer); clip; scaler.step(optimizer); scaler.update().
    Equal to torch.amp.GradScaler step by step. `step` reads one number from the device.
    """

    def __init__(self, initial_scale: float = 2.0**16, *, growth: float = 2.0, backoff: float = 0.5,
                 growth_interval: int = 2000) -> None:  # fmt: skip
        if initial_scale <= 0:
            raise UsageError(f"initial_scale is {initial_scale}: it must be positive.")
        if growth <= 1 or not 0 < backoff < 1:
            raise UsageError(f"growth is {growth} and backoff {backoff}: expected more than 1, and between 0 and 1.")
        if growth_interval < 1:
            raise UsageError(f"growth_interval is {growth_interval}: it must be at least 1 step.")
        self.factor = float(initial_scale)
        self.growth, self.backoff, self.growth_interval = growth, backoff, growth_interval
        self.good_steps = 0
        self.skipped = 0
        self._overflow: Tensor | None = None
        self._stepped: bool | None = None

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the scale, in float32 at least (a float16 loss would overflow at once)."""
        return loss * self.factor if loss.dtype.itemsize >= 4 else loss.float() * self.factor

    @torch.no_grad()
    def unscale_(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Divide the gradients by the scale, once a step. Returns whether any is not finite, on the device.

        Raises UsageError when called twice in a step, and for float16 parameters: their update would be lost in
        rounding, so keep the parameters in float32 and let autocast make the float16 copies.
        """
        if self._overflow is not None:
            raise UsageError("unscale_ was already called in this step: call update() after step().")
        by_place: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for parameter in _parameters(optimizer):
            if parameter.grad is None:
                continue
            if parameter.grad.dtype == torch.float16:
                raise UsageError("A float16 parameter cannot be unscaled: keep parameters in float32 under autocast.")
            by_place.setdefault((parameter.grad.device, parameter.grad.dtype), []).append(parameter.grad)
        if not by_place:
            raise UsageError("There is no gradient to unscale: call backward() on the scaled loss first.")
        bad = []
        for gradients in by_place.values():
            torch._foreach_mul_(gradients, 1.0 / self.factor)
            bad.append(torch.stack([g.isfinite().all() for g in gradients]).all().logical_not())
        place = bad[0].device
        self._overflow = torch.stack([flag.to(place) for flag in bad]).any()
        return self._overflow

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """optimizer.step() unless a gradient overflowed; unscales first where that was not done. Whether it stepped."""
        if self._overflow is None:
            self.unscale_(optimizer)
        self._stepped = not bool(self._overflow)
        if self._stepped:
            optimizer.step()
        return self._stepped

    def update(self) -> None:
        """Set the scale for the next step. Raises UsageError before the first step()."""
        if self._stepped is None:
            raise UsageError("update() comes after step(): there was no step since the last update.")
        if self._stepped:
            self.good_steps += 1
            if self.good_steps == self.growth_interval:
                self.factor *= self.growth
                self.good_steps = 0
        else:
            self.factor *= self.backoff
            self.good_steps = 0
            self.skipped += 1
        self._overflow = self._stepped = None

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor, "good_steps": self.good_steps, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.factor, self.good_steps, self.skipped = state["factor"], state["good_steps"], state["skipped"]


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def full_precision_operations(device: torch.device | str, dtype: torch.dtype) -> dict[str, bool]:
    """For common operations of a language model: does autocast to `dtype` on this device leave the result in float32?

    Asked of PyTorch itself, by running each on small float32 tensors. Sums, exponentials and norms stay in float32: a
    sum of many float16 numbers loses the small ones, and e^12 exceeds float16. Products of matrices do not: their terms
    are summed in float32 inside the operation.
    """
    device = torch.device(device)
    x = torch.rand(2, 4, 8, device=device)
    weight, bias = torch.rand(8, 8, device=device), torch.rand(8, device=device)
    labels = torch.zeros(8, dtype=torch.long, device=device)
    found = {}
    for name, operation in _OPERATIONS.items():
        with torch.autocast(device.type, dtype=dtype):
            # What an operation sees in a model: the result of a matrix product, which is already in `dtype`.
            found[name] = operation(F.linear(x, weight), weight, bias, labels).dtype == torch.float32
    return found


_OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w, b, y: F.linear(x, w, b),
    "matmul": lambda x, w, b, y: x @ w,
    "bmm": lambda x, w, b, y: torch.bmm(x, x.transpose(1, 2)),
    "scaled_dot_product_attention": lambda x, w, b, y: F.scaled_dot_product_attention(x, x, x),
    "relu": lambda x, w, b, y: F.relu(x),
    "gelu": lambda x, w, b, y: F.gelu(x),
    "dropout": lambda x, w, b, y: F.dropout(x, 0.1),
    "add": lambda x, w, b, y: x + x,
    "softmax": lambda x, w, b, y: F.softmax(x, -1),
    "log_softmax": lambda x, w, b, y: F.log_softmax(x, -1),
    "layer_norm": lambda x, w, b, y: F.layer_norm(x, (8,), b, b),
    "cross_entropy": lambda x, w, b, y: F.cross_entropy(x.flatten(0, 1), y),
    "exp": lambda x, w, b, y: x.exp(),
    "pow": lambda x, w, b, y: x.pow(2),
    "sum": lambda x, w, b, y: x.sum(-1),
    "norm": lambda x, w, b, y: x.norm(),
}
