"""The stream on which work runs before a CUDA graph records it, and on which it is recorded."""

from __future__ import annotations

import functools

import torch


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: for each stream that it meets, cuBLAS takes a workspace and keeps it (32 MiB on an H100)."""
    return torch.cuda.Stream(device)
