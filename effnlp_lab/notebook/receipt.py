"""The receipt of a lab: the same work done by the baseline, the student, the reference and the library, and its costs.

A receipt is shown at the end of a notebook and saved as JSON beside it, so that `effnlp bench` can gather them.
"""

from __future__ import annotations

import html
import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from effnlp_lab.errors import UsageError
from effnlp_lab.notebook.bench import number, write_json

ROLES = ("baseline", "yours", "reference", "library", "limit")
COSTS = {"peak_bytes": "peak memory", "bytes_moved": "bytes moved", "flops": "FLOPs", "seconds": "time"}
LABELS = {"baseline": "baseline", "yours": "your answer", "reference": "reference", "library": "library",
          "limit": "hardware limit"}


@dataclass(frozen=True)
class Row:
    """One way to do the work, and what it cost; None where a cost was not measured.

    role: one of `ROLES`; quality: a perplexity, a share or a word such as "equal", whatever the receipt's `quality`
    names; peak_bytes, bytes_moved in bytes; flops in operations; seconds.
    """

    role: str
    name: str = ""
    quality: float | str | None = None
    peak_bytes: float | None = None
    bytes_moved: float | None = None
    flops: float | None = None
    seconds: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UsageError(f"Unknown role {self.role!r} in a receipt: expected one of {', '.join(ROLES)}.")
        for cost in ("quality", *COSTS):
            value = getattr(self, cost)
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"The {cost} of {self.role} is {value}: leave out what could not be measured.")


class Receipt:
    """The rows of one lab's measurement. `quality` names what the quality column holds, with its direction."""

    def __init__(self, lab: str, *rows: Row, title: str = "", quality: str = "quality", device: Any = None) -> None:
        self.lab, self.title, self.quality = lab, title or f"Receipt of lab {lab}", quality
        self.device = device
        self.rows = list(rows)

    def add(self, role: str, name: str = "", **costs: Any) -> Receipt:
        """Add a row, see `Row`. Returns the receipt."""
        self.rows.append(Row(role, name, **costs))
        return self

    def cells(self) -> list[list[str]]:
        """The table as text: a header, then one row a way. Columns that nobody filled are left out."""
        costs = [cost for cost in COSTS if any(getattr(row, cost) is not None for row in self.rows)]
        notes = any(row.note for row in self.rows)
        baseline = next((row for row in self.rows if row.role == "baseline"), None)
        header = ["", self.quality, *(COSTS[cost] for cost in costs), *(["note"] if notes else [])]
        table = [header]
        for row in self.rows:
            label = LABELS[row.role] + (f" ({row.name})" if row.name else "")
            measured = [_cost(cost, getattr(row, cost), _of(baseline, row, cost)) for cost in costs]
            table.append([label, _quality(row.quality), *measured, *([row.note] if notes else [])])
        return table

    def text(self) -> str:
        """For a terminal."""
        table = self.cells()
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        return "\n".join([self.title, *lines, *self._origin()])

    def html(self) -> str:
        """For a notebook: a table with a caption and header cells that screen readers announce."""
        header, *body = [[html.escape(cell) for cell in row] for row in self.cells()]
        head = "<td></td>" + "".join(f'<th scope="col">{cell}</th>' for cell in header[1:])
        rows = "".join(
            f'<tr><th scope="row" style="text-align: left">{row[0]}</th>'
            + "".join(f'<td style="text-align: right">{cell}</td>' for cell in row[1:]) + "</tr>"
            for row in body
        )
        origin = "".join(f"<p>{html.escape(line)}</p>" for line in self._origin())
        caption = f'<caption style="text-align: left">{html.escape(self.title)}</caption>'
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{origin}"

    def to_json(self) -> dict[str, Any]:
        device = getattr(self.device, "name", self.device)
        return {"lab": self.lab, "title": self.title, "quality": self.quality, "device": device,
                "rows": [asdict(row) for row in self.rows]}

    def show(self) -> None:
        """Display the table: HTML in a notebook, text in a terminal."""
        if _in_notebook():
            from IPython.display import display

            display(self)
        else:
            print(self.text())

    def save(self, folder: str | Path | None = None) -> Path:
        """Write `receipt_<lab>.json` to `folder`, else to $EFFNLP_RECEIPTS, else beside the notebook."""
        folder = Path(folder or os.environ.get("EFFNLP_RECEIPTS") or Path.cwd())
        return write_json(folder / f"receipt_{self.lab}.json", self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Receipt:
        """Read a saved receipt. Raises UsageError when the file holds none."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            rows = [Row(**row) for row in content["rows"]]
            return cls(content["lab"], *rows, title=content["title"], quality=content["quality"],
                       device=content.get("device"))
        except UsageError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{Path(path).name} holds no receipt ({error}): run the lab again.") from None

    def _origin(self) -> list[str]:
        return [f"Measured on {getattr(self.device, 'name', self.device)}."] if self.device else []

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        return {"text/html": self.html(), "text/plain": self.text()}


def _of(baseline: Row | None, row: Row, cost: str) -> float | None:
    """This row's cost as a multiple of the baseline's."""
    base, value = getattr(baseline, cost, None), getattr(row, cost)
    return value / base if base and value is not None and row is not baseline else None


def _cost(cost: str, value: float | None, multiple: float | None) -> str:
    if value is None:
        return "not measured"
    unit = {"seconds": _seconds, "flops": lambda flops: _scaled(flops, 1000, ("", "K", "M", "G", "T", "P")) + "FLOP"}
    written = unit.get(cost, lambda size: _scaled(size, 1024, ("", "Ki", "Mi", "Gi", "Ti", "Pi")) + "B")(value)
    return written if multiple is None else f"{written} ({number(multiple)} of baseline)"


def _seconds(value: float) -> str:
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * factor >= 1 or unit == "µs":
            return f"{number(value * factor)} {unit}"
    raise AssertionError


def _scaled(value: float, step: int, prefixes: tuple[str, ...]) -> str:
    for prefix in prefixes:
        if abs(value) < step or prefix == prefixes[-1]:
            return f"{number(value)} {prefix}"
        value /= step
    raise AssertionError


def _quality(value: float | str | None) -> str:
    return "not measured" if value is None else value if isinstance(value, str) else f"{value:.4g}"


def _in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and getattr(shell, "kernel", None) is not None
