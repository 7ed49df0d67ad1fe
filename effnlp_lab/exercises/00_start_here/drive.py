"""How the answers of lab 00 are called. Runs beside the student's code.

`timed` runs against a pretend GPU, whose clock moves only when something happens. The kernels and their twins write
into an `out` that lies, like their inputs, in the middle of a larger stretch of memory: an unmasked load reads NaN
there and an unmasked store leaves a trace there, where it would otherwise read or spoil whatever is next in memory.
"""

from __future__ import annotations

import contextlib
import math
import sys
from unittest import mock

import torch

from effnlp_lab.exercises.guards import GUARD, UNWRITTEN, Operations


class PretendGpu:
    """A device that works through a queue while the host goes on: launching takes `launch` seconds of the host's time,
    call number i takes `durations[i]` seconds of the device's (the last one from then on)."""

    def __init__(self, launch: float, durations: list[float]) -> None:
        self.launch, self.durations = launch, durations
        self.now, self.busy_until, self.calls = 0.0, 0.0, 0

    def work(self) -> None:
        self.now += self.launch
        duration = self.durations[min(self.calls, len(self.durations) - 1)]
        self.busy_until = max(self.busy_until, self.now) + duration
        self.calls += 1

    def synchronize(self) -> None:
        self.now = max(self.now, self.busy_until)

    def clock(self) -> float:
        return self.now


def timed(answer, launch, durations, warmup, repeats):
    gpu = PretendGpu(launch, durations)
    seconds = answer(gpu.work, gpu.synchronize, gpu.clock, warmup, repeats)
    return {"seconds": seconds, "calls": gpu.calls}


def guarded(values: torch.Tensor, gap: int = 0, transposed: bool = False, around: float = math.nan) -> torch.Tensor:
    """A copy of `values` amid `around`: rows lie `gap` numbers apart, or columns do where `transposed`."""
    source = values.T if transposed else values
    rows, columns = source.numel() // source.shape[-1], source.shape[-1]
    buffer = torch.full((2 * GUARD + rows * (columns + gap),), around, dtype=values.dtype, device=values.device)
    strides = (columns + gap, 1) if source.dim() == 2 else (1,)
    inside = buffer.as_strided(source.shape, strides, GUARD)
    inside.copy_(source)
    return inside.T if transposed else inside


class StrayReads(contextlib.ExitStack):
    """Counts the numbers that kernels in Triton's interpreter read around `tensors`, in their guards.

    What is read there and then masked away spoils no result, and is a wild read all the same. On a GPU nothing is seen.
    """

    def __init__(self, tensors: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self.count = 0
        self.spans = []
        for t in tensors:
            storage, last = t.untyped_storage(), sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
            whole = (storage.data_ptr(), storage.data_ptr() + storage.nbytes())
            self.spans.append((*whole, t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()))

    def __enter__(self) -> StrayReads:
        interpreter = sys.modules.get("triton.runtime.interpreter")
        if interpreter is not None:
            load = interpreter.InterpreterBuilder.create_masked_load

            def counted(builder, pointers, mask, *rest, **named):
                for low, high, first, end in self.spans:
                    at = pointers.data
                    self.count += int((mask.data & (at >= low) & (at < high) & ((at < first) | (at >= end))).sum())
                return load(builder, pointers, mask, *rest, **named)

            self.enter_context(mock.patch.object(interpreter.InterpreterBuilder, "create_masked_load", counted))
        return super().__enter__()


def run_kernel(
    answer, inputs: tuple[torch.Tensor, ...], shape: tuple[int, ...], dtype: torch.dtype, block: int
) -> dict:
    """Call a launcher or a twin on guarded tensors; say what it wrote, where, and what PyTorch did for it."""
    before = [t.clone() for t in inputs]
    out = guarded(torch.full(shape, UNWRITTEN, dtype=dtype, device=inputs[0].device), around=UNWRITTEN)
    with StrayReads((*inputs, out)) as reads, Operations() as operations:
        answer(*inputs, out, block)
    everything = out.as_strided((2 * GUARD + out.numel(),), (1,), 0)
    return {
        "out": out.clone(),
        "outside": int((everything != UNWRITTEN).sum() - (out != UNWRITTEN).sum()),
        "read outside": reads.count,
        "unwritten": int((out == UNWRITTEN).sum()),
        "inputs changed": any(not torch.equal(a, b) for a, b in zip(inputs, before, strict=True)),
        "largest": operations.largest,
        "operation": operations.name,
    }


def add_vectors(answer, x, y, block):
    return run_kernel(answer, (guarded(x), guarded(y)), x.shape, x.dtype, block)


def row_sum(answer, x, gap, block):
    return run_kernel(answer, (guarded(x, gap),), x.shape[:1], torch.float32, block)


def tiled_matmul(answer, a, b, transposed, block):
    inputs = (guarded(a, transposed=transposed), guarded(b, transposed=transposed))
    return run_kernel(answer, inputs, (a.shape[0], b.shape[1]), a.dtype, block)


add_vectors_twin, row_sum_twin, tiled_matmul_twin = add_vectors, row_sum, tiled_matmul
