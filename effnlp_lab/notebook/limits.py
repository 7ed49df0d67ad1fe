"""A time limit around an answer, in the process that runs it.

An alarm stops a Python loop, not one long call into C: the sandboxed grader ends such a process from outside. On a busy
machine a right answer may get a fraction of a core: a limit that is reached by the clock counts once the process has
worked for most of it, or has waited for several times as long.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading
import time
from collections.abc import Callable, Iterator

WORKED, WAITED = 0.7, 4.0  # shares of the limit: time on the processor, and time by the clock


class TimedOut(BaseException):
    """Raised inside an answer that ran too long. Not an Exception, so that `except Exception` lets it pass."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimedOut in the body once its `seconds` are over, and again each second until the body gives up."""
    if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
        with _alarm(seconds):
            yield
    else:
        with _timer(seconds):
            yield


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    over = _clock(seconds)

    def ring(signum, frame):
        if over():
            raise TimedOut

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)


@contextlib.contextmanager
def _timer(seconds: float) -> Iterator[None]:
    """For Windows, and for threads other than the main one: an exception set from a timer's thread."""
    thread = ctypes.c_ulong(threading.get_ident())
    done, over = threading.Event(), _clock(seconds)

    def watch():
        wait = seconds
        while not done.wait(wait):
            if over():
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(TimedOut))
            wait = 1.0

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)


def _clock(seconds: float) -> Callable[[], bool]:
    """Whether the limit is over, counted from now."""
    began, worked = time.monotonic(), time.process_time()

    def over() -> bool:
        on_processor, by_clock = time.process_time() - worked, time.monotonic() - began
        return on_processor >= WORKED * seconds or by_clock >= WAITED * seconds

    return over
