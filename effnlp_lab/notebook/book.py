"""The benchmark book: what `effnlp bench` measured, gathered into one page of ratios with pictures.

Everything is a ratio of speeds to the peer, the production library that a comparison names: 2 means twice as fast. A
benchmark without figures is listed as not measured, a peer that was not there by its name and the reason.
"""

from __future__ import annotations

import ast
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effnlp_lab.notebook import book_pictures as pictures
from effnlp_lab.notebook.bench import UNITS, describe, needs, number, suites

if TYPE_CHECKING:
    from effnlp_lab.notebook.book_pictures import Drawn

PAGE, PLOTS = "README.md", "plots"
FEW = 6
"""Comparisons with more contestants are tables of settings: the page gives ours and the peer alone."""
WITHIN = {
    "distillation": r"^Students",
    "quantization": r"^(GPTQ of|course-base|One token)",
    "speculative": r"^Seconds a token",
    "streaming": r"growing size",
    "training": r"down the ladder",
}
"""Titles of comparisons among settings of ours: in the tables, not in the pictures and the summary."""
BEGIN, END = "<!-- pictures: written by `effnlp bench --book` -->", "<!-- end of pictures -->"


@dataclass(frozen=True)
class Ratios:
    """One comparison as speeds relative to its peer. `speeds` has ours and the peer, `limit` the hardware's."""

    title: str
    ours: str
    peer: str
    speeds: dict[str, float]
    limit: float | None
    missing: dict[str, str]
    figure: str

    @property
    def ratio(self) -> float | None:
        return self.speeds.get(self.ours)


@dataclass(frozen=True)
class Suite:
    """One benchmark: what its text says of it, and what was measured; no figures where there is no file."""

    name: str
    about: str
    needs: str | None
    ratios: tuple[Ratios, ...] = ()
    machine: Mapping[str, Any] | None = None
    command: str = ""

    @property
    def heading(self) -> str:
        return self.name.capitalize().replace("_gpu", " on a GPU")

    @property
    def headlines(self) -> list[Ratios]:
        """The comparisons beside a library that ran."""
        within = WITHIN.get(self.name)
        return [one for one in self.ratios if one.ratio is not None and not (within and re.search(within, one.title))]


def write(folder: Path, readme: Path | None = None) -> list[Path]:
    """Write `folder`/README.md and `folder`/plots/*.png from its JSON files; return the paths.

    `readme`, where it is given, gets the three pictures that say most, between its two marker lines.
    """
    read = load(folder)
    drawn = _draw(read)
    paths = [folder / PAGE]
    for one in drawn.values():
        (folder / PLOTS).mkdir(parents=True, exist_ok=True)
        paths.append(folder / PLOTS / f"{one.name}.png")
        paths[-1].write_bytes(one.png)
    for old in set((folder / PLOTS).glob("*.png")) - set(paths):
        old.unlink()
    (folder / PAGE).write_text(page(read, drawn), "utf-8")
    if readme is not None and BEGIN in (text := readme.read_text("utf-8")):
        before, rest = text.split(BEGIN, 1)
        shown = [drawn[name] for name in ("attention-lengths", "nf4-products", "overview") if name in drawn]
        base = f"{folder.name}/{PLOTS}"
        block = "\n\n".join(_image(one, base) for one in shown)
        readme.write_text(f"{before}{BEGIN}\n{block}\n{END}{rest.split(END, 1)[1]}", "utf-8")
        paths.append(readme)
    return paths


def load(folder: Path) -> list[Suite]:
    """Every benchmark of a folder, by its .py file or its JSON file, in alphabetical order."""
    texts = suites(folder)
    names = sorted({*texts, *(path.stem for path in folder.glob("*.json"))})
    return [_suite(name, texts.get(name), folder / f"{name}.json") for name in names]


def page(read: Sequence[Suite], drawn: Mapping[str, Drawn]) -> str:
    """The page in Markdown."""
    blocks = [
        "# The benchmark book",
        "Made by `effnlp bench`, and from its files by `effnlp bench --book`; never edited by hand. Every figure is a "
        "ratio of speeds to the peer that is named: 2.00x is twice as fast, above 1 is better for ours. The hardware's "
        "limit is what the card itself reached in a copy or a matrix product. Times, spreads and what was verified are "
        "in the page of each benchmark.",
        "## At a glance",
    ]
    blocks += [_image(drawn["overview"], PLOTS)] if "overview" in drawn else []
    blocks.append(_glance(read))
    for suite in read:
        blocks += _section(suite, drawn)
    return "\n\n".join(blocks) + "\n"


def _suite(name: str, text: Path | None, figures: Path) -> Suite:
    tree = ast.parse(text.read_text("utf-8")) if text else ast.Module([], [])
    about, needed = ast.get_docstring(tree) or "", needs(text) if text else None
    if not figures.is_file():
        return Suite(name, about, needed)
    content = json.loads(figures.read_text("utf-8"))
    ratios = tuple(_ratios(one) for one in content["comparisons"])
    return Suite(name, about, needed, ratios, content["machine"], content["command"])


