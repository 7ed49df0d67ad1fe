"""The pictures of the benchmark book, in the house style of `plots`, each with its alternative text."""

from __future__ import annotations

import re
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from effnlp_lab.notebook import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = tuple[str, Mapping[str, float], str, str, float | None]
"""Title, speeds relative to the peer, the names of ours and of the peer, the limit relative to the peer."""
OURS, PEER, LIMIT = plots.COLOURS["blue"], plots.COLOURS["black"], "#555555"
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


@dataclass(frozen=True)
class Drawn:
    """A finished picture."""

    name: str
    png: bytes
    alt: str


def overview(beside: Mapping[str, tuple[Sequence[str], Sequence[float]]]) -> Drawn:
    """One line a benchmark, from the least to the most favourable ratio, with a dot at the median.

    beside: benchmark -> the peers and the ratios of its comparisons.
    """
    names = sorted(beside, key=lambda name: statistics.median(beside[name][1]))
    drawn, axes = plots.figure("Every technique beside its peer", "speed of ours relative to the peer (peer = 1)",
                               "benchmark, and its peer",
                               "Right of the line ours is faster. Bars: least to most; dots: medians.")  # fmt: skip
    drawn.set_size_inches(7.2, 1.9 + 0.36 * len(names))
    for place, name in enumerate(names):
        values = beside[name][1]
        middle = statistics.median(values)
        axes.plot([min(values), max(values)], [place, place], color=OURS, linewidth=5, alpha=0.35, marker="",
                  linestyle="-", solid_capstyle="round")  # fmt: skip
        axes.plot([middle], [place], color=OURS, marker="o", markersize=7, linestyle="")
        axes.annotate(f"{middle:.2f}x", (middle, place), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    peers = {name: _peers(beside[name][0]) for name in names}
    axes.set_yticks(range(len(names)), [f"{name}\n({peers[name]})" for name in names], fontsize=8)
    _ratio_axis(axes, [value for _, values in beside.values() for value in values])
    axes.set_ylim(-0.6, len(names) - 0.3)
    middles = {name: statistics.median(beside[name][1]) for name in reversed(names)}
    said = "; ".join(f"{name} {middle:.2f} times {peers[name]}" for name, middle in middles.items())
    return Drawn("overview", plots.png(drawn), f"Speed of the kit beside production libraries, medians: {said}")


def rows(name: str, heading: str, found: Sequence[Row]) -> Drawn:
    """One line a comparison: every contestant's speed relative to the peer, and the hardware's limit."""
    drawn, axes = plots.figure(heading, "speed relative to the peer (peer = 1)", "comparison",
                               "Right of the line is faster than the peer.")  # fmt: skip
    labels = [textwrap.fill(re.sub(r"torch\.|, batch \d+$", "", row[0]), 52) for row in found]
    drawn.set_size_inches(8.4, 1.9 + 0.2 * sum(label.count("\n") + 1.25 for label in labels))
    others = list(dict.fromkeys(c for _, speeds, ours, peer, _ in found for c in speeds if c not in (ours, peer)))
    rest = [look for look in plots.looks(8) if look["color"] not in (OURS, PEER)]
    look_of = {other: rest[place % len(rest)] for place, other in enumerate(others)}
    shown: set[str] = set()

    def dot(label: str, value: float, place: int, **look: object) -> None:
        axes.plot([value], [place], linestyle="", label=None if label in shown else label, **look)
        shown.add(label)

    for place, (_, speeds, ours, peer, limit) in enumerate(reversed(found)):
        for contestant, value in speeds.items():
            if contestant not in (ours, peer):
                look = look_of[contestant]
                dot(contestant, value, place, color=look["color"], marker=look["marker"], markersize=5)
        if limit is not None:
            dot("hardware limit", limit, place, color=LIMIT, marker="|", markersize=10, markeredgewidth=2)
        dot(f"peer ({peer})" if len({row[3] for row in found}) == 1 else "peer", 1.0, place, color=PEER, marker="s",
            markersize=4)  # fmt: skip
        dot("ours", speeds[ours], place, color=OURS, marker="o", markersize=7)
    axes.set_yticks(range(len(found)), labels[::-1], fontsize=8)
    axes.set_ylim(-0.7, len(found) - 0.3)
    _ratio_axis(axes, [v for _, speeds, *_, limit in found for v in (*speeds.values(), *([limit] if limit else []))])
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    handles = {label: handles[label] for label in sorted(handles, key=lambda label: label != "ours")}
    drawn.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=3, fontsize=8, frameon=False)
    said = "; ".join(f"{title}: ours {speeds[ours]:.2f} times {peer}" for title, speeds, ours, peer, _ in found[:6])
    more = f"; and {len(found) - 6} more, all in the table below" if len(found) > 6 else ""
    return Drawn(name, plots.png(drawn), _plain(f"{heading}: speeds relative to the peer. {said}{more}"))


