"""`effnlp regrade LAB EXERCISE`: one exercise again for the whole class, after its check was mended.

Only that exercise is judged; all other verdicts stay. A grader's own points stay. Points never fall unless that is
asked for. It may be stopped at any moment: grading/regrades/LAB/EXERCISE/ holds what is done, and the same command goes
on. When all is done that folder, with every verdict as it was before, is kept under the number of the regrade.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

from effnlp_grading.autograde import judge_all, tasks_of
from effnlp_grading.course import Course
from effnlp_grading.judging import settings
from effnlp_grading.limits import Limits
from effnlp_grading.plan import digest_of, steps_of
from effnlp_grading.preprocessors import record_path, wants_sandbox
from effnlp_grading.records import read_lines, read_record, write_lines
from effnlp_grading.repair import RepairError, read_submission, repair
from effnlp_grading.results import Result
from effnlp_grading.sandbox import Sandbox
from effnlp_grading.teams import finish
from effnlp_grading.writer import Writer
from effnlp_lab import exercises
from effnlp_lab.device import resolve
from effnlp_lab.errors import UsageError
from effnlp_lab.runner import plan_jobs


@dataclass(frozen=True)
class Change:
    """One student's points in the exercise, before and after; None where there is no verdict. `why` says what held."""

    student: str
    before: float | None
    after: float | None
    why: str = ""


def regrade(course: Course, lab: str, exercise: str, *, students: Sequence[str] = (), allow_lower: bool = False,
            device: str = "auto", jobs: int | None = None, scheduler: str | None = None, confined: bool | None = None,
            environment: Mapping[str, str] | None = None, limits: Limits | None = None,
            show: Callable[[Result], None] = lambda result: None,
            say: Callable[[str], None] = lambda sentence: None) -> list[Change]:
    """Judge one exercise of a lab again and write what changed into the gradebook. Returns a Change a student.

    Raises UsageError for an exercise that the lab has not, and where nothing of the lab was ever graded.
    """
    spec = exercises.lab(lab)
    names = [e.name for e in spec.exercises if e.twin_of is None]
    if exercise not in names:
        raise UsageError(f"{lab} has no exercise {exercise!r}: expected one of {', '.join(names)}.")
    chosen = [student for student in course.students(lab) if not students or student in students]
    strangers = sorted(set(students) - set(chosen))
    if strangers:
        raise UsageError(f"There is no submission of {lab} of {', '.join(strangers)}: nothing there to regrade.")
    if not any(record_path(course.root / "grading", lab, student).is_file() for student in chosen):
        raise UsageError(f"{lab} was never graded: run `effnlp grade {lab}` first.")
    one = _Regrade(course, lab, exercise, allow_lower)
    ready = [student for student in chosen if one.prepare(student)]
    target = resolve(device)
    confined = wants_sandbox() if confined is None else confined
    with settings({"EFFNLP_DEVICE": target.kind, "EFFNLP_SANDBOX": str(int(confined)), **(environment or {})}):
        todo = [student for student in ready if not one.is_judged(student)]
        if todo and scheduler is None and confined:
            Sandbox.program()
        tasks = tasks_of(course, [(lab, student) for student in todo], target, limits or Limits(), confined,
                         environment or {}, one.path)
        for student in ready:
            if student not in todo:
                one.write(student)
        for judged in judge_all(tasks, plan_jobs(target, len(todo), jobs), target, scheduler):
            state = "not graded" if judged.refused else "graded"
            if judged.refused:
                one.passed_over[judged.student] = judged.refused
            else:
                if not one.is_judged(judged.student):  # judged where this folder cannot be seen
                    one.keep(judged.student, judged.verdicts, judged.done)
                one.write(judged.student)
            show(Result(judged.student, lab, state, judged.seconds, judged.refused))
    finish(course, lab, say)
    changes = [one.change(student) for student in chosen]
    one.close()
    return changes


def judged_at_other_points(course: Course, lab: str, students: Sequence[str]) -> list[str]:
    """A sentence on each exercise whose verdicts were made before its points were changed."""
    now = {e.name: float(e.points) for e in exercises.lab(lab).exercises}
    before: dict[str, set[str]] = {}
    for student in students:
        for verdict in read_record(record_path(course.root / "grading", lab, student)):
            if verdict.get("points") != now.get(verdict["exercise"], verdict.get("points")):
                before.setdefault(verdict["exercise"], set()).add(f"{verdict['points']:g}")
    return [f"{name} is worth {now[name]:g} now and was judged at {' and '.join(sorted(points))}: run `effnlp regrade "
            f"{lab} {name}`." for name, points in before.items()]