def _ratios(one: Mapping[str, Any]) -> Ratios:
    seconds = {name: statistics.median(times) for name, times in one["seconds"].items()}
    base = seconds.get(one["peer"])
    unit, work, limit = one["unit"], one["work"], one["limit"]
    if limit is not None:
        limit = limit if unit == "s" else work / limit / UNITS[unit]  # as seconds
    ours = seconds[one["ours"]]
    figure = f"{number(ours if unit == 's' else work / ours / UNITS[unit])} {unit}"
    speeds = {name: base / value for name, value in seconds.items()} if base else {}
    return Ratios(one["title"], one["ours"], one["peer"], speeds, base / limit if base and limit else None,
                  one["missing"], figure)  # fmt: skip


def _row(one: Ratios) -> pictures.Row:
    return one.title, one.speeds, one.ours, one.peer, one.limit


def _draw(read: Iterable[Suite]) -> dict[str, Drawn]:
    """The pictures by name: an overview, two close views, and one of each benchmark."""
    measured = [suite for suite in read if suite.ratios]
    found = []
    beside = {suite.heading: ([one.peer for one in suite.headlines], [one.ratio for one in suite.headlines])
              for suite in measured if suite.headlines}  # fmt: skip
    if beside:
        found.append(pictures.overview(beside))
    for suite in measured:
        rows = [_row(one) for one in suite.headlines if len(one.speeds) <= FEW]
        if rows:
            found.append(pictures.rows(suite.name, suite.heading, rows))
        if suite.name in pictures.CLOSE and (view := pictures.CLOSE[suite.name][1](list(map(_row, suite.ratios)))):
            found.append(view)
    return {one.name: one for one in found}


def _image(one: Drawn, base: str) -> str:
    return f"![{one.alt}]({base}/{one.name}.png)"


def _glance(read: Sequence[Suite]) -> str:
    header = ("benchmark", "beside", "comparisons", "ours: least, median, most", "median share of the limit",
              "measured on")  # fmt: skip
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for suite in read:
        if suite.machine is None:
            lines.append(f"| {suite.heading} | - | - | **not measured** | - | {_how(suite)} |")
            continue
        heads = suite.headlines
        values = [one.ratio for one in heads]
        spread = "no peer ran" if not values else ", ".join(
            f"{value:.2f}x" for value in (min(values), statistics.median(values), max(values)))  # fmt: skip
        peers = "; ".join(dict.fromkeys(one.peer for one in heads)) or "-"
        shares = [one.ratio / one.limit for one in heads if one.limit]
        share = f"{statistics.median(shares):.0%}" if shares else "-"
        lines.append(f"| {suite.heading} | {peers} | {len(heads)} of {len(suite.ratios)} | {spread} | {share} | "
                     f"{_device(suite.machine)} |")  # fmt: skip
    return "\n".join(lines)


def _section(suite: Suite, drawn: Mapping[str, Drawn]) -> list[str]:
    blocks = [f"## {suite.heading}", *([suite.about.split("\n\n")[0].replace("\n", " ")] if suite.about else [])]
    if suite.machine is None:
        return [*blocks, f"**Not measured**: {_how(suite)}."]
    blocks.append(f"Made by `{suite.command}` on {describe(suite.machine)}. In full: "
                  f"[{suite.name}.md]({suite.name}.md).")  # fmt: skip
    close, _ = pictures.CLOSE.get(suite.name, ("", None))
    blocks += [_image(drawn[name], PLOTS) for name in (close, suite.name) if name in drawn]
    missing = {name: why for one in suite.ratios for name, why in one.missing.items()}
    blocks += [f"**Not run: {name}** ({why})." for name, why in missing.items()]
    lines = ["| what | ours | beside the peer | others beside the peer | the hardware's limit |", "|" + "---|" * 5]
    for one in suite.ratios:
        others = [f"{name} {value:.2f}x" for name, value in one.speeds.items() if name not in (one.ours, one.peer)]
        if len(others) > FEW - 2:
            others = [f"{len(others)} more in [{suite.name}.md]({suite.name}.md)"]
        beside = f"{one.ratio:.2f}x {one.peer}" if one.ratio is not None else f"{one.peer} did not run"
        limit = f"{one.limit:.2f}x" if one.limit is not None else "-"
        lines.append(f"| {one.title} | {one.figure} | {beside} | {', '.join(others) or '-'} | {limit} |")
    return [*blocks, "\n".join(lines)]


def _how(suite: Suite) -> str:
    return f"`effnlp bench {suite.name}`{' on a GPU' if suite.needs == 'cuda' else ''}"


def _device(machine: Mapping[str, Any]) -> str:
    cores = f", {machine['cores']} cores" if machine["kind"] == "cpu" else ""
    versions = machine["versions"]
    return f"{machine['device']}{cores}; torch {versions.get('torch', '?')}, triton {versions.get('triton', '-')}"
