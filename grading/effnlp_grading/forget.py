"""`effnlp forget`: deletes what is kept of students when it is older than the course keeps it.

How long is one setting of the course, in pyproject.toml: keep_days, in [tool.effnlp]. A record is all that is kept of
one student in one lab: hand-ins and every attempt, graded notebook and feedback, verdicts, logs, quizzes, and the rows
of the gradebook. It is as old as its youngest file. With it go the reports and the returned zips of that lab, which
name it; and with a student's last record the student, from the gradebook and from the tables.
"""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from effnlp_grading.course import Course
from effnlp_lab.errors import UsageError
from effnlp_lab.settings import settings_of

STUDENT_FIRST = ("submitted", "autograded", "feedback")  # grading/PLACE/STUDENT/LAB/
LAB_FIRST = ("attempts", "defences")  # grading/PLACE/LAB/STUDENT/
FILES = {"verdicts": ".jsonl", "logs": ".log"}  # grading/PLACE/LAB/STUDENT.suffix
TABLES = {"roster.csv": "id", "teams.csv": "student", "extensions.csv": "student"}


@dataclass
class Kept:
    """What is kept of one student in one lab. `last`: when the youngest file was written."""

    lab: str
    student: str
    paths: list[Path] = field(default_factory=list)
    graded: bool = False
    last: datetime = datetime.min


def keep_days(course: Course) -> float:
    """The course's setting. Raises UsageError where there is none, or none that is a number of days."""
    days = settings_of(course.root).get("keep_days")
    if isinstance(days, bool) or not isinstance(days, int | float) or days < 0:
        raise UsageError(f"{course.root / 'pyproject.toml'} does not say how long records are kept: write keep_days = "
                         "365, say, under [tool.effnlp], or name a number of days with --older-than.")
    return days


def kept(course: Course) -> list[Kept]:
    """Everything that is kept of students, by lab and student."""
    found: dict[tuple[str, str], Kept] = {}

    def of(lab: str, student: str) -> Kept:
        return found.setdefault((lab, student), Kept(lab, student))

    for lab, student, path in _paths(course.root / "grading"):
        of(lab, student).paths.append(path)
    for lab, student, time in _graded(course):
        one = of(lab, student)
        one.graded, one.last = True, time or datetime.min
    for one in found.values():
        inner = [file for path in one.paths for file in (path.rglob("*") if path.is_dir() else [path])]
        times = [datetime.fromtimestamp(file.stat().st_mtime) for file in inner if file.is_file()]
        one.last = max(times, default=one.last)
    return [found[key] for key in sorted(found)]


def chosen(course: Course, days: float | None, student: str | None, now: datetime | None = None) -> list[Kept]:
    """What is to be forgotten: one student's, or what is older than `days` (None: as the course's setting says)."""
    everything = kept(course)
    if student is not None:
        mine = [one for one in everything if one.student == student]
        return [one for one in mine if days is None or one.last < (now or datetime.now()) - timedelta(days=days)]
    limit = (now or datetime.now()) - timedelta(days=keep_days(course) if days is None else days)
    return [one for one in everything if one.last < limit]


def in_words(course: Course, some: list[Kept]) -> list[str]:
    """What will be deleted, a sentence for each lab, and for the students of whom nothing is left."""
    lines = []
    for lab in sorted({one.lab for one in some}):
        mine = [one for one in some if one.lab == lab]
        first, last = min(one.last for one in mine), max(one.last for one in mine)
        count = sum(file.is_file() for one in mine for path in one.paths
                    for file in (path.rglob("*") if path.is_dir() else [path]))  # fmt: skip
        lines.append(f"{lab}: {_students(len(mine))}, last written {_span(first, last)}: {count} files, "
                     f"{sum(one.graded for one in mine)} grades, and the lab's reports and returned zips.")
    gone = sorted(_without_records(course, some))
    if gone:
        lines.append(f"{_students(len(gone))} with nothing left leave the gradebook and the tables: {', '.join(gone)}.")
    return lines


def forget(course: Course, some: list[Kept]) -> None:
    """Delete it. May be stopped, and goes on when it is called again."""
    gone = _without_records(course, some)
    grading = course.root / "grading"
    _from_gradebook(course, some, gone)
    for one in some:
        for path in one.paths:
            _remove(path)
    for lab in {one.lab for one in some}:
        for path in [grading / "reports" / lab, *(grading / "returned").glob(f"{lab}_*")]:
            _remove(path)
    for student in gone:
        for place in STUDENT_FIRST:
            _remove(grading / place / student)
        _remove(grading / "returned" / "by_hand" / student)
    for name, column in TABLES.items():
        _without_rows(grading / name, column, gone)
    if gone:
        _remove(grading / "grades.csv")


def _paths(grading: Path) -> Iterator[tuple[str, str, Path]]:
    for place in STUDENT_FIRST:
        for path in grading.glob(f"{place}/*/*/"):
            yield path.name, path.parent.name, path
    for place in LAB_FIRST:
        for path in grading.glob(f"{place}/*/*/"):
            yield path.parent.name, path.name, path
    for place, suffix in FILES.items():
        for path in grading.glob(f"{place}/*/*{suffix}"):
            yield path.parent.name, path.name.removesuffix(suffix), path
    for path in grading.glob("regrades/*/*/*.jsonl"):
        yield path.parents[1].name, path.name.removesuffix(".jsonl").removesuffix(".before"), path


def _graded(course: Course) -> Iterator[tuple[str, str, datetime | None]]:
    from nbgrader.api import Gradebook

    if course.db_url.startswith("sqlite:") and not course.gradebook.is_file():
        return
    with Gradebook(course.patient_url) as book:
        for assignment in book.assignments:
            for one in book.assignment_submissions(assignment.name):
                yield assignment.name, one.student.id, one.timestamp


def _without_records(course: Course, some: list[Kept]) -> set[str]:
    going = {(one.lab, one.student) for one in some}
    staying = {one.student for one in kept(course) if (one.lab, one.student) not in going}
    return {one.student for one in some} - staying


def _from_gradebook(course: Course, some: list[Kept], gone: set[str]) -> None:
    from nbgrader.api import Gradebook, MissingEntry

    if course.db_url.startswith("sqlite:") and not course.gradebook.is_file():
        return
    with Gradebook(course.patient_url) as book:
        for one in some:
            if one.graded:
                book.remove_submission(one.lab, one.student)
        for student in gone:
            try:
                book.remove_student(student)
            except MissingEntry:
                continue


def _without_rows(path: Path, column: str, gone: set[str]) -> None:
    """Write a table again without the rows of these students."""
    if not path.is_file() or not gone:
        return
    text = path.read_bytes().decode("utf-8-sig", errors="replace")
    first = text.partition("\n")[0]
    separator = ";" if first.count(";") > first.count(",") else ","
    rows = list(csv.reader(io.StringIO(text), delimiter=separator))
    names = [name.strip().lower() for name in rows[0]] if rows else []
    if column not in names:
        return
    place, out = names.index(column), io.StringIO()
    csv.writer(out, delimiter=separator, lineterminator="\n").writerows(
        [row for row in rows if not (len(row) > place and row[place].strip() in gone)])
    path.write_text(out.getvalue(), "utf-8")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _students(count: int) -> str:
    return f"{count} student{'' if count == 1 else 's'}"


def _span(first: datetime, last: datetime) -> str:
    days = [f"{one:%Y-%m-%d}" if one > datetime.min else "at an unknown time" for one in (first, last)]
    return days[0] if days[0] == days[1] else f"{days[0]} to {days[1]}"
