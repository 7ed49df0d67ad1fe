"""`effnlp submit`: a submission checked on the student's machine before it is handed in, and what the grader will say.

What an editor lost is repaired as the grader repairs it. Every exercise is judged by the grader's own proctor on fresh
cases, its cells in processes of their own, but without the sandbox: it is the student's own code. Where the system has
no such processes (macOS, Windows) one process runs the notebook and its checks. Nothing of nbgrader is needed.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from effnlp_grading.plan import Step, steps_of
from effnlp_grading.records import Seeds, read_record
from effnlp_grading.repair import Repaired, RepairError, plain, read_submission, repair
from effnlp_grading.scan import forbidden_in, signs_in
from effnlp_lab import exercises
from effnlp_lab.blanks import STUB, TEXT_STUB
from effnlp_lab.device import resolve
from effnlp_lab.errors import UsageError
from effnlp_lab.exercises.closeness import predicted_values
from effnlp_lab.exercises.spec import Lab
from effnlp_lab.notebook.judge import Verdict, versions
from effnlp_lab.runner import course_root, kill_tree

PORTABLE_SECONDS = 1800.0
UNTOUCHED = "grading/released"  # of a student's repository: the labs as they were released
_START = re.compile(r"effnlp_lab\.start\(\s*['\"](\w+)['\"]")


@dataclass
class Checked:
    """What was found. `wrong` keeps it from being handed in; `missing` costs points; `look` a person will look at."""

    lab: Lab
    notebook: NotebookNode
    verdicts: dict[str, dict[str, Any]]
    mended: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    look: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    @property
    def score(self) -> float:
        return sum(verdict["score"] for verdict in self.verdicts.values())


def main(path: Path, lab: str | None = None, out: Path | None = None, device: str = "auto") -> int:
    """Check a notebook and print what the grader will say; return 0 when it can be handed in, else 1.

    With `out` a repaired copy is written there under the name that hand-in expects.
    """
    if not path.is_file():
        raise UsageError(f"There is no file {path}: name the notebook that you want to hand in.")
    target = resolve(device).kind
    try:
        submission = read_submission(path.read_bytes(), path.name)
        spec = exercises.lab(lab) if lab else lab_of(submission, path)
        checked = check(submission, spec, path, target)
    except RepairError as error:
        print(f"{error}\nIt cannot be handed in.")
        return 1
    print("\n".join(told(checked, path, target)))
    if out is not None:
        print(f"A copy to hand in: {write(checked, path, out)}")
    return 1 if checked.wrong else 0


def check(submission: NotebookNode, lab: Lab, path: Path, device: str) -> Checked:
    """Repair and judge. Raises RepairError for a notebook of which nothing belongs to the lab."""
    release = untouched_release(lab, path)
    whole = Repaired(submission) if release is None else repair(submission, release, path.name)
    steps = steps_of(whole.notebook, lab)
    verdicts, stopped = judge(whole.notebook, lab, device)
    found = Checked(lab, whole.notebook, verdicts, mended=list(whole.mended))
    if release is None:
        found.unchecked.append("Whether an editor lost or changed cells: no untouched copy of the lab is here. Run "
                               "this in the course's folder, with jupytext installed.")  # fmt: skip
    if not _has("nbgrader") and not _in_a_students_repository():
        found.unchecked.append("Whether nbgrader itself reads it: nbgrader is not installed here, and need not be; the "
                               "grader rebuilds what it needs.")  # fmt: skip
    found.wrong += [f"The answer cell of {name} is gone: take it from a fresh copy of the lab." for name in whole.lost]
    found.wrong += stopped
    _read_exercises(found, steps)
    _read_rest(found, steps)
    found.look += signs_in(steps)
    return found


def judge(notebook: NotebookNode, lab: Lab, device: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Verdicts by exercise, and sentences on cells that stop. Seeds are fresh: the grader's are others."""
    if not hasattr(os, "pidfd_open"):
        return judge_apart(notebook, lab, device)
    from effnlp_grading.proctor import Proctor
    from effnlp_grading.sandbox import open_sandbox
    from effnlp_lab.notebook.setting import student

    who = student()
    key = os.environ.get("EFFNLP_VARIANT_KEY", "") if who else ""
    with open_sandbox(lab.name, device, sandbox=False) as room:
        graded = Proctor(room, Seeds(os.urandom(32)), device=device, variant_key=key).grade(notebook, who or "you")
    return graded.verdicts, [sentence for index, said in sorted(graded.cells.items())
                             if (sentence := _stopped(notebook.cells[index].source, said))]  # fmt: skip


