"""nbgrader's preprocessors, with ours in place of two: `nbgrader autograde` then grades through the proctor.

`RepairFromRelease` comes first among the sanitizing ones, `GradeInProctor` stands where `Execute` stood. The second
writes into every check's cell the proctor's report and its points, a plain number, before nbgrader reads them.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_output
from nbgrader.preprocessors import NbGraderPreprocessor
from traitlets import Bool, Unicode

from effnlp_grading.plan import CHECK, PREDICTION, Step, digest_of, steps_of
from effnlp_grading.proctor import Graded, Proctor
from effnlp_grading.records import Record, Seeds
from effnlp_grading.repair import repair
from effnlp_grading.sandbox import Sandbox, open_sandbox
from effnlp_lab import exercises
from effnlp_lab.device import resolve
from effnlp_lab.errors import EffnlpError
from effnlp_lab.notebook import report
from effnlp_lab.notebook.judge import CaseResult, Verdict

_open: dict[tuple[str, str, bool], Sandbox] = {}


def sandbox_of(lab: str, device: str, confined: bool = True) -> Sandbox:
    """This process's sandbox for a lab: one warm parent serves all of its submissions. The last used two stay open."""
    key = (lab, device, confined)
    if key not in _open:
        for old in list(_open)[:-1]:
            _open.pop(old).close()
        _open[key] = open_sandbox(lab, device, confined)
    return _open[key]


def close_sandboxes() -> None:
    while _open:
        _open.popitem()[1].close()


atexit.register(close_sandboxes)


def wants_sandbox() -> bool:
    """EFFNLP_SANDBOX=0 grades without one."""
    return os.environ.get("EFFNLP_SANDBOX", "1").strip().lower() not in ("0", "false", "no")


class RepairFromRelease(NbGraderPreprocessor):
    """Rebuilds the submitted notebook on the released one."""

    course = Unicode("", help="The course's folder.").tag(config=True)

    def preprocess(self, notebook: NotebookNode, resources: Any) -> tuple[NotebookNode, Any]:
        where = resources["nbgrader"]
        release = release_path(Path(self.course), where["assignment"], where["notebook"])
        if release is None:
            return notebook, resources
        done = repair(notebook, nbformat.read(release, as_version=4), f"The submission of {where['student']}")
        for sentence in done.sentences:
            self.log.warning("%s: %s", where["student"], sentence)
        resources["effnlp_mended"] = done.sentences
        return done.notebook, resources


class GradeInProctor(NbGraderPreprocessor):
    """Grades the notebook in the sandbox and writes verdicts and reports into its checks' cells."""

    course = Unicode("", help="The course's folder.").tag(config=True)
    sandbox = Bool(True, help="Run students' code in a sandbox. Without one it can do all that you can.").tag(
        config=True)

    def preprocess(self, notebook: NotebookNode, resources: Any) -> tuple[NotebookNode, Any]:
        where = resources["nbgrader"]
        try:
            lab = exercises.lab(where["assignment"])
        except EffnlpError as error:
            raise EffnlpError(f"{where['assignment']} is no lab of this kit, and GradeInProctor grades those alone: "
                              "give its own course another configuration.") from error
        device = resolve().kind
        folder = Path(self.course) / "grading"
        steps = steps_of(notebook, lab)
        path = record_path(folder, lab.name, where["student"])
        record = Record(path, digest_of(steps), {"student": where["student"]})
        if record.done is not None and _whole(record, steps):
            cells = {int(index): said for index, said in record.done.get("cells", {}).items()}
            graded = Graded(lab.name, where["student"], record.digest, record.verdicts, record.predictions, cells,
                            record.done.get("look", []))
        else:
            proctor = Proctor(sandbox_of(lab.name, device, self.sandbox and wants_sandbox()), Seeds.of_course(folder),
                              device=device)
            graded = proctor.grade(notebook, where["student"], record, resources.get("effnlp_mended", ()))
        write_verdicts(notebook, graded)
        show_rubrics(notebook, Path(self.course) / "solutions" / lab.name / f"{lab.notebook}.ipynb")
        for reason in graded.look:
            self.log.warning("%s: a person should look: %s", where["student"], reason)
        return notebook, resources


def record_path(folder: Path, lab: str, student: str) -> Path:
    """Where the verdicts on a submission are kept."""
    return folder / "verdicts" / lab / f"{student}.jsonl"


def release_path(course: Path, lab: str, notebook: str) -> Path | None:
    path = course / "labs" / lab / f"{notebook}.ipynb"
    return path if path.is_file() else None


def _whole(record: Record, steps: Sequence[Step]) -> bool:
    """Whether all that a notebook asks to be judged has a verdict."""
    return (all(s.exercise in record.verdicts for s in steps if s.kind == "check")
            and all(s.exercise in record.predictions for s in steps if s.kind == "predict"))


def write_verdicts(notebook: NotebookNode, graded: Graded) -> None:
    """Put the report and the points into each check's cell, and what other cells said into theirs."""
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        nbgrader = cell.metadata.get("nbgrader") or {}
        cell.outputs = _said(graded.cells.get(index))
        if nbgrader.get("grade") and not nbgrader.get("solution"):
            grade_id = str(nbgrader.get("grade_id", ""))
            kept = graded.predictions if grade_id.startswith(PREDICTION) else graded.verdicts
            cell.outputs = _verdict_outputs(kept.get(grade_id.removeprefix(PREDICTION).removeprefix(CHECK)))


def show_rubrics(notebook: NotebookNode, solved: Path) -> None:
    """Put the rubric of each written answer above it, for whoever grades it; it stands in the solved notebook."""
    if not solved.is_file():
        return
    rubrics = {grade_id: cell.source for cell in nbformat.read(solved, as_version=4).cells
               if (grade_id := _written_id(cell))}
    for index in reversed(range(len(notebook.cells))):
        rubric = rubrics.get(_written_id(notebook.cells[index]))
        if rubric:
            notebook.cells.insert(index, new_markdown_cell(rubric, id=f"rubric-{index}"))


def _written_id(cell: NotebookNode) -> str:
    """The name of a written answer's cell; "" for all other cells."""
    nbgrader = cell.metadata.get("nbgrader") or {}
    written = cell.cell_type == "markdown" and nbgrader.get("grade") and nbgrader.get("solution")
    return str(nbgrader.get("grade_id", "")) if written else ""


def verdict_from(told: dict[str, Any]) -> Verdict:
    """A kept verdict as the report knows it."""
    fields = {name: told[name] for name in Verdict.__dataclass_fields__ if name in told}
    return Verdict(**{**fields, "cases": [CaseResult(**case) for case in told.get("cases", [])]})


def _verdict_outputs(told: dict[str, Any] | None) -> list[NotebookNode]:
    if told is None:
        return [new_output("display_data", {"text/plain": "This check was not graded."}),
                new_output("execute_result", {"text/plain": "0.0"})]
    verdict = verdict_from({"exercise": told.get("prediction", ""), "seed": 0, "variant": {}, "device": "", **told})
    shown = {"text/html": report.markup(verdict), "text/plain": report.text(verdict)}
    return [new_output("display_data", shown), new_output("execute_result", {"text/plain": repr(float(verdict.score))})]


def _said(cell: dict[str, Any] | None) -> list[NotebookNode]:
    if cell is None:
        return []
    outputs = [new_output("stream", name="stdout", text=cell["printed"])] if cell.get("printed") else []
    if cell.get("ended"):
        outputs.append(new_output("stream", name="stdout", text=f"{cell['ended']}\n"))
    return outputs
