"""`effnlp similarity`: which answers are alike, within the class, with the kit itself, and with past years.

Each exercise is compared by itself (`trees`). What the release gives, what most of the class writes and what Python
code has in common anyway weighs little or nothing; what remains in common, as a share of what the two have in all, is
the score, from 0 to 1. A pair is ranked by the whole lab or by its one most telling exercise, whichever is higher.

A score is no verdict. Short exercises have few right answers, and people may work together: somebody has to read.
"""

from __future__ import annotations

import ast
import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from effnlp_grading.course import Course
from effnlp_grading.repair import RepairError, read_submission
from effnlp_grading.trees import Fragments, defined_in, fragments_of
from effnlp_lab import exercises
from effnlp_lab.errors import UsageError
from effnlp_lab.exercises.spec import Lab

Kind = Literal["class", "past", "kit"]
TEMPLATE = Path(__file__).with_name("similarity.html")
ADDED = "cells of one's own"
DOUBT = 60.0  # weight that two pieces of code have to share before their likeness says something
SEEN = 8  # a class counts as at least so large: in a class of three, two who agree are no majority
OCCURRENCES = 3  # of a fragment that count
COLUMNS = 8192  # fragments compared at a time


@dataclass(frozen=True)
class Author:
    """Whose code it is, and the code: exercise -> text of its cell."""

    name: str
    kind: Kind
    answers: Mapping[str, str]


@dataclass(frozen=True)
class Likeness:
    """Two who wrote alike. `by_exercise` holds the score of each exercise that both solved."""

    one: Author
    other: Author
    score: float
    whole: float
    by_exercise: Mapping[str, float] = field(default_factory=dict)

    @property
    def telling(self) -> list[str]:
        """Exercises from the most alike on, those that are hardly alike left out."""
        return [name for name, score in sorted(self.by_exercise.items(), key=lambda item: -item[1]) if score >= 0.3]


def compare(authors: Sequence[Author], given: Mapping[str, str], most: int = 200) -> list[Likeness]:
    """Pairs of which at least one is of the class, the most alike first.

    given: what the release has in each exercise, which weighs nothing. Raises nothing for code that is not Python: it
    is like nobody's.
    """
    names = sorted({name for author in authors for name in author.answers})
    count = len(authors)
    shared, union, single = np.zeros((count, count)), np.zeros((count, count)), {}
    for name in names:
        documents = [fragments_of(author.answers.get(name, "")) or Fragments() for author in authors]
        mine = [author.kind == "class" for author in authors]
        weights = _weights(documents, mine, fragments_of(given.get(name, "")) or Fragments())
        both, each = _shared(documents, weights)
        either = each[:, None] + each[None, :] - both
        kit = np.array([author.kind == "kit" for author in authors])
        either[:, kit] = each[:, None]  # of a whole module it is enough that the answer is in there
        either[kit, :] = each[None, :]
        present = (each[:, None] > 0) & (each[None, :] > 0)
        single[name] = np.where(present, both / (either + DOUBT), 0.0)
        shared += both
        union += either
    whole = shared / (union + DOUBT)
    best = np.maximum.reduce([whole, *single.values()]) if single else whole
    return _ranked(authors, best, whole, single, most)


def _ranked(authors: Sequence[Author], best: np.ndarray, whole: np.ndarray, single: Mapping[str, np.ndarray],
            most: int) -> list[Likeness]:
    rows, columns = np.triu_indices(len(authors), 1)
    ours = np.array([author.kind == "class" for author in authors])
    keep = ours[rows] | ours[columns]
    rows, columns = rows[keep], columns[keep]
    order = np.lexsort((-whole[rows, columns], -best[rows, columns]))[:most]
    found = []
    for place in order:
        i, j = int(rows[place]), int(columns[place])
        scores = {name: round(float(values[i, j]), 3) for name, values in single.items() if values[i, j] > 0}
        score, of_all = (round(float(values[i, j]), 3) for values in (best, whole))
        found.append(Likeness(authors[i], authors[j], score, of_all, scores))
    return found


def _weights(documents: Sequence[Fragments], ours: Sequence[bool], given: Fragments) -> dict[str, float]:
    """What it says that two share a fragment: more for a large one, less the more of class and kit have it."""
    size = max(SEEN, sum(ours))
    seen = Counter(key for document, mine in zip(documents, ours, strict=True) if mine for key in document.counts)
    common, modules = _background()
    weights = {}
    for document in documents:
        for key, nodes in document.sizes.items():
            if key in weights:
                continue
            spread = 1.0 - math.log(max(seen[key], 2) / 2) / math.log(size / 2)
            rare = math.log((modules + 1) / (common[key] + 1)) / math.log(modules + 1)
            weights[key] = 0.0 if key in given.counts else max(spread, 0.0) * rare * min(nodes, 24)
    return weights


