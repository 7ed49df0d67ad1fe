"""Shuffling what can only be read from front to back.

A buffer holds `size` rows; each step gives out one at random and puts the next row in its place. Shuffling is local: a
row comes out at most `size` - 1 steps early, and later by `size` steps in the mean.

Which slot a step draws depends on (seed, epoch, step) alone. So the slots need not be saved: from the number of rows
given out, arithmetic tells which rows are in the buffer, and reading goes on at the oldest of them. (A buffer that is
filled afresh after a resume loses rows, and one that is saved with its rows makes a large state.)
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np

from effnlp_lab.errors import UsageError
from effnlp_lab.streaming.order import Order, draws, key_of, whole

CHUNK = 4096
Held = tuple[int, Any, Any]  # the number of a row in the source, its place, and the row


class ShuffleBuffer:
    """The rows of one epoch of `source`, shuffled in a buffer of `size` rows. Size 1 keeps the source's order.

    source: has `rows(start=None)`, which gives (place, row) pairs from the row on whose place is `start`; a place is
    anything that JSON can hold (see sources.py). Iterate once; `state_dict()` says where the iteration stands, and a
    buffer that is given it as `state` continues there, with the same rows in the same order.
    """

    def __init__(self, source: Any, size: int, seed: int = 0, epoch: int = 0, state: dict | None = None) -> None:
        self.source, self.size = source, whole("size", size, 1)
        self.emitted, self.total = (0, None) if state is None else (state["emitted"], state["total"])
        self._oldest = (0, None) if state is None else (state["oldest"], state["place"])
        self._key = key_of(whole("seed", seed), whole("epoch", epoch, 0))
        self._held: list[Held] = []

    def __iter__(self) -> Iterator[Any]:
        rows = self._restore()
        if self.total is None:
            for slot, fresh in zip(self._slots(), rows, strict=False):
                row, self._held[slot] = self._held[slot][2], fresh
                self.emitted += 1
                yield row
            self.total = self.emitted + len(self._held)
            self._held = [self._held[slot] for slot in self._last_turns(len(self._held))]
        while self._held:
            self.emitted += 1
            yield self._held.pop()[2]

    def state_dict(self) -> dict[str, Any]:
        """{emitted, total (None until the source has ended), oldest, place}: small, and fit for JSON."""
        oldest, place = min(((item[0], item[1]) for item in self._held), key=lambda held: held[0], default=self._oldest)
        return {"emitted": self.emitted, "total": self.total, "oldest": oldest, "place": place}

    def _restore(self) -> Iterator[Held]:
        """Read the rows that are held now, from the oldest on, and give the iterator over those that follow."""
        wanted = self._numbers_held()
        missing, found = set(wanted), {}
        if not missing:
            return iter(())
        first, place = self._oldest
        rows = ((number, *pair) for number, pair in zip(count(first), self.source.rows(place), strict=False))
        for held in rows:
            if held[0] in missing:
                missing.remove(held[0])
                found[held[0]] = held
                if not missing:
                    break
        if missing and (self.emitted or self.total is not None):
            raise UsageError("The source has fewer rows than when this state was saved: give the same source again.")
        self._held = [found[number] for number in wanted if number in found]
        return rows

    def _numbers_held(self) -> list[int]:
        """The numbers of the rows in the buffer after `emitted` steps: in each slot the row that came there last."""
        steps = self.emitted if self.total is None else max(0, self.total - self.size)
        held = np.arange(self.size if self.total is None else min(self.size, self.total))
        for first in range(0, steps, CHUNK):
            slots = draws(self._key, first, min(CHUNK, steps - first)) % np.uint64(self.size)
            held[slots.astype(np.int64)] = (
                self.size + first + np.arange(len(slots))
            )  # of equal slots the last one stays
        if self.total is None:
            return held.tolist()
        return held[self._last_turns(len(held))][: self.total - self.emitted].tolist()

    def _slots(self) -> Iterator[int]:
        """The slots that the steps from now on draw."""
        for first in count(self.emitted, CHUNK):
            yield from (draws(self._key, first, CHUNK) % np.uint64(self.size)).tolist()

    def _last_turns(self, held: int) -> np.ndarray:
        """The slots in the reverse of the order that they are emptied in once the source has ended."""
        return Order(held, self._key).at(np.arange(held))
