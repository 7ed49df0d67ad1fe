"""Rebuilds a submission from the release: what Colab, VS Code or a hand edit lost, doubled, moved or changed.

The release says which cells there are, in which order, locked or not, and what they are worth. From the submission come
the answers and whatever cells the student added. Everything that had to be mended is told in a sentence, and so is
what cannot be: an answer cell that is not there, a file that is no notebook of this lab.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbformat import NotebookNode, from_dict

from effnlp_lab import policy
from effnlp_lab.errors import UsageError

MOST_BYTES = 64 << 20
MOST_CELLS = 5_000
_DIGEST = re.compile(r"(?:prose|given|demo)-([0-9a-f]{12})(?:-\d+)?")
_CHECK = re.compile(r"^\s*check\(\s*['\"](\w+)['\"]")


class RepairError(UsageError):
    """A submission that cannot be rebuilt; the sentence names it and says why."""


@dataclass
class Repaired:
    """The rebuilt notebook, what was mended, and the exercises whose answer is nowhere in the submission."""

    notebook: NotebookNode
    mended: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    @property
    def sentences(self) -> list[str]:
        gone = [f"The answer cell of {name} is gone: it counts as not attempted." for name in self.lost]
        return [*self.mended, *gone]


def read_submission(data: bytes, name: str = "The submission") -> NotebookNode:
    """A notebook from a file's bytes, of any version of the format, made whole where fields are missing.

    Raises RepairError for whatever is no notebook.
    """
    if len(data) > MOST_BYTES:
        raise RepairError(f"{name} has {len(data):,} bytes, and at most {MOST_BYTES:,} are read: clear its outputs.")
    try:
        raw = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError, MemoryError) as error:
        raise RepairError(f"{name} is not a notebook: it is not JSON ({_told(error)}).") from error
    if not isinstance(raw, dict):
        raise RepairError(f"{name} is not a notebook: expected an object with cells, found {type(raw).__name__}.")
    cells = raw.get("cells")
    if cells is None and isinstance(raw.get("worksheets"), list):  # version 3
        sheets = [sheet for sheet in raw["worksheets"] if isinstance(sheet, dict)]
        cells = [cell for sheet in sheets for cell in (sheet.get("cells") or [])]
    if not isinstance(cells, list):
        raise RepairError(f"{name} is not a notebook: it has no list of cells.")
    if len(cells) > MOST_CELLS:
        raise RepairError(f"{name} has {len(cells):,} cells, and at most {MOST_CELLS:,} are read.")
    whole = [cell for cell in map(_whole_cell, cells) if cell is not None]
    return from_dict({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": whole})


def repair(submission: NotebookNode, release: NotebookNode, name: str = "The submission") -> Repaired:
    """Rebuild `submission` on `release`. Raises RepairError where nothing in it belongs to the release."""
    places = Places(release)
    matched = [places.match(cell) for cell in submission.cells]
    places.fill_written(submission.cells, matched)
    if places.solutions and not any(m is not None for m in matched):
        raise RepairError(f"{name} has no cell of the released notebook: it is another notebook, or an empty one.")
    return _Builder(submission, release, matched, places).build()


def repair_file(path: Path, release: NotebookNode) -> Repaired:
    """`read_submission` and `repair` of a file."""
    return repair(read_submission(path.read_bytes(), path.name), release, path.name)


class Places:
    """Finds the place in the release that a submitted cell belongs to."""

    def __init__(self, release: NotebookNode) -> None:
        self.by_grade_id: dict[str, int] = {}
        self.by_id: dict[str, int] = {}
        self.by_source: dict[tuple[str, str], int] = {}
        self.by_name: dict[str, int] = {}
        self.by_variable: dict[str, int] = {}
        self.checks: dict[str, int] = {}
        self.solutions: list[int] = []  # places that students fill: answers, predictions, written answers
        self.written: list[int] = []
        for place, cell in enumerate(release.cells):
            nbgrader = cell.metadata.get("nbgrader") or {}
            if nbgrader.get("grade_id"):
                self.by_grade_id[nbgrader["grade_id"]] = place
            self.by_id.setdefault(cell.get("id", ""), place)
            self.by_source.setdefault((cell.cell_type, plain(cell.source)), place)
            if (cell.metadata.get("effnlp") or {}).get("predict"):
                self.solutions.append(place)
                self.by_variable |= dict.fromkeys(_assigned(cell.source), place)
            elif nbgrader.get("solution"):
                self.solutions.append(place)
                self.by_name[nbgrader["grade_id"]] = place
                if cell.cell_type == "markdown":
                    self.written.append(place)
            elif nbgrader.get("grade") and (found := _CHECK.match(cell.source)):
                self.checks[found.group(1)] = place

    def match(self, cell: NotebookNode) -> int | None:
        """By nbgrader's metadata, the cell's id, its text, the check that it calls, or the function that it defines."""
        nbgrader = cell.metadata.get("nbgrader")
        grade_id = nbgrader.get("grade_id") if isinstance(nbgrader, dict) else None
        if isinstance(grade_id, str) and grade_id in self.by_grade_id:
            return self.by_grade_id[grade_id]
        if cell.get("id") in self.by_id and self._plausible(cell, self.by_id[cell["id"]]):
            return self.by_id[cell["id"]]
        place = self.by_source.get((cell.cell_type, plain(cell.source)))
        if place is not None:
            return place
        if cell.cell_type == "code":
            called = _CHECK.match(cell.source)
            if called and called.group(1) in self.checks and len(cell.source.strip().splitlines()) == 1:
                return self.checks[called.group(1)]
            defined = [self.by_name[name] for name in _defined(cell.source) if name in self.by_name]
            defined += [self.by_variable[name] for name in _assigned(cell.source) if name in self.by_variable]
            if defined:
                return defined[0]
        return None

    def fill_written(self, cells: Sequence[NotebookNode], matched: list[int | None]) -> None:
        """A written answer that lost id and metadata: prose of the student's right behind the question."""
        for place in self.written:
            if place in matched or place - 1 not in matched:
                continue
            after = matched.index(place - 1) + 1
            if after < len(cells) and matched[after] is None and cells[after].cell_type == "markdown":
                matched[after] = place

    def _plausible(self, cell: NotebookNode, place: int) -> bool:
        """A cell keeps its id when a student empties and reuses it: for an answer, it must still be code."""
        return cell.cell_type == "code" or place not in self.solutions or place in self.written


