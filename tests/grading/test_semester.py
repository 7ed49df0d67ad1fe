"""A semester from the first hand-in to the last export: killed again and again, gone on with, and done twice.

A small one runs with the other tests. `make semester` (EFFNLP_SEMESTER=60) runs 60 students through every lab that is
graded, and kills ten times.
"""

from __future__ import annotations

import csv
import os
import random
import zipfile

import pytest
import semester as made_up
from effnlp_grading.preprocessors import wants_sandbox
from effnlp_grading.sandbox import sandbox_error
from semester import Semester

from effnlp_lab import exercises

pytestmark = [pytest.mark.xdist_group("semester")]
if sandbox_error() is not None and wants_sandbox():
    pytestmark.append(pytest.mark.skip(reason=f"NO SANDBOX HERE: {sandbox_error()}"))

SIZE = int(os.environ.get("EFFNLP_SEMESTER", "4"))
IS_WHOLE = SIZE > 12
KILLS = 10 if IS_WHOLE else 2
CHEAP = ("01_tokenization", "02_streaming_datasets")
GRADED = tuple(lab for lab in exercises.lab_names() if exercises.lab(lab).points)
LABS = tuple(filter(None, os.environ.get("EFFNLP_SEMESTER_LABS", "").split(","))) or (GRADED if IS_WHOLE else CHEAP)
SEMESTER = Semester(SIZE, LABS, int(os.environ.get("EFFNLP_SEMESTER_JOBS", "1")))
WRITES = 40  # that each hand-in takes at least in the process that is killed: about 60 were counted


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The semester, killed KILLS times at random writes and then run to its end."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in made_up.ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.delenv("EFFNLP_VARIANT_KEY", raising=False)
        course = made_up.make_course(tmp_path_factory.mktemp("semester") / "course", SEMESTER)
        made_up.expected(SEMESTER)  # and what it imports is imported once, in this process
        chance = random.Random(int(os.environ.get("EFFNLP_SEMESTER_SEED", "5")))
        for kill in range(KILLS):
            share = 2 * WRITES * made_up.hand_ins_left(course, SEMESTER) // (KILLS - kill + 1)
            reach = max(1, share) if kill or IS_WHOLE else 40
            over = made_up.run_and_be_killed(course, SEMESTER, chance.randint(1, reach))
            assert not over, f"it was over before kill {kill + 1}: nothing is shown"
        assert made_up.run_and_be_killed(course, SEMESTER, None)
        yield course


def test_everybody_has_what_is_due_to_them(done):
    """Points by the judge without notebooks; penalties by the rules: not by the code that is tested."""
    expected, found = made_up.expected(SEMESTER), made_up.gradebook(done, SEMESTER)
    assert found.keys() == expected.keys()
    assert made_up.is_same(found, expected), {key: (found[key], expected[key]) for key in found
                                              if not made_up.is_same({key: found[key]}, {key: expected[key]})}
    penalties = [penalty for _, penalty in expected.values()]
    assert any(penalties) and not all(penalties)


def test_the_second_time_changes_nothing(done):
    before, log = made_up.everything(done), (done.root / "log").stat().st_size
    stages = (done.root / "stages.txt").read_text().splitlines(keepends=True)
    (done.root / "stages.txt").write_text("" if IS_WHOLE else "".join(s for s in stages if "regrade" in s))
    (done.root / "grading" / "gradebook.db").touch()
    assert made_up.run_and_be_killed(done, SEMESTER, None)
    assert made_up.everything(done) == before
    said = (done.root / "log").read_text()[log:]
    assert ": kept in" in said and ": graded in" not in said.split("regrading")[0]
    assert " 0 placed" in said and (not IS_WHOLE or " 0 have more points, 0 fewer" in said)


def test_the_wrong_check_was_found_and_regraded(done):
    """The first regrade gave points back; a grader's own points stayed."""
    said = (done.root / "log").read_text()
    assert f"regrading {LABS[0]} {SEMESTER.wrong}" in said
    assert "kept because a grader gave these points" in said
    folder = done.root / "grading" / "regrades" / LABS[0] / f"{SEMESTER.wrong}.1"
    assert len(list(folder.glob("*.before.jsonl"))) == len(SEMESTER.hand_ins(0))
    assert all('"score": 0' in path.read_text() for path in folder.glob("*.before.jsonl"))


def test_feedback_goes_back_under_the_platforms_names(done):
    for place, lab in enumerate(LABS):
        graded = {student for name, student in made_up.gradebook(done, SEMESTER) if name == lab}
        seen = set()
        for platform in made_up.PLATFORMS:
            given = done.root / "downloads" / lab / f"{platform}.zip"
            taken = done.root / "grading" / "returned" / f"{lab}_{platform}.zip"
            if not taken.is_file():
                assert not [one for one in SEMESTER.hand_ins(place) if one.person.platform == platform]
                continue
            with zipfile.ZipFile(given) as archive, zipfile.ZipFile(taken) as returned:
                pages = [name for name in returned.namelist() if name.endswith(f"feedback_{lab}.html")]
                names = archive.namelist()
                for page in pages:
                    prefix = page.removesuffix(f"feedback_{lab}.html")
                    assert any(name.startswith(prefix) for name in names), page
                    assert "<html" in returned.read(page).decode()
                assert ("index.html" in returned.namelist()) == (platform == "brightspace")
                seen.update(pages)
        alone = done.root / "grading" / "returned" / "by_hand"
        by_hand = [path for path in alone.glob(f"*/feedback_{lab}.html")] if alone.is_dir() else []
        assert len(seen) + len(by_hand) == len(graded)


def test_exports_say_what_nbgraders_own_says(done):
    """nbgrader's CsvExportPlugin is the other witness."""
    from nbgrader.api import Gradebook
    from nbgrader.plugins import CsvExportPlugin

    plugin = CsvExportPlugin()
    plugin.to = str(done.root / "nbgrader.csv")
    with Gradebook(done.db_url) as book:
        plugin.export(book)
    with (done.root / "nbgrader.csv").open() as file:
        theirs = {(row["assignment"], row["student_id"]): row for row in csv.DictReader(file)}
    assert {student for _, student in theirs} == {person.id for person in SEMESTER.people}
    columns = {"canvas": "SIS User ID", "moodle": "ID number", "brightspace": "OrgDefinedId"}
    for lab in LABS:
        there = {student for name, student in made_up.gradebook(done, SEMESTER) if name == lab}
        for platform, column in columns.items():
            rows = made_up.rows_of((done.root / "grading" / "returned" / f"{lab}_{platform}.csv").read_text("utf-8"))
            rows = [row for row in rows if row[column]]
            points = {row[column].lstrip("#"): next(v for k, v in row.items() if exercises.lab(lab).title in k)
                      for row in rows}
            assert set(points) == {person.id for person in SEMESTER.people}
            assert {student for student, got in points.items() if got} == there
            for student in there:
                assert float(points[student]) == pytest.approx(float(theirs[lab, student]["score"]), abs=1e-4)
