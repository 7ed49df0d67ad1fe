"""Around the grader: late days, teams, regrades, estimates, replay, feedback and grades for platforms, hubs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import statistics
import sys
import types
import zipfile
from datetime import datetime, timedelta
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from classes import LAB, ROOT
from effnlp_grading import regrade as regrading
from effnlp_grading import sample_class
from effnlp_grading.cli import main
from effnlp_grading.collect import Attempt, attempts_folder
from effnlp_grading.course import CONFIGURATION, Course
from effnlp_grading.judging import Judged
from effnlp_grading.preprocessors import record_path
from effnlp_grading.records import read_lines, read_record, write_lines
from effnlp_grading.regrade import regrade, table
from effnlp_grading.teams import finish
from effnlp_grading.writer import Writer
from nbgrader.api import Gradebook
from traitlets.config.loader import PyFileConfigLoader

from effnlp_lab import exercises
from effnlp_lab.errors import UsageError

SPEC = exercises.lab(LAB)
DUE = datetime(2026, 10, 1, 22, 0)
FIRST = next(e.name for e in SPEC.exercises if e.points and e.twin_of is None)


@pytest.fixture
def course(own_class, monkeypatch) -> Course:
    """A copy of the graded class: perfect, blank, mixed and crumbled, in a course whose zone is UTC."""
    monkeypatch.setenv("EFFNLP_TIMEZONE", "UTC")
    monkeypatch.setenv("EFFNLP_SEED", str(own_class.seed))
    monkeypatch.setenv("EFFNLP_DEVICE", "cpu")
    monkeypatch.chdir(own_class.course.root)
    return own_class.course


def hand_in_late(course: Course, student: str, days: float) -> None:
    when = DUE + timedelta(days=days)
    (course.submission(student, LAB).parent / "timestamp.txt").write_text(f"{when:%Y-%m-%d %H:%M:%S} UTC")


def set_due(course: Course, due: datetime = DUE) -> None:
    with Gradebook(course.db_url) as book:
        book.update_or_create_assignment(LAB, duedate=due)


def dump(course: Course) -> list[str]:
    with contextlib.closing(sqlite3.connect(course.gradebook)) as book:
        return list(book.iterdump())


# Late days


def test_late_days_by_nbgraders_own_preprocessor(course):
    """Autograde calls the plugin; nbgrader's sums are the witness. 3 of 5 days are covered, 2 cost a tenth each."""
    set_due(course)
    hand_in_late(course, "perfect", 4.5)
    assert Writer(course).write_kept(LAB, "perfect") == ""
    with Gradebook(course.db_url) as book:
        one = book.find_submission(LAB, "perfect")
        assert one.total_seconds_late == 4.5 * 86_400
        assert one.late_submission_penalty == pytest.approx(0.2 * SPEC.points)
    assert course.grades(LAB)["perfect"].final == pytest.approx(SPEC.checked_points - 0.2 * SPEC.points)
    finish(course, LAB)
    assert course.grades(LAB)["perfect"].penalty == pytest.approx(0.2 * SPEC.points)


def test_grace_budget_and_extensions(course):
    set_due(course)
    for student, days in (("perfect", 0.01), ("mixed", 20), ("crumbled", 5), ("blank", 9)):
        hand_in_late(course, student, days)
    (course.root / "grading" / "extensions.csv").write_text(
        "student,lab,days,until\ncrumbled,01,,2026-10-05 22:00 UTC\nmixed,99,2,\nmixed,01,many,\nblank,02,1,\n")
    said = []
    finish(course, LAB, said.append)
    grades = course.grades(LAB)
    assert grades["perfect"].penalty == 0 and grades["crumbled"].penalty == 0  # a day late after the extension
    assert grades["mixed"].penalty == grades["mixed"].score > 0 == grades["mixed"].final  # never below nothing
    assert [sentence.split(":")[0] for sentence in said] == [f"extensions.csv, line {k}" for k in (3, 4, 5)]
    with Gradebook(course.db_url) as book:
        assert book.find_submission(LAB, "crumbled").extension == timedelta(days=4)
    assert "neither days (a number) nor until" in said[1] and "no due date in the gradebook" in said[2]


# Teams


