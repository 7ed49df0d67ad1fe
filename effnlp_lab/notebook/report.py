"""How a verdict speaks: a compact block in a notebook, plain text in a terminal. State is said in words, not colour."""

from __future__ import annotations

import html
from typing import Any

from effnlp_lab.notebook.judge import CaseResult, Verdict

_SIGN = {"correct": "\u2713", "not attempted": "\u25cb", "not run here": "\u2013"}
# Of the bar alone: seen on a light and on a dark ground. Text has the notebook's own colour.
_TONE = {"correct": "#1f8a66", "not attempted": "#767676", "not run here": "#767676", "over budget": "#9a6700"}
_WRONG = "#d13438"


def text(verdict: Verdict, standing: str = "") -> str:
    """The verdict as plain text, with where the student stands in the lab as its last line."""
    lines = [f"{verdict.exercise}: {verdict.state}, {_points(verdict)}", f"  {verdict.sentence}"]
    lines += [f"  Likely: {m}" for m in verdict.mistakes]
    failure = verdict.first_failure
    if failure is not None and failure.state != "not attempted":
        lines.append(f"  First failing case: {failure.name}")
        lines += [f"    {name}: {value}" for name, value in failure.details.items()]
    lines += [f"  Cases: {_count(verdict)}"] if verdict.cases and verdict.state != "not attempted" else []
    lines += [f"  Note: {n}" for n in verdict.notes]
    lines += [standing] if standing else []
    return "\n".join(lines)


def markup(verdict: Verdict, standing: str = "") -> str:
    """The same as an HTML block."""
    tone = _TONE.get(verdict.state, _WRONG)
    e = html.escape
    rows = [
        f'<div style="font-weight:600">{_SIGN.get(verdict.state, "&#x2717;")} '
        f"<code>{e(verdict.exercise)}</code>: {e(verdict.state)}, {e(_points(verdict))}</div>",
        f"<div>{e(verdict.sentence)}</div>",
    ]
    rows += [f"<div><b>Likely:</b> {e(m)}</div>" for m in verdict.mistakes]
    failure = verdict.first_failure
    if failure is not None and failure.state != "not attempted":
        rows.append(f"<div>First failing case: <i>{e(failure.name)}</i>{_details(failure)}</div>")
    rows += [f"<div>Note: {e(n)}</div>" for n in verdict.notes]
    if verdict.cases and verdict.state != "not attempted":
        rows.append(
            f"<details><summary>{e(_count(verdict))}</summary>{_table(verdict)}"
            f"<div>seed {verdict.seed}, device {e(verdict.device)}{e(_variant(verdict))}</div></details>"
        )
    rows += [f"<div>{e(standing)}</div>"] if standing else []
    return (
        f'<div role="group" aria-label="result of {e(verdict.exercise)}" style="border-left:4px solid {tone};'
        f'padding:4px 12px;margin:4px 0;line-height:1.5">{"".join(rows)}</div>'
    )


def _points(verdict: Verdict) -> str:
    if not verdict.points:
        return "badge earned" if verdict.state == "correct" else "no badge yet"
    return f"{verdict.score:g} of {verdict.points:g} point{'' if verdict.points == 1 else 's'}"


def _count(verdict: Verdict) -> str:
    run = [c for c in verdict.cases if c.state != "not run here"]
    waiting = len(verdict.cases) - len(run)
    passed = sum(c.state == "correct" for c in run)
    return f"{passed} of {len(run)} cases pass" + (f"; {waiting} to be graded on a GPU" if waiting else "")


def _variant(verdict: Verdict) -> str:
    return "".join(f", {name}: {value}" for name, value in verdict.variant.items())


def _details(case: CaseResult) -> str:
    if not case.details:
        return ""
    items = "".join(
        f"<tr><td style='text-align:left'>{html.escape(str(k))}</td>"
        f"<td style='text-align:left'><code>{html.escape(_brief(v))}</code></td></tr>"
        for k, v in case.details.items()
    )
    return f'<table style="margin:4px 0;text-align:left">{items}</table>'


def _brief(value: Any) -> str:
    shown = f"{value:.3g}" if isinstance(value, float) else str(value)
    return shown if len(shown) <= 200 else shown[:197] + "..."


def _table(verdict: Verdict) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(c.name)}</td><td>{html.escape(c.part)}</td><td>{html.escape(c.state)}</td>"
        f"<td>{c.seconds:.2f} s</td></tr>"
        for c in verdict.cases
    )
    return (
        '<table style="text-align:left"><thead><tr><th scope="col">case</th><th scope="col">part</th>'
        f'<th scope="col">state</th><th scope="col">time</th></tr></thead><tbody>{rows}</tbody></table>'
    )


def show(verdict: Verdict, standing: str = "") -> None:
    """Display both where we are: HTML with a plain-text twin in a notebook, plain text elsewhere."""
    try:
        from IPython import get_ipython

        in_notebook = get_ipython() is not None and get_ipython().has_trait("kernel")
    except ImportError:
        in_notebook = False
    if in_notebook:
        from IPython.display import display

        display({"text/html": markup(verdict, standing), "text/plain": text(verdict, standing)}, raw=True)
    else:
        print(text(verdict, standing))
