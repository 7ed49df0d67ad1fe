"""Every notebook, executed: solutions under nbval, which compares tagged cells, and labs as released."""

from __future__ import annotations

from pathlib import Path

import pytest

from effnlp_lab.runner import FULL_LIMIT_SECONDS, run, validate

ROOT = Path(__file__).resolve().parents[2]
SOLUTIONS = sorted(ROOT.glob("solutions/[0-9]*/*.ipynb"))
LABS = sorted(ROOT.glob("labs/[0-9]*/*.ipynb"))
MASTERS = sorted(ROOT.glob("solutions/[0-9]*/*.py"))

pytestmark = [pytest.mark.notebook, pytest.mark.timeout(FULL_LIMIT_SECONDS + 300)]  # the runner's own limit comes first


@pytest.fixture(scope="session")
def device(request) -> str:
    return request.config.getoption("--device")


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_solution(path, device, tmp_path):
    outcome = validate(path, device, out=tmp_path)
    assert outcome.state == "ok", outcome.sentence()


@pytest.mark.parametrize("path", LABS, ids=lambda path: path.stem)
def test_lab_before_anything_is_solved(path, device, tmp_path):
    (outcome,) = run([path], device, out=tmp_path, student=True)
    assert outcome.state == "ok", outcome.sentence()


def test_every_master_is_built_for_both_sides():
    names = [path.relative_to(ROOT / "solutions").with_suffix("") for path in MASTERS]
    assert names, "there are no masters in solutions/"
    assert names == [path.relative_to(ROOT / "solutions").with_suffix("") for path in SOLUTIONS]
    assert names == [path.relative_to(ROOT / "labs").with_suffix("") for path in LABS]
