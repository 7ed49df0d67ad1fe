"""A made-up semester: a class on three learning platforms, what they hand out, and an instructor who works through it.

Who does what follows from the student's and the lab's numbers, so that `expected` can say, without any notebook or
gradebook, what everybody must end with.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import json
import math
import os
import shutil
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from unittest import mock

import nbformat
from classes import ROOT, master_of
from effnlp_grading import autograde, class_report, cli, demo, export, handback, late, regrade, sample_class  # noqa: F401
from effnlp_grading.course import Course

from effnlp_lab import exercises
from effnlp_lab.exercises.compare import Finding

SEED = 11
PLATFORMS = ("canvas", "moodle", "brightspace")
START = datetime(2026, 9, 14, 21, 59, tzinfo=UTC)  # a minute to midnight in the course's zone
ENVIRONMENT = {"EFFNLP_TIMEZONE": "Europe/Berlin", "EFFNLP_SEED": str(SEED), "EFFNLP_FAST": "1",
               "EFFNLP_DEVICE": "cpu"}
GIVEN = ("Ada", "Zoë", "Jean Luc", "Łukasz", "Mary-Ann", "Nguyễn", "Omar", "Ines", "Pål", "Ruth")
FAMILY = ("Lovelace", "O'Brien", "Müller", "van Dyke", "Ng", "Kowalska", "Haddad", "Sørensen", "Li", "Noether")
MANUAL = 0.5  # what a grader gives by hand in the exercise that is regraded


@dataclass(frozen=True)
class Person:
    """A student: on which platform, and under which ids there."""

    number: int

    @property
    def id(self) -> str:
        return f"s{self.number:03d}"

    @property
    def platform(self) -> str:
        return PLATFORMS[self.number % 3]

    @property
    def name(self) -> str:
        return f"{GIVEN[self.number % 10]} {FAMILY[(self.number // 10 + self.number) % 10]}"

    @property
    def user(self) -> int:
        return 4700 + self.number


@dataclass(frozen=True)
class HandedIn:
    """What a student does in a lab: the kind of answers, how many days late, and what happens to the notebook."""

    person: Person
    place: int
    lab: str

    @property
    def kind(self) -> str:
        return sample_class.CLASS[(3 * self.person.number + 2 * self.place) % len(sample_class.CLASS)]

    @property
    def is_missing(self) -> bool:
        return (self.person.number + 3 * self.place) % 9 == 5

    @property
    def days_late(self) -> int:
        if (self.person.number + self.place) % 5 != 1:
            return 0
        return 1 if self.person.platform == "canvas" else 5  # Canvas says LATE, and not by how much

    @property
    def is_damaged(self) -> bool:
        return (self.person.number + self.place) % 6 == 2

    @property
    def tried_twice(self) -> bool:
        return (self.person.number + self.place) % 7 == 0

    @property
    def time(self) -> datetime:
        hours = timedelta(days=self.days_late, hours=-2) if self.days_late else timedelta(hours=-5)
        return due(self.place) + hours


@dataclass(frozen=True)
class Semester:
    """So many students, and these labs. The check of one exercise of the first lab is wrong when it is first graded."""

    size: int
    labs: tuple[str, ...]
    jobs: int = 1

    @property
    def people(self) -> list[Person]:
        return [Person(number) for number in range(self.size)]

    @property
    def wrong(self) -> str:
        """The exercise whose check is wrong at first."""
        return next(e.name for e in exercises.lab(self.labs[0]).exercises if e.points and e.twin_of is None)

    @property
    def teams(self) -> dict[str, tuple[Person, ...]]:
        """Teams of the second lab: two or three neighbours on one platform, the first of whom hands in."""
        if len(self.labs) < 2:
            return {}
        return {f"Team {k + 1}": (Person(k), Person(k + 3)) for k in range(0, self.size - 3, 12)}

    def team_of(self, person: Person, place: int) -> tuple[Person, ...]:
        found = [members for members in self.teams.values() if person in members] if place == 1 else []
        return found[0] if found else (person,)

    def hand_ins(self, place: int) -> list[HandedIn]:
        """What is handed in of a lab. Of a team, the first member does."""
        there = [HandedIn(person, place, self.labs[place]) for person in self.people
                 if self.team_of(person, place)[0] == person]
        return [one for one in there if not one.is_missing]


def due(place: int) -> datetime:
    return START + timedelta(weeks=place)


# What stands on disk before the semester begins


def make_course(folder: Path, semester: Semester) -> Course:
    """A released course with its roster, teams and due dates, and in downloads/ what the platforms hand out."""
    from nbgrader import api
    from nbgrader.api import Gradebook
    from nbgrader.preprocessors import SaveCells

    course = demo.scratch_course(ROOT, folder, [exercises.lab(lab) for lab in semester.labs])
    late.rules_of(course)  # the course's configuration puts nbgrader's programs on the path
    for place, lab in enumerate(semester.labs):
        shutil.copytree(ROOT / "labs" / lab, course.root / "labs" / lab)
        with mock.patch.object(api, "get_alembic_version", lambda: "none"), Gradebook(course.db_url) as book:
            book.update_or_create_assignment(lab, duedate=due(place).replace(tzinfo=None))
        where = {"notebook": exercises.lab(lab).notebook, "assignment": lab, "db_url": course.db_url}
        SaveCells().preprocess(copy.deepcopy(_release(lab)), {"nbgrader": where})  # as generate_assignment does
    _write_tables(course.root / "grading", semester)
    for place, lab in enumerate(semester.labs):
        where = course.root / "downloads" / lab
        where.mkdir(parents=True)
        hand_ins = semester.hand_ins(place)
        for platform, pack in (("canvas", _canvas), ("moodle", _moodle), ("brightspace", _brightspace)):
            with zipfile.ZipFile(where / f"{platform}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
                for one in hand_ins:
                    if one.person.platform == platform:
                        pack(archive, one, semester)
        _write_worksheet(where / "worksheet.csv", hand_ins)
    return course


def _write_tables(folder: Path, semester: Semester) -> None:
    with (folder / "roster.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "name", "email", "canvas_id", "brightspace_id"])
        for one in semester.people:
            ids = [one.user if one.platform == platform else "" for platform in ("canvas", "brightspace")]
            rows.writerow([one.id, one.name, f"{one.id}@example.edu", *ids])
    with (folder / "teams.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["team", "student", "lab"])
        for name, members in semester.teams.items():
            rows.writerows([name, member.id, semester.labs[1]] for member in members)


def _write_worksheet(path: Path, hand_ins: list[HandedIn]) -> None:
    """As Moodle's grading worksheet: participants by a number of this assignment alone, and times in words."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["Identifier", "Full name", "Email address", "Status", "Grade", "Maximum Grade",
                       "Grade can be changed", "Last modified (submission)", "Last modified (grade)",
                       "Feedback comments"])
        for one in hand_ins:
            if one.person.platform == "moodle":
                local = one.time + timedelta(hours=2)
                rows.writerow([f"Participant {participant(one)}", one.person.name, f"{one.person.id}@example.edu",
                               "Submitted for grading", "", "10.00", "Yes", f"{local:%A, %d %B %Y, %I:%M %p}", "-", ""])


