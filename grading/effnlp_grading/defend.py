"""`effnlp defend`: a ten-minute quiz on a student's own accepted code, and the grading of what came back.

grading/defences/LAB/STUDENT/NUMBER/ holds quiz.html, which goes to the student, and key.json, which does not. The
student's code and its changes run in the sandbox, as submissions do. Nothing of it reaches the gradebook.
"""

from __future__ import annotations

import difflib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effnlp_grading.connection import Connection, Ended
from effnlp_grading.course import Course
from effnlp_grading.limits import Limits
from effnlp_grading.plan import Step, digest_of, steps_of
from effnlp_grading.preprocessors import record_path, sandbox_of
from effnlp_grading.quiz import Accepted, Question, make_quiz, no_end
from effnlp_grading.records import Record
from effnlp_grading.repair import read_submission, repair
from effnlp_grading.sandbox import Sandbox
from effnlp_grading.similarity import released
from effnlp_lab import exercises
from effnlp_lab.errors import UsageError
from effnlp_lab.exercises.spec import Lab

TEMPLATE = Path(__file__).with_name("quiz.html")
MINUTES = 10
LETTERS = "abcd"
LIMITS = Limits(memory=1 << 30, cell_seconds=30.0, grace=1.0)


def main(course: Course, student: str, lab: str | None = None, count: int = 5, confined: bool = True) -> Path:
    """Write a quiz for a student, and say where it is; return its page. Raises UsageError where there is nothing to
    defend, in a sentence."""
    spec, steps, accepted = accepted_of(course, student, lab)
    blanks, _ = released(course, spec)
    sandbox = sandbox_of(spec.name, "cpu", confined)
    runners: list[SandboxRunner] = []

    def runner_of(one: Accepted) -> SandboxRunner:
        runners.append(SandboxRunner(sandbox, steps, one.exercise.name))
        return runners[-1]

    seed = int(os.environ.get("EFFNLP_SEED") or secrets.randbits(32))
    try:
        questions = make_quiz(spec.name, accepted, blanks, runner_of, seed, count,
                              show=lambda name: print(f"{name}: changing it in small ways", flush=True))
    finally:
        for runner in runners:
            runner.end()
    if not questions:
        raise UsageError(f"The accepted code of {student} in {spec.name} gives no question: no small change of it "
                         "shows on an input that can be read. Ask in person, or name another lab.")
    page = write_quiz(course, spec, student, questions)
    print(f"{len(questions)} questions, about {MINUTES} minutes. For {student}: {page}\n"
          f"The key stays with you: {page.with_name('key.json')}\n"
          f"Then: effnlp defend {student} --grade answers.json")
    return page


def accepted_of(course: Course, student: str, lab: str | None) -> tuple[Lab, list[Step], list[Accepted]]:
    """The lab to defend (the latest one with accepted code by default), the notebook's steps, and what was accepted."""
    if Path(student).name != student or not (course.submitted / student).is_dir():
        known = sorted(p.name for p in course.submitted.glob("*") if p.is_dir())
        near = difflib.get_close_matches(student, known, n=1)
        raise UsageError(f"There is no student {student!r} in {course.submitted}"
                         + (f": did you mean {near[0]}?" if near else ": expected the name of a folder there."))
    if lab is not None:
        return _accepted_in(course, student, exercises.lab(lab))
    why = []
    for name in reversed(exercises.lab_names()):
        if course.submission(student, name).is_file():
            try:
                return _accepted_in(course, student, exercises.lab(name))
            except UsageError as error:
                why.append(str(error))
    raise UsageError(why[0] if why else f"{student} has submitted no lab of this kit.")


def _accepted_in(course: Course, student: str, lab: Lab) -> tuple[Lab, list[Step], list[Accepted]]:
    import nbformat

    path = course.submission(student, lab.name)
    if not path.is_file():
        raise UsageError(f"{student} has no submission of {lab.name}: expected {path}.")
    kept = record_path(course.root / "grading", lab.name, student)
    if not kept.is_file():
        raise UsageError(f"{lab.name} of {student} is not graded: run "
                         f"`effnlp grade {lab.number} --students {student}`.")
    release = nbformat.read(course.root / "labs" / lab.name / f"{lab.notebook}.ipynb", as_version=4)
    steps = steps_of(repair(read_submission(path.read_bytes(), path.name), release, path.name).notebook, lab)
    if json.loads(kept.read_text("utf-8").splitlines()[0]).get("submission") != digest_of(steps):
        raise UsageError(f"{lab.name} of {student} has changed since it was graded: run "
                         f"`effnlp grade {lab.number} --students {student}`.")
    accepted = []
    for verdict in Record(kept, digest_of(steps)).verdicts.values():
        exercise = lab.exercise(verdict.get("twin") or verdict["exercise"])
        source = next((s.source for s in steps if s.answers == exercise.name), "")
        if verdict["state"] == "correct" and source:
            accepted.append(Accepted(exercise, source, verdict["variant"]))
    if not accepted:
        raise UsageError(f"{student} has no accepted exercise in {lab.name}: there is nothing to defend.")
    return lab, steps, accepted


