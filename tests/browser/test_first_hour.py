"""A student's first hour in JupyterLab: a lab opened, an exercise wrong, its diagnosis, then right, a plot, run all."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from browsing import SECONDS, barriers, chromium, jupyterlab

from effnlp_lab import exercises
from effnlp_lab.exercises.reference import Mistake
from effnlp_lab.master import read_master, solution_source

ROOT = Path(__file__).resolve().parents[2]
LAB, EXERCISE = "01_tokenization", "measure_tokens"
NAME = f"{exercises.lab(LAB).notebook}.ipynb"
RELEASE = ROOT / "labs" / LAB / NAME
OURS = (".jp-OutputArea-output", ".jp-MarkdownOutput")  # what the kit writes: outputs and prose
KERNEL = "window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel"


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of a JupyterLab whose folder holds the released lab."""
    course = tmp_path / "course"
    course.mkdir()
    shutil.copy(RELEASE, course)
    unset = dict.fromkeys(("EFFNLP_STUDENT", "EFFNLP_STRICT", "EFFNLP_GRADING"))
    with jupyterlab(course, tmp_path, EFFNLP_DEVICE="cpu", EFFNLP_FAST="1", EFFNLP_SEED="7", **unset) as address:
        yield address


class Notebook:
    """The open notebook, as a student sees and uses it: cells by their ids in the release."""

    def __init__(self, page: Any, address: str) -> None:
        self.page = page
        cells = nbformat.read(RELEASE, as_version=4).cells
        self.places = {cell.id: place for place, cell in enumerate(cells)}
        self.code = {cell.id: cell.source for cell in cells if cell.cell_type == "code"}
        page.set_default_timeout(SECONDS * 1000)
        page.set_viewport_size({"width": 1400, "height": 1000})
        page.goto(f"{address}lab/tree/{NAME}")
        page.locator(".jp-Notebook .jp-Cell").nth(len(cells) - 1).wait_for(state="attached")
        page.wait_for_function(f"{KERNEL}?.status === 'idle'")
        page.add_style_tag(content="body { min-height: 100vh }")  # JupyterLab's has no height: axe takes all for hidden

    def cell(self, name: str) -> Any:
        return self.page.locator(".jp-Notebook .jp-Cell").nth(self.places[name])

    def prompt(self, name: str) -> str:
        return self.cell(name).locator(".jp-InputPrompt").inner_text().strip()

    def run(self, name: str) -> str:
        """Shift-Enter in a cell; the text of its outputs once it has run."""
        before = self.prompt(name)
        self.cell(name).locator(".cm-content").click()
        self.page.keyboard.press("Shift+Enter")
        self._wait(name, before)
        return self.said(name)

    def said(self, name: str) -> str:
        return self.cell(name).locator(".jp-OutputArea").inner_text()

    def write(self, name: str, source: str) -> None:
        """Put another text into a cell."""
        self.cell(name).locator(".cm-content").click()
        self.page.keyboard.press("Control+a")
        self.page.keyboard.insert_text(source)

    def restart_and_run_all(self) -> None:
        self.page.locator('.jp-NotebookPanel-toolbar [data-jp-item-name="restart-and-run"] jp-button').click()
        self.page.locator(".jp-Dialog .jp-mod-accept").click()
        self._wait(list(self.code)[-1])

    def unfold(self) -> None:
        """All on the screen at once, hints too: axe-core looks at what is."""
        self.page.set_viewport_size({"width": 1400, "height": 40_000})
        self.page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")

    def turn_dark(self) -> None:
        self.page.evaluate("window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
        self.page.locator('body[data-jp-theme-light="false"]').wait_for(state="attached")
        self.page.locator("#jupyterlab-splash").wait_for(state="detached")  # it lies over all until the theme is there

    def _wait(self, name: str, before: str = "") -> None:
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            prompt = self.prompt(name)
            if prompt != before and re.fullmatch(r"\[\d+\]:", prompt):
                return
            time.sleep(0.05)
        raise AssertionError(f"{name} did not run to its end: {self.prompt(name)} {self.said(name)}")


def solution_and_mistake() -> tuple[str, str, Mistake]:
    """The text of the exercise's cell, solved and with its first known mistake, and that mistake."""
    master = read_master(ROOT / "solutions" / LAB / NAME.replace(".ipynb", ".py"))
    mistake = exercises.reference_of(EXERCISE).mistakes[0]
    wrong = exercises.sources(LAB)["exercises"][EXERCISE]["mistakes"][mistake.name]
    return solution_source(master.exercise_cell(EXERCISE)), wrong, mistake


def test_a_students_first_hour(address):
    solved, wrong, mistake = solution_and_mistake()
    exercise, check = f"exercise-{EXERCISE}", f"check-{EXERCISE}"
    with chromium() as browser:
        page = browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        lab = Notebook(page, address)
        names = list(lab.code)

        said = [lab.run(name) for name in names[: names.index(exercise)]]
        assert "The kit is here, version" in said[0] and "Lab 01, Tokenization. cpu" in said[2]
        lab.run(exercise)
        blank = lab.run(check)
        assert f"{EXERCISE}: not attempted, 0 of 1 point" in blank
        assert "Lab 01: 0 of 10 points so far, 0 of 6 exercises whole." in blank

        lab.write(exercise, wrong)
        lab.run(exercise)
        diagnosis = lab.run(check)
        assert f"{EXERCISE}: incorrect" in diagnosis and f"Likely: {mistake.sentence}" in diagnosis

        lab.write(exercise, solved)
        lab.run(exercise)
        praise = lab.run(check)
        assert f"{EXERCISE}: correct, 1 of 1 point" in praise and "Likely" not in praise
        assert "Lab 01: 1 of 10 points so far, 1 of 6 exercises whole." in praise

        plot = next(name for name in names if name.startswith("demo-") and "plots.show(" in lab.code[name])
        for name in names[names.index(check) + 1: names.index(plot) + 1]:
            lab.run(name)
        picture = lab.cell(plot).locator(".jp-OutputArea img")
        assert picture.get_attribute("alt") and picture.evaluate("it => it.naturalWidth") > 100

        lab.restart_and_run_all()
        assert [lab.prompt(name) for name in names] == [f"[{n}]:" for n in range(1, len(names) + 1)]
        assert page.locator('.jp-OutputArea-output[data-mime-type*="error"]').count() == 0
        assert "Lab 01: 1 of 10 points so far, 1 of 6 exercises whole." in lab.said(check)
        lab.unfold()
        assert barriers(page, OURS) == []
        lab.turn_dark()
        assert barriers(page, OURS) == []
        assert errors == []
