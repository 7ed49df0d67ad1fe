"""The batches of one rank, made by any number of workers, from a place that a mark can name. Nothing here has state.

Every batch comes with a `Mark`: where the stream stands once that batch is delivered. `StreamLoader` keeps the mark of
the batch it delivered last; that is all that resuming takes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from effnlp_lab.errors import UsageError
from effnlp_lab.streaming.order import LengthOrder, Order, Split, check_split, whole
from effnlp_lab.streaming.shuffle_buffer import ShuffleBuffer

ORDERED_AT_ONCE = 8192  # positions whose items are looked up in one go


class Mark(NamedTuple):
    """Where the stream stands once the batch that comes with it is delivered. `end`: no batch, the epoch is over."""

    epoch: int
    position: int
    end: bool = False
    checkpoint: str | None = None  # of a source without random access: JSON, for ShuffleBuffer


class BatchStream(IterableDataset):
    """The batches of one rank in one epoch: `DataLoader(stream, batch_size=None, num_workers=n)`.

    data: a view with random access (`len`, items by number, perhaps `batch(numbers)`), or a source that is read from
        front to back (`rows(start)`, see sources.py), which is shuffled in a buffer of `buffer` rows.
    batch_size: items of this rank in a step; rank, ranks: torch.distributed's own where it runs, else 0 and 1.
    seed, shuffle: the order of each epoch. remainder: see `Split`; a source allows "keep" and "drop".
    by_length: draw batches of about equal length from pools of so many global batches (data needs `lengths`).
    collate: makes a batch of a list of items. Without it: data.batch, else torch's own; rows of a source stay a list.

    Worker w makes every batch whose number is w modulo the number of workers, which is the order DataLoader asks in.
    Every process reads the whole of a source and keeps its share; of a view it reads its share alone. Raises UsageError
    for numbers that make no split, more ranks than items, and data of neither kind.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int | None = None,
        ranks: int | None = None,
        remainder: str = "keep",
        by_length: int | None = None,
        buffer: int = 1000,
        collate: Callable[[list], Any] | None = None,
    ) -> None:
        self.data, self.batch_size, self.collate, self.remainder = data, batch_size, collate, remainder
        self.rank, self.ranks = _place_among_ranks(rank, ranks)
        self.random_access = hasattr(data, "__getitem__") and hasattr(data, "__len__")
        check_split(batch_size, self.rank, self.ranks, remainder)
        self._check_data(by_length)
        self.settings = {"seed": whole("seed", seed), "shuffle": bool(shuffle)}
        if not self.random_access:
            self.settings["buffer"] = whole("buffer", buffer, 1) if shuffle else 1
        elif by_length is not None:
            self.settings.update(pool=whole("by_length", by_length, 1), group=batch_size * self.ranks)
        self.epoch = self.position = 0
        self.checkpoint: str | None = None
        if self.random_access:
            self.split()

    def set_epoch(self, epoch: int) -> None:
        """Stand at the beginning of `epoch`, as DistributedSampler.set_epoch does."""
        self.stand(whole("epoch", epoch, 0), 0, None)

    def stand(self, epoch: int, position: int, checkpoint: str | None) -> None:
        """Begin at `position` of `epoch`; a source also needs the checkpoint that was made there or before."""
        self.epoch, self.position, self.checkpoint = epoch, position, checkpoint

    def __iter__(self) -> Iterator[Any]:
        worker, workers = _place_among_workers()
        for _, batch in self._steps(self.epoch, self.position, self.checkpoint, worker, workers):
            if batch is not None:
                yield batch

    def __len__(self) -> int:
        """Batches from the position to the end of the epoch; a source has no length (TypeError)."""
        if not self.random_access:
            raise TypeError("A source that is read from front to back has no length.")
        split = self.split(self.position)
        return split.steps - (split.steps > 0 and len(split.positions(split.steps - 1)) == 0)

    def split(self, start: int = 0) -> Split:
        """This rank's share of an epoch from position `start` on."""
        return Split(len(self.data), self.batch_size, self.rank, self.ranks, self.remainder, start)

    def order(self, epoch: int) -> Order | LengthOrder:
        """The order of all ranks in `epoch`."""
        order = Order(len(self.data), self.settings["seed"], epoch, self.settings["shuffle"])
        if "pool" not in self.settings:
            return order
        return LengthOrder(order, self.data.lengths, self.settings["group"], self.settings["pool"])

    def marked(self) -> Iterator[tuple[Mark, Any]]:
        """This worker's (mark, batch) pairs, epoch after epoch without end.

        Each epoch ends in a pair whose mark says so; a step that has nothing for this rank gives the batch None. Both
        take their turn like any batch, so that the workers' turns stay in step.
        """
        worker, workers = _place_among_workers()
        turn, position, checkpoint = 0, self.position, self.checkpoint
        for epoch in count(self.epoch):
            taken = yield from self._steps(epoch, position, checkpoint, (worker - turn) % workers, workers)
            if (turn + taken) % workers == worker:
                yield Mark(epoch, 0, end=True), None
            turn, position, checkpoint = turn + taken + 1, 0, None

    def _steps(self, epoch: int, start: int, checkpoint: str | None, first: int, stride: int):
        """The steps first, first + stride, ... from `start` to the end of the epoch; returns how many there are."""
        if self.random_access:
            return self._steps_of_a_view(epoch, start, first, stride)
        return self._steps_of_a_source(epoch, start, checkpoint, first, stride)

    def _steps_of_a_view(self, epoch: int, start: int, first: int, stride: int) -> Iterator[tuple[Mark, Any]]:
        split, order = self.split(start), self.order(epoch)
        steps = iter(range(first, split.steps, stride))
        while chunk := list(islice(steps, max(1, ORDERED_AT_ONCE // self.batch_size))):
            positions = [split.positions(step) for step in chunk]
            items = order.at(np.concatenate(positions))
            for step, mine in zip(chunk, np.split(items, np.cumsum([len(p) for p in positions])[:-1]), strict=True):
                last = step == split.steps - 1
                mark = Mark(epoch + 1, 0) if last else Mark(epoch, split.after(step))
                yield mark, self._batch(mine.tolist())
        return split.steps

    def _steps_of_a_source(
        self, epoch: int, start: int, checkpoint: str | None, first: int, stride: int
    ) -> Iterator[tuple[Mark, Any]]:
        state = json.loads(checkpoint) if checkpoint else None
        buffer = ShuffleBuffer(self.data, self.settings["buffer"], self.settings["seed"], epoch, state)
        global_batch = self.batch_size * self.ranks
        rows = islice(buffer, start - buffer.emitted, None)
        for step in count():
            whole_step = list(islice(rows, global_batch))
            short = len(whole_step) < global_batch
            if not whole_step or short and self.remainder == "drop":
                break
            position = start + step * global_batch + len(whole_step)
            if step % stride == first:
                mine = whole_step[self.rank :: self.ranks]
                mark = Mark(epoch, position, checkpoint=json.dumps(buffer.state_dict()))
                yield mark, (self.collate(mine) if self.collate else mine) if mine else None
        self._check_rows(buffer.emitted)
        return step

    def _batch(self, items: list[int]) -> Any:
        if not items:
            return None
        if self.collate is not None:
            return self.collate([self.data[item] for item in items])
        if hasattr(self.data, "batch"):
            return self.data.batch(items)
        return default_collate([self.data[item] for item in items])

    def _check_data(self, by_length: int | None) -> None:
        if not self.random_access and not hasattr(self.data, "rows"):
            raise UsageError(
                f"A {type(self.data).__name__} cannot be streamed: give a view with len and items by number, or a "
                "source (see `open_source`)."
            )
        if not self.random_access and (self.remainder == "repeat" or by_length is not None):
            what = "remainder='repeat'" if self.remainder == "repeat" else "by_length"
            raise UsageError(f"{what} needs random access, and a source has none: write it to shards first.")
        if by_length is not None and not hasattr(self.data, "lengths"):
            raise UsageError(
                f"by_length needs the lengths of all items, and {type(self.data).__name__} has no `lengths`."
            )

    def _check_rows(self, rows: int) -> None:
        if rows < self.ranks:
            raise UsageError(f"{self.ranks} ranks cannot share the {rows} rows of this source: use fewer ranks.")
        if self.remainder == "drop" and rows < self.batch_size * self.ranks:
            raise UsageError(
                f"The {rows} rows of this source fill no global batch of {self.batch_size * self.ranks}, and "
                "remainder='drop' delivers full ones alone: use a smaller batch_size, or remainder='keep'."
            )


def _place_among_ranks(rank: int | None, ranks: int | None) -> tuple[int, int]:
    if (rank is None) != (ranks is None):
        raise UsageError("Give both rank and ranks, or neither (then torch.distributed's own are used).")
    if rank is not None:
        return rank, ranks
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _place_among_workers() -> tuple[int, int]:
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)
