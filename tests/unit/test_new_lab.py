"""A new lab passes every check from the start, and nothing is written where there can be none of its name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest

from effnlp_lab import new_lab
from effnlp_lab.errors import UsageError
from effnlp_lab.exercises.spec import Lab

ROOT = Path(__file__).resolve().parents[2]
NAME = "97_small_shares"
CHECKS = f"""
import json
from effnlp_lab import audit, build, exercises, new_lab
commands = []
new_lab.subprocess.call = lambda command, **_: commands.append(command) or 0  # built below, in this process
made = new_lab.main({NAME!r}, "Small shares", room=True)
executed = build.main([{NAME!r}], execute=True, device="cpu")
checked = build.main([{NAME!r}], check=True)
faults = audit.main([{NAME!r}], 3, False, "cpu", None, False, 1)
lab = exercises.lab({NAME!r})
print("RESULT", json.dumps([made, executed, checked, faults, lab.title, lab.graded, lab.room, commands[0][1:]]))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """What a checkout needs for building a lab, without the other labs' masters."""
    root = tmp_path_factory.mktemp("tree")
    unwanted = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(ROOT / "effnlp_lab", root / "effnlp_lab", ignore=unwanted)
    shutil.copy(ROOT / "pyproject.toml", root)
    for folder in ("solutions/00_start_here", "labs", "grading", "tests"):
        (root / folder).mkdir(parents=True)
    return root


def test_a_new_lab_is_built_executed_and_audited(tree):
    environment = dict(os.environ, PYTHONPATH=str(tree), EFFNLP_DEVICE="cpu", EFFNLP_FAST="1", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", CHECKS], cwd=tree, env=environment, capture_output=True, text=True,
                          timeout=300)  # fmt: skip
    told = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert told, done.stdout + done.stderr
    result = json.loads(told[0].removeprefix("RESULT "))
    assert result == [
        0, 0, 0, 0, "Small shares", False, "small_shares",
        ["-m", "effnlp_lab", "build", NAME, "--execute"]]  # fmt: skip
    assert "audit: 0 faults" in done.stdout
    release = nbformat.read(tree / "labs" / NAME / "small_shares.ipynb", as_version=4)
    nbformat.validate(release)
    text = str(release)
    assert "NotImplementedError" in text and "return counts / total" not in text and "varies from sample" not in text
    solved = nbformat.read(tree / "solutions" / NAME / "small_shares.ipynb", as_version=4)
    shown = "".join(str(cell.get("outputs")) for cell in solved.cells)
    assert "1 of 1 point" in shown and "<img" in shown
    assert tomllib.loads((tree / "tests" / "mutants" / f"{NAME}.toml").read_text()) == {}


@pytest.mark.parametrize("room", [False, True])
def test_its_texts_are_python_and_say_what_was_asked(room):
    made = new_lab.texts(NAME, "Small shares", room)
    assert (f"effnlp_lab/{NAME[3:]}/__init__.py" in made) == room
    for path, text in made.items():
        assert "$" not in text.replace("$n", "").replace("n_k$", "").replace("n_j$", "")
        if path.endswith(".py"):
            assert max(map(len, text.splitlines()), default=0) <= 120
            compile(text, path, "exec")
    space: dict = {}
    exec(made[f"effnlp_lab/exercises/{NAME}/spec.py"], space)
    assert isinstance(space["LAB"], Lab) and space["LAB"].name == NAME
    assert space["LAB"].room == ("small_shares" if room else None)


@pytest.mark.parametrize(("name", "words"), [
    ("mixture", "no name for a lab"), ("9_mixture", "no name for a lab"), ("10_Mixture", "no name for a lab"),
    ("10_", "no name for a lab"), ("10_../../etc", "no name for a lab"), ("10_a-b", "no name for a lab"),
    ("10_class", "a word of Python's"), ("10_list", "a word of Python's"),
    ("01_mixture", "number 01 is taken by 01_tokenization: [0-9]{2} is free"),
    ("96_tokenization", "called 'tokenization' already"),
])  # fmt: skip
def test_names_and_numbers_that_cannot_be_are_refused(name, words, capsys):
    before = sorted(ROOT.glob("solutions/*"))
    with pytest.raises(UsageError, match=words):
        new_lab.main(name)
    assert sorted(ROOT.glob("solutions/*")) == before and not capsys.readouterr().out


def test_what_is_there_is_not_written_over(tmp_path):
    (tmp_path / "solutions").mkdir()
    (tmp_path / "effnlp_lab" / "attention").mkdir(parents=True)
    with pytest.raises(UsageError, match="effnlp_lab/attention/ already"):
        new_lab.main("96_attention", room=True, root=tmp_path)
    (tmp_path / "tests" / "answers").mkdir(parents=True)
    (tmp_path / "tests" / "answers" / "96_other.py").write_text("")
    with pytest.raises(UsageError, match="tests/answers/96_other.py is there already"):
        new_lab.main("96_other", root=tmp_path)
    with pytest.raises(UsageError, match="cannot be used"):
        new_lab.main("95_other", 'A "title"', root=tmp_path)
    with pytest.raises(UsageError, match="no solutions/ folder"):
        new_lab.main("95_other", root=tmp_path / "tests")
