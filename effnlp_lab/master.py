"""Reads a lab's master (Jupytext py:percent), and refuses what would make a bad notebook."""

from __future__ import annotations

import ast
import builtins
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from effnlp_lab import exercises, policy
from effnlp_lab.blanks import STUB
from effnlp_lab.errors import EffnlpError
from effnlp_lab.exercises.closeness import base_name
from effnlp_lab.exercises.reference import Edit, Mistake
from effnlp_lab.exercises.spec import Lab

Kind = Literal["prose", "parameters", "given", "exercise", "check", "demo", "predict", "written"]
BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
_ROW = re.compile(r"^\|[^|]+\| `(\w+)`[^|]*\| ([^|]+?) \| ([^|]+?) \| (\d) of 5 \|$")
_LINE = re.compile(r"^\*(.+?), about (\d+) minutes, difficulty (\d) of 5\.\*")
KEYS = {"exercise", "check", "tags", "needs", "predict", "written"}
TAGS = {"parameters", "demo", "nbval-check-output"}


class MasterError(EffnlpError):
    """A master that cannot be built; the sentence says which cell and why."""


@dataclass(frozen=True)
class Cell:
    """One cell of a master. `name` is the exercise, prediction or question that it belongs to, if any.

    `identity` is what the id of a cell without a name derives from, where that is not its source.
    """

    kind: Kind
    source: str
    name: str | None = None
    tags: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    first_line: int = 0
    identity: str = ""

    @property
    def is_code(self) -> bool:
        return self.kind not in ("prose", "written")

    @property
    def id(self) -> str:
        """A cell id that is the same at every build: from the exercise's name, or from the text."""
        if self.name:
            return f"{self.kind}-{self.name}"
        if self.kind == "parameters":
            return "parameters"
        return f"{self.kind}-{hashlib.sha256((self.identity or self.source).encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Master:
    """A lab's text, taken apart."""

    lab: Lab
    path: Path
    cells: tuple[Cell, ...] = field(repr=False)

    def exercise_cell(self, name: str) -> Cell:
        return next(c for c in self.cells if c.kind == "exercise" and c.name == name)


def read_master(path: Path) -> Master:
    """Parse and validate one master. Raises MasterError with the cell's line and one sentence."""
    import jupytext

    if not path.exists():
        raise MasterError(f"{path.name}: there is no such master; expected solutions/NN_name/name.py.")
    lab = exercises.lab(path.parent.name)
    assistants = policy.policy_of(path.parents[2], lab.name)
    text = path.read_text("utf-8")
    lines = [n for n, line in enumerate(text.splitlines(), 1) if line.startswith("# %%")]
    notebook = jupytext.reads(text, fmt="py:percent")
    skipped = len(notebook.cells) - len(lines)  # text above the first marker is a cell of its own
    if skipped not in (0, 1):
        raise MasterError(f"{path.name}: {len(lines)} cell markers give {len(notebook.cells)} cells; is one malformed?")
    cells = []
    for cell, line in zip(notebook.cells, [1] * skipped + lines, strict=True):
        cells.append(_cell(path, assistants, cell, line))
    master = Master(lab, path, tuple(cells))
    for rule in (_names_are_known, _markers_are_sound, _checks_are_one_line, _no_demo_names, _room_stays_out,
                 _judged_are_known, _figures_are_the_specs):
        rule(master)
    return master


def _fail(path: Path, line: int, sentence: str) -> None:
    raise MasterError(f"{path.name}, line {line}: {sentence}")


