"""The GPU run, with small commands in place of its steps: what it keeps, what it calls a failure, what it reports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
import types
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import psutil
import pytest
import torch

from effnlp_lab import cli, runner
from effnlp_lab.device import Device
from effnlp_lab.errors import DeviceError, UsageError
from effnlp_lab.gpurun import expected, findings, main, recorded, steps
from effnlp_lab.gpurun.execute import tree_keys
from effnlp_lab.gpurun.imports import imported
from effnlp_lab.gpurun.steps import Step, choose
from effnlp_lab.notebook.bench import Comparison, suites

ROOT = Path(__file__).resolve().parents[2]
CARD = "Card of the test"
MACHINE = {"device": CARD, "kind": "cuda", "driver": "1", "cpu": "a processor", "cores": 4, "load_average": 0.1,
           "python": "3.11", "versions": {"torch": "2"}}  # fmt: skip
GPU = Device("cuda", False, CARD, torch.bfloat16, "compiled", (9, 0), 80 << 30)


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", code)


def suite(ratio: float | None = 2.0, device: str = CARD, missing: dict | None = None, kind: str = "cuda") -> dict:
    """The JSON of a benchmark of one comparison."""
    seconds = {"ours": [1.0]} | ({} if ratio is None else {"theirs": [ratio]})
    one = Comparison("Copy", seconds, "ours", "theirs", missing=missing or {})
    return {"suite": "copy", "command": "effnlp bench copy", "machine": MACHINE | {"device": device, "kind": kind},
            "comparisons": [one.to_json()]}  # fmt: skip


@pytest.fixture
def tree(tmp_path) -> Path:
    root = tmp_path / "tree"
    for folder in ("effnlp_lab", "benchmarks"):
        (root / folder).mkdir(parents=True)
    (root / "effnlp_lab" / "room.py").write_text("answer = 42\n")
    return root


def go(tree: Path, all_steps: list[Step], only=(), force: bool = False) -> tuple[int, dict]:
    out = tree.parent / "out"
    code = main.run(all_steps, choose(all_steps, only), out, tree, MACHINE, force)
    return code, json.loads((out / "report.json").read_text())


def key_of(tree: Path, card: str = CARD, **more) -> str:
    return tree_keys(tree, card, [Step("step", "tests", (), **more)])["step"]


def counting(tree: Path, name: str, part: str = "tests", code: int = 0) -> Step:
    return Step(name, part, python(f"open({str(tree.parent / name)!r}, 'a').write('x'); raise SystemExit({code})"))


def times(tree: Path, name: str) -> int:
    path = tree.parent / name
    return len(path.read_text()) if path.is_file() else 0


def test_what_is_done_is_not_repeated_and_what_failed_is(tree, capsys):
    planned = [counting(tree, "good"), counting(tree, "bad", "grading", 3)]
    for _ in range(2):
        code, report = go(tree, planned)
    assert code == 1 and not report["ok"] and report["whole"]
    assert (times(tree, "good"), times(tree, "bad")) == (1, 2)
    assert report["problems"] == ["bad: exit code 3; its log ends: (empty)"]
    assert {part: told["state"] for part, told in report["parts"].items()} == {"tests": "ok", "grading": "failed"}
    assert "good: ok, ran earlier" in capsys.readouterr().out
    go(tree, planned, force=True)
    assert times(tree, "good") == 2


def test_another_tree_or_card_is_done_again_and_prose_and_figures_are_not(tree):
    key, of_a_lab = key_of(tree), key_of(tree, reads=("solutions/00", "benchmarks/copy.py"))
    (tree / "README.md").write_text("words")
    (tree / "benchmarks" / "copy.json").write_text("{}")
    assert key_of(tree) == key != key_of(tree, "another card")
    (tree / "effnlp_lab" / "room.py").write_text("answer = 43\n")
    assert key_of(tree) != key and key_of(tree, reads=("solutions/00", "benchmarks/copy.py")) == of_a_lab
    (tree / "benchmarks" / "copy.py").write_text("")
    assert key_of(tree, reads=("solutions/00", "benchmarks/copy.py")) != of_a_lab


def test_a_benchmark_stands_while_what_it_imports_does(tree):
    for name, text in {
        "__init__.py": "", "near.py": "from effnlp_lab import deep", "deep.py": "", "far.py": "",
        "room/__init__.py": "HOMES = {'Name': 'one'}", "room/one.py": "from .two import more", "room/two.py": "",
        "hall/__init__.py": "", "hall/used.py": "def late():\n    import effnlp_lab.near\n", "hall/other.py": "",
        "course/__init__.py": "", "course/models.py": "", "course/weights/w.safetensors": "", "course/text.py": "",
    }.items():  # fmt: skip
        (tree / "effnlp_lab" / name).parent.mkdir(exist_ok=True, parents=True)
        (tree / "effnlp_lab" / name).write_text(text)
    script = tree / "benchmarks" / "copy.py"
    script.write_text("import torch\nfrom effnlp_lab.room import Name\nfrom effnlp_lab.hall.used import late\n"
                      "from effnlp_lab.course.models import load_model\n")
    read = imported(tree, script)
    assert read == tuple(f"effnlp_lab/{name}" for name in (
        "__init__.py", "course/models.py", "course/weights", "deep.py", "hall/used.py", "near.py", "room"))

    def changed(name: str) -> bool:
        before = key_of(tree, reads=read)
        (tree / "effnlp_lab" / name).write_text("more = 1\n")
        return key_of(tree, reads=read) != before

    assert not any(map(changed, ("far.py", "hall/other.py", "course/text.py")))
    assert all(map(changed, ("deep.py", "room/two.py", "course/weights/w.safetensors")))


def test_benchmarks_depend_on_their_rooms():
    reads = {step.name: step.reads for step in steps.all_steps(ROOT, GPU)}
    wanted = {"effnlp_lab/attention", "effnlp_lab/notebook/bench.py", "effnlp_lab/device.py"}
    assert wanted < {*reads["bench-attention"]}
    assert "effnlp_lab/paged/model.py" in reads["bench-speculative"]
    assert "effnlp_lab/course/weights" in reads["bench-distillation"]
    assert not any(path.startswith(("effnlp_lab/paged", "effnlp_lab/exercises")) for path in reads["bench-attention"])
    for name, paths in reads.items():
        assert paths and all((ROOT / path).exists() for path in paths), name


def test_steps_depend_on_all_that_they_import_and_not_on_what_they_never_do():
    reads = {step.name: step.reads for step in steps.all_steps(ROOT, GPU)}
    kit = "effnlp_lab/exercises/**/*.py effnlp_lab/notebook/*.py effnlp_lab/runner.py"
    graded = "grading/effnlp_grading/**/*.py effnlp_lab/build.py effnlp_lab/mutate.py"
    for names, what in {
        "solutions-full labs-full labs-fast": kit,
        "solutions-fast": f"{kit} tests/notebooks/*.py tests/conftest.py",
        "tests-together tests-alone": f"{graded} tests/gpu/*.py tests/conftest.py benchmarks/training.py",
        "mutants-00 mutants-06 sample-class": graded,
        "bench-grading": f"{graded} benchmarks/grading.py",
    }.items():
        run = [path for pattern in what.split() for path in ROOT.glob(pattern)]
        masters = [*ROOT.glob("solutions/*/*.py")]  # whose notebooks are counted
        used = {*imported(ROOT, *run, *masters), *(path.relative_to(ROOT).as_posix() for path in run)}
        for name in names.split():
            counted = tuple(f"{path}/" for path in reads[name])
            assert [place for place in sorted(used) if not f"{place}/".startswith(counted)] == [], name
            assert not any("effnlp_lab/new_lab.py/".startswith(one) for one in counted)


def test_a_notebooks_prose_and_unchecked_outputs_make_no_other_tree(tree):
    def key(source="1 + 1", output="2", tags=(), prose="words"):
        cell = nbformat.v4.new_code_cell(source, id="sum", metadata={"tags": list(tags)})
        cell.outputs = [nbformat.v4.new_output("stream", text=output)]
        path = tree / "solutions" / "00_lab" / "lab.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(prose, id="prose"), cell]), path)
        return key_of(tree)

    first = key()
    assert key(prose="other words") == key(output="3") == first != key(source="1 + 2")
    checked = key(tags=["nbval-check-output"])
    assert checked != first and key(tags=["nbval-check-output"], output="3") != checked


def test_what_is_recorded_counts_in_another_checkout_of_the_same_tree(tree, capsys):
    """A step for its key, a benchmark only beside the figures that it measured; what failed is not recorded."""
    out = tree.parent / "out"
    measured = tree / "benchmarks" / "copy.json"
    all_steps = [counting(tree, "a"), counting(tree, "b", code=1), bench_step(tree, suite(2.0))]
    go(tree, all_steps)
    measured.write_text((out / "bench-copy" / "copy.json").read_text())
    assert recorded.keep(out, tree / "benchmarks") == tree / "benchmarks" / "gpu_run" / "steps.json"
    assert (tree / "benchmarks" / "gpu_run" / "report.html").is_file()  # the run was whole, though it failed
    shutil.rmtree(out)
    assert main.run(all_steps, all_steps, out, tree, MACHINE, go_on=True) == 1
    assert "recorded for this tree and card: a, bench-copy" in capsys.readouterr().out
    assert (times(tree, "a"), times(tree, "b"), times(tree, "bench-copy")) == (1, 2, 1)
    told = json.loads((out / "report.json").read_text())
    assert told["figures"][0]["ratio"] == 2.0 and told["parts"]["bench"]["state"] == "ok"

    shutil.rmtree(out)
    measured.write_text(json.dumps(suite(3.0)))
    main.run(all_steps, all_steps, out, tree, MACHINE, go_on=True)
    assert (times(tree, "a"), times(tree, "bench-copy")) == (1, 2)
    shutil.rmtree(out)
    (tree / "effnlp_lab" / "room.py").write_text("answer = 43\n")
    main.run(all_steps, all_steps, out, tree, MACHINE, go_on=True)
    assert times(tree, "a") == 2
    main.run([counting(tree, "a", code=1)], [counting(tree, "a", code=1)], out, tree, MACHINE, force=True)
    assert "a" not in recorded.load(recorded.keep(out, tree / "benchmarks"))  # it passed before, and fails now
    (tree / "benchmarks" / "gpu_run" / "steps.json").write_text("{")
    with pytest.raises(UsageError, match="steps.json cannot be used"):
        main.run(all_steps, all_steps, out, tree, MACHINE, go_on=True)


def test_one_part_alone_is_not_the_whole(tree, capsys):
    planned = [counting(tree, "first"), counting(tree, "second", "notebooks")]
    code, report = go(tree, planned, only=["notebooks"])
    assert code == 0 and report["ok"] and not report["whole"] and report["not_run"] == ["first"]
    assert "GPU run ok so far" in capsys.readouterr().out and times(tree, "first") == 0
    code, report = go(tree, planned)
    assert code == 0 and report["whole"] and "GPU run passed" in capsys.readouterr().out
    with pytest.raises(UsageError, match="no part 'everything': expected one of tests, notebooks, grading, bench"):
        choose(planned, ["everything"])


def test_a_step_at_its_limit_is_ended_with_all_that_it_started(tree):
    code = ("import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-S', '-c', 'import time; "
            "time.sleep(60)'], start_new_session=True); print(p.pid, flush=True); time.sleep(60)")  # fmt: skip
    begin = time.monotonic()
    result, report = go(tree, [Step("hangs", "tests", python(code), limit=1.0)])
    assert time.monotonic() - begin < 20 and result == 1
    assert report["parts"]["tests"]["steps"]["hangs"]["state"] == "timed out"
    assert "limit of 1 s" in report["problems"][0]
    grandchild = int((tree.parent / "out" / "hangs" / "log.txt").read_text())
    assert not psutil.pid_exists(grandchild) or psutil.Process(grandchild).status() == psutil.STATUS_ZOMBIE


def test_a_run_that_is_stopped_leaves_a_report_on_what_it_did(tree):
    def stop(folder, code, log):
        raise KeyboardInterrupt

    planned = [counting(tree, "first"), Step("second", "notebooks", python("pass"), stop)]
    with pytest.raises(KeyboardInterrupt):
        go(tree, planned)
    report = json.loads((tree.parent / "out" / "report.json").read_text())
    assert report["not_run"] == ["second"] and report["problems"] == ["second: not run yet."] and not report["ok"]


PYTEST_FILE = """
import pytest
def test_right(): pass
def test_wrong(): assert 1 == 2
def test_refused(): pytest.skip("no flash_attn")
@pytest.mark.xfail
def test_known(): assert False
@pytest.fixture
def broken(): raise OSError("no such card")
def test_error(broken): pass
"""
REFUSING = """
import importlib.util, pytest
spec = importlib.util.spec_from_file_location("kit_conftest", {conftest!r})
kit = importlib.util.module_from_spec(spec); spec.loader.exec_module(kit)
class Cuda:
    def getoption(self, name): return "cuda"
