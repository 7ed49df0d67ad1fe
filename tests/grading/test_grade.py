"""Grading a class with plain nbgrader: the judge's points in the gradebook, the pages and the export."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import nbformat
import pytest
from effnlp_grading import sample_class
from effnlp_grading.autograde import grade_class
from effnlp_grading.cli import main
from effnlp_grading.course import environment_with_kit

from effnlp_lab.errors import UsageError

WRITTEN = "written_vocabulary_size"


def test_gradebook_has_the_judges_points(graded_class):
    """The judge, without a notebook, is the oracle; the mixed student's first answer also writes to stderr."""
    grades = graded_class.course.grades(graded_class.lab)
    assert grades["perfect"].score == graded_class.master.lab.checked_points
    assert grades["blank"].score == 0.0
    for student in ("blank", "mixed"):
        expected = sample_class.judged_points(graded_class.master, graded_class.written[student], graded_class.seed)
        assert {name: points for name, (points, _) in grades[student].exercises.items()} == expected
    points = grades["mixed"].exercises.values()
    assert any(0 < got < most for got, most in points), "no partial credit among these answers: choose another mistake"
    assert any(got == most > 0 for got, most in points) and any(got == 0 < most for got, most in points)


def test_submission_without_metadata_is_repaired_and_scored_in_full(own_class):
    """What an editor dropped costs no point; what was mended is told to the instructor."""
    grades = own_class.course.grades(own_class.lab)
    judged = 0.25 + 0.19 + 0.7  # two predictions, and what a person gave the written answer (conftest.py)
    assert grades["crumbled"].score == pytest.approx(own_class.master.lab.checked_points + judged)
    result = grade_class(own_class.course, [(own_class.lab, "crumbled")], device="cpu", force=True, jobs=1,
                         environment={"EFFNLP_SEED": str(own_class.seed)})[0]
    first = own_class.master.lab.exercises[0].name
    assert result.state == "graded" and result.grade == grades["crumbled"]
    lost = (first, WRITTEN)
    assert result.look == tuple(f"The cell {name} had lost its metadata: it is given back." for name in lost)


def test_what_has_not_changed_is_kept(own_class, monkeypatch, capsys):
    monkeypatch.chdir(own_class.course.root / "grading")
    page = own_class.course.feedback("perfect", own_class.lab)
    before = page.stat().st_mtime_ns
    assert main(["grade", "01", "--students", "perfect,blank"]) == 0
    said = capsys.readouterr().out
    assert page.stat().st_mtime_ns == before
    assert said.count("kept") >= 2 and "2 of 2 graded" in said
    with pytest.raises(UsageError, match="no submission of 01_tokenization of nobody"):
        main(["grade", "01", "--students", "nobody"])


def test_feedback_pages_show_the_report(graded_class):
    course, lab = graded_class.course, graded_class.lab
    page = course.feedback("mixed", lab).read_text("utf-8")
    assert f"Score: {round(course.grades(lab)['mixed'].score, 2)}" in page
    assert "First failing case" in page
    assert "forbidden=" not in page and "class CountPairs" not in page


def test_demos_are_not_run(graded_class):
    cells = nbformat.read(graded_class.course.autograded("perfect", graded_class.lab), as_version=4).cells
    demos = [cell for cell in cells if "demo" in cell.metadata.get("tags", [])]
    checks = [cell for cell in cells if cell.cell_type == "code" and cell.metadata.get("nbgrader", {}).get("grade")]
    assert demos and all(not cell.outputs and cell.execution_count is None for cell in demos)
    assert checks and all(cell.outputs for cell in checks)


