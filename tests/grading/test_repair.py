"""Submissions that editors or students damaged: rebuilt on the release, or refused by name, never taken for whole."""

from __future__ import annotations

import copy
import json
import os
import random
from dataclasses import replace

import nbformat
import pytest
from classes import LAB, ROOT, master_of
from effnlp_grading import sample_class
from effnlp_grading.plan import steps_of
from effnlp_grading.repair import RepairError, read_submission, repair
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nbgrader.utils import compute_checksum

from effnlp_lab import opening
from effnlp_lab.build import release_notebook

FUZZ = int(os.environ.get("EFFNLP_FUZZ", "2000")) // 3  # 100,000 in `make grading-bench`
RELEASE = nbformat.read(ROOT / "labs" / LAB / "tokenization.ipynb", as_version=4)
MASTER = master_of()
ANSWERS = sample_class.answers("perfect", MASTER)
SUBMITTED = sample_class.submission(RELEASE, ANSWERS)


def answers_of(notebook) -> dict[str, str]:
    found = {c.metadata.get("nbgrader", {}).get("grade_id"): c.source for c in notebook.cells}
    return {name: source for name, source in found.items() if name in ANSWERS}


def is_whole(notebook) -> bool:
    """The release's cells, in order, with its metadata: what nbgrader needs."""
    ours = [c for c in notebook.cells if c.metadata.get("nbgrader")]
    theirs = [c for c in RELEASE.cells if c.metadata.get("nbgrader")]
    return [c.metadata.nbgrader for c in ours] == [c.metadata.nbgrader for c in theirs] and all(
        a.source == b.source for a, b in zip(ours, theirs, strict=True) if not b.metadata.nbgrader.solution)


def _drop_metadata(notebook):
    for cell in notebook.cells:
        cell.metadata = {}


def _drop_metadata_and_ids(notebook):
    for number, cell in enumerate(notebook.cells):
        cell.metadata, cell["id"] = {}, f"colab{number}"


def _shuffle(notebook):
    random.Random(1).shuffle(notebook.cells)


def _double(notebook):
    notebook.cells = [copy.deepcopy(c) for cell in notebook.cells for c in (cell, cell)]


def _split(notebook):
    place = next(i for i, c in enumerate(notebook.cells) if c.metadata.get("nbgrader", {}).get("solution"))
    first, *rest = notebook.cells[place].source.split("\n")
    notebook.cells[place].source = "import math"
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell("\n".join([first, *rest])))


def _delete_given(notebook):
    notebook.cells = [c for c in notebook.cells if not c.metadata.get("nbgrader", {}).get("locked")]


def _edit_checks(notebook):
    for cell in notebook.cells:
        if cell.metadata.get("nbgrader", {}).get("grade"):
            cell.source = "10.0"


def test_what_an_older_release_said_is_left_out():
    """Points changed, so that prose was written anew: a page must not say both. What a student wrote stays."""
    def older(cell):
        more = "\n# an older word" if cell.kind in ("prose", "given", "demo") else ""
        return replace(cell, source=cell.source + more, identity=cell.identity and cell.identity + more)

    before = release_notebook(replace(MASTER, cells=tuple(map(older, MASTER.cells))))
    submitted = sample_class.submission(before, ANSWERS)
    prose = [cell for cell in submitted.cells if cell.cell_type == "markdown"]
    prose[3].source += "\nA student's word."
    changed, forged, open_ = [c for c in submitted.cells if c.metadata.get("nbgrader", {}).get("points")][:3]
    changed.metadata.nbgrader.points = forged.metadata.nbgrader.points = open_.metadata.nbgrader.points = 9.0
    open_.metadata.nbgrader.locked = False
    for cell in (changed, open_):
        cell.metadata.nbgrader.checksum = compute_checksum(cell)
    rebuilt = repair(submitted, RELEASE)
    told = " ".join(sentence for sentence in rebuilt.mended if "metadata" in sentence)
    assert told.count("The metadata of the cell") == 2 and changed.metadata.nbgrader.grade_id not in told
    assert forged.metadata.nbgrader.grade_id in told and open_.metadata.nbgrader.grade_id in told
    done = rebuilt.notebook
    assert [cell.source for cell in done.cells if "older word" in cell.source] == [prose[3].source]
    assert answers_of(done) == ANSWERS and is_whole(done)


@pytest.mark.parametrize("damage", [_drop_metadata, _drop_metadata_and_ids, _shuffle, _double, _delete_given,
                                    _edit_checks])
def test_answers_come_back(damage):
    notebook = copy.deepcopy(SUBMITTED)
    damage(notebook)
    done = repair(notebook, RELEASE)
    assert is_whole(done.notebook) and answers_of(done.notebook) == answers_of(SUBMITTED)
    assert done.mended and not done.lost
    nbformat.validate(done.notebook)


def test_whole_submission_is_left_as_it_is():
    done = repair(copy.deepcopy(SUBMITTED), RELEASE)
    assert done.sentences == [] and [c.source for c in done.notebook.cells] == [c.source for c in SUBMITTED.cells]


