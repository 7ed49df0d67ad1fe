"""`benchmarks/gpu_run/`: what passed on a card, step by step, to go on from in another checkout or on another day.

Written by `effnlp gpu --record` from `build/gpu`, with the page of a whole run; read by `effnlp gpu --recorded`. A step
counts only while what it read and the card are the same, and a benchmark only with the figures that it measured.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from effnlp_lab.errors import UsageError
from effnlp_lab.gpurun.execute import earlier
from effnlp_lab.gpurun.steps import Step
from effnlp_lab.notebook.bench import write_json

FOLDER, STEPS = "gpu_run", "steps.json"


def keep(out: Path, benchmarks: Path) -> Path | None:
    """Bring the record up to date with `out`: a step that passed is kept, one that failed forgotten. Returns its path,
    or None where `out` has no step."""
    path, ended = benchmarks / FOLDER / STEPS, sorted(out.glob("*/step.json"))
    if not ended:
        return None
    known = load(path)
    for one in ended:
        step = json.loads(one.read_text("utf-8"))
        known.pop(step["name"], None)
        if step["state"] == "ok":
            known[step["name"]] = step | {"figures": _digest(_figures(step["name"], one.parent))}
    path.parent.mkdir(exist_ok=True)
    path.write_text("{\n" + ",\n".join(f"{json.dumps(n)}: {json.dumps(known[n])}" for n in sorted(known)) + "\n}\n")
    report = out / "report.json"
    if report.is_file() and json.loads(report.read_text("utf-8"))["whole"]:
        shutil.copy(out / "report.html", path.parent)
    return path


def load(path: Path) -> dict[str, dict]:
    """The recorded steps by name. Raises UsageError for a file that is not read."""
    try:
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UsageError(f"{path} cannot be used ({error}): delete it, or get it anew.") from None


def restore(benchmarks: Path, out: Path, steps: Iterable[Step], keys: Mapping[str, str]) -> list[str]:
    """Lay recorded steps of these keys into `out`, where it has none; return their names."""
    recorded, restored = load(benchmarks / FOLDER / STEPS), []
    for step in steps:
        one = dict(recorded.get(step.name, {}))
        if one.get("key") != keys[step.name] or earlier(step, out, keys) is not None:
            continue
        measured, folder = _figures(step.name, benchmarks), out / step.name
        if one.pop("figures") != _digest(measured):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        if measured.is_file():
            for path in benchmarks.glob(f"{measured.stem}.*"):
                if path.suffix != ".py":
                    shutil.copy(path, folder)
        write_json(folder / "step.json", one)
        restored.append(step.name)
    return restored


def _figures(step: str, folder: Path) -> Path:
    """Where a benchmark's figures are; a path of nothing for another step."""
    return folder / f"{step.removeprefix('bench-')}.json"


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None
