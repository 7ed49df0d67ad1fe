"""Grade the submissions of a lab, several at once, each by plain nbgrader in a process of its own.

This is the seam for another way to execute a submission: whatever `grade_one.py` does, the gradebook, the feedback
pages and the results below stay the same.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Literal

from effnlp_grading.course import Course, Grade, environment_with_kit, last_words
from effnlp_lab.device import resolve
from effnlp_lab.errors import UsageError
from effnlp_lab.runner import kill_tree, plan_jobs

LIMIT_SECONDS = 3600.0  # one submission; a cell's limit is in nbgrader_config.py
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")

State = Literal["graded", "kept", "not graded"]


@dataclass(frozen=True)
class Result:
    """How the grading of one submission ended. "kept": it was graded before and has not changed since."""

    student: str
    lab: str
    state: State
    seconds: float = 0.0
    message: str = ""
    grade: Grade | None = None


def grade(course: Course, pairs: Sequence[tuple[str, str]], *, device: str = "auto", jobs: int | None = None,
          force: bool = False, environment: Mapping[str, str] | None = None, limit: float = LIMIT_SECONDS,
          show: Callable[[Result], None] = lambda result: None) -> list[Result]:
    """Grade (lab, student) pairs and return their results in order; `show` is called as each one ends.

    `limit` is in seconds, for one submission. A submission that was graded and has not changed is kept unless `force`.
    """
    for lab in dict.fromkeys(lab for lab, _ in pairs):
        if not course.is_released(lab):
            raise UsageError(f"The gradebook of {course.root} does not know {lab}: "
                             f"run `nbgrader generate_assignment {lab}` first.")
    target = resolve(device)
    plan = plan_jobs(target, len(pairs), jobs)
    stop = threading.Event()
    slots: Queue[str | None] = Queue()
    for gpu in plan.gpus:
        slots.put(gpu)
    common = {**environment_with_kit(), "EFFNLP_DEVICE": target.kind, **dict.fromkeys(THREADS, str(plan.threads)),
              **(environment or {})}

    def work(lab: str, student: str) -> Result:
        if not force and not _changed(course, lab, student):
            result = Result(student, lab, "kept")
        else:
            gpu = slots.get()
            try:
                here = common if gpu is None else {**common, "CUDA_VISIBLE_DEVICES": gpu}
                result = _grade_one(course, lab, student, here, limit, stop)
            finally:
                slots.put(gpu)
        show(result)
        return result

    with ThreadPoolExecutor(plan.jobs) as pool:
        futures = [pool.submit(work, lab, student) for lab, student in pairs]
        try:
            results = [future.result() for future in futures]
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise
    grades = {lab: course.grades(lab) for lab in {lab for lab, _ in pairs}}
    return [Result(r.student, r.lab, r.state, r.seconds, r.message,
                   grades[r.lab].get(r.student) if r.state != "not graded" else None) for r in results]


def _changed(course: Course, lab: str, student: str) -> bool:
    """Whether a submission is newer than its graded notebook, or was never graded."""
    graded, feedback = course.autograded(student, lab), course.feedback(student, lab)
    if not (graded.is_file() and feedback.is_file()):
        return True
    return course.submission(student, lab).stat().st_mtime > graded.stat().st_mtime


def _grade_one(course: Course, lab: str, student: str, environment: Mapping[str, str], limit: float,
               stop: threading.Event) -> Result:
    log = course.log(student, lab)
    log.unlink(missing_ok=True)
    try:
        lost = course.lost_cells(student, lab)
    except Exception as error:  # whatever a file that is not a notebook may raise
        why = f"the file is not a notebook that can be read ({error})"[:300]
        return Result(student, lab, "not graded", message=why)
    if lost:
        why = (f"the answer cell of {lost[0]} is gone, or has lost nbgrader's metadata (some editors drop it): "
               "put the answers into a fresh copy of the released notebook")
        return Result(student, lab, "not graded", message=why)
    log.parent.mkdir(parents=True, exist_ok=True)
    course.feedback(student, lab).unlink(missing_ok=True)  # its presence says that grading came to its end
    command = [sys.executable, "-P", str(Path(__file__).with_name("grade_one.py")), str(course.root), lab, student]
    begin = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
                                   cwd=course.root, env=dict(environment), start_new_session=True)
        ended = _wait(process, begin + limit, stop)
    seconds = time.monotonic() - begin
    if not ended:
        why = f"the limit for one submission is {limit:.0f} s" if not stop.is_set() else "interrupted"
        return Result(student, lab, "not graded", seconds, why)
    if process.returncode != 0:
        return Result(student, lab, "not graded", seconds, last_words(log.read_text(errors="replace")))
    return Result(student, lab, "graded", seconds)


def _wait(process: subprocess.Popen[bytes], deadline: float, stop: threading.Event) -> bool:
    """Wait for a process; at the deadline or on `stop` end it with its kernel. Says whether it ended by itself."""
    try:
        while process.poll() is None:
            if stop.wait(0.1) or time.monotonic() > deadline:
                return False
        return True
    finally:
        kill_tree(process)
