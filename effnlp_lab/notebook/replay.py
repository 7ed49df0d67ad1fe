"""Steps of a small model that do not wait for Python: a GPU records their kernels once and then starts them by itself.

A step of a few million weights is a thousand kernels of microseconds, and Python takes longer to start them than the
GPU to run them. CUDA graphs: https://docs.nvidia.com/cuda/cuda-c-programming-guide/#cuda-graphs; in PyTorch:
https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from effnlp_lab.side_stream import side_stream

WARM_UP = 3
"""Calls that run as they are: kernels are compiled, the optimizer makes its states, libraries take their workspaces."""


class Replayed:
    """`step = Replayed(step)`, for a function of tensors on a GPU that is called many times. Returns nothing.

    From the fourth call on nothing of `step` runs in Python. What changes from call to call must therefore lie in
    tensors: those that are given, which are copied to where the recorded kernels look for them, and others that are
    changed in place (an optimizer's `lr`, with `capturable=True`). A step forgets old gradients before it makes new
    ones. Tensors of other shapes than the first, or on the CPU, go to `step` itself; so does everything where a step
    cannot be recorded, such as one that asks the GPU for a value: `refused` says why.
    """

    def __init__(self, step: Callable[..., Any]) -> None:
        self._step, self._calls, self.refused = step, 0, ""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []

    def __call__(self, *tensors: Tensor) -> None:
        if self.refused or not tensors[0].is_cuda or self._shapes(tensors) != self._shapes(self._inputs or tensors):
            self._step(*tensors)
        elif self._graph is not None:
            for ours, given in zip(self._inputs, tensors, strict=True):
                ours.copy_(given)
            self._graph.replay()
        else:
            self._warm_up(tensors)

    def _warm_up(self, tensors: tuple[Tensor, ...]) -> None:
        """Run the step on the stream on which it will be recorded; after the last time, record it."""
        here = torch.cuda.current_stream()
        if not self._calls:
            self._inputs = [tensor.clone() for tensor in tensors]
        aside = side_stream(here.device)
        aside.wait_stream(here)
        with torch.cuda.stream(aside), _waits() as waits:
            self._step(*tensors)
        here.wait_stream(aside)
        self._calls += 1
        if waits:
            self.refused = "it waits for the GPU"
        elif self._calls == WARM_UP:
            self._record()

    def _record(self) -> None:
        here, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=side_stream(here.device), capture_error_mode="thread_local"):
                self._step(*self._inputs)
            self._graph = graph
        except Exception as error:  # a step may do anything; what is wrong with it in itself shows in the next call
            torch.cuda.set_stream(here)  # which a recording that failed leaves on its own
            self.refused = f"{type(error).__name__}: {error}".partition("\n")[0]

    @staticmethod
    def _shapes(tensors: list[Tensor] | tuple[Tensor, ...]) -> list[torch.Size]:
        return [tensor.shape for tensor in tensors]


@contextlib.contextmanager
def _waits() -> Iterator[list[str]]:
    """Where Python waited for the GPU meanwhile: a recording must not try, as one that fails leaves PyTorch's random
    numbers unusable."""
    before, found = torch.cuda.get_sync_debug_mode(), []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
            found += [str(one.message) for one in told if "called a synchronizing" in str(one.message)]
