"""`effnlp audit`: are the checks themselves right? Every right answer passes, every known mistake is named.

For each exercise: the solution in the master earns full points on every seed, the blank earns 0 as "not attempted",
each known mistake is rejected with its own sentence, and the independent right answers of `tests/answers/` pass. All of
it in this process, or split in two with only the wire between.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from effnlp_lab import exercises
from effnlp_lab.build import ROOT
from effnlp_lab.device import resolve
from effnlp_lab.errors import EffnlpError
from effnlp_lab.exercises.spec import Exercise, Variant
from effnlp_lab.master import read_master, solution_source
from effnlp_lab.notebook.driver import answer_case
from effnlp_lab.notebook.judge import Ask, Verdict, answer_from_source, judge
from effnlp_lab.notebook.split import SplitDriver


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
    progress: Callable[[str], None] = lambda text: None,
) -> list[Fault]:
    """Try everything of a lab (with `right`, right answers alone) on every seed. Returns each answer's first fault."""
    name = exercises.lab(lab).name
    faults = []
    with ExitStack() as stack:
        driver = stack.enter_context(SplitDriver()) if split else None
        for trial in trials(name):
            if only not in (None, trial.exercise.name) or (right and not trial.right):
                continue
            if driver:
                driver.load(name, trial.exercise.name, trial.source)
                ask = driver.ask
            else:
                answer = answer_from_source(name, trial.exercise.name, trial.source)

                def ask(request, answer=answer):
                    return answer_case(request, answer)

            fault = next(filter(None, (try_answer(trial, name, seed, ask, device) for seed in seeds)), None)
            progress(f"{trial.exercise.name}: {trial.name}: {fault or f'as it should be on {len(seeds)} seeds'}")
            faults += [fault] if fault else []
    return faults


def main(
    labs: Sequence[str] = (),
    seeds: int = 20,
    split: bool = False,
    device: str = "cpu",
    exercise: str | None = None,
    right: bool = False,
) -> int:
    """Audit the named labs (all by default), with progress. Exit code 1 when a check has a fault."""
    kind, faults = resolve(device).kind, []
    for lab in labs or exercises.lab_names():
        faults += audit(lab, range(seeds), split, kind, exercise, right, progress=lambda text: print(text, flush=True))
    print(f"audit: {len(faults)} faults")
    for fault in faults:
        print(f"  {fault}")
    return 1 if faults else 0