def test_a_team_has_one_grade(course):
    """The others get the first one's grade, comments and page; a stranger and a loner are each a sentence."""
    set_due(course)
    hand_in_late(course, "mixed", 4.5)
    people = ("perfect", "blank", "mixed", "crumbled", "eve", "fay")
    (course.root / "grading" / "roster.csv").write_text("id,name,email\n" + "".join(f"{s},{s},\n" for s in people))
    (course.root / "grading" / "teams.csv").write_text(
        "team,student\nRed,mixed\nRed,eve\nRed,stranger\nBlue,perfect\nBlue,blank\n")
    with Gradebook(course.db_url) as book:
        book.find_grade(f"test_{FIRST}", SPEC.notebook, LAB, "mixed").manual_score = 0.25
        book.db.commit()
    said = []
    finish(course, LAB, said.append)
    grades = course.grades(LAB)
    mixed, eve = grades["mixed"], grades["eve"]
    assert (eve.score, eve.penalty, eve.exercises) == (mixed.score, mixed.penalty, mixed.exercises)
    assert eve.penalty == pytest.approx(min(eve.score, 0.2 * SPEC.points)) and eve.exercises[FIRST][0] == 0.25
    assert course.feedback("eve", LAB).read_bytes() == course.feedback("mixed", LAB).read_bytes()
    assert "stranger of team Red is not in the roster" in said[0]
    assert "blank has handed in 01_tokenization alone and is in team Blue" in said[1]
    assert grades["blank"].score == 0 and "fay" not in grades
    before = dump(course)
    finish(course, LAB)
    assert dump(course) == before


# Regrades


@pytest.fixture
def judge(monkeypatch):
    """The judge's new opinion of the first exercise, in place of the sandbox: student -> points."""
    opinion: dict[str, float] = {}

    def judge_all(tasks, plan, target, scheduler):
        for task in tasks:
            lines = read_lines(Path(task.record))
            assert all(line.get("exercise") != FIRST for line in lines), "only this exercise is judged"
            old = json.loads((Path(task.record).with_suffix("").with_suffix(".before.jsonl")).read_text())
            new = {**old, "score": opinion.get(task.student, old["score"])}
            write_lines(Path(task.record), [*lines, new, {"finished": True, "seconds": 1.0, "cells": {}, "look": []}])
            yield Judged(task.lab, task.student, {}, {}, lines[0]["submission"], 1.0)

    monkeypatch.setattr(regrading, "judge_all", judge_all)
    return opinion


def points(course: Course) -> dict[str, float]:
    return {student: grade.exercises[FIRST][0] for student, grade in course.grades(LAB).items()}


def test_regrade_keeps_what_is_higher_and_what_is_by_hand(course, judge, capsys):
    before, most = points(course), float(SPEC.exercise(FIRST).points)
    others = {s: {n: p for n, p in g.exercises.items() if n != FIRST} for s, g in course.grades(LAB).items()}
    with Gradebook(course.db_url) as book:
        book.find_grade(f"test_{FIRST}", SPEC.notebook, LAB, "crumbled").manual_score = 0.5
        other = next(e.name for e in SPEC.exercises if e.points and e.name != FIRST)
        flagged = book.find_grade(f"test_{other}", SPEC.notebook, LAB, "crumbled")
        flagged.manual_score, flagged.needs_manual_grade = flagged.auto_score, False
        book.db.commit()
    judge.update(perfect=0.25, blank=most, mixed=before["mixed"], crumbled=0.0)
    changes = regrade(course, LAB, FIRST, device="cpu", jobs=1)
    lines = table(changes)
    assert points(course) == {"perfect": before["perfect"], "blank": most, "mixed": before["mixed"], "crumbled": 0.5}
    assert others == {s: {n: p for n, p in g.exercises.items() if n != FIRST} for s, g in course.grades(LAB).items()}
    with Gradebook(course.db_url) as book:
        assert not book.find_grade(f"test_{other}", SPEC.notebook, LAB, "crumbled").needs_manual_grade
    told = {line.split()[0]: line for line in lines[:-1]}
    assert set(told) == {"perfect", "blank", "crumbled"} and "0.25 would be lower (--allow-lower)" in told["perfect"]
    assert f"0 -> {most:g}" in told["blank"] and "a grader gave these points (judged: 0)" in told["crumbled"]
    assert lines[-1] == "4 regraded: 1 have more points, 0 fewer, 3 the same."
    again = ["regrade", "01", FIRST, "--students", "perfect", "--allow-lower"]
    assert main([*again, "--device", "cpu", "--jobs", "1"]) == 0
    assert f"perfect  {before['perfect']:g} -> 0.25\n" in capsys.readouterr().out
    assert points(course)["perfect"] == 0.25
    page = BeautifulSoup((course.root / "grading" / "reports" / LAB / "index.html").read_text("utf-8"), "html.parser")
    row = next(row for row in page.select("tbody tr") if row.th.text == FIRST)
    assert [cell.text for cell in row.select("td")][1] == f"{statistics.fmean(points(course).values()):.2f}"
    kept = sorted(path.name for path in (course.root / "grading" / "regrades" / LAB).iterdir())
    assert kept == [f"{FIRST}.1", f"{FIRST}.2"]


