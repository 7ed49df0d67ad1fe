"""CUDA graphs: a step of a hundred small kernels is recorded once, and started again by one call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from effnlp_lab.side_stream import side_stream


class CapturedStep:
    """Records `step()`, which reads and writes tensors that stay where they are, and returns what it returns.

    The step first runs twice for its own sake (kernels are compiled, libraries take their workspaces), so it must do no
    harm when repeated. `pool` is shared between steps that never run at the same time, as their memory then is too.
    """

    def __init__(self, step: Callable[[], Tensor], pool: tuple[int, int] | None = None) -> None:
        here = torch.cuda.current_stream()
        aside = side_stream(here.device)
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(2):
                step()
        here.wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, stream=aside):
            self.output = step()

    def replay(self) -> Tensor:
        """Start the step again. Its output tensor is the same one every time."""
        self.graph.replay()
        return self.output


def batch_sizes(most: int) -> list[int]:
    """The batch sizes that steps are recorded for: close together, since a step pays for the rows that it pads."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most + 64, 64)]
    return [*(n for n in sizes if n < most), most]