@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    return kit._refuse_skip(report, Cuda())
"""


@pytest.mark.parametrize("refusing", [False, True])
def test_what_pytest_says_is_read(tmp_path, refusing):
    """With and without the suite's own rule that a skip on --device cuda is a failure."""
    (tmp_path / "test_it.py").write_text(PYTEST_FILE)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    if refusing:
        (tmp_path / "conftest.py").write_text(REFUSING.format(conftest=str(ROOT / "tests" / "conftest.py")))
    command = [sys.executable, "-m", "pytest", "-q", "--junitxml=junit.xml", "-p", "no:cacheprovider"]
    quick = dict(os.environ, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=quick)
    found = findings.pytest(tmp_path, done.returncode, done.stdout)
    assert {name.rpartition("::")[2]: state for name, state, _ in found.ran} == {
        "test_right": "ok", "test_wrong": "failed", "test_refused": "skipped", "test_known": "ok",
        "test_error": "failed"}  # fmt: skip
    assert len(found.problems) == 2 and "assert 1 == 2" in found.problems[0] and "no such card" in found.problems[1]
    assert len(found.skipped) == 1 and "no flash_attn" in found.skipped[0]


def test_a_run_of_pytest_without_tests_is_a_failure(tmp_path):
    assert findings.pytest(tmp_path, 4, "usage: ...").problems
    (tmp_path / "junit.xml").write_text('<testsuites><testsuite name="pytest"/></testsuites>')
    assert findings.pytest(tmp_path, 5, "no tests ran").problems


