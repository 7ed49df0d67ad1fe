"""What the documentation points at is there: files, headings, pictures, and every command with its options."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest
import typer

from effnlp_lab.cli import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md"),
                *(ROOT / "effnlp_lab").rglob("*.md"), ROOT / "grading/effnlp_grading/student_readme.md"])
LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(<?([^)<>\s]+)>?\)")
COMMAND = re.compile(r"(?:^|[\s`(/])(?:effnlp|python3? -m effnlp_lab) +([^`\n#]+)")
TO_PYTEST = {"test"}  # whose further options are another program's


def without_code(text: str) -> str:
    return re.sub(r"(?ms)^```.*?^```$|`[^`\n]*`", "", text)


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    found: dict[str, int] = {}
    names = set()
    for title in re.findall(r"(?m)^#{1,6} +(.+?) *#*$", re.sub(r"(?ms)^```.*?^```$", "", page.read_text("utf-8"))):
        name = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()).replace(" ", "-")
        names.add(f"{name}-{found[name]}" if name in found else name)
        found[name] = found.get(name, 0) + 1
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_lead_somewhere(page):
    text, dead = without_code(page.read_text("utf-8")), []
    base = ROOT if page.name == "student_readme.md" else page.parent  # it becomes the README of a repository
    for link in LINK.findall(text):
        path, _, anchor = unquote(link).partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = base / path if path else page
        if not target.exists() or ROOT not in (target.resolve(), *target.resolve().parents):
            dead.append(link)
        elif anchor and anchor not in anchors(target):
            dead.append(link)
    assert not dead


def test_every_page_is_reached_from_the_readme():
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop().resolve()
        if page in seen or page.suffix != ".md" or not page.is_file():
            continue
        seen.add(page)
        waiting += [page.parent / link.partition("#")[0] for link in LINK.findall(page.read_text("utf-8"))
                    if "://" not in link]  # fmt: skip
    assert not [str(page) for page in (ROOT / "docs").rglob("*.md") if page.resolve() not in seen]


def options() -> dict[str, set[str]]:
    """Verb -> its options; those of the grader's verbs from the grader's own command line."""
    from effnlp_grading.cli import app as grader

    found: dict[str, set[str]] = {}
    for one in (app, grader):
        for name, command in typer.main.get_command(one).commands.items():
            named = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
                     if option.startswith("-")}  # fmt: skip
            found[name] = found.get(name, set()) | named | {"--help"}
    return found


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(verb, options) of each command in a text: `effnlp VERB ...`, in a line or between backticks."""
    found = []
    for words in COMMAND.findall(text):
        words = re.split(r"\s\|\s|\s{2,}|;|&&|, |: |\)", words)[0]
        try:
            parts = shlex.split(words)
        except ValueError:
            parts = words.split()
        if parts and re.fullmatch(r"[a-z][a-z-]*", parts[0]):
            found.append((parts[0], [p.partition("=")[0] for p in parts[1:] if re.match(r"--?[a-z]", p)]))
    return found


def told() -> list[tuple[str, str]]:
    texts = [(str(page.relative_to(ROOT)), page.read_text("utf-8")) for page in PAGES]
    made = subprocess.run(["git", "ls-files", "*.yml", "Makefile", ".ci/run"], cwd=ROOT, capture_output=True, text=True,
                          check=False).stdout.split()  # fmt: skip
    return texts + [(name, (ROOT / name).read_text("utf-8")) for name in made]


def test_every_command_that_is_named_exists_with_its_options():
    known, wrong, seen = options(), [], 0
    prose = {"is", "in", "and", "itself", "says", "has", "works", "command"}
    for place, text in told():
        fenced = "\n".join(re.findall(r"(?ms)^```\w*\n(.*?)^```$", text)) if place.endswith(".md") else text
        quoted = "\n".join(f"`{q}`" for q in re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^```.*?^```$", "", text)))
        for verb, given in commands(f"{fenced}\n{quoted}" if place.endswith(".md") else fenced):
            seen += 1
            if verb not in known and verb not in prose:
                wrong.append(f"{place}: effnlp {verb}")
            elif verb in known and verb not in TO_PYTEST:
                wrong += [f"{place}: effnlp {verb} {one}" for one in given if one not in known[verb]]
    assert not wrong and seen > 60


def test_options_that_stand_beside_a_verb_in_the_readmes_table_exist():
    known = options()
    for row in re.findall(r"(?m)^\| `effnlp ([a-z-]+)[^|]*\|(.*)\|$", (ROOT / "README.md").read_text("utf-8")):
        named = re.findall(r"`(--[a-z-]+)", row[1])
        assert set(named) <= known[row[0]] | ({"--device"} if row[0] == "test" else set()), row


@pytest.mark.parametrize(("text", "expected"), [
    ("effnlp grade 01 --students ada,grace --force     # again", [("grade", ["--students", "--force"])]),
    ("`.venv/bin/effnlp doctor`", [("doctor", [])]),
    ("`python3 -m effnlp_lab bench adapters --nonsense=3`", [("bench", ["--nonsense"])]),
    ("effnlp_lab is a package", []),
])  # fmt: skip
def test_commands_are_found(text, expected):
    assert commands(text) == expected
