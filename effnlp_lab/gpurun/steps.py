"""What is run on a GPU, in four parts: tests, notebooks, grading, bench. A step is one command."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from effnlp_lab.build import INSTRUCTORS
from effnlp_lab.device import Device
from effnlp_lab.errors import UsageError
from effnlp_lab.gpurun import findings
from effnlp_lab.gpurun.findings import Found
from effnlp_lab.gpurun.imports import KIT, imported
from effnlp_lab.notebook.bench import needs, suites
from effnlp_lab.runner import find_notebooks, notebooks_a_card, spread_over, threads_for, workers_for_tests

PARTS = {
    "tests": "the tests under tests/gpu",
    "notebooks": "solutions and labs at full and at fast size, and the outputs that nbval compares",
    "grading": "the sample class and mutants, graded in the sandbox",
    "bench": "every benchmark, beside its peers",
}
MUTATED = ("00", "06")
"""Labs whose mutants are graded in the sandbox: those with the most kernels."""
GRADED_AT_ONCE = 5
"""Exercises of a lab whose mutants are graded, and submissions of the sample class."""
DIGESTED = (KIT, "grading/effnlp_grading", "tests", "solutions", "labs", "benchmarks")
UNUSED = {"gpurun", "new_lab.py", "new_lab_texts.py", "pages.py"}
"""Of the kit: what neither the grader nor a test on a card needs."""
LONGEST = ("04", "09", "08", "07", "02", "03")
"""Labs that take longest at full size, by what a card took: they begin first, and the others fill the gaps."""
ALLOWED_SECONDS = {"solutions-full": 600.0}
"""What steps whose names begin so may take together, at the clock."""
LIMIT_SECONDS = 3600.0


@dataclass(frozen=True)
class Step:
    """One command of a part. `read` says what came out of it: (the step's folder, its exit code, its log) -> Found.

    In `command` the word `{folder}` stands for the step's own folder. `environment` is set over ours; None unsets.
    `reads` are the files and folders, from the course's root, after whose change the step has to run again.
    """

    name: str
    part: str
    command: tuple[str, ...]
    read: Callable[[Path, int, str], Found] = findings.plain
    limit: float = LIMIT_SECONDS
    environment: dict[str, str | None] = field(default_factory=dict)
    reads: tuple[str, ...] = DIGESTED


def choose(steps: Sequence[Step], only: Sequence[str]) -> list[Step]:
    """The steps of the parts (or with the names) in `only`; all where it is empty. Raises UsageError for another."""
    known = {*(step.part for step in steps), *(step.name for step in steps)}
    unknown = [word for word in only if word not in known]
    if unknown:
        raise UsageError(f"There is no part {unknown[0]!r}: expected one of {', '.join(PARTS)}, or a step's name "
                         "(`effnlp gpu --list`).")  # fmt: skip
    return [step for step in steps if not only or step.part in only or step.name in only]


def all_steps(root: Path, device: Device) -> list[Step]:
    """Every step, in the order in which they run: what is quick to fail comes first."""
    return [*_tests(root), *_notebooks(root, device), *_grading(root), *_bench(root)]


def effnlp(*arguments: str) -> tuple[str, ...]:
    """The command line of a verb."""
    return (sys.executable, "-m", "effnlp_lab", *arguments)


def _pytest(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pytest", "--device=cuda", "--junitxml={folder}/junit.xml", "--color=no", *arguments)


def _kit(root: Path, without: Collection[str]) -> tuple[str, ...]:
    """The kit but for the modules and rooms named, with what says how steps are started and when one has passed."""
    kept = sorted(f"{KIT}/{path.name}" for path in (root / KIT).iterdir() if path.name not in without)
    return (*kept, f"{KIT}/gpurun/findings.py", f"{KIT}/gpurun/steps.py")


def _grader(root: Path) -> tuple[str, ...]:
    """What is read where labs are graded."""
    return (*_kit(root, UNUSED), "grading/effnlp_grading", "solutions", "labs")


def _tests(root: Path) -> list[Step]:
    workers = workers_for_tests()
    together = _pytest("tests/gpu", "-m", "not alone", *spread_over(workers))
    reads = (*_grader(root), "benchmarks", "tests/gpu", "tests/conftest.py")
    return [
        Step("tests-together", "tests", together, findings.pytest, environment=threads_for(workers), reads=reads),
        Step("tests-alone", "tests", _pytest("tests/gpu", "-m", "alone"), findings.pytest, reads=reads),
    ]


def _notebooks(root: Path, device: Device) -> list[Step]:
    """Both sides at both sizes; nothing is executed twice: at fast size it is nbval that executes the solutions."""
    kit, labs = _kit(root, INSTRUCTORS), [path.parent.name for path in find_notebooks(root=root)]
    by_time = sorted(labs, key=lambda lab: LONGEST.index(lab[:2]) if lab[:2] in LONGEST else len(LONGEST))

    at_once = {fast: notebooks_a_card(replace(device, fast=fast)) for fast in (False, True)}

    def run(name: str, *arguments: str) -> Step:
        more = ("--device", "cuda", "--jobs", str(at_once["--fast" in arguments]), "--out", "{folder}")
        released = "--student" in arguments
        return Step(name, "notebooks", effnlp("run", *arguments, *more),
                    findings.notebooks if released else findings.solutions(root),
                    reads=(*kit, "labs" if released else "solutions"))  # fmt: skip

    workers = min(at_once[True], len(labs))
    compared = _pytest("tests/notebooks/test_run.py", "-k", "test_solution", *spread_over(workers))
    return [
        run("solutions-full", *by_time, "--full"), run("labs-full", "--student", "--full"),
        run("labs-fast", "--student", "--fast"),
        Step("solutions-fast", "notebooks", compared, findings.pytest,
             environment={"EFFNLP_FAST": "1"} | threads_for(workers),
             reads=(*kit, "solutions", "tests/notebooks", "tests/conftest.py")),
    ]  # fmt: skip


def _grading(root: Path) -> list[Step]:
    reads = (*_grader(root), "tests/mutants")
    how = ("--device", "cuda", "--jobs", str(GRADED_AT_ONCE))
    mutants = [
        Step(f"mutants-{lab}", "grading", effnlp("mutate", lab, "--sandbox", "--sample", "2", *how), reads=reads)
        for lab in MUTATED
    ]
    return [*mutants, Step("sample-class", "grading", effnlp("demo", *how, "--out", "{folder}"), reads=reads)]


def _bench(root: Path) -> list[Step]:
    at_full_size = {"EFFNLP_FAST": None, "EFFNLP_DEVICE": None}
    return [
        Step(f"bench-{name}", "bench", effnlp("bench", name, "--device", needs(path) or "cpu", "--out", "{folder}"),
             findings.bench, environment=at_full_size, reads=_read_by(name, path, root))
        for name, path in suites(root / "benchmarks").items()
    ]  # fmt: skip


def _read_by(suite: str, path: Path, root: Path) -> tuple[str, ...]:
    read = (*_grader(root), "tests/grading") if suite == "grading" else imported(root, path)
    return (path.relative_to(root).as_posix(), *read)
