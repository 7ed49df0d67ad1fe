"""`benchmarks/expected.toml`: the ratios to the peers that a card has reached, and how far below one may fall.

Written by `effnlp gpu --record` from `benchmarks/*.json`; margins and floors that a person wrote into it are kept.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effnlp_lab.errors import UsageError

NAME = "expected.toml"
MARGINS = {"cuda": 0.15, "cpu": 0.35}
"""Shares by which a ratio may fall below its record: clocks and neighbours move a GPU's less than a CPU's."""
FAILURES = ("below", "peer missing", "not measured")
HEAD = """\
# Ratios to the peer, higher is better for ours, as `effnlp bench` measured them on the device that is named.
# `make gpu` fails where one falls below its record by more than the margin (a share of the record: 0.15 on a GPU, 0.35
# on a CPU, unless changed here), or below a floor, which has no margin: [suites.NAME.floors] with "title" = ratio.
# A peer that did not run is a failure, but for titles in the list without_peer: there nobody published a figure.
# Records hold on the device that is named alone, of a CPU with as many cores. Written by
# `python3 -m effnlp_lab gpu --record` from benchmarks/*.json; margins, floors and lists changed by hand are kept.
"""


@dataclass(frozen=True)
class Figure:
    """One ratio beside its record.

    `state`: ok, below, peer missing, no peer, not measured, new, or on another device.
    """

    suite: str
    title: str
    peer: str
    ratio: float | None
    record: float | None
    least: float | None
    state: str
    note: str = ""

    def sentence(self) -> str:
        """For a list of problems."""
        got = "was not measured" if self.ratio is None else f"is {self.ratio:.2f} times {self.peer}"
        least = f", at least {self.least:.2f} is expected" if self.least is not None else ""
        return f"{self.suite}, {self.title}: {got}{least}{f' ({self.note})' if self.note else ''}"


def load(path: Path) -> dict[str, Any]:
    """suite -> {"device", "cores", "margin", "ratios", "floors"}. Raises UsageError for a file that is not read."""
    if not path.is_file():
        return {}
    try:
        suites = tomllib.loads(path.read_text("utf-8")).get("suites", {})
        for name, suite in suites.items():
            if not 0 <= float(suite["margin"]) < 1:
                raise ValueError(f"the margin of {name} is {suite['margin']}, and has to be from 0 to less than 1")
            {title: float(ratio) for table in ("ratios", "floors") for title, ratio in suite.get(table, {}).items()}
            str(suite["device"])
        return suites
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path.name} cannot be used ({error}): write it anew with `effnlp gpu --record`.") from None


def hold(expected: Mapping[str, Any], measured: Mapping[str, Any]) -> list[Figure]:
    """Every measured and every expected ratio of the suites in `measured` (suite -> the content of its JSON)."""
    figures = []
    for name, content in measured.items():
        suite = expected.get(name, {})
        elsewhere = bool(suite) and not _same_device(suite, content["machine"])
        titles = dict.fromkeys([*(one["title"] for one in content["comparisons"]), *suite.get("ratios", {}),
                                *suite.get("floors", {})])  # fmt: skip
        found = {one["title"]: one for one in content["comparisons"]}
        figures += [_figure(name, title, suite, found.get(title), elsewhere) for title in titles]
    return figures


def unmeasured(expected: Mapping[str, Any], suite: str) -> list[Figure]:
    """The figures of a suite that did not run."""
    known = expected.get(suite, {})
    titles = dict.fromkeys([*known.get("ratios", {}), *known.get("floors", {})])
    return [_figure(suite, title, known, None, False) for title in titles]


def record(folder: Path) -> Path:
    """Write expected.toml beside the JSON files of `folder`; return its path."""
    path = folder / NAME
    old = load(path)
    blocks = [HEAD]
    for file in sorted(folder.glob("*.json")):
        content = json.loads(file.read_text("utf-8"))
        if "comparisons" in content:
            blocks.append(_block(content, old.get(content["suite"], {})))
    path.write_text("\n".join(blocks), "utf-8")
    return path


def _figure(name: str, title: str, suite: Mapping[str, Any], one: Mapping[str, Any] | None, elsewhere: bool) -> Figure:
    record, floor = suite.get("ratios", {}).get(title), suite.get("floors", {}).get(title)
    leasts = [record * (1 - suite["margin"])] if record is not None else []
    least = max([*leasts, *([floor] if floor is not None else [])], default=None)
    ratio, peer = (one["ratio"], one["peer"]) if one else (None, "its peer")
    if elsewhere:
        return Figure(name, title, peer, ratio, record, least, "on another device", f"recorded on {suite['device']}")
    if one is None:
        return Figure(name, title, peer, None, record, least, "not measured",
                      "the benchmark stopped, or no longer has it")  # fmt: skip
    if ratio is None:
        why = one["missing"].get(peer, "it did not run")
        state = "no peer" if title in suite.get("without_peer", ()) else "peer missing"
        return Figure(name, title, peer, None, record, least, state, f"{peer}: {why}")
    state = "new" if least is None else "ok" if ratio >= least else "below"
    absent = "; ".join(f"{other} did not run: {why}" for other, why in one["missing"].items())
    return Figure(name, title, peer, ratio, record, least, state, absent)


def _same_device(suite: Mapping[str, Any], machine: Mapping[str, Any]) -> bool:
    cores = suite.get("cores")
    return suite["device"] == machine["device"] and (cores is None or cores == machine["cores"])


def _block(content: Mapping[str, Any], old: Mapping[str, Any]) -> str:
    machine = content["machine"]
    same = bool(old) and _same_device(old, machine)
    margin = old["margin"] if same else MARGINS[machine["kind"]]
    lines = [f"[suites.{content['suite']}]", f"device = {_string(machine['device'])}"]
    lines += [f"cores = {machine['cores']}"] if machine["kind"] == "cpu" else []
    lines += [f"margin = {margin}"]
    if old.get("without_peer"):
        lines += ["without_peer = [", *(f"    {_string(title)}," for title in old["without_peer"]), "]"]
    lines += ["", f"[suites.{content['suite']}.ratios]"]
    lines += [f"{_string(one['title'])} = {one['ratio']:.3f}" for one in content["comparisons"] if one["ratio"]]
    if same and old.get("floors"):
        lines += ["", f"[suites.{content['suite']}.floors]"]
        lines += [f"{_string(title)} = {floor}" for title, floor in old["floors"].items()]
    return "\n".join(lines) + "\n"


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a basic string of TOML is written as JSON writes one
