"""`effnlp build`: from a lab's master to the solution notebook, the release and the texts that checks need.

Sources and metadata depend on the master and the spec alone: two builds give the same bytes on every Python version.
Outputs are a separate matter: `--execute` refreshes them, and a plain build carries them over while a digest of the
code still matches.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from effnlp_lab import exercises
from effnlp_lab.blanks import STUB, TEXT_STUB
from effnlp_lab.errors import EffnlpError
from effnlp_lab.master import (
    Cell,
    Master,
    MasterError,
    blank_source,
    bound_names,
    free_names,
    given_source,
    mistaken_source,
    read_master,
    solution_source,
)
from effnlp_lab.opening import open_anywhere

PACKAGE = Path(__file__).parent
ROOT = PACKAGE.parent
INSTRUCTORS = {"audit.py", "build.py", "gpurun", "master.py", "mutate.py", "mutation", "new_lab.py", "new_lab_texts.py",
               "opening.py", "pages.py"}  # fmt: skip
"""Modules and rooms of the kit that no notebook needs: students do not get them."""
SHOWS = re.compile(r"^(print|check|plots\.show|receipt\.show)\(", re.MULTILINE)
"""Of a cell's source: it surely has an output."""
WIDGET = "application/vnd.jupyter.widget-view+json"


def main(labs: Sequence[str] = (), check: bool = False, execute: bool = False, device: str = "auto",
         jobs: int | None = None, root: Path = ROOT) -> int:  # fmt: skip
    """Build the named labs (all by default). With `check` nothing is written and stale files are listed: exit 1."""
    if not (root / "solutions").is_dir():
        raise EffnlpError("`effnlp build` works in a checkout of the repository: there is no solutions/ folder here.")
    names = [exercises.lab(n).name for n in labs] or exercises.lab_names()
    masters = [read_master(root / "solutions" / name / f"{exercises.lab(name).notebook}.py") for name in names]
    if check:
        stale = [sentence for master in masters for sentence in _stale_files(master, root)]
        print("\n".join([*stale, f"build --check: {len(stale)} stale" if stale else
                         f"build --check: {len(names)} labs are what their masters build"]))  # fmt: skip
        return 1 if stale else 0
    for path in [path for master in masters for path in write(master, root)]:
        print(f"wrote {path.relative_to(root)}")
    if not execute:
        return 0
    failed = refresh_outputs(masters, device, jobs, root)
    print("\n".join(failed) or f"outputs of {len(names)} labs are new")
    return 1 if failed else 0


def write(master: Master, root: Path = ROOT) -> list[Path]:
    """Write a lab's files, outputs carried over while they belong to the same code; return the paths that changed."""
    texts = _texts(master)
    changed = [p for p in (_write(root / name, text) for name, text in texts.items()) if p]
    exercises.sources.cache_clear()
    path = _solution_path(master, root)
    notebook = solution_notebook(master)
    if path.exists():
        old = nbformat.read(path, as_version=4)
        if old.metadata.get("effnlp", {}).get("digest") == notebook.metadata.effnlp.digest:
            _copy_outputs(old, notebook)
    changed += [p for p in (_write(path, _dump(notebook)),) if p]
    return changed


def refresh_outputs(masters: Sequence[Master], device: str, jobs: int | None, root: Path) -> list[str]:
    """Execute the solution notebooks and keep their outputs; return a sentence for each that failed."""
    from effnlp_lab.runner import run

    paths = [_solution_path(master, root) for master in masters]
    outcomes = run(paths, device=device, jobs=jobs, out=root / "build" / "execute")
    for master, path, outcome in zip(masters, paths, outcomes, strict=True):
        if outcome.state == "ok":
            notebook = solution_notebook(master)
            _copy_outputs(nbformat.read(Path(outcome.folder) / path.name, as_version=4), notebook)
            _write(path, _dump(notebook))
    return [outcome.sentence() for outcome in outcomes if outcome.state != "ok"]


