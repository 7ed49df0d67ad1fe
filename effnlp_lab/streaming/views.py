"""Shards as items with random access: windows of a fixed number of tokens, and whole documents.

A view has a length, items, and a `fingerprint` that names both the data and the way it is cut: the loader refuses a
state that was saved on another.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from effnlp_lab.errors import UsageError
from effnlp_lab.streaming.order import whole
from effnlp_lab.streaming.shards import Shards


class Windows:
    """Window i is tokens i * length to (i + 1) * length + overlap of all shards laid end to end, whatever the
    documents.

    With `overlap` 1 the last token of a window is the first of the next, so that every token but the first is
    predicted once. The last `left_over` tokens make no whole window and are not delivered. Items are int64 tensors
    [length + overlap]; `batch(indices)` is [len(indices), length + overlap]. Raises UsageError where not one window
    fits.
    """

    def __init__(self, shards: Shards, length: int, overlap: int = 0) -> None:
        whole("length", length, 1)
        whole("overlap", overlap, 0)
        self.shards, self.length, self.overlap = shards, length, overlap
        self.count = max(0, shards.tokens - overlap) // length
        if not self.count:
            raise UsageError(
                f"{shards.folder} holds {shards.tokens} tokens, too few for a window of {length + overlap}."
            )
        self.left_over = shards.tokens - self.count * length
        self.fingerprint = f"{shards.fingerprint}/windows-{length}-{overlap}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Tensor:
        return self.batch([number])[0]

    def batch(self, indices: Sequence[int]) -> Tensor:
        """The windows of `indices` as one int64 tensor, each copied and widened once."""
        width, step, read = self.length + self.overlap, self.length, self.shards.tokens_at
        out = np.empty((len(indices), width), dtype=np.int64)
        for row, number in zip(out, map(int, indices), strict=True):
            if not 0 <= number < self.count:
                raise IndexError(f"There is no window {number}: there are {self.count}.")
            row[:] = read(number * step, number * step + width)
        return torch.from_numpy(out)


class Documents:
    """Item i is document i as it lies on disk: a read-only view [length] of uint16 or uint32, which nothing has copied.

    `batch(indices)` is a list of them. `pad_batch` and `pack` take them, and widen a whole batch at once.
    """

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self.fingerprint = f"{shards.fingerprint}/documents"

    def __len__(self) -> int:
        return self.shards.documents

    def __getitem__(self, number: int) -> np.ndarray:
        return self.shards.document(int(number))

    def batch(self, indices: Sequence[int]) -> list[np.ndarray]:
        return [self[number] for number in indices]

    @cached_property
    def lengths(self) -> np.ndarray:
        """The length of every document, int64 [documents]."""
        return self.shards.lengths()
