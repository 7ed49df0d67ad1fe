"""What is kept of students goes when it is old, or when one asks; and reports need not name anybody."""

from __future__ import annotations

import csv
import os
import time
from pathlib import Path

import pytest
from classes import LAB
from effnlp_grading.cli import main
from effnlp_grading.course import Course
from effnlp_grading.forget import TABLES
from effnlp_grading.pseudonyms import Pseudonyms
from nbgrader.api import Gradebook

from effnlp_lab.errors import UsageError

STUDENTS = ("perfect", "blank", "mixed", "crumbled")
SETTING = "[tool.effnlp]\nkeep_days = 30\n"


@pytest.fixture
def course(own_class, monkeypatch) -> Course:
    """A graded class, all of its files 100 days old but mixed's; with attempts, tables, reports and returned zips."""
    root = own_class.course.root
    grading = root / "grading"
    for student in STUDENTS:
        for place in (f"attempts/{LAB}/{student}", f"defences/{LAB}/{student}/1", f"regrades/{LAB}/count_pairs.1"):
            (grading / place).mkdir(parents=True, exist_ok=True)
        (grading / "attempts" / LAB / student / "a.ipynb").write_text(student)
        (grading / "defences" / LAB / student / "1" / "key.json").write_text("{}")
        (grading / "regrades" / LAB / "count_pairs.1" / f"{student}.before.jsonl").write_text("{}")
    for path in (grading / "reports" / LAB / "index.html", grading / "returned" / f"{LAB}_canvas.zip"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mixed and perfect")
    for name, column in TABLES.items():
        (grading / name).write_text("\n".join([f"{column},note", *(f"{s},\"of {s}, here\"" for s in STUDENTS), ""]))
    (root / "pyproject.toml").write_text(SETTING)
    old = time.time() - 100 * 86_400
    for path in root.rglob("*"):
        if path.is_file() and "mixed" not in str(path.relative_to(root)):
            os.utime(path, (old, old))
    monkeypatch.chdir(root)
    return own_class.course


def traces(course: Course, student: str) -> list[Path]:
    """Whatever names a student: files, gradebook, tables."""
    found = [path for path in course.root.rglob("*") if student in path.name]
    found += [path for path in course.root.glob("grading/*.csv") if student in path.read_text("utf-8")]
    with Gradebook(course.db_url) as book:
        return found + [course.gradebook] * (student in {one.id for one in book.students})


def test_what_is_older_than_the_setting_goes_and_nothing_else(course, capsys):
    before = course.grades(LAB)["mixed"]
    kept = {path: path.read_bytes() for path in traces(course, "mixed") if path.is_file() and path.suffix != ".csv"
            and path != course.gradebook}  # fmt: skip
    assert main(["forget", "--yes"]) == 0
    said = capsys.readouterr().out
    assert f"{LAB}: 3 students, last written" in said and "3 grades" in said
    assert "3 students with nothing left leave the gradebook and the tables: blank, crumbled, perfect." in said
    assert not any(traces(course, student) for student in ("perfect", "blank", "crumbled"))
    assert course.grades(LAB) == {"mixed": before} and {path: path.read_bytes() for path in kept} == kept
    for name, column in TABLES.items():
        with (course.root / "grading" / name).open(newline="") as file:
            assert list(csv.reader(file)) == [[column, "note"], ["mixed", "of mixed, here"]]
    assert not (course.root / "grading" / "reports" / LAB).exists()
    assert not list((course.root / "grading" / "returned").glob("*"))
    assert (course.root / "labs" / LAB / "tokenization.ipynb").is_file() and course.is_released(LAB)
    assert main(["forget", "--yes"]) == 0 and "nothing to forget" in capsys.readouterr().out


def test_it_asks_first(course, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115
    assert main(["forget"]) == 1
    assert capsys.readouterr().out.endswith("Nothing was deleted.\n")
    assert traces(course, "perfect") and len(course.grades(LAB)) == 4


def test_one_student_and_one_limit(course, capsys):
    assert main(["forget", "--older-than", "200", "--yes"]) == 0 and len(course.grades(LAB)) == 4
    assert main(["forget", "--student", "mixed", "--yes"]) == 0
    assert not traces(course, "mixed") and sorted(course.grades(LAB)) == ["blank", "crumbled", "perfect"]


@pytest.mark.parametrize("setting", ["", "[tool.effnlp]\nkeep_days = 'long'\n", "[tool.effnlp]\nkeep_days = -1\n"])
def test_without_a_setting_nothing_is_guessed(course, setting):
    (course.root / "pyproject.toml").write_text(setting)
    with pytest.raises(UsageError, match="does not say how long records are kept"):
        main(["forget", "--yes"])
    assert len(course.grades(LAB)) == 4


def test_a_report_that_names_nobody(course, capsys):
    (course.root / "grading" / "roster.csv").write_text("id,name,email\nmixed,Ada Lovelace,ada@example.edu\n")
    assert main(["report", "01", "--pseudonyms"]) == 0
    folder = course.root / "grading" / "reports" / LAB / "pseudonyms"
    text = "".join(path.read_text("utf-8") for path in folder.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == ["index.html", "points.csv"]
    assert not [word for word in (*STUDENTS[2:], "Lovelace", "ada@") if word in text]
    names = Pseudonyms.of_course(course)
    with (folder / "points.csv").open(newline="") as file:
        rows = {row["pseudonym"]: row for row in csv.DictReader(file)}
    assert {names.of(one): grade.final for one, grade in course.grades(LAB).items()} == {
        name: float(row["final"]) for name, row in rows.items()}  # fmt: skip
    capsys.readouterr()
    assert main(["report", "01", "--who", names.of("mixed")]) == 0 and capsys.readouterr().out == "mixed\n"
    assert Pseudonyms(b"another key").of("mixed") != names.of("mixed") == Pseudonyms.of_course(course).of("mixed")
    assert (course.root / "grading" / "pseudonym_key").stat().st_mode & 0o777 == 0o600


def test_sentences_hide_ids_names_and_addresses_and_keep_other_words():
    names = Pseudonyms(b"key", [("al", "Al Khwarizmi", "al@example.edu")])
    hidden = names.hide("The submission of al: al@example.edu also calls alpha, Al Khwarizmi and s001.", ["s001"])
    al = names.of("al")
    assert hidden == f"The submission of {al}: {al} also calls alpha, {al} and {names.of('s001')}."
