"""Progress while a class is graded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def progress(total: int, title: str) -> Iterator:
    """A function to call with each Result: a bar on a terminal, else one line a submission."""
    console = Console()
    if not console.is_terminal:
        done = 0

        def line(result) -> None:
            nonlocal done
            done += 1
            what = f"{result.student} {result.lab}: {result.state} in {result.seconds:.0f} s"
            print(f"{title}: {done} of {total}: {what}\n", end="", flush=True)  # one write: threads do not mix

        yield line
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(title, total=total)
        yield lambda result: bars.advance(task)