def test_regrade_goes_on_where_it_was_killed(course, judge, monkeypatch):
    two = {"students": ["blank", "mixed"], "allow_lower": True, "device": "cpu", "jobs": 1}
    judge.update(blank=0.75, mixed=0.75)
    write, calls = regrading._Regrade.write, []

    def dying(self, student):
        calls.append(student)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(self, student)

    monkeypatch.setattr(regrading._Regrade, "write", dying)
    with pytest.raises(KeyboardInterrupt):
        regrade(course, LAB, FIRST, **two)
    monkeypatch.setattr(regrading._Regrade, "write", write)
    judge.clear()  # whoever was judged again would now keep the old points
    changes = {one.student: one for one in regrade(course, LAB, FIRST, **two)}
    assert [changes[student].after for student in calls] == [0.75, 0.75]
    assert changes[calls[0]].before == 0.0 and points(course)[calls[1]] == 0.75


def test_what_cannot_be_regraded_is_a_sentence(course, judge):
    with pytest.raises(UsageError, match="has no exercise 'nothing': expected one of"):
        regrade(course, LAB, "nothing")
    with pytest.raises(UsageError, match="no submission of 01_tokenization of nobody"):
        regrade(course, LAB, FIRST, students=["nobody"])
    record_path(course.root / "grading", LAB, "mixed").unlink()
    notebook = nbformat.read(course.submission("blank", LAB), as_version=4)
    notebook.cells[-1].source += "\nx = 1"
    notebook.cells.append(nbformat.v4.new_code_cell("y = 2"))
    nbformat.write(notebook, course.submission("blank", LAB))
    lines = table(regrade(course, LAB, FIRST, device="cpu", jobs=1))
    why = "it or the release has changed since: `effnlp grade --force` judges all of it"
    assert lines[0] == f"blank     not regraded: {why}"
    assert lines[1] == "mixed     not regraded: it was never graded: `effnlp grade` does that"
    assert lines[-1].startswith("2 regraded")
    shutil.rmtree(course.root / "grading" / "verdicts")
    with pytest.raises(UsageError, match="was never graded: run `effnlp grade 01_tokenization` first"):
        regrade(course, LAB, FIRST)


# Feedback and grades for platforms


def give_platforms(course: Course) -> None:
    """The class on three platforms, and one who is on none."""
    (course.root / "grading" / "roster.csv").write_text(
        "id,name,email,canvas_id,login\nperfect,Ada Lovelace,ada@x.edu,4711,al1\nblank,=Bob van Dyke,bob@x.edu,,\n"
        "mixed,Chloé Ng,c@x.edu,,\ncrumbled,Dan Li,d@x.edu,,\nabsent,Eve Om,e@x.edu,4712,\n", "utf-8")
    where = {"perfect": ("canvas", "lovelaceada_4711_9_lab.ipynb", "lovelaceada_4711_9_"),
             "blank": ("moodle", "Bob van Dyke_88_assignsubmission_file_/lab.ipynb",
                       "Bob van Dyke_88_assignsubmission_file_"),
             "mixed": ("brightspace", "5-6 - Chloé Ng - Sep 24, 2026 926 PM/lab.ipynb",
                       "5-6 - Chloé Ng - Sep 24, 2026 926 PM")}
    for student, (platform, path, prefix) in where.items():
        attempt = Attempt(student, LAB, platform, path, prefix, "", "d" * 64)
        folder = attempts_folder(course, LAB) / student
        folder.mkdir(parents=True)
        (folder / f"{attempt.key}.json").write_text(json.dumps(vars(attempt)))
    (attempts_folder(course, LAB) / "index.html").write_text("<html></html>")


