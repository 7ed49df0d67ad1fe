"""The limits under which submissions are graded, and the defences that hold them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

DEFENCES = frozenset({
    "network",  # a network space without any device
    "files",  # only the system, Python and the kit are there, read-only
    "environment",  # no variable of the instructor's
    "masks",  # the lab's room, references and the libraries that would answer are not there
    "spaces",  # processes and IPC of each submission apart
    "scratch",  # scratch folders of each submission apart, of limited size
    "calls",  # a filter of system calls
    "processes",  # a limit on processes
    "memory",  # a limit on memory
    "time",  # the clock outside
    "source",  # forbidden names are looked for in the submission's text, outside
    "kit",  # a notebook that replaces parts of the kit gets nothing for what they observe
    "real size",  # a case at which quadratic memory exceeds the sandbox
    "restart",  # a session that ended is replaced for the exercises that are left
    "frames",  # replies are limited in size and strictly read
    "repair",  # the release says which cells there are, and what they are worth
    "verdicts",  # the proctor's verdict replaces whatever a check's cell says
})


@dataclass(frozen=True)
class Limits:
    """Limits of one submission. Bytes and seconds.

    memory: what a session may allocate beyond the warm parent's; scratch: its files; reply: one reply of a session;
    cell_seconds: one cell; case_seconds: at most for one case (an exercise's own limit holds where it is less);
    submission_seconds: all of it, by the clock; gpu_memory: on the card.
    """

    memory: int = 2 << 30
    scratch: int = 256 << 20
    processes: int = 64
    reply: int = 256 << 20
    cell_seconds: float = 60.0
    case_seconds: float = 3600.0
    submission_seconds: float = 1800.0
    gpu_memory: int = 16 << 30
    grace: float = 2.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
