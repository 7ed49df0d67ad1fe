"""Judges a notebook in this process, without a proctor: `python -m effnlp_grading.alone LAB NOTEBOOK VERDICTS DEVICE`.

For systems without the proctor's processes. Each verdict is on disk before the next exercise is judged.
"""

from __future__ import annotations

import secrets
import sys
from pathlib import Path

import nbformat

from effnlp_grading.plan import digest_of, steps_of
from effnlp_grading.records import Record
from effnlp_grading.replay import Notebook
from effnlp_lab import exercises
from effnlp_lab.notebook.driver import answer_case
from effnlp_lab.notebook.judge import Verdict, judge, versions
from effnlp_lab.notebook.setting import variant_of


def main(name: str, notebook: Path, verdicts: Path, device: str) -> None:
    """Run the cells, and judge each exercise where its check stands."""
    lab = exercises.lab(name)
    steps = steps_of(nbformat.read(notebook, as_version=4), lab)
    record, space = Record(verdicts, digest_of(steps)), Notebook()
    for step in steps:
        if step.kind == "run":
            space.run(step)
        elif step.kind == "check":
            twins = [e.name for e in lab.exercises if e.twin_of == step.exercise]
            tried = [_verdict(lab.name, one, space, device) for one in (step.exercise, *twins)]
            best = max(tried, key=lambda verdict: (verdict.score, verdict.state != "not attempted"))
            if best.exercise != step.exercise:
                best.exercise, best.twin = step.exercise, best.exercise
            record.keep(best.to_json())


def _verdict(lab: str, exercise: str, space: Notebook, device: str) -> Verdict:
    spec, answer = exercises.lab(lab).exercise(exercise), space.names.get(exercise)
    variant = variant_of(spec)
    if not callable(answer):
        sentence = f"No {exercise} is defined: its cell fails, or is gone."
        return Verdict(exercise, lab, "crashed", 0.0, float(spec.points), sentence, 0, variant, device,
                       versions=versions())  # fmt: skip
    return judge(spec, lab, lambda request: answer_case(request, answer), seed=secrets.randbits(32), variant=variant,
                 device=device, guarded=True)  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
