"""runner.py: how notebooks end, and which cell is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from effnlp_lab import runner
from effnlp_lab.device import GIB, Device, resolve
from effnlp_lab.errors import UsageError

pytestmark = pytest.mark.xdist_group("runner")  # one run of its notebooks for all

PARAMETERS = new_code_cell('DEVICE = "auto"\nFAST = "auto"', metadata={"tags": ["parameters"]})
RAISING = "def {0}(x):\n    raise NotImplementedError('{0}')"
BLANK = new_code_cell(RAISING.format("double"), metadata={"nbgrader": {"solution": True}})
GIVEN = new_code_cell(RAISING.format("triple"))
LEAVE = new_code_cell("\n# leave\nimport os\nos._exit(3)")
FAIL = new_code_cell("# divide\n1 / 0", metadata={"tags": ["demo"]})
HANG = (
    "# wait for ever\nimport ctypes, os, pathlib, subprocess\n"
    "sleeper = subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
    "pathlib.Path('pids').write_text(f'{os.getpid()} {sleeper.pid}')\n"
    "ctypes.PyDLL(None).sleep(1000)"  # holds the interpreter's lock: nothing in this process can end it
)

NOTEBOOKS = {
    "fine": [PARAMETERS, new_markdown_cell("# Title"), new_code_cell("print(DEVICE, FAST)")],
    "fails": [PARAMETERS, new_code_cell("x = 1"), FAIL, new_code_cell("print('never')")],
    "dies": [PARAMETERS, new_code_cell("x = 1"), LEAVE, new_code_cell("x")],
    "unknown": [new_code_cell("missing_name")],
    "blank": [PARAMETERS, BLANK, GIVEN, new_code_cell("double(2)"), new_code_cell("print('went on')")],
    "not_a_blank": [BLANK, GIVEN, new_code_cell("triple(2)"), new_code_cell("print('went on')")],
}


def write(folder: Path, name: str, cells: list) -> Path:
    """`folder/name/name.ipynb`, as labs are laid out."""
    path = folder / name / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=[nbformat.from_dict(dict(cell)) for cell in cells]), path)
    return path


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """All notebooks above, run as a student's in one go: (outcomes by name, folder)."""
    folder = tmp_path_factory.mktemp("runs")
    paths = [write(folder / "source", name, cells) for name, cells in NOTEBOOKS.items()]
    outcomes = runner.run(paths, "cpu", "1", jobs=2, out=folder / "out", timeout=500, student=True)
    return {outcome.notebook: outcome for outcome in outcomes}, folder / "out"


