"""Runs pieces of work in forked children: what is imported and computed here is there at once, and nothing comes back
but an answer in JSON. A child that dies, hangs, fills memory or writes through a wild pointer spoils nothing else."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import select
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from effnlp_lab.errors import UsageError

MEMORY = 8 << 30  # bytes of address space that a child may take beyond what it starts with
Work = Callable[[], Any]


@dataclass
class _Child:
    index: int
    pid: int
    deadline: float
    heard: bytes = b""


def in_children(works: Sequence[Work], jobs: int, seconds: float, folder: Path) -> Iterator[tuple[int, Any]]:
    """Run every piece of work in a child of its own, `jobs` at once; yield (index, result) as they end.

    The result is what the work returned, {"broke": what it raised}, {"died": minus a signal, or an exit status} or
    {"hung": seconds}. Children have `folder` as their working directory, and no standard streams.
    """
    if not hasattr(os, "fork"):
        raise UsageError("`effnlp mutate` starts its workers with fork: run it on Linux, macOS or WSL.")
    waiting = deque(enumerate(works))
    running: dict[int, _Child] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                index, work = waiting.popleft()
                pipe, pid = _start(work, folder)
                running[pipe] = _Child(index, pid, time.monotonic() + seconds)
            nearest = min(child.deadline for child in running.values())
            ready, _, _ = select.select(list(running), [], [], max(0.0, nearest - time.monotonic()))
            for pipe in ready:
                piece = os.read(pipe, 1 << 16)
                running[pipe].heard += piece
                if not piece or piece.endswith(b"\n"):
                    child = running.pop(pipe)
                    status = _end(pipe, child.pid)
                    yield child.index, json.loads(child.heard) if child.heard.endswith(b"\n") else {"died": status}
            for pipe in [p for p, child in running.items() if child.deadline <= time.monotonic()]:
                child = running.pop(pipe)
                _end(pipe, child.pid)
                yield child.index, {"hung": seconds}
    finally:
        for pipe, child in running.items():
            _end(pipe, child.pid)


def _start(work: Work, folder: Path) -> tuple[int, int]:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(work, write, folder)
    os.close(write)
    return read, pid


def _child(work: Work, write: int, folder: Path) -> NoReturn:
    """The rest of a child's life."""
    try:
        os.setsid()  # what it starts in turn ends with it
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        faulthandler.disable()
        _set_limits()
        os.chdir(folder)
        try:
            result = work()
        except BaseException as error:
            result = {"broke": f"{type(error).__name__}: {error}"[:300]}
        answer = json.dumps(result).encode() + b"\n"
        while answer:
            answer = answer[os.write(write, answer) :]
    finally:
        os._exit(1)


def _set_limits() -> None:
    """No core files, and no more memory than MEMORY beyond what is there already."""
    import resource  # not on Windows

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # not Linux
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _end(pipe: int, pid: int) -> int:
    """Close a child's pipe, kill it and what it started, and return how it ended: minus a signal, or its exit status.

    One that is ending already keeps its own status.
    """
    os.close(pipe)
    for kill in (os.killpg, os.kill):  # it has no group of its own while it is only starting
        with contextlib.suppress(OSError):
            kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)
