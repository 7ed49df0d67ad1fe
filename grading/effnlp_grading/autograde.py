"""Grade the submissions of a class: judged in parallel by Dask's workers, written to the gradebook by one writer.

Every verdict is on disk before it goes on. Interrupted or killed, the same command goes on where it was: what is
judged is not judged again, and the gradebook ends as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from effnlp_grading.course import Course, environment_with_kit
from effnlp_grading.judging import Judged, Task, judge_task, settings
from effnlp_grading.limits import Limits
from effnlp_grading.preprocessors import close_sandboxes, record_path, wants_sandbox
from effnlp_grading.records import Seeds
from effnlp_grading.results import Result
from effnlp_grading.sandbox import Sandbox, SandboxError
from effnlp_grading.writer import Writer
from effnlp_lab import exercises
from effnlp_lab.device import Device, resolve
from effnlp_lab.errors import UsageError
from effnlp_lab.runner import Plan, plan_jobs

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
RETRIES = 3  # of a submission whose worker was killed


def grade_class(course: Course, pairs: Sequence[tuple[str, str]], *, device: str = "auto", jobs: int | None = None,
                force: bool = False, environment: Mapping[str, str] | None = None, limits: Limits | None = None,
                scheduler: str | None = None, confined: bool | None = None,
                show: Callable[[Result], None] = lambda result: None) -> list[Result]:
    """Grade (lab, student) pairs and return their results in order; `show` is called as each one ends.

    A submission that was graded and has not changed is kept unless `force`. `scheduler` is the address of a Dask
    cluster, whose workers have this package; without one a local cluster is started where more than one job fits.
    Raises UsageError for a lab that is not released, and SandboxError where there can be no sandbox.
    """
    for lab in dict.fromkeys(lab for lab, _ in pairs):
        if not course.is_released(lab):
            raise UsageError(f"The gradebook of {course.root} does not know {lab}: "
                             f"run `nbgrader generate_assignment {lab}` first.")
    target = resolve(device)
    confined = wants_sandbox() if confined is None else confined
    todo = [pair for pair in pairs if force or changed(course, *pair)]
    results = {pair: Result(pair[1], pair[0], "kept") for pair in pairs if pair not in set(todo)}
    for kept in results.values():
        show(kept)
    with settings({"EFFNLP_DEVICE": target.kind, "EFFNLP_SANDBOX": str(int(confined)), **(environment or {})}):
        if force:
            for lab, student in todo:
                record_path(course.root / "grading", lab, student).unlink(missing_ok=True)
        tasks = tasks_of(course, todo, target, limits or Limits(), confined, environment or {})
        plan = plan_jobs(target, len(todo), jobs)
        if tasks and scheduler is None and confined:  # the refusal is one sentence, before anything is started
            Sandbox.program()
        writer = Writer(course) if tasks else None
        for judged in judge_all(tasks, plan, target, scheduler):
            result = _written(writer, judged)
            results[judged.lab, judged.student] = result
            show(result)
    grades = {lab: course.grades(lab) for lab in {lab for lab, _ in pairs}}
    return [_with_grade(results[pair], grades) for pair in pairs]


def changed(course: Course, lab: str, student: str) -> bool:
    """Whether a submission is newer than its graded notebook, or was never graded."""
    graded, feedback = course.autograded(student, lab), course.feedback(student, lab)
    if not (graded.is_file() and feedback.is_file()):
        return True
    return course.submission(student, lab).stat().st_mtime > graded.stat().st_mtime


def tasks_of(course: Course, pairs: Sequence[tuple[str, str]], target: Device, limits: Limits, confined: bool,
             environment: Mapping[str, str], record: Callable[[str, str], Path] | None = None) -> list[Task]:
    """Submissions as tasks for workers. Verdicts are kept in `record(lab, student)`, else where grading keeps them."""
    folder = course.root / "grading"
    Seeds.of_course(folder)  # makes the key
    key = (folder / "seed_key").read_text().strip().encode()
    kept = {name: os.environ[name] for name in ("EFFNLP_DEVICE", "EFFNLP_SEED", "EFFNLP_FAST", "EFFNLP_VARIANT_KEY")
            if name in os.environ}
    tasks = []
    for lab, student in pairs:
        path = record(lab, student) if record else record_path(folder, lab, student)
        path.parent.mkdir(parents=True, exist_ok=True)
        release = course.root / "labs" / lab / f"{exercises.lab(lab).notebook}.ipynb"
        tasks.append(Task(lab, student, course.submission(student, lab).read_bytes(), release.read_text("utf-8"), key,
                          target.kind, confined, limits, str(path), {**kept, **environment}))
    return tasks


def judge_all(tasks: Sequence[Task], plan: Plan, target: Device, scheduler: str | None) -> Iterator[Judged]:
    """Judge tasks here, one after another, or on Dask's workers; yield what comes of each as it comes."""
    if scheduler is None and (plan.jobs == 1 or len(tasks) < 2):
        try:
            for task in tasks:
                yield judge_task(task)
        finally:
            close_sandboxes()
        return
    from distributed import as_completed

    with _client(plan, target, scheduler) as client:
        needs = {"GPU": 1} if target.kind == "cuda" else None
        gpus = tuple(gpu for gpu in plan.gpus if gpu is not None) if scheduler is None else ()
        how = {"pure": False, "retries": RETRIES, "resources": needs}
        futures = {client.submit(judge_task, replace(task, gpus=gpus), **how): task for task in tasks}
        for future in as_completed(list(futures)):
            task, error = futures.pop(future), future.exception()
            if isinstance(error, SandboxError):
                raise error
            if error is not None:
                yield Judged(task.lab, task.student, refused=f"its worker stopped ({error})"[:300])
            else:
                yield future.result()
            future.release()


@contextlib.contextmanager
def _client(plan: Plan, target: Device, scheduler: str | None) -> Iterator:
    """A client of the cluster at `scheduler`, or of one on this machine for as long as it is needed."""
    from distributed import Client, LocalCluster

    if scheduler is not None:
        try:
            with Client(scheduler, timeout=30) as client:
                yield client
        except OSError as error:
            raise UsageError(f"No Dask scheduler answers at {scheduler}: expected an address such as "
                             f"tcp://host:8786 ({error}).") from error
        return
    threads = dict.fromkeys(THREADS, str(plan.threads))
    place = tempfile.TemporaryDirectory(prefix="effnlp-dask-", ignore_cleanup_errors=True)
    with settings({**environment_with_kit(), **threads}), place as folder, LocalCluster(
            n_workers=plan.jobs, threads_per_worker=1, processes=True, dashboard_address=None, memory_limit=0,
            local_directory=folder, silence_logs=logging.CRITICAL,
            resources={"GPU": 1} if target.kind == "cuda" else None) as cluster, Client(cluster) as client:
        client.run(_start_quietly)
        yield client


def _start_quietly() -> None:
    """On a worker: leave interrupts to the main process, which ends the workers in order."""
    import signal

    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _written(writer: Writer, judged: Judged) -> Result:
    if judged.refused:
        return Result(judged.student, judged.lab, "not graded", judged.seconds, judged.refused)
    why = writer.write(judged)
    if why:
        return Result(judged.student, judged.lab, "not graded", judged.seconds, why, look=judged.look)
    return Result(judged.student, judged.lab, "graded", judged.seconds, look=judged.look)


def _with_grade(result: Result, grades: Mapping[str, Mapping]) -> Result:
    grade = grades[result.lab].get(result.student) if result.state != "not graded" else None
    return Result(result.student, result.lab, result.state, result.seconds, result.message, grade, result.look)
