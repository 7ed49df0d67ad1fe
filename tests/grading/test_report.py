"""The report of the demonstration: whole in its folder, readable without seeing it, and true to the gradebook."""

from __future__ import annotations

import base64
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from browsing import barriers_of
from bs4 import BeautifulSoup
from effnlp_grading import demo, report, sample_class
from effnlp_grading.class_report import write_class_report
from effnlp_grading.results import Result

from effnlp_lab.device import resolve
from effnlp_lab.notebook.receipt import Receipt
from effnlp_lab.runner import Outcome

PNG = b"\x89PNG not much of a picture"
ALT = 'A line that rises: "a < b".'


@pytest.fixture
def shown(own_class, tmp_path) -> demo.Demonstration:
    run = tmp_path / "run"
    run.mkdir()
    Receipt("01", title="A receipt").add("baseline", seconds=2.0).add("yours", seconds=1.0).save(run)
    data = base64.b64encode(PNG).decode()
    image = f'<img src="data:image/png;base64,{data}" alt="A line that rises: &quot;a &lt; b&quot;."/>'
    output = nbformat.v4.new_output("display_data", {"text/html": image, "text/plain": "Figure"})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("", outputs=[output])])
    nbformat.write(notebook, run / f"{own_class.master.lab.notebook}.ipynb")
    lab = own_class.lab
    grades = own_class.course.grades(lab)
    results = [Result(student, lab, "graded", 1.0, "", grades[student]) for student in ("perfect", "blank")]
    results.append(Result("student_1", lab, "not graded", 1.0, "the kernel <died>"))
    outcome = Outcome(lab, "ok", 3.0, folder=str(run))
    return demo.Demonstration(own_class.course, resolve("cpu", "1"), [own_class.master.lab], [outcome], results)


def test_report_is_whole_and_accessible(shown, tmp_path):
    page = report.write(shown, tmp_path / "report")
    tree = BeautifulSoup(page.read_text("utf-8"), "html.parser")
    links = [tag.get("href") or tag.get("src") for tag in tree.select("[href], [src]")]
    assert len(links) > 5
    for link in links:
        target = tree.find(id=link[1:]) if link.startswith("#") else (page.parent / unquote(link)).is_file()
        assert target, f"{link} leads nowhere"
    assert tree.html["lang"] == "en" and len(tree.select("h1")) == 1 and tree.find("main")
    assert [image["alt"] for image in tree.select("img")] == [ALT]
    assert (page.parent / "plots" / "01_tokenization_1.png").read_bytes() == PNG
    assert all(table.caption for table in tree.select("table"))
    assert all(cell.get("scope") for cell in tree.select("th"))
    assert "your answer" in tree.text and "(0.5 of baseline)" in tree.text


def test_no_page_about_a_class_has_a_barrier(shown, own_class, tmp_path):
    """In Chromium, by axe-core: the report, the class's report, and what nbgrader makes of our feedback."""
    page = report.write(shown, tmp_path / "report")
    feedback = sorted((page.parent / "feedback").rglob("*.html"))
    results = {result.student: result for result in shown.results}
    about_class = write_class_report(own_class.course, own_class.lab, results)
    assert feedback and barriers_of(page, about_class) == {}
    ours = [".output_area", ".text_cell_render"]
    assert barriers_of(*feedback[:1], inside=ours, outside=[".anchor-link"]) == {}  # nbconvert's mark at headings


def test_report_says_what_the_gradebook_holds(shown, tmp_path):
    shown.problems.append("student_1: the kernel <died>")
    page = report.write(shown, tmp_path / "report")
    tree = BeautifulSoup(page.read_text("utf-8"), "html.parser")
    rows = {row.th.contents[0]: row.text for row in tree.select("tbody tr") if row.th}
    assert "part of the points" in rows["perfect"] and "10 of 11.5" in rows["perfect"]  # nothing predicted or written
    assert "no points" in rows["blank"] and "0 of 11.5" in rows["blank"]
    assert "not graded: the kernel <died>" in rows["student_1"]
    assert tree.select_one(".bad").li.text == "student_1: the kernel <died>"
    assert not tree.select(".good")


@pytest.mark.parametrize(("score", "most", "words"), [
    (0.0, 5.0, "no points"), (5.0, 5.0, "full points"), (2.5, 5.0, "part of the points")])
def test_points_in_words(score, most, words):
    assert report.points_in_words(score, most) == words


def test_class_makes_its_mistakes_in_turn(master):
    exercise = max(master.lab.exercises, key=lambda one: len(sample_class.mistakes_of(master.lab, one.name))).name
    names = list(sample_class.mistakes_of(master.lab, exercise))
    made = [sample_class.mistake_of(student, master.lab, exercise) for student in sample_class.MISTAKEN]
    assert made == [names[k % len(names)] for k in range(6)]
    written = sample_class.answers("student_2", master)[exercise]
    assert written == sample_class.mistakes_of(master.lab, exercise)[names[1 % len(names)]].strip("\n")
    assert sample_class.answers("blank", master) == {}


def test_labs_of_the_demonstration_are_few():
    root = Path(__file__).resolve().parents[2]
    assert {lab.number for lab in demo._labs(root)} <= {"00", "01", "06"}
