"""Late days: nbgrader's late penalties, with a budget of days for each student, and extensions.

A hand-in that is late by a part of a day is late by a day. Each student has `budget` days for the whole course, which
are spent lab by lab in the order of due dates; only a day beyond costs points, `per_day` of the lab's. A team is late
together: a day costs every member one, and the team has as many as the member with the fewest.

grading/extensions.csv has the columns student, lab, and days or until; a team has the longest of its members'. Times
come from timestamp.txt. Due dates are the gradebook's:
`nbgrader db assignment add LAB --duedate "2026-10-01 23:59 CET"`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from nbgrader.plugins import LateSubmissionPlugin
from traitlets import Float

from effnlp_grading.course import CONFIGURATION, Course
from effnlp_grading.roster import read_table, teams_of
from effnlp_grading.times import read_time
from effnlp_lab import exercises
from effnlp_lab.errors import UsageError

DAY = 86_400.0


class LateDays(LateSubmissionPlugin):
    """nbgrader's plugin: `c.AssignLatePenalties.plugin_class` in nbgrader_config.py."""

    budget = Float(3.0, help="Days that each student may be late in the whole course without losing points.").tag(
        config=True)
    per_day = Float(0.1, help="The share of a lab's points that each day beyond the budget costs.").tag(config=True)
    grace_minutes = Float(15.0, help="Minutes after the due date that are not late.").tag(config=True)

    def late_submission_penalty(self, student_id: str, score: float, total_seconds_late: float) -> float | None:
        """Of one notebook while it is graded. Extensions and the days spent on earlier labs are looked up."""
        where = self.parent
        course = Course(Path(where.config.CourseDirectory.root))
        plan = plan_late_days(course, where.gradebook, self, teams_of(course).together_with(student_id))
        found = plan.lateness.get((where.assignment_id, student_id))
        return found.penalty(score) if found is not None else None


@dataclass(frozen=True)
class Lateness:
    """How late a hand-in is: whole days, how many of them the budget covers, and the points that the others cost."""

    days: int
    covered: int
    cost: float

    def penalty(self, score: float) -> float:
        return min(score, self.cost)


@dataclass
class LatePlan:
    """`lateness` of every (lab, student) that is late, `extensions` in force, days `spent` by each student."""

    lateness: dict[tuple[str, str], Lateness] = field(default_factory=dict)
    extensions: dict[tuple[str, str], timedelta] = field(default_factory=dict)
    spent: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    problems: list[str] = field(default_factory=list)


def plan_late_days(course: Course, book: Any, rules: LateDays, students: Iterable[str] | None = None) -> LatePlan:
    """Who is late in what, and what it costs, from the gradebook, timestamps, extensions and teams.

    students: only these, who must come with everybody that they share a team with.
    """
    from nbgrader.api import Assignment, Student, SubmittedAssignment

    teams, plan = teams_of(course), LatePlan()
    labs = {lab.name: lab for lab in book.db.query(Assignment) if lab.name in exercises.lab_names()}
    due = {name: lab.duedate.replace(tzinfo=UTC) for name, lab in labs.items() if lab.duedate}
    plan.extensions, plan.problems = _extensions(course, due)
    query = book.db.query(SubmittedAssignment).join(Student, SubmittedAssignment.student)
    if students is not None:
        query = query.filter(Student.id.in_(sorted(students)))
    handed_in = {(one.assignment.name, one.student.id): one for one in query}
    for lab in sorted(due, key=lambda name: (due[name], name)):
        done = set()
        for student in sorted(one for name, one in handed_in if name == lab):
            team = teams.of(student, lab)
            members = team.members if team else (student,)
            first = team.first if team and (lab, team.first) in handed_in else student
            if student in done:
                continue
            done.update(members)
            longest = max((plan.extensions.get((lab, one), timedelta()) for one in members), default=timedelta())
            when = _handed_in(course, lab, first, handed_in[lab, first])
            if when is None:
                continue
            seconds = (when - due[lab] - longest).total_seconds() - 60 * rules.grace_minutes
            if seconds <= 0:
                continue
            days = math.ceil(seconds / DAY)
            left = math.floor(min(rules.budget - plan.spent[one] for one in members))
            covered = max(0, min(days, left))
            late = Lateness(days, covered, (days - covered) * rules.per_day * float(labs[lab].max_score))
            for one in members:
                plan.spent[one] += covered
                plan.lateness[lab, one] = late
    return plan


