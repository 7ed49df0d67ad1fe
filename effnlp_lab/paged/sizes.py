"""How large a key-value cache is, and how much of it each way of allocating wastes (Kwon et al. 2023, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from effnlp_lab.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def cache_bytes_per_token(layers: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes that one token keeps in the cache: a key and a value in every layer."""
    return 2 * layers * kv_heads * head_dim * itemsize


def bytes_per_token_of(config: PreTrainedConfig, itemsize: int) -> int:
    """The same for a `transformers` configuration."""
    return cache_bytes_per_token(config.num_hidden_layers, *kv_shape(config), itemsize)


def kv_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """(key heads, head dimension) of a configuration that may leave either to its defaults."""
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return kv_heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def pages_for(length: int, page_size: int) -> int:
    """Pages that a sequence of `length` tokens takes: exactly k for k full pages, none for an empty one."""
    return -(-length // page_size)


@dataclass(frozen=True)
class Waste:
    """Token slots that an allocator sets aside, and those that hold a token."""

    reserved: int
    used: int

    @property
    def share(self) -> float:
        """The part of the memory that holds nothing, 0 to 1."""
        return 1 - self.used / self.reserved if self.reserved else 0.0


def waste(lengths: Iterable[int], *, max_length: int, page_size: int = 16) -> dict[str, Waste]:
    """What sequences of these final lengths would reserve, by allocator.

    "maximum": every sequence gets `max_length` slots, as it might grow so long. "powers of two": a buddy allocator that
    is told each length in advance (the paper's Orca Pow2, without its mistakes in guessing). "padded batch": all are
    padded to the longest of them. "paged": whole pages, so that only the last page of a sequence has empty slots.
    Raises UsageError for a length above `max_length` or below 0.
    """
    lengths = list(lengths)
    if any(not 0 <= n <= max_length for n in lengths):
        outside = next(n for n in lengths if not 0 <= n <= max_length)
        raise UsageError(f"A sequence has length {outside}: lengths must lie between 0 and max_length={max_length}.")
    used = sum(lengths)
    reserved = {
        "maximum": max_length * len(lengths),
        "powers of two": sum(1 << math.ceil(math.log2(n)) if n else 0 for n in lengths),
        "padded batch": max(lengths, default=0) * len(lengths),
        "paged": sum(pages_for(n, page_size) * page_size for n in lengths),
    }
    return {name: Waste(slots, used) for name, slots in reserved.items()}