def attention(found: Sequence[Row]) -> Drawn | None:
    """Causal attention at head dimension 128 by length, forward and backward, as shares of the card's limit."""
    panels = {}
    for side in ("forward", "backward"):
        pattern = re.compile(rf"Attention {side}, causal, .*head dim 128, length (\d+),")
        panels[side] = [(int(match[1]), row) for row in found if (match := pattern.match(row[0])) and row[4]]
    if not all(panels.values()):
        return None
    drawn, both = _panels("Causal attention in bfloat16, head dimension 128", 2,
                          "Ours is the blue line with dots. The limit is the card's own matrix product.")  # fmt: skip
    for axes, (side, points) in zip(both, panels.items(), strict=True):
        names = list(dict.fromkeys(name for _, row in points for name in row[1]))
        for name, look in zip(names, _looks(names, points[0][1][2]), strict=True):
            xs, ys = zip(*[(n, row[1][name] / row[4]) for n, row in points if name in row[1]], strict=True)
            axes.plot(xs, ys, label="ours" if name == points[0][1][2] else name, **look)
        axes.axhline(1, color=LIMIT, linewidth=1.2)
        axes.annotate("hardware limit", (points[0][0], 1), (0, 3), textcoords="offset points", fontsize=8)
        axes.set_title(side)
        axes.set_xscale("log", base=2)
        axes.set_xticks([n for n, _ in points], [f"{n // 1024}k" for n, _ in points])
        axes.set_xlabel("length (tokens)")
        axes.set_ylim(0, 1.1)
    both[0].set_ylabel("share of the card's limit")
    both[1].legend(loc="upper left", bbox_to_anchor=(0, 0.925), fontsize=8, ncols=2)
    ends = {side: points[-1] for side, points in panels.items()}
    said = "; ".join(f"{side} at {length:,} tokens ours reaches {_share(row, row[2]):.0%} and {row[3]} "
                     f"{_share(row, row[3]):.0%}" for side, (length, row) in ends.items())  # fmt: skip
    alt = f"Causal attention by length beside flash-attn and PyTorch, as shares of the card's limit: {said}"
    return Drawn("attention-lengths", plots.png(drawn), alt)


def nf4(found: Sequence[Row]) -> Drawn | None:
    """Products with NF4 weights by the number of input rows, one panel for each shape."""
    shapes: dict[str, list[tuple[int, Row]]] = {}
    for row in found:
        if match := re.match(r"NF4 product of (\d+) rows: (.+)", row[0]):
            shapes.setdefault(match[2], []).append((int(match[1]), row))
    if not shapes:
        return None
    caption = "Above the black line is faster than bitsandbytes; cuBLAS has weights of 16 bits."
    drawn, panels = _panels("Products with NF4 weights, double quantized", len(shapes), caption)
    values = [v for points in shapes.values() for _, row in points for v in row[1].values()]
    for axes, (shape, points) in zip(panels, shapes.items(), strict=True):
        ours = points[0][1][2]
        names = list(dict.fromkeys(name for _, row in points for name in row[1]))
        for name, look in zip(names, _looks(names, ours), strict=True):
            xs, ys = zip(*[(n, row[1][name]) for n, row in points if name in row[1]], strict=True)
            axes.plot(xs, ys, label="ours" if name == ours else name, **look)
        axes.set_title(f"weights {shape}")
        axes.set_xscale("log", base=2)
        axes.set_xticks([n for n, _ in points], [str(n) for n, _ in points])
        axes.set_xlabel("input rows")
        axes.set_ylim(0, 1.15 * max(values))
    panels[0].set_ylabel("speed relative to bitsandbytes")
    panels[0].legend(loc="upper left", fontsize=8)
    ratios = [row[1][row[2]] for points in shapes.values() for _, row in points]
    alt = (f"Products with NF4 weights for 1 to 64 input rows: ours is {min(ratios):.2f} to {max(ratios):.2f} times as "
           f"fast as bitsandbytes on all {len(shapes)} shapes")  # fmt: skip
    return Drawn("nf4-products", plots.png(drawn), alt)


