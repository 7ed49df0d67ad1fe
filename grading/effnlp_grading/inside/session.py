"""The student's side of grading: runs a notebook's cells in IPython's shell, and its answers on the proctor's cases.

It knows no right answer and decides nothing. Each message from the proctor is a frame of JSON; a case is followed by a
frame with the driver's request. Replies go back the same way. There is no Jupyter kernel: the shell is the one that a
kernel uses, so that magics, `get_ipython` and top-level `await` work as they do in a notebook.
"""

from __future__ import annotations

import contextlib
import io
import json
import signal
import socket
import types
from collections.abc import Callable
from typing import Any

from effnlp_lab.notebook import wire
from effnlp_lab.notebook.driver import answer_case
from effnlp_lab.notebook.limits import TimedOut, time_limit
from effnlp_lab.notebook.split import read_frame, write_frame

KEPT = 4_000  # characters of what one cell prints
WATCHED = ("driver", "forbidden", "limits", "meter", "split", "wire")  # what an answer is run and observed by


def prepare() -> Callable[[socket.socket], None]:
    """Make the shell, before any fork."""
    from IPython.core.history import HistoryManager
    from IPython.core.interactiveshell import InteractiveShell

    HistoryManager.enabled = False
    shell = InteractiveShell.instance(colors="nocolor")
    shell.user_ns.setdefault("display", lambda *things, **named: None)
    kit = _fingerprints()
    return lambda channel: _serve(channel, shell, kit)


def _serve(channel: socket.socket, shell: Any, kit: dict[str, Any]) -> None:
    source, sink = channel.makefile("rb"), channel.makefile("wb")
    while (frame := read_frame(source)) is not None:
        message = json.loads(frame)
        if message["op"] == "run":
            write_frame(sink, json.dumps(_run(shell, message)).encode())
        elif message["op"] == "case":
            request = read_frame(source)
            body = _case(shell, message["answer"], request or b"", kit if message["kit"] else {})
            head = {"number": message["number"]}
            write_frame(sink, json.dumps(head).encode())
            write_frame(sink, body)
        elif message["op"] == "alive":
            write_frame(sink, json.dumps({"alive": _alive()}).encode())


def _run(shell: Any, message: dict[str, Any]) -> dict[str, Any]:
    """Run one cell; what it prints is kept in part, and what it raises is told in a line."""
    out, error = _Kept(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            with time_limit(message["seconds"]):
                outcome = shell.run_cell(message["source"], store_history=False, silent=False)
            error = outcome.error_before_exec or outcome.error_in_exec
        except TimedOut as late:
            error = late
        except BaseException as raised:  # a cell may raise anything, SystemExit included
            error = raised
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    told = None if error is None else [type(error).__name__, _text(error)[:500]]
    return {"error": told, "printed": out.getvalue()}


def _case(shell: Any, name: str, request: bytes, kit: dict[str, Any]) -> bytes:
    """The driver's response for one case; an answer that is not there, or not callable, is said in the same form."""
    now = _fingerprints() if kit else {}
    changed = sorted(what for what in {*kit, *now} if kit.get(what) is not now.get(what))
    if changed:
        return _refused("Tampered", f"the notebook replaces {', '.join(changed[:3])} of the kit")
    answer = shell.user_ns.get(name)
    if answer is None:
        return _refused("NameError", f"name '{name}' is not defined")
    if not callable(answer):
        return _refused("TypeError", f"{name} is {type(answer).__name__}, and a function was expected")
    try:
        return answer_case(request, answer)
    except BaseException as error:  # of the driver, with what the answer left behind: a dead CUDA context, say
        return _refused(type(error).__name__, _text(error)[:500])


def _refused(kind: str, sentence: str) -> bytes:
    error = {"type": kind, "message": sentence, "where": ""}
    return wire.pack({"status": "raised", "outputs": None, "observed": {}, "error": error})


def _alive() -> bool:
    """Whether the GPU still works for this process: after a fault nothing on it does."""
    import torch

    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        return bool(torch.ones(1, device="cuda").item() == 1.0)
    except Exception:
        return False


def _fingerprints() -> dict[str, Any]:
    """The functions and classes by which answers are run, and the code of each: name -> object."""
    import importlib

    found: dict[str, Any] = {}
    for short in WATCHED:
        module = importlib.import_module(f"effnlp_lab.notebook.{short}")
        for name, value in vars(module).items():
            if isinstance(value, types.FunctionType):
                found[f"{short}.{name}"] = value
                found[f"{short}.{name} code"] = value.__code__
            elif isinstance(value, type) and value.__module__ == module.__name__:
                found[f"{short}.{name}"] = value
                for inner, method in vars(value).items():
                    method = getattr(method, "__func__", method)
                    if isinstance(method, types.FunctionType):
                        found[f"{short}.{name}.{inner}"] = method
                        found[f"{short}.{name}.{inner} code"] = method.__code__
    return found


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:  # an error of the student's own kind may refuse to be told
        return ""


class _Kept(io.StringIO):
    """Keeps the beginning of what is written."""

    def write(self, text: str) -> int:
        room = KEPT - self.tell()
        if room > 0:
            super().write(text[:room])
        return len(text)


