"""What follows the grading of a lab, by us or by a person in formgrader: one grade for each team, late days, and
feedback pages that say so.

All of it may be done again at any time, and then changes nothing.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from effnlp_grading.course import Course
from effnlp_grading.feedback import mark_of, says
from effnlp_grading.late import settle
from effnlp_grading.roster import Team, roster_of, teams_of
from effnlp_grading.writer import Writer

_GRADE = ("auto_score", "manual_score", "extra_credit", "needs_manual_grade")
_COMMENT = ("auto_comment", "manual_comment")


def finish(course: Course, lab: str, show: Callable[[str], None] = lambda sentence: None) -> None:
    """Give teams their grade, count late days, and write again the feedback pages that say something else.

    `show` is called with a sentence for everything that could not be done.
    """
    teams = teams_of(course, roster_of(course))
    for sentence in teams.problems:
        show(sentence)
    shared = [team for team in teams.in_lab(lab) if _share(course, lab, team, show)]
    changed, problems = settle(course)
    for sentence in problems:
        show(sentence)
    rewritten = dict.fromkeys([*changed, *((lab, student) for student in _outdated(course, lab))])
    writer = Writer(course) if rewritten else None
    for name, student in rewritten:
        if course.submission(student, name).is_file() and course.autograded(student, name).is_file():
            why = writer.write_feedback(name, student)
            if why:
                show(f"{student}: the feedback page of {name} could not be written again: {why}")
    for name in {lab, *(name for name, _ in changed)}:
        for team in shared if name == lab else teams.in_lab(name):
            _share_pages(course, name, team)


def _outdated(course: Course, lab: str) -> list[str]:
    """Whose feedback page says something else than the gradebook: points or a comment were given by hand since."""
    from nbgrader.api import Gradebook, MissingEntry

    found = []
    with Gradebook(course.patient_url) as book:
        try:
            submissions = book.assignment_submissions(lab)
        except MissingEntry:
            return []
        for one in submissions:
            page = course.feedback(one.student.id, lab)
            scores = {grade.name: grade.score or 0.0 for notebook in one.notebooks for grade in notebook.grades}
            comments = {said.name: said.comment for notebook in one.notebooks for said in notebook.comments}
            if page.is_file() and not says(page, mark_of(scores, comments, one.late_submission_penalty or 0.0)):
                found.append(one.student.id)
    return found


def _share(course: Course, lab: str, team: Team, show: Callable[[str], None]) -> bool:
    """Give the first member's grades and comments to the others. Says whether the team has a grade."""
    from nbgrader.api import Gradebook, MissingEntry

    with warnings.catch_warnings(), Gradebook(course.patient_url) as book:
        warnings.filterwarnings("ignore", message="Object of type <Submitted.* not in session")  # nothing is lost
        try:
            graded = book.find_submission(lab, team.first)
        except MissingEntry:
            return False
        for member in team.members[1:]:
            if course.submission(member, lab).is_file():
                show(f"{member} has handed in {lab} alone and is in team {team.name}: {member} keeps that grade; "
                     f"`effnlp collect` makes it the team's.")
                continue
            book.update_or_create_student(member)
            copy = book.update_or_create_submission(lab, member, timestamp=graded.timestamp)
            for notebook in graded.notebooks:
                other = next(one for one in copy.notebooks if one.name == notebook.name)
                _copy(notebook.grades, other.grades, _GRADE)
                _copy(notebook.comments, other.comments, _COMMENT)
        book.db.commit()
    return True


def _copy(given: Iterable[Any], taken: Iterable[Any], names: Iterable[str]) -> None:
    others = {one.name: one for one in taken}
    for one in given:
        for name in names:
            if getattr(others[one.name], name) != getattr(one, name):
                setattr(others[one.name], name, getattr(one, name))


def _share_pages(course: Course, lab: str, team: Team) -> None:
    """The others' graded notebook and feedback page are the first member's."""
    for member in team.members[1:]:
        if not course.submission(member, lab).is_file():
            for where in (course.autograded, course.feedback):
                _copy_file(where(team.first, lab), where(member, lab))


def _copy_file(given: Path, taken: Path) -> None:
    if given.is_file() and not (taken.is_file() and taken.read_bytes() == given.read_bytes()):
        taken.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(given, taken)
