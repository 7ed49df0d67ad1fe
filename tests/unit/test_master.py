"""`effnlp build` refuses a broken master in one sentence, each thing in its own words."""

import json

import nbformat
import pytest
import toy

from effnlp_lab import build, exercises
from effnlp_lab.errors import EffnlpError
from effnlp_lab.exercises.reference import Mistake, edit
from effnlp_lab.master import MasterError, blank_source, mistaken_source, read_master, regions

GOOD = '''\
# %% [markdown]
# # Toy

# %% tags=["parameters"]
DEVICE = "auto"
FAST = "auto"

# %%
import torch
from effnlp_lab import check
LIMIT = 3

# %% exercise="softmax"
def softmax(x):
    """Over the last axis."""
    ### BEGIN SOLUTION
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)
    ### END SOLUTION

# %% check="softmax"
check("softmax", softmax)

# %% tags=["demo"] needs=["softmax"]
shown = softmax(torch.zeros(2, 2))

# %% exercise="count"
def count(items):
    ### BEGIN SOLUTION
    return {i: items.count(i) for i in items}
    ### END SOLUTION

# %% check="count"
check("count", count)

# %% tags=["nbval-check-output"]
print(LIMIT)
'''


@pytest.fixture(autouse=True)
def toy_lab(monkeypatch):
    toy.install(monkeypatch)
    monkeypatch.setattr(toy.Softmax, "mistakes", (Mistake("wrong axis", "s", edit("e.sum(-1", "e.sum(0")),))


@pytest.fixture
def master(tmp_path):
    def make(text=GOOD, *changes):
        for old, new in changes:
            assert text.count(old) >= 1, old
            text = text.replace(old, new)
        path = tmp_path / "solutions" / "99_toy" / "toy.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return make


def test_a_good_master_builds(master, tmp_path):
    lab = read_master(master())
    build.write(lab, tmp_path)
    solution = nbformat.read(tmp_path / "solutions/99_toy/toy.ipynb", 4)
    release = nbformat.read(tmp_path / "labs/99_toy/toy.ipynb", 4)
    nbformat.validate(solution)
    nbformat.validate(release)
    assert "e.sum" in json.dumps(solution) and "e.sum" not in json.dumps(release)
    by_id = {c.id: c for c in release.cells}
    assert by_id["check-softmax"].metadata.nbgrader.points == 4.0
    assert by_id["check-softmax"].metadata.nbgrader.grade and by_id["check-softmax"].metadata.nbgrader.locked
    assert by_id["exercise-softmax"].metadata.nbgrader.solution
    assert [c.source.splitlines()[0] for c in release.cells if "demo" in c.metadata.get("tags", [])][1:] == [
        "%%demo softmax"
    ]  # after the build's own
    assert len({c.id for c in solution.cells}) == len(solution.cells)


def test_building_twice_gives_the_same_bytes(master, tmp_path):
    lab = read_master(master())
    build.write(lab, tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.ipynb")}
    assert build.write(read_master(master()), tmp_path) == []
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*.ipynb")}


def test_outputs_are_carried_while_the_code_matches_and_check_tells_stale(master, tmp_path):
    build.write(read_master(master()), tmp_path)
    path = tmp_path / "solutions/99_toy/toy.ipynb"
    notebook = nbformat.read(path, 4)
    stale = lambda: list(build._stale_files(read_master(tmp_path / "solutions/99_toy/toy.py"), tmp_path))  # noqa: E731
    for cell in notebook.cells:
        if cell.cell_type == "code" and build.SHOWS.search(cell.source):
            path.write_text(build._dump(notebook))
            assert any(f"no outputs of cell {cell.id}" in s for s in stale())
            cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="3\n")]
    path.write_text(build._dump(notebook))
    assert stale() == []
    master(GOOD, ("# # Toy", "# # Toy, told otherwise"))
    assert any("not what its master builds" in s for s in stale())
    build.write(read_master(tmp_path / "solutions/99_toy/toy.py"), tmp_path)
    assert stale() == [] and nbformat.read(path, 4).cells[-1].outputs
    master(GOOD, ("LIMIT = 3", "LIMIT = 4"))
    build.write(read_master(tmp_path / "solutions/99_toy/toy.py"), tmp_path)
    assert not nbformat.read(path, 4).cells[-1].outputs
    assert any("no outputs" in s for s in stale())