class _Builder:
    def __init__(self, submission: NotebookNode, release: NotebookNode, matched: Sequence[int | None],
                 places: Places) -> None:
        self.submission, self.release, self.matched, self.places = submission, release, matched, places
        self.mended: list[str] = []
        self.chosen: dict[int, int] = {}  # an answer's place in the release -> the submitted cell that fills it
        self.extra: dict[int, list[int]] = {}  # a place in the release (-1: the start) -> cells that follow it

    def build(self) -> Repaired:
        self._choose()
        lost = [self._name(place) for place in self.places.solutions if place not in self.chosen]
        self._compare()
        cells = [self._added(index) for index in self.extra.get(-1, [])]
        for place, cell in enumerate(self.release.cells):
            mine = copy.deepcopy(cell)
            if place in self.chosen:
                mine.source = self.submission.cells[self.chosen[place]].source
            cells.append(mine)
            cells += [self._added(index) for index in self.extra.get(place, [])]
        notebook = NotebookNode(nbformat=4, nbformat_minor=5, metadata=copy.deepcopy(self.release.metadata),
                                cells=_unique_ids(cells))
        return Repaired(notebook, list(dict.fromkeys(self.mended)), lost)

    def _choose(self) -> None:
        """Which submitted cell fills which place; all other cells of the student's follow the one before them."""
        last = -1
        for index, place in enumerate(self.matched):
            cell = self.submission.cells[index]
            if place is None:
                if cell.source.strip() and not _was_released(cell):
                    self.extra.setdefault(last, []).append(index)
                continue
            if place in self.places.solutions:
                if place not in self.chosen:
                    self.chosen[place] = index
                elif self._is_blank(self.chosen[place], place) and not self._is_blank(index, place):
                    self.mended.append(f"The cell of {self._name(place)} was there twice: the one that is filled in "
                                       "counts.")
                    self.chosen[place] = index
                elif not self._is_blank(index, place):  # both run, in their order, as they did for the student
                    self.mended.append(f"The cell of {self._name(place)} was there twice: both are run, in their "
                                       "order.")
                    self.extra.setdefault(place, []).append(index)
                else:
                    self.mended.append(f"The cell of {self._name(place)} was there twice: the blank one is left out.")
            last = place

    def _compare(self) -> None:
        """Say what differs from the release besides answers."""
        seen: dict[int, int] = {}
        for index, place in enumerate(self.matched):
            if place is None:
                continue
            cell, right = self.submission.cells[index], self.release.cells[place]
            name = self._name(place)
            if place in seen and place not in self.places.solutions and right.metadata.get("nbgrader"):
                self.mended.append(f"The cell {name} was there twice: it counts once.")
            seen[place] = index
            if not right.metadata.get("nbgrader"):
                continue
            if not cell.metadata.get("nbgrader"):
                self.mended.append(f"The cell {name} had lost its metadata: it is given back.")
            elif _essence(cell.metadata["nbgrader"]) != _essence(right.metadata["nbgrader"]) and not _had_other_points(
                    cell, right):  # fmt: skip
                self.mended.append(f"The metadata of the cell {name} had been changed: the release's counts.")
            if place not in self.places.solutions and plain(cell.source) != plain(right.source):
                self.mended.append(f"The locked cell {name} had been changed: the release's is run.")
        graded = [p for p, c in enumerate(self.release.cells) if (c.metadata.get("nbgrader") or {}).get("locked")
                  or (c.metadata.get("nbgrader") or {}).get("grade")]
        for place in graded:
            if place not in seen:
                self.mended.append(f"The cell {self._name(place)} was missing: it is put back.")
        order = [place for place in self.matched if place is not None and self.release.cells[place].metadata.get(
            "nbgrader")]
        if order != sorted(order):
            self.mended.append("Cells were in another order than in the release: the release's order counts.")

    def _added(self, index: int) -> NotebookNode:
        cell = copy.deepcopy(self.submission.cells[index])
        cell.metadata = NotebookNode({"tags": [t for t in _tags(cell) if t == "demo"]} if _tags(cell) else {})
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        return cell

    def _is_blank(self, index: int, place: int) -> bool:
        return plain(self.submission.cells[index].source) in ("", plain(self.release.cells[place].source))

    def _name(self, place: int) -> str:
        cell = self.release.cells[place]
        return (cell.metadata.get("nbgrader") or {}).get("grade_id") or cell.get("id", str(place))


