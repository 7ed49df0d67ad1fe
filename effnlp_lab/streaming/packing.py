"""Documents packed into rows of a fixed length, so that next to nothing is padding and no document sees another.

The documents of a row must stay strangers in three places: attention (`cu_seqlens` bounds each one), positions (they
restart at 0 with each one), and labels (the first token of each one is not predicted: what comes before it is another
document's end). Krell et al. 2021, "Efficient sequence packing without cross-contamination".
 A document longer than a row is cut into pieces of a row's length and a rest; each piece counts as a document of its
own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effnlp_lab.errors import UsageError
from effnlp_lab.streaming.batching import IGNORED, Waste, token_ids
from effnlp_lab.streaming.order import whole, whole_lengths
from effnlp_lab.streaming.shards import Shards

LONG = ("split", "truncate", "refuse")


@dataclass
class PackedBatch:
    """Rows of packed documents, all int64 [rows, length] unless said otherwise.

    input_ids; labels: the ids, `IGNORED` on padding and on the first token of each segment (not shifted: the models of
    `transformers` shift them); position_ids: from 0 in each segment; segment_ids: 1, 2, ... in each row, 0 on padding.
    cu_seqlens: int32 [segments + 1], where each segment begins and the last ends when the rows are laid end to end, as
    variable-length attention takes it; the padding of a row is a segment of its own. max_seqlen: the longest segment.
    documents: int64 [segments], the number of the document that each segment is of, -1 for padding.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    cu_seqlens: Tensor
    documents: Tensor
    max_seqlen: int

    @property
    def waste(self) -> Waste:
        """Real tokens and slots of this batch."""
        return Waste(int((self.segment_ids > 0).sum()), self.segment_ids.numel())


def pack(
    documents: Sequence[Any], length: int, *, method: str = "next_fit", long: str = "split", pad_id: int = 0
) -> PackedBatch:
    """Pack documents (tensors, arrays or lists of ids) into rows of `length` tokens.

    method: "next_fit" keeps the order, "best_fit" wastes less. long: what becomes of a document longer than a row:
    "split" into pieces (nothing is lost), "truncate" (the rest is dropped), or "refuse". Empty documents take no room.
    Raises UsageError for no tokens at all, and for a long document where it is refused.
    """
    whole("length", length, 1)
    whole("pad_id", pad_id, 0)
    if method not in METHODS or long not in LONG:
        raise UsageError(
            f"Unknown method {method!r} or rule {long!r} for long documents: expected one of {', '.join(METHODS)}, "
            f"and of {', '.join(LONG)}."
        )
    pieces = _pieces(documents, length, long)
    if not pieces:
        raise UsageError("There is nothing to pack: expected at least one document with a token in it.")
    plan = METHODS[method]([len(ids) for _, ids in pieces], length)
    return assemble([[pieces[number] for number in row] for row in plan], length, pad_id)


def next_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Items in order, a new row when the next one does not fit. Raises UsageError for an item above `size`."""
    rows: list[list[int]] = []
    room = 0
    for number, length in enumerate(_fitting(lengths, size)):
        if length > room or not rows:
            rows.append([])
            room = size
        rows[-1].append(number)
        room -= length
    return rows


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Longest items first, each into the fullest row that still has room (best-fit decreasing).

    At most 11/9 of the fewest rows possible, plus one (Johnson 1973). Ding et al. 2024, "Fewer truncations improve
    language modeling", pack so. Which rooms are left in some row is a bit mask, so that the tightest is found at
    once.
    """
    lengths = _fitting(lengths, size)
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(size + 1)]
    rooms = 0  # bit r: some row has room for r
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[number]
        fits = rooms >> length
        if fits:
            room = length + (fits & -fits).bit_length() - 1
            row = by_room[room].pop()
            rooms ^= 0 if by_room[room] else 1 << room
        else:
            row, room = len(rows), size
            rows.append([])
        rows[row].append(number)
        by_room[room - length].append(row)
        rooms |= 1 << room - length
    return rows


METHODS: dict[str, Callable[[Sequence[int], int], list[list[int]]]] = {"next_fit": next_fit, "best_fit": best_fit}