def test_warnings_and_dead_widgets_are_not_carried(master, tmp_path):
    build.write(read_master(master()), tmp_path)
    path = tmp_path / "solutions/99_toy/toy.ipynb"
    notebook = nbformat.read(path, 4)
    kept = nbformat.v4.new_output("stream", name="stdout", text="3\n")
    notebook.cells[-1].outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="/a/machine/warns.py"),
        nbformat.v4.new_output("display_data", {build.WIDGET: {"model_id": "0f93"}, "text/plain": "0%"}), kept,
    ]  # fmt: skip
    path.write_text(build._dump(notebook))
    build.write(read_master(tmp_path / "solutions/99_toy/toy.py"), tmp_path)
    assert nbformat.read(path, 4).cells[-1].outputs == [kept]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([("# # Toy", "# | 1 | `count`: count (or not) | 1 | 15 | 1 of 5 |")], r"write \| 1 \| 10 \| 1 of 5 \|"),
        ([("# # Toy", "# *4 points, about 10 minutes, difficulty 2 of 5.* Go on.")],
         "'softmax' is not what .* difficulty 1"),
        ([("# # Toy", "# | 1 | `count`: x | 2 | 10 | 1 of 5 |\n#\n# *A badge, about 10 minutes, difficulty 1 of 5.*")],
         r"py, line 2: the prose on 'count' .* 1 of 5 \|; line 4: the prose on 'softmax' .* write \*4 points, about"),
        ([('exercise="count"', 'exercize="count"')], "unknown key 'exercize'"),
        ([('exercise="count"', 'exercise="counts"')], "unknown exercise 'counts'"),
        ([('exercise="count"', 'exercise="softmax"')], "a second exercise cell is called 'softmax'"),
        ([('exercise="count"', "exercise=count")], "cannot be read"),
        ([('tags=["demo"]', 'tags=["dmeo"]')], "unknown tag 'dmeo'"),
        ([('tags=["demo"] needs', "needs")], "belongs to demos"),
        ([('needs=["softmax"]', 'needs=["count"]')], "comes only later"),
        ([('tags=["demo"] needs=["softmax"]', 'tags=["demo"] check="count"')], "at once"),
        ([('    ### END SOLUTION\n\n# %% check="softmax"', '\n# %% check="softmax"')], "come in pairs"),
        (
            [
                ("    ### BEGIN SOLUTION\n    return {", "    return {"),
                ("for i in items}\n    ### END SOLUTION", "for i in items}"),
            ],
            "would be released",
        ),
        ([("LIMIT = 3", "### BEGIN SOLUTION\nLIMIT = 3\n### END SOLUTION")], "outside an exercise cell"),
        (
            [
                (
                    "def count(items):\n    ### BEGIN SOLUTION\n"
                    "    return {i: items.count(i) for i in items}\n    ### END SOLUTION",
                    "### BEGIN SOLUTION\ndef count(items):\n    return 0\n### END SOLUTION",
                )
            ],
            "outside a function",
        ),
        ([("def count(items)", "def tally(items)")], "defines no count"),
        ([('check("count", count)', 'print(1); check("count", count)')], "a check cell is exactly"),
        ([("print(LIMIT)", "print(shown)")], "which only a demo defines"),
        ([("return {i: items.count(i) for i in items}", "return {shown: 1}")], "which only a demo defines"),
        ([('# %% check="count"\ncheck("count", count)\n', "")], "no check cell"),
        ([("print(LIMIT)", "print(LIMIT")], "not Python"),
    ],
)
def test_each_refusal_has_its_words(master, changes, words):
    with pytest.raises(MasterError, match=words) as refusal:
        read_master(master(GOOD, *changes))
    assert "toy.py" in str(refusal.value) and "\n" not in str(refusal.value)


def test_the_room_stays_out_of_graded_cells(master, monkeypatch):
    import dataclasses

    monkeypatch.setattr(exercises, "lab", lambda name: dataclasses.replace(toy.LAB, room="tokenization"))
    with pytest.raises(MasterError, match="holds the answers"):
        read_master(master(GOOD, ("LIMIT = 3", "from effnlp_lab.tokenization import train\nLIMIT = 3")))
    read_master(master(GOOD, ("shown = softmax", "import effnlp_lab.tokenization\nshown = softmax")))


def test_an_exercise_that_leans_on_nothing_known_is_refused(master, tmp_path):
    lab = read_master(master(GOOD, ("items.count(i)", "items.count(helper)")))
    with pytest.raises(MasterError, match="uses 'helper'"):
        build.write(lab, tmp_path)


def test_an_edit_that_does_not_fit_is_refused(master, tmp_path, monkeypatch):
    for old in ("nowhere", "e"):
        monkeypatch.setattr(toy.Softmax, "mistakes", (Mistake("m", "s", edit(old, "x")),))
        with pytest.raises(MasterError, match="has to occur once"):
            build.write(read_master(master()), tmp_path)


def test_a_missing_master_is_one_sentence(tmp_path):
    with pytest.raises(EffnlpError, match="no such master"):
        read_master(tmp_path / "solutions" / "99_toy" / "toy.py")


def test_blank_and_mistake_texts(master):
    lab = read_master(master())
    cell = lab.exercise_cell("softmax")
    assert regions(cell.source) == [(3, 6)]
    assert blank_source(cell).splitlines()[-1].strip().startswith("raise NotImplementedError")
    assert "e.sum(0" in mistaken_source(lab, "softmax", toy.Softmax.mistakes[0])
