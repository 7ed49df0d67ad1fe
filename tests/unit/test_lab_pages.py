"""The pages to read before a lab say what its spec says, and no lab is longer than an afternoon."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from effnlp_lab import exercises, pages
from effnlp_lab.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
LABS = exercises.lab_names()
WORDS = dict(zip("one two three four five".split(), range(1, 6), strict=True))


def test_pages_are_what_the_specs_say(capsys):
    assert pages.main(check=True) == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", LABS)
def test_every_exercise_is_on_its_page_with_its_figures(name):
    """Read back by hand, not by the code that writes it."""
    lab, text = exercises.lab(name), (ROOT / "docs" / "labs" / f"{name}.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `(\w+)`: .+? (\| \d+ \| \d of 5 \| \S+ \|)$", text, re.MULTILINE))
    wanted = {e.name: f"| {e.minutes} | {e.difficulty} of 5 | {'badge' if e.kind == 'stretch' else f'{e.points:g}'} |"
              for e in lab.exercises if e.twin_of is None}  # fmt: skip
    assert rows == wanted
    assert re.search(rf"\*\*{lab.hours:g} hours?\*\*", text) and lab.prerequisites in text
    assert all(e.name in text for e in lab.exercises)
    about = text.split("\n\n")[1]
    assert 3 <= len(re.findall(r"[.?](?=\s|$)", about)) <= 8 or not lab.graded


@pytest.mark.parametrize("name", LABS)
def test_no_lab_is_over_five_hours(name):
    """The core exercises take their minutes, and reading and measuring the rest."""
    lab = exercises.lab(name)
    core = sum(e.minutes for e in lab.exercises if e.kind == "core" and e.twin_of is None)
    assert core <= 60 * lab.hours <= 60 * pages.MOST_HOURS


@pytest.mark.parametrize("name", [name for name in LABS if exercises.lab(name).graded])
def test_a_notebook_says_the_hours_of_its_spec(name):
    lab = exercises.lab(name)
    master = (ROOT / "solutions" / name / f"{lab.notebook}.py").read_text("utf-8")
    number, half = re.search(r"\*\*Time\.\*\* About (\w+)( and a half)? hours?:", master).groups()
    assert WORDS[number] + (0.5 if half else 0) == lab.hours


def test_the_readme_has_every_graded_lab_with_its_hours():
    readme = (ROOT / "README.md").read_text("utf-8")
    for lab in map(exercises.lab, LABS):
        rows = [line for line in readme.splitlines() if line.startswith(f"| [`{lab.name}`](docs/labs/{lab.name}.md) |")]
        assert all(row.endswith(f"| {lab.hours:g} |") for row in rows)
        assert len(rows) == 1 or not (rows or lab.graded), lab.name


def test_a_page_without_its_place_or_its_machine_is_a_sentence(tmp_path):
    page = tmp_path / "docs" / "labs" / f"{LABS[0]}.md"
    page.parent.mkdir(parents=True)
    page.write_text("# A page\n")
    with pytest.raises(UsageError, match="has no place for what the spec says"):
        list(pages.pages(tmp_path))
    page.write_text(f"# A page\n\n{pages.BEGIN}\n{pages.END}\n\n{pages.MACHINE}\n")
    with pytest.raises(UsageError, match="expected a sentence on what the lab needs"):
        list(pages.pages(tmp_path))
    page.unlink()
    made = dict(pages.pages(tmp_path))  # frames for all of them
    assert made[page].count(f"| `{exercises.lab(LABS[0]).exercises[0].name}`: ") == 1
    assert len(made) == len(LABS) + 1 and "| A laptop |" in made[page.with_name("README.md")]
