"""Judging one submission wherever a worker is: what it needs comes with the task, what it found goes back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat

from effnlp_grading.limits import Limits
from effnlp_grading.plan import digest_of, steps_of
from effnlp_grading.proctor import Graded, Proctor
from effnlp_grading.records import Record, Seeds
from effnlp_grading.repair import RepairError, read_submission, repair
from effnlp_grading.sandbox import open_sandbox
from effnlp_lab import exercises


@dataclass(frozen=True)
class Task:
    """A submission to judge: its bytes and the release's, and where its verdicts are kept if the worker can see it."""

    lab: str
    student: str
    submission: bytes
    release: str
    key: bytes
    device: str = "cpu"
    confined: bool = True
    limits: Limits = field(default_factory=Limits)
    record: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judged:
    """What came of a task. `refused` is the sentence of a submission that could not be read."""

    lab: str
    student: str
    verdicts: dict[str, dict[str, Any]] = field(default_factory=dict)
    predictions: dict[str, dict[str, Any]] = field(default_factory=dict)
    done: dict[str, Any] = field(default_factory=dict)
    digest: str = ""
    seconds: float = 0.0
    look: tuple[str, ...] = ()
    refused: str = ""


def judge_task(task: Task) -> Judged:
    """Judge a submission in this process's sandbox. Raises SandboxError where there can be none."""
    from effnlp_grading.preprocessors import sandbox_of

    with settings(_settings_of(task)):
        release = nbformat.reads(task.release, as_version=4)
        try:
            whole = repair(read_submission(task.submission, f"The submission of {task.student}"), release,
                           f"The submission of {task.student}")
        except RepairError as error:
            return Judged(task.lab, task.student, refused=str(error))
        steps = steps_of(whole.notebook, exercises.lab(task.lab))
        path = Path(task.record) if task.record and Path(task.record).parent.parent.is_dir() else None
        record = Record(path, digest_of(steps), {"student": task.student})
        sandbox = sandbox_of(task.lab, task.device, task.confined)
        proctor = Proctor(sandbox, Seeds(task.key), task.limits, task.device)
        graded = proctor.grade(whole.notebook, task.student, record, whole.sentences)
        return Judged(task.lab, task.student, record.verdicts, record.predictions, record.done or {}, record.digest,
                      graded.seconds, tuple(graded.look))


def grade(submission: str | os.PathLike, lab: str | None = None, *, student: str = "student", device: str = "auto",
          release: str | os.PathLike | None = None, sandbox: bool = True, limits: Limits | None = None) -> Graded:
    """Grade one notebook and return verdicts, points and what a person should look at; touches no gradebook.

    submission: a notebook's file; lab: which lab it is of (found by the notebook's name otherwise); release: the
    released notebook (the one in labs/ of this course otherwise). Raises RepairError for a file that is no notebook of
    the lab, and SandboxError where there can be no sandbox.
    """
    from effnlp_grading.course import find_course
    from effnlp_lab.device import resolve

    path = Path(submission)
    spec = exercises.lab(lab or path.stem)
    released = Path(release) if release else find_course().root / "labs" / spec.name / f"{spec.notebook}.ipynb"
    kind = resolve(device).kind
    whole = repair(read_submission(path.read_bytes(), path.name), nbformat.read(released, as_version=4), path.name)
    with open_sandbox(spec.name, kind, sandbox) as room:
        proctor = Proctor(room, Seeds(os.urandom(32)), limits, kind)
        return proctor.grade(whole.notebook, student, mended=whole.sentences)


def _settings_of(task: Task) -> dict[str, str]:
    """The settings that come with a task, and this worker's GPU."""
    wanted = dict(task.environment)
    if task.gpus and "CUDA_VISIBLE_DEVICES" not in wanted:
        wanted["CUDA_VISIBLE_DEVICES"] = task.gpus[_worker_number() % len(task.gpus)]
    return wanted


@contextlib.contextmanager
def settings(wanted: Mapping[str, str]) -> Iterator[None]:
    """Variables of the environment that hold meanwhile."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _worker_number() -> int:
    """The number of this Dask worker, 0 where there is none."""
    with contextlib.suppress(ImportError, ValueError):
        from distributed import get_worker

        name = str(get_worker().name)
        return int("".join(c for c in name if c.isdigit()) or 0)
    return 0