def test_dead_kernels_and_failed_notebooks_are_told_apart(tree):
    cell = {"index": 7, "first_line": "train(model)", "tags": []}
    outcomes = [
        {"notebook": "01_a", "state": "ok", "seconds": 3.0, "message": "", "cell": None, "folder": ""},
        {"notebook": "02_b", "state": "died", "seconds": 4.0, "message": "out of memory", "cell": cell, "folder": ""},
        {"notebook": "03_c", "state": "failed", "seconds": 5.0, "message": "ValueError", "cell": cell, "folder": ""},
    ]
    code = f"import json; open(r'{{folder}}/results.json', 'w').write({json.dumps(outcomes)!r}); raise SystemExit(1)"
    _, report = go(tree, [Step("solutions", "notebooks", python(code), findings.notebooks)])
    step = report["parts"]["notebooks"]["steps"]["solutions"]
    assert step["died"] == ["02_b: died, cell 7: train(model): out of memory"]
    assert step["problems"] == ["03_c: failed, cell 7: train(model): ValueError"]
    assert [seconds for _, _, seconds in step["ran"]] == [3.0, 4.0, 5.0]
    assert any(problem.startswith("solutions: a kernel died: 02_b") for problem in report["problems"])


@pytest.mark.parametrize("tag, printed, problems", [
    ("nbval-check-output", "2\n", []),
    ("nbval-check-output", "3\n", ["01_a: a cell gives '3\\n', and '2\\n' is stored."]),
    ("demo", "3\n", []),
])  # fmt: skip
def test_solutions_give_what_is_stored_where_nbval_compares(tree, tmp_path, tag, printed, problems):
    def notebook(path: Path, text: str, *first) -> None:
        cell = nbformat.v4.new_code_cell("print(1 + 1)", id="sum", metadata={"tags": [tag]})
        cell.outputs = [nbformat.v4.new_output("stream", name="stderr", text=f"{path}: a warning"),
                        nbformat.v4.new_output("stream", name="stdout", text=text)]  # fmt: skip
        path.parent.mkdir(parents=True)
        nbformat.write(nbformat.v4.new_notebook(cells=[*first, cell]), path)

    notebook(tree / "solutions" / "01_a" / "a.ipynb", "2\n")
    notebook(tmp_path / "01_a" / "a.ipynb", printed, nbformat.v4.new_code_cell("DEVICE = 'cuda'", id="injected"))
    outcome = {"notebook": "01_a", "state": "ok", "seconds": 3.0, "message": "", "cell": None, "folder": ""}
    (tmp_path / "results.json").write_text(json.dumps([outcome]))
    assert findings.solutions(tree)(tmp_path, 0, "").problems == problems
    (tmp_path / "results.json").write_text(json.dumps([outcome | {"state": "failed"}]))
    assert len(findings.solutions(tree)(tmp_path, 1, "").problems) == 1