def _shared(documents: Sequence[Fragments], weights: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """Weight that each two documents share [documents, documents], and that each has in all [documents]."""
    number = {key: place for place, key in enumerate(k for k, w in weights.items() if w > 0)}
    weight = np.array([weights[key] for key in number], dtype=np.float32)
    both = np.zeros((len(documents), len(documents)), dtype=np.float64)
    each = np.zeros(len(documents), dtype=np.float64)
    for first in range(0, len(number), COLUMNS):
        part = weight[first : first + COLUMNS]
        counts = np.zeros((len(documents), len(part)), dtype=np.float32)
        for row, document in enumerate(documents):
            for key, count in document.counts.items():
                place = number.get(key, -1) - first
                if 0 <= place < len(part):
                    counts[row, place] = min(count, OCCURRENCES)
        for occurrence in range(1, OCCURRENCES + 1):  # the smaller of two counts, summed occurrence by occurrence
            has = (counts >= occurrence).astype(np.float32)
            both += (has * part) @ has.T
            each += has @ part
    return both, each


@functools.cache
def _background() -> tuple[Counter[str], int]:
    """In how many of the kit's own functions each fragment occurs: what Python code has in common anyway."""
    counts: Counter[str] = Counter()
    number = 0
    for _, source in _functions(_KIT.glob("*/*.py")):
        found = fragments_of(source)
        if found is not None:
            number += 1
            counts.update(found.counts.keys())
    return counts, number


_KIT = Path(exercises.__file__).resolve().parents[1]


def _functions(paths: Iterable[Path]) -> Iterable[tuple[str, str]]:
    """(where it stands, text) of the functions and classes at the top of modules."""
    for path in sorted(paths):
        text = path.read_text("utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield f"{path.parent.name}/{path.name}: {node.name}", ast.get_source_segment(text, node) or ""


def answers_in(data: bytes, lab: Lab, release: Mapping[str, str] | None = None, name: str = "A notebook"
               ) -> dict[str, str]:
    """Exercise -> the code of its cell in a notebook's bytes; functions in a student's own cells under ADDED.

    Cells are found by nbgrader's metadata or by the function that they define. Blanks are left out. Raises RepairError
    for what is no notebook.
    """
    known = {exercise.name for exercise in lab.exercises}
    given = {_squeezed(text) for text in (release or {}).values()}
    found: dict[str, str] = {}
    own = []
    for cell in read_submission(data, name).cells:
        if cell.cell_type != "code" or _squeezed(cell.source) in given:
            continue
        told = cell.metadata.get("nbgrader")
        told = told if isinstance(told, dict) else {}
        defined = defined_in(cell.source)
        answered = [told.get("grade_id"), *defined] if told.get("solution") else defined
        exercise = next((one for one in answered if one in known), None)
        if exercise:
            found[exercise] = f"{found[exercise]}\n\n{cell.source}" if exercise in found else cell.source
        elif defined and not told and "demo" not in cell.metadata.get("tags", []):
            own.append(cell.source)
    return found | ({ADDED: "\n\n".join(own)} if own else {})


def _squeezed(text: str) -> str:
    return "".join(text.split())


def kit_authors(lab: Lab, solved: Path | None) -> list[Author]:
    """The public solution, and each function of the lab's room as an answer to every exercise."""
    found = []
    if solved is not None and solved.is_file():
        found.append(Author("the public solution", "kit", answers_in(solved.read_bytes(), lab)))
    if lab.room:
        for where, source in _functions((_KIT / lab.room).glob("*.py")):
            found.append(Author(f"the kit, {where}", "kit", {exercise.name: source for exercise in lab.exercises}))
    return found


def past_authors(lab: Lab, folder: Path, release: Mapping[str, str]) -> list[Author]:
    """The submissions of a lab in a folder of another year, wherever in it. Raises UsageError where there are none."""
    if not folder.is_dir():
        raise UsageError(f"There is no folder {folder}: --past takes a folder of submitted notebooks.")
    found = []
    for path in sorted(folder.rglob("*.ipynb")):
        if path.parent.name == ".ipynb_checkpoints":
            continue
        try:
            answers = answers_in(path.read_bytes(), lab, release, path.name)
        except RepairError:
            continue
        if answers.keys() - {ADDED}:
            place = path.parent if path.parent.name != lab.name else path.parent.parent
            who = place.relative_to(folder.parent) if place != folder else Path(folder.name) / path.stem
            found.append(Author(str(who), "past", answers))
    if not found:
        raise UsageError(f"{folder} holds no notebook with an answer to {lab.name}: --past takes a folder of submitted "
                         "notebooks, such as last year's grading/submitted.")
    return found


def released(course: Course, lab: Lab) -> tuple[dict[str, str], dict[str, str]]:
    """Of the release: exercise -> its blank cell, and all code cells by id."""
    import nbformat

    path = course.root / "labs" / lab.name / f"{lab.notebook}.ipynb"
    if not path.is_file():
        raise UsageError(f"{lab.name} is not released: expected {path}; run `nbgrader generate_assignment {lab.name}`.")
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    blanks = {cell.metadata.nbgrader.grade_id: cell.source for cell in cells
              if (cell.metadata.get("nbgrader") or {}).get("solution")}
    return blanks, {cell.id: cell.source for cell in cells}


def main(course: Course, lab_name: str, past: Sequence[Path] = (), most: int = 50) -> Path:
    """Compare a lab's submissions, print the most alike, write grading/reports/LAB/similarity.html; return the page."""
    lab = exercises.lab(lab_name)
    students = course.students(lab.name)
    if not students:
        raise UsageError(f"There is no submission of {lab.name} in {course.root}: expected "
                         f"{course.submission('STUDENT', lab.name).relative_to(course.root)}.")
    blanks, release = released(course, lab)
    authors, unread = [], []
    for student in students:
        try:
            answers = answers_in(course.submission(student, lab.name).read_bytes(), lab, release, student)
        except RepairError as error:
            unread.append(f"{student}: not compared: {error}")
            continue
        unread += [f"{student}: {name} is not Python, and is not compared." for name, source in answers.items()
                   if fragments_of(source) is None]
        authors.append(Author(student, "class", answers))
    for folder in past:
        authors += past_authors(lab, folder, release)
    authors += kit_authors(lab, course.root / "solutions" / lab.name / f"{lab.notebook}.ipynb")
    pairs = compare(authors, blanks, most)
    page = write_page(course, lab, pairs, unread, len(students))
    _print(pairs[:20], unread, page)
    return page


def _print(pairs: Sequence[Likeness], unread: Sequence[str], page: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("alike", "whole lab", "one", "other", "most alike in")
    for pair in pairs:
        told = ", ".join(f"{name} {pair.by_exercise[name]:.2f}" for name in pair.telling[:3])
        table.add_row(f"{pair.score:.2f}", f"{pair.whole:.2f}", pair.one.name, pair.other.name, told)
    Console().print(table)
    for sentence in unread:
        print(sentence)
    print(f"The most alike first; a score is no verdict: read both sides. Side by side: {page}")


def write_page(course: Course, lab: Lab, pairs: Sequence[Likeness], unread: Sequence[str], students: int) -> Path:
    """Both sides of each pair, with the lines marked that they have in common."""
    import jinja2

    folder = course.root / "grading" / "reports" / lab.name
    folder.mkdir(parents=True, exist_ok=True)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     undefined=jinja2.StrictUndefined)
    shown = [{"pair": pair, "sides": _sides(pair)} for pair in pairs]
    page = environment.from_string(TEMPLATE.read_text("utf-8")).render(lab=lab, pairs=shown, unread=unread,
                                                                       students=students)
    (folder / "similarity.html").write_text(page, "utf-8")
    return folder / "similarity.html"


def _sides(pair: Likeness) -> list[dict[str, Any]]:
    """The exercises in which two are alike: both texts, line by line, and whether a line is in common."""
    found = []
    for name in pair.telling[:4]:
        texts = [author.answers[name] for author in (pair.one, pair.other)]
        both = [fragments_of(text) or Fragments() for text in texts]
        common = both[0].counts.keys() & both[1].counts.keys()
        sides = [[(line, place in marked) for place, line in enumerate(text.splitlines(), 1)]
                 for text, marked in ((t, _lines(f, common)) for t, f in zip(texts, both, strict=True))]
        found.append({"exercise": name, "score": pair.by_exercise[name], "sides": sides})
    return found


def _lines(fragments: Fragments, common: set[str]) -> set[int]:
    """Lines that hold a fragment of some size which the other side has too."""
    return {line for key in common if fragments.sizes[key] >= 6 for line in fragments.lines.get(key, ())}
