"""What came out of a step: which things ran and for how long, what failed, what was skipped, which kernels died."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

LAST_LINES = 5
NBVAL_TAG = "nbval-check-output"


@dataclass
class Found:
    """`ran`: (name, state in words, seconds) of each thing that ran. The other lists hold a sentence each."""

    ran: list[tuple[str, str, float]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    died: list[str] = field(default_factory=list)


def plain(folder: Path, code: int, log: str) -> Found:
    """A command that says all by its exit code: its last lines tell why."""
    return Found() if code == 0 else Found(problems=[f"exit code {code}; its log ends: {_end(log)}"])


def pytest(folder: Path, code: int, log: str) -> Found:
    """A run of pytest that wrote junit.xml. A skipped test is kept apart from a failed one; both fail the step."""
    path = folder / "junit.xml"
    if not path.is_file():
        return Found(problems=[f"pytest wrote no results (exit code {code}); its log ends: {_end(log)}"])
    found = Found()
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}".removeprefix("::")
        state, told = "ok", None
        for outcome in case:
            if outcome.tag in ("failure", "error", "skipped") and outcome.get("type") != "pytest.xfail":
                told = outcome.get("message") or (outcome.text or "").strip() or outcome.tag
                state = "skipped" if outcome.tag == "skipped" or _REFUSED in told + (outcome.text or "") else "failed"
                # pytest gives a failure that is plain text as message, text or both
                told = (outcome.text or told).strip() if state == "skipped" else told
        found.ran.append((name, state, float(case.get("time") or 0)))
        if state == "failed":
            found.problems.append(f"{name}: {_first(told)}")
            if "kernel died" in told or ": died after" in told:
                found.died.append(f"{name}: {_first(told)}")
        elif state == "skipped":
            found.skipped.append(f"{name}: {_first(told.partition(_REFUSED)[2].partition(':')[2] or told)}")
    if code not in (0, 1) or code == 1 and not (found.problems or found.skipped):
        found.problems.append(f"pytest ended with exit code {code}; its log ends: {_end(log)}")
    if not found.ran:
        found.problems.append("pytest ran no test.")
    return found


def notebooks(folder: Path, code: int, log: str) -> Found:
    """A run of `effnlp run`, which wrote results.json."""
    try:
        outcomes = json.loads((folder / "results.json").read_text("utf-8"))
    except (OSError, ValueError):
        return Found(problems=[f"no notebook has a result (exit code {code}); the log ends: {_end(log)}"])
    found = Found(ran=[(o["notebook"], o["state"], o["seconds"]) for o in outcomes])
    for one in outcomes:
        if one["state"] != "ok":
            where = f", cell {one['cell']['index']}: {one['cell']['first_line']}" if one["cell"] else ""
            sentence = f"{one['notebook']}: {one['state']}{where}: {_first(one['message'])}"
            (found.died if one["state"] == "died" else found.problems).append(sentence)
    if code and not (found.problems or found.died):
        found.problems.append(f"exit code {code}; the log ends: {_end(log)}")
    return found


def solutions(root: Path) -> Callable[[Path, int, str], Found]:
    """Reads a run of `effnlp run` on solutions, at whatever size: as `notebooks`, and cells that nbval compares have to
    give what is stored under `root`."""
    def read(folder: Path, code: int, log: str) -> Found:
        found = notebooks(folder, code, log)
        for name, state, _ in found.ran:
            found.problems += _changed(folder / name, root / "solutions" / name) if state == "ok" else ()
        return found

    return read


def bench(folder: Path, code: int, log: str) -> Found:
    """A run of one benchmark with `--out`, which wrote NAME.json. Missing peers are told with the figures."""
    if code:
        return plain(folder, code, log)
    found = Found()
    for path in sorted(folder.glob("*.json")):
        for one in json.loads(path.read_text("utf-8"))["comparisons"]:
            found.ran.append((one["title"], "ok", sum(map(sum, one["seconds"].values()))))
    if not found.ran:
        found.skipped.append(f"it wrote no figures; its log ends: {_end(log)}")
    return found


_REFUSED = "Not run, on a run with --device cuda"


def _changed(executed: Path, stored: Path) -> Iterator[str]:
    for path in sorted(stored.glob("*.ipynb")):
        cells = {cell["id"]: cell for cell in json.loads((executed / path.name).read_text("utf-8"))["cells"]}
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            if NBVAL_TAG in cell["metadata"].get("tags", ()):
                want, got = _text_of(cell), _text_of(cells[cell["id"]])
                if want != got:
                    yield f"{stored.name}: a cell gives {got[-200:]!r}, and {want[-200:]!r} is stored."


def _text_of(cell: dict) -> str:
    """What a cell printed and returned, as text."""
    texts = [one["text"] if one.get("name") == "stdout" else one.get("data", {}).get("text/plain", "")
             for one in cell["outputs"]]  # fmt: skip
    return "".join("".join(text) for text in texts)


def _first(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:300] if lines else "(no message)"


def _end(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return " / ".join(lines[-LAST_LINES:])[-600:] or "(empty)"
