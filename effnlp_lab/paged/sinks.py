"""Attention sinks with a rolling window (Xiao et al. 2023, StreamingLLM), on keys that are rotated once.

A rolling cache keeps the first S tokens and the last W, and a token's position is its place in the cache: sink i stands
at i, the newest token at S + W - 1 once the cache is full. Rotary embeddings show a key only how far it is from the
query. Between the window's tokens that is the same in the cache as in the text; from a sink it is not. So keys stay
rotated to their positions in the text, which nobody has to rewrite, and each query is rotated twice: to its position in
the text for the window, and to its position in the cache for the sinks.
"""

from __future__ import annotations

from torch import Tensor

from effnlp_lab.errors import UsageError


def cache_position(position: Tensor | int, window: int, sinks: int) -> Tensor | int:
    """Where the token at `position` of the text stands in the rolling cache when it is the newest."""
    last = window + sinks - 1
    return position.clamp(max=last) if isinstance(position, Tensor) else min(position, last)


def kept_tokens(length: int, window: int, sinks: int) -> list[int]:
    """The positions in the text of the tokens in the rolling cache after `length` tokens, in the cache's order."""
    return [*range(min(sinks, length)), *range(max(sinks, length - window), length)]


def check_window(window: int | None, sinks: int) -> None:
    """Raise UsageError unless window is None or 1 and more, and sinks 0 or, beside a window, more."""
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise UsageError(f"window is {window!r}: it counts the newest tokens that are kept, so give 1 or more.")
    if isinstance(sinks, bool) or not isinstance(sinks, int) or sinks < 0 or (sinks and window is None):
        raise UsageError(f"sinks is {sinks!r}: it counts the first tokens kept beside a window: give a window too.")
