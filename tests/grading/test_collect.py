"""What learning platforms hand out: their names, their times, and everything that may be wrong with it."""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import zipfile
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import nbformat
import pytest
from classes import LAB, ROOT, master_of
from effnlp_grading import sample_class, unpack
from effnlp_grading.cli import main
from effnlp_grading.collect import attempts_of, collect
from effnlp_grading.course import Course
from effnlp_grading.lms import read_name
from effnlp_grading.roster import read_roster, read_teams
from effnlp_grading.times import read_time
from nbgrader.api import Gradebook
from nbgrader.coursedir import CourseDirectory

from effnlp_lab.errors import UsageError

ROSTER = """id,name,email,canvas_id,brightspace_id
ada,Ada Lovelace,ada@example.edu,4711,
bob,Bob van Dyke,bob@example.edu,,
chloe,"Sørensen, Chloé",chloe@example.edu,,397063
dan1,Dan Li,dan1@example.edu,,
dan2,Dan Li,dan2@example.edu,,
"""
DUE = datetime(2026, 10, 1, 21, 59)
RELEASE = nbformat.read(ROOT / "labs" / LAB / "tokenization.ipynb", as_version=4)
SOLVED = nbformat.writes(sample_class.submission(RELEASE, sample_class.answers("perfect", master_of()))).encode()
BLANK = nbformat.writes(RELEASE).encode()
OTHER_LAB = (ROOT / "labs" / "02_streaming_datasets" / "streaming_datasets.ipynb").read_bytes()


@pytest.fixture
def course(tmp_path, graded_class, monkeypatch) -> Course:
    """A released course with a roster, where nothing is handed in yet."""
    monkeypatch.setenv("EFFNLP_TIMEZONE", "Europe/Berlin")
    root = tmp_path / "course"
    (root / "grading").mkdir(parents=True)
    for name in ("nbgrader_config.py", "gradebook.db"):
        shutil.copy(graded_class.course.root / "grading" / name, root / "grading")
    shutil.copytree(graded_class.course.root / "labs", root / "labs")
    (root / "labs" / "02_streaming_datasets").mkdir()
    (root / "labs" / "02_streaming_datasets" / "streaming_datasets.ipynb").write_bytes(OTHER_LAB)
    (root / "grading" / "roster.csv").write_text(ROSTER)
    made = Course(root)
    with Gradebook(made.db_url) as book:
        book.update_or_create_assignment(LAB, duedate=DUE)
    return made


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, (2026, 10, 5, 12, 0, 0)), data, zipfile.ZIP_DEFLATED)
    return path


def timestamp(course: Course, student: str) -> datetime | None:
    """As nbgrader reads it."""
    return CourseDirectory(root=str(course.root)).get_existing_timestamp(str(course.submission(student, LAB).parent))


@pytest.mark.parametrize(("path", "platform", "name", "user", "prefix"), [
    ("lovelaceada_4711_90210_tokenization-1.ipynb", "canvas", "lovelaceada", "4711", "lovelaceada_4711_90210_"),
    ("lovelaceada_LATE_4711_90210_my_lab_1.ipynb", "canvas", "lovelaceada", "4711", "lovelaceada_LATE_4711_90210_"),
    ("lovelaceada_4711_90210_work.zip/lab.ipynb", "canvas", "lovelaceada", "4711", "lovelaceada_4711_90210_"),
    ("Ada Lovelace_88_assignsubmission_file/lab.ipynb", "moodle", "Ada Lovelace", "88",
     "Ada Lovelace_88_assignsubmission_file"),
    ("Ada Lovelace_88_assignsubmission_file_/sub/lab.ipynb", "moodle", "Ada Lovelace", "88",
     "Ada Lovelace_88_assignsubmission_file_"),
    ("Ada Lovelace_88_assignsubmission_file_lab.ipynb", "moodle", "Ada Lovelace", "88",
     "Ada Lovelace_88_assignsubmission_file_"),
    ("Team 3_7_assignsubmission_file/lab.ipynb", "moodle", "Team 3", "7", "Team 3_7_assignsubmission_file"),
    ("397063-255736 - Mary-Ann Smith - Sep 24, 2026 926 PM/lab.ipynb", "brightspace", "Mary-Ann Smith", "397063",
     "397063-255736 - Mary-Ann Smith - Sep 24, 2026 926 PM"),
    ("397063-255736 - Mary-Ann Smith- Sep 24, 2026 926 PM - lab.ipynb", "brightspace", "Mary-Ann Smith", "397063",
     "397063-255736 - Mary-Ann Smith- Sep 24, 2026 926 PM - "),
    ("397063-255736 - N0123456 - Mary-Ann Smith - 24 September 2026 2126 - lab.ipynb", "brightspace",
     "Mary-Ann Smith", "397063", "397063-255736 - N0123456 - Mary-Ann Smith - 24 September 2026 2126 - "),
    ("397063-255736 - Mary-Ann Smith - lab.ipynb", "brightspace", "Mary-Ann Smith", "397063",
     "397063-255736 - Mary-Ann Smith - "),
    ("ada/tokenization.ipynb", "folder", "", "", ""),
])
def test_names_of_platforms(path, platform, name, user, prefix):
    found = read_name(PurePosixPath(path))
    assert (found.platform, found.name, found.user, found.prefix) == (platform, name, user, prefix)
    assert found.late == ("LATE" in path)
    if "2026" in path:
        assert found.time is not None and found.time.astimezone().date().isoformat() == "2026-09-24"


