"""Loss and gradient of rows of logits in PyTorch: the twin of kernel_rows.py.

With x = log Q and y = log P at temperature T, the gradients with respect to the student's logits are

    forward KL     (Q - P) / T
    reverse KL     Q (x - y - KL(Q || P)) / T
    JSD            (1 - beta) Q (x - log M - KL(Q || M)) / T,     M = beta P + (1 - beta) Q
    cross-entropy  softmax(z) - onehot(label)

The first is the derivative of logsumexp; the others have the form Q (f - sum Q f), the derivative of a softmax.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effnlp_lab.distillation.settings import LossSettings


def loss_rows_plain(student: Tensor, teacher: Tensor | None, labels: Tensor | None, scale: Tensor, losses: Tensor,
                    gradient: Tensor | None, settings: LossSettings) -> None:  # fmt: skip
    """Write the loss of each row, and its gradient times `scale`, for a chunk of logits.

    student, teacher [rows, vocabulary]; labels [rows]; scale: 0-dimensional, on their device; losses [rows]; gradient
    [rows, vocabulary], which may share the student's memory, or None.
    """
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    z = student.to(wide)
    total, slope = torch.zeros(z.shape[0], dtype=wide, device=z.device), torch.zeros_like(z)
    if settings.kind != "none":
        x = (z / settings.temperature).log_softmax(-1)
        y = (teacher.to(wide) / settings.temperature).log_softmax(-1)
        soft, soft_slope = _divergence(x, y, settings)
        total += settings.soft_factor * soft
        slope += settings.soft_factor / settings.temperature * soft_slope
    if settings.weight_hard:
        log_q, counts = z.log_softmax(-1), labels != settings.ignore_index
        index = torch.where(counts, labels, 0)[:, None]
        total -= settings.weight_hard * log_q.gather(1, index).squeeze(1)
        slope += settings.weight_hard * log_q.exp().scatter_add(1, index, -torch.ones_like(index, dtype=wide))
    if labels is not None:
        left_out = labels == settings.ignore_index
        total = total.masked_fill(left_out, 0.0)
        slope = slope.masked_fill(left_out[:, None], 0.0)
    losses.copy_(total)
    if gradient is not None:
        gradient.copy_(slope * scale)


def _divergence(x: Tensor, y: Tensor, settings: LossSettings) -> tuple[Tensor, Tensor]:
    """The divergence of each row [rows], and its derivative with respect to logits / T [rows, vocabulary]."""
    q, p = x.exp(), y.exp()
    if settings.divergence == "forward_kl":
        return (p * (y - x)).sum(-1), q - p
    if settings.divergence == "reverse_kl":
        loss = (q * (x - y)).sum(-1)
        return loss, q * (x - y - loss[:, None])
    beta = settings.beta
    log_m = torch.logaddexp(y + math.log(beta), x + math.log(1 - beta))
    inner = (q * (x - log_m)).sum(-1)
    loss = beta * (p * (y - log_m)).sum(-1) + (1 - beta) * inner
    return loss, (1 - beta) * q * (x - log_m - inner[:, None])
