"""Batches epoch after epoch, and a state that continues them exactly.

`StreamLoader` runs a `BatchStream` and counts what it has delivered. The count travels with each batch from the worker
that made it, so that batches which workers made ahead are counted when they arrive, not before. A state holds a
position in the global order and nothing of ranks or workers: it can be resumed with other numbers of both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from effnlp_lab.errors import UsageError
from effnlp_lab.streaming.batch_stream import BatchStream, Mark
from effnlp_lab.streaming.batching import each_tensor
from effnlp_lab.streaming.order import whole
from effnlp_lab.streaming.shards import write_atomically

STATE_VERSION = 1
PIPE_BYTES = 1 << 20  # largest tensor that a worker sends through its pipe
PIPE_DTYPES = {torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.float32, torch.float64}


class StreamLoader:
    """Batches epoch after epoch, resumable: each `for` loop runs to the end of the epoch that the loader stands in.

    Takes what `BatchStream` takes, and `num_workers` processes that make `prefetch_factor` batches each ahead; with
    none, batches are made in this process. A loop that was left early continues in the next loop with the next batch.
    Workers live on from epoch to epoch until `close()` (or the end of a `with` block). Raises UsageError as
    `BatchStream` does; an error in a worker surfaces here.

    A batch counts as delivered when the loop has it: `zip(loader, range(3))` takes four, `islice(loader, 3)` three.
    """

    def __init__(
        self, data: Any, batch_size: int, *, num_workers: int = 0, prefetch_factor: int = 2, **options
    ) -> None:
        self.stream = BatchStream(data, batch_size, **options)
        self.num_workers, self.prefetch_factor = whole("num_workers", num_workers, 0), prefetch_factor
        whole("prefetch_factor", prefetch_factor, 1)
        self._running: Iterator[tuple[Mark, Any]] | None = None
        self._loads = 0

    @property
    def epoch(self) -> int:
        """The epoch of the batch that comes next."""
        return self.stream.epoch

    @property
    def position(self) -> int:
        """How many items of the epoch all ranks together have delivered."""
        return self.stream.position

    def __len__(self) -> int:
        """Batches left in the epoch; a source has no length (TypeError)."""
        return len(self.stream)

    def __iter__(self) -> Iterator[Any]:
        epoch, loads = self.stream.epoch, self._loads
        while True:
            if loads != self._loads:
                raise UsageError("A state was loaded while this loop ran: begin a new loop.")
            mark, batch = self._next()
            if not mark.end:
                self.stream.stand(mark.epoch, mark.position, mark.checkpoint)
            elif mark.epoch >= epoch:  # else: the end of an epoch whose last batch an earlier loop delivered
                if self.stream.epoch == mark.epoch:
                    self.stream.stand(mark.epoch + 1, 0, None)
                return
            if batch is not None:
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """What it takes to continue after the last batch delivered: small, fit for JSON, the same on every rank.

        Save it together with the model, after the step that used the batch.
        """
        stream = self.stream
        return {
            "version": STATE_VERSION,
            "data": getattr(stream.data, "fingerprint", None),
            "items": len(stream.data) if stream.random_access else None,
            "order": dict(stream.settings),
            "epoch": stream.epoch,
            "position": stream.position,
            "checkpoint": stream.checkpoint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last batch that `state` counted. Ranks, workers and batch_size may be others than before.

        The state's seed and order replace the loader's own. Raises UsageError for a state of other data, or none at
        all.
        """
        stream = self.stream
        _check_state(state, self.state_dict(), stream)
        self.close()
        self._loads += 1
        stream.settings = dict(state["order"])
        stream.stand(state["epoch"], state["position"], state["checkpoint"])

    def close(self) -> None:
        """End the workers. The loader keeps its place, and a new loop starts new ones."""
        self._running = None  # DataLoader's iterator ends its workers when it goes

    def __enter__(self) -> StreamLoader:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _next(self) -> tuple[Mark, Any]:
        if self._running is None:
            self._running = self._start()
        try:
            mark, batch = next(self._running)
        except BaseException:
            self.close()
            raise
        if isinstance(batch, UsageError):  # as a value it keeps its sentence on the way from a worker
            self.close()
            raise batch
        return mark, batch

    def _start(self) -> Iterator[tuple[Mark, Any]]:
        if not self.num_workers:
            return self.stream.marked()
        options = {"num_workers": self.num_workers, "prefetch_factor": self.prefetch_factor}
        options["generator"] = torch.Generator()  # else DataLoader draws from the global one, which the model uses
        return iter(DataLoader(_Marked(self.stream), batch_size=None, collate_fn=_unchanged, **options))


class _Marked(IterableDataset):
    """A stream's marked batches inside a worker; a UsageError comes as the last value."""

    def __init__(self, stream: BatchStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[tuple[Mark, Any]]:
        try:
            for mark, batch in self.stream.marked():
                yield mark, each_tensor(batch, _through_the_pipe)
        except UsageError as error:
            yield Mark(self.stream.epoch, self.stream.position), error


class _Inline:
    """A tensor whose numbers go through the pipe between two processes.

    torch's own way is a block of shared memory a tensor, opened over a socket of its own: about a millisecond, worth
    it for large tensors alone.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self) -> tuple:
        return torch.from_numpy, (self.tensor.numpy(),)


def _through_the_pipe(tensor: torch.Tensor) -> torch.Tensor | _Inline:
    plain = tensor.device.type == "cpu" and not tensor.requires_grad and tensor.dtype in PIPE_DTYPES
    return _Inline(tensor) if plain and tensor.nbytes <= PIPE_BYTES else tensor


def save_state(path: str | Path, state: dict[str, Any]) -> Path:
    """Write a state as JSON; whoever is killed meanwhile leaves the old file or the new one, whole."""
    path = Path(path)
    write_atomically(path, json.dumps(state) + "\n")
    return path


def load_state(path: str | Path) -> dict[str, Any]:
    """Read what `save_state` wrote. Raises UsageError where there is no such file, or it holds no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"There is no state at {path}: begin without one, or check the path.") from None
    except ValueError as error:
        raise UsageError(f"{path} holds no state ({error}): give a file that `save_state` wrote.") from None


def _check_state(state: Any, own: dict[str, Any], stream: BatchStream) -> None:
    if not isinstance(state, dict) or state.keys() != own.keys() or not isinstance(state["order"], dict):
        raise UsageError("This is no state of a StreamLoader: give what its state_dict() returned.")
    if state["version"] != STATE_VERSION:
        raise UsageError(f"This state has version {state['version']!r}, and {STATE_VERSION} is read here.")
    for key, what in (("data", "fingerprint"), ("items", "number of items")):
        if state[key] != own[key]:
            raise UsageError(
                f"This state belongs to another data set (its {what} is {state[key]!r}, here it is {own[key]!r}): load "
                "it with the data it was saved on."
            )
    epoch, position, order = (state[key] for key in ("epoch", "position", "order"))
    whole("The state's epoch", epoch, 0)
    whole("The state's position", position, 0)
    known = {"seed", "shuffle", "pool", "group"} if stream.random_access else {"seed", "shuffle", "buffer"}
    if not {"seed", "shuffle"} <= order.keys() <= known or state["items"] is not None and position > state["items"]:
        raise UsageError("This state is damaged (its order or its position is impossible): load another.")
    if "pool" in order and not hasattr(stream.data, "lengths"):
        raise UsageError("This state was saved with by_length, and the data has no `lengths`: give the same data.")


def _unchanged(value: Sequence) -> Sequence:
    return value