def participant(one: HandedIn) -> int:
    return 90_000 + 100 * one.place + one.person.number


@cache
def _release(lab: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "labs" / lab / f"{exercises.lab(lab).notebook}.ipynb", as_version=4)


@cache
def _notebook(lab: str, kind: str, damaged: bool) -> bytes:
    """A student's notebook; a damaged one has lost its metadata and its checks, as editors do, and no answer."""
    notebook = sample_class.submission(_release(lab), sample_class.answers(kind, master_of(lab)))
    if damaged:
        for cell in notebook.cells:
            cell.metadata.pop("nbgrader", None)
        notebook.cells = [cell for cell in notebook.cells if not cell.source.startswith("check(")]
    return nbformat.writes(notebook).encode()


def _files(one: HandedIn) -> list[bytes]:
    """The student's attempts, the last one last."""
    last = _notebook(one.lab, one.kind, one.is_damaged)
    return [_notebook(one.lab, sample_class.BLANK, False), last] if one.tried_twice else [last]


def _canvas(archive: zipfile.ZipFile, one: HandedIn, semester: Semester) -> None:
    given, _, family = one.person.name.rpartition(" ")
    name = "".join(c for c in f"{family}{given}".lower() if c.isalnum())
    for number, data in enumerate(_files(one)):
        late = "_LATE" if one.days_late else ""
        again = f"-{number}" if number else ""
        stem = f"{name}{late}_{one.person.user}_{10_000 * (one.place + 1) + 10 * one.person.number + number}"
        archive.writestr(f"{stem}_{exercises.lab(one.lab).notebook}{again}.ipynb", data)


