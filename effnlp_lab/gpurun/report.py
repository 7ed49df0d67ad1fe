"""One report on all steps, as report.json and report.html: what ran, how long, what is wrong, and the figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from effnlp_lab.gpurun import expected
from effnlp_lab.gpurun.execute import Ended, earlier
from effnlp_lab.gpurun.expected import FAILURES, Figure
from effnlp_lab.gpurun.steps import ALLOWED_SECONDS, PARTS, Step
from effnlp_lab.notebook.bench import describe, write_json

TEMPLATE = Path(__file__).with_name("report.html")


def gather(steps: Sequence[Step], chosen: Sequence[Step], out: Path, keys: Mapping[str, str],
           machine: Mapping[str, Any], commit: str, records: Mapping[str, Any]) -> dict[str, Any]:  # fmt: skip
    """The report as one dictionary. `ok` is about the chosen steps, `whole` says whether every step has run."""
    ended = {step.name: earlier(step, out, keys) for step in steps}
    names = {step.name for step in chosen}
    figures = _figures([step for step in steps if step.part == "bench"], ended, out, records)
    problems = []
    for name, one in ended.items():
        if one is not None and name in names:
            for word, sentences in (("", one.problems), ("skipped: ", one.skipped), ("a kernel died: ", one.died)):
                problems += [f"{name}: {word}{sentence}" for sentence in sentences]
        elif name in names:
            problems.append(f"{name}: not run yet.")
    chosen_suites = {name.removeprefix("bench-") for name in names}
    problems += [figure.sentence() for figure in figures if figure.state in FAILURES and figure.suite in chosen_suites]
    problems += _too_slow(ended, names)
    absent = [name for name, one in ended.items() if one is None]
    return {
        "ok": not problems, "whole": not absent, "not_run": absent, "problems": problems, "commit": commit,
        "machine": dict(machine), "seconds": sum(one.seconds for one in ended.values() if one),
        "parts": {part: _part(part, steps, ended) for part in PARTS if any(step.part == part for step in steps)},
        "figures": [asdict(figure) for figure in figures],
    }  # fmt: skip


def write(report: Mapping[str, Any], out: Path) -> Path:
    """Write report.json and report.html into `out`; return the page."""
    import jinja2

    write_json(out / "report.json", report)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     undefined=jinja2.StrictUndefined)  # fmt: skip
    page = environment.from_string(TEMPLATE.read_text("utf-8")).render(
        **report, about=PARTS, machine_line=describe(report["machine"]))
    (out / "report.html").write_text(page, "utf-8")
    return out / "report.html"


def _too_slow(ended: Mapping[str, Ended | None], names: set[str]) -> list[str]:
    """A sentence for each group of steps that took longer than it may."""
    found = []
    for group, allowed in ALLOWED_SECONDS.items():
        taken = sum(one.seconds for name, one in ended.items() if one and name.startswith(group) and name in names)
        if taken > allowed:
            found.append(f"{group}: {taken:.0f} s in all, and at most {allowed:.0f} s are allowed.")
    return found


def _part(part: str, steps: Sequence[Step], ended: Mapping[str, Ended | None]) -> dict[str, Any]:
    ours = {step.name: ended[step.name] for step in steps if step.part == part}
    states = {one.state if one else "not run" for one in ours.values()}
    state = "ok" if states == {"ok"} else "not run" if "not run" in states and states <= {"ok", "not run"} else "failed"
    return {"state": state, "seconds": sum(one.seconds for one in ours.values() if one),
            "steps": {name: asdict(one) if one else None for name, one in ours.items()}}  # fmt: skip


def _figures(steps: Sequence[Step], ended: Mapping[str, Ended | None], out: Path,
             records: Mapping[str, Any]) -> list[Figure]:  # fmt: skip
    figures = []
    for step in steps:
        suite, one = step.name.removeprefix("bench-"), ended[step.name]
        path = out / step.name / f"{suite}.json"
        if one is not None and one.state == "ok" and path.is_file():
            figures += expected.hold(records, {suite: json.loads(path.read_text("utf-8"))})
        elif one is not None:
            figures += expected.unmeasured(records, suite)
    return figures