def _cell(path: Path, assistants: str, cell: Any, line: int) -> Cell:
    meta = {k: v for k, v in cell.metadata.items() if not k.startswith("lines_to_")}  # jupytext's own
    if "incorrectly_encoded_metadata" in meta:
        _fail(
            path,
            line,
            f"the cell's keys cannot be read: {meta['incorrectly_encoded_metadata']!r}; "
            'write key="value" or key=["a", "b"].',
        )
    for key in meta:
        if key not in KEYS:
            _fail(path, line, f"unknown key {key!r}; a cell may carry {', '.join(sorted(KEYS))}.")
    tags = tuple(meta.get("tags", ()))
    for tag in tags:
        if tag not in TAGS:
            _fail(path, line, f"unknown tag {tag!r}; a cell may carry {', '.join(sorted(TAGS))}.")
    roles = [k for k in ("exercise", "check", "predict", "written") if k in meta]
    roles += [t for t in ("parameters", "demo") if t in tags]
    if len(roles) > 1:
        _fail(path, line, f"the cell is {' and '.join(roles)} at once; make it two cells.")
    needs = tuple(meta.get("needs", ()))
    if needs and "demo" not in tags:
        _fail(path, line, 'needs=[...] belongs to demos; add tags=["demo"] or drop it.')
    if cell.cell_type != "code":
        if roles == ["written"]:
            return Cell("written", cell.source, meta["written"], first_line=line)
        if roles:
            _fail(path, line, f"a markdown cell cannot be {roles[0]}.")
        return Cell("prose", policy.stated(cell.source, assistants), first_line=line, identity=cell.source)
    if "written" in roles:
        _fail(path, line, "a written answer is a markdown cell: # %% [markdown] written=\"name\".")
    if not roles:
        return Cell("given", cell.source, tags=tags, first_line=line)
    return Cell(roles[0], cell.source, meta.get(roles[0]), tags, needs, line)


def _names_are_known(master: Master) -> None:
    """Exercises exist in the spec, appear once, and all appear; checks and needs come after what they name."""
    known = {e.name for e in master.lab.exercises}
    seen: dict[str, set[str]] = {"exercise": set(), "check": set()}
    for cell in master.cells:
        for name in (*([cell.name] if cell.name else []), *cell.needs):
            if name not in known and cell.kind not in ("predict", "written"):
                _fail(
                    master.path,
                    cell.first_line,
                    f"unknown exercise {name!r}; the spec of {master.lab.name} has "
                    f"{', '.join(sorted(known)) or 'none'}.",
                )
        if cell.kind in seen:
            if cell.name in seen[cell.kind]:
                _fail(
                    master.path,
                    cell.first_line,
                    f"a second {cell.kind} cell is called {cell.name!r}; names are used once.",
                )
            seen[cell.kind].add(cell.name)
        if cell.kind == "check" and cell.name not in seen["exercise"]:
            _fail(master.path, cell.first_line, f"the check of {cell.name!r} comes before its exercise.")
        late = [n for n in cell.needs if n not in seen["exercise"]]
        if late:
            _fail(master.path, cell.first_line, f"the demo needs {late[0]!r}, which comes only later.")
    checked = seen["check"] | {e.name for e in master.lab.exercises if e.twin_of in seen["check"]}
    for kind, names in (("exercise", known - seen["exercise"]), ("check", known - checked)):
        if names:
            _fail(master.path, 1, f"the spec has {sorted(names)[0]!r}, and the master has no {kind} cell for it.")


def _markers_are_sound(master: Master) -> None:
    """Solution markers come in pairs, inside functions, in exercise cells alone; the cell defines its exercise."""
    for cell in master.cells:
        begins, ends = cell.source.count(BEGIN), cell.source.count(END)
        if begins != ends:
            _fail(
                master.path, cell.first_line, f"{begins} times {BEGIN!r} and {ends} times {END!r}: they come in pairs."
            )
        if cell.kind != "exercise":
            if begins:
                _fail(
                    master.path, cell.first_line, f'{BEGIN!r} outside an exercise cell; give the cell exercise="name".'
                )
            continue
        if not begins:
            _fail(
                master.path,
                cell.first_line,
                f"exercise {cell.name!r} has no {BEGIN!r}: its solution would be released.",
            )
        tree = _parse(master.path, cell)
        if cell.name not in bound_names(tree):
            _fail(master.path, cell.first_line, f"the cell of exercise {cell.name!r} defines no {cell.name}.")
        for first, last in regions(cell.source):
            if not any(
                isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
                and node.lineno < first
                and last <= (node.end_lineno or 0) + 1
                and node.col_offset < _indent(cell.source, first)
                for node in ast.walk(tree)
            ):
                _fail(master.path, cell.first_line + first, "a blank outside a function; put the markers inside one.")


