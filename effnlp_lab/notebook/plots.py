"""The house style of plots: readable, safe for colour-blind readers, and with a text for those who do not see them.

Colours are Okabe and Ito's (2008); series also differ in marker and line style, so that no plot is read by colour
alone. Pictures hold no time stamp and no version, so that the same figure is the same file.
"""

from __future__ import annotations

import html
import io
import struct
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from typing import TYPE_CHECKING

from effnlp_lab.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110
COLOURS = {
    "blue": "#0072B2", "orange": "#E69F00", "green": "#009E73", "vermilion": "#D55E00",
    "purple": "#CC79A7", "sky": "#56B4E9", "black": "#000000", "yellow": "#F0E442",
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", "-", "--", "-.", ":")

STYLE = {
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "figure.figsize": (6.4, 3.8),
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "savefig.facecolor": "white",
    "svg.hashsalt": "effnlp",
}


@contextmanager
def style() -> Iterator[None]:
    """The house style for what is drawn inside."""
    import matplotlib
    from cycler import cycler

    series = cycler(color=list(COLOURS.values())) + cycler(marker=MARKERS) + cycler(linestyle=LINES)
    series *= cycler(linewidth=[STYLE["lines.linewidth"]]) * cycler(markersize=[STYLE["lines.markersize"]])
    with matplotlib.rc_context({**STYLE, "axes.prop_cycle": series}):
        yield


def figure(title: str, xlabel: str, ylabel: str, caption: str = "") -> tuple[Figure, Axes]:
    """An empty figure in the house style. Labels name the quantity and its unit: "length (tokens)".

    `caption` is a line under the axes: what the reader should see. Raises UsageError for a missing label.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not (title and xlabel and ylabel):
        raise UsageError("A figure needs a title and a label with its unit on both axes: give all three.")
    with style():
        drawn = Figure(layout="constrained")  # not through pyplot: nothing to close, nothing shown twice
        FigureCanvasAgg(drawn)
        axes = drawn.add_subplot()
        axes.set_title(title)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
    if caption:
        drawn.supxlabel(caption, fontsize=9, color="#444444")
    return drawn, axes


def looks(count: int) -> list[dict[str, str]]:
    """Colour, marker and line style for each of `count` series, as keyword arguments of `Axes.plot`."""
    kinds = zip(cycle(COLOURS.values()), cycle(MARKERS), cycle(LINES), strict=False)
    return [{"color": color, "marker": marker, "linestyle": line} for color, marker, line in islice(kinds, count)]


def png(drawn: Figure) -> bytes:
    """The figure as PNG, the same bytes for the same figure and version of matplotlib."""
    buffer = io.BytesIO()
    with style():
        drawn.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None, "Creation Time": None})
    return buffer.getvalue()


class Picture:
    """A figure with its alternative text, as a notebook displays it: an image element, and the text in a terminal."""

    def __init__(self, data: bytes, alt: str) -> None:
        self.data, self.alt = data, alt

    def __repr__(self) -> str:
        return f"Figure: {self.alt}"

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        width, height = struct.unpack(">II", self.data[16:24])
        encoded = b64encode(self.data).decode("ascii")
        return {
            "text/html": f'<img src="data:image/png;base64,{encoded}" alt="{html.escape(self.alt, quote=True)}" '
            f'width="{width}" height="{height}" style="max-width: 100%; height: auto"/>',
            "text/plain": repr(self),
        }


def show(drawn: Figure, alt: str) -> None:
    """Display `drawn` with `alt`, a sentence or two on what a reader sees: axes, trend, the figures that matter.

    Raises UsageError when `alt` is empty.
    """
    if not alt.strip():
        raise UsageError("A picture needs alternative text: say in a sentence what it shows.")
    from IPython.display import display

    display(Picture(png(drawn), alt.strip()))
