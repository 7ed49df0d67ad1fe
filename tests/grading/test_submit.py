"""`effnlp submit`: what a student is told before a submission is handed in is what the grader will say of it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys

import nbformat
import pytest
from classes import LAB, ROOT, master_of
from effnlp_grading import sample_class, submit
from effnlp_grading.sandbox import Unconfined

from effnlp_lab import cli, exercises
from effnlp_lab.errors import UsageError

RELEASE = nbformat.read(ROOT / "labs" / LAB / "tokenization.ipynb", as_version=4)
ANSWERS = sample_class.answers("perfect", master_of())
PREDICTED = {"unknown_words": "my_unknown_words_of_100 = 12", "training_speedup": "my_speedup_of_tokenizers = 2"}


@pytest.fixture(scope="module")
def room():
    with Unconfined(LAB) as made:
        yield made


@pytest.fixture(autouse=True)
def warm(room, monkeypatch):
    """All tests share one parent process, in which torch is imported."""
    monkeypatch.setattr("effnlp_grading.sandbox.open_sandbox", lambda *_, **__: contextlib.nullcontext(room))


def written(answers, told: bool = False) -> nbformat.NotebookNode:
    """The release with these answers; with `told`, predictions and the written answer too."""
    notebook = sample_class.submission(RELEASE, answers)
    for cell in notebook.cells if told else ():
        name = (cell.metadata.get("effnlp") or {}).get("predict")
        if name:
            cell.source = PREDICTED[name]
        if cell.metadata.get("nbgrader", {}).get("grade_id") == "written_vocabulary_size":
            cell.source = "Because shorter sequences cost less."
    return notebook


def save(notebook, folder, name="tokenization.ipynb"):
    nbformat.write(notebook, folder / name)
    return folder / name


def answer_cell(notebook, name):
    return next(c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("grade_id") == name)


def test_a_damaged_perfect_submission_is_repaired_and_can_be_handed_in(tmp_path, capsys):
    notebook = written(ANSWERS, told=True)
    for number, cell in enumerate(notebook.cells):
        cell.metadata, cell["id"] = {}, f"colab{number}"
    path = save(notebook, tmp_path, "my copy (2).ipynb")
    before = path.read_bytes()
    assert submit.main(path, out=tmp_path / "out", device="cpu") == 0
    shown = capsys.readouterr().out
    assert "In all 10 of 10 points" in shown and "lost its metadata: it is given back" in shown
    assert "Missing" not in shown and "It can be handed in." in shown and "other random cases" in shown
    assert path.read_bytes() == before
    copied = nbformat.read(tmp_path / "out" / "tokenization.ipynb", as_version=4)
    assert [c.metadata.get("nbgrader") for c in copied.cells] == [c.metadata.get("nbgrader") for c in RELEASE.cells]
    assert answer_cell(copied, "train_bpe").source == ANSWERS["train_bpe"]


def test_a_blank_submission_cannot_be_handed_in(tmp_path, capsys):
    assert submit.main(save(RELEASE, tmp_path), device="cpu") == 1
    shown = capsys.readouterr().out
    assert "In all 0 of 10" in shown and "Nothing is attempted yet." in shown and "cannot be handed in yet" in shown
    assert "fertility is not attempted (a badge, no points)." in shown
    assert "my_speedup_of_tokenizers" in shown and "The written answer vocabulary_size is empty." in shown


def test_a_half_solved_submission_gets_the_points_that_the_judge_gives(tmp_path, capsys):
    wrong = sample_class.answers("student_1", master_of())
    half = {name: ANSWERS[name] for name in ("measure_tokens", "merge_pair")} | {"count_pairs": wrong["count_pairs"]}
    assert submit.main(save(written(half), tmp_path), device="cpu") == 0
    shown = capsys.readouterr().out
    judged = sample_class.judged_points(master_of(), half, seed=5)
    assert f"In all {sum(judged.values()):g} of 10" in shown and 2.5 < sum(judged.values()) < 3.5
    assert "Likely: Occurrences overlap in counting, not in merging." in shown
    assert "train_bpe is not attempted." in shown


def test_what_keeps_a_submission_back_is_named(tmp_path, capsys):
    notebook = written(ANSWERS)
    answer_cell(notebook, "encode_bpe").source = "import tokenizers\n" + ANSWERS["encode_bpe"].replace(
        '"""', '"""', 1) + "\n    tokenizers.Tokenizer(None)\n"
    answer_cell(notebook, "decode_bpe").source = "def decode_bpe(:\n"
    answer_cell(notebook, "count_pairs").source += "\nimport os\nos._exit(3)\n"
    notebook.cells.remove(answer_cell(notebook, "merge_pair"))
    assert submit.main(save(notebook, tmp_path), device="cpu") == 1
    shown = capsys.readouterr().out
    assert "encode_bpe uses tokenizers" in shown and "The answer cell of merge_pair is gone" in shown
    assert "This cell stops with SyntaxError" in shown and "It begins: def decode_bpe(:" in shown
    assert "ended the process that ran it" in shown and "count_pairs ends its process (os._exit)" in shown


def test_without_the_proctor_s_processes_one_process_judges(tmp_path, monkeypatch):
    """As on macOS and Windows: the same points, and an end of the process is told with what it left unjudged."""
    notebook = written(ANSWERS | {"train_bpe": ANSWERS["train_bpe"].replace("def train_bpe", "def other", 1)})
    answer_cell(notebook, "decode_bpe").source += "\nimport os\nos._exit(3)\n"
    monkeypatch.delattr("os.pidfd_open")
    verdicts, stopped = submit.judge(notebook, exercises.lab(LAB), "cpu")
    assert verdicts["merge_pair"]["score"] == 1.5 and verdicts["encode_bpe"]["score"] == 2.0
    assert verdicts["train_bpe"]["state"] == "crashed"
    assert verdicts["train_bpe"]["sentence"].startswith("No train_bpe is defined")
    assert verdicts["decode_bpe"]["sentence"] == "Not judged: the notebook stopped."
    assert stopped == ["The notebook ended its process before decode_bpe was judged: run it from the start."]


@pytest.mark.parametrize("content", [b"no notebook", json.dumps({"cells": []}).encode()])
def test_a_file_that_is_no_notebook_of_the_lab_is_refused(tmp_path, content, capsys):
    path = tmp_path / "tokenization.ipynb"
    path.write_bytes(content)
    assert submit.main(path, device="cpu") == 1
    assert "It cannot be handed in." in capsys.readouterr().out
    with pytest.raises(UsageError, match="no file"):
        submit.main(tmp_path / "absent.ipynb")


def test_the_lab_is_what_the_notebook_starts_or_its_name_says(tmp_path):
    assert submit.lab_of(RELEASE, tmp_path / "whatever.ipynb").name == LAB
    empty = nbformat.v4.new_notebook()
    assert submit.lab_of(empty, tmp_path / "flash_attention.ipynb").name == "06_flash_attention"
    with pytest.raises(UsageError, match="name it with --lab"):
        submit.lab_of(empty, tmp_path / "homework.ipynb")


def test_the_untouched_lab_is_found_beside_git_and_masters(tmp_path, monkeypatch):
    """Where a course hands out labs/ alone: another file with every blank, or what git keeps; never a solved one."""
    lab = exercises.lab(LAB)
    (tmp_path / "labs" / LAB).mkdir(parents=True)
    mine = save(RELEASE, tmp_path / "labs" / LAB)
    elsewhere = save(written(ANSWERS), tmp_path)
    monkeypatch.chdir(tmp_path)
    assert submit.untouched_release(lab, elsewhere) == RELEASE
    assert submit.untouched_release(lab, mine) is None
    commit = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"]
    for command in (["init", "-q"], ["add", "labs"], commit):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    save(written(ANSWERS), tmp_path / "labs" / LAB)
    assert submit.untouched_release(lab, mine) == RELEASE
    monkeypatch.chdir(ROOT)
    assert submit.untouched_release(lab, elsewhere) == RELEASE
    built = submit._blanked(ROOT / "solutions" / LAB / "tokenization.py")  # without nbgrader
    assert [(c.id, c.source) for c in built.cells] == [(c.id, c.source) for c in RELEASE.cells]


def test_the_original_is_never_replaced(tmp_path):
    path = save(RELEASE, tmp_path)
    checked = submit.Checked(exercises.lab(LAB), RELEASE, {})
    with pytest.raises(UsageError, match="the notebook itself"):
        submit.write(checked, path, tmp_path)


def test_it_needs_no_nbgrader_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nbgrader", None)
    monkeypatch.setattr(submit, "judge", lambda *_: ({}, []))
    assert submit.main(save(RELEASE, tmp_path), device="cpu") == 1
    assert "nbgrader is not installed here" in capsys.readouterr().out
    assert cli.main(["submit", str(tmp_path / "absent.ipynb")]) == 2
    assert "There is no file" in capsys.readouterr().err
