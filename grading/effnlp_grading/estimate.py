"""`effnlp grade --estimate`: what grading a lab will take, from the class's size and what the last run took."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from effnlp_grading.autograde import changed
from effnlp_grading.course import Course
from effnlp_grading.limits import Limits
from effnlp_grading.preprocessors import record_path
from effnlp_grading.records import read_lines
from effnlp_grading.results import Result
from effnlp_lab.device import resolve
from effnlp_lab.runner import plan_jobs

HOUR = 3600.0


@dataclass(frozen=True)
class Estimate:
    """What grading `submissions` takes on `jobs` at a time. `seconds`: of one, the mean of `measured` that were
    judged last on this kind of device; `most`: the longest of them. `overhead`: seconds beside judging, each."""

    lab: str
    device: str
    submissions: int
    jobs: int
    threads: int
    measured: int
    seconds: float
    most: float
    overhead: float
    other_device: str = ""

    @property
    def core_hours(self) -> float:
        return self.submissions * (self.seconds + self.overhead) * self.threads / HOUR

    @property
    def gpu_hours(self) -> float:
        return self.submissions * self.seconds / HOUR if self.device == "cuda" else 0.0

    @property
    def hours(self) -> float:
        """By the clock."""
        return self.submissions * (self.seconds + self.overhead) / max(self.jobs, 1) / HOUR


def estimate(course: Course, lab: str, *, device: str = "auto", jobs: int | None = None, size: int | None = None,
             force: bool = False) -> Estimate:
    """Estimate grading what is there and not graded yet, or `size` submissions."""
    target = resolve(device)
    students = course.students(lab)
    count = size if size is not None else sum(force or changed(course, lab, student) for student in students)
    plan = plan_jobs(target, count, jobs)
    taken = times_of(course, lab)
    mine = taken.get(target.kind, [])
    other = "" if mine else next(iter(sorted(taken)), "")
    seconds = mine or taken.get(other, [])
    return Estimate(lab, target.kind, count, plan.jobs, max(plan.threads, 1), len(seconds),
                    statistics.fmean(seconds) if seconds else Limits().submission_seconds,
                    max(seconds, default=Limits().submission_seconds), _overhead(course, lab), other)


def times_of(course: Course, lab: str) -> dict[str, list[float]]:
    """Seconds that judging each submission took when it was last judged, by kind of device."""
    found: dict[str, list[float]] = {}
    for path in sorted(record_path(course.root / "grading", lab, "x").parent.glob("*.jsonl")):
        lines = read_lines(path)
        verdicts = [line for line in lines if "exercise" in line]
        whole = next((float(line["seconds"]) for line in lines if "finished" in line and "seconds" in line), 0.0)
        if verdicts:
            judging = sum(float(line.get("seconds", 0.0)) for line in verdicts)
            found.setdefault(verdicts[0].get("device", "cpu"), []).append(max(whole, judging))
    return found


def keep_run(course: Course, lab: str, results: Sequence[Result], seconds: float, jobs: int) -> None:
    """Keep what a run took beside judging, for the next estimate."""
    graded = [one for one in results if one.state == "graded"]
    if graded:
        beside = max(0.0, seconds * jobs / len(graded) - statistics.fmean([one.seconds for one in graded]))
        path = _run_file(course, lab)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"graded": len(graded), "seconds": round(seconds, 3), "jobs": jobs,
                                    "beside_judging": round(beside, 3)}) + "\n", "utf-8")


def sentences(one: Estimate) -> list[str]:
    """The estimate for people."""
    known = (f"{one.measured} submissions took {one.seconds:.1f} s each on average when they were last judged, at most "
             f"{one.most:.1f} s")
    if not one.measured:
        known = f"none was ever graded here, so each counts with its limit of {one.seconds:.0f} s: an upper bound"
    elif one.other_device:
        known += f", on {one.other_device}: nothing is known of {one.device}"
    lines = [f"{one.lab}: {one.submissions} submissions to grade on {one.device}, {one.jobs} at a time "
             f"({known}; {one.overhead:.1f} s each beside judging).",
             f"Core-hours: {one.core_hours:.2f}. GPU-hours: {one.gpu_hours:.2f}. By the clock: {_clock(one.hours)}."]
    return lines


def _overhead(course: Course, lab: str) -> float:
    path = _run_file(course, lab)
    try:
        return float(json.loads(path.read_text("utf-8"))["beside_judging"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def _run_file(course: Course, lab: str) -> Path:
    return course.root / "grading" / "reports" / lab / "run.json"


def _clock(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * HOUR:.0f} s"