def _moodle(archive: zipfile.ZipFile, one: HandedIn, semester: Semester) -> None:
    folder = f"{one.person.name}_{participant(one)}_assignsubmission_file"
    for number, data in enumerate(_files(one)):
        archive.writestr(f"{folder}/{'my work' if one.is_damaged else 'lab'}{f'-{number}' if number else ''}.ipynb",
                         data)
    archive.writestr(f"{folder.removesuffix('file')}onlinetext/onlinetext.html", "<p>Please be kind.</p>")


def _brightspace(archive: zipfile.ZipFile, one: HandedIn, semester: Semester) -> None:
    if "index.html" not in archive.namelist():
        archive.writestr("index.html", "<html>Submissions</html>")
    for number, data in enumerate(reversed(_files(one))):
        local = one.time + timedelta(hours=2) - timedelta(hours=number)
        when = f"{local:%b} {local.day}, {local.year} {local.hour % 12 or 12}{local:%M %p}"
        archive.writestr(f"{one.person.user}-90210 - {one.person.name} - {when}/notebook.ipynb", data)


# What an instructor does


def run(course: Course, semester: Semester) -> None:
    """Collect, grade, regrade, return and export lab by lab. May be killed anywhere; the same call goes on."""
    os.environ.update(ENVIRONMENT)
    os.chdir(course.root)
    autograde.close_sandboxes = lambda: None  # this process's two warm sandboxes serve all of it, and end with it
    done = course.root / "stages.txt"
    for place, lab in enumerate(semester.labs):
        downloads = course.root / "downloads" / lab
        zips = [part for platform in PLATFORMS for part in ("--zip", str(downloads / f"{platform}.zip"))]
        stages = {
            "collect": lambda lab=lab, zips=zips, sheet=downloads / "worksheet.csv": _verb(
                "collect", lab, *zips, "--worksheet", str(sheet)),
            "grade": lambda lab=lab, place=place: _grade(lab, semester, place == 0),
            "regrade": lambda lab=lab, place=place: _regrade(course, lab, semester) if place == 0 else None,
            "return": lambda lab=lab, sheet=downloads / "worksheet.csv": _verb(
                "return", lab, "--worksheet", str(sheet)),
            **{f"export {platform}": lambda lab=lab, platform=platform: _verb("export", lab, "--lms", platform)
               for platform in PLATFORMS},
        }
        for name, stage in stages.items():
            if f"{lab} {name}\n" not in (done.read_text() if done.is_file() else ""):
                stage()
                with done.open("a") as file:
                    file.write(f"{lab} {name}\n")


def _verb(*arguments: str) -> None:
    code = cli.main(arguments)
    assert code == 0, f"effnlp {' '.join(arguments)}: exit code {code}"


def _grade(lab: str, semester: Semester, wrongly: bool) -> None:
    jobs = 1 if wrongly else semester.jobs  # a check that is wrong in this process is right in others
    with wrong_check(semester.wrong) if wrongly else contextlib.nullcontext():
        _verb("grade", lab, "--jobs", str(jobs))


def _regrade(course: Course, lab: str, semester: Semester) -> None:
    """A grader has given one student points by hand before the check is mended."""
    from nbgrader.api import Gradebook

    with Gradebook(course.db_url) as book:
        one = book.find_grade(f"test_{semester.wrong}", exercises.lab(lab).notebook, lab, by_hand(semester).id)
        one.manual_score = MANUAL
        book.db.commit()
    _verb("regrade", lab, semester.wrong, "--jobs", str(semester.jobs))


def by_hand(semester: Semester) -> Person:
    """Who has points that a grader gave: the last one who handed in the first lab."""
    return semester.hand_ins(0)[-1].person


@contextlib.contextmanager
def wrong_check(exercise: str) -> Iterator[None]:
    """A check with a defect: it refuses whatever comes."""
    reference = exercises.reference_of(exercise)
    reference.verify = lambda *arguments: Finding("this check is wrong")
    try:
        yield
    finally:
        del reference.verify


