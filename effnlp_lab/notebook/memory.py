"""Peak memory: counted on any machine, measured and capped on a GPU, and an out-of-memory error that says what to do.

Peak memory of most work grows along a straight line with the size of the batch: what is held whatever the size
(weights), and so much for each item (activations). Two small runs give the line, and the line says what fits.
"""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from effnlp_lab.errors import EffnlpError
from effnlp_lab.notebook.meter import Meter

MIB, GIB = 1024**2, 1024**3
_UNITS = {"bytes": 1, "KiB": 1024, "MiB": MIB, "GiB": GIB}


class OutOfMemory(EffnlpError):
    """Work that does not fit; the sentence says how much was asked, how much there was, and which size to try."""


@dataclass(frozen=True)
class MemoryLine:
    """Peak bytes as a line in the batch size: `fixed` + `each` * size."""

    fixed: float
    each: float

    def at(self, size: int) -> int:
        """Peak bytes at this size."""
        return round(self.fixed + self.each * size)

    def largest(self, capacity: int) -> int:
        """The largest size that fits into `capacity` bytes (0: not even one item)."""
        return max(0, int((capacity - self.fixed) // self.each)) if self.each > 0 else 0


def memory_line(peak: Callable[[int], int], sizes: tuple[int, int] = (1, 2)) -> MemoryLine:
    """The line through the peaks of two small sizes."""
    (small, large), (low, high) = sizes, (peak(sizes[0]), peak(sizes[1]))
    each = (high - low) / (large - small)
    return MemoryLine(low - each * small, each)


def counted_peak(work: Callable[[], Any]) -> int:
    """Bytes of the tensors that `work` makes, at their peak, by the meter; what it returns counts. On any device,
    "meta" included, where tensors have shapes and no numbers: a model of any size is counted in a second."""
    with Meter() as meter:
        work()
    return meter.usage.peak_bytes


def measured_peak(work: Callable[[], Any]) -> int:
    """Bytes that PyTorch had given out on the GPU at the peak of `work`, with what was there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


@contextlib.contextmanager
def card_of(capacity: int) -> Iterator[None]:
    """Let PyTorch use at most `capacity` bytes of the GPU in the body, as on a smaller card. Without a GPU: nothing."""
    if not torch.cuda.is_available():
        yield
        return
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    release()
    torch.cuda.set_per_process_memory_fraction(min(1.0, capacity / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        release()


def release() -> None:
    """Give back the memory that PyTorch keeps for later use."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def sized(
    size: int, line: MemoryLine | None = None, capacity: int | None = None, items: str = "items"
) -> Iterator[None]:
    """Turn an out-of-memory error in the body into OutOfMemory, whose one sentence says what to do.

    `size` is the batch size of the body. With the `line` of the work and the `capacity` of the card, the size to try
    is the largest that fits; without them, half of it.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        told = explain(str(error), size, line, capacity, items)
    else:
        return
    raise OutOfMemory(told)  # outside the except: a chained error would keep the failed run's tensors alive


def explain(
    message: str, size: int, line: MemoryLine | None = None, capacity: int | None = None, items: str = "items"
) -> str:
    """PyTorch's out-of-memory message in one sentence: what was asked for, what there was, and the size to try."""
    asked, free = _amount(r"Tried to allocate", message), _amount(r"of which", message)
    held = _amount(r"[Oo]f the allocated memory", message)
    said = [f"{asked} more was asked for" if asked else "more memory was asked for than there was"]
    said += [f"{held} was held by tensors"] if held else []
    if capacity:
        said.append(f"the limit is {gib(capacity)}")
    elif free:
        said.append(f"{free} was free")
    return f"Out of memory at {size} {items}: {', '.join(said)}. {_advice(size, line, capacity, items)}"


def fits(size: int, line: MemoryLine, capacity: int, items: str = "items") -> str:
    """Whether work of this size fits into `capacity`, as a sentence, from the line alone."""
    needed = line.at(size)
    if needed <= capacity:
        return f"{size} {items} fit: {gib(needed)} of {gib(capacity)}."
    return f"{size} {items} do not fit: {gib(needed)} is needed, and the limit is {gib(capacity)}. " + _advice(
        size, line, capacity, items
    )


def gib(count: float) -> str:
    """Bytes in words, in the unit that suits them."""
    for unit in ("GiB", "MiB", "KiB"):
        if count >= _UNITS[unit]:
            return f"{count / _UNITS[unit]:.2f} {unit}"
    return f"{int(count)} bytes"


def _advice(size: int, line: MemoryLine | None, capacity: int | None, items: str) -> str:
    if line is not None and capacity:
        most = min(line.largest(capacity), size - 1)
        if most < 1:
            return f"Not even one fits: {gib(line.fixed)} is needed before the first; use a smaller model or dtype."
        return f"Try at most {most} {items} at once ({gib(line.fixed)} whatever the number, and {gib(line.each)} each)."
    if size < 2:
        return "It is one already: use a smaller dtype, no gradients, or a smaller model."
    return f"Try {size // 2} {items} at once."


def _amount(after: str, message: str) -> str | None:
    """The first amount that follows these words in the message: '18.00 MiB'."""
    found = re.search(after + r"\D{0,40}?([\d.]+ (?:bytes|KiB|MiB|GiB))", message)
    return found.group(1) if found else None
