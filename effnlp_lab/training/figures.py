"""The figures of a run: what it came to, and those of steps that the device has not been asked for yet."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from effnlp_lab.errors import UsageError
from effnlp_lab.training.accumulation import Accumulated


@dataclass
class TrainingResult:
    """What a run came to. Losses are means over tokens; `losses` and `evaluations` map a step to its loss.

    Step s is the state after s updates; a loss at step s was measured on the batch of the s-th update, before it.
    `seconds` counts training alone, and `tokens_per_second` is over that time.
    """

    step: int = 0
    losses: dict[int, float] = field(default_factory=dict)
    evaluations: dict[int, float] = field(default_factory=dict)
    best_step: int | None = None
    best_loss: float = math.inf
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Figures:
    """Losses, counts and norms of steps, kept on the device until `read` fetches them all at once."""

    def __init__(self, device: torch.device) -> None:
        self.dtype = torch.float64 if device.type == "cpu" else torch.float32
        self.device = device
        self._rows: list[tuple[int, float | None, Tensor]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def clear(self) -> None:
        self._rows.clear()

    def add(self, step: int, totals: Accumulated, norm: Tensor | None, rate: float | None) -> None:
        """Of one step: sum of losses, token count, norm of the gradient before clipping, learning rate."""
        norm = torch.full_like(totals.loss_sum, math.nan) if norm is None else norm
        figures = [x.detach().to(self.device, self.dtype) for x in (totals.loss_sum, totals.count, norm)]
        self._rows.append((step, rate, torch.stack(figures)))

    def read(self, before: str) -> list[dict[str, Any]]:
        """One line for the log of each step, and forget them. Waits for the device.

        Raises UsageError for a step without a token or with a loss that is not finite; `before` says what is kept.
        """
        values = torch.stack([figures for *_, figures in self._rows]).tolist()
        lines = []
        for (step, rate, _), (total, count, norm) in zip(self._rows, values, strict=True):
            if count == 0:
                raise UsageError(
                    f"All labels of step {step} are masked (-100), so there is nothing to learn; {before}."
                )
            if not math.isfinite(total):
                raise UsageError(
                    f"The loss of step {step} is {total}: try a lower learning rate, a longer warm-up, clip_norm=1.0, "
                    f"or bfloat16 in place of float16, and look for bad values in that batch; {before}."
                )
            line = {"step": step, "loss": total / count, "tokens": int(count), "learning_rate": rate}
            lines.append(line | ({"gradient_norm": norm} if math.isfinite(norm) else {}))
        self._rows.clear()
        return lines
