"""The tokens of one forward pass: sequences with different numbers of new tokens, laid end to end."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from effnlp_lab.errors import UsageError
from effnlp_lab.paged.sequence import Sequence


@dataclass(frozen=True)
class Batch:
    """New tokens of `batch` sequences, and where their keys and values lie.

    ids and positions [total], and slots [total], the place of each token in the cache (page * page_size + place);
    block_tables [any, columns] int32, of which sequence i uses row rows[i]; lengths [batch] int32 counts the tokens of
    a sequence with the new ones, which are starts[i] to starts[i + 1] (int32) of ids. most_queries and longest, known
    on the host, bound the new tokens and the lengths. `uniform`: every sequence has as many new tokens. splits: in how
    many shares the kernel cuts the keys (None: as many as fill the card).
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    block_tables: Tensor
    rows: Tensor
    lengths: Tensor
    starts: Tensor
    most_queries: int
    longest: int
    uniform: bool = False
    splits: int | None = None

    @classmethod
    def of(cls, sequences: Many[Sequence], tokens: Many[Many[int]], device: torch.device | str) -> Batch:
        """The last tokens of some sequences, which `append` has made room for: tokens[i] are the newest of sequence i.

        Raises UsageError where a sequence holds fewer tokens than are given.
        """
        counts = [len(new) for new in tokens]
        for sequence, count in zip(sequences, counts, strict=True):
            if not 0 < count <= sequence.length:
                raise UsageError(f"{count} tokens for a sequence of {sequence.length}: make room with append first.")
        columns = max(len(sequence.pages) for sequence in sequences)
        table = [sequence.pages + [-1] * (columns - len(sequence.pages)) for sequence in sequences]
        lengths = [sequence.length for sequence in sequences]
        page_size = sequences[0].manager.page_size
        return cls.from_lists(
            [token for new in tokens for token in new],
            [range(n - count, n) for n, count in zip(lengths, counts, strict=True)],
            torch.tensor(table, dtype=torch.int32, device=device), list(range(len(lengths))), page_size,
        )  # fmt: skip

    @classmethod
    def from_lists(
        cls, ids: list[int], spans: list[range], block_tables: Tensor, rows: list[int], page_size: int
    ) -> Batch:
        """From the positions of each sequence's new tokens, and tables that are on the device: one copy to it."""
        counts = [len(span) for span in spans]
        positions = [np.arange(span.start, span.stop) for span in spans]
        stops = [span.stop for span in spans]
        numbers = np.concatenate([ids, *positions, np.repeat(rows, counts), rows, stops, [0], np.cumsum(counts)])
        total, batch = len(ids), len(rows)
        sizes = (total, total, total, batch, batch, batch + 1)
        ids, positions, owners, rows, lengths, starts = to_device(numbers, block_tables.device).split(sizes)
        return cls(
            ids, positions, slots_of(block_tables, owners, positions, page_size), block_tables, rows.int(),
            lengths.int(), starts.int(), max(counts), max(stops), len(set(counts)) == 1,
        )  # fmt: skip

    @property
    def last(self) -> Tensor:
        """Where the newest token of each sequence is in `ids`, int64 [batch]."""
        return self.starts[1:].long() - 1


def slots_of(block_tables: Tensor, rows: Tensor, positions: Tensor, page_size: int) -> Tensor:
    """The place in the cache of the token at each position of the sequence with each row, int64."""
    pages = block_tables[rows, positions // page_size].long()
    return pages * page_size + positions % page_size


def to_device(numbers: Many[int] | np.ndarray, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Copy numbers to the device without waiting for it: from pinned memory, which torch keeps until it is read."""
    numbers = torch.as_tensor(numbers, dtype=dtype)
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers
