"""Pages that the kit writes, opened in Chromium: nothing in them that WCAG 2.1 AA calls a barrier."""

from __future__ import annotations

import types
from pathlib import Path

import nbformat
from browsing import barriers_of
from effnlp_grading import defend, similarity
from effnlp_grading.quiz import Option, Question
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from effnlp_lab import exercises, runner
from effnlp_lab.gpurun import report as gpu_report
from effnlp_lab.notebook import plots
from effnlp_lab.notebook import report as check_report
from effnlp_lab.notebook.judge import CaseResult, Verdict
from effnlp_lab.notebook.receipt import Receipt

LAB = exercises.lab("01_tokenization")
CODE = "def merge_pair(word, pair, new_id):\n    # from the left\n    return [new_id] if not word and 1.5 else word\n"
MACHINE = {"device": "A card", "kind": "cuda", "driver": "1", "cpu": "a processor", "cores": 4, "load_average": 0.1,
           "python": "3.11", "versions": {"torch": "2"}}  # fmt: skip
BAD = """<!DOCTYPE html><html lang="en"><head><title>A page</title></head><body><p>Text</p>
<details><summary>More</summary><p style="color: #aaa">Pale</p></details><img src="x.png"></body></html>"""


def test_barriers_are_seen(tmp_path):
    """In what is folded too; a page that cannot be read at all is not passed over."""
    page = tmp_path / "bad.html"
    page.write_text(BAD)
    ((name, found),) = barriers_of(page).items()
    assert name == str(page) and sorted(line.partition(" ")[0] for line in found) == ["color-contrast", "image-alt"]
    assert barriers_of(page, outside=["img", "details p"]) == {}


def verdicts() -> list[Verdict]:
    """One in each state that a check can find."""
    states = {"correct": 2.0, "incorrect": 1.0, "crashed": 0.0, "timed out": 0.0, "over budget": 1.5,
              "not attempted": 0.0, "not run here": 0.0}  # fmt: skip
    cases = [CaseResult("one word", "values", "correct"), CaseResult("on a GPU", "values", "not run here")]
    return [Verdict(f"answer_{n}", LAB.name, state, score, 2.0, "A sentence on it.", 1, {"ties": "smallest"}, "cpu",
                    [*cases, CaseResult("two words", "values", state, "It differs.", {"yours": "3", "right": 2.5})],
                    ["The ends of a word are no pair."], ["Your answer printed: 3"])
            for n, (state, score) in enumerate(states.items())]  # fmt: skip


def picture() -> plots.Picture:
    drawn, axes = plots.figure("Cost", "length (tokens)", "time (s)", "It grows.")
    axes.plot([1, 2], [1, 4])
    return plots.Picture(plots.png(drawn), "A line that rises from 1 to 4.")


def executed(folder: Path) -> Path:
    """All that cells of the kit show, in a notebook turned into a page as `effnlp run` does it."""
    shown = [check_report.markup(one, "Lab 01: 3 of 10 points so far, 2 of 6 exercises whole.") for one in verdicts()]
    shown.append(picture()._repr_mimebundle_()["text/html"])
    receipt = Receipt(LAB.name, title="A receipt").add("baseline", seconds=2.0, peak_bytes=1 << 20)
    shown.append(receipt.add("yours", seconds=1.0, peak_bytes=1 << 10, note="in half the time").html())
    cells = [new_markdown_cell("# A lab\n\nProse with `code`, [a link](https://example.org/) and $x^2$.\n\n"
                               "<details><summary>Hint 1</summary>\n\nLook *left*.\n\n</details>")]  # fmt: skip
    cells += [new_code_cell(CODE, execution_count=n, outputs=[new_output("display_data", {"text/html": html})])
              for n, html in enumerate(shown, 1)]  # fmt: skip
    cells.append(new_code_cell("1 / 0", outputs=[
        new_output("stream", name="stdout", text="printed\n"), new_output("stream", name="stderr", text="a warning\n"),
        new_output("execute_result", {"text/plain": "1.0"}, execution_count=9)]))  # fmt: skip
    path = folder / "lab.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    runner._write_html(path)
    return path.with_suffix(".html")


def gpu(folder: Path) -> Path:
    step = {"state": "failed", "ran": [("test_one", "ok", 1.0), ("test_two", "failed", 2.0)], "skipped": ["a"],
            "died": [], "seconds": 3.0, "finished": "today"}  # fmt: skip
    figure = {"suite": "copy", "title": "Copy", "peer": "theirs", "ratio": 0.5, "record": 2.0, "least": 1.5,
              "state": "below", "note": "a note"}  # fmt: skip
    return gpu_report.write({
        "ok": False, "whole": False, "not_run": ["grading"], "problems": ["test_two: it failed."], "commit": "abc",
        "tree": "def", "machine": MACHINE, "seconds": 3.0, "figures": [figure, figure | {"ratio": None, "state": "ok"}],
        "parts": {"tests": {"state": "failed", "steps": {"tests-1": step, "tests-2": None}}},
    }, folder)  # fmt: skip


def quiz(course: types.SimpleNamespace) -> Path:
    options = [Option("`right` becomes `wrong`", CODE, 0), Option("nothing changes", CODE, 1)]
    question = Question("merge_pair", "which change", CODE, options, 1, "because", "one word", "word = [1]", "+ to -")
    return defend.write_quiz(course, LAB, "ada", [question, question])


def alike(course: types.SimpleNamespace) -> Path:
    one, other = (similarity.Author(name, "class", {"merge_pair": CODE}) for name in ("ada", "ben"))
    pair = similarity.Likeness(one, other, 0.9, 0.8, {"merge_pair": 0.9})
    return similarity.write_page(course, LAB, [pair, pair], ["cem: not compared: no notebook"], 3)


def test_no_page_has_a_barrier(tmp_path):
    course = types.SimpleNamespace(root=tmp_path)
    assert barriers_of(executed(tmp_path), gpu(tmp_path), quiz(course), alike(course)) == {}
