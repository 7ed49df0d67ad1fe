"""Runs an answer on one case and observes it: the untrusted side of a check.

A request and a response are bytes (`wire`). The driver knows no right answer: it lays out the inputs, calls the
answer through the lab's `drive.py`, and reports the outputs with what it saw on the way: what was printed, which inputs
changed, what the outputs alias, which forbidden calls were made, what the meter counted.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from effnlp_lab import exercises
from effnlp_lab.notebook import wire
from effnlp_lab.notebook.forbidden import ForbiddenCall, Watch
from effnlp_lab.notebook.limits import TimedOut, time_limit
from effnlp_lab.notebook.meter import Meter

KEPT_OUTPUT = 2_000  # characters of what an answer prints that are kept for the report
COMPILE_SECONDS = 120.0  # added for the first call of a Triton answer


def answer_case(request: bytes, answer: Callable) -> bytes:
    """Run `answer` on the case in `request`; always returns a response, whatever the answer does."""
    case = wire.unpack(request)
    case["inputs"] = wire.unpack(case["inputs"], case["device"])
    before = wire.unpack(wire.pack(case["inputs"]), case["device"])  # a copy with the same layout
    response: dict[str, Any] = {"status": "ok", "outputs": None, "observed": {}}
    watch = Watch(case["forbidden"])
    captured = _Captured()
    meter = Meter() if case["meter"] else None
    drive = _drive_of(case["lab"], case["exercise"])
    outputs = None
    with captured, torch.random.fork_rng(devices=[]):
        _seed(case["seed"] % (1 << 63), case["device"])
        started = time.perf_counter()
        try:
            with watch.reading(answer), watch, meter or contextlib.nullcontext(), time_limit(case["seconds"]):
                outputs = drive(answer, case["inputs"])
                if case["device"] == "cuda":
                    torch.cuda.synchronize()
        except ForbiddenCall:
            response["status"] = "forbidden"
        except TimedOut:
            response["status"] = "timed out"
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # an answer may raise anything, SystemExit included
            response.update(_describe_error(error))
        response["observed"]["seconds"] = time.perf_counter() - started
    observed = response["observed"]
    observed.update(
        captured.report(),
        forbidden=sorted(watch.seen),
        usage=meter.usage.as_dict() if meter else None,
        changed=_changed(before, case["inputs"]),
        aliases=_aliases(outputs, case["inputs"]),
        devices=sorted({t.device.type for t in _objects(outputs) if isinstance(t, torch.Tensor)}),
    )
    if watch.seen:
        response["status"] = "forbidden"
    try:
        response["outputs"] = outputs if response["status"] == "ok" else None
        return wire.pack(response)
    except wire.WireError as error:
        return wire.pack(
            {
                "status": "raised",
                "outputs": None,
                "observed": observed,
                "error": {"type": "WireError", "message": str(error), "where": ""},
            }
        )


def is_blank(error: BaseException) -> bool:
    """Whether an error says that the blank is still there, from Python or from Triton's compiler."""
    return isinstance(error, NotImplementedError) or (
        type(error).__name__ in ("CompilationError", "InterpreterError") and "NotImplementedError" in str(error)
    )


def _seed(seed: int, device: str) -> None:
    """torch.manual_seed, which without a GPU in use spends a millisecond on noting where it was called from."""
    torch.default_generator.manual_seed(seed)
    if device == "cuda":
        torch.cuda.manual_seed_all(seed)


def _drive_of(lab: str, exercise: str) -> Callable:
    custom = getattr(exercises.drive_module(lab), exercise, None)
    if custom is not None:
        return lambda answer, inputs: custom(answer, **inputs)
    return lambda answer, inputs: answer(**inputs)


def _describe_error(error: BaseException) -> dict[str, Any]:
    if is_blank(error):
        return {"status": "blank"}
    if type(error).__name__ == "InterpreterError" and error.__cause__ is not None:
        error = error.__cause__  # Triton's interpreter wraps what happened in the kernel
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "effnlp_lab" not in f.filename]
    where = f"line {frames[-1].lineno}: {frames[-1].line}" if frames else ""
    message = str(error)[:500]
    if isinstance(error, torch.cuda.OutOfMemoryError):
        message = f"out of GPU memory: {message}"
    return {"status": "raised", "error": {"type": type(error).__name__, "message": message, "where": where[:300]}}


