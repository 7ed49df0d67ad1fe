"""`effnlp release --student-repo`: the course as a repository for students.

It holds the released notebooks, the kit, what checks need, and the part of the grader that says before handing in
what it will say afterwards; neither masters nor solutions, tests, right answers or the instructor's tools. `check`
compares with references on the student's machine, so references are in it, and so are the rooms, which demos run. What
a reference knows of wrong answers is there without the texts: they are a slip away from the solution, and are packed,
which keeps them from being read by accident and from nobody who wants to read them.
"""

from __future__ import annotations

import ast
import base64
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import effnlp_lab
from effnlp_grading.course import Course
from effnlp_grading.submit import UNTOUCHED
from effnlp_lab import exercises
from effnlp_lab.build import INSTRUCTORS
from effnlp_lab.errors import UsageError
from effnlp_lab.master import BEGIN

KIT = Path(effnlp_lab.__file__).resolve().parent
GRADER = Path(__file__).resolve().parent
MARK = ".effnlp-release.json"
README = Path(__file__).with_name("student_readme.md")
PLAIN_FILES = ("LICENSE", "LICENSE-prose", "constraints.txt", "docs/machines.md", ".gitattributes")
SECTIONS_LEFT_OUT = ("[tool.ruff", "[tool.pytest", "[tool.effnlp")
EXTRAS_LEFT_OUT = ("grading", "test")
VARIANTS = """
**Your variant.** In some exercises a detail depends on who you are. Before you start JupyterLab:

```
export EFFNLP_STUDENT=the-name-that-you-hand-in-under EFFNLP_VARIANT_KEY={key}
```
"""
IGNORED = "__pycache__/\n*.py[cod]\n*.egg-info/\n.venv/\n.ipynb_checkpoints/\nbuild/\nreceipt_*.json\n"


def main(course: Course, out: Path) -> int:
    """Write the repository to `out`, over an earlier release there; say what it holds."""
    kit_root = KIT.parent
    if not (kit_root / "pyproject.toml").is_file():
        raise UsageError("`effnlp release` works in a checkout of the kit: the installed package lacks pyproject.toml.")
    out = out.resolve()
    if any(out == place or out in place.parents for place in (course.root, kit_root)) or KIT in (out, *out.parents):
        raise UsageError(f"{out} holds the course itself: name a folder of its own, beside the course.")
    _make_room(out)
    written = [_written(out / name, text) for name, text in _files(course, kit_root)]
    names = sorted(str(path.relative_to(out)) for path in written)
    _written(out / MARK, json.dumps({"version": effnlp_lab.__version__, "files": names}, indent=1).encode() + b"\n")
    labs = [name for name in names if name.startswith("labs/")]
    print(f"{len(names)} files, {len(labs)} labs: {out}\n"
          "References and rooms are in it, because checks and demos run on students' machines.\n"
          f"Publish it: git -C {out} init && git -C {out} add . && git -C {out} commit -m 'The labs'")
    return 0