def _stale_files(master: Master, root: Path) -> Iterator[str]:
    """A sentence for every file that is not what the master builds."""
    for name, text in _texts(master).items():
        path = root / name
        if not path.exists() or path.read_text("utf-8") != text:
            yield f"{name} is not what its master builds: run `effnlp build`."
    path, fresh = _solution_path(master, root), solution_notebook(master)
    name = path.relative_to(root)
    if not path.exists():
        yield f"{name} is missing: run `effnlp build --execute`."
        return
    old = nbformat.read(path, as_version=4)
    silent = [c.id for c in old.cells if c.cell_type == "code" and not c.outputs and SHOWS.search(c.source)]
    if silent:
        yield f"{name} has no outputs of cell {silent[0]}, or they are of older code: run `effnlp build --execute`."
    for cell in old.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    if _dump(old) != _dump(fresh):
        yield f"{name} is not what its master builds: run `effnlp build`."


def _texts(master: Master) -> dict[str, str]:
    """Generated files without outputs: path from the root -> text."""
    name = master.lab.name
    return {
        f"effnlp_lab/exercises/{name}/sources.json": _sources(master),
        f"labs/{name}/{master.lab.notebook}.ipynb": _dump(release_notebook(master)),
    }


def _solution_path(master: Master, root: Path) -> Path:
    return root / "solutions" / master.lab.name / f"{master.lab.notebook}.ipynb"


def _write(path: Path, text: str) -> Path | None:
    if path.exists() and path.read_text("utf-8") == text:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def _dump(notebook: NotebookNode) -> str:
    """The bytes that nbgrader and JupyterLab write too: a release made by either leaves the checkout clean."""
    return nbformat.writes(notebook) + "\n"


def solution_notebook(master: Master) -> NotebookNode:
    """The whole lab, solved, with nbgrader's metadata and no outputs."""
    cells, taken = [], set()
    for cell in master.cells:
        new = nbformat.v4.new_code_cell if cell.is_code else nbformat.v4.new_markdown_cell
        identity, n = cell.id, 1
        while identity in taken:
            n += 1
            identity = f"{cell.id}-{n}"
        taken.add(identity)
        node = new(_notebook_source(cell), id=identity, metadata=_metadata(master, cell, identity))
        cells.append(node)
        if cell.kind == "predict":
            cells.append(_prediction_check(master, cell))
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.nbformat_minor = 5
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
        effnlp=NotebookNode(lab=master.lab.name, digest=_digest(cells)),
    )
    return notebook


def _notebook_source(cell: Cell) -> str:
    return f"%%demo {' '.join(cell.needs)}\n{cell.source}" if cell.needs else cell.source


def _metadata(master: Master, cell: Cell, identity: str) -> NotebookNode:
    """nbgrader's metadata: exercises are answers, checks are graded and locked, given code is locked."""
    meta = NotebookNode()
    if cell.tags:
        meta.tags = list(cell.tags)
    if cell.kind == "exercise":
        meta.nbgrader = _nbgrader(cell.name, solution=True)
    elif cell.kind == "check":
        meta.nbgrader = _nbgrader(f"test_{cell.name}", grade=True, locked=True)
        meta.nbgrader.points = master.lab.exercise(cell.name).points
    elif cell.kind == "written":
        meta.nbgrader = _nbgrader(f"written_{cell.name}", grade=True, solution=True)
        meta.nbgrader.points = next(one.points for one in master.lab.written if one.name == cell.name)
    elif cell.kind == "predict":
        meta.effnlp = NotebookNode(predict=cell.name)
    elif cell.kind == "given":
        meta.nbgrader = _nbgrader(identity, locked=True)
    return meta


def _prediction_check(master: Master, cell: Cell) -> NotebookNode:
    """The graded cell under a prediction: it notes the numbers, and the grader writes there how close they were."""
    prediction = master.lab.prediction(cell.name)
    given = ", ".join(guess.variable for guess in prediction.guesses)
    meta = NotebookNode(nbgrader=_nbgrader(f"predict_{cell.name}", grade=True, locked=True))
    meta.nbgrader.points = prediction.points
    source = f'effnlp_lab.predicted("{cell.name}", {given})'
    return nbformat.v4.new_code_cell(source, id=f"noted-{cell.name}", metadata=meta)