def test_feedback_in_the_shape_of_each_platform(course, capsys):
    give_platforms(course)
    assert main(["return", "01"]) == 0
    said = capsys.readouterr().out
    assert "crumbled has no hand-in of a platform to answer to" in said
    out = course.root / "grading" / "returned"
    names = {}
    for platform in ("canvas", "moodle", "brightspace"):
        with zipfile.ZipFile(out / f"{LAB}_{platform}.zip") as archive:
            names[platform] = archive.namelist()
    page, verdicts = f"feedback_{LAB}.html", f"verdicts_{LAB}.jsonl"
    assert names["canvas"] == [f"lovelaceada_4711_9_{page}", f"lovelaceada_4711_9_{verdicts}"]
    folder = "Bob van Dyke_88_assignsubmission_file_"
    assert names["moodle"] == [f"{folder}/{page}", f"{folder}/{verdicts}"]
    folder = "5-6 - Chloé Ng - Sep 24, 2026 926 PM"
    assert names["brightspace"] == [f"{folder}/{page}", f"{folder}/{verdicts}", "index.html"]
    assert (out / "by_hand" / "crumbled" / page).read_bytes() == course.feedback("crumbled", LAB).read_bytes()
    before = {path: path.read_bytes() for path in out.rglob("*.zip")}
    assert main(["return", "01"]) == 0 and before == {path: path.read_bytes() for path in out.rglob("*.zip")}
    told = [json.loads(line) for line in (out / "by_hand" / "crumbled" / verdicts).read_text().splitlines()]
    kept = read_record(record_path(course.root / "grading", LAB, "crumbled"))
    assert [t["seed"] for t in told] == [k["seed"] for k in kept] and all("look" not in t for t in told)
    assert main(["return", "01", "--lms", "moodle", "--out", str(out / "m")]) == 0
    assert sorted(path.name for path in (out / "m" / "by_hand").iterdir()) == ["crumbled", "mixed", "perfect"]
    with pytest.raises(UsageError, match="no platform 'blackboard'"):
        main(["return", "01", "--lms", "blackboard"])


def test_grades_in_the_form_of_each_platform(course, tmp_path):
    """Written out by hand from the platforms' manuals."""
    give_platforms(course)
    mixed, crumbled = (f"{round(course.grades(LAB)[who].final, 4):g}" for who in ("mixed", "crumbled"))
    for platform in ("canvas", "moodle", "brightspace"):
        assert main(["export", "01", "--lms", platform, "--column", "Lab 1 (77)", "--out",
                     str(tmp_path / platform)]) == 0
    read = {path.name: path.read_bytes().decode("utf-8") for path in tmp_path.iterdir() if path.is_file()}
    assert read["canvas"].split("\r\n") == [
        "Student,ID,SIS User ID,SIS Login ID,Section,Lab 1 (77)", f"    Points Possible,,,,,{SPEC.points:g}",
        "\"Dyke, =Bob van\",,blank,blank,,0", f"\"Li, Dan\",,crumbled,crumbled,,{crumbled}",
        "\"Lovelace, Ada\",4711,perfect,al1,,10", f"\"Ng, Chloé\",,mixed,mixed,,{mixed}",
        "\"Om, Eve\",4712,absent,absent,,", ""]
    assert read["moodle"].split("\r\n") == [
        "Full name,Email address,ID number,Lab 1 (77)", "'=Bob van Dyke,bob@x.edu,blank,0",
        f"Dan Li,d@x.edu,crumbled,{crumbled}", "Ada Lovelace,ada@x.edu,perfect,10", f"Chloé Ng,c@x.edu,mixed,{mixed}",
        "Eve Om,e@x.edu,absent,", ""]
    assert read["brightspace"].split("\r\n") == [
        "OrgDefinedId,Username,Lab 1 (77) Points Grade,End-of-Line Indicator", "#blank,#blank,0,#",
        f"#crumbled,#crumbled,{crumbled},#", "#perfect,#al1,10,#", f"#mixed,#mixed,{mixed},#", "#absent,#absent,,#", ""]
    sheet = tmp_path / "sheet.csv"
    sheet.write_text("\ufeffIdentifier,Full name,Email address,Grade,Last modified (grade)\n"
                     "Participant 5,Ada Lovelace,ada@x.edu,,-\nParticipant 6,Eve Om,e@x.edu,,-\n", "utf-8")
    assert main(["export", "01", "--lms", "moodle", "--worksheet", str(sheet), "--out", str(tmp_path / "w")]) == 0
    assert (tmp_path / "w").read_bytes().decode().split("\r\n")[1:3] == [
        "Participant 5,Ada Lovelace,ada@x.edu,10,-", "Participant 6,Eve Om,e@x.edu,,-"]
    with pytest.raises(UsageError, match="No submission of 02_streaming_datasets is graded"):
        main(["export", "02", "--lms", "canvas"])


