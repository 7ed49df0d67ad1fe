"""A course on disk: its folders, its gradebook, and the plain nbgrader commands that work on it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import effnlp_lab
from effnlp_grading.plan import CHECK
from effnlp_lab import exercises
from effnlp_lab.errors import UsageError

CONFIGURATION = "nbgrader_config.py"


@dataclass(frozen=True)
class Grade:
    """What the gradebook holds of one submission. `exercises` has points and maximum of each check.

    score: before `penalty`, the points that being late costs.
    """

    student: str
    lab: str
    score: float
    max_score: float
    exercises: dict[str, tuple[float, float]]
    penalty: float = 0.0

    @property
    def final(self) -> float:
        """What counts."""
        return max(0.0, self.score - self.penalty)


@dataclass(frozen=True)
class Course:
    """A folder with `grading/nbgrader_config.py`, and what nbgrader keeps in it."""

    root: Path

    @property
    def submitted(self) -> Path:
        return self.root / "grading" / "submitted"

    @property
    def gradebook(self) -> Path:
        return self.root / "grading" / "gradebook.db"

    @property
    def db_url(self) -> str:
        """The gradebook's URL: EFFNLP_GRADEBOOK (PostgreSQL's, say), else the SQLite file in grading/."""
        return os.environ.get("EFFNLP_GRADEBOOK") or f"sqlite:///{self.gradebook}"

    def submission(self, student: str, lab: str) -> Path:
        return self._notebook("submitted", student, lab)

    def autograded(self, student: str, lab: str) -> Path:
        return self._notebook("autograded", student, lab)

    def feedback(self, student: str, lab: str) -> Path:
        return self._notebook("feedback", student, lab).with_suffix(".html")

    def log(self, student: str, lab: str) -> Path:
        return self.root / "grading" / "logs" / lab / f"{student}.log"

    def _notebook(self, step: str, student: str, lab: str) -> Path:
        return self.root / "grading" / step / student / lab / f"{exercises.lab(lab).notebook}.ipynb"

    def students(self, lab: str) -> list[str]:
        """Who has submitted a notebook of this lab, in order."""
        name = f"{exercises.lab(lab).notebook}.ipynb"
        return sorted(path.parent.parent.name for path in self.submitted.glob(f"*/{lab}/{name}"))

    def nbgrader(self, *arguments: str, environment: dict[str, str] | None = None) -> str:
        """Run an nbgrader command as an instructor types it; return what it says. Raises UsageError if it fails."""
        done = subprocess.run([sys.executable, "-m", "nbgrader", *arguments], cwd=self.root, text=True, check=False,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env={**environment_with_kit(), **(environment or {})})
        if done.returncode != 0:
            raise UsageError(f"`nbgrader {' '.join(arguments)}` failed in {self.root}: {last_words(done.stdout)}")
        return done.stdout

    @property
    def patient_url(self) -> str:
        """The gradebook's URL, for connections that wait where another process is writing."""
        return f"{self.db_url}?timeout=120" if self.db_url.startswith("sqlite:") else self.db_url

    def grades(self, lab: str) -> dict[str, Grade]:
        """What the gradebook holds of a lab: student -> Grade."""
        from nbgrader.api import Gradebook, MissingEntry

        found = {}
        with Gradebook(self.patient_url) as book:
            try:
                submissions = book.assignment_submissions(lab)
            except MissingEntry:
                return {}
            for one in submissions:
                points = {grade.name.removeprefix(CHECK): (float(grade.score or 0.0), float(grade.max_score))
                          for notebook in one.notebooks for grade in notebook.grades if grade.name.startswith(CHECK)}
                found[one.student.id] = Grade(one.student.id, lab, float(one.score), float(one.max_score), points,
                                              float(one.late_submission_penalty or 0.0))
        return found

    def is_released(self, lab: str) -> bool:
        """Whether the gradebook knows the lab, which `nbgrader generate_assignment` sees to."""
        from nbgrader.api import Gradebook, MissingEntry

        if self.db_url.startswith("sqlite:") and not self.gradebook.is_file():
            return False
        with Gradebook(self.patient_url) as book:
            try:
                return bool(book.find_assignment(lab).notebooks)
            except MissingEntry:
                return False


def find_course() -> Course:
    """The course of the working directory or of one of its parents, else the checkout that this package is in."""
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[2]):
        if (folder / "grading" / CONFIGURATION).is_file():
            return Course(folder)
    raise UsageError(f"There is no course here: expected a folder with grading/{CONFIGURATION}; use a checkout.")


def environment_with_kit() -> dict[str, str]:
    """This process's environment, with this effnlp_lab on the path of what is started: installed or not."""
    kit = str(Path(effnlp_lab.__file__).resolve().parents[1])
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != kit]
    return dict(os.environ, PYTHONPATH=os.pathsep.join([kit, *others]))


def last_words(log: str) -> str:
    """The line of an nbgrader log that says best what went wrong."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.split(":")[0].rpartition(".")[2].endswith(("Error", "Exception"))]
    return (errors or [line for line in lines if "ERROR" in line] or lines or ["it said nothing"])[-1][:300]
