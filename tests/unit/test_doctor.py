"""doctor.py: states in words, remedies, and the exit code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata

import pytest

from effnlp_lab import doctor

NAMES = """Python torch GPU Triton transformers tokenizers bitsandbytes flash-attn jupyterlab papermill nbval jupytext
nbgrader bubblewrap Chromium disk memory""".split()


def test_everything_is_looked_at(capsys):
    assert doctor.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == NAMES
    assert all(any(f"{state} " in line for state in ("ok", "missing", "not needed here")) for line in lines[:-1])
    assert lines[-1] == "Ready: everything essential is here."


def test_json(capsys):
    assert doctor.main(as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and [finding["name"] for finding in report["findings"]] == NAMES
    torch = report["findings"][1]
    assert torch["state"] == "ok" and metadata.version("torch").split("+")[0] in torch["detail"]


def without(monkeypatch, *distributions: str) -> None:
    real = metadata.version

    def version(name):
        if name in distributions:
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)


def test_something_essential_is_missing(monkeypatch, capsys):
    without(monkeypatch, "transformers")
    assert doctor.main() == 2
    out = capsys.readouterr().out
    assert "transformers  missing          not installed -> pip install transformers" in out
    assert out.endswith("Missing and needed: transformers.\n")


def test_something_else_is_missing(monkeypatch, capsys):
    without(monkeypatch, "papermill", "flash_attn")
    assert doctor.main() == 0
    assert (
        "papermill     missing          not installed -> pip install 'effnlp-lab[notebooks]'" in capsys.readouterr().out
    )


@pytest.mark.parametrize("on_gpu, state", [(False, "not needed here"), (True, "missing")])
def test_flash_attention_is_needed_on_a_gpu_only(monkeypatch, on_gpu, state):
    without(monkeypatch, "flash_attn")
    assert doctor._flash_attention(on_gpu).state == state


def test_nbgrader_calls_alembic(monkeypatch):
    pytest.importorskip("nbgrader")
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    finding = doctor._nbgrader()
    assert finding.state == "missing" and "alembic" in finding.detail and finding.remedy
    beside = os.path.dirname(sys.executable)  # an environment that is not activated
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"{path}/{name}" if path == beside else None)
    assert doctor._nbgrader().state == "ok"


def test_bubblewrap_that_cannot_start(monkeypatch):
    def refuse(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "bwrap: No permissions to create a new namespace\n")

    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(doctor.platform, "system", lambda: "Linux")
    finding = doctor._bubblewrap()
    assert finding.state == "missing" and "No permissions" in finding.detail and finding.remedy


def test_little_disk_and_memory(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    monkeypatch.setattr(doctor, "machine_memory_bytes", lambda: 2**30)
    assert (doctor._disk().state, doctor._memory().state) == ("missing", "missing")
