"""`effnlp export`: points, after late penalties, as a file that a learning platform imports.

- Canvas: Student, ID, SIS User ID, SIS Login ID, Section, the assignment; a row of points possible comes first.
- Moodle: email address, ID number and the assignment, for the gradebook's CSV import; or, given the assignment's
  grading worksheet, that worksheet with its column Grade filled in.
- Brightspace: OrgDefinedId, Username, `... Points Grade`, End-of-Line Indicator; ids carry a `#`.

A student without a grade has an empty field, which changes nothing on the platform; `zero` writes 0.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from effnlp_grading.course import Course, Grade
from effnlp_grading.lms import PLATFORMS, Worksheet
from effnlp_grading.roster import Roster, Student, roster_of
from effnlp_lab import exercises
from effnlp_lab.errors import UsageError
from effnlp_lab.exercises.spec import Lab


def export(course: Course, lab: str, platform: str, out: Path, *, column: str | None = None, zero: bool = False,
           worksheet: Path | None = None, roster: Path | None = None) -> tuple[int, list[str]]:
    """Write a lab's grades to `out`. Returns how many there are, and a sentence for each that has no place in the file.

    column: what the platform calls the assignment (Canvas: with its id, `Lab 1 (4711)`).
    """
    if platform not in PLATFORMS:
        raise UsageError(f"There is no export for {platform!r}: expected {', '.join(PLATFORMS)}.")
    spec, people = exercises.lab(lab), roster_of(course, roster)
    grades = course.grades(lab)
    if not grades:
        raise UsageError(f"No submission of {lab} is graded: run `effnlp grade {lab}` first.")
    said = list(people.problems)
    strangers = sorted(set(grades) - set(people.students))
    said += [f"{student} has a grade and is not in the roster: exported by that id alone." for student in strangers]
    everybody = sorted([*people, *(Student(student) for student in strangers)],
                       key=lambda one: (one.sortable.casefold(), one.id))
    points = {one.id: points_of(grades.get(one.id), zero) for one in everybody}
    title = column or title_of(spec)
    if platform == "canvas":
        rows = canvas_rows(everybody, points, title, spec.points)
    elif platform == "brightspace":
        rows = brightspace_rows(everybody, points, title)
    elif worksheet is not None:
        rows = worksheet_rows(Worksheet(worksheet), people, points, said)
    else:
        rows = moodle_rows(everybody, points, title)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(as_csv(rows), "utf-8", newline="")
    return sum(bool(one) for one in points.values()), said


def title_of(spec: Lab) -> str:
    return f"Lab {spec.number}: {spec.title}"


def points_of(grade: Grade | None, zero: bool = False) -> str:
    """Points after penalties, or nothing."""
    return f"{round(grade.final, 4):g}" if grade is not None else "0" if zero else ""


def canvas_rows(students: Sequence[Student], points: Mapping[str, str], title: str, most: float) -> list[list[str]]:
    rows = [["Student", "ID", "SIS User ID", "SIS Login ID", "Section", title],
            ["    Points Possible", "", "", "", "", f"{most:g}"]]
    return rows + [[safe(one.sortable), one.ids.get("canvas_id", ""), safe(one.id),
                    safe(one.ids.get("login") or one.id), "", points[one.id]] for one in students]


def moodle_rows(students: Sequence[Student], points: Mapping[str, str], title: str) -> list[list[str]]:
    return [["Full name", "Email address", "ID number", title]] + [
        [safe(one.spoken), safe(one.email), safe(one.ids.get("moodle_id") or one.id), points[one.id]]
        for one in students]


def brightspace_rows(students: Sequence[Student], points: Mapping[str, str], title: str) -> list[list[str]]:
    """Colons and the like have no place in a grade item's name there."""
    item = "".join(c for c in title if c.isalnum() or c in " _-.()").strip()
    return [["OrgDefinedId", "Username", f"{item} Points Grade", "End-of-Line Indicator"]] + [
        [f"#{one.id}", f"#{one.ids.get('login') or one.id}", points[one.id], "#"] for one in students]


def worksheet_rows(sheet: Worksheet, roster: Roster, points: Mapping[str, str], said: list[str]) -> list[list[str]]:
    """Moodle's grading worksheet as it came, with grades."""
    with sheet.path.open(encoding="utf-8-sig", newline="") as file:
        header, *rows = list(csv.reader(file))
    names = [name.strip().lower() for name in header]
    if "grade" not in names:
        raise UsageError(f"{sheet.path} has no column Grade: expected the grading worksheet that Moodle hands out.")
    place = names.index("grade")
    written = set()
    for row in rows:
        student = sheet.student(dict(zip(names, (value.strip() for value in row), strict=False)), roster)
        if student is not None and points.get(student.id):
            row[place] = points[student.id]
            written.add(student.id)
    said += [f"{student} has a grade and no row in {sheet.path.name}." for student, one in points.items()
             if one and student not in written]
    return [header, *rows]


def safe(text: str) -> str:
    """A text that a spreadsheet does not take for a formula."""
    return "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def as_csv(rows: Iterable[Sequence[str]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\r\n").writerows(rows)
    return file.getvalue()