def _make_room(out: Path) -> None:
    """Remove the files of an earlier release, and nothing else."""
    if not out.exists() or not any(out.iterdir()):
        return
    try:
        names = json.loads((out / MARK).read_text("utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{out} is not empty and holds no earlier release: name a new folder.") from error
    for name in names:
        path = (out / name).resolve()
        if out in path.parents:
            path.unlink(missing_ok=True)


def _files(course: Course, root: Path) -> Iterator[tuple[str, bytes]]:
    """Path in the repository, and bytes."""
    for name in exercises.lab_names():
        lab = exercises.lab(name)
        path = course.root / "labs" / name / f"{lab.notebook}.ipynb"
        if not path.is_file():
            raise UsageError(f"{name} is not released: expected {path}; run `effnlp build {name}`.")
        text = path.read_bytes()
        if BEGIN.encode() in text:
            raise UsageError(f"{path} holds a solution: run `effnlp build {name}`.")
        yield f"labs/{name}/{path.name}", text
        yield f"{UNTOUCHED}/{name}.ipynb", text  # which `effnlp submit` repairs by
    for path in sorted(KIT.rglob("*")):
        inner = path.relative_to(KIT)
        cached = any(part == "__pycache__" or part.startswith(".") for part in inner.parts)
        if path.is_file() and not cached and inner.parts[0] not in INSTRUCTORS:
            yield f"effnlp_lab/{inner}", _of_kit(path)
    for name in sorted({"__init__", "alone", "cli", "course_verbs", "progress", *_needed_by("replay", "submit")}):
        yield f"grading/effnlp_grading/{name}.py", (GRADER / f"{name}.py").read_bytes()
    for path in sorted((GRADER / "inside").glob("*.py")):  # what `submit` runs cells in
        yield f"grading/effnlp_grading/inside/{path.name}", path.read_bytes()
    for name in (*PLAIN_FILES, *(f"docs/labs/{path.name}" for path in sorted((root / "docs" / "labs").glob("*.md")))):
        yield name, (root / name).read_bytes()
    yield "pyproject.toml", _project((root / "pyproject.toml").read_text("utf-8")).encode()
    yield ".gitignore", IGNORED.encode()
    yield "README.md", _readme().encode()


def _of_kit(path: Path) -> bytes:
    if path.name == "sources.json":
        return packed_sources(path.read_text("utf-8")).encode()
    if path.name == "reference.py" and path.parent.parent.name == "exercises":
        return without_changes(path.read_text("utf-8")).encode()
    return path.read_bytes()


def packed_sources(text: str) -> str:
    """sources.json with the known mistakes of each exercise packed; `exercises.sources` unpacks them."""
    told = json.loads(text)
    for texts in told["exercises"].values():
        squeezed = zlib.compress(json.dumps(texts["mistakes"]).encode(), 9)
        texts["mistakes"] = base64.b85encode(squeezed).decode()
    return json.dumps(told, indent=1, ensure_ascii=False) + "\n"


def without_changes(text: str) -> str:
    """A reference's text without the edits that make mistakes of the solution: names and sentences stay."""
    lines = [line.encode() for line in text.splitlines(keepends=True)]
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    data = b"".join(lines)
    places = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Mistake":
            change = node.args[2] if len(node.args) > 2 else None
            change = next((k.value for k in node.keywords if k.arg == "change"), change)
            if change is not None:
                places.append((starts[change.lineno - 1] + change.col_offset,
                               starts[change.end_lineno - 1] + change.end_col_offset))
    for first, last in sorted(places, reverse=True):
        data = data[:first] + b'""' + data[last:]
    ast.parse(data)  # parentheses around a change are not part of it
    return data.decode()


def _needed_by(*names: str) -> set[str]:
    """The modules of this package that some of them import, wherever in their text, themselves included."""
    found, waiting = set(), list(names)
    while waiting:
        module = waiting.pop()
        path = GRADER / f"{module}.py"
        if module in found or not path.is_file():
            continue
        found.add(module)
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("effnlp_grading"):
                rest = (node.module or "").partition(".")[2]
                waiting += [rest] if rest else [one.name for one in node.names]
    return found


def _project(text: str) -> str:
    """pyproject.toml without the tools and the extras of those who write and grade labs."""
    for extra in EXTRAS_LEFT_OUT:
        text = re.sub(rf"(?ms)^{extra} = \[.*?^\]\n", "", text)
    kept = []
    for section in re.split(r"(?m)^(?=\[)", text):
        if section.startswith(SECTIONS_LEFT_OUT):
            if kept:  # the comment above it
                kept[-1] = re.sub(r"(\n#[^\n]*)+\n*\Z", "\n", kept[-1]).rstrip("\n") + "\n\n"
            continue
        kept.append(section)
    return "".join(kept).rstrip("\n") + "\n"


def _readme() -> str:
    rows = "\n".join(f"| `{lab.name}` | {lab.title}: {lab.summary} | {lab.hours:g} |"
                     for lab in map(exercises.lab, exercises.lab_names()))
    key = os.environ.get("EFFNLP_VARIANT_KEY", "")
    variants = VARIANTS.replace("{key}", key) if key else ""
    return README.read_text("utf-8").replace("{labs}", rows).replace("{variants}\n", variants)


def _written(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else None
    path.write_bytes(data)
    return path