class SandboxRunner:
    """Runs a student's notebook up to an exercise, and then other texts of its cell, in a session of the sandbox."""

    def __init__(self, sandbox: Sandbox, steps: Sequence[Step], exercise: str, limits: Limits = LIMITS) -> None:
        self.sandbox, self.exercise, self.limits = sandbox, exercise, limits
        last = max(place for place, step in enumerate(steps) if step.answers == exercise)
        self.before = [step.source for step in steps[:last] if step.kind == "run" and step.answers != exercise]
        self._session: Connection | None = None

    def run(self, source: str, requests: Sequence[tuple[bytes, float]], fresh: bool = False) -> list[bytes | str]:
        if fresh:
            self.end()
        found: list[bytes | str] = []
        for request, seconds in requests:
            try:
                error = self._begin(source) if self._session is None or not found else None
                if error:  # what was defined before is still there, and not what is asked about
                    return [f"does not even run: {': '.join(error)}"] * len(requests)
                found.append(self._session.case(self.exercise, request, seconds))
                if no_end(found[-1]):
                    break
            except Ended as end:
                self._session = None
                if end.status == "timed out":
                    return []
                found.append(str(end))
        return found

    def _begin(self, source: str) -> list[str] | None:
        """Run `source`, in the session that there is or in a new one; what it raised, if anything."""
        if self._session is None:
            self._session = Connection(self.sandbox, self.limits)
            for text in self.before:
                self._session.run(text)
        return self._session.run(source)["error"]

    def end(self) -> None:
        if self._session is not None:
            self._session.end()
            self._session = None


def write_quiz(course: Course, lab: Lab, student: str, questions: Sequence[Question]) -> Path:
    """Write quiz.html and key.json into a new folder; return the page."""
    import jinja2

    base = course.root / "grading" / "defences" / lab.name / student
    number = 1 + max((int(p.name) for p in base.glob("[0-9]*") if p.name.isdigit()), default=0)
    folder = base / str(number)
    folder.mkdir(parents=True)
    identity = f"{lab.number}-{number}-{secrets.token_hex(4)}"
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE.read_text("utf-8")).render(
        lab=lab, student=student, minutes=MINUTES, identity=identity, letters=LETTERS,
        questions=[{**question.to_json(), "lines": list(enumerate(question.code.splitlines(), 1))}
                   for question in questions])
    (folder / "quiz.html").write_text(page, "utf-8")
    key = {"quiz": identity, "lab": lab.name, "student": student, "questions": [q.to_json() for q in questions]}
    (folder / "key.json").write_text(json.dumps(key, indent=1) + "\n", "utf-8")
    return folder / "quiz.html"


def grade_quiz(course: Course, student: str, answers: Path) -> tuple[int, int]:
    """Grade what came back, print it, keep it beside the key; return how many were right, and of how many."""
    told = read_answers(answers)
    keys = {}
    for path in sorted((course.root / "grading" / "defences").glob(f"*/{student}/*/key.json")):
        key = json.loads(path.read_text("utf-8"))
        keys[key["quiz"]] = (path, key)
    if told["quiz"] not in keys:
        raise UsageError(f"{answers} answers the quiz {told['quiz']!r}, which was not made for {student}: expected "
                         f"{', '.join(keys) or 'none, because no quiz was made'}.")
    path, key = keys[told["quiz"]]
    right, lines = 0, []
    for number, question in enumerate(key["questions"], 1):
        given = str(told["answers"].get(str(number), "")).strip().lower()
        letter = LETTERS[question["right"]]
        right += given == letter
        lines.append(f"{number}. {question['exercise']}, {question['kind']}: "
                     + (f"{letter}, right." if given == letter else f"{given or 'nothing'}; right is {letter}.")
                     + f" {question['why']}")
    count = len(key["questions"])
    print("\n".join([*lines, f"{student}: {right} of {count} right."]))
    result = {"quiz": told["quiz"], "answers": told["answers"], "right": right, "of": count}
    path.with_name("result.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return right, count


def read_answers(path: Path) -> dict[str, Any]:
    """{"quiz": ..., "answers": {"1": "b", ...}}. Raises UsageError for anything else."""
    try:
        told = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"There is no file {path}: --grade takes the answers.json that a quiz saved.") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: --grade takes the answers.json that a quiz saved.") from error
    sound = isinstance(told, dict) and isinstance(told.get("quiz"), str) and isinstance(told.get("answers"), dict)
    if not sound:
        raise UsageError(f'{path} holds no answers: expected {{"quiz": "...", "answers": {{"1": "a", ...}}}}.')
    return told