@pytest.mark.parametrize(("text", "when"), [
    ("Sep 24, 2026 926 PM", "2026-09-24 19:26"), ("24 September 2026 2126", "2026-09-24 19:26"),
    ("Thursday, 24 September 2026, 9:26 PM", "2026-09-24 19:26"), ("2026-12-24T09:26:00Z", "2026-12-24 09:26"),
    ("Dec 24, 2026 1205 AM", "2026-12-23 23:05"), ("-", None), ("Mary-Ann Smith", None), ("lab 2026 x", None)])
def test_times(text, when, monkeypatch):
    monkeypatch.setenv("EFFNLP_TIMEZONE", "Europe/Berlin")
    found = read_time(text)
    assert found is None if when is None else f"{found:%Y-%m-%d %H:%M}" == when


def test_three_platforms_and_their_times(course, tmp_path):
    sheet = tmp_path / "worksheet.csv"
    sheet.write_text("Identifier,Full name,Email address,Status,Grade,Last modified (submission)\n"
                     'Participant 88,Bob van Dyke,bob@example.edu,x,,"Thursday, 1 October 2026, 11:30 PM"\n'
                     'Participant 90,Dan Li,dan2@example.edu,x,,"Friday, 2 October 2026, 11:30 PM"\n')
    files = {
        "lovelaceada_LATE_4711_90210_tokenization.ipynb": SOLVED,
        "Bob van Dyke_88_assignsubmission_file/final (2).ipynb": SOLVED,
        "Bob van Dyke_88_assignsubmission_onlinetext/onlinetext.html": b"<p>hello</p>",
        "Dan Li_90_assignsubmission_file/lab.ipynb": SOLVED,
        "397063-1 - Chloe Sorensen - Sep 24, 2026 926 PM/lab.ipynb": BLANK,
        "397063-1 - Chloe Sorensen - Sep 24, 2026 1026 PM/lab.ipynb": SOLVED,
        "index.html": b"<html></html>",
        "__MACOSX/._lovelaceada_4711_1_tokenization.ipynb": b"junk",
    }
    done = collect(course, LAB, [zipped(tmp_path / "all.zip", files)], worksheet=sheet)
    assert done.not_placed == [] and sorted(done.placed) == ["ada", "bob", "chloe", "dan2"]
    assert timestamp(course, "bob") == datetime(2026, 10, 1, 21, 30)
    assert timestamp(course, "dan2") == datetime(2026, 10, 2, 21, 30)
    assert timestamp(course, "chloe") == datetime(2026, 9, 24, 20, 26)
    assert DUE < timestamp(course, "ada")
    said = "\n".join(done.said)
    assert "ada: canvas says that it is late and not by how much" in said
    assert "bob: It was named final (2).ipynb" in said
    assert "chloe: 2 attempts: 397063-1 - Chloe Sorensen - Sep 24, 2026 1026 PM/lab.ipynb counts, " in said
    assert len(attempts_of(course, LAB, "chloe")) == 2
    with Gradebook(course.db_url) as book:
        assert book.find_student("chloe").last_name == "Sørensen"
    before = {path: path.stat().st_mtime_ns for path in course.submitted.rglob("*.ipynb")}
    again = collect(course, LAB, [tmp_path / "all.zip"])
    assert again.placed == [] and again.unchanged == ["ada", "bob", "chloe"]  # dan2 is found by the worksheet alone
    assert before == {path: path.stat().st_mtime_ns for path in course.submitted.rglob("*.ipynb")}
    assert timestamp(course, "bob") == datetime(2026, 10, 1, 21, 30)  # what an earlier worksheet told is not forgotten


