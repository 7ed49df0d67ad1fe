"""Sparse attention patterns that stay exact and fast: dilated windows, and sliding windows with global tokens.

Both are linear in the length (Child et al. 2019, Sparse Transformers; Beltagy et al. 2020, Longformer).
"""

from __future__ import annotations

import torch
from torch import Tensor

from effnlp_lab.attention import inputs
from effnlp_lab.attention.flash import flash_attention, flash_attention_varlen


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    global_tokens: int = 0,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Each query sees `window` keys, itself included, and the first `global_tokens` positions.

    Shapes as in `flash_attention`. Under a causal mask global tokens are attention sinks (Xiao et al. 2023,
    StreamingLLM); without one they also see everything themselves (Longformer).
    """
    return flash_attention(q, k, v, causal=causal, window=window, global_tokens=global_tokens, scale=scale)


def dilated_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    dilation: int,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Each query sees `window` keys, itself included, `dilation` positions apart.

    Positions that differ by a multiple of the dilation see only each other, so the sequence falls into `dilation`
    interleaved ones, and within each the pattern is a plain sliding window: the rows are sorted by residue and handed
    to the variable-length kernel. Costs one copy of q, k, v and the output. Shapes as in `flash_attention`. Raises
    ValueError for a dilation below 1.
    """
    if isinstance(dilation, bool) or not isinstance(dilation, int) or dilation < 1:
        raise ValueError(f"dilation is {dilation!r}: it must be a whole number, 1 or more (1 is a plain window).")
    inputs.check_tensors(q, k, v, dims=4, layout="[batch, heads, length, head_dim]")
    if q.shape[0] != k.shape[0] or q.shape[0] == 0:
        raise ValueError(f"q has batch {q.shape[0]} and k has {k.shape[0]}: they must be equal and at least 1.")
    offset = k.shape[2] - q.shape[2]
    order_q, cu_seqlens_q = _by_residue(q.shape[0], q.shape[2], offset, dilation, q.device)
    order_k, cu_seqlens_k = _by_residue(k.shape[0], k.shape[2], 0, dilation, q.device)
    packed = flash_attention_varlen(
        _pack(q, order_q), _pack(k, order_k), _pack(v, order_k), cu_seqlens_q, cu_seqlens_k,
        causal=causal, window=window, scale=scale,
    )  # fmt: skip
    out = packed.new_empty(packed.shape).index_copy(0, order_q, packed)
    return out.view(q.shape[0], q.shape[2], *q.shape[1::2]).transpose(1, 2)


def _by_residue(batch: int, length: int, offset: int, dilation: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of [batch, length] sorted by (batch, position modulo dilation), and the cumulative lengths of these classes.

    Row i has position i + offset. The order within a class is kept, so its last query still stands beside its last key.
    """
    residue = (torch.arange(length, device=device) + offset) % dilation
    order = residue.argsort(stable=True)
    rows = (torch.arange(batch, device=device)[:, None] * length + order[None, :]).flatten()
    counts = torch.bincount(residue, minlength=dilation).repeat(batch)
    return rows, torch.cat([counts.new_zeros(1), counts.cumsum(0)]).cpu()


def _pack(x: Tensor, order: Tensor) -> Tensor:
    """[batch, heads, length, dim] -> [batch * length, heads, dim], rows in the given order."""
    return x.transpose(1, 2).flatten(0, 1).index_select(0, order)
