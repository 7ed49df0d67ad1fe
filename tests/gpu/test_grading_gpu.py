"""Grading on a GPU, in the sandbox: a fault costs its exercise alone, and the card's memory is watched from outside."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from effnlp_grading.limits import Limits
from effnlp_grading.mutants import open_bench
from effnlp_grading.proctor import Graded, Proctor
from effnlp_grading.records import Seeds
from effnlp_grading.sandbox import Sandbox, sandbox_error

from effnlp_lab import exercises
from effnlp_lab.master import read_master, solution_source

ROOT = Path(__file__).resolve().parents[2]
LAB = "06_flash_attention"
FAULTY, NEXT = "online_softmax", "merge_partials"
FAULT = """


def {name}(*inputs):
    torch.zeros(4, device="cuda")[torch.full((8,), 1 << 20, device="cuda")]
    torch.cuda.synchronize()
"""
GREEDY = """

KEPT = []


def {name}(*inputs):
    while True:
        KEPT.append(torch.ones(256 << 18, device="cuda"))
        torch.cuda.synchronize()
        time.sleep(0.2)
"""

pytestmark = [pytest.mark.alone]  # in a container what others take of the card counts as the session's
_closed = sandbox_error()
if _closed is not None:
    pytestmark.append(pytest.mark.skip(reason=f"NO SANDBOX HERE: {_closed}"))


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    os.environ["EFFNLP_SEED"] = "5"
    with Sandbox(LAB, "cuda") as made:
        yield made
    del os.environ["EFFNLP_SEED"]


def notebook(added: str = "") -> nbformat.NotebookNode:
    """Lab 06 up to the exercise after the faulty one, solved; `added` follows the faulty one's solution."""
    master = read_master(ROOT / "solutions" / LAB / f"{exercises.lab(LAB).notebook}.py")
    made = nbformat.read(ROOT / "labs" / LAB / f"{exercises.lab(LAB).notebook}.ipynb", as_version=4)
    kept = []
    for cell in made.cells:
        nbgrader = cell.metadata.get("nbgrader", {})
        name = nbgrader.get("grade_id", "")
        if nbgrader.get("solution"):
            cell.source = solution_source(master.exercise_cell(name))
            if name == FAULTY:
                cell.source += f"\n\nimport time\n{added.format(name=name)}"
        if cell.cell_type == "code":
            kept.append(cell)
        if name == f"test_{NEXT}":
            break
    made.cells = kept
    return made


def grade(sandbox: Sandbox, added: str = "", **limits) -> Graded:
    return Proctor(sandbox, Seeds(b"key"), Limits(**limits), "cuda").grade(notebook(added), "student")


def assert_full(verdict: dict, name: str) -> None:
    earned = (verdict["state"], verdict["score"])
    assert earned == ("correct", exercises.lab(LAB).exercise(name).points), f"{name}: {verdict['sentence']}"


def test_solutions_earn_full_points(sandbox):
    graded = grade(sandbox)
    assert graded.verdicts
    for name, verdict in graded.verdicts.items():
        assert_full(verdict, name)
    assert all(v["device"] == "cuda" for v in graded.verdicts.values())


def test_cuda_fault_costs_its_exercise_alone(sandbox):
    graded = grade(sandbox, FAULT)
    assert graded.verdicts[FAULTY]["score"] == 0.0 and graded.verdicts[FAULTY]["state"] == "crashed"
    assert_full(graded.verdicts[NEXT], NEXT)


def test_too_much_of_the_cards_memory_ends_the_session(sandbox):
    graded = grade(sandbox, GREEDY, gpu_memory=3 << 30)
    assert graded.verdicts[FAULTY]["score"] == 0.0
    assert "GPU's memory" in graded.verdicts[FAULTY]["sentence"], graded.verdicts[FAULTY]["sentence"]
    assert_full(graded.verdicts[NEXT], NEXT)


def test_kernels_compile_in_the_sandbox(sandbox):
    """The Triton exercise, compiled for this card by the session itself."""
    with open_bench(LAB, "cuda", sandbox=sandbox) as bench:
        spec = exercises.lab(LAB).exercise("flash_kernel")
        verdict = bench.judge(spec, solution_source(bench.master.exercise_cell(spec.name)))
    assert_full(verdict, spec.name)
