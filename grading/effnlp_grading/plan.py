"""What grading a notebook consists of: the cells to run and the exercises to judge, in the notebook's order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nbformat import NotebookNode

from effnlp_lab.exercises.spec import Lab

CHECK = "test_"  # a check's grade_id is this and its exercise
PREDICTION = "predict_"  # of the cell under a prediction, and its name


@dataclass(frozen=True)
class Step:
    """One code cell: `run` executes it, `check` judges `exercise`, `predict` the prediction that `exercise` names.

    `answers` names the exercise that a cell solves, `predicts` the prediction that it makes.
    """

    kind: Literal["run", "check", "predict"]
    index: int
    source: str
    exercise: str = ""
    answers: str = ""
    given: bool = False
    predicts: str = ""


def steps_of(notebook: NotebookNode, lab: Lab) -> list[Step]:
    """The code cells that grading runs or judges. Demos are left out, and an exercise is judged once."""
    steps, judged = [], set()
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        nbgrader = cell.metadata.get("nbgrader") or {}
        name = str(nbgrader.get("grade_id", ""))
        if nbgrader.get("grade") and not nbgrader.get("solution"):
            exercise = name.removeprefix(CHECK)
            if exercise in {e.name for e in lab.exercises} and exercise not in judged:
                judged.add(exercise)
                steps.append(Step("check", index, cell.source, exercise))
            elif name not in judged and name.removeprefix(PREDICTION) in {p.name for p in lab.predictions}:
                judged.add(name)
                steps.append(Step("predict", index, cell.source, name.removeprefix(PREDICTION)))
        elif "demo" not in cell.metadata.get("tags", []) and cell.source.strip():
            answers = name if nbgrader.get("solution") else ""
            given = bool(nbgrader.get("locked")) or cell.get("id") == "parameters"
            predicts = str((cell.metadata.get("effnlp") or {}).get("predict", ""))
            steps.append(Step("run", index, cell.source, answers=answers, given=given, predicts=predicts))
    return steps


def digest_of(steps: Sequence[Step]) -> str:
    """What identifies the answers of a submission: all that grading runs, and in which order."""
    told = json.dumps([[s.kind, s.exercise, s.answers, s.source] for s in steps])
    return hashlib.sha256(told.encode()).hexdigest()
