"""Padding a batch, and how much of it is padding.

What is padding is known from the lengths, never from the ids: many tokenizers pad with their end-of-text token, and a
mask made of `ids != pad_id` would hide the real ends too, so that the model never learns to stop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effnlp_lab.errors import UsageError
from effnlp_lab.streaming.order import whole, whole_lengths

IGNORED = -100  # the label that cross_entropy skips


def pad_batch(
    documents: Sequence[Any],
    pad_id: int,
    *,
    side: str = "right",
    length: int | None = None,
    multiple_of: int = 1,
) -> dict[str, Tensor]:
    """Pad documents (tensors, arrays or lists of ids) to the longest of them (dynamic padding), or to `length`.

    Returns int64 tensors [batch, width]: `input_ids`; `attention_mask`, 1 on real tokens; `labels`, the ids with
    `IGNORED` on padding alone (not shifted: the models of `transformers` shift them). The width is rounded up to
    `multiple_of` (tensor cores like 8). side: "right" to train, "left" to generate. Raises UsageError for no documents,
    ids that are no whole numbers, and a document longer than `length`.
    """
    whole("pad_id", pad_id, 0)
    whole("multiple_of", multiple_of, 1)
    if side not in ("right", "left"):
        raise UsageError(f"Unknown side {side!r}: expected 'right' or 'left'.")
    rows = [token_ids(document, number) for number, document in enumerate(documents)]
    if not rows:
        raise UsageError("There are no documents to pad: expected at least one.")
    lengths = np.array([len(row) for row in rows])
    longest = int(lengths.max())
    if length is not None and longest > whole("length", length, 1):
        raise UsageError(
            f"A document has {longest} tokens, more than length={length}: cut it first, or pad to the batch."
        )
    width = -(-(length or longest) // multiple_of) * multiple_of
    columns = np.arange(width) if side == "right" else np.arange(width)[::-1]
    real = columns < lengths[:, None]
    input_ids = np.full(real.shape, pad_id, dtype=np.int64)
    input_ids[real] = np.concatenate(rows)  # row by row, which is their order
    made = {"input_ids": input_ids, "attention_mask": real.astype(np.int64)}
    made["labels"] = np.where(real, input_ids, IGNORED)
    return {name: torch.from_numpy(array) for name, array in made.items()}


@dataclass(frozen=True)
class Waste:
    """Real tokens and the slots that a batch has for them. `share` of the slots is padding."""

    tokens: int
    slots: int

    @property
    def padding(self) -> int:
        return self.slots - self.tokens

    @property
    def share(self) -> float:
        return self.padding / self.slots if self.slots else 0.0

    def __str__(self) -> str:
        return f"{self.padding:,} of {self.slots:,} slots are padding ({self.share:.1%})"


def padding_waste(lengths: Sequence[int], batches: Iterable[Sequence[int]], width: int | None = None) -> Waste:
    """What padding costs when each of `batches` (items by number) is padded to its longest item, or all to `width`.

    lengths: tokens of every item. Raises UsageError for lengths that are no whole numbers, or above `width`.
    """
    lengths = whole_lengths(lengths)
    tokens = slots = 0
    for batch in batches:
        inside = lengths[np.asarray(batch, dtype=np.int64)]
        longest = int(inside.max(initial=0))
        if width is not None and longest > width:
            raise UsageError(f"An item has {longest} tokens, more than width={width}: give the longest length or more.")
        tokens += int(inside.sum())
        slots += len(inside) * (longest if width is None else width)
    return Waste(tokens, slots)


def batches_of(items: Sequence[int] | np.ndarray, batch_size: int) -> Iterator[Sequence[int] | np.ndarray]:
    """`items` in order, `batch_size` at a time; the last batch may be short."""
    whole("batch_size", batch_size, 1)
    return (items[first : first + batch_size] for first in range(0, len(items), batch_size))


def each_tensor(batch: Any, change: Callable[[Tensor], Any]) -> Any:
    """`batch` with `change` applied to each tensor in it: through dicts, lists, tuples and dataclasses."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, dict):
        return {key: each_tensor(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(each_tensor(value, change) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(each_tensor(value, change) for value in batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{f.name: each_tensor(getattr(batch, f.name), change) for f in fields(batch) if f.init})
    return batch


def token_ids(document: Any, number: int) -> np.ndarray:
    """Document `number` of a batch as an array. Raises UsageError where it is no row of whole numbers."""
    try:
        ids = document.numpy() if isinstance(document, Tensor) else np.asarray(document)
    except (ValueError, TypeError, RuntimeError):  # ragged lists, tensors on a GPU
        ids = np.empty((0, 0))
    if ids.ndim != 1 or ids.size and ids.dtype.kind not in "iu":
        raise UsageError(f"Document {number} is no sequence of whole numbers: give its token ids.")
    return ids
