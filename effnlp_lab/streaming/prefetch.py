"""Batches made ahead: a thread pins them and copies them to the GPU while the GPU computes.

A copy from pinned memory on a CUDA stream of its own runs beside the kernels of the current stream. Two things keep the
two apart: the consumer's stream waits for an event that the copy records (else it reads what has not arrived), and each
copied tensor is recorded on the consumer's stream (else, freed, its memory is given to the next copy while a kernel
that was launched and has not run still reads it). On a CPU the thread is all there is: batches are made ahead.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effnlp_lab.errors import UsageError
from effnlp_lab.streaming.batching import each_tensor
from effnlp_lab.streaming.order import whole

POLL = 0.1  # seconds after which a waiting thread looks whether it should end


class Prefetcher:
    """The batches of `batches` on `device`, up to `depth` of them made ahead by a thread.

    batches: a StreamLoader, a DataLoader, or anything that can be iterated; a batch is a tensor, or dicts, lists,
    tuples and dataclasses of tensors and other things. Each `for` loop iterates `batches` once. An error of `batches`
    surfaces in the loop, after the batches made before it. Leaving the loop early, or `close()`, ends the thread.

    `state_dict()` and `load_state_dict()` are those of `batches`, as of the last batch that the loop received: what
    lies ready here is not counted, and after an early end the next loop begins with it. Raises UsageError for an
    unknown device, and in a loop that was ended from outside.
    """

    def __init__(self, batches: Iterable[Any], device: str | torch.device = "cpu", depth: int = 2) -> None:
        self.batches, self.depth = batches, whole("depth", depth, 1)
        try:
            self.device = torch.device(device)
        except RuntimeError:
            raise UsageError(f"Unknown device {device!r}: expected 'cpu', 'cuda' or 'cuda:1'.") from None
        if self.device.type not in ("cpu", "cuda") or self.device.type == "cuda" and not torch.cuda.is_available():
            raise UsageError(f"There is no device {str(device)!r} here: use 'cpu', or see `effnlp doctor`.")
        if self.device.type == "cuda" and self.device.index is None:  # the current device is a thread's own matter
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._resumable = hasattr(batches, "state_dict") and hasattr(batches, "load_state_dict")
        self._delivered: dict[str, Any] | None = None
        self._run: _Run | None = None

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        self.close()  # an interrupted loop may still hang on its traceback
        self._delivered = self.batches.state_dict() if self._resumable else None
        run = self._run = _Run(self.batches, self.device, self.depth, self._resumable)
        try:
            while (ready := run.receive()) is not None:
                self._delivered = ready.state
                yield ready.hand_over()
                if self._run is not run:
                    raise UsageError("This loop was ended by close(), a loaded state or a newer loop: begin a new one.")
        finally:
            if self._run is run:
                self._end(run)

    def state_dict(self) -> dict[str, Any]:
        """The state of `batches` after the last batch that the loop received."""
        self._require_resumable()
        return self.batches.state_dict() if self._delivered is None else self._delivered

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """End the loop that runs, and continue where `state` says."""
        self._require_resumable()
        self.close()
        self.batches.load_state_dict(state)

    def close(self) -> None:
        """End the thread and drop what lies ready. A loop that runs cannot go on; a new one may begin."""
        if self._run is not None:
            self._end(self._run)

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _end(self, run: _Run) -> None:
        run.stop()
        self._run = None
        if self._resumable and run.ahead:
            self.batches.load_state_dict(self._delivered)
        self._delivered = None

    def _require_resumable(self) -> None:
        if not self._resumable:
            raise UsageError(f"A {type(self.batches).__name__} has no state: prefetch a StreamLoader.")


class _Run:
    """One loop's thread, and the queue between the two."""

    def __init__(self, batches: Iterable[Any], device: torch.device, depth: int, resumable: bool) -> None:
        self.batches, self.device, self.resumable = batches, device, resumable
        self.ahead = False  # whether the thread took batches that the loop has not received
        self._ready: queue.Queue[_Ready] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = threading.Thread(target=self._produce, name="prefetcher", daemon=True)
        self._thread.start()

    def receive(self) -> _Ready | None:
        """The next batch, usable on the stream that is current here and now; None at the end."""
        ready = self._ready.get()
        if ready.error is not None:
            raise ready.error
        if ready.last:
            self.ahead = False
            return None
        if ready.copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(ready.copied)
            for tensor in ready.tensors:
                tensor.record_stream(stream)
        return ready

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _produce(self) -> None:
        try:
            iterator = iter(self.batches)
            for batch in iterator:
                self.ahead = True
                state = self.batches.state_dict() if self.resumable else None
                if not self._put(self._copied(batch, state)):
                    return
                del batch
            self._put(_Ready(last=True))
        except BaseException as error:  # whatever it is, the loop must not wait for ever
            self._put(_Ready(error=error))

    def _copied(self, batch: Any, state: Any) -> _Ready:
        if self._copies is None:
            return _Ready(batch, state)
        tensors: list[Tensor] = []

        def copy(tensor: Tensor) -> Tensor:
            # The host allocator keeps a pinned block until the copies that read it are done.
            tensors.append(_pinned(tensor).to(self.device, non_blocking=True))
            return tensors[-1]

        with torch.cuda.stream(self._copies):
            batch = each_tensor(batch, copy)
            return _Ready(batch, state, tensors, self._copies.record_event())

    def _put(self, ready: _Ready) -> bool:
        while not self._stopped.is_set():
            try:
                self._ready.put(ready, timeout=POLL)
                return True
            except queue.Full:
                continue
        return False


@dataclass
class _Ready:
    """What the thread hands over: a batch with the state after it, or an error, or the end."""

    batch: Any = None
    state: Any = None
    tensors: Sequence[Tensor] = ()
    copied: torch.cuda.Event | None = None
    error: BaseException | None = None
    last: bool = False

    def hand_over(self) -> Any:
        """The batch, which from now on the caller alone holds: its memory is free as soon as the loop lets go."""
        batch, self.batch, self.tensors = self.batch, None, ()
        return batch


def _pinned(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_cuda or not tensor.numel() or tensor.is_pinned() else tensor.pin_memory()
