"""Which loss a linear layer's rows are turned into, and what its inputs have to be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from effnlp_lab.distillation.losses import IGNORED
from effnlp_lab.errors import UsageError

Kind = Literal["none", "forward_kl", "reverse_kl", "jsd"]
KINDS: tuple[Kind, ...] = ("none", "forward_kl", "reverse_kl", "jsd")


@dataclass(frozen=True)
class LossSettings:
    """weight_soft * D(P, Q) [* T^2] + weight_hard * cross-entropy, of each position.

    kind: the divergence D; "none" is cross-entropy alone, and needs labels and no teacher. beta: of the generalized
    Jensen-Shannon divergence alone. The temperature softens D, never the cross-entropy. Positions whose label is
    `ignore_index` do not count. reduction: "mean" over the positions that count, or "sum".
    """

    kind: Kind = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    squared_temperature: bool = True
    weight_soft: float = 1.0
    weight_hard: float = 0.0
    ignore_index: int = IGNORED
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"The divergence {self.kind!r} is unknown: choose one of {', '.join(KINDS)}.")
        if not self.temperature > 0:
            raise UsageError(f"The temperature is {self.temperature}: expected a number above 0.")
        if not 0 <= self.beta <= 1:
            raise UsageError(f"beta is {self.beta}: expected a number from 0 (forward KL) to 1 (reverse KL).")
        if self.reduction not in ("mean", "sum"):
            raise UsageError(f"The reduction is {self.reduction!r}: expected 'mean' or 'sum'.")
        if self.kind == "none" and self.weight_hard == 0:
            raise UsageError("Nothing is left of this loss: choose a divergence, or a weight_hard above 0.")

    @property
    def divergence(self) -> Kind:
        """The divergence that is computed: the ends of beta are forward and reverse KL."""
        if self.kind == "jsd" and self.beta in (0, 1):
            return "forward_kl" if self.beta == 0 else "reverse_kl"
        return self.kind

    @property
    def soft_factor(self) -> float:
        return self.weight_soft * (self.temperature**2 if self.squared_temperature else 1.0)


def check_inputs(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor] | None, labels: Tensor | None,
                 settings: LossSettings) -> None:  # fmt: skip
    """Raise UsageError for hidden states, weights and labels that do not belong together."""
    rows, vocabulary = _check_pair("student", *student)
    if rows == 0:
        raise UsageError("There are no rows: the student's hidden states are empty.")
    if settings.kind != "none":
        if teacher is None:
            raise UsageError(f"{settings.kind} needs the teacher's hidden states and weight.")
        other_rows, other_vocabulary = _check_pair("teacher", *teacher)
        if (other_rows, other_vocabulary) != (rows, vocabulary):
            raise UsageError(
                f"Student and teacher need the same rows and vocabulary: {rows} and {vocabulary} beside "
                f"{other_rows} and {other_vocabulary}."
            )
        if teacher[0].device != student[0].device:
            raise UsageError(f"The teacher is on {teacher[0].device} and the student on {student[0].device}.")
    if labels is None:
        if settings.weight_hard != 0:
            raise UsageError(f"weight_hard={settings.weight_hard} needs labels [rows].")
    elif labels.shape != (rows,) or labels.dtype != torch.long:
        found = f"{labels.dtype} {tuple(labels.shape)}"
        raise UsageError(f"labels are {found}: expected int64, one of each of {rows} rows.")


def _check_pair(whose: str, hidden: Tensor, weight: Tensor) -> tuple[int, int]:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise UsageError(
            f"The {whose}'s hidden states and weight are {tuple(hidden.shape)} and {tuple(weight.shape)}: expected "
            "[rows, hidden] and [vocabulary, hidden]."
        )
    if hidden.dtype != weight.dtype or hidden.device != weight.device:
        raise UsageError(
            f"The {whose}'s hidden states are {hidden.dtype} on {hidden.device} and its weight {weight.dtype} on "
            f"{weight.device}: they have to be of one kind, in one place."
        )
    return hidden.shape[0], weight.shape[0]