# Costs, disputes


def test_estimate(course, capsys, monkeypatch):
    """4 submissions of 30 s and 2 s beside: 10 of them are 320 s, on two at a time 160 s by the clock."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for student in course.students(LAB):
        path = record_path(course.root / "grading", LAB, student)
        lines = [{**line, "seconds": 30.0} if "finished" in line else line for line in read_lines(path)]
        write_lines(path, [{**line, "seconds": 1.0} if "exercise" in line else line for line in lines])
    folder = course.root / "grading" / "reports" / LAB
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"beside_judging": 2.0}))
    assert main(["grade", "01", "--estimate", "--size", "10", "--jobs", "1", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    threads = len(os.sched_getaffinity(0))
    assert "4 submissions took 30.0 s each on average" in said and "2.0 s each beside judging" in said
    assert f"Core-hours: {320 * threads / 3600:.2f}. GPU-hours: 0.00. By the clock: 5.3 min." in said
    assert main(["grade", "01", "--estimate", "--device", "cpu"]) == 0
    assert "01_tokenization: 0 submissions to grade" in capsys.readouterr().out
    assert main(["grade", "02", "--estimate", "--size", "2", "--jobs", "1", "--device", "cpu"]) == 0
    assert "an upper bound" in capsys.readouterr().out
    with pytest.raises(UsageError, match="name the size of the class"):
        main(["grade", "02", "--estimate"])


def test_verdicts_from_before_points_were_changed_are_named(course):
    path = record_path(course.root / "grading", LAB, "mixed")
    lines = read_lines(path)
    for line in lines:
        if line.get("exercise") == FIRST:
            line["points"] = 0.5
    assert regrading.judged_at_other_points(course, LAB, ["perfect", "mixed"]) == []
    write_lines(path, lines)
    (said,) = regrading.judged_at_other_points(course, LAB, ["perfect", "mixed"])
    assert said == f"{FIRST} is worth 1 now and was judged at 0.5: run `effnlp regrade {LAB} {FIRST}`."


def test_points_and_comments_by_hand_reach_the_page_that_is_returned(course, capsys):
    """Formgrader writes to the gradebook alone; pages that nobody touched stay as they are."""
    assert main(["return", "01"]) == 0
    with Gradebook(course.db_url) as book:
        told = (SPEC.notebook, LAB, "mixed")
        book.find_grade(f"written_{SPEC.written[0].name}", *told).manual_score = 0.62
        book.find_comment(FIRST, *told).manual_comment = "Half of it is a good idea."
        book.db.commit()
    before = {path: path.stat().st_mtime_ns for path in course.root.glob("grading/feedback/*/*/*.html")}
    assert main(["return", "01"]) == 0
    page = course.root / "grading" / "returned" / "by_hand" / "mixed" / f"feedback_{LAB}.html"
    text = page.read_text("utf-8")
    assert "Half of it is a good idea." in text and f"(Score: {course.grades(LAB)['mixed'].final:g} / " in text
    contents = [link.text for link in BeautifulSoup(text, "html.parser").select("#toc a")]
    assert contents[:3] == [f"Comment on {FIRST}", FIRST, f"Prediction {SPEC.predictions[0].name}"]
    assert len(set(contents)) == len(contents) > 9 and f"Written answer {SPEC.written[0].name}" in contents
    changed = [path for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert changed == [course.feedback("mixed", LAB)] and len(before) == 4
    assert main(["return", "01"]) == 0 and page.read_text("utf-8") == text


def test_replay_from_what_was_returned(course, capsys, graded_class):
    """The failing case on the student's machine; and what is said of a notebook that is not the one judged."""
    give_platforms(course)
    assert main(["return", "01", "--lms", "canvas"]) == 0
    verdicts = course.root / "grading" / "returned" / "by_hand" / "mixed" / f"verdicts_{LAB}.jsonl"
    told = [json.loads(line) for line in verdicts.read_text().splitlines()]
    wrong = next(t for t in told if t["state"] == "incorrect")
    capsys.readouterr()
    arguments = ["--exercise", wrong["exercise"]]
    assert main(["replay", str(verdicts), str(course.submission("mixed", LAB)), *arguments]) == 0
    said = capsys.readouterr().out
    failing = next(case for case in wrong["cases"] if case["state"] == "incorrect")
    assert f"First failing case: {failing['name']}" in said and "is not, word for word" not in said
    variant = ", ".join(f"{name}={value}" for name, value in sorted(wrong["variant"].items()))
    assert f"Drawn from seed {graded_class.seed}, {f'variant {variant}' if variant else 'the only variant'}" in said
    shutil.copy(course.submission("perfect", LAB), course.root / "labs" / LAB / f"{SPEC.notebook}.ipynb")
    assert main(["replay", str(verdicts), *arguments]) == 1
    said = capsys.readouterr().out
    assert "is not, word for word, what was handed in" in said and "The kept verdict is another: incorrect" in said
    with pytest.raises(UsageError, match="name its verdicts too"):
        main(["replay", str(course.submission("mixed", LAB))])