def judge_apart(notebook: NotebookNode, lab: Lab, device: str, seconds: float = PORTABLE_SECONDS,
                ) -> tuple[dict[str, dict[str, Any]], list[str]]:  # fmt: skip
    """The same in one process, of any system: where it ends, the exercises after that are not judged."""
    with tempfile.TemporaryDirectory(prefix="effnlp-submit-") as place:
        source, kept = Path(place) / "notebook.ipynb", Path(place) / "verdicts.jsonl"
        nbformat.write(notebook, source)
        command = [sys.executable, "-m", "effnlp_grading.alone", lab.name, str(source), str(kept), device]
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, env=environment)  # fmt: skip
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            kill_tree(process)
        verdicts = {verdict["exercise"]: verdict for verdict in read_record(kept)}
    stopped = []
    for step in steps_of(notebook, lab):
        if step.kind == "check" and step.exercise not in verdicts:
            why = "ended its process" if code is not None else f"had not finished after {seconds:.0f} s"
            if not stopped:
                stopped.append(f"The notebook {why} before {step.exercise} was judged: run it from the start.")
            points = float(lab.exercise(step.exercise).points)
            unjudged = Verdict(step.exercise, lab.name, "crashed", 0.0, points, "Not judged: the notebook stopped.", 0,
                               {}, device, versions=versions())  # fmt: skip
            verdicts[step.exercise] = unjudged.to_json()
    return verdicts, stopped


def lab_of(submission: NotebookNode, path: Path) -> Lab:
    """The lab that a notebook starts, else the one that its name says. Raises UsageError where neither does."""
    from effnlp_lab.cli import match_lab

    named = [match for cell in submission.cells for match in _START.findall(cell.source)]
    if named and named[0] in exercises.lab_names():
        return exercises.lab(named[0])
    try:
        return exercises.lab(match_lab(path.stem))
    except UsageError as error:
        raise UsageError(f"{path.name} does not say which lab it is of: name it with --lab.") from error


def untouched_release(lab: Lab, submission: Path) -> NotebookNode | None:
    """The lab as students get it: built from its master with nbgrader; else the copy that a student's repository has;
    else another file than `submission` with every blank in it; else as git keeps it; else built without nbgrader and
    its checksums. None where there is none of these.
    """
    try:
        root = course_root()
    except UsageError:
        return None
    master = root / "solutions" / lab.name / f"{lab.notebook}.py"
    can_build = master.is_file() and _has("jupytext")
    if can_build and _has("nbgrader"):
        from effnlp_lab.build import release_notebook
        from effnlp_lab.master import read_master

        return release_notebook(read_master(master))
    kept = root / UNTOUCHED / f"{lab.name}.ipynb"
    if kept.is_file():
        return nbformat.read(kept, as_version=4)
    released = root / "labs" / lab.name / f"{lab.notebook}.ipynb"
    if released.is_file() and not released.samefile(submission):
        found = nbformat.read(released, as_version=4)
        if _untouched(found):
            return found
    if shutil.which("git"):
        shown = subprocess.run(["git", "show", f"HEAD:./{released.relative_to(root).as_posix()}"], cwd=root,
                               capture_output=True, check=False)  # fmt: skip
        if shown.returncode == 0:
            found = nbformat.reads(shown.stdout.decode("utf-8"), as_version=4)
            if _untouched(found):
                return found
    return _blanked(master) if can_build else None


def told(checked: Checked, path: Path, device: str) -> list[str]:
    """The report, line by line."""
    lab = checked.lab
    lines = [f"{path.name}: lab {lab.number}, {lab.title}, judged on {device}.", ""]
    width = max([len(name) for name in checked.verdicts], default=0)
    for name, verdict in checked.verdicts.items():
        points = f"{verdict['score']:g} of {verdict['points']:g}" if verdict["points"] else "badge"
        why = "" if verdict["state"] in ("correct", "not attempted") else f"  {verdict['sentence']}"
        likely = f" Likely: {' '.join(verdict['mistakes'])}" if verdict.get("mistakes") else ""
        lines.append(f"  {name:<{width}}  {points:>11}  {verdict['state']}{why}{likely}")
    rest = [f"up to {sum(p.points for p in lab.predictions):g} for predictions by closeness" if lab.predictions else "",
            f"up to {sum(w.points for w in lab.written):g} for written answers, by a person" if lab.written else ""]
    rest = [one for one in rest if one]
    lines += ["", f"In all {checked.score:g} of {lab.checked_points:g} points for what is checked"
              f"{'; besides, ' + ' and '.join(rest) if rest else ''}."]  # fmt: skip
    for title, sentences in (("Repaired, as the grader will repair it:", checked.mended), ("Missing:", checked.missing),
                             ("A person will look at this:", checked.look), ("Not checked:", checked.unchecked),
                             ("To be put right before it is handed in:", checked.wrong)):
        lines += ["", title, *(f"  {sentence}" for sentence in sentences)] if sentences else []
    lines += ["", "The grader draws other random cases, in a sandbox with limits on time and memory: an answer that is "
              "right only by chance may earn less there."]
    lines.append("It cannot be handed in yet." if checked.wrong else "It can be handed in.")
    return lines


