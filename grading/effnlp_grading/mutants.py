"""`effnlp mutate --sandbox`: right answers and mutants graded the way submissions are graded.

Each is put into the released notebook in place of its blank, all other exercises being solved, and judged by the
proctor in the sandbox. Right answers have to earn full points; mutants, but for those listed as equivalent, must not.
"""

from __future__ import annotations

import atexit
import copy
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import nbformat
from rich.console import Console

from effnlp_grading.limits import Limits
from effnlp_grading.proctor import Proctor
from effnlp_grading.sandbox import Sandbox
from effnlp_lab import audit, exercises
from effnlp_lab.build import ROOT
from effnlp_lab.device import resolve
from effnlp_lab.errors import UsageError
from effnlp_lab.exercises.spec import Exercise
from effnlp_lab.master import Master, read_master, solution_source
from effnlp_lab.mutate import Count, report, sampled, solution_line
from effnlp_lab.mutation.listing import read_listing
from effnlp_lab.mutation.make import Mutant, mutants_of

SEEDS = (20_240, 20_241, 20_242)
REJECTED_SHARE = 0.98  # at least, of the mutants that are not equivalent
LIMITS = Limits(memory=1 << 30, cell_seconds=10.0)


@dataclass
class FixedSeed:
    """Stands for a course's seeds: one number for everything."""

    number: int = SEEDS[0]

    def seed(self, student: str, exercise: str, digest: str) -> int:
        return self.number


@dataclass
class Bench:
    """A lab's notebook, solved, on which one answer at a time is exchanged and judged."""

    master: Master
    sandbox: Sandbox
    release: nbformat.NotebookNode
    device: str = "cpu"
    limits: Limits = LIMITS
    seconds: dict[str, float] = field(default_factory=dict)

    def judge(self, exercise: Exercise, source: str, seed: int = SEEDS[0], variant: dict[str, str] | None = None,
              limits: Limits | None = None) -> dict[str, Any]:
        """The verdict on `source` in place of the exercise's blank; of a twin, its own."""
        proctor = Proctor(self.sandbox, FixedSeed(seed), limits or self.limits, self.device, variant_key="")
        proctor.variant = variant
        return proctor.grade(self.notebook(exercise, source), "mutant").verdicts[exercise.name]

    def notebook(self, exercise: Exercise, source: str) -> nbformat.NotebookNode:
        """The cells up to the answer, and one check of it; a later exercise is of no account."""
        cells = []
        for cell in self.release.cells:
            if cell.cell_type != "code":
                continue
            cell = copy.deepcopy(cell)
            nbgrader = cell.metadata.get("nbgrader", {})
            if nbgrader.get("solution"):
                name = nbgrader["grade_id"]
                cell.source = source if name == exercise.name else solution_source(self.master.exercise_cell(name))
            if not nbgrader.get("grade") or nbgrader.get("solution"):
                cells.append(cell)
            if nbgrader.get("grade_id") == exercise.name:
                break
        told = {"nbgrader": {"grade": True, "grade_id": f"test_{exercise.name}"}}
        check = nbformat.v4.new_code_cell("", metadata=told)
        return nbformat.v4.new_notebook(cells=[*cells, check])

    def hold_to_solution(self, exercise: Exercise) -> None:
        """Set the limit of a case by what the solution takes. Raises UsageError where the solution is refused."""
        verdict = self.judge(exercise, solution_source(self.master.exercise_cell(exercise.name)))
        if verdict["score"] != exercise.points or verdict["state"] != "correct":
            raise UsageError(f"The proctor refuses the solution of {exercise.name}: {verdict['sentence']}")
        slowest = max(case["seconds"] for case in verdict["cases"])
        self.seconds[exercise.name] = min(exercise.seconds, max(0.5, 10 * slowest))

    def rejects(self, exercise: Exercise, mutant: Mutant) -> bool:
        """Whether a mutant fails on some seed or variant that its solution passes."""
        limits = replace(self.limits, case_seconds=self.seconds[exercise.name], grace=1.0)
        for seed in SEEDS:
            if self.judge(exercise, mutant.source, seed, limits=limits)["state"] != "correct":
                return True
        solution = solution_source(self.master.exercise_cell(exercise.name))
        names = list(exercise.variants)
        for values in list(itertools.product(*exercise.variants.values()))[1:]:
            variant = dict(zip(names, values, strict=True))
            if self.judge(exercise, solution, variant=variant)["state"] == "correct" and \
                    self.judge(exercise, mutant.source, variant=variant, limits=limits)["state"] != "correct":
                return True
        return False