class _Regrade:
    """The state of one regrade on disk: a record a student, begun without the exercise, and the verdicts before."""

    def __init__(self, course: Course, lab: str, exercise: str, allow_lower: bool) -> None:
        self.course, self.lab, self.exercise, self.allow_lower = course, lab, exercise, allow_lower
        self.folder = course.root / "grading" / "regrades" / lab / exercise
        self.passed_over: dict[str, str] = {}
        path = course.root / "labs" / lab / f"{exercises.lab(lab).notebook}.ipynb"
        self.release = nbformat.read(path, as_version=4)
        self.writer = Writer(course)

    def path(self, lab: str, student: str) -> Path:
        """The record in which a student is judged again."""
        return self.folder / f"{student}.jsonl"

    def prepare(self, student: str) -> bool:
        """Begin a student's record unless it is begun. False, with a reason in `passed_over`, where there is none."""
        lines = read_lines(record_path(self.course.root / "grading", self.lab, student))
        verdicts = {line["exercise"]: line for line in lines if "exercise" in line}
        if not lines or self.exercise not in verdicts or not any("finished" in line for line in lines):
            self.passed_over[student] = "it was never graded: `effnlp grade` does that"
            return False
        digest = self._digest(student)
        if digest != lines[0].get("submission"):
            self.passed_over[student] = "it or the release has changed since: `effnlp grade --force` judges all of it"
            return False
        if read_lines(self.path(self.lab, student))[:1] != [lines[0]]:
            write_lines(self._before(student), [verdicts[self.exercise]])
            rest = [line for line in lines[1:] if "finished" not in line and line.get("exercise") != self.exercise]
            write_lines(self.path(self.lab, student), [lines[0], *rest])
        return True

    def is_judged(self, student: str) -> bool:
        lines = read_lines(self.path(self.lab, student))
        return any("finished" in line for line in lines) and any(
            line.get("exercise") == self.exercise for line in lines)

    def keep(self, student: str, verdicts: Mapping[str, Mapping[str, Any]], done: Mapping[str, Any]) -> None:
        head, *rest = read_lines(self.path(self.lab, student))
        predictions = [line for line in rest if "prediction" in line]
        write_lines(self.path(self.lab, student), [head, *predictions, *verdicts.values(), {"finished": True, **done}])

    def write(self, student: str) -> None:
        """Put the better verdict into the student's record, and through nbgrader into gradebook and pages."""
        record = record_path(self.course.root / "grading", self.lab, student)
        lines = read_lines(self.path(self.lab, student))
        before = self._old(student)
        after = next(line for line in lines if line.get("exercise") == self.exercise)
        if after["score"] < before["score"] and not self.allow_lower:
            lines = [before if line.get("exercise") == self.exercise else line for line in lines]
        if read_lines(record) == lines and self.course.feedback(student, self.lab).is_file():
            return
        flags = self._flags(student)
        self.course.feedback(student, self.lab).unlink(missing_ok=True)  # until it is there again, this is not done
        write_lines(record, lines)
        why = self.writer.write_kept(self.lab, student)
        if why:
            self.passed_over[student] = why
        self._flags(student, flags)

    def change(self, student: str) -> Change:
        """What the regrade made of a student's points."""
        if student in self.passed_over:
            return Change(student, None, None, self.passed_over[student])
        before = float(self._old(student)["score"])
        after = next(float(line["score"]) for line in read_lines(self.path(self.lab, student))
                     if line.get("exercise") == self.exercise)
        manual = self._manual(student)
        if manual is not None:
            return Change(student, manual, manual, f"kept because a grader gave these points (judged: {after:g})")
        if after < before and not self.allow_lower:
            return Change(student, before, before, f"kept because {after:g} would be lower (--allow-lower)")
        return Change(student, before, after)

    def close(self) -> None:
        """All is done: the folder is kept under the next number, and another regrade begins anew."""
        if self.folder.is_dir():
            number = 1
            while (there := self.folder.with_name(f"{self.exercise}.{number}")).exists():
                number += 1
            self.folder.rename(there)

    def _before(self, student: str) -> Path:
        return self.folder / f"{student}.before.jsonl"

    def _old(self, student: str) -> dict[str, Any]:
        return read_lines(self._before(student))[0]

    def _digest(self, student: str) -> str:
        try:
            notebook = read_submission(self.course.submission(student, self.lab).read_bytes())
            return digest_of(steps_of(repair(notebook, self.release).notebook, exercises.lab(self.lab)))
        except RepairError:
            return ""

    def _manual(self, student: str) -> float | None:
        from nbgrader.api import Gradebook, MissingEntry

        notebook = exercises.lab(self.lab).notebook
        with Gradebook(self.course.patient_url) as book:
            try:
                return book.find_grade(f"test_{self.exercise}", notebook, self.lab, student).manual_score
            except MissingEntry:
                return None

    def _flags(self, student: str, wanted: Mapping[str, bool] | None = None) -> dict[str, bool]:
        """Which of a student's other exercises wait for a grader; with `wanted`, put that back.

        nbgrader asks for another look at every manual score when a submission is graded again, and here only one was.
        """
        from nbgrader.api import Gradebook, MissingEntry

        with Gradebook(self.course.patient_url) as book:
            try:
                graded = book.find_submission_notebook(exercises.lab(self.lab).notebook, self.lab, student)
            except MissingEntry:
                return {}
            found = {grade.name: bool(grade.needs_manual_grade) for grade in graded.grades}
            for grade in graded.grades if wanted else ():
                if grade.name != f"test_{self.exercise}" and grade.name in wanted:
                    grade.needs_manual_grade = wanted[grade.name]
            book.db.commit()
            return found


def table(changes: Sequence[Change]) -> list[str]:
    """The difference, for people: a line a student of whom there is something to say, and a sum."""
    lines = []
    width = max((len(one.student) for one in changes), default=0)
    for one in changes:
        if one.before is None:
            lines.append(f"{one.student:<{width}}  not regraded: {one.why}")
        elif one.before != one.after or one.why:
            lines.append(f"{one.student:<{width}}  {one.before:g} -> {one.after:g}{f'  {one.why}' if one.why else ''}")
    done = [one for one in changes if one.before is not None]
    up, down = sum(one.after > one.before for one in done), sum(one.after < one.before for one in done)
    return [*lines, f"{len(done)} regraded: {up} have more points, {down} fewer, {len(done) - up - down} the same."]


