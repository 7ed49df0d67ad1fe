"""One fused kernel from two rows of logits to the row's loss and its gradient, written over the student's logits.

A program takes a row. It reads both rows once for their logsumexp (running maximum and sum in every lane, merged at
the end) and, for the two KL divergences, their value, which is linear in what that pass can sum. The Jensen-Shannon
divergence needs log M, so a second pass. The last pass writes the gradient. In between nothing is stored, where
separate operations write a dozen arrays of this size.

The gradient may be narrower than the logits and lie over them: column j is written at or before the place where j was
read, so that what is overwritten has been read, once all warps have read the block: hence the barrier.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnlp_lab.distillation.settings import KINDS, LossSettings
from effnlp_lab.errors import UsageError

BLOCK = 2048
"""Columns that a program takes at once; a power of two."""
WARPS = 8
UNIT_BLOCK, UNIT_WARPS = 4096, 8
"""Numbers a program and warps of `multiply_kernel`."""

FORWARD_KL, REVERSE_KL, JSD = (tl.constexpr(KINDS.index(name)) for name in ("forward_kl", "reverse_kl", "jsd"))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)
TINY = tl.constexpr(1.2e-38)


@triton.jit
def add_lanes(top, total, weighted, x, value):
    """Running maximum, sum of 2^(x - top) and of 2^(x - top) value, each in its lane. One exponential a number."""
    higher = x > top
    shift = tl.exp2(-tl.abs(x - top))
    total = tl.where(higher, total * shift + 1.0, total + shift)
    weighted = tl.where(higher, weighted * shift + value, weighted + shift * value)
    return tl.maximum(top, x), total, weighted


@triton.jit
def merge_lanes(top, total, weighted):
    """log2 of the sum over all lanes, and the mean of the values."""
    highest = tl.max(top, 0)
    share = tl.exp2(top - highest)
    whole = tl.sum(total * share, 0)
    return highest + tl.log2(whole), tl.sum(weighted * share, 0) / whole


@triton.jit
def load_rows(Student, Teacher, column, vocabulary, factor, KIND: tl.constexpr):
    """Both rows at `column`, times factor; outside they are 0."""
    inside = column < vocabulary
    s = tl.load(Student + column, mask=inside, other=0.0).to(tl.float32) * factor
    t = s
    if KIND != 0:
        t = tl.load(Teacher + column, mask=inside, other=0.0).to(tl.float32) * factor
    return s, t, inside


@triton.jit
def loss_rows_kernel(
    Student, Teacher, Gradient, Labels, Scale, Losses, vocabulary, student_stride, teacher_stride, gradient_stride,
    inverse_temperature, beta, soft_factor, weight_hard, ignore_index,
    KIND: tl.constexpr, HARD: tl.constexpr, LABELS: tl.constexpr, SAME: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Losses [rows] and Gradient [rows, vocabulary] of Student and Teacher [rows, vocabulary]; a program a row.

    SAME: the temperature is 1, so hard and soft loss share their logsumexp. Scale is read from the device.
    """
    row = tl.program_id(0).to(tl.int64)
    Student += row * student_stride
    Teacher += row * teacher_stride
    Gradient += row * gradient_stride
    lanes = tl.arange(0, BLOCK)
    label = ignore_index
    if LABELS:
        label = tl.load(Labels + row).to(tl.int32)
        if label == ignore_index:
            tl.store(Losses + row, 0.0)
            if GRADIENT:
                nothing = tl.zeros((BLOCK,), dtype=Gradient.dtype.element_ty)
                for first in range(0, vocabulary, BLOCK):
                    tl.store(Gradient + first + lanes, nothing, mask=first + lanes < vocabulary)
            return
    at_label = 0.0
    if HARD:
        at_label = tl.load(Student + label).to(tl.float32)

    # First pass: logsumexp of both rows, in base 2, and what the KL divergences sum.
    factor = inverse_temperature * LOG2E
    s_top = tl.full((BLOCK,), LOWEST, dtype=tl.float32)
    s_sum, s_mean = tl.zeros((BLOCK,), dtype=tl.float32), tl.zeros((BLOCK,), dtype=tl.float32)
    t_top, t_sum, t_mean, h_top, h_sum, h_mean = s_top, s_sum, s_mean, s_top, s_sum, s_mean
    for first in range(0, vocabulary, BLOCK):
        s, t, inside = load_rows(Student, Teacher, first + lanes, vocabulary, factor, KIND)
        apart = s - t
        s, t = tl.where(inside, s, float("-inf")), tl.where(inside, t, float("-inf"))
        s_top, s_sum, s_mean = add_lanes(s_top, s_sum, s_mean, s, apart)
        if KIND != 0:
            t_top, t_sum, t_mean = add_lanes(t_top, t_sum, t_mean, t, -apart)
        if HARD and not SAME:
            h_top, h_sum, h_mean = add_lanes(h_top, h_sum, h_mean, s / inverse_temperature, 0.0)
    s_log, s_apart = merge_lanes(s_top, s_sum, s_mean)
    t_log, h_log, t_apart = s_log, s_log, s_apart
    if KIND != 0:
        t_log, t_apart = merge_lanes(t_top, t_sum, t_mean)
    if HARD and not SAME:
        h_log, unused = merge_lanes(h_top, h_sum, h_mean)

    # The row's loss; for the Jensen-Shannon divergence after a pass of its own. `inner` is sum Q f of rows.py.
    loss, inner = 0.0, 0.0
    if KIND == FORWARD_KL:
        loss = (t_apart - t_log + s_log) * LN2
    if KIND == REVERSE_KL:
        loss = (s_apart - s_log + t_log) * LN2
        inner = loss
    if KIND == JSD:
        from_p, from_q = tl.zeros((BLOCK,), dtype=tl.float32), tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, vocabulary, BLOCK):
            s, t, inside = load_rows(Student, Teacher, first + lanes, vocabulary, factor, KIND)
            x, y = s - s_log, t - t_log
            q, p = tl.where(inside, tl.exp2(x), 0.0), tl.where(inside, tl.exp2(y), 0.0)
            log_m = tl.log2(tl.maximum(beta * p + (1 - beta) * q, TINY))
            from_p += p * (y - log_m)
            from_q += q * (x - log_m)
        inner = tl.sum(from_q, 0) * LN2
        loss = beta * tl.sum(from_p, 0) * LN2 + (1 - beta) * inner
    loss *= soft_factor
    if HARD:
        loss += weight_hard * (h_log * LN2 - at_label)
    tl.store(Losses + row, loss)

    if GRADIENT:
        scale = tl.load(Scale)
        soft_scale = scale * soft_factor * inverse_temperature
        hard_scale = scale * weight_hard
        for first in range(0, vocabulary, BLOCK):
            column = first + lanes
            s, t, inside = load_rows(Student, Teacher, column, vocabulary, factor, KIND)
            q = tl.exp2(s - s_log)
            slope = tl.zeros((BLOCK,), dtype=tl.float32)
            if KIND == FORWARD_KL:
                slope = soft_scale * (q - tl.exp2(t - t_log))
            if KIND == REVERSE_KL:
                slope = soft_scale * q * ((s - s_log - t + t_log) * LN2 - inner)
            if KIND == JSD:
                m = tl.maximum(beta * tl.exp2(t - t_log) + (1 - beta) * q, TINY)
                slope = soft_scale * (1 - beta) * q * ((s - s_log - tl.log2(m)) * LN2 - inner)
            if HARD:
                sharp = q
                if not SAME:
                    sharp = tl.exp2(s / inverse_temperature - h_log)
                slope += hard_scale * (sharp - tl.where(column == label, 1.0, 0.0))
            tl.debug_barrier()
            tl.store(Gradient + column, slope.to(Gradient.dtype.element_ty), mask=inside)


