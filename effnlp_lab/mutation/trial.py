"""Judges mutants by the check itself: the same cases, the same driver, the same budgets.

Cases and right outputs are drawn once, before the children are forked that run the mutants. The solution runs first:
its times set the limits. One case is judged at a time, so that the first failure ends a trial.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from effnlp_lab import exercises
from effnlp_lab.errors import EffnlpError
from effnlp_lab.exercises.reference import Case, Rng
from effnlp_lab.exercises.spec import Exercise, Variant
from effnlp_lab.mutation.forks import in_children
from effnlp_lab.mutation.make import Mutant
from effnlp_lab.notebook.driver import answer_case
from effnlp_lab.notebook.judge import answer_from_source, judge

FIRST_SEED = 20_240
MORE_SEEDS = (20_241, 20_242, 20_243, 20_244)
SLOWER = 10.0  # times the solution's own time
LEAST_SECONDS = 0.5
WARM_UP_SECONDS = 60.0  # for the solution's first run, which imports what it needs


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: `why` is the check's sentence on the case that failed.

    `broke` says that the check itself raised, which it must not, whatever an answer does.
    """

    rejected: bool
    why: str = ""
    case: str = ""
    timed_out: bool = False
    broke: bool = False


@dataclass
class Round:
    """Cases of one seed and variant with their right outputs and, once the solution has run, its limits in seconds."""

    seed: int
    variant: Variant
    cases: list[Case]
    expected: list[Any]
    limits: list[float]
    seconds: float = 0.0  # what the solution and its verification took

    @property
    def deadline(self) -> float:
        """Seconds after which a child is taken to hang where no alarm reaches it."""
        return 5.0 + SLOWER * self.seconds + 2 * max(self.limits, default=0.0)


