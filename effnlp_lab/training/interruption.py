"""Ctrl-C that ends a run between two steps, and not in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stop:
    """Whether somebody asked the run to stop."""

    asked = False


@contextmanager
def finish_the_step() -> Iterator[Stop]:
    """Turn the first Ctrl-C into a wish to stop after this step; the second raises KeyboardInterrupt as usual."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handler(number: int, frame: Any) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        print("Stopping after this step (once more to stop at once).", flush=True)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
