"""A class graded by `effnlp grade` beside plain `nbgrader autograde`, on the same submissions and the same cores.

Plain nbgrader starts a Jupyter kernel for each submission and runs its cells, the checks among them, with the
instructor's rights; cells tagged `demo` are skipped in both. Ours judges in the sandbox, by forking from a warm parent.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

from effnlp_lab.device import Device
from effnlp_lab.notebook.bench import Comparison, compare

ROOT = Path(__file__).resolve().parents[1]
NEEDS = "cpu"
OURS, PEER = "effnlp grade", "nbgrader autograde"
LAB = "01_tokenization"
PLAIN = """
c.Autograde.sanitize_preprocessors = [
    "nbgrader.preprocessors.ClearOutput", "nbgrader.preprocessors.DeduplicateIds",
    "nbgrader.preprocessors.OverwriteKernelspec", "nbgrader.preprocessors.OverwriteCells",
    "nbgrader.preprocessors.CheckCellMetadata"]
c.Autograde.autograde_preprocessors = [
    "nbgrader.preprocessors.Execute", "nbgrader.preprocessors.IgnorePattern",
    "nbconvert.preprocessors.ClearMetadataPreprocessor", "nbgrader.preprocessors.LimitOutput",
    "nbgrader.preprocessors.SaveAutoGrades", "nbgrader.preprocessors.AssignLatePenalties",
    "nbgrader.preprocessors.CheckCellMetadata"]
c.ExecutePreprocessor.timeout = 900
c.ExecutePreprocessor.startup_timeout = 180
"""


def run(device: Device, folder: Path) -> list[Comparison]:
    """The sample class over and over: EFFNLP_GRADING_SIZE submissions (12 by default, 4 in fast mode)."""
    for path in (ROOT / "grading", ROOT / "tests" / "grading"):
        if str(path) not in sys.path:
            sys.path.append(str(path))
    from classes import copy_course, make_course
    from effnlp_grading.autograde import grade_class

    from effnlp_lab.runner import usable_cores

    small = os.environ.get("EFFNLP_FAST", "").strip().lower() in ("1", "true")
    size = int(os.environ.get("EFFNLP_GRADING_SIZE") or (4 if small else 12))
    with tempfile.TemporaryDirectory(prefix="effnlp-bench-") as place:
        ours = make_course(Path(place) / "ours", size)
        plain = copy_course(ours, Path(place) / "plain")
        with (plain.root / "grading" / "nbgrader_config.py").open("a") as file:
            file.write(PLAIN)

        def judge_class() -> None:
            with contextlib.redirect_stdout(None):
                results = grade_class(ours, [(LAB, s) for s in ours.students(LAB)], device="cpu", force=True)
            assert all(r.state == "graded" for r in results)

        def autograde() -> None:
            shutil.rmtree(plain.root / "grading" / "autograded", ignore_errors=True)
            with contextlib.suppress(Exception):  # a submission that ends its kernel fails the command, after the rest
                plain.nbgrader("autograde", LAB, environment={"EFFNLP_DEVICE": "cpu", "EFFNLP_FAST": "1"})

        result = compare(
            "Grading a class's submissions of lab 01", {OURS: judge_class, PEER: autograde}, ours=OURS, peer=PEER,
            unit="submissions/min", work=size, repeats=1, warmup=0, device=device,
        )  # fmt: skip
        result.notes.append(f"{size} submissions on {usable_cores()} cores; ours writes feedback pages too.")
        return [result]