def main(lab: str, exercise: str | None = None, sample: int | None = None, device: str = "cpu", jobs: int = 1,
         root: Path = ROOT, json_path: Path | None = None) -> int:
    """Try right answers and mutants of a lab; return 0 when the former pass and enough of the latter do not.

    jobs: exercises at once, each in a process with a sandbox of its own.
    """
    spec = exercises.lab(lab)
    chosen = [e for e in spec.exercises if exercise in (None, e.name)]
    if not chosen:
        raise UsageError(f"{lab} has no exercise {exercise!r}: "
                         f"expected one of {', '.join(e.name for e in spec.exercises)}.")
    console = Console(soft_wrap=True)
    one_of, tried = partial(_try, spec.name, device, root, sample), {}
    with audit.mapping(jobs) as run:
        for count, refused in run(one_of, [one.name for one in chosen]):
            tried[count.exercise] = count, refused
            if not count.not_run:
                console.print(f"{count.exercise}: {count.rejected} of {count.tried} rejected", highlight=False)
    if jobs > 1:  # neighbours share a card, and the watch on it: what was refused among them is tried again alone
        tried |= {name: one_of(name) for name, (_, refused) in tried.items() if refused}
    counts, wrong = [count for count, _ in tried.values()], [told for _, refused in tried.values() for told in refused]
    rejected, survived = sum(c.rejected for c in counts), sum(len(c.survivors) for c in counts)
    if rejected < REJECTED_SHARE * (rejected + survived):
        wrong.append(f"{rejected} of {rejected + survived} mutants are rejected in the sandbox, and at least "
                     f"{REJECTED_SHARE:.0%} have to be.")
    ok = report(console, counts, wrong)
    if json_path is not None:
        told = {"lab": spec.name, "ok": ok, "wrong": wrong, "exercises": [asdict(c) for c in counts]}
        json_path.write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    return 0 if ok else 1


def _try(lab: str, device: str, root: Path, sample: int | None, name: str) -> tuple[Count, list[str]]:
    """Right answers and mutants of one exercise: the count, and sentences on right answers that were refused."""
    exercise = exercises.lab(lab).exercise(name)
    if exercise.needs_gpu and device != "cuda" or exercise.needs_triton and resolve(device).triton == "absent":
        return Count(name, not_run="needs a GPU or Triton"), []
    bench = _bench_of(lab, device, root)
    listed = read_listing(root / "tests" / "mutants" / f"{lab}.toml")
    try:
        return _count(bench, exercise, listed, sample), refused_answers(bench, exercise, root)
    except UsageError as error:
        return Count(name), [str(error)]


@cache
def _bench_of(lab: str, device: str, root: Path) -> Bench:
    """The bench of this process."""
    bench = open_bench(lab, device, root)
    atexit.register(bench.__exit__)
    return bench.__enter__()


class open_bench:  # noqa: N801  (a context manager that reads as a verb)
    """`with open_bench("01_tokenization") as bench: ...`"""

    def __init__(self, lab: str, device: str = "cpu", root: Path = ROOT, sandbox: Sandbox | None = None) -> None:
        spec = exercises.lab(lab)
        master = read_master(root / "solutions" / spec.name / f"{spec.notebook}.py")
        release = nbformat.read(root / "labs" / spec.name / f"{spec.notebook}.ipynb", as_version=4)
        self._own = sandbox is None
        self._bench = Bench(master, sandbox or Sandbox(spec.name, device), release, device)

    def __enter__(self) -> Bench:
        return self._bench

    def __exit__(self, *exc_info) -> None:
        if self._own:
            self._bench.sandbox.close()


def refused_answers(bench: Bench, exercise: Exercise, root: Path = ROOT) -> list[str]:
    """Sentences on right answers to an exercise that the proctor refuses: there must be none."""
    found = []
    for trial in _right_answers(exercise, bench.master.lab.name, root):
        variant = dict(trial.variant) if trial.variant else None
        verdict = bench.judge(exercise, trial.source, variant=variant)
        if verdict["state"] != "correct" or verdict["score"] != exercise.points:
            found.append(f"{exercise.name}, {trial.name}: a right answer is refused: {verdict['sentence']}")
    return found


def _right_answers(exercise: Exercise, lab: str, root: Path) -> Iterator[audit.Trial]:
    return (t for t in audit.trials(lab, root) if t.right and t.exercise.name == exercise.name)


def _count(bench: Bench, exercise: Exercise, listed: dict, sample: int | None) -> Count:
    made = mutants_of(bench.master.exercise_cell(exercise.name))
    count = Count(exercise.name, len(made), sum(m.id in listed for m in made))
    ours: Sequence[Mutant] = [m for m in sampled(made, sample, exercise.name) if m.id not in listed]
    bench.hold_to_solution(exercise)
    for mutant in ours:
        count.tried += 1
        if bench.rejects(exercise, mutant):
            count.rejected += 1
        else:
            count.survivors.append({"id": mutant.id, "where": solution_line(mutant), "change": mutant.change})
    return count
