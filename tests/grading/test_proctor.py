"""The proctor on one submission: plain results, verdicts that can be replayed, mutants, and refusals in a sentence."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import nbformat
import pytest
from classes import LAB, ROOT, master_of
from effnlp_grading import grade, mutants, replay, sample_class
from effnlp_grading.cli import main
from effnlp_grading.connection import Connection
from effnlp_grading.course import environment_with_kit
from effnlp_grading.limits import Limits
from effnlp_grading.masks import masked_modules
from effnlp_grading.plan import steps_of
from effnlp_grading.proctor import Proctor
from effnlp_grading.records import Record, Seeds, read_record
from effnlp_grading.sandbox import Sandbox, SandboxError, Unconfined, sandbox_error
from effnlp_grading.scan import forbidden_in, signs_in

from effnlp_lab import audit, exercises

MASTER = master_of()
needs_sandbox = pytest.mark.skipif(sandbox_error() is not None, reason=f"NO SANDBOX HERE: {sandbox_error()}")


def notebook(student: str = "perfect") -> nbformat.NotebookNode:
    release = nbformat.read(ROOT / "labs" / LAB / "tokenization.ipynb", as_version=4)
    return sample_class.submission(release, sample_class.answers(student, MASTER))


@pytest.fixture(scope="module")
def submitted(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("one") / "tokenization.ipynb"
    nbformat.write(notebook("student_1"), path)
    return path


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(LAB) as made:
        yield made


@needs_sandbox
def test_grade_returns_a_plain_result(submitted, monkeypatch):
    monkeypatch.setenv("EFFNLP_SEED", "3")
    graded = grade(submitted, device="cpu")
    expected = sample_class.judged_points(MASTER, sample_class.answers("student_1", MASTER), 3)
    assert {name: v["score"] for name, v in graded.verdicts.items()} == expected
    assert graded.score == sum(expected.values()) and json.dumps(graded.verdicts)


@needs_sandbox
def test_verdicts_keep_what_makes_them_again_and_replay(submitted, sandbox, tmp_path, capsys):
    record = Record(tmp_path / LAB / "ada.jsonl", "digest")
    graded = Proctor(sandbox, Seeds(b"key")).grade(notebook("student_1"), "ada", record)
    kept = read_record(record.path)
    assert [v["exercise"] for v in kept] == list(graded.verdicts)
    for verdict in kept:
        assert {"seed", "variant", "device", "limits", "versions", "cases", "sandbox", "student"} <= set(verdict)
        assert verdict["versions"]["torch"] and all(case["name"] for case in verdict["cases"])
    assert len({v["seed"] for v in kept}) == len(kept)
    assert all(one.same for one in replay.replay(submitted, kept))
    forged = [{**kept[0], "score": 0.25}]
    assert not replay.replay(submitted, forged)[0].same
    assert main(["replay", str(submitted), str(record.path), "--exercise", "count_pairs"]) == 0
    assert "count_pairs: " in capsys.readouterr().out


@needs_sandbox
def test_what_is_judged_is_not_judged_again(sandbox):
    proctor = Proctor(sandbox, Seeds(b"key"))
    steps = steps_of(notebook(), exercises.lab(LAB))
    record = Record(None, "digest")
    record.keep({"exercise": "count_pairs", "score": 0.125, "state": "incorrect", "look": []})
    graded = proctor.grade(notebook(), "ada", record)
    assert graded.verdicts["count_pairs"]["score"] == 0.125
    assert len(graded.verdicts) == sum(step.kind == "check" for step in steps)


@needs_sandbox
def test_right_answers_pass_and_mutants_do_not(sandbox):
    """A sample: `effnlp mutate LAB --sandbox` tries them all."""
    with mutants.open_bench(LAB, sandbox=sandbox) as bench:
        lab = exercises.lab(LAB)
        for name in ("count_pairs", "train_bpe"):
            spec = lab.exercise(name)
            assert mutants.refused_answers(bench, spec) == []
            bench.hold_to_solution(spec)
            made = mutants.mutants_of(bench.master.exercise_cell(name))
            listed = mutants.read_listing(ROOT / "tests" / "mutants" / f"{LAB}.toml")
            tried = [m for m in mutants.sampled(made, 4, name) if m.id not in listed]
            assert [m.id for m in tried if not bench.rejects(spec, m)] == []


@needs_sandbox
def test_exercises_are_tried_side_by_side():
    names = ["count_pairs", "merge_pair"]
    with audit.mapping(2) as run:
        tried = list(run(partial(mutants._try, LAB, "cpu", ROOT, 1), names))
    assert [(count.exercise, count.tried, count.rejected, refused) for count, refused in tried] == [
        (name, 1, 1, []) for name in names
    ]


def test_what_is_refused_among_neighbours_is_tried_again_alone(monkeypatch, capsys):
    """Three exercises: one is fine, one in the way of another once, one wrong."""
    times = dict.fromkeys(("count_pairs", "merge_pair", "train_bpe"), 0)

    def trying(lab, device, root, sample, name):
        times[name] = times.get(name, 0) + 1
        wrong = name == "train_bpe" or name == "merge_pair" and times[name] == 1
        return mutants.Count(name, 1, 0, 1, 1), [f"{name} is refused"] if wrong else []

    monkeypatch.setattr(mutants, "_try", trying)
    monkeypatch.setattr(mutants.audit, "mapping", lambda jobs: contextlib.nullcontext(map))
    assert mutants.main(LAB, jobs=2) == 1
    assert (times["count_pairs"], times["merge_pair"], times["train_bpe"]) == (1, 2, 2)
    told = capsys.readouterr().out
    assert "train_bpe is refused" in told and "merge_pair is refused" not in told


def test_grading_without_a_sandbox_has_to_be_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("EFFNLP_BWRAP", raising=False)
    with pytest.raises(SandboxError, match="bubblewrap .* is not on PATH: `apt-get install bubblewrap`"):
        Sandbox(LAB).start()
    refusing = tmp_path / "bwrap"
    refusing.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    refusing.chmod(0o755)
    with pytest.raises(SandboxError, match="No permissions to create new namespace.*max_user_namespaces"):
        Sandbox(LAB).start()


def test_without_a_sandbox_points_are_the_same():
    os.environ["EFFNLP_SEED"] = "3"
    try:
        with Unconfined(LAB) as room:
            graded = Proctor(room, Seeds(b"key")).grade(notebook("student_2"), "ada")
    finally:
        del os.environ["EFFNLP_SEED"]
    expected = sample_class.judged_points(MASTER, sample_class.answers("student_2", MASTER), 3)
    assert {name: v["score"] for name, v in graded.verdicts.items()} == expected
    assert {v["sandbox"] for v in graded.verdicts.values()} == {"none"}


@needs_sandbox
@pytest.mark.parametrize("lab", [name for name in exercises.lab_names() if (ROOT / "labs" / name).is_dir()])
def test_a_blank_notebook_of_every_lab_runs_in_its_sandbox(lab):
    """The masks take nothing that given cells need."""
    release = nbformat.read(ROOT / "labs" / lab / f"{exercises.lab(lab).notebook}.ipynb", as_version=4)
    with Sandbox(lab) as room:
        graded = Proctor(room, Seeds(b"key")).grade(release, "ada")
    given = {step.index for step in steps_of(release, exercises.lab(lab)) if step.given}
    broken = {index: said for index, said in graded.cells.items() if index in given and said.get("error")}
    assert broken == {} and graded.look == []
    assert {v["state"] for v in graded.verdicts.values()} <= {"not attempted", "not run here"}


@needs_sandbox
def test_the_first_checkpoint_of_a_submission_imports_nothing():
    """torch.utils.checkpoint imports torch._dynamo when it is first called: seconds, and of the answer's own time."""
    first = """
import sys, torch
from torch.utils.checkpoint import checkpoint
before = set(sys.modules)
checkpoint(torch.sin, torch.ones(1, requires_grad=True), use_reentrant=False)
print(len(set(sys.modules) - before))
"""
    with Sandbox("06_flash_attention") as room:
        session = Connection(room, Limits())
        said = session.run(first)
        session.end()
    assert said == {"error": None, "printed": "0\n"}


