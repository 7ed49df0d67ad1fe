"""How a released lab begins: the badge, and the cell that installs the kit on Colab and touches nothing elsewhere."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import pytest
import torch
import toy
from test_master import GOOD

from effnlp_lab import build
from effnlp_lab.device import Device
from effnlp_lab.errors import UsageError
from effnlp_lab.master import read_master
from effnlp_lab.opening import BADGE, FIRST, Repository, first_source, open_anywhere, repository_of

GITHUB = Repository("https://github.com/a/course")
RELEASE = "labs/99_toy/toy.ipynb"


def course(folder: Path, setting: str) -> Path:
    (folder / "pyproject.toml").write_text(f"[tool.effnlp]\n{setting}\n")
    return folder


@pytest.mark.parametrize(("setting", "badge"), [
    ("", ""), ('repository = ""', ""), ('repository = "https://example.org/a/course"', ""),
    ('repository = "https://github.com/a/course"', "/github/a/course/blob/main/labs/99_toy/toy.ipynb"),
    ('repository = "https://github.com/a/course.git"\nbranch = "autumn/26"', "/github/a/course/blob/autumn/26/labs"),
    ('repository = "https://github.com/a/course/"', "/github/a/course/blob/main/labs/99_toy/toy.ipynb"),
    ('repository = "https://github.com/a"', ""),
])
def test_one_setting_makes_the_badge(setting, badge, tmp_path):
    made = repository_of(course(tmp_path, setting)).badge(RELEASE)
    assert badge in made and bool(made) == bool(badge)
    assert made.startswith("[![Open in Colab](") or not made  # the picture has its words


@pytest.mark.parametrize(("setting", "words"), [
    ("repository = 3", "is no address"), ('repository = "git@github.com:a/course"', "is no address"),
    ('repository = "https://github.com/a/b\\"; x"', "is no address"), ('branch = ""', "is no branch"),
    ("repository = ", "is not TOML")])
def test_a_setting_that_is_none_is_one_sentence(setting, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        repository_of(course(tmp_path, setting))


def test_releases_begin_with_it_and_solutions_keep_their_outputs(tmp_path, monkeypatch):
    toy.install(monkeypatch)
    monkeypatch.setattr(toy.Softmax, "mistakes", ())
    path = tmp_path / "solutions" / "99_toy" / "toy.py"
    path.parent.mkdir(parents=True)
    path.write_text(GOOD)
    build.write(read_master(path), tmp_path)
    before = nbformat.read(tmp_path / RELEASE, 4)
    solved = nbformat.read(path.with_suffix(".ipynb"), 4)
    for cell in (cell for cell in solved.cells if cell.cell_type == "code"):
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="from a card\n")]
    nbformat.write(solved, path.with_suffix(".ipynb"))
    kept = nbformat.read(path.with_suffix(".ipynb"), 4).cells
    course(tmp_path, f'repository = "{GITHUB.address}"')
    build.write(read_master(path), tmp_path)
    release = nbformat.read(tmp_path / RELEASE, 4)
    nbformat.validate(release)
    assert [cell.id for cell in before.cells if cell.id in (BADGE, FIRST)] == [FIRST]
    assert release.cells[0].id == BADGE and next(c for c in release.cells if c.cell_type == "code").id == FIRST
    assert [c for c in release.cells if c.id not in (BADGE, FIRST)] == [c for c in before.cells if c.id != FIRST]
    assert [(c.id, c.get("outputs")) for c in nbformat.read(path.with_suffix(".ipynb"), 4).cells] == [
        (c.id, c.get("outputs")) for c in kept]
    assert "from a card" in str(kept) and not {BADGE, FIRST} & {c.id for c in kept}
    assert list(build._stale_files(read_master(path), tmp_path)) == []


def test_the_first_cell_comes_before_all_code():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A lab")])
    open_anywhere(notebook, Path("nowhere"), RELEASE)
    assert [cell.id for cell in notebook.cells][1:] == [FIRST] and notebook.cells[1].metadata == {"tags": ["demo"]}


@pytest.fixture
def elsewhere(monkeypatch):
    """A machine without the kit, for the cell; what it would have pip do is in the list, with its constraints."""
    found, ran = importlib.util.find_spec, []

    def run(command, **named):
        ran.append((command, Path(command[command.index("--constraint") + 1]).read_text()))
        return subprocess.CompletedProcess(command, run.code, "", "ERROR: no such commit")

    run.code = 0
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "effnlp_lab" else
                        found(name, *more))  # fmt: skip
    monkeypatch.setattr(subprocess, "run", run)
    return types.SimpleNamespace(ran=ran, run=run)


def on_colab(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))


@pytest.mark.parametrize("repository", [GITHUB, Repository()])
def test_where_the_kit_is_the_cell_installs_nothing(repository, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", None)
    on_colab(monkeypatch)
    space: dict = {}
    exec(first_source(repository), space)
    assert "The kit is here, version" in capsys.readouterr().out
    assert set(space) - {"__builtins__"} == {"find_the_kit", "effnlp_lab"}


def test_on_colab_pip_keeps_what_colab_has(elsewhere, monkeypatch, capsys):
    on_colab(monkeypatch)
    exec(first_source(GITHUB), {})
    ((command, constraints),) = elsewhere.ran
    assert command[0] == sys.executable and command[-1] == "git+https://github.com/a/course@main"
    assert f"torch=={torch.__version__.partition('+')[0]}" in constraints and "numpy==" in constraints
    assert "a minute or two" in capsys.readouterr().out


def test_what_pip_says_is_shown(elsewhere, monkeypatch, capsys):
    on_colab(monkeypatch)
    elsewhere.run.code = 1
    with pytest.raises(ImportError, match="its words stand above. It has to keep torch=="):
        exec(first_source(GITHUB), {})
    assert "no such commit" in capsys.readouterr().out


@pytest.mark.parametrize(("repository", "colab", "words"), [
    (GITHUB, False, "git clone https://github.com/a/course, then in its folder run pip install"),
    (Repository(), False, "in the course's folder run pip install"),
    (Repository(), True, "names no repository")])
def test_without_the_kit_the_cell_says_how_to_get_it(repository, colab, words, elsewhere, monkeypatch):
    if colab:
        on_colab(monkeypatch)
    with pytest.raises(ImportError, match=words):
        exec(first_source(repository), {})
    assert elsewhere.ran == []


@pytest.mark.parametrize(("device", "words"), [
    (Device("cuda", False, "T4", torch.float16, "compiled", (7, 5), 1), "compiled for this card. This card computes in "
     "float16, not in bfloat16; flash-attn"),
    (Device("cuda", False, "A100", torch.bfloat16, "compiled", (8, 0), 1), "Triton kernels are compiled for this"),
    (Device("cpu", True, "a laptop", torch.float32, "interpreted", None, 1), "small sizes. Triton kernels run in"),
    (Device("cpu", True, "a Mac", torch.float32, "absent", None, 1), "PyTorch twins for the same points")])
def test_what_a_machine_can_do_in_words(device, words):
    assert words in device.can() and "Colab" not in device.can()


def test_on_colab_without_a_gpu_its_place_is_named(monkeypatch):
    on_colab(monkeypatch)
    assert "Runtime, Change runtime type" in Device("cpu", True, "", torch.float32, "interpreted", None, 1).can()