# What must come of it


def expected(semester: Semester) -> dict[tuple[str, str], tuple[dict[str, float], float]]:
    """(lab, student) -> points by exercise and the late penalty: by the judge without notebooks, and by the rules."""
    found: dict[tuple[str, str], tuple[dict[str, float], float]] = {}
    budget = dict.fromkeys(semester.people, 3)
    for place, lab in enumerate(semester.labs):
        for one in semester.hand_ins(place):
            points = dict(_judged(lab, one.kind))
            if place == 0 and one.person == by_hand(semester):
                points[semester.wrong] = MANUAL
            members = semester.team_of(one.person, place)
            free = min(one.days_late, min(budget[member] for member in members))
            penalty = min(sum(points.values()), (one.days_late - free) * 0.1 * exercises.lab(lab).points)
            for member in members:
                budget[member] -= free
                found[lab, member.id] = points, penalty
    return found


@cache
def _judged(lab: str, kind: str) -> dict[str, float]:
    master = master_of(lab)
    return sample_class.judged_points(master, sample_class.answers(kind, master), SEED)


def gradebook(course: Course, semester: Semester) -> dict[tuple[str, str], tuple[dict[str, float], float]]:
    """The same from the course's gradebook."""
    return {(lab, student): ({name: points for name, (points, _) in grade.exercises.items()}, grade.penalty)
            for lab in semester.labs for student, grade in course.grades(lab).items()}


def hand_ins_left(course: Course, semester: Semester) -> int:
    """How many are not in the gradebook yet."""
    graded = {(lab, student) for lab in semester.labs for student in course.grades(lab)}
    return sum((lab, one.person.id) not in graded for place, lab in enumerate(semester.labs)
               for one in semester.hand_ins(place))


def is_same(one: dict, other: dict) -> bool:
    """Equal but for the last bits of sums."""
    return one.keys() == other.keys() and all(
        one[key][0].keys() == other[key][0].keys()
        and all(math.isclose(one[key][0][name], other[key][0][name], abs_tol=1e-9) for name in one[key][0])
        and math.isclose(one[key][1], other[key][1], abs_tol=1e-9) for key in one)


def everything(course: Course) -> str:
    """The gradebook's tables as text: what must be the same after a second time. Ids are random."""
    from nbgrader.api import Gradebook, SubmittedAssignment

    with Gradebook(course.db_url) as book:
        return json.dumps([[one.assignment.name, one.student.id, str(one.timestamp), str(one.extension),
                            one.late_submission_penalty,
                            [[g.name, g.auto_score, g.manual_score, g.extra_credit, g.needs_manual_grade]
                             for n in one.notebooks for g in sorted(n.grades, key=lambda g: g.name)]]
                           for one in sorted(book.db.query(SubmittedAssignment), key=lambda one: (
                               one.assignment.name, one.student.id))], indent=1)


def run_and_be_killed(course: Course, semester: Semester, after: int | None) -> bool:
    """`run` in a process of its own, killed at its `after`-th write. Says whether it came to its end."""
    import signal

    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        import torch

        torch.set_num_threads(1)  # a forked child has none of its parent's threads
        code = 1
        try:
            with (course.root / "log").open("a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                sys.stdout, sys.stderr = log, log
                if after is not None:
                    _kill_at_write(after)
                run(course, semester)
            code = 0
        except BaseException as error:
            import traceback

            (course.root / "error").write_text("".join(traceback.format_exception(error)))
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert status == 0, (course.root / "error").read_text() + (course.root / "log").read_text()[-2000:]
    return True


def _kill_at_write(count: int) -> None:
    """SIGKILL this process at its `count`-th change on disk: before or after it, in turn."""
    import signal

    from sqlalchemy.orm import Session

    left = count

    def counted(call):
        def wrapped(*arguments, **named):
            nonlocal left
            left -= 1
            if left == 0 and count % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            found = call(*arguments, **named)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return found
        return wrapped

    for owner, name in ((Path, "replace"), (Path, "unlink"), (Path, "rename"), (Path, "write_bytes"),
                        (Path, "write_text"), (Session, "commit"), (os, "fsync"), (shutil, "move"), (shutil, "copy")):
        setattr(owner, name, counted(getattr(owner, name)))


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))
