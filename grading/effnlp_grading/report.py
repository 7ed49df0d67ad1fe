"""The page that `effnlp demo` leaves: scores, feedback pages, executed notebooks, plots and receipts, in one folder.

The folder is whole: every link is relative, nothing is loaded from elsewhere, and it can be moved or served as it is.
"""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from effnlp_grading import sample_class
from effnlp_grading.course import Course
from effnlp_grading.results import Result
from effnlp_lab import runner
from effnlp_lab.device import Device
from effnlp_lab.exercises.spec import Lab

TEMPLATE = Path(__file__).with_name("report.html")


@dataclass
class Demonstration:
    """What the demonstration did; `problems` has a sentence for everything that is not as it should be."""

    course: Course
    device: Device
    labs: list[Lab]
    executed: list[runner.Outcome] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    expected: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """A plot of an executed notebook, saved beside the report."""

    path: str
    alt: str


def write(shown: Demonstration, folder: Path) -> Path:
    """Write the report on a demonstration to `folder` (emptied first); return its page."""
    import jinja2

    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE.read_text("utf-8")).render(
        problems=shown.problems,
        in_words=points_in_words,
        device=shown.device.describe(),
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        seconds=shown.seconds,
        scratch=shown.course.root,
        csv=_copy(shown.course.root / "grading" / "grades.csv", folder, "grades.csv"),
        runs=[_run(shown, folder, lab, outcome) for lab, outcome in zip(shown.labs, shown.executed, strict=True)],
        classes=[_class(shown, folder, lab) for lab in shown.labs if lab.graded],
    )
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def _run(shown: Demonstration, folder: Path, lab: Lab, outcome: Any) -> dict[str, Any]:
    """What the page says about one executed notebook."""
    run = Path(outcome.folder)
    executed = run / f"{lab.notebook}.ipynb"
    return {
        "lab": lab,
        "outcome": outcome,
        "notebook": _copy(executed, folder, f"notebooks/{lab.name}.ipynb"),
        "html": _copy(executed.with_suffix(".html"), folder, f"notebooks/{lab.name}.html"),
        "pictures": list(_pictures(executed, folder, lab.name)),
        "receipts": list(_receipts(run, folder)),
    }


def _class(shown: Demonstration, folder: Path, lab: Lab) -> dict[str, Any]:
    """What the page says about a lab's grading: one row a student, one column an exercise."""
    results = [result for result in shown.results if result.lab == lab.name]
    checks = [exercise for exercise in lab.exercises if exercise.twin_of is None]
    return {"lab": lab, "checks": checks, "rows": [_row(shown, folder, lab, checks, result) for result in results]}


def _row(shown: Demonstration, folder: Path, lab: Lab, checks: list, result: Result) -> dict[str, Any]:
    cells = []
    for exercise in checks:
        points, most = result.grade.exercises.get(exercise.name, (None, None)) if result.grade else (None, None)
        mistaken = result.student in sample_class.MISTAKEN
        cells.append({"points": points, "of": most, "expected": shown.expected.get((lab.name, result.student), {})
                      .get(exercise.name),
                      "mistake": sample_class.mistake_of(result.student, lab, exercise.name) if mistaken else None})
    return {
        "student": result.student,
        "does": sample_class.describe(result.student),
        "result": result,
        "cells": cells,
        "feedback": _copy(shown.course.feedback(result.student, lab.name), folder,
                          f"feedback/{lab.name}/{result.student}.html"),
    }


def _pictures(executed: Path, folder: Path, name: str) -> Iterator[Picture]:
    """The pictures in an executed notebook's outputs, in order, saved as files."""
    import nbformat

    if not executed.is_file():
        return
    number = 0
    for cell in nbformat.read(executed, as_version=4).cells:
        for output in cell.get("outputs", ()):
            for data, alt in _images(output.get("data", {}), output.get("metadata", {})):
                number += 1
                path = folder / "plots" / f"{name}_{number}.png"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(data)
                yield Picture(f"plots/{path.name}", alt)


def _images(data: dict[str, Any], metadata: dict[str, Any]) -> Iterator[tuple[bytes, str]]:
    """PNG images of one output with their alternative text: `image/png`, or `img` elements that carry their data."""
    from bs4 import BeautifulSoup

    prefix = "data:image/png;base64,"
    for image in BeautifulSoup(data.get("text/html", ""), "html.parser").find_all("img"):
        if str(image.get("src", "")).startswith(prefix):
            yield base64.b64decode(image["src"][len(prefix):]), str(image.get("alt", ""))
    if "image/png" in data:
        alt = metadata.get("image/png", {}).get("alt") or metadata.get("alt") or data.get("text/plain", "")
        yield base64.b64decode(data["image/png"]), alt


def _receipts(run: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """The receipts that an executed notebook saved: their tables, and links to the JSON."""
    from markupsafe import Markup

    from effnlp_lab.errors import UsageError
    from effnlp_lab.notebook.receipt import Receipt

    for path in sorted(run.glob("receipt_*.json")):
        try:
            table = Markup(Receipt.load(path).html())  # escaped where it is made
        except UsageError as error:
            table = str(error)
        yield {"table": table, "path": _copy(path, folder, f"receipts/{path.name}")}


def _copy(source: Path, folder: Path, name: str) -> str | None:
    """Copy a file into the report; return its name there, or None where there is no such file."""
    if not source.is_file():
        return None
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, folder / name)
    return name


def points_in_words(score: float, most: float) -> str:
    """Full, part or no points: what colour alone must not say."""
    return "full points" if score == most else "no points" if score == 0 else "part of the points"