def write(checked: Checked, path: Path, out: Path) -> Path:
    """Write the repaired notebook into the folder `out`. Raises UsageError where that would replace the original."""
    target = out / f"{checked.lab.notebook}.ipynb"
    if target.exists() and target.samefile(path):
        raise UsageError(f"{target} is the notebook itself: name another folder with --out.")
    out.mkdir(parents=True, exist_ok=True)
    nbformat.write(checked.notebook, target)
    return target


def _stopped(source: str, said: dict[str, Any]) -> str:
    """A sentence on a cell that ended its process or raised; a blank that is called says so by itself."""
    first = next((line.strip() for line in source.splitlines() if line.strip()), "")
    if "ended" in said:
        return f"{said['ended']} It begins: {first}"
    kind, message = said.get("error") or ("NotImplementedError", "")
    return "" if kind == "NotImplementedError" else f"This cell stops with {kind}: {message} It begins: {first}"


def _read_exercises(found: Checked, steps: Sequence[Step]) -> None:
    wanted = [e for e in found.lab.exercises if e.twin_of is None]
    absent = [e.name for e in wanted if e.name not in found.verdicts]
    found.wrong += [f"The check of {name} is gone: take it from a fresh copy of the lab." for name in absent]
    for spec in found.lab.exercises:
        used = set(forbidden_in(spec, steps))
        for case in found.verdicts.get(spec.name, {}).get("cases", []):
            used |= {case["details"]["forbidden"]} if "forbidden" in case["details"] else set()
        if used:
            found.wrong.append(f"{spec.name} uses {', '.join(sorted(used))}, which would answer for you.")
    states = {e.name: found.verdicts[e.name]["state"] for e in wanted if e.name in found.verdicts}
    blank = [name for name, state in states.items() if state == "not attempted"]
    badges = {e.name for e in wanted if not e.points}
    found.missing += [f"{name} is not attempted{' (a badge, no points)' if name in badges else ''}." for name in blank]
    if blank and len(blank) == len(wanted):
        found.wrong.append("Nothing is attempted yet.")
    found.missing += [f"{name} was not run here: {found.verdicts[name]['sentence']}" for name, state in states.items()
                      if state == "not run here"]  # fmt: skip


def _read_rest(found: Checked, steps: Sequence[Step]) -> None:
    for prediction in found.lab.predictions:
        source = next((step.source for step in steps if step.predicts == prediction.name), "")
        absent = [name for name, value in predicted_values(prediction, source).items() if value is None]
        if absent:
            found.missing.append(f"The prediction {prediction.name} has no number for {', '.join(absent)}.")
    cells = {(c.metadata.get("nbgrader") or {}).get("grade_id"): c.source for c in found.notebook.cells}
    for question in found.lab.written:
        if plain(cells.get(f"written_{question.name}", "")) in ("", plain(TEXT_STUB)):
            found.missing.append(f"The written answer {question.name} is empty.")


def _blanked(path: Path) -> NotebookNode:
    """What the release has of cells and metadata, but for nbgrader's checksums, which the grader adds."""
    from effnlp_lab.build import opened, solution_notebook
    from effnlp_lab.master import blank_source, read_master

    master = read_master(path)
    notebook = copy.deepcopy(solution_notebook(master))
    for cell in notebook.cells:
        nbgrader = cell.metadata.get("nbgrader", {})
        if nbgrader.get("solution"):
            written = bool(nbgrader.get("grade"))
            cell.source = TEXT_STUB if written else blank_source(master.exercise_cell(nbgrader["grade_id"]))
    return opened(notebook, master)


def _untouched(notebook: NotebookNode) -> bool:
    """Whether every answer is still a blank."""
    answers = [c for c in notebook.cells if c.cell_type == "code" and
               (c.metadata.get("nbgrader") or {}).get("solution")]  # fmt: skip
    return bool(answers) and all(STUB in cell.source for cell in answers)


def _in_a_students_repository() -> bool:
    """Where nbgrader is not expected, and the grader's own repair has whole labs to go by."""
    try:
        return (course_root() / UNTOUCHED).is_dir()
    except UsageError:
        return False


def _has(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # it was taken out of sys.modules
        return False