@triton.jit
def multiply_kernel(X, Factor, numel, BLOCK: tl.constexpr):
    """X *= Factor, which is on the device; where it is 1, which a last loss has, nothing is read."""
    factor = tl.load(Factor).to(tl.float32)
    if factor == 1.0:
        return
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, numel, step):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(X + at, mask=at < numel).to(tl.float32) * factor
        tl.store(X + at, x.to(X.dtype.element_ty), mask=at < numel)


def loss_rows(student: Tensor, teacher: Tensor | None, labels: Tensor | None, scale: Tensor, losses: Tensor,
              gradient: Tensor | None, settings: LossSettings) -> None:  # fmt: skip
    """`rows.loss_rows_plain`, as one kernel. Columns are contiguous; rows of the gradient may begin where the student's
    do, in the same or a narrower dtype. Raises UsageError for dtypes that the kernel does not take here."""
    rows, vocabulary = student.shape
    interpreted = student.device.type == "cpu"  # where bfloat16 is computed wrongly
    if student.dtype == torch.float64 or (interpreted and torch.bfloat16 in _dtypes(student, gradient)):
        raise UsageError(f"The kernel does not take {student.dtype} on {student.device.type}: use backend='torch'.")
    target = student if gradient is None else gradient
    with _on(student.device):
        loss_rows_kernel[(rows,)](
            student, student if teacher is None else teacher, target, losses if labels is None else labels, scale,
            losses, vocabulary, student.stride(0), 0 if teacher is None else teacher.stride(0), target.stride(0),
            1.0 / settings.temperature, float(settings.beta), float(settings.soft_factor), float(settings.weight_hard),
            settings.ignore_index, KIND=KINDS.index(settings.divergence), HARD=settings.weight_hard != 0,
            LABELS=labels is not None, SAME=settings.temperature == 1, GRADIENT=gradient is not None,
            BLOCK=min(BLOCK, triton.next_power_of_2(vocabulary)), num_warps=WARPS,
        )  # fmt: skip


def multiply_(x: Tensor, factor: Tensor) -> Tensor:
    """x *= factor (0-dimensional, on x's device), without asking the device what it is. x is contiguous."""
    programs = min(triton.cdiv(x.numel(), UNIT_BLOCK), 4096)
    with _on(x.device):
        multiply_kernel[(programs,)](x, factor, x.numel(), BLOCK=UNIT_BLOCK, num_warps=UNIT_WARPS)
    return x


def _dtypes(*tensors: Tensor | None) -> set[torch.dtype]:
    return {x.dtype for x in tensors if x is not None}


def _on(device: torch.device):
    """Kernels start on the current device: make it this one."""
    elsewhere = device.type == "cuda" and device.index not in (None, torch.cuda.current_device())
    return torch.cuda.device(device) if elsewhere else nullcontext()
