"""What the optimizers of this room share: checks with one sentence each, and state that comes back as it was saved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from effnlp_lab.errors import UsageError


class ExactOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose `load_state_dict` keeps the dtype of every state tensor.

    torch's own casts floating state to the dtype of the parameter, so that float32 state of a bfloat16 parameter would
    come back rounded, and a resumed run would differ.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        check_hyperparameters(defaults)
        super().__init__(params, defaults)
        for group in self.param_groups:
            check_hyperparameters(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            check_parameter(parameter)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore state exactly. Raises ValueError for other parameter groups, as torch's optimizers do."""
        super().load_state_dict(state_dict)
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][name] = value.detach().to(parameter.device, copy=True)

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient. Returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                if parameter.grad.layout != torch.strided:
                    raise UsageError(f"{type(self).__name__} takes no sparse gradients: use dense ones.")
            if parameters:
                self._update(group, parameters)
        return loss

    def _update(self, group: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        """Update parameters of one group, all with a gradient."""
        raise NotImplementedError


def check_parameter(parameter: Tensor) -> None:
    """Refuse what has no gradient to follow."""
    if not parameter.is_floating_point():
        kind = str(parameter.dtype).removeprefix("torch.")
        raise UsageError(
            f"A parameter of shape {tuple(parameter.shape)} is {kind}: an optimizer takes float32, bfloat16 or float16 "
            "parameters; leave the others out."
        )


def check_hyperparameters(group: dict[str, Any]) -> None:
    """Refuse what is out of range: lr, each of betas, each of eps, weight_decay, clip_threshold."""
    for name in ("lr", "weight_decay"):
        value = group.get(name)
        if value is not None and (isinstance(value, Tensor) or not 0 <= value < float("inf")):
            raise UsageError(f"{name} is {value}: expected a number of 0 or more.")
    for value in _several(group.get("betas")):
        if not 0 <= value < 1:
            raise UsageError(f"betas are {group['betas']}: each must be at least 0 and below 1.")
    for value in _several(group.get("eps")):
        if not 0 <= value < float("inf"):
            raise UsageError(f"eps is {group['eps']}: expected 0 or more.")
    if group.get("clip_threshold", 1) <= 0:
        raise UsageError(f"clip_threshold is {group['clip_threshold']}: it must be positive.")


def check_betas(betas: Sequence[float], count: int) -> tuple[float, ...]:
    """As a tuple of `count`."""
    if not isinstance(betas, Sequence) or isinstance(betas, str) or len(betas) != count:
        raise UsageError(f"betas are {betas}: expected {count} numbers.")
    return tuple(float(beta) for beta in betas)


def float32_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each in float32: itself where it is that already."""
    return [tensor.float() for tensor in tensors]


def write_back(parameters: Sequence[Tensor], updated: Sequence[Tensor]) -> None:
    """Copy float32 results into parameters of a smaller dtype, those that are not the parameter itself."""
    pairs = [(p, new) for p, new in zip(parameters, updated, strict=True) if p is not new]
    if pairs:
        torch._foreach_copy_([p for p, _ in pairs], [new for _, new in pairs])


def _several(value: Any) -> tuple[float, ...]:
    return () if value is None else tuple(value) if isinstance(value, (tuple, list)) else (value,)
