"""The warm parent: imports what every submission needs once, then forks a child for each.

It runs no code of a student's. Started as `python -m effnlp_inside.warm DESCRIPTOR LAB MODULE...` with the modules that
the lab's notebook imports. The descriptor is one end of a SOCK_SEQPACKET pair, on which the proctor sends a request
with one descriptor, the session's socket. The session's first two bytes come from process 1 of the new process space
and from the student's process: the kernel tells the proctor their process ids. The warm parent ends, and everything
with it, when the proctor closes its end.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Sequence

from . import walls
from .walls import Walls

REQUEST_BYTES = 1 << 16


def main(descriptor: int, lab: str, modules: Sequence[str]) -> None:
    control = socket.socket(fileno=descriptor)
    serve_session = prepare(lab, modules)
    walls.hide_memory()
    control.send(b"ready")
    children: set[int] = set()
    while True:
        readable, _, _ = select.select([control], [], [], 1.0)
        children -= _ended()
        if not readable:
            continue
        message, descriptors, _, _ = socket.recv_fds(control, REQUEST_BYTES, 1)
        if not message:
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            os._exit(0)
        child = os.fork()
        if child == 0:
            try:
                control.close()
                _become_session(json.loads(message), socket.socket(fileno=descriptors[0]), serve_session)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)  # the sandbox's log
            os._exit(70)
        children.add(child)
        os.close(descriptors[0])


def prepare(lab: str, modules: Sequence[str]) -> Callable[[socket.socket], None]:
    """Import everything that takes time, and return what serves a session."""
    import torch

    torch.set_num_threads(1)  # threads do not survive a fork
    from effnlp_lab import exercises
    from effnlp_lab.notebook import setting  # noqa: F401  notebooks call it

    from . import session

    exercises.drive_module(lab)
    for name in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    torch.ones(64, 64) @ torch.ones(64, 64)  # libraries of linear algebra make their buffers at first use
    return session.prepare()


def _become_session(request: dict, channel: socket.socket, serve_session: Callable[[socket.socket], None]) -> None:
    """In a child of the warm parent: put up the walls and serve, as three processes: this, process 1, the student's."""
    limits = Walls.from_json(request["walls"])
    walls.die_with_parent()
    if request["confined"]:
        walls.enter_spaces(limits)
    first = os.fork()
    if first:
        channel.close()
        os.waitpid(first, 0)
        os._exit(0)
    if request["confined"]:
        walls.mount_private(limits)
    channel.send(b"1")
    student = os.fork()
    if student:
        channel.close()
        if request["confined"]:
            walls.drop_rights(limits)
            walls.hide_memory()
        while True:  # reap whatever ends; when the student's process does, the whole space goes with it
            if os.wait()[0] == student:
                os._exit(0)
    os.setsid()
    if request["confined"]:
        os.chdir(walls.SCRATCH)
        walls.drop_rights(limits)
        walls.set_limits(limits)
        if limits.filtered:
            walls.filter_calls()
    else:
        os.chdir(request["folder"])
    if request["tight"]:
        walls.give_back_memory()
    _detach()
    channel.send(b"2")
    serve_session(channel)
    os._exit(0)


def _detach() -> None:
    """Standard streams lead nowhere: what cells print is kept by the session."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    os.close(nowhere)


def _ended() -> set[int]:
    found = set()
    with contextlib.suppress(ChildProcessError):
        while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
            found.add(pid)
    return found


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