def assemble(rows: Sequence[Sequence[tuple[int, np.ndarray]]], length: int, pad_id: int = 0) -> PackedBatch:
    """The batch whose rows are the given (document, ids) segments, each row at most `length` tokens together."""
    input_ids = np.full((len(rows), length), pad_id, dtype=np.int64)
    segment_ids = np.zeros_like(input_ids)
    sizes, documents = [], []
    for number, row in enumerate(rows):
        filled = 0
        for segment, (document, ids) in enumerate(row, 1):
            place = slice(filled, filled + len(ids))
            input_ids[number, place], segment_ids[number, place] = ids, segment
            filled += len(ids)
            sizes.append(len(ids))
            documents.append(document)
        if filled < length:
            sizes.append(length - filled)
            documents.append(-1)
    cu_seqlens = np.cumsum([0, *sizes])
    starts = cu_seqlens[:-1]
    position_ids = (np.arange(input_ids.size) - np.repeat(starts, sizes)).reshape(input_ids.shape)
    labels = np.where(segment_ids > 0, input_ids, IGNORED)
    labels.reshape(-1)[starts] = IGNORED
    return PackedBatch(
        *map(torch.from_numpy, (input_ids, labels, position_ids, segment_ids, cu_seqlens.astype(np.int32))),
        documents=torch.tensor(documents, dtype=torch.int64),
        max_seqlen=max(sizes),
    )


class PackedDocuments:
    """Shards as packed rows with random access: item k is row k, the next documents on disk that fit (next fit).

    A row is one read of neighbouring tokens in one shard; long documents are split. `batch(indices)` is a PackedBatch,
    and an item is a batch of one row. In memory: 16 bytes a row.
    """

    def __init__(self, shards: Shards, length: int, pad_id: int = 0) -> None:
        self.shards, self.length, self.pad_id = shards, whole("length", length, 1), whole("pad_id", pad_id, 0)
        begins = [_row_starts(shards.ends(shard), length) for shard in range(len(shards.shards))]
        self._starts = np.concatenate(begins)
        self._shard = np.repeat(np.arange(len(begins)), [len(b) for b in begins])
        if not len(self._starts):
            raise UsageError(f"{shards.folder} holds no tokens: there is nothing to pack.")
        self.fingerprint = f"{shards.fingerprint}/packed-{length}"

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> PackedBatch:
        return self.batch([number])

    def batch(self, indices: Sequence[int]) -> PackedBatch:
        return assemble([self._row(int(number)) for number in indices], self.length, self.pad_id)

    @property
    def waste(self) -> Waste:
        """Real tokens and slots of all rows."""
        return Waste(self.shards.tokens, len(self) * self.length)

    def _row(self, number: int) -> list[tuple[int, np.ndarray]]:
        if not 0 <= number < len(self):
            raise IndexError(f"There is no row {number}: there are {len(self)}.")
        shard, begin = int(self._shard[number]), int(self._starts[number])
        last = number + 1 == len(self) or self._shard[number + 1] != shard
        end = self.shards.shards[shard]["tokens"] if last else int(self._starts[number + 1])
        tokens, ends = self.shards.shard_tokens(shard), self.shards.ends(shard)
        first = int(np.searchsorted(ends, np.uint64(begin), side="right"))
        row = []
        while begin < end:
            stop = min(int(ends[first]), end)
            if stop > begin:
                row.append((self.shards.first_documents[shard] + first, tokens[begin:stop]))
            begin, first = stop, first + 1
        return row


def _row_starts(ends: np.ndarray, length: int) -> np.ndarray:
    """Where each row of one shard begins: at the last document end that fits, or `length` on in a long document."""
    starts, begin, total = [], 0, int(ends[-1])
    while begin < total:
        starts.append(begin)
        fitting = int(np.searchsorted(ends, np.uint64(begin + length), side="right"))
        last_end = int(ends[fitting - 1]) if fitting else 0
        begin = last_end if last_end > begin else begin + length
    return np.array(starts, dtype=np.int64)


def _pieces(documents: Sequence[Any], length: int, long: str) -> list[tuple[int, np.ndarray]]:
    pieces = []
    for number, document in enumerate(documents):
        ids = token_ids(document, number)
        if len(ids) > length and long == "refuse":
            raise UsageError(
                f"Document {number} has {len(ids)} tokens, and a row has {length}: give a longer row, or long='split' "
                "or 'truncate'."
            )
        stop = min(len(ids), length) if long == "truncate" else len(ids)
        pieces += [(number, ids[begin : begin + length][: stop - begin]) for begin in range(0, stop, length)]
    return pieces


def _fitting(lengths: Sequence[int], size: int) -> list[int]:
    found = whole_lengths(lengths).tolist()
    if found and max(found) > whole("size", size, 1):
        raise UsageError(f"An item of {max(found)} tokens fits no row of {size}: split it first.")
    return found
