"""What nbgrader releases: the same bytes as `effnlp build`, and no answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from effnlp_grading.opening import OpenAnywhere
from nbgrader.converters import GenerateAssignment
from traitlets.config.loader import PyFileConfigLoader

from effnlp_lab.blanks import STUB, TEXT_STUB
from effnlp_lab.master import BEGIN, END, read_master, regions

ROOT = Path(__file__).resolve().parents[2]
MASTERS = sorted(ROOT.glob("solutions/[0-9][0-9]_*/*.py"))


def test_release_is_what_the_build_writes_and_nothing_else(graded_class):
    made = graded_class.course.root / "labs" / graded_class.lab
    built = ROOT / "labs" / graded_class.lab / f"{graded_class.master.lab.notebook}.ipynb"
    assert [path.name for path in made.iterdir()] == [built.name]
    assert (made / built.name).read_bytes() == built.read_bytes()
    assert (made / built.name).stat().st_mode & 0o777 == 0o644  # as git has it


@pytest.mark.parametrize("folder", [".", "grading"])
def test_nbgrader_finds_its_configuration_where_it_is_typed(folder, master, tmp_path):
    """From the root and from grading/, with an environment that names neither the package nor its programs."""
    bare = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [sys.executable, "-m", "nbgrader", "generate_assignment", master.lab.name,
               f"--db=sqlite:///{tmp_path / 'gradebook.db'}", f"--CourseDirectory.release_directory={tmp_path}"]
    subprocess.run(command, cwd=ROOT / folder, env={**bare, "PATH": os.defpath}, check=True, capture_output=True)
    name = f"{master.lab.name}/{master.lab.notebook}.ipynb"
    assert (tmp_path / name).read_bytes() == (ROOT / "labs" / name).read_bytes()


def test_nbgraders_release_has_the_badge_of_the_courses_own_setting(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[tool.effnlp]\nrepository = "https://github.com/a/course"\n')
    resources = {"nbgrader": {"assignment": "01_tokenization", "notebook": "tokenization"}}
    for metadata, expected in (({"effnlp": {"lab": "01_tokenization"}}, ["open-in-colab", "the-kit"]), ({}, [])):
        notebook = nbformat.v4.new_notebook(metadata=metadata)
        OpenAnywhere(course=str(tmp_path)).preprocess(notebook, resources)
        assert [cell.id for cell in notebook.cells] == expected
    config = PyFileConfigLoader("nbgrader_config.py", path=str(ROOT)).load_config()
    assert config.OpenAnywhere.course == str(ROOT)
    stock = [f"{step.__module__.rpartition('.')[0]}.{step.__name__}" for step in GenerateAssignment().preprocessors]
    assert config.GenerateAssignment.preprocessors == [*stock, "effnlp_grading.opening.OpenAnywhere"]


@pytest.mark.parametrize("path", MASTERS, ids=lambda path: path.parent.name)
def test_no_line_of_a_solution_is_released(path):
    master = read_master(path)
    notebooks = sorted((ROOT / "labs").rglob("*.ipynb"))
    released = "\n".join(cell.source for each in notebooks for cell in nbformat.read(each, as_version=4).cells)
    assert BEGIN not in released and END not in released
    given = "\n".join(_outside_regions(cell.source) for each in MASTERS for cell in read_master(each).cells)
    for exercise in master.lab.exercises:
        lines = _solution_lines(master.exercise_cell(exercise.name).source)
        secret = [line for line in lines if len(line) >= 12 and line not in given]
        assert secret, f"{exercise.name}: no line of its solution is of substance: this test would see nothing"
        assert [line for line in secret if line in released] == []


def test_only_notebooks_are_released():
    strays = [path for path in (ROOT / "labs").rglob("*") if path.is_file() and path.suffix != ".ipynb"]
    assert [path for path in strays if ".ipynb_checkpoints" not in path.parts] == []


def test_stub_and_folders_are_the_kits():
    config = PyFileConfigLoader("nbgrader_config.py", path=str(ROOT)).load_config()
    assert config.ClearSolutions.code_stub == {"python": STUB} and config.ClearSolutions.text_stub == TEXT_STUB
    assert config.CourseDirectory.root == str(ROOT)
    assert (config.CourseDirectory.source_directory, config.CourseDirectory.release_directory) == ("solutions", "labs")
    assert config.ExecutePreprocessor.skip_cells_with_tag == "demo"


def _solution_lines(source: str) -> list[str]:
    lines = source.splitlines()
    return [lines[number].strip() for first, last in regions(source) for number in range(first, last - 1)]


def _outside_regions(source: str) -> str:
    hidden = {number for first, last in regions(source) for number in range(first, last + 1)}
    return "\n".join(line for number, line in enumerate(source.splitlines(), 1) if number not in hidden)
