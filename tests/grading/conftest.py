"""A small class in a course of its own, graded once and read by all tests, on all of pytest-xdist's workers."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import nbformat
import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "grading"))

from classes import LAB, copy_course, master_of  # noqa: E402
from effnlp_grading import demo, sample_class  # noqa: E402
from effnlp_grading.autograde import grade_class  # noqa: E402
from effnlp_grading.course import Course  # noqa: E402

from effnlp_lab.master import Master  # noqa: E402

SEED = 11
NOISE = """
import os, sys
_silent = {name}

def {name}(*arguments, **named):
    os.write(2, b"a library speaks\\n")
    print("a student too", file=sys.stderr)
    return _silent(*arguments, **named)
"""
STUDENTS = ("perfect", "blank", "mixed", "crumbled")


@dataclass(frozen=True)
class Class:
    """A released and graded course. `written` has each student's answers; "crumbled" lost a cell's metadata."""

    course: Course
    master: Master
    written: dict[str, dict[str, str]]
    seed: int = SEED
    lab: str = LAB


@pytest.fixture(scope="session")
def master() -> Master:
    return master_of()


@pytest.fixture(scope="session")
def graded_class(master: Master, tmp_path_factory: pytest.TempPathFactory) -> Class:
    """To be read alone: a test on another worker may read it at the same time."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    written = {student: _answers(student, master) for student in STUDENTS}
    course = Course(shared / "graded_class")
    with FileLock(shared / "graded_class.lock"):
        if not (shared / "graded_class.done").exists():
            demo.scratch_course(ROOT, course.root, [master.lab])
            _leave_answers_about(course.root / "solutions" / LAB)
            course.nbgrader("generate_assignment", LAB)
            for student in STUDENTS:
                _submit(course, master, student, written[student])
            pairs = [(LAB, student) for student in STUDENTS]
            grade_class(course, pairs, device="cpu", environment={"EFFNLP_SEED": str(SEED), "EFFNLP_FAST": "1"})
            _grade_by_hand(course)
            (shared / "graded_class.done").touch()
    return Class(course, master, written)


@pytest.fixture
def own_class(graded_class: Class, tmp_path: Path) -> Class:
    """A copy of the graded class, for a test that writes into it."""
    return replace(graded_class, course=copy_course(graded_class.course, tmp_path / "course"))


def _answers(student: str, master: Master) -> dict[str, str]:
    """The mixed student's exercises are, in turn, right (and noisy), each known mistake, and blank."""
    if student in ("perfect", "blank"):
        return sample_class.answers(student, master)
    solved = sample_class.answers("perfect", master)
    if student == "crumbled":
        return solved
    mixed = {}
    for number, (name, source) in enumerate(solved.items()):
        mistakes = list(sample_class.mistakes_of(master.lab, name).values())
        if number == 0:
            mixed[name] = f"{source}\n{NOISE.format(name=name)}"
        elif number % 3 == 1 and mistakes:
            mixed[name] = mistakes[0].strip("\n")
        elif number % 3 == 2:
            mixed[name] = source
    return mixed


def _submit(course: Course, master: Master, student: str, written: dict[str, str]) -> None:
    release = nbformat.read(course.root / "labs" / LAB / f"{master.lab.notebook}.ipynb", as_version=4)
    notebook = sample_class.submission(release, written)
    if student == "crumbled":
        cell = next(cell for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get("solution"))
        del cell.metadata["nbgrader"]
        _judge_for_oneself(notebook)
    path = course.submission(student, LAB)
    path.parent.mkdir(parents=True)
    nbformat.write(notebook, path)


def _judge_for_oneself(notebook: nbformat.NotebookNode) -> None:
    """Predictions and a written answer, in cells that lost their metadata and their ids."""
    numbers = {"my_unknown_words_of_100": "8", "my_speedup_of_tokenizers": "100 * 1.5"}
    for place, cell in enumerate(notebook.cells):
        written = cell.metadata.get("nbgrader", {}).get("grade_id") == "written_vocabulary_size"
        if not written and "predict" not in cell.metadata.get("effnlp", {}):
            continue
        for name, number in numbers.items():
            cell.source = cell.source.replace(f"{name} = None", f"{name} = {number}")
        cell.source = "Forty thousand, and here is why." if written else cell.source
        cell.metadata, cell["id"] = nbformat.NotebookNode(), f"other-{place}"


def _grade_by_hand(course: Course) -> None:
    """What formgrader does when a person gives 0.7 of 1 to the one written answer."""
    from nbgrader.api import Gradebook

    with Gradebook(course.db_url) as book:
        grade = book.find_grade("written_vocabulary_size", "tokenization", LAB, "crumbled")
        assert grade.needs_manual_grade and grade.max_score == 1.0
        grade.manual_score, grade.needs_manual_grade = 0.7, False
        book.db.commit()


def _leave_answers_about(folder: Path) -> None:
    """What must never reach a release, beside the solved notebook."""
    (folder / "receipts").mkdir(exist_ok=True)
    for name in ("answers.py", "answers.toml", "receipt.json", "receipts/late.txt", "receipts/receipt.json"):
        (folder / name).write_text("the answer\n")