def regions(source: str) -> list[tuple[int, int]]:
    """First and last lines (from 1, markers included) of the solution regions of a cell."""
    found, first = [], None
    for number, line in enumerate(source.splitlines(), 1):
        if BEGIN in line:
            first = number
        elif END in line and first is not None:
            found.append((first, number))
            first = None
    return found


def _indent(source: str, line: int) -> int:
    text = source.splitlines()[line - 1]
    return len(text) - len(text.lstrip())


def _checks_are_one_line(master: Master) -> None:
    for cell in master.cells:
        if cell.kind != "check":
            continue
        twin = next((e.name for e in master.lab.exercises if e.twin_of == cell.name), None)
        right = f'check("{cell.name}", {cell.name}{f", twin={twin}" if twin else ""})'
        if cell.source.strip() != right:
            _fail(master.path, cell.first_line, f"a check cell is exactly {right}")


def _no_demo_names(master: Master) -> None:
    """No cell that is executed when grading uses a name that only demos define."""
    kept, demos = set(dir(builtins)), set()
    for cell in master.cells:
        if not cell.is_code:
            continue
        tree = _parse(master.path, cell)
        if cell.kind == "demo":
            demos |= bound_names(tree) - kept
            continue
        lost = sorted((free_names(tree) & demos) - kept)
        if lost:
            _fail(
                master.path,
                cell.first_line,
                f"this {cell.kind} cell uses {lost[0]!r}, which only a demo defines: demos are not run when grading.",
            )
        kept |= bound_names(tree)


def _figures_are_the_specs(master: Master) -> None:
    """Points, minutes and difficulty in the table at the top and under an exercise's heading are those of the spec."""
    faults = []
    for place, cell in enumerate(master.cells):
        if cell.kind != "prose":
            continue
        following = next((c.name for c in master.cells[place:] if c.kind == "exercise"), "")
        for number, line in enumerate(cell.source.splitlines(), cell.first_line + 1):
            if said := _ROW.match(line):
                (name, *figures), form = said.groups(), "| {0} | {1} | {2} of 5 |"
            elif said := _LINE.match(line):
                name, figures, form = following, said.groups(), "*{3}, about {1} minutes, difficulty {2} of 5.*"
            else:
                continue
            spec = next((e for e in master.lab.exercises if e.name == name), None)
            if spec is None:
                continue
            worth = "badge" if spec.kind == "stretch" else f"{spec.points:g}"
            spelt = "A badge" if spec.kind == "stretch" else f"{worth} point{'' if spec.points == 1 else 's'}"
            if (*figures,) != (spelt if "{3}" in form else worth, str(spec.minutes), str(spec.difficulty)):
                wanted = form.format(worth, spec.minutes, spec.difficulty, spelt)
                faults.append(f"line {number}: the prose on {name!r} is not what its spec says: write {wanted}")
    if faults:
        raise MasterError(f"{master.path.name}, {'; '.join(faults)}")


def _room_stays_out(master: Master) -> None:
    """Cells outside demos do not import the lab's room: it would answer for the student."""
    if not master.lab.room:
        return
    room = f"effnlp_lab.{master.lab.room}"
    for cell in master.cells:
        if cell.kind in ("prose", "written", "demo"):
            continue
        for node in ast.walk(_parse(master.path, cell)):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
                if isinstance(node, ast.ImportFrom) and node.module
                else []
            )
            if any(n == room or n.startswith(room + ".") for n in names):
                _fail(
                    master.path,
                    cell.first_line,
                    f"a cell outside demos imports {room}, which holds the answers; "
                    'mark it tags=["demo"] or do without.',
                )


def _judged_are_known(master: Master) -> None:
    """Predictions and questions are those of the spec, each once; a prediction's cell assigns what is predicted."""
    for kind, specs in (("predict", master.lab.predictions), ("written", master.lab.written)):
        expected = {one.name: one for one in specs}
        seen: set[str] = set()
        for cell in [c for c in master.cells if c.kind == kind]:
            if cell.name not in expected or cell.name in seen:
                why = "is there twice" if cell.name in seen else "is not in its spec"
                _fail(master.path, cell.first_line, f"{kind}={cell.name!r} {why}; the spec of {master.lab.name} has "
                      f"{', '.join(expected) or 'none'}.")
            seen.add(cell.name)
            if kind == "predict":
                names = {base_name(guess.variable) for guess in expected[cell.name].guesses}
                lost = sorted(names - bound_names(_parse(master.path, cell)))
                if lost:
                    _fail(master.path, cell.first_line, f"the prediction {cell.name!r} does not assign {lost[0]}.")
        for name in expected.keys() - seen:
            _fail(master.path, 1, f"the spec has {name!r}, and the master has no cell {kind}={name!r}.")


