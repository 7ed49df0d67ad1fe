"""How the grading of one submission ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from effnlp_grading.course import Grade

State = Literal["graded", "kept", "not graded"]


@dataclass(frozen=True)
class Result:
    """How the grading of one submission ended. "kept": it was graded before and has not changed since.

    `look` has a sentence for everything that a person should look at: what was mended, lost, or odd.
    """

    student: str
    lab: str
    state: State
    seconds: float = 0.0
    message: str = ""
    grade: Grade | None = None
    look: tuple[str, ...] = ()
