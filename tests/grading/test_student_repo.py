"""A repository for students: checks work in it, and nobody reads a solution in it by accident."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from effnlp_grading.cli import main
from effnlp_grading.release import packed_sources, without_changes

from effnlp_lab import exercises
from effnlp_lab.errors import UsageError
from effnlp_lab.master import BEGIN, END

ROOT = Path(__file__).resolve().parents[2]
LABS = exercises.lab_names()
USED = """
import json, sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]  # a student has no checkout of ours
import effnlp_lab
from effnlp_lab import check, exercises
from effnlp_lab.cli import main
from effnlp_lab.notebook.check import verdict_of

notebook = json.load(open("labs/01_tokenization/tokenization.ipynb"))
space = {}
cells = {c["id"]: "".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"}
exec(cells["exercise-count_pairs"], space)
try:
    space["count_pairs"]([[1, 2]], [1])
except NotImplementedError:
    print("blank")
solved = (
    "def count_pairs(words, counts):\\n"
    "    return {p: sum(n * list(zip(w, w[1:])).count(p) for w, n in zip(words, counts))"
    " for w in words for p in zip(w, w[1:])}"
)
exec(solved, space)
print("points", check("count_pairs", space["count_pairs"]))
exec(solved.replace("n * ", ""), space)
print("mistake", verdict_of("count_pairs", space["count_pairs"]).mistakes)
print(effnlp_lab.__file__)
for verb in ("build", "audit", "mutate 01", "grade 01", "defend ada", "release --student-repo x"):
    print("verb", main(verb.split()))
print("help", main(["replay", "--help"]))
print("left", sorted(n for n in sys.modules if n.startswith("effnlp") and sys.modules[n].__file__
                     and not sys.modules[n].__file__.startswith(sys.argv[1])))

for cell in notebook["cells"]:  # a browser's editor drops what it does not know
    cell["metadata"] = {}
    if cell["id"] == "exercise-count_pairs":
        cell["source"] = solved
json.dump(notebook, open("labs/01_tokenization/tokenization.ipynb", "w"))
print("submit", main(["submit", "labs/01_tokenization/tokenization.ipynb", "--out", "handin"]))
import effnlp_grading.alone  # which judges on macOS and Windows
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("release") / "labs-for-students"
    assert main(["release", "--student-repo", str(out)]) == 0
    return out


def test_checks_work_and_the_instructors_verbs_are_one_sentence(repository):
    settings = {**os.environ, "PYTHONPATH": f"{repository}{os.pathsep}{repository / 'grading'}", "EFFNLP_DEVICE": "cpu"}
    done = subprocess.run([sys.executable, "-c", USED, str(repository)], cwd=repository, env=settings,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "blank\n" in said and "points 1.0" in said and str(repository) in said
    (named,) = ast.literal_eval(said.split("mistake ")[1].splitlines()[0])  # from what is packed
    assert named in [mistake.sentence for mistake in exercises.reference_of("count_pairs").mistakes]
    assert said.count("verb 2") == 6 and "help 0" in said
    assert "left []\n" in said  # nothing of this checkout
    assert "submit 0\n" in said and "It can be handed in." in said and "In all 1 of 10 points" in said
    assert said.count("lost its metadata: it is given back") > 20 and "Not checked" not in said
    handed = json.loads((repository / "handin" / "tokenization.ipynb").read_text("utf-8"))
    assert [c["metadata"].get("nbgrader") for c in handed["cells"]] == [
        c["metadata"].get("nbgrader") for c in json.loads((ROOT / "labs" / "01_tokenization" / "tokenization.ipynb")
                                                          .read_text("utf-8"))["cells"]]
    sentences = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(sentences) == 6 and all("installation has no" in s or "the instructor's" in s for s in sentences)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def test_no_solution_is_in_it_outside_the_references(repository):
    """Neither a whole solution of a blank nor, outside rooms and references, three lines of one in a row."""
    texts = {path.relative_to(repository): path.read_text("utf-8") for path in repository.rglob("*")
             if path.is_file() and path.suffix not in (".safetensors", ".png") and path.name != "reference.py"}
    rooms = {exercises.lab(name).room for name in LABS} - {None}
    whole = {path: _squeezed(text.encode().decode("unicode_escape") if path.suffix in (".json", ".ipynb") else text)
             for path, text in texts.items()}
    seen = 0
    for name in LABS:
        lab = exercises.lab(name)
        solved = json.loads((ROOT / "solutions" / name / f"{lab.notebook}.ipynb").read_text("utf-8"))
        for cell in solved["cells"]:
            source = "".join(cell["source"])
            for region in source.split(BEGIN)[1:]:
                lines = [line.strip() for line in region.split(END)[0].splitlines() if len(line.strip()) > 12]
                seen += bool(lines)
                pieces = ["".join(map(_squeezed, lines[i : i + 3])) for i in range(len(lines) - 2)]
                everything = _squeezed("".join(lines))
                for path, text in whole.items():
                    in_room = len(path.parts) > 1 and path.parts[0] == "effnlp_lab" and path.parts[1] in rooms
                    assert len(everything) < 80 or everything not in text, f"{path} holds a solution of {name}"
                    assert in_room or not any(p in text for p in pieces), f"{path} holds a part of a solution of {name}"
    assert seen >= 60


def test_what_is_the_instructors_is_not_in_it(repository):
    names = {str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()}
    assert not [n for n in names if n.startswith(("solutions", "tests", "benchmarks", ".ci", ".github"))]
    assert not {"effnlp_lab/build.py", "effnlp_lab/mutate.py", "grading/nbgrader_config.py", "docs/grading.md",
                *(f"grading/effnlp_grading/{name}.py" for name in
                  "autograde collect defend export mutants quiz regrade sample_class similarity".split())} & names
    assert {f"labs/{n}/{exercises.lab(n).notebook}.ipynb" for n in LABS} <= names
    for path in repository.rglob("*.py"):
        ast.parse(path.read_text("utf-8"))
    readme = (repository / "README.md").read_text("utf-8")
    assert "{" not in readme and all(name in readme for name in LABS) and "EFFNLP_STUDENT" not in readme
    linked = [part.split(")")[0] for part in readme.split("](")[1:]]
    assert linked and all((repository / link).is_file() for link in linked if "://" not in link)
    project = tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))
    assert set(project["project"]["optional-dependencies"]) == {"notebooks", "gpu"}
    assert set(project["tool"]) == {"setuptools"}
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert project["project"]["dependencies"] == ours["project"]["dependencies"]