@pytest.mark.parametrize("keeps", [True, False], ids=["metadata kept", "metadata lost"])
def test_what_colab_saves_comes_back_whole(keeps, monkeypatch):
    """Opened from the badge, solved, saved and handed in: Colab writes older notebooks with ids of its own."""
    monkeypatch.setattr(opening, "repository_of", lambda root: opening.Repository("https://github.com/a/course"))
    release = release_notebook(MASTER)
    saved = json.loads(nbformat.writes(sample_class.submission(release, ANSWERS)))
    for number, cell in enumerate(saved["cells"]):
        del cell["id"]
        its = {"id": f"Qx{number:010d}", "colab": {"base_uri": "https://localhost:8080/"}}
        cell["metadata"] = {**cell["metadata"], **its} if keeps else its
    saved |= {"nbformat_minor": 0, "metadata": {"colab": {"provenance": []}, "accelerator": "GPU",
                                                "kernelspec": {"name": "python3", "display_name": "Python 3"}}}
    done = repair(read_submission(json.dumps(saved).encode()), release)
    nbformat.validate(done.notebook)
    assert not done.lost and answers_of(done.notebook) == answers_of(SUBMITTED)
    shown = [(cell.id, cell.metadata.get("tags"), cell.metadata.get("nbgrader")) for cell in done.notebook.cells]
    assert shown == [(cell.id, cell.metadata.get("tags"), cell.metadata.get("nbgrader")) for cell in release.cells]
    assert "colab.research.google.com/github/a/course/blob/main/labs/01_" in done.notebook.cells[0].source
    (first,) = [cell for cell in done.notebook.cells if "find_the_kit" in cell.source]
    assert first.source not in [step.source for step in steps_of(done.notebook, MASTER.lab)]  # not run when graded


def test_split_answer_still_runs_as_one():
    notebook = copy.deepcopy(SUBMITTED)
    _split(notebook)
    done = repair(notebook, RELEASE)
    sources = [c.source for c in done.notebook.cells if c.cell_type == "code"]
    first = next(iter(ANSWERS))
    assert sources.index("import math") < next(i for i, s in enumerate(sources) if s.startswith(f"def {first}"))
    assert next(i for i, s in enumerate(sources) if s.startswith(f"def {first}")) < sources.index(
        f'check("{first}", {first})')


def test_own_cells_keep_their_place():
    notebook = copy.deepcopy(SUBMITTED)
    place = next(i for i, c in enumerate(notebook.cells) if c.metadata.get("nbgrader", {}).get("solution"))
    notebook.cells.insert(place, nbformat.v4.new_code_cell("mine = 1"))
    done = repair(notebook, RELEASE)
    assert done.notebook.cells[place].source == "mine = 1" and not done.sentences


def test_lost_answer_is_named():
    notebook = copy.deepcopy(SUBMITTED)
    lost = next(iter(ANSWERS))
    notebook.cells = [c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("grade_id") != lost]
    done = repair(notebook, RELEASE)
    assert done.lost == [lost] and any(lost in sentence and "gone" in sentence for sentence in done.sentences)
    assert is_whole(done.notebook)


@pytest.mark.parametrize(("data", "why"), [
    (b"", "not JSON"), (b"{]", "not JSON"), (b"[]", "an object with cells"), (b"{}", "no list of cells"),
    (b"[" * 100_000, "not JSON"), (b"\xff\xfe", "not JSON"), (b"<<<<<<< HEAD\n{}", "not JSON"),
    (json.dumps({"cells": [{}] * 6_000}).encode(), "6,000 cells"),
])
def test_what_is_no_notebook_is_refused_by_name(data, why):
    with pytest.raises(RepairError, match="The work of ada.*") as error:
        read_submission(data, "The work of ada")
    assert why in str(error.value)


def test_another_notebook_is_refused():
    with pytest.raises(RepairError, match="no cell of the released notebook"):
        repair(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print(1)")]), RELEASE)


def test_version_3_and_odd_fields_are_read():
    cell = {"cell_type": "code", "input": ["x = 1\n", "y = 2"], "metadata": None}
    old = {"nbformat": 3, "worksheets": [{"cells": [cell, None]}]}
    assert [c.source for c in read_submission(json.dumps(old).encode()).cells] == ["x = 1\ny = 2"]


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
                    lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=12), v, max_size=4),
                    max_leaves=8)
KEYS = st.sampled_from(["cell_type", "source", "metadata", "id", "outputs", "nbgrader", "input", "tags"])
VALUES = JSON | st.sampled_from(["code", "markdown", *ANSWERS, *(c.source for c in RELEASE.cells[:40])])
CELL = st.dictionaries(KEYS, VALUES, max_size=6) | JSON


@settings(max_examples=FUZZ, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.lists(CELL, max_size=6), st.binary(max_size=40), st.lists(st.integers(0, 60), max_size=4))
def test_anything_is_repaired_or_refused(cells, noise, kept):
    """Whatever comes: a whole notebook with something said, or a RepairError, and nothing else."""
    whole = [dict(SUBMITTED.cells[i % len(SUBMITTED.cells)]) for i in kept]
    data = json.dumps({"cells": cells + whole, "metadata": 1}, default=str).encode("utf-8", "surrogatepass")
    for one in (data, data[: len(data) // 2] + noise, noise):
        try:
            done = repair(read_submission(one), RELEASE)
        except RepairError:
            continue
        assert is_whole(done.notebook) and (done.sentences or answers_of(done.notebook) == answers_of(SUBMITTED))
        nbformat.validate(done.notebook)


def test_a_prediction_is_read_from_the_cell_that_the_release_has_for_it():
    """Neither from a cell that says it is one, nor from a check that was rewritten; a number in its place is kept."""
    lab, notebook = MASTER.lab, copy.deepcopy(SUBMITTED)
    cell = next(c for c in notebook.cells if c.metadata.get("effnlp", {}).get("predict") == "unknown_words")
    cell.source = "my_unknown_words_of_100 = 77"
    forged = nbformat.v4.new_code_cell("pass", metadata={"effnlp": {"predict": "unknown_words"}})
    notebook.cells.insert(0, forged)
    whole = repair(notebook, RELEASE).notebook
    assert [s.source for s in steps_of(whole, lab) if s.predicts == "unknown_words"] == ["my_unknown_words_of_100 = 77"]
    assert [s.exercise for s in steps_of(whole, lab) if s.kind == "predict"] == [p.name for p in lab.predictions]
