"""How the answers of lab 09 are called. Runs beside the student's code.

Losses are called on leaves that ask for gradients, and value and gradients are handed back. Where memory is at stake
the largest tensor that was made is noted too: that does not depend on the machine.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Sizes(TorchDispatchMode):
    """Notes the numbers of the largest tensor that an operation made; views make none."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import torch's compiler at the first operation: seconds, inside a time limit

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not getattr(func, "is_view", False):
            sizes = [t.numel() for t in tree_iter(out) if isinstance(t, Tensor)]
            self.largest = max(self.largest, *sizes, 0)
        return out


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def scalar(loss, what: str = "the loss") -> Tensor:
    """A loss that backward can start from, or an error in words."""
    if not isinstance(loss, Tensor) or loss.ndim:
        raise TypeError(f"return {what} as a tensor of no dimensions")
    return loss


def gradient_of(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad


def learned(*tensors: Tensor) -> bool:
    """Whether a gradient has come to one of these."""
    return any(x.grad is not None and bool((x.grad != 0).any()) for x in tensors)


def soft_loss(answer, student_logits, teacher_logits, temperature):
    student, teacher = leaf(student_logits), leaf(teacher_logits)
    loss = scalar(answer(student, teacher, temperature))
    if loss.requires_grad:
        loss.backward()
    return {"loss": loss.detach(), "gradient": gradient_of(student), "teacher learns": learned(teacher)}


def distillation_loss(
    answer, student_logits, teacher_logits, student_hidden, teacher_hidden, labels, temperature, weights
):
    logits, hidden = leaf(student_logits), leaf(student_hidden)
    loss = scalar(answer(logits, teacher_logits, hidden, teacher_hidden, labels, temperature, tuple(weights)))
    if loss.requires_grad:
        loss.backward()
    return {"loss": loss.detach(), "logits": gradient_of(logits), "hidden": gradient_of(hidden)}


def chunked_loss(
    answer, student_hidden, student_weight, teacher_hidden, teacher_weight, labels, temperature, chunk, watched=False
):
    """`watched`: whether to note if a tensor as large as all logits was made."""
    with Sizes() as sizes:
        told = answer(student_hidden, student_weight, teacher_hidden, teacher_weight, labels, temperature, chunk)
    if not isinstance(told, (list, tuple)) or len(told) != 3 or not all(isinstance(x, Tensor) for x in told):
        raise TypeError("return three tensors: the loss, the gradient of student_hidden and that of student_weight")
    loss, to_hidden, to_weight = told
    shown = {"loss": scalar(loss).detach(), "hidden": to_hidden.detach(), "weight": to_weight.detach()}
    if watched:
        shown["whole logits"] = sizes.largest >= len(labels) * len(student_weight)
    return shown


def divergence(answer, student_logits, teacher_logits, kind, differentiate=True):
    if not differentiate:
        return {"values": answer(student_logits, teacher_logits, kind)}
    student = leaf(student_logits)
    values = answer(student, teacher_logits, kind)
    if not isinstance(values, Tensor):
        raise TypeError("return a tensor: one divergence for each position")
    if values.requires_grad:
        weighed_sum(values).backward()
    return {"values": values.detach(), "gradient": gradient_of(student)}


def weighed_sum(values: Tensor) -> Tensor:
    """A loss that treats every number differently."""
    weights = torch.linspace(0.5, 1.5, values.numel(), dtype=values.dtype, device=values.device)
    return (weights.view(values.shape) * values).sum()


class SmallModel(nn.Module):
    """ids [batch, length] to logits [batch, length, vocabulary]: each position sees the mean of those before it."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in weights.items():
            self.register_parameter(name, nn.Parameter(value.detach().clone()))

    def forward(self, ids: Tensor) -> Tensor:
        seen = torch.tanh(self.table[ids]).cumsum(1)
        places = torch.arange(1, ids.shape[1] + 1, dtype=seen.dtype, device=ids.device)
        return (seen / places[:, None] + self.table[ids]) @ self.head


def on_policy_step(answer, student, teacher, prompt, uniforms):
    learner, master = SmallModel(student), SmallModel(teacher)
    told = answer(learner, master, prompt, uniforms)
    if not isinstance(told, (list, tuple)) or len(told) != 2 or not all(isinstance(x, Tensor) for x in told):
        raise TypeError("return two tensors: the tokens and the loss")
    tokens, loss = told
    if scalar(loss).requires_grad:
        loss.backward()
    return {
        "tokens": tokens,
        "loss": loss.detach(),
        "gradients": {name: gradient_of(p) for name, p in learner.named_parameters()},
        "teacher learns": learned(*master.parameters()),
    }


def width_masks(answer, log_alpha, uniforms, target, linear, square):
    given = {"log_alpha": leaf(log_alpha), "linear": leaf(linear), "square": leaf(square)}
    told = answer(given["log_alpha"], uniforms, target, given["linear"], given["square"])
    if not isinstance(told, (list, tuple)) or len(told) != 2 or not all(isinstance(x, Tensor) for x in told):
        raise TypeError("return two tensors: the masks and the constraint")
    mask, constraint = told[0], scalar(told[1], "the constraint")
    shown = {"mask": mask.detach(), "constraint": constraint.detach()}
    for name, value in (("mask", weighed_sum(mask)), ("constraint", constraint)):
        if value.requires_grad:
            value.backward(retain_graph=True)
        for parameter, x in given.items():
            shown[f"{name} by {parameter}"] = gradient_of(x).clone()
            x.grad = None
    return shown
