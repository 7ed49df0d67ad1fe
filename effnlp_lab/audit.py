"""`effnlp audit`: are the checks themselves right? Every right answer passes, every known mistake is named.

For each exercise: the solution in the master earns full points on every seed, the blank earns 0 as "not attempted",
each known mistake is rejected with its own sentence, and the independent right answers of `tests/answers/` pass. All of
it in this process, or split in two with only the wire between.
"""

from __future__ import annotations

import atexit
import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice, product
from pathlib import Path
from unittest import mock

from effnlp_lab import exercises
from effnlp_lab.build import ROOT
from effnlp_lab.device import resolve
from effnlp_lab.errors import EffnlpError, UsageError
from effnlp_lab.exercises.spec import Exercise, Variant
from effnlp_lab.master import read_master, solution_source
from effnlp_lab.notebook.driver import answer_case
from effnlp_lab.notebook.judge import Ask, Verdict, answer_from_source, judge
from effnlp_lab.notebook.split import SplitDriver

SEEDS_A_TASK = 50  # what a process tries at a time


@dataclass(frozen=True)
class Fault:
    """Something wrong with a check: which exercise, which answer, which seed, and what happened."""

    exercise: str
    answer: str
    seed: int
    sentence: str

    def __str__(self) -> str:
        return f"{self.exercise}, {self.answer}, seed {self.seed}: {self.sentence}"


@dataclass(frozen=True)
class Trial:
    """One answer to try: its source, and what the check has to say of it."""

    exercise: Exercise
    name: str
    source: str
    right: bool = True
    sentence: str | None = None
    variant: Variant | None = None
    seen_on: str = "any"


def trials(lab: str, root: Path = ROOT) -> Iterator[Trial]:
    """Everything that is to be tried for a lab: solutions, blanks, mistakes and independent answers."""
    spec = exercises.lab(lab)
    master = read_master(root / "solutions" / spec.name / f"{spec.notebook}.py")
    answers, variants = independent_answers(spec.name, root)
    texts = exercises.sources(spec.name)["exercises"]
    for exercise in spec.exercises:
        reference = exercises.reference_of(exercise.name)
        yield Trial(exercise, "solution", solution_source(master.exercise_cell(exercise.name)))
        yield Trial(exercise, "blank", texts[exercise.name]["blank"], right=False)
        for mistake in reference.mistakes:
            yield Trial(
                exercise,
                f"mistake: {mistake.name}",
                texts[exercise.name]["mistakes"][mistake.name],
                right=False,
                sentence=mistake.sentence,
                seen_on=mistake.seen_on,
            )
        for number, source in enumerate(answers.get(exercise.name, ()), 1):
            yield Trial(exercise, f"answer {number}", source)
        for rule, source in variants.get(exercise.name, {}).items():
            chosen = dict(pair.split("=") for pair in rule.split(","))
            yield Trial(exercise, f"answer for {rule}", source, variant={**exercise.public_variant(), **chosen})


def independent_answers(lab: str, root: Path = ROOT) -> tuple[dict[str, Sequence[str]], dict[str, dict[str, str]]]:
    """ANSWERS and VARIANT_ANSWERS of tests/answers/<lab>.py: right answers written differently from the solution."""
    path = root / "tests" / "answers" / f"{lab}.py"
    if not path.exists():
        raise EffnlpError(f"tests/answers/{lab}.py is missing: every exercise needs two independent right answers.")
    module = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("answers", path))
    spec.loader.exec_module(module)
    return module.ANSWERS, getattr(module, "VARIANT_ANSWERS", {})


def try_answer(trial: Trial, lab: str, seed: int, ask: Ask, device: str = "cpu") -> Fault | None:
    """Judge one answer on one seed; a Fault when the check says something else than it should."""
    if trial.seen_on not in ("any", device):
        return None
    verdict = judge(trial.exercise, lab, ask, seed=seed, variant=trial.variant, device=device)
    wrong = _complaint(trial, verdict)
    return Fault(trial.exercise.name, trial.name, seed, wrong) if wrong else None