def _nbgrader(grade_id: str, grade: bool = False, solution: bool = False, locked: bool = False) -> NotebookNode:
    return NotebookNode(grade=grade, grade_id=grade_id, locked=locked, schema_version=3, solution=solution, task=False)


def _digest(cells: Sequence[NotebookNode]) -> str:
    code = "\n\0\n".join(c.source for c in cells if c.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def release_notebook(master: Master) -> NotebookNode:
    """What students get: exactly what `nbgrader generate_assignment` makes of the solution notebook."""
    from nbgrader.preprocessors import CheckCellMetadata, ClearOutput, ClearSolutions, ComputeChecksums, LockCells
    from traitlets.config import Config

    notebook = solution_notebook(master)
    config = Config({"ClearSolutions": {"code_stub": {"python": STUB}, "text_stub": TEXT_STUB}})
    resources: dict = {}
    for step in (LockCells, ClearSolutions, ClearOutput, CheckCellMetadata, ComputeChecksums):
        notebook, resources = step(config=config).preprocess(notebook, resources)
    for cell in notebook.cells:
        nbgrader = cell.metadata.get("nbgrader", {})
        if nbgrader.get("solution") and cell.source != (
            TEXT_STUB if nbgrader.get("grade") else blank_source(master.exercise_cell(nbgrader.grade_id))
        ):
            raise MasterError(
                f"{master.path.name}: nbgrader blanks {cell.metadata.nbgrader.grade_id} otherwise than we do."
            )
    return opened(notebook, master)


def opened(release: NotebookNode, master: Master) -> NotebookNode:
    """A release with the cells that every released lab begins with; solved notebooks go without."""
    return open_anywhere(release, master.path.parents[2], f"labs/{master.lab.name}/{master.lab.notebook}.ipynb")


def _sources(master: Master) -> str:
    """Given code, blanks and known mistakes, for checks on machines that have no master."""
    module = exercises.reference_module(master.lab.name)
    given = given_source(master)
    known = set(dir(builtins)) | bound_names(ast.parse(given)) | set(getattr(module, "EARLIER", {}))
    spelled = {}
    for exercise in master.lab.exercises:
        cell = master.exercise_cell(exercise.name)
        source = solution_source(cell)
        tree = ast.parse(source)
        free = sorted(free_names(tree) - known)
        if free:
            raise MasterError(
                f"{master.path.name}, line {cell.first_line}: exercise {exercise.name!r} uses {free[0]!r}, "
                "which no given cell defines and EARLIER of its reference.py does not hold."
            )
        if exercise.name not in module.REFERENCES:
            raise MasterError(f"{master.lab.name}: REFERENCES of its reference.py has no {exercise.name!r}.")
        mistakes = module.REFERENCES[exercise.name].mistakes
        names = [m.name for m in mistakes]
        if len(set(names)) != len(names):
            raise MasterError(f"{master.lab.name}: {exercise.name} has two mistakes of the same name.")
        spelled[exercise.name] = {
            "blank": blank_source(cell),
            "mistakes": {m.name: mistaken_source(master, exercise.name, m) for m in mistakes},
        }
    return json.dumps({"given": given, "exercises": spelled}, indent=1, ensure_ascii=False) + "\n"


def _copy_outputs(old: NotebookNode, new: NotebookNode) -> None:
    """Carry outputs from one notebook to another with the same code, without what changes from run to run."""
    outputs = {c.id: c.outputs for c in old.cells if c.cell_type == "code"}
    count = 0
    for cell in new.cells:
        if cell.cell_type != "code" or not outputs.get(cell.id):
            continue
        count += 1
        cell.outputs = [_steady(o, count) for o in outputs[cell.id] if not _passing(o)]
        cell.execution_count = count


def _passing(output: NotebookNode) -> bool:
    """What is of no use to a reader: warnings with a machine's paths, bars whose widgets ended with their kernel."""
    return output.get("name") == "stderr" or WIDGET in output.get("data", {})


def _steady(output: NotebookNode, count: int) -> NotebookNode:
    if output.output_type == "execute_result":
        output.execution_count = count
    output.get("metadata", {}).pop("execution", None)
    output.pop("transient", None)
    return output
