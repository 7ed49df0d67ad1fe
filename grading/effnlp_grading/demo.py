"""`effnlp demo`: the whole way of a lab, from the solved notebook to the feedback page, on a made-up class.

Executes the solved notebooks of the first labs with papermill at their fast size, releases them with nbgrader into a
scratch course, submits for a class whose mistakes are known, grades it, compares each score with what the judge gives
without any notebook, and writes a report. The checkout itself is only read.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from effnlp_grading import sample_class
from effnlp_grading.autograde import grade_class
from effnlp_grading.course import CONFIGURATION, Course, find_course
from effnlp_grading.progress import progress
from effnlp_grading.report import Demonstration, write
from effnlp_grading.results import Result
from effnlp_lab import exercises, runner
from effnlp_lab.device import resolve
from effnlp_lab.errors import UsageError
from effnlp_lab.exercises.spec import Lab
from effnlp_lab.master import Master, read_master

LABS = ("00", "01", "06")
SEED = 20_240_229  # the cases that the class is graded on: any number, the same for notebooks and judge


def main(device: str = "auto", jobs: int | None = None, out: Path | None = None) -> int:
    """Run the demonstration, print where its report is, and return 0 when all went as it should, else 1."""
    checkout = find_course()
    out = (out or checkout.root / "build").resolve()
    target = resolve(device, "1")
    labs = _labs(checkout.root)
    shown = Demonstration(scratch_course(checkout.root, out / "demo", labs), target, labs)
    print(f"On {target.describe()}")
    for name, step in (("execute", _execute), ("release", _release), ("grade", _grade), ("compare", _compare)):
        begin = time.monotonic()
        step(shown, jobs)
        shown.seconds[name] = time.monotonic() - begin
    page = write(shown, out / "report")
    for sentence in shown.problems:
        print(sentence)
    took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in shown.seconds.items())
    print(f"{'Done' if not shown.problems else 'Done, with problems'} ({took}).\nThe report: {page}")
    return 1 if shown.problems else 0


def scratch_course(root: Path, folder: Path, labs: Sequence[Lab]) -> Course:
    """A course of its own in `folder` (emptied first) with the solutions of `labs`, as an instructor has them."""
    if folder.exists():
        shutil.rmtree(folder)
    (folder / "grading").mkdir(parents=True)
    shutil.copy(root / CONFIGURATION, folder)
    shutil.copy(root / "grading" / CONFIGURATION, folder / "grading")
    for lab in labs:
        shutil.copytree(root / "solutions" / lab.name, folder / "solutions" / lab.name,
                        ignore=shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__"))
    return Course(folder)


def submit_class(course: Course, master: Master, students: Sequence[str] = sample_class.CLASS) -> None:
    """Hand in a lab for each student of the class, made from the course's own release."""
    for student in students:
        sample_class.submit(student, master, course.root / "labs", course.submitted)


def _labs(root: Path) -> list[Lab]:
    known = [exercises.lab(name) for name in exercises.lab_names() if name[:2] in LABS]
    built = [lab for lab in known if (root / "solutions" / lab.name / f"{lab.notebook}.ipynb").is_file()]
    if not built:
        raise UsageError(f"No lab is built in {root / 'solutions'}: run `effnlp build` first.")
    return built


def _master(shown: Demonstration, lab: Lab) -> Master:
    return read_master(shown.course.root / "solutions" / lab.name / f"{lab.notebook}.py")


def _execute(shown: Demonstration, jobs: int | None) -> None:
    """Run the solved notebooks at their fast size."""
    print("1 of 4: executing the solved notebooks with papermill", flush=True)
    notebooks = runner.find_notebooks([lab.name for lab in shown.labs], root=shown.course.root)
    shown.executed = runner.run(notebooks, shown.device.kind, True, jobs, shown.course.root / "run")
    shown.problems += [outcome.sentence() for outcome in shown.executed if outcome.state != "ok"]


def _release(shown: Demonstration, jobs: int | None) -> None:
    """Make the student versions with nbgrader, and the class's submissions from them."""
    for lab in shown.labs:
        print(f"2 of 4: releasing {lab.name} with nbgrader", flush=True)
        shown.course.nbgrader("generate_assignment", lab.name)
        if lab.graded:
            submit_class(shown.course, _master(shown, lab))


def _grade(shown: Demonstration, jobs: int | None) -> None:
    """Grade the class, and export the gradebook."""
    pairs = [(lab.name, student) for lab in shown.labs if lab.graded for student in sample_class.CLASS]
    with progress(len(pairs), "3 of 4: grading") as show:
        shown.results = grade_class(shown.course, pairs, device=shown.device.kind, jobs=jobs, show=show,
                              environment={"EFFNLP_SEED": str(SEED), "EFFNLP_FAST": "1"})
    if pairs:
        shown.course.nbgrader("export")


def _compare(shown: Demonstration, jobs: int | None) -> None:
    """Compare every score with what the judge gives the same answers without a notebook."""
    print("4 of 4: judging the same answers without a notebook", flush=True)
    os.environ["EFFNLP_DEVICE"] = shown.device.kind  # for the processes that judge
    plan = runner.plan_jobs(shown.device, len(shown.results), jobs)
    with ProcessPoolExecutor(plan.jobs, get_context("spawn"), _few_threads, (plan.threads,)) as pool:
        waiting = [pool.submit(_judged, shown.course.root, result.lab, result.student) for result in shown.results]
        for result, future in zip(shown.results, waiting, strict=True):
            try:
                expected = future.result()
            except Exception as error:  # an answer, a check or the process may fail in any way
                shown.problems.append(f"{result.student}, {result.lab}: the judge stopped: {str(error)[:300]}")
                continue
            shown.expected[result.lab, result.student] = expected
            shown.problems += _differences(result, expected, exercises.lab(result.lab))


def _few_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


def _judged(root: Path, lab: str, student: str) -> dict[str, float]:
    master = read_master(root / "solutions" / lab / f"{exercises.lab(lab).notebook}.py")
    return sample_class.judged_points(master, sample_class.answers(student, master), SEED)


def _differences(result: Result, expected: dict[str, float], lab: Lab) -> list[str]:
    who = f"{result.student}, {result.lab}"
    if result.grade is None:
        return [f"{who}: not graded: {result.message}"]
    found = []
    for name, points in expected.items():
        got = result.grade.exercises.get(name, (None, 0.0))[0]
        if got != points:
            found.append(f"{who}: nbgrader gives {name} {got} points, and the judge {points:g}.")
    wanted = {sample_class.PERFECT: lab.checked_points, sample_class.BLANK: 0.0}.get(result.student)
    if wanted is not None and result.grade.score != wanted:
        found.append(f"{who}: {result.grade.score:g} points, where {wanted:g} were expected.")
    return found