def test_masks_cover_what_answers():
    assert {"effnlp_lab.tokenization", "tokenizers", "tiktoken", "flash_attn", "peft"} <= set(masked_modules(LAB))
    assert all("torch" not in masked_modules(name) for name in exercises.lab_names())


def test_the_text_is_read_outside():
    lab = exercises.lab("06_flash_attention")
    spec = lab.exercise("merge_partials")
    cells = [("", "import torch.nn.functional as F\nimport torch as t"),
             ("merge_partials", "def merge_partials(a, b, c, d):\n    return helper(b, d)"),
             ("", "def helper(b, d):\n    return t.logsumexp(b, 0)")]
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s, metadata={"nbgrader": {
        "solution": True, "grade_id": n}} if n else {}) for n, s in cells])
    steps = steps_of(made, lab)
    assert forbidden_in(spec, steps) == ["torch.logsumexp"] and signs_in(steps) == []
    assert forbidden_in(spec, [s for s in steps if "helper(b, d):" not in s.source]) == []
    made.cells.append(nbformat.v4.new_code_cell("import effnlp_lab.notebook.meter as m, ctypes"))
    assert [s.split(" (")[0] for s in signs_in(steps_of(made, lab))] == [
        "a cell calls native code", "a cell reaches into the kit"]


@needs_sandbox
def test_packages_on_pythonpath_are_there_in_the_sandbox(tmp_path, monkeypatch):
    packages = tmp_path / "packages"
    (packages / "elsewhere-1.0.dist-info").mkdir(parents=True)
    (packages / "elsewhere.py").write_text("VALUE = 41\n")
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    packages.chmod(0o755)
    monkeypatch.syspath_prepend(str(packages))
    with Sandbox(LAB) as made:
        session = Connection(made, Limits())
        said = session.run("import elsewhere; print(elsewhere.VALUE + 1)")
        session.end()
    assert said == {"error": None, "printed": "42\n"}
    if os.getuid() == 0:
        packages.chmod(0o700)
        with pytest.raises(SandboxError, match="packages is closed to other users"):
            Sandbox(LAB).start()


def test_repair_from_the_command_line(tmp_path):
    made = notebook()
    for cell in made.cells:
        cell.metadata = {}
    path = tmp_path / "tokenization.ipynb"
    nbformat.write(made, path)

    def repair(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "effnlp_lab", "repair", str(path), *arguments]
        return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False,
                              env=environment_with_kit())

    before = path.read_bytes()
    assert repair("--check").returncode == 0 and path.read_bytes() == before
    done = repair()
    assert done.returncode == 0 and "had lost its metadata" in done.stdout and "is whole" in done.stdout
    assert "needs no repair" in repair().stdout
    path.write_text("no notebook")
    done = repair()
    assert done.returncode == 2 and "tokenization.ipynb is not a notebook" in done.stderr
