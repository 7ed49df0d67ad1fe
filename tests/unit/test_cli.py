"""The command line: help, exit codes, one sentence for an error, and verbs that load what they need when called."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from effnlp_lab import cli
from effnlp_lab.errors import EffnlpError, UsageError

ROOT = Path(__file__).resolve().parents[2]
LABS = ["00_start_here", "01_tokenization", "06_flash_attention", "08_paged_attention"]
VERBS = ["doctor", "build", "run", "test", "mutate", "bench", "grade", "demo"]


@pytest.fixture
def verbs(monkeypatch):
    """Replace what `_load` returns by a recorder: calls as (module, function, arguments). Labs are the list above."""
    calls = []

    def load(module):
        def entry(name):
            return lambda *arguments: calls.append((module, name, arguments)) or codes.get(name, 0)

        return types.SimpleNamespace(**{name: entry(name) for name in ("main", "run_cli", "run_tests")})

    codes = {}
    monkeypatch.setattr(cli, "_load", load)
    monkeypatch.setattr(cli, "known_labs", lambda: LABS)
    return types.SimpleNamespace(calls=calls, codes=codes)


@pytest.mark.parametrize("verb", [[], *[[verb] for verb in VERBS if verb not in ("grade", "demo")]])
def test_help(verb, capsys):
    assert cli.main([*verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Usage: effnlp" in shown
    if not verb:
        assert all(name in shown for name in VERBS)


def test_help_is_quick_and_works_from_the_source_tree():
    """Uninstalled, from another folder, with nothing heavy imported."""
    code = (
        "import sys, runpy; sys.argv = ['effnlp', '--help']\ntry: runpy.run_module('effnlp_lab', run_name='__main__')\n"
    )
    code += "finally: print('torch' in sys.modules, 'nbformat' in sys.modules, file=sys.stderr)"
    environment = dict(os.environ, PYTHONPATH=str(ROOT), EFFNLP_DEVICE="cpu")
    begin = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/", env=environment, timeout=60
    )
    assert result.stdout and result.stderr == "False False\n"
    assert time.monotonic() - begin < 20  # about half a second on an idle machine


@pytest.mark.parametrize(
    "arguments, call",
    [
        (["build", "1", "--check"], ("effnlp_lab.build", "main", (["01_tokenization"], True, False, "auto", None))),
        (["build", "--execute", "--device", "cpu"], ("effnlp_lab.build", "main", ([], False, True, "cpu", None))),
        (["build", "--execute", "--jobs", "3"], ("effnlp_lab.build", "main", ([], False, True, "auto", 3))),
        (["mutate", "06", "--sample", "9"], ("effnlp_lab.mutate", "main", ("06_flash_attention", None, 9, None))),
        (["mutate", "06", "--sandbox", "--device", "cuda"],
         ("effnlp_grading.cli", "main", (["mutate", "06", "--device", "cuda"],))),
        (["mutate", "06", "--sandbox", "--sample", "0"],
         ("effnlp_grading.cli", "main", (["mutate", "06", "--sample", "0", "--device", "cpu"],))),
        (["mutate", "06", "--sandbox", "--jobs", "5"],
         ("effnlp_grading.cli", "main", (["mutate", "06", "--device", "cpu", "--jobs", "5"],))),
        (["bench", "attention"], ("effnlp_lab.notebook.bench", "main", (["attention"], "auto", None, None, False))),
        (["gpu", "--only", "tests", "--only", "bench"],
         ("effnlp_lab.gpurun.main", "main", (["tests", "bench"], False, None, False, False, False))),
        (["test", "--device", "cpu", "-k", "x", "-x"], ("effnlp_lab.runner", "run_tests", ("cpu", ["-k", "x", "-x"]))),
        (["grade", "01", "--jobs", "2"], ("effnlp_grading.cli", "main", (["grade", "01", "--jobs", "2"],))),
        (["grade", "--help"], ("effnlp_grading.cli", "main", (["grade", "--help"],))),
        (["demo"], ("effnlp_grading.cli", "main", (["demo"],))),
        (
            ["run", "tokenization", "06", "--full", "--student", "--jobs", "3"],
            (
                "effnlp_lab.runner",
                "run_cli",
                (["01_tokenization", "06_flash_attention"], "auto", "0", 3, True, None, None),
            ),
        ),
        (["run"], ("effnlp_lab.runner", "run_cli", ([], "auto", "auto", None, False, None, None))),
    ],
)
def test_verbs_pass_their_arguments_on(verbs, arguments, call):
    assert cli.main(arguments) == 0
    assert verbs.calls == [call]


def test_exit_code_is_the_verb_s(verbs):
    verbs.codes["run_cli"] = 1
    assert cli.main(["run"]) == 1


@pytest.mark.parametrize("arguments", [["nonsense"], ["run", "--jobs", "many"], ["mutate"], ["run", "--nonsense"]])
def test_wrong_usage(verbs, arguments, capsys):
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err and not verbs.calls


def test_our_errors_are_one_sentence(monkeypatch, capsys):
    def fail(*_):
        raise EffnlpError("The sentence.")

    monkeypatch.setattr(cli, "_load", lambda module: types.SimpleNamespace(main=fail))
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "The sentence.\n"


def test_cuda_where_there_is_none():
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="", EFFNLP_DEVICE="")
    command = [sys.executable, "-m", "effnlp_lab", "test", "--device", "cuda"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "CUDA" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "word, lab",
    [
        ("01_tokenization", "01_tokenization"),
        ("1", "01_tokenization"),
        ("06", "06_flash_attention"),
        ("Flash_Attention", "06_flash_attention"),
        ("labs/00_start_here/", "00_start_here"),
    ],
)
def test_names_of_labs(word, lab):
    assert cli.match_lab(word, LABS) == lab


def test_wrong_lab_names_the_nearest(verbs, capsys):
    assert cli.main(["run", "01_tokenisation"]) == 2
    error = capsys.readouterr().err
    assert error == "There is no lab '01_tokenisation': did you mean 01_tokenization?\n"
    with pytest.raises(UsageError, match="expected one of 00_start_here"):
        cli.match_lab("zzz", LABS)
    assert not verbs.calls


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "effnlp_lab.doctor", None)  # import raises ModuleNotFoundError
    with pytest.raises(UsageError, match="effnlp_lab.doctor"):
        cli._load("effnlp_lab.doctor")


def test_a_python_without_typer():
    code = "import sys, runpy; sys.modules['typer'] = None; sys.argv = ['effnlp']; runpy.run_module('effnlp_lab')"
    code = code.replace("run_module('effnlp_lab')", "run_module('effnlp_lab', run_name='__main__')")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.returncode == 2
    assert "needs the package typer" in result.stderr and "Traceback" not in result.stderr