def _parse(path: Path, cell: Cell) -> ast.Module:
    try:
        return ast.parse(cell.source)
    except SyntaxError as error:
        _fail(path, cell.first_line + (error.lineno or 0), f"the cell is not Python: {error.msg}.")
        raise


def bound_names(tree: ast.AST) -> set[str]:
    """Names that running a cell defines at its top level."""
    names: set[str] = set()
    for node in _top_level(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(a.asname or a.name).partition(".")[0] for a in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


INNER_SCOPES = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Lambda,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
)


def _top_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the cell runs: not the bodies of functions, classes, lambdas or comprehensions."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if not isinstance(node, INNER_SCOPES):
            yield from _top_level(node)


def loaded_names(tree: ast.AST) -> set[str]:
    """Names that a cell reads, wherever in it."""
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def free_names(tree: ast.Module) -> set[str]:
    """Names that a cell reads and does not define anywhere in itself."""
    stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, (ast.Store, ast.Del))}
    stored |= {
        a.arg
        for n in ast.walk(tree)
        if isinstance(n, ast.arguments)
        for a in (*n.posonlyargs, *n.args, *n.kwonlyargs, *filter(None, (n.vararg, n.kwarg)))
    }
    stored |= {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    stored |= {
        (a.asname or a.name).partition(".")[0]
        for n in ast.walk(tree)
        if isinstance(n, (ast.Import, ast.ImportFrom))
        for a in n.names
    }
    stored |= {n.name for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler) and n.name}
    return loaded_names(tree) - stored


def given_source(master: Master) -> str:
    """What the cells outside exercises, checks and demos define: imports, functions, classes and constants.

    Statements that run the notebook (`device = effnlp_lab.start(...)`, prints) are left out, and so is what is
    computed from them.
    """
    kept, running = [], set()
    for cell in master.cells:
        if cell.kind != "given":
            continue
        for node in ast.parse(cell.source).body:
            loads = loaded_names(node)
            definition = isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))
            constant = isinstance(node, (ast.Assign, ast.AnnAssign)) and "effnlp_lab" not in loads
            if (definition or constant) and not (constant and loads & running):
                kept.append(ast.get_source_segment(cell.source, node) or "")
            else:
                running |= bound_names(ast.Module([node], []))
    return "\n".join(kept) + "\n"


def solution_source(cell: Cell) -> str:
    """The exercise's cell without its markers."""
    return "\n".join(line for line in cell.source.splitlines() if BEGIN not in line and END not in line) + "\n"


def blank_source(cell: Cell) -> str:
    """The exercise's cell as it is released: each region becomes the stub."""
    lines, out, inside = cell.source.splitlines(), [], False
    for line in lines:
        if BEGIN in line:
            inside = True
            out.append(line[: len(line) - len(line.lstrip())] + STUB)
        elif END in line:
            inside = False
        elif not inside:
            out.append(line)
    return "\n".join(out)


def mistaken_source(master: Master, name: str, mistake: Mistake) -> str:
    """The exercise's cell with a known mistake in place of the solution. An edit that does not fit once is refused."""
    source = solution_source(master.exercise_cell(name))
    if isinstance(mistake.change, str):
        return mistake.change.strip("\n") + "\n"
    for change in (mistake.change,) if isinstance(mistake.change, Edit) else mistake.change:
        count = source.count(change.old)
        if count != 1:
            raise MasterError(
                f"{master.path.name}: mistake {mistake.name!r} of {name} edits {change.old!r}, which occurs "
                f"{count} times in the solution; it has to occur once."
            )
        source = source.replace(change.old, change.new)
    compile(source, f"{name}: {mistake.name}", "exec")
    return source


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