def bench_step(tree: Path, content: dict | None) -> Step:
    wrote = f"open(r'{{folder}}/copy.json', 'w').write({json.dumps(content)!r})" if content else "print('needs cuda')"
    counted = f"open({str(tree.parent / 'bench-copy')!r}, 'a').write('x')"
    return Step("bench-copy", "bench", python(f"{counted}; {wrote}"), findings.bench)


def record(tree: Path, content: dict) -> None:
    (tree / "benchmarks" / "copy.json").write_text(json.dumps(content))
    expected.record(tree / "benchmarks")


@pytest.mark.parametrize(("content", "state", "told"), [
    (suite(1.71), "ok", ""),
    (suite(1.69), "below", "is 1.69 times theirs, at least 1.70 is expected"),
    (suite(None, missing={"theirs": "no flash_attn here"}), "peer missing", "theirs: no flash_attn here"),
    (suite(0.1, device="another card"), "on another device", ""),
    (suite() | {"comparisons": []}, "not measured", "was not measured"),
])  # fmt: skip
def test_figures_are_held_against_their_records(tree, content, state, told):
    record(tree, suite(2.0))
    code, report = go(tree, [bench_step(tree, content)])
    assert [figure["state"] for figure in report["figures"]] == [state]
    assert code == (0 if state in ("ok", "on another device") else 1)
    assert not told or any(told in problem for problem in report["problems"])


