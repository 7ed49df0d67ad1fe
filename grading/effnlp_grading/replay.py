"""`effnlp replay`: a verdict again, on the student's machine, from the seed, variant and device that it keeps.

The verdicts are those that `effnlp return` hands out, or grading/verdicts/LAB/STUDENT.jsonl. The notebook's cells are
run here, in this process, as the student ran them: there is no sandbox and no proctor. The cases are those of the
verdict, because they follow from its seed.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effnlp_grading.plan import Step, digest_of, steps_of
from effnlp_grading.records import read_record
from effnlp_grading.repair import read_submission, repair
from effnlp_lab import exercises
from effnlp_lab.errors import UsageError
from effnlp_lab.notebook import report
from effnlp_lab.notebook.driver import answer_case
from effnlp_lab.notebook.judge import Verdict, judge, versions


@dataclass(frozen=True)
class Replayed:
    """A verdict that was kept, the one that came out now, and versions that differ."""

    kept: Mapping[str, Any]
    now: Verdict

    @property
    def same(self) -> bool:
        return self.now.score == self.kept["score"] and self.now.state == self.kept["state"]

    @property
    def other_versions(self) -> dict[str, tuple[str, str]]:
        before, here = self.kept.get("versions", {}), versions()
        return {name: (before.get(name, "unknown"), here[name]) for name in here if before.get(name) != here[name]}


def main(first: Path, second: Path | None = None, exercise: str | None = None) -> int:
    """Replay and print; return 0 when every verdict comes out the same, else 1.

    One file is the verdicts, of the notebook in labs/; of two, the one that ends in .ipynb is the notebook.
    """
    notebook, verdicts = (first, second) if first.suffix == ".ipynb" else (second, first)
    if verdicts is None:
        raise UsageError(f"{notebook} is a notebook: name its verdicts too, such as verdicts_01_tokenization.jsonl.")
    for path in filter(None, (verdicts, notebook)):
        if not path.is_file():
            raise UsageError(f"There is no file {path}: name the verdicts, and the notebook that was judged.")
    kept = [v for v in read_record(verdicts) if exercise in (None, v["exercise"])]
    if not kept:
        raise UsageError(f"{verdicts} holds no verdict{f' on {exercise}' if exercise else ''}.")
    notebook = notebook or _released(kept[0]["lab"])
    if kept[0].get("submission") not in (None, _digest(notebook, kept[0]["lab"])):
        print(f"{notebook} is not, word for word, what was handed in and judged: this is what it does now.")
    same = True
    for one in replay(notebook, kept):
        print(report.text(one.now))
        print(f"  Drawn from seed {one.now.seed}, {_variant(one.now)}, on {one.now.device}.")
        if not one.same:
            differing = ", ".join(f"{name} {a} there and {b} here" for name, (a, b) in one.other_versions.items())
            print(f"  The kept verdict is another: {one.kept['state']}, {one.kept['score']:g} points"
                  f"{f' ({differing})' if differing else ''}.")
        same = same and one.same
    return 0 if same else 1


def replay(notebook: Path, kept: list[dict[str, Any]]) -> list[Replayed]:
    """Each kept verdict beside the one that the notebook's answers get now on the same cases."""
    lab = exercises.lab(kept[0]["lab"])
    steps = steps_of(read_submission(notebook.read_bytes(), notebook.name), lab)
    wanted = {v["exercise"]: v for v in kept}
    space = Notebook()
    found = []
    for step in steps:
        if step.kind == "run":
            space.run(step)
        elif step.kind == "check" and step.exercise in wanted:
            told = wanted[step.exercise]
            spec = lab.exercise(told.get("twin") or told["exercise"])
            answer = space.names.get(spec.name)
            if not callable(answer):
                raise UsageError(f"{notebook} defines no {spec.name}, or its cell fails: run it first.")
            now = judge(spec, lab.name, lambda request, answer=answer: answer_case(request, answer),
                        seed=told["seed"], variant=told["variant"], device=told["device"], guarded=True)
            found.append(Replayed(told, now))
    return found


def _variant(verdict: Verdict) -> str:
    return "variant " + ", ".join(f"{name}={value}" for name, value in sorted(verdict.variant.items())) \
        if verdict.variant else "the only variant"


def _released(lab: str) -> Path:
    """The notebook of a lab where a student works on it."""
    from effnlp_grading.course import find_course

    path = find_course().root / "labs" / lab / f"{exercises.lab(lab).notebook}.ipynb"
    if not path.is_file():
        raise UsageError(f"There is no {path}: name the notebook that was judged, before or after its verdicts.")
    return path


def _digest(notebook: Path, lab: str) -> str | None:
    """What identifies the notebook's answers, as the grader sees them; None where the release is not here."""
    import nbformat

    submission = read_submission(notebook.read_bytes(), notebook.name)
    try:
        release = nbformat.read(_released(lab), as_version=4)
        return digest_of(steps_of(repair(submission, release).notebook, exercises.lab(lab)))
    except UsageError:
        return digest_of(steps_of(submission, exercises.lab(lab)))


class Notebook:
    """Runs cells in IPython's shell, quietly."""

    def __init__(self) -> None:
        from IPython.core.history import HistoryManager
        from IPython.core.interactiveshell import InteractiveShell

        HistoryManager.enabled = False
        self._shell = InteractiveShell.instance()

    @property
    def names(self) -> dict[str, Any]:
        return self._shell.user_ns

    def run(self, step: Step) -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            self._shell.run_cell(step.source, store_history=False)
