"""The batches of a run: any iterable of dicts, read epoch after epoch, and found again at the same place.

Where the iterable has `state_dict` and `load_state_dict`, its own state is kept. Else a place is the number of batches
taken in this epoch, and the way back is to shuffle as at the start of the epoch (from the random state of that moment)
and to pass over as many.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effnlp_lab.errors import UsageError


class BatchStream:
    """Batches without end, moved to the device, with a place that can be saved and restored."""

    def __init__(self, batches: Iterable[Any], device: torch.device) -> None:
        if not hasattr(batches, "__iter__"):
            raise UsageError(f"batches must be an iterable of dicts of tensors, not {type(batches).__name__}.")
        self.batches = batches
        self.device = device
        self.epoch = 0
        self.taken = 0  # batches of this epoch
        self._iterator: Iterator[Any] | None = None
        self._random_at_start: dict[str, Any] | None = None
        self._restored = False

    def next(self) -> dict[str, Any]:
        """The next batch, of the next epoch where one ends. Raises UsageError for what is empty or not a batch."""
        while True:
            if self._iterator is None:
                self._open()
            try:
                batch = next(self._iterator)
            except StopIteration:
                self._end_of_epoch()
                continue
            self.taken += 1
            return to_device(check_batch(batch), self.device)

    def state_dict(self) -> dict[str, Any]:
        own = self.batches.state_dict() if self._has_state() else None
        return {"epoch": self.epoch, "taken": self.taken, "random_at_start": self._random_at_start, "own": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the place of `state`. The random state is left as it was at the start of that epoch, or untouched."""
        self.epoch, self.taken, self._random_at_start = state["epoch"], state["taken"], state["random_at_start"]
        self._iterator = None
        if self._has_state():
            if state["own"] is None:
                raise UsageError("This checkpoint holds no state of the batches: it was made with other batches.")
            self.batches.load_state_dict(state["own"])
            self._restored = True
        elif self._random_at_start is not None:
            set_random_state(self._random_at_start)
            self._iterator = self._iterate()
            for passed in range(self.taken):
                if next(self._iterator, None) is None:
                    raise UsageError(
                        f"The checkpoint was made after {self.taken} batches of an epoch, and there are only {passed} "
                        "now: resume with the batches of that run."
                    )

    def _open(self) -> None:
        if not self._restored:
            self.taken = 0
        self._restored = False
        self._random_at_start = None if self._has_state() else random_state()
        self._iterator = self._iterate()

    def _iterate(self) -> Iterator[Any]:
        if hasattr(self.batches, "set_epoch"):
            self.batches.set_epoch(self.epoch)
        return iter(self.batches)

    def _end_of_epoch(self) -> None:
        if self.taken == 0:
            raise UsageError("The batches are empty: an epoch has no batch. Is the data there, and at least one batch?")
        if self._iterator is self.batches:
            raise UsageError(
                f"The batches ended after {self.taken}, and an iterator cannot be read again: give a list, a "
                "DataLoader or another iterable that can, or fewer steps."
            )
        self._iterator = None
        self.epoch += 1
        self.taken = 0

    def _has_state(self) -> bool:
        return hasattr(self.batches, "state_dict") and hasattr(self.batches, "load_state_dict")


def check_batch(batch: Any) -> dict[str, Any]:
    """A dict with tensors, none of them empty."""
    if not hasattr(batch, "items"):
        raise UsageError(f"A batch must be a dict of tensors, not {type(batch).__name__}.")
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.numel() == 0:
            raise UsageError(f"A batch is empty: {name!r} has shape {tuple(value.shape)}.")
    return dict(batch)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def random_state() -> dict[str, Any]:
    """The random states of Python, NumPy, PyTorch and every CUDA device, as tensors and plain values."""
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]][: torch.cuda.device_count()])
