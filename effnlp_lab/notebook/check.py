"""`check`: the one call under every blank."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable

from effnlp_lab import exercises
from effnlp_lab.errors import EffnlpError
from effnlp_lab.notebook import report, setting
from effnlp_lab.notebook.driver import answer_case
from effnlp_lab.notebook.judge import Verdict, judge


class CheckFailed(EffnlpError):
    """A solution that its own check refuses."""


def check(exercise: str, answer: Callable, twin: Callable | None = None) -> float:
    """Run `answer` against the reference on fresh random cases, show why, and return the points it earns.

    Where an exercise has a PyTorch twin, the better of the two counts. Below the report stand the points of the lab so
    far, each exercise as its last check since `start` found it. Returns a plain float between 0 and the points;
    never raises for anything that an answer does, but with EFFNLP_STRICT=1 (as solutions are executed) raises
    CheckFailed for what is not correct. Raises EffnlpError for an exercise that does not exist. While a submission is
    graded, this judges nothing: the proctor does, outside the process that runs the notebook.
    """
    if os.environ.get("EFFNLP_GRADING"):
        print(f"{exercise}: the grader judges this outside the notebook.")
        return 0.0
    verdict = verdict_of(exercise, answer, twin)
    setting.current.scores[exercise] = verdict.score
    report.show(verdict, setting.standing(exercises.find(exercise)[0]))
    if os.environ.get("EFFNLP_STRICT") == "1" and verdict.state not in ("correct", "not run here"):
        raise CheckFailed(f"{exercise}: {verdict.state}. {verdict.sentence}")
    return verdict.score


def verdict_of(exercise: str, answer: Callable, twin: Callable | None = None, seed: int | None = None) -> Verdict:
    """The verdict behind `check`, in this process. EFFNLP_SEED fixes the seed, which is fresh otherwise."""
    lab, spec = exercises.find(exercise)
    if not callable(answer):
        raise EffnlpError(
            f"check({exercise!r}, ...) needs your function, and was given a {type(answer).__name__}: "
            f"pass {exercise} itself, without calling it."
        )
    if seed is None:
        seed = int(os.environ.get("EFFNLP_SEED") or secrets.randbits(32))
    device = setting.device().kind
    verdict = judge(
        spec,
        lab.name,
        lambda request: answer_case(request, answer),
        seed=seed,
        variant=setting.variant_of(spec),
        device=device,
    )
    if twin is not None and verdict.score < spec.points:
        other = next((e for e in lab.exercises if e.twin_of == spec.name), None)
        if other is None:
            raise EffnlpError(f"{exercise} has no twin: call check({exercise!r}, {exercise}).")
        second = judge(
            other,
            lab.name,
            lambda request: answer_case(request, twin),
            seed=seed,
            variant=setting.variant_of(other),
            device=device,
        )
        if (
            second.score > verdict.score
            or verdict.state == "not run here"
            or (verdict.state == "not attempted" and second.state != "not attempted")
        ):
            second.exercise, second.twin, second.points = spec.name, other.name, float(spec.points)
            second.sentence += " (This is the PyTorch twin.)"
            return second
    return verdict