def test_a_benchmark_that_did_not_run_fails_and_its_figures_are_listed(tree):
    record(tree, suite(2.0))
    code, report = go(tree, [bench_step(tree, None)])
    assert code == 1 and [figure["state"] for figure in report["figures"]] == ["not measured"]
    assert any("skipped: it wrote no figures; its log ends: needs cuda" in problem for problem in report["problems"])
    page = (tree.parent / "out" / "report.html").read_text()
    assert "not measured" in page and "failed" in page.partition("</title>")[0]


def test_margins_and_floors_written_by_hand_are_kept_and_hold(tree):
    record(tree, suite(2.0))
    path = tree / "benchmarks" / "expected.toml"
    path.write_text(path.read_text().replace("0.15", "0.5") + '\n[suites.copy.floors]\n"Copy" = 1.9\n')
    record(tree, suite(2.5))
    told = expected.load(path)["copy"]
    assert told["margin"] == 0.5 and told["floors"] == {"Copy": 1.9} and told["ratios"] == {"Copy": 2.5}
    assert [expected.hold({"copy": told}, {"copy": suite(ratio)})[0].state for ratio in (1.91, 1.89)] == ["ok", "below"]
    record(tree, suite(2.5, device="another card"))  # what holds for one card says nothing on another
    assert expected.load(path)["copy"] == {"device": "another card", "margin": 0.15, "ratios": {"Copy": 2.5}}


