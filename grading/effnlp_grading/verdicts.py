"""A preprocessor that makes nbgrader read from a check what the check says, and nothing else.

nbgrader gives a graded cell nothing when anything is written to stderr under it (a compiler's warning suffices), and
full marks when it ends without a result, or with None, nan or some text. Here a check counts by its result, a plain
number from 0 to the cell's points; without one it is worth an explicit 0.
"""

from __future__ import annotations

import math
from typing import Any

from nbformat import NotebookNode
from nbformat.v4 import new_output
from nbgrader.preprocessors import NbGraderPreprocessor
from nbgrader.utils import is_grade, is_solution


class ReadVerdicts(NbGraderPreprocessor):
    """Runs after the submission is executed and before its points are saved."""

    def preprocess_cell(self, cell: NotebookNode, resources: Any, index: int) -> tuple[NotebookNode, Any]:
        if cell.cell_type == "code" and is_grade(cell) and not is_solution(cell):
            for output in cell.outputs:
                if output.output_type == "stream" and output.name == "stderr":
                    output.name = "stdout"
            telling = [output for output in cell.outputs if output.output_type in ("error", "execute_result")]
            failed = bool(telling) and telling[0].output_type == "error"
            if not failed and points_of(cell) is None:
                why = "The check reported no points: 0 points."
                cell.outputs.insert(0, new_output("error", ename="NoVerdict", evalue=why, traceback=[why]))
        return cell, resources


def points_of(cell: NotebookNode) -> float | None:
    """The points that a graded cell's result states; None where it states none that can be right."""
    results = [output for output in cell.outputs if output.output_type == "execute_result"]
    try:
        points = float(results[0].data["text/plain"])
    except (IndexError, KeyError, TypeError, ValueError):
        return None
    return points if math.isfinite(points) and 0 <= points <= float(cell.metadata.nbgrader["points"]) else None