def test_folders_bare_notebooks_and_zips_in_zips(course, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "folder"
    (folder / "ada" / LAB).mkdir(parents=True)
    (folder / "ada" / LAB / "tokenization.ipynb").write_bytes(SOLVED)
    inner = zipped(tmp_path / "inner.zip", {"work/solution.ipynb": SOLVED}).read_bytes()
    zipped(folder / "more.zip", {"van dyke bob_1_2_lab.zip": b"no zip", "vandykebob_99_2_lab.zip": inner})
    bare = tmp_path / "x.ipynb"
    bare.write_bytes(SOLVED)
    monkeypatch.chdir(course.root)
    assert main(["collect", "01", "--zip", str(folder)]) == 1
    said = capsys.readouterr().out
    assert "van dyke bob_1_2_lab.zip: it is no zip that can be opened" in said
    assert main(["collect", "01", "--zip", str(bare)]) == 1
    assert "name the student with --student" in capsys.readouterr().out
    assert main(["collect", "01", "--zip", str(bare), "--student", "dan1"]) == 0
    assert course.students(LAB) == ["ada", "bob", "dan1"]
    with pytest.raises(UsageError, match="nobody is not in the roster"):
        main(["collect", "01", "--zip", str(bare), "--student", "nobody"])
    with pytest.raises(UsageError, match="There is no file"):
        main(["collect", "01", "--zip", str(tmp_path / "none.zip")])


def test_what_cannot_be_placed_is_said_and_the_rest_goes_on(course, tmp_path):
    strange = nbformat.reads(SOLVED.decode(), as_version=4)
    strange.cells = [cell for cell in strange.cells if not cell.source.startswith("check(")]
    for number, cell in enumerate(c for c in strange.cells if c.metadata.get("nbgrader", {}).get("solution")):
        cell.metadata.nbgrader.grade_id, cell["id"], cell.source = f"old_{number}", f"old-{number}", f"x = {number}"
    files = {
        "strangersam_5_1_tokenization.ipynb": SOLVED,
        "lovelaceada_4711_1_streaming_datasets.ipynb": OTHER_LAB,
        "vandykebob_6_1_tokenization.ipynb": nbformat.writes(strange).encode(),
        "sorensenchloe_7_1_lab.ipynb": b"{]",
        "Dan Li_9_assignsubmission_file/lab.ipynb": SOLVED,
        "LATE_anon_Xy12z_5_lab.ipynb": SOLVED,
        "vandykebob_6_2_text.html": b"<p>see attached</p>",
        "vandykebob_6_3_tokenization.ipynb": SOLVED,
    }
    done = collect(course, LAB, [zipped(tmp_path / "bad.zip", files)])
    said = "\n".join(done.not_placed)
    for sentence in ("strangersam (canvas id 5) is not in the roster", "is a notebook of 02_streaming_datasets",
                     "is of another release of 01_tokenization: it has old_0", "is not a notebook",
                     "2 students are called Dan Li: give Moodle's grading worksheet", "handed out without names"):
        assert said.count(sentence) == 1, (sentence, said)
    assert done.placed == ["bob"] and len(done.not_placed) == 6
    assert len(list((course.root / "grading" / "attempts" / LAB).glob("*/refused/*.ipynb"))) == 3


def test_two_at_one_second(course, tmp_path):
    """The one with more filled in counts, whatever the order; of equals the platform's later one; and it is said."""
    files = {"lovelaceada_4711_9_b.ipynb": BLANK, "lovelaceada_4711_8_a.ipynb": SOLVED}
    done = collect(course, LAB, [zipped(tmp_path / "one.zip", files)])
    assert "lovelaceada_4711_8_a.ipynb counts" in done.said[0] and "at the same second" in done.said[0]
    files = {"vandykebob_7_9_b.ipynb": SOLVED, "vandykebob_7_10_a.ipynb": SOLVED + b" "}
    done = collect(course, LAB, [zipped(tmp_path / "two.zip", files)])
    assert "vandykebob_7_10_a.ipynb counts, vandykebob_7_9_b.ipynb is kept" in done.said[0]


def test_nothing_is_overwritten(course, tmp_path):
    """What an instructor put there by hand becomes an attempt; a later one takes its place and keeps it."""
    path = course.submission("ada", LAB)
    path.parent.mkdir(parents=True)
    path.write_bytes(BLANK)
    (path.parent / "timestamp.txt").write_text("2026-09-20 10:00:00 UTC")
    late = {"397063-1 - Ada Lovelace - Sep 24, 2026 926 PM/lab.ipynb": SOLVED}
    text = ROSTER.replace("397063", "").replace("4711,", "4711,397063")
    (course.root / "grading" / "roster.csv").write_text(text)
    done = collect(course, LAB, [zipped(tmp_path / "late.zip", late)])
    kept = list((course.root / "grading" / "attempts" / LAB / "ada").glob("*.ipynb"))
    assert done.placed == ["ada"] and sorted(one.read_bytes() for one in kept) == sorted([BLANK, SOLVED])
    early = {"397063-1 - Ada Lovelace - Sep 22, 2026 926 PM/lab.ipynb": BLANK + b"\n"}
    assert collect(course, LAB, [zipped(tmp_path / "early.zip", early)]).unchanged == ["ada"]
    assert timestamp(course, "ada") == datetime(2026, 9, 24, 19, 26)
    assert len(attempts_of(course, LAB, "ada")) == 3


def test_archives_that_mean_harm(course, tmp_path, monkeypatch):
    """A path that climbs out, a link, a bomb, a zip in zips without end: a sentence each, and nothing outside."""
    monkeypatch.setattr(unpack, "SMALL", 1 << 16)
    bomb = zipped(tmp_path / "bomb.zip", {"lab.ipynb": b"0" * (40 << 20)}).read_bytes()
    deep = zipped(tmp_path / "deep.zip", {"lab.ipynb": SOLVED}).read_bytes()
    for _ in range(5):
        deep = zipped(tmp_path / "deep.zip", {"more.zip": deep}).read_bytes()
    path = tmp_path / "evil.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("../../lovelaceada_4711_1_lab.ipynb", "/etc/lovelaceada_4711_2_lab.ipynb",
                     "..\\lovelaceada_4711_3_lab.ipynb", "C:/lovelaceada_4711_4_lab.ipynb"):
            archive.writestr(name, SOLVED)
        link = zipfile.ZipInfo("lovelaceada_4711_5_lab.ipynb")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("lovelaceada_4711_6_lab.zip", bomb)
        archive.writestr("lovelaceada_4711_7_lab.zip", deep)
        archive.writestr("lovelaceada_4711_8_lab.ipynb", SOLVED)
    done = collect(course, LAB, [path])
    said = "\n".join(done.not_placed)
    assert said.count("climbs out of the archive") == 4 and said.count("links are not followed") == 1
    assert said.count("as zip bombs do") == 1 and said.count("at most 3 deep are opened") == 1
    assert done.placed == ["ada"] and len(attempts_of(course, LAB, "ada")) == 1
    assert not (tmp_path / "lovelaceada_4711_1_lab.ipynb").exists()
    folder = tmp_path / "links"
    folder.mkdir()
    os.symlink(path, folder / "lovelaceada_4711_9_lab.ipynb")
    assert "links are not followed" in collect(course, LAB, [folder]).not_placed[0]
    whole = zipped(tmp_path / "whole.zip", {"lovelaceada_4711_9_lab.ipynb": SOLVED})
    (tmp_path / "cut.zip").write_bytes(whole.read_bytes()[:-40])
    assert "no zip that can be opened" in collect(course, LAB, [tmp_path / "cut.zip"]).not_placed[0]
    (tmp_path / "cut.zip").write_bytes(path.read_bytes()[:-40])  # the end of a zip within it is found instead
    assert collect(course, LAB, [tmp_path / "cut.zip"]).not_placed


