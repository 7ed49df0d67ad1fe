"""The two halves of a check in two processes, with nothing but the wire between them.

`SplitDriver` starts `python -m effnlp_lab.notebook.split`, which runs answers and never sees a reference. Frames on its
standard input are an answer's source (a wire value with lab, exercise and source) or a case; each is answered by one
frame. The sandboxed grader stands on the same two halves.
"""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import BinaryIO

from effnlp_lab.notebook import wire

_LENGTH = struct.Struct("<Q")


def write_frame(stream: BinaryIO, data: bytes) -> None:
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def read_frame(stream: BinaryIO, limit: int = wire.MAX_BYTES) -> bytes | None:
    """The next frame; None at the end of the stream. Raises WireError when it is cut short or too long."""
    head = stream.read(_LENGTH.size)
    if not head:
        return None
    if len(head) < _LENGTH.size:
        raise wire.WireError("the stream ended inside a frame's length")
    (length,) = _LENGTH.unpack(head)
    if length > limit:
        raise wire.WireError(f"a frame of {length:,} bytes; at most {limit:,} may cross")
    data = stream.read(length)
    if len(data) < length:
        raise wire.WireError("the stream ended inside a frame")
    return data


class SplitDriver(contextlib.AbstractContextManager):
    """A driver in a process of its own. `with SplitDriver() as driver: driver.load(...); judge(..., driver.ask)`."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def load(self, lab: str, exercise: str, source: str) -> None:
        """Give the other process an answer's source. Raises WireError when it does not define the exercise."""
        reply = wire.unpack(self.ask(wire.pack({"lab": lab, "exercise": exercise, "source": source})))
        if reply != "loaded":
            raise wire.WireError(str(reply))

    def ask(self, request: bytes) -> bytes:
        """Send one frame, wait for the answer."""
        write_frame(self._process.stdin, request)
        response = read_frame(self._process.stdout)
        if response is None:
            raise wire.WireError(f"the driver's process ended with exit code {self._process.wait()}")
        return response

    def __exit__(self, *exc_info) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=30)


def serve() -> None:
    """Answer frames until the stream ends. Standard output belongs to the frames: what answers print is captured."""
    from effnlp_lab.notebook.driver import answer_case
    from effnlp_lab.notebook.judge import answer_from_source

    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    answer: Callable | None = None
    while (frame := read_frame(source)) is not None:
        message = wire.unpack(frame)
        if "source" not in message:
            write_frame(sink, answer_case(frame, answer))
            continue
        try:
            answer = answer_from_source(message["lab"], message["exercise"], message["source"])
            reply = "loaded"
        except Exception as error:
            reply = f"{type(error).__name__}: {error}"
        write_frame(sink, wire.pack(reply))


if __name__ == "__main__":
    serve()