def _whole_cell(raw: Any) -> dict[str, Any] | None:
    """A cell with all its fields, of the kinds that the format has; None for what is no cell."""
    if not isinstance(raw, dict):
        return None
    kind = raw.get("cell_type")
    source = raw.get("source", raw.get("input", ""))
    if isinstance(source, list):
        source = "".join(part for part in source if isinstance(part, str))
    if not isinstance(source, str):
        source = ""
    source = source.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate cannot be written again
    metadata = raw.get("metadata") if isinstance(raw.get("metadata"), dict) else {}
    identity = raw.get("id")
    cell: dict[str, Any] = {
        "cell_type": kind if kind in ("code", "raw") else "markdown", "source": source,
        "metadata": metadata, "id": identity if isinstance(identity, str) else ""}
    if cell["cell_type"] == "code":
        cell |= {"outputs": [], "execution_count": None}
    return cell


def _was_released(cell: NotebookNode) -> bool:
    """Whether the kit wrote a cell as it stands, in another release: its id is a digest of its text (`master.Cell`)."""
    digest = _DIGEST.fullmatch(cell.get("id", ""))
    text = re.sub(r"\A%%demo.*\n", "", cell.source)
    spelt = [text, *(text.replace(words, policy.PLACE) for words in policy.POLICIES.values())]
    return digest is not None and digest[1] in {hashlib.sha256(one.encode()).hexdigest()[:12] for one in spelt}


def _had_other_points(cell: NotebookNode, right: NotebookNode) -> bool:
    """Whether a cell differs from the release's in its points alone, and was released so, by nbgrader's checksum."""
    with contextlib.suppress(Exception):  # a student's metadata may be anything, and students have no nbgrader
        from nbgrader.utils import compute_checksum

        mine, points = cell.metadata["nbgrader"], right.metadata["nbgrader"].get("points")
        return (_essence({**mine, "points": points}) == _essence(right.metadata["nbgrader"])
                and compute_checksum(cell) == mine["checksum"])  # fmt: skip
    return False


def _unique_ids(cells: Iterable[NotebookNode]) -> list[NotebookNode]:
    taken: set[str] = set()
    found = []
    for number, cell in enumerate(cells):
        identity = cell.get("id", "")
        if not re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", identity) or identity in taken:
            identity = f"added-{number}"
        taken.add(identity)
        cell["id"] = identity
        found.append(cell)
    return found


def _tags(cell: NotebookNode) -> list[str]:
    tags = cell.metadata.get("tags")
    return [t for t in tags if isinstance(t, str)] if isinstance(tags, list) else []


def _essence(nbgrader: Any) -> Any:
    keys = ("grade", "grade_id", "locked", "points", "solution", "task")
    return [nbgrader.get(key) for key in keys] if isinstance(nbgrader, dict) else None


def plain(source: str) -> str:
    """A cell's text without what editors change: space at the ends of lines and of the cell."""
    return "\n".join(line.rstrip() for line in source.strip().splitlines())


def _defined(source: str) -> list[str]:
    """Functions and classes that a cell defines at its top."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return re.findall(r"^(?:def|class)\s+(\w+)", source, re.MULTILINE)
    return [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))]


def _assigned(source: str) -> list[str]:
    """Names that a cell assigns at its top."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return re.findall(r"^(my_\w+)\s*=[^=]", source, re.MULTILINE)
    return [t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)]


def _told(error: BaseException) -> str:
    return str(error)[:120] or type(error).__name__