def test_releasing_again_replaces_what_was_released_and_nothing_else(repository, monkeypatch):
    monkeypatch.setenv("EFFNLP_VARIANT_KEY", "sesame")
    (repository / "notes.txt").write_text("a student's own")
    stale = repository / "labs" / "01_tokenization" / "tokenization.ipynb"
    stale.write_text("old")
    assert main(["release", "--student-repo", str(repository)]) == 0
    assert (repository / "notes.txt").read_text() == "a student's own" and stale.read_text("utf-8") != "old"
    assert "EFFNLP_VARIANT_KEY=sesame" in (repository / "README.md").read_text("utf-8")


@pytest.mark.parametrize(("place", "words"), [("full", "is not empty"), (str(ROOT), "holds the course itself"),
                                              (str(ROOT / "effnlp_lab" / "x"), "holds the course itself")])
def test_a_place_that_is_taken_is_refused(tmp_path, place, words):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=words):
        main(["release", "--student-repo", str(tmp_path / place)])
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_packed_mistakes_come_back(monkeypatch, tmp_path):
    path = tmp_path / "01_tokenization" / "sources.json"
    path.parent.mkdir()
    before = exercises.sources("01_tokenization")
    original = (ROOT / "effnlp_lab" / "exercises" / "01_tokenization" / "sources.json").read_text("utf-8")
    path.write_text(packed_sources(original), "utf-8")
    monkeypatch.setattr(exercises, "_HERE", tmp_path)
    assert exercises.sources.__wrapped__("01_tokenization") == before


def test_references_lose_the_texts_of_mistakes_and_nothing_else():
    text = 'x = (Mistake("ä", "b", edit("old", "new")), Mistake("c", "d",\n   ("e",\n    "f"), seen_on="cpu"))\ny = 1\n'
    assert without_changes(text) == 'x = (Mistake("ä", "b", ""), Mistake("c", "d",\n   "", seen_on="cpu"))\ny = 1\n'