def test_predictions_earn_points_by_closeness(graded_class):
    """Read from the cell's text; the feedback tells what was measured."""
    from nbgrader.api import Gradebook

    course, lab = graded_class.course, graded_class.lab
    with Gradebook(course.db_url) as book:
        points = {student: {g.name: (g.auto_score, g.max_score) for n in book.find_submission(lab, student).notebooks
                            for g in n.grades if g.name.startswith("predict_")} for student in ("crumbled", "blank")}
    assert points["crumbled"] == {"predict_unknown_words": (0.25, 0.25), "predict_training_speedup": (0.19, 0.25)}
    assert set(points["blank"].values()) == {(0.0, 0.25)}
    page = course.feedback("crumbled", lab).read_text("utf-8")
    assert "my_unknown_words_of_100 = 8, measured: 5 to 15" in page


def test_written_answer_waits_for_a_person(graded_class):
    """The rubric stands above the answer and in no release; a blank is worth 0 at once."""
    from nbgrader.api import Gradebook

    course, lab = graded_class.course, graded_class.lab
    cells = nbformat.read(course.autograded("crumbled", lab), as_version=4).cells
    place = next(i for i, c in enumerate(cells) if c.metadata.get("nbgrader", {}).get("grade_id") == WRITTEN)
    assert cells[place].source == "Forty thousand, and here is why." and "Rubric" in cells[place - 1].source
    assert "Rubric" not in (course.root / "labs" / lab / "tokenization.ipynb").read_text("utf-8")
    with Gradebook(course.db_url) as book:
        assert not book.find_grade(WRITTEN, "tokenization", lab, "blank").needs_manual_grade


def test_export_writes_csv(own_class, tmp_path):
    own_class.course.nbgrader("export")
    with (own_class.course.root / "grading" / "grades.csv").open() as stream:
        rows = {row["student_id"]: row for row in csv.DictReader(stream) if row["assignment"] == own_class.lab}
    for student, one in own_class.course.grades(own_class.lab).items():
        assert float(rows[student]["score"]) == one.score
        assert float(rows[student]["max_score"]) == own_class.master.lab.points


def test_plain_autograde_gives_the_same(own_class):
    """The command as an instructor types it, in grading/ and for one student."""
    course, lab = own_class.course, own_class.lab
    before = course.grades(lab)["mixed"]
    done = subprocess.run([sys.executable, "-m", "nbgrader", "autograde", lab, "--student=mixed", "--force"],
                          cwd=course.root / "grading", capture_output=True, text=True, check=False,
                          env={**environment_with_kit(), "EFFNLP_SEED": str(own_class.seed), "EFFNLP_DEVICE": "cpu"})
    assert done.returncode == 0, done.stderr
    assert course.grades(lab)["mixed"] == before
    course.nbgrader("generate_feedback", lab, "--student=mixed", "--force")


def test_formgrader_answers(own_class, tmp_path):
    """The grading page is served by `jupyter` at the course's root, with the class in it."""
    root, token = own_class.course.root, "a-token-of-this-test"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jupyter", "server", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
               "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", "--allow-root",
               "--ServerApp.jpserver_extensions={'nbgrader.server_extensions.formgrader': True}"]
    places = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=root, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **places})
        try:
            address, page = _get(server, f"http://127.0.0.1:{port}/formgrader", token)
            assert address.endswith("/formgrader/manage_assignments") and "formgrader" in page
            _, listed = _get(server, f"http://127.0.0.1:{port}/formgrader/api/assignments", token)
            ours = next(one for one in json.loads(listed) if one["name"] == own_class.lab)
            assert ours["num_submissions"] == 4 and ours["max_score"] == own_class.master.lab.points
            address, _ = _get(server, f"http://127.0.0.1:{port}/formgrader", "a wrong token")
            assert "/login?" in address
        finally:
            server.terminate()
            server.wait(20)


def _get(server: subprocess.Popen, url: str, token: str) -> tuple[str, str]:
    """Address and text of a page, status 200, of a server on loopback that may still be starting."""
    browser = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, headers={"Authorization": f"token {token}"})
    deadline = time.monotonic() + 60
    while True:
        try:
            with browser.open(request, timeout=30) as answer:
                return answer.geturl(), answer.read().decode("utf-8")
        except urllib.error.HTTPError:
            raise
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, "the server ended, or never listened"
            time.sleep(0.2)
