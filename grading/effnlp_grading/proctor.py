"""The proctor: judges one submission, whose code runs in a sandbox and whose judging does not.

It runs the notebook's cells in a session, and at each check asks the session for answers to cases of its own, which it
compares with the reference here. A session that dies, hangs or faults costs the exercise that did it, and no other: a
new one runs the cells again, without the one that ended it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nbformat import NotebookNode

from effnlp_grading import real_size
from effnlp_grading.connection import Connection, Ended
from effnlp_grading.limits import Limits
from effnlp_grading.plan import Step, digest_of, steps_of
from effnlp_grading.records import Record, Seeds
from effnlp_grading.sandbox import Sandbox
from effnlp_grading.scan import forbidden_in, signs_in
from effnlp_grading.watch import GpuWatch
from effnlp_lab import exercises
from effnlp_lab.exercises.closeness import in_words, points_of, predicted_values
from effnlp_lab.exercises.spec import Exercise
from effnlp_lab.notebook import wire
from effnlp_lab.notebook.judge import Verdict, judge, versions

DEATHS = 2  # sessions that one exercise may end before its other cases are left out
RESTARTS = 40  # of one submission


@dataclass
class Graded:
    """What grading a submission gave: verdicts as JSON by exercise, what its cells said, and what a person should see.

    `cells` maps a cell's place in the notebook to {"error", "printed"} or to what ended the session there.
    """

    lab: str
    student: str
    digest: str
    verdicts: dict[str, dict[str, Any]] = field(default_factory=dict)
    predictions: dict[str, dict[str, Any]] = field(default_factory=dict)
    cells: dict[int, dict[str, Any]] = field(default_factory=dict)
    look: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def score(self) -> float:
        return sum(v["score"] for v in (*self.verdicts.values(), *self.predictions.values()))


class Proctor:
    """Judges submissions of one lab in one sandbox, one after another."""

    def __init__(self, sandbox: Sandbox, seeds: Seeds, limits: Limits | None = None, device: str = "cpu",
                 variant_key: str | None = None) -> None:
        self.sandbox, self.seeds, self.device = sandbox, seeds, device
        self.limits = limits or Limits()
        self.defences = sandbox.defences
        self.lab = exercises.lab(sandbox.lab)
        self.variant_key = variant_key if variant_key is not None else os.environ.get("EFFNLP_VARIANT_KEY", "")
        self.gpu = GpuWatch() if device == "cuda" else None
        self.variant: dict[str, str] | None = None  # in place of the student's own

    def grade(self, notebook: NotebookNode, student: str, record: Record | None = None,
              mended: Sequence[str] = ()) -> Graded:  # fmt: skip
        """Judge every exercise whose check is in `notebook`. Never raises for anything that a submission does.

        What `record` holds of the same text is not judged again. `mended`: what was done to the notebook before, for a
        person to look at. Raises SandboxError where there can be no sandbox.
        """
        steps = steps_of(notebook, self.lab)
        graded = Graded(self.lab.name, student, digest_of(steps))
        record = record if record is not None else Record(None, graded.digest)
        graded.look = [*mended, *signs_in(steps)]
        one = _Submission(self, steps, graded)
        began = time.monotonic()
        try:
            for place, step in enumerate(steps):
                if step.kind == "run":
                    one.run(place)
                    continue
                if step.kind == "predict":
                    if step.exercise not in record.predictions:
                        record.keep(one.predicted(place))
                    graded.predictions[step.exercise] = record.predictions[step.exercise]
                    continue
                if step.exercise not in record.verdicts:
                    record.keep(one.judge(place))
                graded.verdicts[step.exercise] = record.verdicts[step.exercise]
        finally:
            one.end()
        graded.seconds = time.monotonic() - began
        for verdict in graded.verdicts.values():
            graded.look += [reason for reason in verdict.get("look", []) if reason not in graded.look]
        record.finish({"seconds": round(graded.seconds, 3), "look": graded.look,
                       "cells": {str(index): said for index, said in graded.cells.items()}})
        return graded


class _Submission:
    """One submission while it is judged: its steps, its session, and what has ended sessions so far."""

    def __init__(self, proctor: Proctor, steps: Sequence[Step], graded: Graded) -> None:
        self.proctor, self.steps, self.graded = proctor, steps, graded
        self.session: Connection | None = None
        self.fatal: set[int] = set()  # places of cells that ended a session
        self.began = time.monotonic()
        self.sessions = 0

    def run(self, place: int) -> None:
        """Run a cell in the session that there is; where there is none, a later check begins one with it."""
        if self.session is None and self.sessions:
            return
        if self.session is None and not self._begin(0):
            return
        self._run_cell(place)

    def judge(self, place: int) -> dict[str, Any]:
        """The verdict on the exercise at `place`, as it is kept."""
        step = self.steps[place]
        spec = self.proctor.lab.exercise(step.exercise)
        names = {s.answers for s in self.steps}
        twin = next((e for e in self.proctor.lab.exercises if e.twin_of == spec.name and e.name in names), None)
        seed = self.proctor.seeds.seed(self.graded.student, spec.name, self.graded.digest)
        look: list[str] = []
        verdict = self._judge_one(place, spec, seed, look)
        if twin is not None and verdict.score < spec.points:
            second = self._judge_one(place, twin, seed, look)
            if second.score > verdict.score or verdict.state == "not run here" or (
                    verdict.state == "not attempted" and second.state != "not attempted"):
                second.exercise, second.twin, second.points = spec.name, twin.name, float(spec.points)
                second.sentence += " (This is the PyTorch twin.)"
                verdict = second
        return {**verdict.to_json(), "student": self.graded.student, "submission": self.graded.digest,
                "limits": self.proctor.limits.to_json(), "sandbox": self.proctor.sandbox.name, "look": look}

    def predicted(self, place: int) -> dict[str, Any]:
        """The verdict on the prediction at `place`: from the text of its cell, which is read and not run."""
        prediction = self.proctor.lab.prediction(self.steps[place].exercise)
        source = next((s.source for s in self.steps if s.predicts == prediction.name), "")
        values = predicted_values(prediction, source)
        score = points_of(prediction, values)
        told = [f"{guess.variable} = {values[guess.variable]:g}, measured: {in_words(guess)}"
                for guess in prediction.guesses if values[guess.variable] is not None]
        whole = len(told) == len(prediction.guesses)
        state = "not attempted" if not told else "correct" if score == prediction.points and whole else "incorrect"
        sentence = ("You predicted " + "; ".join(told) + ". Points are for closeness." if told else
                    "There is no number in the cell of this prediction: write it as a plain number.")
        return {"prediction": prediction.name, "lab": self.proctor.lab.name, "state": state, "score": score,
                "points": float(prediction.points), "sentence": sentence, "student": self.graded.student,
                "submission": self.graded.digest}

    def end(self) -> None:
        if self.session is not None:
            self.session.end()
            self.session = None

    def _judge_one(self, place: int, spec: Exercise, seed: int, look: list[str]) -> Verdict:
        proctor = self.proctor
        student = self.graded.student if proctor.variant_key else None
        variant = proctor.variant
        if variant is None:
            variant = dict(proctor.lab.variant_of(spec.name, student, proctor.variant_key))
        limited = replace(spec, seconds=min(spec.seconds, proctor.limits.case_seconds))
        used = forbidden_in(spec, self.steps) if "source" in proctor.defences else []
        try:
            if used:
                return _refused(spec, proctor.lab.name, seed, variant, proctor.device, used)
            verdict = judge(limited, proctor.lab.name, self._asker(place, spec.name), seed=seed, variant=variant,
                            device=proctor.device, guarded=True)
            if "real size" in proctor.defences and proctor.device == "cpu" and proctor.sandbox.confined:
                self._at_real_size(place, spec, verdict, variant)
        except Exception as error:  # ours, not the student's: no point is lost silently
            look.append(f"{spec.name}: the grader could not judge it ({type(error).__name__}: {error})"[:300])
            return Verdict(spec.name, proctor.lab.name, "crashed", 0.0, float(spec.points),
                           "The grader could not judge this answer: a person will look at it.", seed, variant,
                           proctor.device, versions=versions())
        return verdict

    def _asker(self, place: int, answer: str) -> Callable[[bytes], bytes]:
        deaths = 0
        why = ""

        def ask(request: bytes) -> bytes:
            nonlocal deaths, why
            if deaths >= DEATHS:
                return _no_answer("died", f"{why} (not run: two cases had ended the process)")
            if self._out_of_time():
                return _no_answer("timed out", "")
            if self.session is None and not self._begin(place):
                deaths = DEATHS
                why = "Your notebook could not be run again after it had ended its process"
                return _no_answer("died", why)
            seconds = min(float(wire.unpack(request)["seconds"]), self.proctor.limits.case_seconds)
            try:
                response = self.session.case(answer, request, seconds)
            except Ended as end:
                self.session = None
                deaths += 1
                why = f"Your answer {end}"
                return _no_answer("timed out" if end.status == "timed out" else "died", why)
            if self.proctor.device == "cuda" and not self.session.alive():
                self.end()  # after a fault nothing on the card works for this process
            return response

        return ask

    def _at_real_size(self, place: int, spec: Exercise, verdict: Verdict, variant: dict[str, str]) -> None:
        """Judge the case at which quadratic memory exceeds what the session may take, in a session of its own."""
        case = real_size.case_of(self.proctor.lab.name, spec.name, verdict.seed)
        if case is None or not real_size.part_passed(verdict, case.part):
            return
        before, self.session = self.session, None
        try:
            if self._begin(place, memory=case.memory):
                result = real_size.ask(case, self.session, spec, self.proctor.lab.name, verdict.seed, variant)
                real_size.apply(result, spec, verdict)
            self.end()
        finally:
            self.session = before

    def _begin(self, place: int, memory: int | None = None) -> bool:
        """Begin a session and run the cells before `place`. Says whether there is one then."""
        if self.sessions and "restart" not in self.proctor.defences:
            return False
        while self.sessions < RESTARTS and not self._out_of_time():
            self.sessions += 1
            self.session = Connection(self.proctor.sandbox, self.proctor.limits, memory, self.proctor.gpu)
            if all(self._run_cell(earlier) for earlier in range(place) if self.steps[earlier].kind == "run"):
                return True
        return False

    def _out_of_time(self) -> bool:
        return time.monotonic() - self.began > self.proctor.limits.submission_seconds

    def _run_cell(self, place: int) -> bool:
        """Run a cell. False where that ended the session: no later session runs it."""
        step = self.steps[place]
        if place in self.fatal:
            return True
        try:
            said = self.session.run(step.source)
        except Ended as end:
            self.session = None
            self.fatal.add(place)
            self.graded.cells[step.index] = {"ended": f"This cell {end}.", "printed": ""}
            return False
        self.graded.cells.setdefault(step.index, said)
        return True


def _no_answer(status: str, message: str) -> bytes:
    error = {"type": "", "message": message, "where": ""}
    return wire.pack({"status": status, "outputs": None, "observed": {}, "error": error})


def _refused(spec: Exercise, lab: str, seed: int, variant: dict[str, str], device: str, used: list[str]) -> Verdict:
    sentence = f"Your answer uses {', '.join(used)}, which would answer for you: write it with plain operations."
    return Verdict(spec.name, lab, "incorrect", 0.0, float(spec.points), sentence, seed, variant, device,
                   versions=versions())