class _Captured(contextlib.AbstractContextManager):
    """Keeps what an answer prints, warns and logs out of the notebook (nbgrader scores a cell with stderr 0)."""

    def __enter__(self) -> _Captured:
        self.out, self.err = _Bounded(), _Bounded()
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(_descriptor_redirected(1, self.out))
        self._stack.enter_context(_descriptor_redirected(2, self.err))
        self._stack.enter_context(contextlib.redirect_stdout(self.out))
        self._stack.enter_context(contextlib.redirect_stderr(self.err))
        self._stack.enter_context(_handlers_redirected(self.err))
        self._stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, category, *rest: self.err.write(f"{category.__name__}: {message}\n")
        return self

    def __exit__(self, *exc_info) -> None:
        self._stack.close()

    def report(self) -> dict[str, Any]:
        return {
            "stdout": self.out.kept(),
            "stdout_characters": self.out.count,
            "stderr": self.err.kept(),
            "stderr_characters": self.err.count,
        }


class _Bounded(io.TextIOBase):
    """A text stream that keeps the beginning of what is written to it and counts the rest."""

    def __init__(self) -> None:
        self.count = 0
        self._kept: list[str] = []
        self._room = KEPT_OUTPUT

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.count += len(text)
        if self._room > 0:
            self._kept.append(text[: self._room])
            self._room -= len(self._kept[-1])
        return len(text)

    def kept(self) -> str:
        return "".join(self._kept)


@contextlib.contextmanager
def _descriptor_redirected(descriptor: int, stream: _Bounded) -> Iterator[None]:
    """Catch what native libraries write below Python's streams."""
    with tempfile.TemporaryFile() as caught:
        kept = os.dup(descriptor)
        os.dup2(caught.fileno(), descriptor)
        try:
            yield
        finally:
            os.dup2(kept, descriptor)
            os.close(kept)
            length = caught.seek(0, os.SEEK_END)
            caught.seek(0)
            stream.write(caught.read(KEPT_OUTPUT).decode(errors="replace"))
            stream.count += max(0, length - KEPT_OUTPUT)


@contextlib.contextmanager
def _handlers_redirected(stream: io.TextIOBase) -> Iterator[None]:
    """Point log handlers that hold the real standard streams at `stream`."""
    loggers = [
        logging.getLogger(),
        *(g for g in logging.Logger.manager.loggerDict.values() if isinstance(g, logging.Logger)),
    ]
    held = [
        (h, h.stream)
        for g in loggers
        for h in g.handlers
        if isinstance(h, logging.StreamHandler) and h.stream in (sys.__stdout__, sys.__stderr__)
    ]
    for handler, _ in held:
        handler.stream = stream
    try:
        yield
    finally:
        for handler, original in held:
            handler.stream = original


def _changed(before: Any, after: Any) -> list[str]:
    """Names of the inputs that are no longer what they were."""
    return [name for name in before if not _same(before[name], after[name])]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and a.shape == b.shape
            and a.dtype == b.dtype
            and torch.equal(
                torch.nan_to_num(a) if a.is_floating_point() else a, torch.nan_to_num(b) if b.is_floating_point() else b
            )
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and (a == b or (isinstance(a, float) and a != a and b != b))


def _aliases(outputs: Any, inputs: dict[str, Any]) -> list[str]:
    """Names of the inputs that an output is, or looks into."""
    mine = [leaf for leaf in _objects(outputs)]
    storages = {t.untyped_storage().data_ptr() for t in mine if isinstance(t, torch.Tensor) and t.numel()}
    containers = {id(o) for o in mine if isinstance(o, (list, dict))}
    found = []
    for name, value in inputs.items():
        if any(
            (isinstance(o, torch.Tensor) and o.numel() and o.untyped_storage().data_ptr() in storages)
            or (isinstance(o, (list, dict)) and id(o) in containers)
            for o in _objects(value)
        ):
            found.append(name)
    return found


def _objects(value: Any, depth: int = 0) -> Iterator[Any]:
    if isinstance(value, torch.Tensor) and value.layout == torch.strided:
        yield value
    elif depth < 4 and isinstance(value, (list, tuple)):
        yield value
        for item in value[:64]:
            yield from _objects(item, depth + 1)
    elif depth < 4 and isinstance(value, dict):
        yield value
        for item in list(value.values())[:64]:
            yield from _objects(item, depth + 1)