def test_another_contestant_that_did_not_run_is_named_beside_the_figure():
    (figure,) = expected.hold({}, {"copy": suite(2.0, missing={"third": "out of memory"})})
    assert figure.state == "new" and figure.note == "third did not run: out of memory"


def test_a_cpu_s_records_hold_for_as_many_cores():
    content = suite(3.0, kind="cpu")
    told = {"device": CARD, "cores": 4, "margin": 0.35, "ratios": {"Copy": 9.0}}
    assert expected.hold({"copy": told}, {"copy": content})[0].state == "below"
    assert expected.hold({"copy": told | {"cores": 2}}, {"copy": content})[0].state == "on another device"


def test_a_peer_that_published_no_figure_is_named_by_a_person(tmp_path):
    content = suite(None, missing={"theirs": "not in its table"})
    (tmp_path / "copy.json").write_text(json.dumps(content))
    told = {"device": CARD, "margin": 0.15, "ratios": {}}
    assert expected.hold({"copy": told}, {"copy": content})[0].state in expected.FAILURES
    (tmp_path / "expected.toml").write_text(
        f"[suites.copy]\ndevice = '{CARD}'\nmargin = 0.15\nwithout_peer = ['Copy']\n")
    records = expected.load(expected.record(tmp_path))  # written anew, it is kept
    (figure,) = expected.hold(records, {"copy": content})
    assert figure.state == "no peer" and figure.state not in expected.FAILURES


@pytest.mark.parametrize("text", ["[suites", "[suites.copy]\ndevice = 'x'", "[suites.copy]\ndevice='x'\nmargin=1.5"])
def test_a_file_of_records_that_cannot_be_read_is_one_sentence(tmp_path, text):
    (tmp_path / "expected.toml").write_text(text)
    with pytest.raises(UsageError, match="expected.toml cannot be used .*effnlp gpu --record"):
        expected.load(tmp_path / "expected.toml")


def test_the_committed_records_are_those_of_the_committed_figures():
    records = expected.load(ROOT / "benchmarks" / "expected.toml")
    files = {path.stem: json.loads(path.read_text()) for path in (ROOT / "benchmarks").glob("*.json")}
    figures = expected.hold(records, files)
    wrong = [figure.sentence() for figure in figures if figure.state in (*expected.FAILURES, "on another device")]
    assert not wrong, "write them anew: python3 -m effnlp_lab gpu --record"
    assert records.keys() <= files.keys() and sum(figure.state == "ok" for figure in figures) > 40