class Trial:
    """Judges the mutants of one exercise."""

    def __init__(self, lab: str, exercise: Exercise, solution: str, jobs: int, folder: Path) -> None:
        # nothing is compiled here: Triton runs in its interpreter, so that no time for compiling is allowed
        self.lab, self.exercise = lab, replace(exercise, needs_triton=False)
        self.solution, self.jobs, self.folder = solution, jobs, folder
        self._warm = False

    def run(self, mutants: Sequence[Mutant], listed: frozenset[str] = frozenset()) -> Iterator[tuple[Mutant, Outcome]]:
        """Judge each mutant on one seed, and those that pass on more seeds and variants; yield them as they end.

        A `listed` mutant that times out is given another chance with thrice the time: it is believed to be slow.
        """
        survivors = []
        first = [self.prepare(FIRST_SEED, self.exercise.public_variant())]
        for mutant, outcome in self._judge_patiently(mutants, first, listed):
            if outcome.rejected:
                yield mutant, outcome
            else:
                survivors.append(mutant)
        if survivors:
            more = [self.prepare(seed, self.exercise.public_variant()) for seed in MORE_SEEDS]
            yield from self._judge_patiently(survivors, [*more, *self._other_variants()], listed)

    def prepare(self, seed: int, variant: Variant) -> Round:
        """Draw a round and run the solution on it. Raises EffnlpError when the solution does not pass."""
        drawn = self._draw(seed, variant)
        if not self._warm:
            patient = replace(drawn, limits=[WARM_UP_SECONDS] * len(drawn.cases))
            _import_here(self._run_solution(patient).get("imported", ()))
            self._warm = True
        report = self._run_solution(drawn)
        if "seconds" not in report:
            raise EffnlpError(
                f"The check rejects the solution of {self.exercise.name} itself (seed {seed}, variant "
                f"{dict(variant)}): {_outcome(report).why}"
            )
        drawn.limits = [
            min(limit, max(LEAST_SECONDS, SLOWER * own))
            for limit, own in zip(drawn.limits, report["seconds"], strict=True)
        ]
        drawn.seconds = report["whole"]
        return drawn

    def _run_solution(self, drawn: Round) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            before = set(sys.modules)
            report = self._run(self.solution, [drawn])
            return report | {"imported": [name for name in sys.modules if name not in before]}

        [(_, report)] = in_children([work], 1, 600.0, self.folder)
        return report

    def _other_variants(self) -> Iterator[Round]:
        """One round for each variant but the public one that the solution solves too."""
        names = list(self.exercise.variants)
        for number, values in enumerate(itertools.product(*self.exercise.variants.values())):
            variant = dict(zip(names, values, strict=True))
            if number:
                try:
                    yield self.prepare(FIRST_SEED + 100 + number, variant)
                except EffnlpError:  # the solution is written for the public variant
                    continue

    def _draw(self, seed: int, variant: Variant) -> Round:
        reference = exercises.reference_of(self.exercise.name)
        cases = [c for c in reference.cases(Rng(seed), variant) if c.device != "cuda"]
        expected = [reference.expected(dict(c.inputs), variant) for c in cases]
        return Round(seed, variant, cases, expected, [c.seconds or self.exercise.seconds for c in cases])

    def _patient(self, drawn: Round) -> Round:
        limits = [c.seconds or self.exercise.seconds for c in drawn.cases]
        return replace(drawn, limits=[min(3 * a, b) for a, b in zip(drawn.limits, limits, strict=True)])

    def _judge_patiently(
        self, mutants: Sequence[Mutant], rounds: Sequence[Round], listed: frozenset[str]
    ) -> Iterator[tuple[Mutant, Outcome]]:
        hasty = []
        for mutant, outcome in self._judge_all(mutants, rounds):
            if outcome.timed_out and mutant.id in listed:
                hasty.append(mutant)
            else:
                yield mutant, outcome
        if hasty:
            yield from self._judge_all(hasty, [self._patient(drawn) for drawn in rounds])

    def _judge_all(self, mutants: Sequence[Mutant], rounds: Sequence[Round]) -> Iterator[tuple[Mutant, Outcome]]:
        def work(mutant: Mutant) -> Callable[[], Any]:
            return lambda: self._run(mutant.source, rounds)

        deadline = sum(r.deadline for r in rounds)
        for index, report in in_children([work(m) for m in mutants], self.jobs, deadline, self.folder):
            yield mutants[index], _outcome(report)

    def _run(self, source: str, rounds: Sequence[Round]) -> dict[str, Any]:
        """In a child: judge one source on the rounds until a case fails."""
        import torch

        torch.set_num_threads(1)  # a forked child has none of its parent's threads
        started, seconds = time.perf_counter(), []
        try:
            answer = answer_from_source(self.lab, self.exercise.name, source)
        except BaseException as error:  # a mutant that cannot even be defined
            return {"failed": f"It does not run: {type(error).__name__}: {error}"[:300], "case": ""}
        for drawn in rounds:
            for case, expected, limit in zip(drawn.cases, drawn.expected, drawn.limits, strict=True):
                try:
                    result = self._judge_case(answer, drawn, replace(case, seconds=limit), expected)
                except MemoryError:
                    return {"failed": "Its outputs take too much memory.", "case": case.name}
                except Exception as error:
                    return {"broke": f"{type(error).__name__}: {error}"[:300], "case": case.name}
                if result.state != "correct":
                    return {"failed": result.sentence[:300], "case": case.name, "state": result.state}
                seconds.append(result.seconds)
        return {"seconds": seconds, "whole": time.perf_counter() - started}

    def _judge_case(self, answer: Callable, drawn: Round, case: Case, expected: Any) -> Any:
        """The check's own result on one case: a reference with nothing but this case stands in for the whole."""
        references = exercises.reference_module(self.lab).REFERENCES
        one = copy.copy(references[self.exercise.name])
        one.cases = lambda rng, variant: iter((case,))
        one.expected = lambda inputs, variant: expected
        one.mistakes = ()
        with mock.patch.dict(references, {self.exercise.name: one}):
            verdict = judge(
                self.exercise,
                self.lab,
                lambda request: answer_case(request, answer),
                seed=drawn.seed,
                variant=drawn.variant,
                device="cpu",
            )
        return verdict.cases[0]


def _import_here(names: Sequence[str]) -> None:
    """Import what a solution imported in its child, so that later children need not."""
    for name in names:
        with contextlib.suppress(Exception):  # names that were never modules of their own
            importlib.import_module(name)


def _outcome(report: Mapping[str, Any]) -> Outcome:
    case = report.get("case", "")
    if "broke" in report:
        return Outcome(True, f"The check itself raised {report['broke']}", case, broke=True)
    if "died" in report:
        return Outcome(True, f"Its process died (status {report['died']}).")
    if "hung" in report:
        return Outcome(True, f"Its process was ended after {report['hung']:.0f} s.", timed_out=True)
    if "failed" in report:
        return Outcome(True, report["failed"], case, timed_out=report.get("state") == "timed out")
    return Outcome(False)