def speculative(found: Sequence[Row]) -> Drawn | None:
    """Speed over the target alone by gamma on the paged cache, a line a temperature, one panel for each drafter."""
    table = next((row[1] for row in found if row[0].endswith("paged cache")), {})
    pattern = re.compile(r"(.+), temperature (\S+), gamma (\d+)")
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name, speed in table.items():
        if match := pattern.fullmatch(name.removesuffix(" (ours)")):
            alone = table[f"target alone (ours), temperature {match[2]}"]
            panels.setdefault(match[1], {}).setdefault(match[2], []).append((int(match[3]), speed / alone))
    if not panels:
        return None
    caption = "Above the black line a drafter pays. Temperatures are those of sampling; 0 is greedy."
    drawn, both = _panels("Speculative decoding of course-base", len(panels), caption)
    best = {drafter: max((speed, temperature, gamma) for temperature, line in lines.items() for gamma, speed in line)
            for drafter, lines in panels.items()}  # fmt: skip
    for axes, (drafter, lines) in zip(both, panels.items(), strict=True):
        for (temperature, points), look in zip(lines.items(), plots.looks(len(lines)), strict=True):
            axes.plot(*zip(*points, strict=True), label=f"temperature {temperature}", **look)
        gammas = sorted({gamma for points in lines.values() for gamma, _ in points})
        axes.set_xticks(gammas, [str(gamma) for gamma in gammas])
        axes.set_title(drafter)
        axes.set_xlabel("gamma (tokens drafted a step)")
        axes.axhline(1, color=PEER, linewidth=1.2)
        axes.set_ylim(0, 1.1 * max(1.0, *(speed for speed, *_ in best.values())))
    both[0].set_ylabel("speed over the target alone")
    both[-1].legend(fontsize=8)
    said = "; ".join(f"{drafter} at most {speed:.2f} times, at temperature {temperature} with gamma {gamma}"
                     for drafter, (speed, temperature, gamma) in best.items())  # fmt: skip
    return Drawn("speculative-gamma", plots.png(drawn), f"Speed over the target alone by gamma and temperature: {said}")


CLOSE = {"adapters": ("nf4-products", nf4), "attention": ("attention-lengths", attention),
         "speculative": ("speculative-gamma", speculative)}  # fmt: skip
"""Of a benchmark the name of its close view, and what draws it from all rows; None where they are not there."""


def _panels(title: str, count: int, caption: str) -> tuple[Figure, list[Axes]]:
    """Axes side by side that share their y axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with plots.style():
        drawn = Figure(layout="constrained", figsize=(8.4, 3.8))
        FigureCanvasAgg(drawn)
        axes = drawn.subplots(1, count, sharey=True, squeeze=False)[0]
        drawn.suptitle(title, fontsize=12, x=0.01, ha="left")
        drawn.supxlabel(caption, fontsize=9, color="#444444")
    return drawn, list(axes)


def _looks(names: Sequence[str], ours: str) -> list[dict[str, object]]:
    """Ours in blue and thick; the first of the others, the peer, in black."""
    rest = [look for look in plots.looks(8) if look["color"] not in (OURS, PEER)]
    others = [name for name in names if name != ours]
    looks: dict[str, dict[str, object]] = {ours: {"color": OURS, "marker": "o", "linestyle": "-", "linewidth": 2.4}}
    for place, name in enumerate(others):
        known = "flash-attn" in name or "bitsandbytes" in name
        looks[name] = {"color": PEER, "marker": "s", "linestyle": "-"} if known else dict(rest[place % len(rest)])
    return [looks[name] for name in names]


def _ratio_axis(axes: Axes, values: Sequence[float]) -> None:
    axes.set_xscale("log")
    low, high = min(*values, 1.0) / 1.25, max(*values, 1.0) * 1.25
    axes.set_xlim(low, high)
    fine = (0.6, 0.7, 0.8, 1.2, 1.5, 3) if high / low < 8 else ()
    ticks = sorted(tick for tick in (*TICKS, *fine) if low <= tick <= high)
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.axvline(1, color=PEER, linewidth=1.2)


def _peers(names: Sequence[str]) -> str:
    """The commonest, and whether there are others."""
    return statistics.mode(names) + (" and others" if len(set(names)) > 1 else "")


def _share(row: Row, name: str) -> float:
    return row[1].get(name, 0.0) / row[4]


def _plain(text: str) -> str:
    """Without what would end a link in Markdown."""
    return text.replace("[", "(").replace("]", ")").replace("\n", " ")
