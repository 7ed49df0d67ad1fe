"""Courses of any size to try grading on: made once a session, with the sample class repeated under other names."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

import nbformat
from effnlp_grading import demo, sample_class
from effnlp_grading.course import Course

from effnlp_lab import exercises
from effnlp_lab.master import Master, read_master

ROOT = Path(__file__).resolve().parents[2]
LAB = "01_tokenization"
SIZE = int(os.environ.get("EFFNLP_GRADING_SIZE", "12"))  # 200 in `make grading-bench`


def master_of(lab: str = LAB) -> Master:
    return read_master(ROOT / "solutions" / lab / f"{exercises.lab(lab).notebook}.py")


def make_course(folder: Path, size: int = SIZE, lab: str = LAB) -> Course:
    """A released course with `size` submissions: the sample class over and over, and every sixth in another way odd."""
    master = master_of(lab)
    course = demo.scratch_course(ROOT, folder, [master.lab])
    course.nbgrader("generate_assignment", lab)
    kinds = itertools.cycle(sample_class.CLASS)
    release = nbformat.read(course.root / "labs" / lab / f"{master.lab.notebook}.ipynb", as_version=4)
    for number, kind in zip(range(size), kinds, strict=False):
        notebook = sample_class.submission(release, sample_class.answers(kind, master))
        if number % 6 == 5:
            _make_odd(notebook, number)
        path = course.submission(f"s{number:03d}", lab)
        path.parent.mkdir(parents=True)
        nbformat.write(notebook, path)
    return course


def copy_course(course: Course, folder: Path) -> Course:
    """The same course elsewhere."""
    shutil.copytree(course.root, folder)
    return Course(folder)


def _make_odd(notebook: nbformat.NotebookNode, number: int) -> None:
    """An answer that ends its process, a cell that lost its metadata, or a deleted check, in turn."""
    solved = [c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("solution")]
    if number % 18 == 5:
        name = solved[2].metadata.nbgrader.grade_id
        solved[2].source += f"\n\n\ndef {name}(*inputs):\n    import os\n    os._exit(0)\n"
    elif number % 18 == 11:
        del solved[1].metadata["nbgrader"]
    else:
        notebook.cells = [c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("grade_id") !=
                          f"test_{solved[0].metadata.nbgrader.grade_id}"]
