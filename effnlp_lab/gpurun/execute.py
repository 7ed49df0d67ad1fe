"""Runs steps one after another; what is done for this tree and this card is not repeated."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from effnlp_lab.gpurun.findings import NBVAL_TAG
from effnlp_lab.gpurun.steps import DIGESTED, Step
from effnlp_lab.notebook.bench import write_json
from effnlp_lab.runner import kill_tree

SUFFIXES = (".py", ".ipynb", ".json", ".toml", ".html", ".safetensors", ".txt")
NOT_DIGESTED = ("__pycache__", ".ipynb_checkpoints")


@dataclass
class Ended:
    """How a step ended. `key` names what it read and the card; `kept` says that it ran in an earlier call."""

    name: str
    part: str
    state: str  # ok, failed, timed out
    seconds: float
    key: str
    finished: str
    ran: list[tuple[str, str, float]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    died: list[str] = field(default_factory=list)
    kept: bool = False


def execute(steps: Sequence[Step], out: Path, root: Path, keys: Mapping[str, str], force: bool = False,
            told: Callable[[Ended], None] = lambda ended: None) -> list[Ended]:  # fmt: skip
    """Run what is not done yet, and call `told` after each step. Returns how each ended, in order.

    keys: of each step by name, what it read and the card (`tree_keys`).
    """
    done = []
    for step in steps:
        ended = None if force else earlier(step, out, keys)
        if ended is None or ended.state != "ok":
            print(f"{step.name}: started", flush=True)
            ended = _run(step, out, root, keys[step.name])
        print(_line(ended), flush=True)
        done.append(ended)
        told(ended)
    return done


def earlier(step: Step, out: Path, keys: Mapping[str, str]) -> Ended | None:
    """How a step ended in an earlier call that read the same, on the same card, or None."""
    try:
        kept = Ended(**json.loads((out / step.name / "step.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    kept.kept = True
    return kept if kept.key == keys[step.name] else None


def tree_keys(root: Path, card: str, steps: Iterable[Step]) -> dict[str, str]:
    """Of each step by name a digest of what it reads (not of prose or of measured figures), of Python and of the card.

    A file is read by the steps that name it or a folder that it is in.
    """
    files = {}
    for path in sorted(_digested(root)):
        what = _code_of(path) if path.suffix == ".ipynb" else path.read_bytes()
        files[path.relative_to(root).as_posix()] = hashlib.sha256(what).hexdigest()
    keys = {}
    for step in steps:
        within = tuple(f"{one}/" for one in step.reads)
        read = [one for one in files.items() if f"{one[0]}/".startswith(within)]
        keys[step.name] = hashlib.sha256(json.dumps([card, sys.version_info[:2], read]).encode()).hexdigest()[:16]
    return keys


def _code_of(notebook: Path) -> bytes:
    """A notebook's code cells, and of their outputs those that nbval compares."""
    cells = [cell for cell in json.loads(notebook.read_bytes()).get("cells", ()) if cell["cell_type"] == "code"]
    compared = [cell["outputs"] if NBVAL_TAG in cell["metadata"].get("tags", ()) else [] for cell in cells]
    told = [[cell["id"], cell["source"], cell["metadata"].get("tags", [])] for cell in cells]
    return json.dumps([told, compared]).encode()


def commit_of(root: Path) -> str:
    """The commit that is checked out, with a word where files differ from it; "unknown" outside of git."""
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=60)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        changed = bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return f"{commit} and changes" if commit and changed else commit or "unknown"


def _digested(root: Path) -> Iterable[Path]:
    for folder in DIGESTED:
        for path in (root / folder).rglob("*"):
            measured = folder == "benchmarks" and path.suffix != ".py"
            master = folder == "solutions" and path.suffix == ".py"  # its notebook is counted
            passing = set(NOT_DIGESTED) & set(path.parts) or path.name.startswith("receipt_")
            if path.suffix in SUFFIXES and not (measured or master or passing) and path.is_file():
                yield path


def _run(step: Step, out: Path, root: Path, key: str) -> Ended:
    folder = out / step.name
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.json"), *folder.glob("*.xml")):
        old.unlink()
    command = [word.replace("{folder}", str(folder)) for word in step.command]
    log = folder / "log.txt"
    began = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, cwd=root,
                                   env=_environment(step, root), start_new_session=True)  # fmt: skip
        try:
            code: int | None = process.wait(step.limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            kill_tree(process)
    ended = Ended(step.name, step.part, "timed out", time.monotonic() - began, key,
                  time.strftime("%Y-%m-%d %H:%M:%S %z"))  # fmt: skip
    if code is None:
        ended.problems = [f"stopped at its limit of {step.limit:.0f} s"]
    else:
        found = step.read(folder, code, log.read_text("utf-8", errors="replace"))
        ended.ran, ended.problems, ended.skipped, ended.died = found.ran, found.problems, found.skipped, found.died
        ended.state = "failed" if code or found.problems or found.skipped or found.died else "ok"
    write_json(folder / "step.json", asdict(ended))
    return ended


def _environment(step: Step, root: Path) -> dict[str, str]:
    paths = [str(root), str(root / "grading"), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(dict.fromkeys(paths)))
    for name, value in step.environment.items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    return environment


def _line(ended: Ended) -> str:
    when = "ran earlier" if ended.kept else f"in {ended.seconds:.0f} s"
    counts = [f"{len(ended.ran)} ran" if ended.ran else "", f"{len(ended.skipped)} skipped" if ended.skipped else "",
              f"{len(ended.died)} died" if ended.died else ""]  # fmt: skip
    said = ", ".join(filter(None, counts))
    first = next(iter([*ended.died, *ended.problems, *ended.skipped]), "")
    return f"{ended.name}: {ended.state}, {when}{f' ({said})' if said else ''}{f': {first}' if first else ''}"
