"""The page on a class: how each exercise went, the commonest mistakes by name, time, what needs a person; and CSVs."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effnlp_grading.course import Course, Grade
from effnlp_grading.preprocessors import record_path
from effnlp_grading.pseudonyms import Pseudonyms
from effnlp_grading.records import read_lines, verdicts_in
from effnlp_grading.results import Result
from effnlp_lab import exercises
from effnlp_lab.exercises.spec import Lab

TEMPLATE = Path(__file__).with_name("class_report.html")
BANDS = ("none", "up to half", "more than half", "full")
COMMONEST = 5


@dataclass
class ExerciseSummary:
    """One exercise over a class: how many students in each band of points, states, mistakes, seconds of judging."""

    name: str
    points: float
    mean: float = 0.0
    bands: dict[str, int] = field(default_factory=lambda: dict.fromkeys(BANDS, 0))
    states: Counter = field(default_factory=Counter)
    mistakes: list[tuple[str, int]] = field(default_factory=list)
    seconds: float = 0.0


def write_class_report(course: Course, lab: str, results: Mapping[str, Result],
                       pseudonyms: Pseudonyms | None = None) -> Path:  # fmt: skip
    """Write grading/reports/LAB/index.html with nbgrader.csv and canvas.csv beside it; return the page.

    With pseudonyms, grading/reports/LAB/pseudonyms/ gets a page and points.csv in which nobody is named.
    """
    import jinja2

    spec = exercises.lab(lab)
    folder = course.root / "grading" / "reports" / lab / ("pseudonyms" if pseudonyms else "")
    folder.mkdir(parents=True, exist_ok=True)
    grades = course.grades(lab)
    lines = {student: read_lines(record_path(course.root / "grading", lab, student)) for student in grades}
    kept = {student: verdicts_in(each) for student, each in lines.items()}
    waiting = [student for student in course.students(lab) if student not in {*grades, *results}]
    look = needs_a_person(results, lines, waiting)
    if pseudonyms:
        look = [(pseudonyms.of(student), pseudonyms.hide(sentence, grades)) for student, sentence in look]
        write_points_csv(spec, grades, pseudonyms, folder / "points.csv")
    else:
        write_nbgrader_csv(course, lab, folder / "nbgrader.csv")
        write_canvas_csv(course, spec, grades, folder / "canvas.csv")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE.read_text("utf-8")).render(
        lab=spec, grades=grades, bands=BANDS, exercises=summarize(spec, grades, kept),
        scores=[grade.final for grade in grades.values()], mean=_mean([grade.final for grade in grades.values()]),
        median=statistics.median([g.final for g in grades.values()]) if grades else 0.0,
        seconds=sum(v.get("seconds", 0.0) for verdicts in kept.values() for v in verdicts),
        look=look, files=["points.csv"] if pseudonyms else ["nbgrader.csv", "canvas.csv"],
        missing=[r for r in results.values() if r.state == "not graded"])
    (folder / "index.html").write_text(page, "utf-8")
    return folder / "index.html"


def summarize(lab: Lab, grades: Mapping[str, Grade], kept: Mapping[str, list[dict[str, Any]]]) -> list[ExerciseSummary]:
    """One summary an exercise, in the lab's order."""
    found = []
    for exercise in [e for e in lab.exercises if e.twin_of is None]:
        one = ExerciseSummary(exercise.name, float(exercise.points))
        verdicts = [v for verdicts in kept.values() for v in verdicts if v["exercise"] == exercise.name]
        points = [grade.exercises[exercise.name][0] for grade in grades.values() if exercise.name in grade.exercises]
        one.mean = _mean(points)
        for got in points:
            one.bands[band(got, one.points)] += 1
        one.states = Counter(v["state"] for v in verdicts)
        one.mistakes = Counter(m for v in verdicts for m in v.get("mistakes", [])).most_common(COMMONEST)
        one.seconds = _mean([v.get("seconds", 0.0) for v in verdicts])
        found.append(one)
    return found


def band(got: float, most: float) -> str:
    """In which of BANDS points fall."""
    if got <= 0:
        return "none"
    if got >= most:
        return "full"
    return "up to half" if got <= most / 2 else "more than half"


def needs_a_person(results: Mapping[str, Result], lines: Mapping[str, list[dict[str, Any]]],
                   waiting: Sequence[str] = ()) -> list[tuple[str, str]]:  # fmt: skip
    """(student, sentence): submissions that could not be graded or were mended, and whatever was odd about them.

    results: of this run; lines: what is on disk of all that were ever graded; waiting: who was not.
    """
    found = [(r.student, r.message) for r in results.values() if r.state == "not graded"]
    found += [(student, "not graded yet, or could not be: see `effnlp grade`") for student in waiting]
    found += [(r.student, sentence) for r in results.values() for sentence in r.look]
    found += [(student, sentence) for student, each in lines.items() for line in each
              for sentence in line.get("look", [])]
    return list(dict.fromkeys(found))


def write_nbgrader_csv(course: Course, lab: str, path: Path) -> None:
    """The export of nbgrader's own plugin, of one lab."""
    from nbgrader.api import Gradebook
    from nbgrader.plugins import CsvExportPlugin

    plugin = CsvExportPlugin()
    plugin.to, plugin.assignment = str(path), [lab]
    with Gradebook(course.db_url) as book:
        plugin.export(book)


def write_points_csv(lab: Lab, grades: Mapping[str, Grade], pseudonyms: Pseudonyms, path: Path) -> None:
    """Points by pseudonym: each exercise, all that was graded, what being late costs; in the pseudonyms' order."""
    from effnlp_grading.export import as_csv

    names = [e.name for e in lab.exercises if e.twin_of is None]
    rows = sorted([pseudonyms.of(student), *(f"{grade.exercises.get(name, (0.0, 0.0))[0]:g}" for name in names),
                   f"{grade.score:g}", f"{grade.penalty:g}", f"{grade.final:g}"]
                  for student, grade in grades.items())  # fmt: skip
    path.write_text(as_csv([["pseudonym", *names, "score", "penalty", "final"], *rows]), "utf-8", newline="")


def write_canvas_csv(course: Course, lab: Lab, grades: Mapping[str, Grade], path: Path) -> None:
    """The form that Canvas imports, of everybody who has a grade."""
    from effnlp_grading.export import as_csv, canvas_rows, points_of, title_of
    from effnlp_grading.roster import Student, roster_of

    roster = roster_of(course).students
    graded = [roster.get(student, Student(student)) for student in sorted(grades)]
    points = {student: points_of(grade) for student, grade in grades.items()}
    path.write_text(as_csv(canvas_rows(graded, points, title_of(lab), lab.points)), "utf-8", newline="")


def _mean(values: list[float]) -> float:
    return statistics.fmean(values) if values else 0.0
