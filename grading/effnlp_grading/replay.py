"""`effnlp replay`: a verdict again, on the student's machine, from the seed, variant and device that it keeps.

The notebook's cells are run here, in this process, as the student ran them: there is no sandbox and no proctor. The
cases are those of the verdict, because they follow from its seed.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effnlp_grading.plan import Step, steps_of
from effnlp_grading.records import read_record
from effnlp_grading.repair import read_submission
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


def main(notebook: Path, verdicts: Path, exercise: str | None = None) -> int:
    """Replay and print; return 0 when every verdict comes out the same, else 1."""
    for path in (notebook, verdicts):
        if not path.is_file():
            raise UsageError(f"There is no file {path}: name a notebook and its verdicts.")
    kept = [v for v in read_record(verdicts) if exercise in (None, v["exercise"])]
    if not kept:
        raise UsageError(f"{verdicts} holds no verdict{f' on {exercise}' if exercise else ''}.")
    same = True
    for one in replay(notebook, kept):
        print(report.text(one.now))
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
    space = _Notebook()
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


class _Notebook:
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
