"""A made-up class: a perfect student, a blank one, and six who make one known mistake after another.

Student k makes the k-th known mistake of every exercise; where an exercise has fewer, they are counted around.
"""

from __future__ import annotations

import copy
import csv
import linecache
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

from effnlp_lab import exercises
from effnlp_lab.errors import UsageError
from effnlp_lab.exercises.spec import Lab
from effnlp_lab.master import Master, solution_source
from effnlp_lab.notebook.check import verdict_of

PERFECT, BLANK = "perfect", "blank"
MISTAKEN = tuple(f"student_{k}" for k in range(1, 7))
CLASS = (PERFECT, BLANK, *MISTAKEN)
GIVEN = ("Ada", "Grace", "Alan", "Emmy", "Edsger", "Sofia", "Omar")
FAMILY = ("Ng", "Okafor", "Kowalska", "Haddad", "Berg", "Silva")


def describe(student: str) -> str:
    """What one of the class does, in words."""
    if student == PERFECT:
        return "solves every exercise"
    if student == BLANK:
        return "leaves every blank"
    return f"mistake {_number(student)} of every exercise"


def answers(student: str, master: Master) -> dict[str, str]:
    """What a student of the class writes: exercise -> the text of its cell. A blank student writes nothing."""
    if student == BLANK:
        return {}
    solved = {e.name: solution_source(master.exercise_cell(e.name)).strip("\n") for e in master.lab.exercises}
    if student == PERFECT:
        return solved
    return {name: mistakes_of(master.lab, name).get(mistake_of(student, master.lab, name), solved[name]).strip("\n")
            for name in solved}


def mistake_of(student: str, lab: Lab, exercise: str) -> str | None:
    """The name of the mistake that a student makes in an exercise; None where no mistake is known."""
    names = list(mistakes_of(lab, exercise))
    return names[(_number(student) - 1) % len(names)] if names else None


def mistakes_of(lab: Lab, exercise: str) -> dict[str, str]:
    """The known mistakes of an exercise: name -> the text of the wrong cell."""
    return exercises.sources(lab.name)["exercises"].get(exercise, {}).get("mistakes", {})


def submission(release: NotebookNode, written: Mapping[str, str]) -> NotebookNode:
    """The released notebook with `written` in place of its blanks. The release itself stays as it is."""
    notebook = copy.deepcopy(release)
    for cell in notebook.cells:
        nbgrader = cell.metadata.get("nbgrader", {})
        if nbgrader.get("solution") and nbgrader["grade_id"] in written:
            cell.source = written[nbgrader["grade_id"]]
    return notebook


def submit(student: str, master: Master, labs: Path, submitted: Path) -> Path:
    """Write a student's submission of a lab, made from the release under `labs`; return its path."""
    import nbformat

    name = f"{master.lab.notebook}.ipynb"
    release = labs / master.lab.name / name
    if not release.is_file():
        raise UsageError(f"{master.lab.name} is not released: expected {release}; run `nbgrader generate_assignment`.")
    path = submitted / student / master.lab.name / name
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(submission(nbformat.read(release, as_version=4), answers(student, master)), path)
    return path


def hand_in(folder: Path, master: Master, labs: Path, size: int) -> tuple[Path, Path]:
    """Write to `folder` what Canvas hands out of a class of `size`, and the class's roster: zip and CSV file.

    Every student does as one of CLASS does, in turn; one in ten hands in nothing.
    """
    import nbformat

    name = f"{master.lab.notebook}.ipynb"
    release = nbformat.read(labs / master.lab.name / name, as_version=4)
    folder.mkdir(parents=True, exist_ok=True)
    download, roster = folder / "canvas.zip", folder / "roster.csv"
    with (zipfile.ZipFile(download, "w", zipfile.ZIP_DEFLATED) as archive,
          roster.open("w", newline="", encoding="utf-8") as file):
        rows = csv.writer(file)
        rows.writerow(["id", "name", "email", "canvas_id"])
        for number in range(1, size + 1):
            given, family = GIVEN[number % len(GIVEN)], FAMILY[number % len(FAMILY)]
            rows.writerow([f"s{number:03d}", f"{given} {family}", f"s{number:03d}@example.edu", 4700 + number])
            if number % 10:
                notebook = submission(release, answers(CLASS[number % len(CLASS)], master))
                archive.writestr(f"{family}{given}_{4700 + number}_{90_000 + number}_{name}".lower(),
                                 nbformat.writes(notebook))
    return download, roster


def judged_points(master: Master, written: Mapping[str, str], seed: int) -> dict[str, float]:
    """The points of answers judged in this process, without a notebook: exercise -> points.

    The answers share one namespace, as they do in the notebook: a mistake in one exercise reaches those that call it.
    """
    space: dict[str, Any] = {"__name__": "answers"}
    _run(exercises.sources(master.lab.name)["given"], "given", space)
    points = {}
    for cell in master.cells:
        if cell.kind == "exercise":
            source = written.get(cell.name, exercises.sources(master.lab.name)["exercises"][cell.name]["blank"])
            _run(source, cell.name, space)
        elif cell.kind == "check":
            twin = next((e.name for e in master.lab.exercises if e.twin_of == cell.name), None)
            verdict = verdict_of(cell.name, space[cell.name], space.get(twin) if twin else None, seed=seed)
            points[cell.name] = verdict.score
    return points


def _number(student: str) -> int:
    return int(student.rpartition("_")[2])


def _run(source: str, name: str, space: dict[str, Any]) -> None:
    file = f"<{name} {abs(hash(source))}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)  # Triton reads a kernel's source back
    exec(compile(source, file, "exec"), space)