def _complaint(trial: Trial, verdict: Verdict) -> str | None:
    told = f"{verdict.state}, {verdict.score:g} of {verdict.points:g}: {verdict.sentence} {verdict.mistakes}"
    if verdict.state == "not run here":
        return None
    if trial.name == "blank":
        return None if (verdict.state, verdict.score) == ("not attempted", 0.0) else f"a blank was judged {told}"
    if trial.right:
        return None if verdict.state == "correct" and verdict.score == verdict.points else f"refused: {told}"
    if verdict.state == "correct" or (verdict.points and verdict.score >= verdict.points):
        return f"accepted: {told}"
    if trial.sentence not in verdict.mistakes:
        return f"rejected without its sentence: {told}"
    return None


def audit(
    lab: str,
    seeds: Sequence[int],
    split: bool = False,
    device: str = "cpu",
    only: str | None = None,
    right: bool = False,
    jobs: int = 1,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Fault]:
    """Try everything of a lab (with `right`, right answers alone) on every seed, in `jobs` processes.

    Returns each answer's first fault. `progress` gets one line an answer.
    """
    name = exercises.lab(lab).name
    listed, faults = _listed(name), []
    chosen = [
        index
        for index, trial in enumerate(listed)
        if only in (None, trial.exercise.name) and (trial.right or not right)
    ]
    if not chosen:
        return []
    size = len(seeds) if jobs == 1 else max(1, min(SEEDS_A_TASK, -(-len(seeds) // jobs)))
    pieces = [seeds[first : first + size] for first in range(0, len(seeds), size)]
    with mapping(jobs) as run:
        found = run(partial(_try_seeds, name, split, device), *zip(*product(chosen, pieces), strict=True))
        for index, results in zip(chosen, batched(found, len(pieces)), strict=True):
            fault = next(filter(None, results), None)
            said = fault or f"as it should be on {len(seeds)} seeds"
            progress(f"{listed[index].exercise.name}: {listed[index].name}: {said}")
            faults += [fault] if fault else []
    return faults


def _try_seeds(lab: str, split: bool, device: str, index: int, seeds: Sequence[int]) -> Fault | None:
    """The first fault of one answer of a lab on some seeds."""
    trial = _listed(lab)[index]
    if split:
        driver = _split_driver()
        driver.load(lab, trial.exercise.name, trial.source)
        ask = driver.ask
    else:
        answer = answer_from_source(lab, trial.exercise.name, trial.source)

        def ask(request):
            return answer_case(request, answer)

    return next(filter(None, (try_answer(trial, lab, seed, ask, device) for seed in seeds)), None)


@cache
def _listed(lab: str) -> list[Trial]:
    return list(trials(lab))


@cache
def _split_driver() -> SplitDriver:
    driver = SplitDriver()
    atexit.register(driver.__exit__)
    return driver


@contextmanager
def mapping(jobs: int) -> Iterator[Callable]:
    """What maps a function over arguments: `map`, or that of so many processes that start afresh, each on one core."""
    if jobs == 1:
        yield map
        return
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            yield pool.map


def batched(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items each (itertools.batched comes with Python 3.12)."""
    items = iter(items)
    while piece := list(islice(items, size)):
        yield piece


def main(
    labs: Sequence[str] = (),
    seeds: int = 20,
    split: bool = False,
    device: str = "cpu",
    exercise: str | None = None,
    right: bool = False,
    jobs: int = 1,
) -> int:
    """Audit the named labs (all by default), with progress. Exit code 1 when a check has a fault."""
    kind, faults = resolve(device).kind, []
    names = labs or exercises.lab_names()
    if exercise and not any(exercise in [e.name for e in exercises.lab(lab).exercises] for lab in names):
        raise UsageError(f"There is no exercise {exercise!r} in {', '.join(names)}.")
    for lab in names:
        faults += audit(
            lab, range(seeds), split, kind, exercise, right, jobs, progress=lambda text: print(text, flush=True)
        )
    print(f"audit: {len(faults)} faults")
    for fault in faults:
        print(f"  {fault}")
    return 1 if faults else 0
