"""AdamW with its two states in one byte a number each: 2 bytes of state a parameter in place of 8.

Loshchilov and Hutter 2019 for the update, Dettmers et al. 2022 for the states (blockwise.py). Tensors of fewer than
4096 numbers keep float32 states, as in bitsandbytes: biases and norms matter much and weigh little. On a CUDA device
with Triton, all large tensors of a group are updated by one launch of a fused kernel (kernel_adamw8bit.py) and one for
what does not fill its chunks; elsewhere by PyTorch operations with the same results.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import operator
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from effnlp_lab.errors import UsageError
from effnlp_lab.training.blockwise import block_count, dequantize_blockwise, quantize_blockwise
from effnlp_lab.training.optimizer_base import ExactOptimizer, check_betas, float32_of, write_back


class AdamW8bit(ExactOptimizer):
    """torch.optim.AdamW's arguments; parameters in float32, bfloat16 or float16, gradients in the same.

    `min_8bit_size`: tensors of fewer numbers keep float32 states. Raises UsageError for numbers out of range and for
    integer parameters.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 1e-2, *, min_8bit_size: int = 4096) -> None:  # fmt: skip
        if min_8bit_size < 0:
            raise UsageError(f"min_8bit_size is {min_8bit_size}: expected 0 or more.")
        self._plans: dict[int, _Plan] = {}
        super().__init__(params, {
            "lr": lr, "betas": check_betas(betas, 2), "eps": eps, "weight_decay": weight_decay,
            "min_8bit_size": min_8bit_size,
        })  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._plans.clear()
        super().load_state_dict(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = {}

    def _update(self, group: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        plan = self._plans.get(id(group))
        if plan is None or not plan.is_for(parameters, self.state):
            for parameter in parameters:
                if not self.state[parameter]:
                    self._start(parameter, self.state[parameter], parameter.numel() >= group["min_8bit_size"])
            plan = self._plans[id(group)] = _Plan(parameters, [self.state[p] for p in parameters])
        plan.step(group)

    def _start(self, parameter: Tensor, state: dict[str, Any], large: bool) -> None:
        state["step"] = 0
        for name in ("exp_avg", "exp_avg_sq"):
            dtype = torch.uint8 if large else torch.float32
            state[name] = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        if large:
            for name in ("absmax", "absmax_sq"):
                blocks = block_count(parameter.numel())
                state[name] = torch.zeros(blocks, dtype=torch.float32, device=parameter.device)


def step_scalars(group: dict[str, Any], step: int) -> dict[str, float]:
    """What the update multiplies by, in the order of the kernel's arguments. `step` is 1 at the first update."""
    beta1, beta2 = group["betas"]
    return {
        "beta1": beta1,
        "rest1": 1 - beta1,
        "beta2": beta2,
        "rest2": 1 - beta2,
        "step_size": group["lr"] / (1 - beta1**step),
        "root2": 1 / math.sqrt(1 - beta2**step),
        "eps": group["eps"],
        "decay": 1 - group["lr"] * group["weight_decay"],
    }


def update_plain(parameter: Tensor, gradient: Tensor, state: dict[str, Any], scalars: dict[str, float]) -> None:
    """The definition: decode, one step of AdamW in float32, code again. What the kernel is compared with."""
    gradient = gradient.float()
    average = dequantize_blockwise(state["exp_avg"], state["absmax"])
    square = dequantize_blockwise(state["exp_avg_sq"], state["absmax_sq"], signed=False)
    average.mul_(scalars["beta1"]).add_(gradient, alpha=scalars["rest1"])
    square.mul_(scalars["beta2"]).addcmul_(gradient, gradient, value=scalars["rest2"])
    divisor = square.sqrt().mul_(scalars["root2"]).add_(scalars["eps"])
    weight = parameter.float() * scalars["decay"]
    parameter.copy_(weight.addcdiv_(average, divisor, value=-scalars["step_size"]))
    state["exp_avg"], state["absmax"] = quantize_blockwise(average)
    state["exp_avg_sq"], state["absmax_sq"] = quantize_blockwise(square, signed=False)


def _has_kernel(parameter: Tensor) -> bool:
    """Compiled Triton on a card that has the dtype, and a parameter whose numbers lie in order."""
    if parameter.device.type != "cuda" or not parameter.is_contiguous() or parameter.dtype.itemsize > 4:
        return False
    capability = torch.cuda.get_device_capability(parameter.device)
    if capability < (7, 5) or (capability < (8, 0) and torch.bfloat16 in (parameter.dtype, parameter.grad.dtype)):
        return False
    return _compiles()


@functools.cache
def _compiles() -> bool:
    """Triton is installed, and not told to interpret."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    return not interpreted and importlib.util.find_spec("triton") is not None


def update_small(parameters: Sequence[Tensor], states: Sequence[dict[str, Any]], scalars: dict[str, float]) -> None:
    """torch's AdamW with float32 states, on lists of tensors."""
    weights, gradients = float32_of(parameters), float32_of([p.grad for p in parameters])
    averages, squares = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
    torch._foreach_lerp_(averages, gradients, scalars["rest1"])
    torch._foreach_mul_(squares, scalars["beta2"])
    torch._foreach_addcmul_(squares, gradients, gradients, scalars["rest2"])
    divisors = torch._foreach_sqrt(squares)
    torch._foreach_mul_(divisors, scalars["root2"])
    torch._foreach_add_(divisors, scalars["eps"])
    torch._foreach_mul_(weights, scalars["decay"])
    torch._foreach_addcdiv_(weights, averages, divisors, -scalars["step_size"])
    write_back(parameters, weights)


class _Plan:
    """Which of some parameters are updated in which way: found out once, as a step has little time on the host."""

    def __init__(self, parameters: Sequence[Tensor], states: Sequence[dict[str, Any]]) -> None:
        self.parameters, self.states = list(parameters), list(states)
        self.ways: dict[tuple, tuple[str, list[Tensor], list[dict[str, Any]]]] = {}
        for parameter, state in zip(parameters, states, strict=True):
            way = "small" if "absmax" not in state else "fused" if _has_kernel(parameter) else "plain"
            kind = (way, state["step"], parameter.device, parameter.dtype, parameter.grad.dtype)
            _, several, their_states = self.ways.setdefault(kind, (way, [], []))
            several.append(parameter)
            their_states.append(state)
        self.tables = {kind: Table(*rest) for kind, (way, *rest) in self.ways.items() if way == "fused"}

    def is_for(self, parameters: Sequence[Tensor], states: dict[Tensor, dict[str, Any]]) -> bool:
        same = len(parameters) == len(self.parameters) and all(map(operator.is_, parameters, self.parameters))
        return same and states.get(self.parameters[0]) is self.states[0]

    def step(self, group: dict[str, Any]) -> None:
        for state in self.states:
            state["step"] += 1
        for kind, (way, parameters, states) in self.ways.items():
            scalars = step_scalars(group, states[0]["step"])
            if way == "fused":
                self.tables[kind].step(scalars)
            elif way == "small":
                update_small(parameters, states, scalars)
            else:
                for parameter, state in zip(parameters, states, strict=True):
                    update_plain(parameter, parameter.grad, state, scalars)


class Table:
    """The addresses of tensors of one type on their device, sent again only when one of them has moved."""

    def __init__(self, parameters: Sequence[Tensor], states: Sequence[dict[str, Any]]) -> None:
        self.parameters, self.states = parameters, states
        self.addresses: list[int] | None = None
        self.aligned: list[bool] = []
        self.table: Tensor | None = None
        self.work: list[tuple[bool, Tensor]] = []

    def step(self, scalars: dict[str, float]) -> None:
        """One update, with the parameters' gradients of now."""
        from effnlp_lab.training.kernel_adamw8bit import launch

        gradients = [parameter.grad for parameter in self.parameters]
        addresses = [tensor.data_ptr() for tensor in (*self.parameters, *gradients)]
        if addresses != self.addresses:
            in_order = [gradient.contiguous() for gradient in gradients]
            moved = any(map(operator.is_not, gradients, in_order))
            gradients, self.addresses = in_order, None if moved else addresses  # copies are made anew at every step
            self._send(gradients)
        for masked, work in self.work:
            launch(self.parameters[0], gradients[0], self.table, work, masked, scalars)

    def _send(self, gradients: Sequence[Tensor]) -> None:
        device = gradients[0].device
        rows = [table_row(*one) for one in zip(self.parameters, gradients, self.states, strict=True)]
        self.table = _to(torch.tensor(rows, dtype=torch.int64), device)
        aligned = [is_aligned(row) for row in rows]
        if aligned != self.aligned:
            self.aligned = aligned
            lists = work_lists([(row[-1], whole) for row, whole in zip(rows, aligned, strict=True)])
            self.work = [(masked, _to(work, device)) for masked, work in lists]


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def table_row(parameter: Tensor, gradient: Tensor, state: dict[str, Any]) -> list[int]:
    """Where the kernel finds one tensor (see COLUMNS there)."""
    names = ("exp_avg", "exp_avg_sq", "absmax", "absmax_sq")
    places = [parameter, gradient, *(state[name] for name in names)]
    return [*(tensor.data_ptr() for tensor in places), parameter.numel()]


def work_lists(tensors: Sequence[tuple[int, bool]]) -> list[tuple[bool, Tensor]]:
    """Which chunk of which tensor each program takes: (masked, [programs, 2] int32) for whole chunks and for the rest.

    tensors: (number count, whether its addresses are aligned) of each.
    """
    from effnlp_lab.training.kernel_adamw8bit import ROWS

    chunk = ROWS * 256
    found: dict[bool, list[Tensor]] = {False: [], True: []}
    for index, (count, aligned) in enumerate(tensors):
        whole, chunks = count // chunk if aligned else 0, -(-count // chunk)
        for masked, first, end in ((False, 0, whole), (True, whole, chunks)):
            if end > first:
                place = torch.arange(first, end, dtype=torch.int32)
                found[masked].append(torch.stack([torch.full_like(place, index), place], dim=1))
    return [(masked, torch.cat(parts).contiguous()) for masked, parts in found.items() if parts]


def is_aligned(row: Sequence[int]) -> bool:
    """Whether the kernel may move 16 bytes at a time."""
    return all(address % 16 == 0 for address in row[:4])
