"""Progress while a class is graded, with the time that is left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress(total: int, title: str) -> Iterator:
    """A function to call with each Result: a bar on a terminal, else one line a submission."""
    console = Console()
    if not console.is_terminal:
        done, began = 0, time.monotonic()

        def line(result) -> None:
            nonlocal done
            done += 1
            left = (time.monotonic() - began) / done * (total - done)
            what = f"{result.student} {result.lab}: {result.state} in {result.seconds:.1f} s"
            rest = f" (about {left:.0f} s left)" if done < total else ""
            print(f"{title}: {done} of {total}: {what}{rest}\n", end="", flush=True)  # one write

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(title, total=total)
        yield lambda result: bars.advance(task)
