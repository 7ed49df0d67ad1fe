"""From hidden states and output weights to the distillation loss and its gradients, without the whole logits.

The logits of 8,192 tokens over 128,256 words are 4 GB in float32, twice, and their gradient as much again. Rows are
independent, so they are taken a chunk at a time: two products make the chunk's logits, one kernel turns them into
losses and, in the same memory, into their gradient, two more products carry it on to the student's states and weight.
Both gradients are ready when the forward ends; backward hands them out.

In half precision the products write float32 logits where the device can: student and teacher come close to each other,
and their difference, which is the gradient, must not be of rounding alone. The gradient itself is in half precision.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from effnlp_lab.device import triton_mode
from effnlp_lab.distillation.losses import IGNORED
from effnlp_lab.distillation.rows import loss_rows_plain
from effnlp_lab.distillation.settings import LossSettings, check_inputs
from effnlp_lab.errors import UsageError

LOGITS_BYTES = 800 << 20
"""Of the logits of one chunk, student's and teacher's together. More: larger products; less: less memory."""
ROW_MULTIPLE = 128
"""Rows of a chunk are a multiple of this, where there are as many."""
FLOAT32_LOGITS = True
"""Whether products of half-precision inputs write float32 logits on a GPU."""

Backend = Literal["auto", "triton", "torch"]


def fused_linear_jsd(student_input: Tensor, student_weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor,
                     labels: Tensor | None = None, *, beta: float = 0.5, **options: Any) -> Tensor:  # fmt: skip
    """Generalized Jensen-Shannon divergence of two linear layers' softmaxes. Scalar, float32, in nats.

    student_input [rows, hidden], student_weight [vocabulary, hidden]; the teacher's may have another width and get no
    gradient; labels [rows] int64: where one is -100 the row does not count. beta 0 is forward KL and 1 reverse KL.
    options: those of `LossSettings` (temperature, squared_temperature, weight_soft, weight_hard, ignore_index,
    reduction), `chunk_rows` and `backend` as of `chunked_linear_loss`. With squared_temperature=False this is
    liger-kernel's LigerFusedLinearJSDLoss. Raises UsageError for inputs that do not belong together.
    """
    return _loss("jsd", (student_input, student_weight), (teacher_input, teacher_weight), labels, beta=beta, **options)


def fused_linear_kl(student_input: Tensor, student_weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor,
                    labels: Tensor | None = None, *, reverse: bool = False, **options: Any) -> Tensor:  # fmt: skip
    """KL(P || Q), or with `reverse` KL(Q || P), of two linear layers. Arguments as of `fused_linear_jsd`."""
    kind = "reverse_kl" if reverse else "forward_kl"
    return _loss(kind, (student_input, student_weight), (teacher_input, teacher_weight), labels, **options)


def fused_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = IGNORED,
                               reduction: Literal["mean", "sum"] = "mean", chunk_rows: int | None = None,
                               backend: Backend = "auto") -> Tensor:  # fmt: skip
    """Cross-entropy of a linear layer: hidden [rows, hidden], weight [vocabulary, hidden], labels [rows]. Scalar."""
    return _loss(
        "none", (hidden, weight), None, labels, weight_hard=1.0, ignore_index=ignore_index, reduction=reduction,
        chunk_rows=chunk_rows, backend=backend,
    )  # fmt: skip


def chunked_linear_loss(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor] | None, labels: Tensor | None,
                        settings: LossSettings, *, chunk_rows: int | None = None,
                        backend: Backend = "auto") -> Tensor:  # fmt: skip
    """The loss of `settings` from (hidden states, weight) of both; differentiable in the student's alone.

    chunk_rows: rows whose logits are held at once; None takes as many as fit LOGITS_BYTES. A mean is over all rows that
    count, so chunks of unequal size, or with unequal padding, change nothing. backend: "triton" is the fused kernel,
    "torch" the same in PyTorch operations, "auto" the kernel on a GPU. Under autocast both pairs are cast first. The
    result can be differentiated once.
    """
    device = student[0].device
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        student = tuple(x.to(dtype) for x in student)
        teacher = None if teacher is None else tuple(x.to(dtype) for x in teacher)
    check_inputs(student, teacher, labels, settings)
    if chunk_rows is not None and chunk_rows < 1:
        raise UsageError(f"chunk_rows is {chunk_rows}: a chunk needs at least 1 row.")
    plan = _Plan(settings, teacher, labels, chunk_rows, _kernel(backend, device))
    with torch.autocast(device.type, enabled=False):
        return _LinearLoss.apply(*student, plan)


def _loss(kind: str, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor] | None, labels: Tensor | None, *,
          chunk_rows: int | None = None, backend: Backend = "auto", **options: Any) -> Tensor:  # fmt: skip
    settings = LossSettings(kind=kind, **options)
    return chunked_linear_loss(student, teacher, labels, settings, chunk_rows=chunk_rows, backend=backend)


@dataclass(frozen=True)
class _Plan:
    """What the autograd function gets beside the two tensors that have gradients."""

    settings: LossSettings
    teacher: tuple[Tensor, Tensor] | None
    labels: Tensor | None
    chunk_rows: int | None
    kernel: bool


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, plan: _Plan) -> Tensor:
        wanted = ctx.needs_input_grad[:2]
        loss, *ctx.gradients = _forward(hidden, weight, plan, wanted)
        ctx.kernel = plan.kernel
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, factor: Tensor):
        if ctx.gradients is None:
            raise UsageError("This loss was differentiated before: its gradients are made once, in the forward.")
        gradients, ctx.gradients = ctx.gradients, None
        for one in gradients:
            if one is not None:
                _multiply(one, factor, ctx.kernel)
        return *gradients, None


def _forward(hidden: Tensor, weight: Tensor, plan: _Plan, wanted: tuple[bool, bool]):
    """The loss, and the gradients of hidden states and weight that are wanted (else None).

    A mean's gradient is multiplied by 1 / rows in the products and by rows / (rows that count) in the kernel: neither
    leaves the range of float16, and the second stays on the device.
    """
    settings, (rows, vocabulary) = plan.settings, (hidden.shape[0], weight.shape[0])
    if plan.teacher is not None:
        plan = replace(plan, teacher=tuple(x.detach() for x in plan.teacher))
    mean = settings.reduction == "mean"
    dtype = _logits_dtype(hidden)
    wide = torch.promote_types(dtype, torch.float32)
    scale, counted = _scale(plan, rows, hidden.device, wide)
    alpha = 1.0 / rows if mean else 1.0
    several = 1 if plan.teacher is None else 2
    chunk = min(rows, plan.chunk_rows or _chunk_rows(rows, vocabulary, several * dtype.itemsize))
    buffers = [torch.empty(chunk, vocabulary, dtype=dtype, device=hidden.device) for _ in range(several)]
    losses = torch.empty(rows, dtype=wide, device=hidden.device)
    to_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if wanted[0] else None
    to_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if wanted[1] else None
    turn = _loss_rows if plan.kernel else loss_rows_plain
    for first in range(0, rows, chunk):
        at = slice(first, min(first + chunk, rows))
        logits = [buffer[: at.stop - first] for buffer in buffers]
        _product(hidden[at], weight, logits[0])
        if plan.teacher is not None:
            _product(plan.teacher[0][at], plan.teacher[1], logits[1])
        slope = _over(logits[0], hidden.dtype) if any(wanted) else None
        labels = None if plan.labels is None else plan.labels[at]
        teacher = logits[1] if plan.teacher is not None and settings.kind != "none" else None
        turn(logits[0], teacher, labels, scale, losses[at], slope, settings)
        if to_hidden is not None:
            to_hidden[at].addmm_(slope, weight, beta=0, alpha=alpha)
        if to_weight is not None:
            to_weight.addmm_(slope.T, hidden[at], beta=0 if first == 0 else 1, alpha=alpha)
    total = losses.sum()
    return total / counted if mean else total, to_hidden, to_weight


def _scale(plan: _Plan, rows: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor | int]:
    """What the kernel multiplies gradients by, on the device, and how many rows count."""
    if plan.settings.reduction == "sum" or plan.labels is None:
        return torch.ones((), device=device, dtype=dtype), rows
    counted = (plan.labels != plan.settings.ignore_index).sum().clamp(min=1)
    return rows / counted.to(dtype), counted


def _logits_dtype(hidden: Tensor) -> torch.dtype:
    if hidden.device.type == "cuda" and FLOAT32_LOGITS and hidden.dtype in (torch.float16, torch.bfloat16):
        return torch.float32
    return hidden.dtype


def _chunk_rows(rows: int, vocabulary: int, bytes_each: int) -> int:
    """Chunks of nearly equal size whose logits fit LOGITS_BYTES."""
    most = max(1, LOGITS_BYTES // (vocabulary * bytes_each))
    most = max(most // ROW_MULTIPLE * ROW_MULTIPLE, min(most, ROW_MULTIPLE))
    even = -(-rows // -(-rows // most))
    return min(most, -(-even // ROW_MULTIPLE) * ROW_MULTIPLE)


def _product(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """hidden weight' into `out`, which may be wider than its inputs."""
    if out.dtype == hidden.dtype:
        torch.mm(hidden, weight.T, out=out)
    else:
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)


def _over(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory of `logits` as a matrix of the same shape and a dtype that is not wider; its rows begin alike."""
    return logits if dtype == logits.dtype else logits.view(dtype)[:, : logits.shape[1]]


def _kernel(backend: Backend, device: torch.device) -> bool:
    mode = triton_mode(device.type)
    if backend == "auto":
        return device.type == "cuda" and mode == "compiled"
    if backend not in ("triton", "torch"):
        raise UsageError(f"The backend {backend!r} is unknown: expected 'auto', 'triton' or 'torch'.")
    if backend == "triton" and mode == "absent":
        raise UsageError(f"Triton cannot run on this {device.type} device: use backend='auto' or 'torch'.")
    return backend == "triton"


def _loss_rows(*arguments: Any) -> None:
    from effnlp_lab.distillation.kernel_rows import loss_rows

    loss_rows(*arguments)


def _multiply(x: Tensor, factor: Tensor, kernel: bool) -> None:
    if kernel:
        from effnlp_lab.distillation.kernel_rows import multiply_

        multiply_(x, factor)
    else:
        x.mul_(factor)
