"""The losses of distillation, as they are defined, on whole logits. P is the teacher's distribution, Q the student's.

Both are softened by a temperature T: softmax(z / T). The gradient of a divergence of softened distributions with
respect to z falls as 1/T^2, so the loss is multiplied by T^2 to keep its weight beside the hard loss (Hinton, Vinyals
and Dean 2015, section 2). All means are over the positions that count, never over the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from effnlp_lab.errors import UsageError

IGNORED = -100
"""The label of a position that does not count (PyTorch's and transformers' own number)."""


def soft_targets(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """softmax(logits / temperature) over the last dimension, in float32 or wider. logits [..., vocabulary]."""
    return (_wide(logits) / _checked(temperature)).softmax(-1)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, *,
               temperature: float = 1.0, squared_temperature: bool = True) -> Tensor:  # fmt: skip
    """Mean of KL(P || Q) = sum_x P log(P / Q) over positions: Q has to cover all of P. Scalar, in nats.

    Both logits are [..., vocabulary]; labels [...]: positions with -100 do not count. With `squared_temperature` the
    result is multiplied by T^2. Raises UsageError for shapes that differ and a temperature that is not positive.
    """
    log_q, log_p = _log_distributions(student_logits, teacher_logits, temperature)
    return _mean(_kl(log_p, log_q), labels) * (temperature**2 if squared_temperature else 1.0)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, *,
               temperature: float = 1.0, squared_temperature: bool = True) -> Tensor:  # fmt: skip
    """Mean of KL(Q || P): Q is punished where P is small, and may leave modes out. Arguments as of `forward_kl`."""
    log_q, log_p = _log_distributions(student_logits, teacher_logits, temperature)
    return _mean(_kl(log_q, log_p), labels) * (temperature**2 if squared_temperature else 1.0)


def jensen_shannon(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, *, beta: float = 0.5,
                   temperature: float = 1.0, squared_temperature: bool = True) -> Tensor:  # fmt: skip
    """Mean of beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q (Agarwal et al. 2024, equation 1).

    beta in (0, 1). At 0 and 1 the definition is zero, and its limits, divided by beta and 1 - beta, are forward and
    reverse KL: as liger-kernel does, 0 means forward KL and 1 reverse KL. Other arguments as of `forward_kl`.
    """
    if not 0 <= beta <= 1:
        raise UsageError(f"beta is {beta}: expected a number from 0 (forward KL) to 1 (reverse KL).")
    if beta in (0, 1):
        other = forward_kl if beta == 0 else reverse_kl
        return other(student_logits, teacher_logits, labels, temperature=temperature,
                     squared_temperature=squared_temperature)  # fmt: skip
    log_q, log_p = _log_distributions(student_logits, teacher_logits, temperature)
    weights = torch.tensor([beta, 1 - beta], dtype=log_q.dtype, device=log_q.device).log()
    log_m = torch.logaddexp(log_p + weights[0], log_q + weights[1])
    rows = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    return _mean(rows, labels) * (temperature**2 if squared_temperature else 1.0)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of -log Q(label) over positions whose label is not -100. logits [..., vocabulary], labels [...]."""
    _check_labels(logits, labels)
    total = F.cross_entropy(_wide(logits).flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def hidden_cosine(student_hidden: Tensor, teacher_hidden: Tensor, labels: Tensor | None = None) -> Tensor:
    """Mean of 1 - cos(h_student, h_teacher) over positions (the cosine loss of Sanh et al. 2019, section 3).

    Both hidden states are [..., hidden], of the same width. Raises UsageError where the widths differ.
    """
    if student_hidden.shape != teacher_hidden.shape:
        raise UsageError(
            f"The cosine compares hidden states of one shape, and these are {tuple(student_hidden.shape)} and "
            f"{tuple(teacher_hidden.shape)}: give the student the teacher's width, or leave this loss out."
        )
    rows = 1 - F.cosine_similarity(_wide(student_hidden), _wide(teacher_hidden), dim=-1)
    return _mean(rows, labels)


def _log_distributions(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    if student_logits.shape != teacher_logits.shape:
        raise UsageError(
            f"The logits of student {tuple(student_logits.shape)} and teacher {tuple(teacher_logits.shape)} differ in "
            "shape: both need the same positions and the same vocabulary."
        )
    return tuple((_wide(x) / _checked(temperature)).log_softmax(-1) for x in (student_logits, teacher_logits))


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(A || B) of each row, from logarithms [..., vocabulary]; what A never takes adds nothing."""
    return torch.where(log_a == -torch.inf, 0.0, log_a.exp() * (log_a - log_b)).sum(-1)


def _mean(rows: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        return rows.mean()
    if labels.shape != rows.shape:
        expected = tuple(rows.shape)
        raise UsageError(f"labels have shape {tuple(labels.shape)}: expected one of each position, {expected}.")
    counts = labels != IGNORED
    return torch.where(counts, rows, 0.0).sum() / counts.sum().clamp(min=1)


def _check_labels(logits: Tensor, labels: Tensor) -> None:
    if labels.shape != logits.shape[:-1]:
        expected = tuple(logits.shape[:-1])
        raise UsageError(f"labels have shape {tuple(labels.shape)}: expected one of each position, {expected}.")


def _checked(temperature: float) -> float:
    if not temperature > 0:
        raise UsageError(f"The temperature is {temperature}: expected a number above 0 (1 leaves the logits alone).")
    return temperature


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
