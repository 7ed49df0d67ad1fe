"""The proctor's end of a session: orders out, replies in, under the clock and the memory watch.

Nothing that comes from a session is believed: a reply has a known form and a limited size, carries the number of its
order, and arrives in time, or else the session is ended and `Ended` says why. A case's response is only bytes here.
"""

from __future__ import annotations

import json
import select
import struct
import time
from collections.abc import Callable
from typing import Any

from effnlp_grading.limits import Limits
from effnlp_grading.sandbox import Sandbox
from effnlp_grading.watch import GpuWatch, held, shared_out, usage
from effnlp_lab.notebook.limits import WAITED, WORKED

HEAD_BYTES = 1 << 16
_LENGTH = struct.Struct("<Q")
_LOOK = 0.05  # seconds between looks at a session's memory and time


class Ended(Exception):
    """A session came to its end. `status` is "died", "timed out", "memory" or "broke the protocol"."""

    def __init__(self, status: str, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Connection:
    """A session of one submission. Any `Ended` has ended it."""

    def __init__(self, sandbox: Sandbox, limits: Limits, memory: int | None = None,
                 gpu: GpuWatch | None = None) -> None:
        self.limits, self.defences = limits, sandbox.defences
        self.memory = memory or limits.memory * (8 if sandbox.device == "cuda" else 1)  # CUDA's own is large
        self._gpu = gpu
        if gpu is not None:
            gpu.begin()
        self._session = sandbox.spawn(limits, memory)
        self._channel = self._session.channel
        self._channel.settimeout(None)
        self._number = 0
        self._buffer = bytearray()
        self.peak = 0
        self.most_processes = 0
        try:
            self._baseline = held(self._session.student)
        except OSError:
            self._baseline = 0

    @property
    def processes(self) -> tuple[int, int]:
        return self._session.first, self._session.student

    def run(self, source: str) -> dict[str, Any]:
        """Run a cell; return {"error": [type, message] or None, "printed": text}."""
        seconds = self.limits.cell_seconds
        self._send({"op": "run", "source": source, "seconds": seconds}, None, seconds)
        reply = self._head(seconds)
        error, printed = reply.get("error"), reply.get("printed")
        told = error is None or (isinstance(error, list) and len(error) == 2 and all(isinstance(e, str) for e in error))
        if not told or not isinstance(printed, str) or set(reply) != {"error", "printed"}:
            self._refuse("a reply to a cell without its error and what it printed")
        return reply

    def case(self, answer: str, request: bytes, seconds: float) -> bytes:
        """The response to one case, unread."""
        self._number += 1
        order = {"op": "case", "answer": answer, "number": self._number, "kit": "kit" in self.defences}
        self._send(order, request, seconds)
        if self._head(seconds) != {"number": self._number}:
            self._refuse("a reply to another case than the one that was asked")
        return self._frame(self.limits.reply if "frames" in self.defences else 1 << 40, seconds)

    def alive(self) -> bool:
        """Whether its GPU still works. False where the session is over."""
        try:
            self._send({"op": "alive"}, None, self.limits.grace)
            return self._head(self.limits.grace) == {"alive": True}
        except Ended:
            return False

    def end(self) -> None:
        self._session.end()

    def _send(self, head: dict[str, Any], body: bytes | None, seconds: float) -> None:
        self._late = self._clock(seconds)
        frames = [json.dumps(head).encode(), *([] if body is None else [body])]
        data = memoryview(b"".join(part for f in frames for part in (_LENGTH.pack(len(f)), f)))
        self._channel.setblocking(False)
        while data:
            self._look()
            _, writable, _ = select.select([], [self._channel], [], _LOOK)
            if writable:
                try:
                    data = data[self._channel.send(data):]
                except OSError:
                    self._died()

    def _head(self, seconds: float) -> dict[str, Any]:
        frame = self._frame(HEAD_BYTES, seconds)
        try:
            head = json.loads(frame)
        except (ValueError, RecursionError):
            head = None
        if not isinstance(head, dict):
            self._refuse("a reply that is not JSON")
        return head

    def _frame(self, limit: int, seconds: float) -> bytes:
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        if length > limit:
            self._refuse(f"a reply of {length:,} bytes, where at most {limit:,} may come")
        return self._exactly(length)

    def _exactly(self, count: int) -> bytes:
        while len(self._buffer) < count:
            self._look()
            readable, _, _ = select.select([self._channel], [], [], _LOOK)
            if readable:
                try:
                    data = self._channel.recv(1 << 20)
                except BlockingIOError:
                    continue
                except OSError:
                    data = b""
                if not data:
                    self._died()
                self._buffer += data
        found = bytes(self._buffer[:count])
        del self._buffer[:count]
        return found

    _looked = 0.0

    def _look(self) -> None:
        """End the session when it takes too much time or memory; looks twenty times a second at most."""
        now = time.monotonic()
        if now - self._looked < _LOOK:
            return
        self._looked = now
        seen = usage(self._session.first, self._baseline)
        self.peak = max(self.peak, seen.memory)
        self.most_processes = max(self.most_processes, seen.processes)
        too_much = seen.memory > self.memory and (seen.processes <= 2 or shared_out(self._session.first) > self.memory)
        if "memory" in self.defences and too_much:
            self._end("memory", f"took more than the {self.memory >> 20:,} MiB of memory that it may take")
        if self._gpu is not None and "memory" in self.defences:
            on_card = self._gpu.used(self._session.first)
            if on_card > self.limits.gpu_memory:
                self._end("memory", f"took more than the {self.limits.gpu_memory >> 20:,} MiB of the GPU's memory "
                                    "that it may take")
        if "time" in self.defences and self._late(seen.worked, now):
            self._end("timed out", "had not answered in time, and was ended")

    def _clock(self, seconds: float) -> Callable[[float, float], bool]:
        """The rule of `effnlp_lab.notebook.limits`, seen from outside and with some grace: work counts, not waiting."""
        began = time.monotonic()
        worked = usage(self._session.first).worked
        grace = self.limits.grace

        def late(work: float, now: float) -> bool:
            by_work = work - worked >= WORKED * seconds + grace and now - began >= seconds + grace
            return by_work or now - began >= WAITED * seconds + grace

        return late

    def _died(self) -> None:
        self._end("died", "ended the process that ran it (out of memory, os._exit, or a crash in native code)")

    def _refuse(self, what: str) -> None:
        self._end("broke the protocol", f"sent the grader {what}")

    def _end(self, status: str, sentence: str) -> None:
        self._session.end()
        raise Ended(status, sentence)
