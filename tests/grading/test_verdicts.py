"""What nbgrader makes of a check's outputs once `ReadVerdicts` has read them. nbgrader's own rule is the other half."""

from __future__ import annotations

import pytest
from effnlp_grading.verdicts import ReadVerdicts
from nbformat.v4 import new_code_cell, new_notebook, new_output
from nbgrader.utils import determine_grade


def result(text: str):
    return new_output("execute_result", {"text/plain": text})


def stream(name: str):
    return new_output("stream", name=name, text="words\n")


ERROR = new_output("error", ename="NameError", evalue="x", traceback=["x"])
REPORT = new_output("display_data", {"text/html": "<div>full points</div>"})


@pytest.mark.parametrize(("outputs", "points"), [
    ([REPORT, result("2.0")], 2.0),
    ([REPORT, result("1.35")], 1.35),
    ([result("0.0")], 0.0),
    ([stream("stderr"), result("2.0")], 2.0),
    ([stream("stdout"), REPORT, result("0.7"), stream("stderr")], 0.7),
    ([], 0.0),
    ([REPORT], 0.0),
    ([result("None")], 0.0),
    ([result("nan")], 0.0),
    ([result("inf")], 0.0),
    ([result("-1.0")], 0.0),
    ([result("2.5")], 0.0),
    ([result("np.float64(2.0)")], 0.0),
    ([result("'2.0'")], 0.0),
    ([new_output("execute_result", {"text/html": "2.0"})], 0.0),
    ([ERROR], 0.0),
    ([result("nan"), ERROR], 0.0),
])
def test_points(outputs, points):
    cell = new_code_cell("check('x', x)", outputs=outputs, metadata={"nbgrader": {
        "grade": True, "grade_id": "test_x", "locked": True, "points": 2, "schema_version": 3, "solution": False,
        "task": False}})
    notebook, _ = ReadVerdicts().preprocess(new_notebook(cells=[cell]), {})
    assert determine_grade(notebook.cells[0]) == (points, 2.0)


def test_other_cells_stay_as_they_are():
    cell = new_code_cell("print('words')", outputs=[stream("stderr")])
    notebook, _ = ReadVerdicts().preprocess(new_notebook(cells=[cell]), {})
    assert notebook.cells[0].outputs == [stream("stderr")]
