"""Points by hand, as an instructor gives them: in JupyterLab, menu Nbgrader, Formgrader, Manual Grading."""

from __future__ import annotations

import time

import pytest
from browsing import SECONDS, chromium, jupyterlab
from effnlp_grading.cli import main
from nbgrader.api import Gradebook

NOTEBOOK, WRITTEN, CHECK, COMMENT = "tokenization", "written_vocabulary_size", "test_count_pairs", "Read hint 2 again."


def test_points_and_a_comment_by_hand(own_class, tmp_path, monkeypatch):
    course, lab = own_class.course, own_class.lab
    before = course.grades(lab)["perfect"]
    with Gradebook(course.db_url) as book:
        submission = book.find_submission_notebook(NOTEBOOK, lab, "perfect").id
    with jupyterlab(course.root, tmp_path) as address, chromium() as browser:
        page = browser.new_page()
        page.set_default_timeout(SECONDS * 1000)
        page.goto(f"{address}lab")
        page.locator("#jupyterlab-splash").wait_for(state="detached")
        page.get_by_role("menuitem", name="Nbgrader").click()
        page.get_by_role("menuitem", name="Formgrader").first.click()
        inside = page.frame_locator('iframe[src*="formgrader"]')
        for name in ("Manual Grading", lab, NOTEBOOK):
            inside.get_by_role("link", name=name, exact=True).click()
        inside.locator(f'a[href*="{submission}"]').first.click()
        for box in [f"#{name}_extra_credit" for name in (WRITTEN, CHECK)] + ["textarea.comment"]:
            inside.locator(f"{box}[placeholder]").first.wait_for()  # set when what was given before has arrived
        for name, points in ((WRITTEN, "0.7"), (CHECK, "0.5")):
            inside.locator(f"#{name}").fill(points)
            inside.locator(f"#{name}").press("Tab")
        comment = inside.locator("textarea.comment").first
        comment.fill(COMMENT)
        comment.press("Tab")
        until = time.monotonic() + SECONDS
        while _given(course, lab) != [[0.7, 0.5], [COMMENT]]:
            assert time.monotonic() < until, f"formgrader saved {_given(course, lab)}"
            time.sleep(0.1)

    assert course.grades(lab)["perfect"].score == pytest.approx(before.score + 0.7 - 0.5)
    monkeypatch.chdir(course.root)
    assert main(["export", "01", "--lms", "canvas", "--out", str(tmp_path / "points.csv")]) == 0
    assert ",perfect,perfect,,10.2" in (tmp_path / "points.csv").read_text("utf-8")
    assert main(["return", "01"]) == 0
    assert COMMENT in course.feedback("perfect", lab).read_text("utf-8")


def _given(course, lab) -> list[list]:
    """What a person gave: points, and comments."""
    with Gradebook(course.db_url) as book:
        notebook = book.find_submission_notebook(NOTEBOOK, lab, "perfect")
        points = {grade.name: grade.manual_score for grade in notebook.grades}
        comments = [one.manual_comment for one in notebook.comments if one.manual_comment]
        return [[points[WRITTEN], points[CHECK]], comments]