def stdout(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "".join(o.text for c in cells if c.cell_type == "code" for o in c.outputs if o.output_type == "stream")


def test_fine(ended):
    outcomes, out = ended
    assert outcomes["fine"].state == "ok" and outcomes["fine"].cell is None
    assert stdout(out / "fine" / "fine.ipynb") == "cpu 1\n"
    assert "<html" in (out / "fine" / "fine.html").read_text()


def test_a_failure_names_its_cell(ended):
    outcome = ended[0]["fails"]
    assert outcome.state == "failed" and outcome.message.startswith("ZeroDivisionError")
    assert (outcome.cell.index, outcome.cell.first_line, outcome.cell.tags) == (2, "# divide", ("demo",))
    assert "cell 2 [demo]: # divide" in outcome.sentence()


def test_a_failure_without_parameters_names_its_cell(ended):
    outcome = ended[0]["unknown"]
    assert outcome.cell.index == 0 and outcome.message.startswith("NameError")


def test_a_dead_kernel_is_an_error_that_names_its_cell(ended):
    outcomes, out = ended
    outcome = outcomes["dies"]
    assert outcome.state == "died" and (outcome.cell.index, outcome.cell.first_line) == (2, "# leave")
    cells = nbformat.read(out / "dies" / "dies.ipynb", as_version=4).cells
    errors = [[output for output in cell.outputs if output.output_type == "error"] for cell in cells]
    assert [len(found) for found in errors] == [0, 0, 0, 1, 0]  # papermill put a cell of parameters in
    assert [cell.metadata.papermill.status for cell in cells[-2:]] == ["failed", "pending"]
    assert "died" in (out / "dies" / "dies.html").read_text()


def test_a_blank_is_no_failure(ended):
    outcomes, out = ended
    assert outcomes["blank"].state == "ok"
    assert stdout(out / "blank" / "blank.ipynb") == "not attempted yet: double\nwent on\n"


def test_a_solution_that_its_check_refuses_is_a_failure(tmp_path):
    start = "import effnlp_lab\nfrom effnlp_lab import check\neffnlp_lab.start('01_tokenization', DEVICE, FAST)"
    cells = [PARAMETERS, new_code_cell(start), new_code_cell("def count_pairs(words, counts):\n    return {}"),
             new_code_cell('check("count_pairs", count_pairs)')]  # fmt: skip
    path = write(tmp_path / "source", "refused", cells)
    (outcome,) = runner.run([path], "cpu", "1", out=tmp_path / "out")
    assert outcome.state == "failed" and "CheckFailed: count_pairs: incorrect" in outcome.message
    assert outcome.cell.index == 3


def test_not_implemented_elsewhere_is_a_failure(ended):
    outcome = ended[0]["not_a_blank"]
    assert outcome.state == "failed" and outcome.cell.index == 2 and "NotImplementedError: triple" in outcome.message


def test_results_are_saved(ended):
    saved = json.loads((ended[1] / "results.json").read_text())
    assert [entry["notebook"] for entry in saved] == list(NOTEBOOKS)
    assert {entry["state"] for entry in saved} == {"ok", "failed", "died"}


class Clock:
    """A clock for the runner that leaps past every limit once the hanging cell has written its file."""

    sleep = staticmethod(time.sleep)

    def __init__(self, pids: Path) -> None:
        self.pids = pids

    def monotonic(self) -> float:
        hangs = self.pids.is_file() and len(self.pids.read_text().split()) == 2
        return time.monotonic() + (10_000 if hangs else 0)


def test_the_limit_ends_everything(tmp_path, monkeypatch):
    path = write(tmp_path, "hangs", [PARAMETERS, new_code_cell(HANG)])
    monkeypatch.setattr(runner, "time", Clock(tmp_path / "out" / "hangs" / "pids"))
    (outcome,) = runner.run([path], "cpu", "1", out=tmp_path / "out", timeout=500)
    assert outcome.state == "timed out" and outcome.cell.first_line == "# wait for ever"
    kernel, sleeper = (int(pid) for pid in (tmp_path / "out" / "hangs" / "pids").read_text().split())
    assert not _alive(kernel) and not _alive(sleeper)


def test_a_blank_is_a_failure_outside_labs(tmp_path):
    path = write(tmp_path, "solution", [BLANK, new_code_cell("double(2)")])
    (outcome,) = runner.run([path], "cpu", "1", out=tmp_path / "out", timeout=500)
    assert outcome.state == "failed" and outcome.cell.index == 1


def test_missing_notebook(tmp_path):
    with pytest.raises(UsageError, match="There is no notebook"):
        runner.run([tmp_path / "none.ipynb"], "cpu")


def checked(source: str, text: str) -> nbformat.NotebookNode:
    cell = new_code_cell(source, metadata={"tags": ["nbval-check-output"]})
    cell.outputs = [new_output("stream", name="stdout", text=text)]
    cell.execution_count = 1
    return cell


def test_nbval_accepts_equal_outputs_and_leaves_the_folder_alone(tmp_path):
    save = new_code_cell("open('receipt.json', 'w').write('{}')")
    path = write(tmp_path, "equal", [new_markdown_cell("x"), checked("print(2)", "2\n"), save])
    outcome = runner.validate(path, "cpu", "1", tmp_path / "out")
    assert outcome.state == "ok", outcome.message
    assert [file.name for file in path.parent.iterdir()] == ["equal.ipynb"]


def test_nbval_refuses_a_changed_output(tmp_path):
    path = write(tmp_path, "changed", [new_markdown_cell("x"), new_code_cell("x = 1"), checked("print(2)", "3\n")])
    outcome = runner.validate(path, "cpu", "1", tmp_path / "out")
    assert outcome.state == "failed" and outcome.cell.index == 2


def test_nbval_notices_a_dead_kernel_at_once(tmp_path):
    cells = [new_markdown_cell("x"), new_code_cell("x = 1"), LEAVE]
    outcome = runner.validate(write(tmp_path, "dead", cells), "cpu", "1", tmp_path / "out", timeout=500)
    assert outcome.state == "died" and (outcome.cell.index, outcome.cell.first_line) == (2, "# leave")
    assert outcome.seconds < 400


def test_nbval_is_ended_at_the_limit(tmp_path, monkeypatch):
    path = write(tmp_path, "hangs", [new_code_cell(HANG)])
    monkeypatch.setattr(runner, "time", Clock(tmp_path / "out" / "hangs" / "pids"))
    outcome = runner.validate(path, "cpu", "1", tmp_path / "out", timeout=500)
    assert outcome.state == "timed out" and outcome.cell.first_line == "# wait for ever"
    kernel, sleeper = (int(pid) for pid in (tmp_path / "out" / "hangs" / "pids").read_text().split())
    assert not _alive(kernel) and not _alive(sleeper)


def test_jobs_on_a_cpu(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(runner, "usable_cores", lambda: 8)
    monkeypatch.setattr(runner, "free_memory_bytes", lambda: 13 * GIB)
    assert runner.plan_jobs(resolve("cpu"), 10) == runner.Plan(3, 2, (None,) * 3)
    assert runner.plan_jobs(resolve("cpu"), 1) == runner.Plan(1, 8, (None,))
    assert runner.plan_jobs(resolve("cpu"), 10, jobs=4).jobs == 4
    with pytest.raises(UsageError, match="--jobs is 0"):
        runner.plan_jobs(resolve("cpu"), 1, jobs=0)


@pytest.mark.parametrize(("said", "threads"), [("1", 1), ("4,2", 4), ("64", 8), ("0", 8), ("many", 8)])
def test_no_more_threads_than_the_environment_says(monkeypatch, said, threads):
    monkeypatch.setattr(runner, "usable_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert runner.plan_jobs(resolve("cpu"), 1).threads == threads


def test_jobs_on_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(runner, "usable_cores", lambda: 16)
    card = Device("cuda", False, "Card", resolve("cpu").dtype, "compiled", (9, 0), 48 * GIB)
    assert runner.plan_jobs(card, 10) == runner.Plan(2, 8, ("2", "5"))
    assert runner.plan_jobs(card, 10, jobs=3).gpus == ("2", "5", "2")
    assert runner.plan_jobs(card, 10, jobs=9).jobs == 4  # two notebooks of 20 GiB fit a card
    assert runner.plan_jobs(replace(card, fast=True), 10, jobs=99).jobs == 10  # eight of 6 GiB


def test_the_tree_is_killed_only_while_the_process_runs(tmp_path):
    with (tmp_path / "log").open("w") as log:
        process = runner._spawn(["sleep", "1000"], log, tmp_path, dict(os.environ))
    runner.kill_tree(process)
    assert process.returncode is not None
    runner.kill_tree(process)


SUITE = {
    "tests/unit/test_any.py": """
import pytest

@pytest.fixture(scope="module")
def shared(): pass

def test_runs(shared): pass

def test_skips(): pytest.skip('no such library')
""",
    "tests/gpu/test_card.py": "def test_one(): pass\ndef test_two(): pass",
    "with_gpu.py": "import effnlp_lab.device\neffnlp_lab.device.cuda_available = lambda: True",
    "without_gpu.py": "import effnlp_lab.device\neffnlp_lab.device.cuda_available = lambda: False",
}


def run_suite(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run a small suite under this suite's conftest.py, pretending that there is or is no GPU."""
    for name, text in SUITE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n")
    root = Path(__file__).resolve().parents[2]
    shutil.copy(root / "tests" / "conftest.py", folder / "tests")
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu\ntestpaths = tests\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "EFFNLP_"))}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(folder)])
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_gpu_tests_that_do_not_run_are_said_loudly(tmp_path, workers):
    result = run_suite(tmp_path, "-v", "-p", "without_gpu", "-n", workers, "--dist", "loadgroup")
    assert result.returncode == 0, result.stdout
    assert "= GPU TESTS NOT RUN =" in result.stdout
    assert "2 GPU tests were NOT RUN (no CUDA device here)" in result.stdout
    assert "1 passed, 1 skipped" in result.stdout
    if workers == "2":  # what shares a module's fixture stays on one of them
        assert "test_any.py::test_runs@test_any" in result.stdout and "test_skips@" not in result.stdout


def test_a_skip_on_a_gpu_run_is_a_failure(tmp_path):
    result = run_suite(tmp_path, "-p", "with_gpu", "--device", "cuda")
    assert result.returncode == 1
    assert "1 failed, 3 passed" in result.stdout and "no such library" in result.stdout
    assert "NOT RUN" not in result.stdout


def test_a_gpu_run_without_a_gpu_is_refused(tmp_path):
    result = run_suite(tmp_path, "-p", "without_gpu", "--device", "cuda")
    assert result.returncode == 4 and "torch finds no CUDA device" in result.stderr


def _alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