# Hubs


def test_through_nbgraders_exchange(course, tmp_path, monkeypatch):
    """Release, fetch, submit and collect through a folder, by nbgrader's own classes and the course's settings."""
    from nbgrader.auth import Authenticator
    from nbgrader.coursedir import CourseDirectory
    from nbgrader.exchange.default import (
        ExchangeCollect,
        ExchangeFetchAssignment,
        ExchangeReleaseAssignment,
        ExchangeSubmit,
    )

    monkeypatch.setenv("EFFNLP_EXCHANGE", str(tmp_path / "exchange"))
    (tmp_path / "exchange").mkdir(mode=0o777)
    (tmp_path / "exchange").chmod(0o777)
    (tmp_path / "home").mkdir()
    config = PyFileConfigLoader(CONFIGURATION, path=str(course.root / "grading")).load_config()
    config.Exchange.cache = str(tmp_path / "cache")
    assert config.Exchange.root == str(tmp_path / "exchange")

    def step(kind, student: str = "") -> None:
        directory = CourseDirectory(config=config)
        directory.assignment_id = LAB
        if student:
            directory.student_id = student
        kind(coursedir=directory, authenticator=Authenticator(config=config), config=config).start()

    step(ExchangeReleaseAssignment)
    monkeypatch.chdir(tmp_path / "home")
    step(ExchangeFetchAssignment)
    fetched = tmp_path / "home" / LAB / f"{SPEC.notebook}.ipynb"
    assert fetched.read_bytes() == (ROOT / "labs" / LAB / fetched.name).read_bytes()
    release = nbformat.read(fetched, as_version=4)
    nbformat.write(sample_class.submission(release, {FIRST: "x = 1"}), fetched)
    step(ExchangeSubmit, "newcomer")
    monkeypatch.chdir(course.root)
    step(ExchangeCollect)
    assert course.submission("newcomer", LAB).read_bytes() == fetched.read_bytes()
    assert CourseDirectory(config=config).get_existing_timestamp(str(course.submission("newcomer", LAB).parent))


def test_ngshare_is_set_up_by_its_address(monkeypatch):
    """What the configuration asks of ngshare_exchange; no service runs here."""
    asked = []
    package = types.ModuleType("ngshare_exchange")
    package.configureExchange = lambda c, ngshare_url=None: asked.append((type(c).__name__, ngshare_url))
    monkeypatch.setitem(sys.modules, "ngshare_exchange", package)
    for address in ("http://hub:12121/services/ngshare", "auto"):
        monkeypatch.setenv("EFFNLP_NGSHARE", address)
        PyFileConfigLoader(CONFIGURATION, path=str(ROOT / "grading")).load_config()
    assert asked == [("Config", "http://hub:12121/services/ngshare"), ("Config", None)]
    monkeypatch.setitem(sys.modules, "ngshare_exchange", None)
    with pytest.raises(UsageError, match="pip install ngshare_exchange"):
        PyFileConfigLoader(CONFIGURATION, path=str(ROOT / "grading")).load_config()