def test_the_total_is_limited_too(tmp_path, monkeypatch):
    monkeypatch.setattr(unpack, "MOST_TOTAL", 100_000)
    monkeypatch.setattr(unpack, "MOST_FILES", 5)
    files = {f"{k}.ipynb": os.urandom(40_000) for k in range(8)}
    found = list(unpack.files_in(zipped(tmp_path / "big.zip", files)))
    assert sum(isinstance(one, unpack.Found) for one in found) == 2
    assert "unpacks to more than 100,000 bytes in all" in found[2].why and "more than 5 files" in found[-1].why


def test_a_roster_with_shared_ids(tmp_path):
    path = tmp_path / "roster.csv"
    path.write_text("\ufeffID;Name;Email;Canvas_ID\nada;Ada;a@x;1\nbob;Bob;b@x;2\nada;Ida;i@x;3\ncy;Cy;c@x;2\n"
                    "dora;Dora;d@x;9\ndora;Dora;d@x;9\n../up;Up;u@x;8\n", "utf-8")
    roster = read_roster(path)
    assert set(roster.students) == {"dora"}
    assert roster.problems == [
        "roster.csv, line 7: dora is there twice, word for word: it counts once.",
        "roster.csv, line 8: '../up' cannot be an id: expected letters, digits, and any of _ . @ - between them.",
        "roster.csv, lines 2, 4: id ada is given to 2 students: none of them is used until it is mended.",
        "roster.csv, lines 3, 5: canvas_id 2 is given to 2 students: none of them is used until it is mended."]
    path.write_text("name,email\nAda,a@x\n")
    with pytest.raises(UsageError, match="has no column id: expected the columns id, name, email"):
        read_roster(path)


