"""`effnlp docs`: the pages to read before a lab, docs/labs/NN_name.md, and their index.

What a page says of time, points and exercises is made from the lab's spec, between two comments; all else is written
by hand. The index says what a lab needs in the first sentence of the page's section on the machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from effnlp_lab import exercises
from effnlp_lab.errors import UsageError
from effnlp_lab.exercises.spec import Exercise, Lab

BEGIN, END = "<!-- from the spec, by `effnlp docs` -->", "<!-- end of what the spec says -->"
MACHINE, MEASURED = "## The machine", "## What you will have measured"
MOST_HOURS = 5.0  # of a lab, for a median student
_BLOCK = re.compile(re.escape(BEGIN) + r".*?" + re.escape(END), re.DOTALL)


def main(check: bool = False) -> int:
    """Write pages and index; with `check` only name those that are not what the specs say. Returns 0 or 1."""
    from effnlp_lab.runner import course_root

    root = course_root()
    if not (root / "docs").is_dir():
        raise UsageError("`effnlp docs` works in a checkout of the course: there is no docs/ folder here.")
    stale = [(path, text) for path, text in pages(root) if not path.is_file() or path.read_text("utf-8") != text]
    for path, text in stale:
        print(f"{path.relative_to(root)} is not what the specs say: run `effnlp docs`." if check else
              f"wrote {path.relative_to(root)}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
    return 1 if check and stale else 0


def pages(root: Path) -> Iterator[tuple[Path, str]]:
    """Every page as it should be: its path and its text. A lab without a page gets the frame of one."""
    folder, rows = root / "docs" / "labs", []
    for lab in map(exercises.lab, exercises.lab_names()):
        path = folder / f"{lab.name}.md"
        text = _put(path.read_text("utf-8") if path.is_file() else _frame(lab), facts(lab), path)
        rows.append(_row(lab, needs_of(text, path)))
        yield path, text
    index = folder / "README.md"
    head = ["| lab | hours | core exercises | difficulty | needs |", "|---|---|---|---|---|"]
    yield index, _put(index.read_text("utf-8") if index.is_file() else f"# The labs\n\n{BEGIN}\n{END}\n",
                      "\n".join(head + rows), index)  # fmt: skip


def facts(lab: Lab) -> str:
    """What the spec says of a lab, in words and a table."""
    own = [e for e in lab.exercises if e.twin_of is None]
    core = [e for e in own if e.kind == "core"]
    parts = [f"{_plural(lab.checked_points, 'point')} for {_plural(len(core), 'exercise')}"]
    if lab.predictions:
        parts.append(f"{_plural(sum(p.points for p in lab.predictions), 'point')} for "
                     f"{_plural(len(lab.predictions), 'prediction')}")  # fmt: skip
    if lab.written:
        parts.append(f"{_plural(sum(w.points for w in lab.written), 'point')} for an answer in your own words")
    worth = f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]
    graded = worth if lab.graded else f"not graded ({worth}, to practise)"
    lines = [f"About **{_plural(lab.hours, 'hour')}** for a median student, of which the core exercises take "
             f"{sum(e.minutes for e in core)} minutes; {graded}.", "",
             f"**You should know** {lab.prerequisites}.", "",
             "| exercise | minutes | difficulty | points |", "|---|---|---|---|"]  # fmt: skip
    for one in own:
        twin = next((e for e in lab.exercises if e.twin_of == one.name), None)
        other = f" (or `{twin.name}`, in PyTorch, {twin.minutes} minutes)" if twin else ""
        said = f"`{one.name}`: {one.title}{other}"
        lines.append(f"| {said} | {one.minutes} | {one.difficulty} of 5 | "
                     f"{'badge' if one.kind == 'stretch' else f'{one.points:g}'} |")  # fmt: skip
    return "\n".join(lines)


def needs_of(text: str, path: Path) -> str:
    """The first sentence of a page's section on the machine."""
    section = text.partition(f"\n{MACHINE}\n")[2].split("\n## ")[0].strip()
    first = re.match(r".+?[.](?=\s|$)", " ".join(section.split()))
    if first is None:
        raise UsageError(f"{path} says nothing under {MACHINE!r}: expected a sentence on what the lab needs.")
    return first.group().removesuffix(".")


def _row(lab: Lab, needs: str) -> str:
    core = [e for e in lab.exercises if e.twin_of is None and e.kind == "core"]
    hard = sorted({e.difficulty for e in core})
    spread = f"{hard[0]} to {hard[-1]}" if len(hard) > 1 else f"{hard[0]}"
    return (f"| [{lab.number} {lab.title}]({lab.name}.md) | {lab.hours:g} | {len(core)}, {_minutes(core)} minutes | "
            f"{spread} of 5 | {needs} |")  # fmt: skip


def _minutes(some: list[Exercise]) -> int:
    return sum(e.minutes for e in some)


def _plural(count: float, word: str) -> str:
    return f"{count:g} {word}{'' if count == 1 else 's'}"


def _put(text: str, made: str, path: Path) -> str:
    if len(_BLOCK.findall(text)) != 1:
        raise UsageError(f"{path} has no place for what the spec says: expected the lines {BEGIN} and {END} once.")
    return _BLOCK.sub(lambda _: f"{BEGIN}\n{made}\n{END}", text)


def _frame(lab: Lab) -> str:
    sections = (f"# Lab {lab.number}: {lab.title}", lab.summary or "What the lab is about.", f"{BEGIN}\n{END}", MACHINE,
                "A laptop.", MEASURED, "To be written.")  # fmt: skip
    return "\n\n".join(sections) + "\n"