def test_the_steps_name_every_lab_every_benchmark_and_files_that_exist():
    planned = steps.all_steps(ROOT, GPU)
    assert {step.part for step in planned} == set(steps.PARTS) and len({s.name for s in planned}) == len(planned)
    words = " ".join(word for step in planned for word in step.command)
    labs = [path.name for path in (ROOT / "solutions").glob("[0-9]*")]
    assert labs and all(f" {lab} " in words for lab in labs)
    command = {step.name: step.command for step in planned if step.part == "notebooks"}
    full = command["solutions-full"]
    assert sorted(word for word in full if word in labs) == sorted(labs) and full[4].startswith("04_")
    jobs = {name: words[words.index("--jobs") + 1] for name, words in command.items() if "--jobs" in words}
    assert jobs == {"solutions-full": "4", "labs-full": "4", "labs-fast": "13"}
    assert next(step for step in planned if step.name == "solutions-fast").environment["EFFNLP_FAST"] == "1"
    benches = {step.name.removeprefix("bench-"): step.command for step in planned if step.part == "bench"}
    assert benches.keys() == suites(ROOT / "benchmarks").keys()
    assert "cpu" in benches["grading"] and "cuda" in benches["attention"] and "cpu" in benches["streaming"]
    for step in planned:
        assert all((ROOT / word).exists() for word in (*step.reads, *step.command) if word.startswith("tests/"))
        if "effnlp_lab" in step.command:
            assert step.read is not findings.pytest
    assert (ROOT / "Makefile").read_text().count("-m effnlp_lab gpu ") == 1


def test_tests_that_run_side_by_side_share_the_cores(monkeypatch):
    """Ten notebooks with a thread for each of 16 cores would wait for one another."""
    monkeypatch.setattr(runner, "usable_cores", lambda: 32)
    spread = [step for step in steps.all_steps(ROOT, GPU) if "-n" in step.command]
    assert {step.name for step in spread} == {"tests-together", "solutions-fast"}
    for step in spread:
        workers = int(step.command[step.command.index("-n") + 1])
        assert int(step.environment["OMP_NUM_THREADS"]) == 32 // workers > 1


def test_the_steps_are_commands_that_the_command_line_knows(monkeypatch):
    """With what the verbs do taken out: names of options, of labs and of benchmarks are right."""
    def verb(*arguments):
        return 0

    monkeypatch.setattr(cli, "_load", lambda module: types.SimpleNamespace(main=verb, run_cli=verb, run_tests=verb))
    ours = [step.command[3:] for step in steps.all_steps(ROOT, GPU) if step.command[2] == "effnlp_lab"]
    assert len(ours) > 15 and all(cli.main(list(command)) == 0 for command in ours)


def test_solutions_at_full_size_have_ten_minutes_together(tree, monkeypatch):
    planned = [counting(tree, f"solutions-full-{n}", "notebooks") for n in range(2)]
    assert go(tree, planned)[0] == 0
    for step in planned:
        path = tree.parent / "out" / step.name / "step.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 301.0}))
    code, report = go(tree, planned)
    assert code == 1 and report["problems"] == ["solutions-full: 602 s in all, and at most 600 s are allowed."]


def test_the_steps_are_named_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setenv("EFFNLP_DEVICE", "cpu")
    assert main.main(listed=True) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()][:2] == ["tests-together", "tests-alone"]


def test_without_a_gpu_it_refuses(monkeypatch):
    monkeypatch.setattr("effnlp_lab.device.cuda_available", lambda: False)
    monkeypatch.delenv("EFFNLP_DEVICE", raising=False)
    with pytest.raises(DeviceError, match="CUDA"):
        main.main()
    monkeypatch.setenv("EFFNLP_DEVICE", "cpu")
    with pytest.raises(DeviceError, match="EFFNLP_DEVICE asks for the CPU"):
        main.main()


def test_the_page_is_whole_and_says_states_in_words(tree):
    planned = [counting(tree, "first"), counting(tree, "<odd> & name", "grading", 1)]
    go(tree, planned)
    page = (tree.parent / "out" / "report.html").read_text()
    opened: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag not in ("meta",):
                opened.append(tag)

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    Parser().feed(page)
    assert not opened and 'lang="en"' in page and textwrap.dedent("&lt;odd&gt; &amp; name") in page
    assert "<caption>" in page and 'scope="row"' in page and CARD in page