def test_teams_and_strangers(tmp_path, course):
    path = tmp_path / "teams.csv"
    path.write_text("team,student,lab\nRed,ada,\nRed,stranger,\nRed,bob,\nBlue,bob,\nBlue,chloe,01\nBlue,dan1,99\n")
    roster = read_roster(course.root / "grading" / "roster.csv")
    teams = read_teams(path, roster)
    assert teams.of("bob", LAB).members == ("ada", "bob") and teams.of("chloe", LAB).name == "Blue"
    assert teams.of("chloe", "02_streaming_datasets") is None
    assert len(teams.problems) == 3 and "stranger of team Red is not in the roster" in teams.problems[0]
    assert "bob is in team Red already" in teams.problems[1] and "There is no lab '99'" in teams.problems[2]


def test_a_team_hands_in_together(course, tmp_path):
    """The latest of its members' counts, under the first member; what one had handed in alone is laid aside."""
    first = {"397063-1 - Chloé Sørensen - Sep 24, 2026 926 PM/lab.ipynb": BLANK}
    collect(course, LAB, [zipped(tmp_path / "alone.zip", first)])
    (course.root / "grading" / "teams.csv").write_text("team,student\nTeam 3,bob\nTeam 3,chloe\nTeam 3,ghost\n")
    files = {"Team 3_7_assignsubmission_file/lab.ipynb": SOLVED}
    done = collect(course, LAB, [zipped(tmp_path / "team.zip", files)])
    assert course.students(LAB) == ["bob"] and done.placed == ["bob"]
    said = "\n".join(done.said)
    assert "ghost of team Team 3 is not in the roster" in said and "chloe hands in with a team now" in said
    moved = list((course.root / "grading" / "attempts" / LAB / "chloe").glob("submitted-*/tokenization.ipynb"))
    assert len(moved) == 1 and len(attempts_of(course, LAB, "chloe")) == 1
    told = json.loads(next((course.root / "grading" / "attempts" / LAB / "bob").glob("*.json")).read_text())
    assert told["prefix"] == "Team 3_7_assignsubmission_file" and told["platform"] == "moodle"


def test_a_locked_zip_is_a_sentence(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("lab.ipynb", SOLVED)
    data = bytearray(buffer.getvalue())
    for mark in (b"PK\x03\x04", b"PK\x01\x02"):  # the flag that says "encrypted"
        data[data.index(mark) + (6 if mark[2] == 3 else 8)] |= 1
    path = tmp_path / "locked.zip"
    path.write_bytes(bytes(data))
    [one] = unpack.files_in(path)
    assert "cannot be unpacked" in one.why and "encrypted" in one.why


def test_utc_stays_utc():
    assert read_time("2026-10-01 10:00:00 UTC") == datetime(2026, 10, 1, 10, tzinfo=UTC)


def test_a_made_up_class_to_rehearse_with_is_collected(course, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)  # where the masters are
    assert main(["demo", "--hand-in", str(tmp_path / "trial"), "--size", "11"]) == 0
    done = collect(course, LAB, [tmp_path / "trial" / "canvas.zip"], roster=tmp_path / "trial" / "roster.csv")
    assert len(done.placed) == 10 and not done.not_placed and "s010" not in done.placed
    assert done.placed == course.students(LAB)