def settle(course: Course, labs: Iterable[str] | None = None) -> tuple[list[tuple[str, str]], list[str]]:
    """Bring the gradebook's timestamps, extensions and penalties up to date, of all labs: one touches the others.

    Returns (lab, student) whose penalty changed, of `labs` or of all, and a sentence for each bad row.
    """
    from nbgrader.api import Gradebook, SubmittedAssignment

    changed, teams = [], teams_of(course)
    wanted = None if labs is None else set(labs)
    with Gradebook(course.patient_url) as book:
        plan = plan_late_days(course, book, rules_of(course))
        for one in book.db.query(SubmittedAssignment):
            lab = one.assignment
            if lab.name in exercises.lab_names():
                key = (lab.name, one.student.id)
                team = teams.of(one.student.id, lab.name)
                alone = team is None or course.submission(one.student.id, lab.name).is_file()
                when = _handed_in(course, lab.name, one.student.id if alone else team.first, one)
                one.timestamp = when.replace(tzinfo=None) if when else one.timestamp
                one.extension = plan.extensions.get(key)
                for notebook in one.notebooks:
                    penalty = plan.lateness[key].penalty(notebook.score) if key in plan.lateness else None
                    if (penalty or 0.0) != (notebook.late_submission_penalty or 0.0):
                        notebook.late_submission_penalty = penalty
                        if wanted is None or lab.name in wanted:
                            changed.append(key)
        book.db.commit()
    return sorted(set(changed)), plan.problems


def rules_of(course: Course) -> LateDays:
    """The plugin with the course's settings."""
    from traitlets.config.loader import PyFileConfigLoader

    config = PyFileConfigLoader(CONFIGURATION, path=str(course.root / "grading")).load_config()
    return LateDays(config=config)


def _handed_in(course: Course, lab: str, student: str, submission: Any) -> datetime | None:
    """By timestamp.txt, else by the gradebook."""
    path = course.submission(student, lab).parent / "timestamp.txt"
    told = read_time(path.read_text("utf-8", errors="replace")) if path.is_file() else None
    stored = submission.timestamp
    return told or (stored.replace(tzinfo=UTC) if stored else None)


def _extensions(course: Course, due: dict[str, datetime]) -> tuple[dict[tuple[str, str], timedelta], list[str]]:
    """grading/extensions.csv, if there is one: (lab, student) -> how much later than the due date."""
    from effnlp_lab.cli import match_lab

    path = course.root / "grading" / "extensions.csv"
    found: dict[tuple[str, str], timedelta] = {}
    problems = []
    if not path.is_file():
        return found, problems
    for line, row in read_table(path, ("student", "lab"), "student, lab, and days or until"):
        where = f"{path.name}, line {line}"
        try:
            lab = match_lab(row["lab"])
        except UsageError as error:
            problems.append(f"{where}: {error}")
            continue
        until = read_time(row.get("until") or "-")
        try:
            days = float(row.get("days") or "nan")
        except ValueError:
            days = math.nan
        if until is None and not 0 <= days < 1000:
            problems.append(f"{where}: {row['student']} has neither days (a number) nor until (a date): it is passed "
                            "over.")
        elif lab not in due:
            problems.append(f"{where}: {lab} has no due date in the gradebook: there is nothing to extend.")
        else:
            found[lab, row["student"]] = max(until - due[lab] if until else timedelta(days=days), timedelta())
    return found, problems
