"""Memory-efficient attention in plain PyTorch: chunks of queries against chunks of keys.

Rabe & Staats 2021, "Self-attention does not need O(n^2) memory": the forward keeps one chunk of scores at a time, and
the backward recomputes each chunk from its inputs (checkpointing) and so never holds the score matrix either.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from effnlp_lab.attention.standard import sees


def chunked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    query_chunk: int = 1024,
    key_chunk: int = 4096,
) -> Tensor:
    """Exact attention with query_chunk x key_chunk scores in memory, forward and backward.

    Shapes and masks as in `standard_attention`. Raises ValueError for a chunk below 1 and for heads that do not divide.
    """
    if query_chunk < 1 or key_chunk < 1:
        raise ValueError(f"Chunks must be at least 1 long, not {query_chunk} queries and {key_chunk} keys.")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly: use a multiple.")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    position = torch.arange(q.shape[2], device=q.device)[:, None] + k.shape[2] - q.shape[2]
    masks = {"causal": causal, "window": window}
    rows = [
        _attend_rows(q_rows * scale, k, v, at, key_chunk, masks)
        for q_rows, at in zip(q.split(query_chunk, dim=2), position.split(query_chunk), strict=True)
        if len(at)
    ]
    return torch.cat(rows, dim=2) if rows else q * (k.sum() + v.sum())


def _attend_rows(q: Tensor, k: Tensor, v: Tensor, position: Tensor, key_chunk: int, masks: dict) -> Tensor:
    """Attention of one chunk of queries: summaries of each chunk of keys, combined by their maxima."""
    group = q.shape[1] // k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    numerator = torch.zeros(q.shape, dtype=dtype, device=q.device)
    total = torch.zeros(q.shape[:-1], dtype=dtype, device=q.device)
    peak = torch.full(q.shape[:-1], float("-inf"), dtype=dtype, device=q.device)
    for key in range(0, k.shape[2], key_chunk):
        k_part, v_part = k[:, :, key : key + key_chunk], v[:, :, key : key + key_chunk]
        mask = sees(position, torch.arange(key, key + k_part.shape[2], device=q.device)[None, :], **masks)
        if not mask.any():
            continue
        part, part_total, part_peak = checkpoint(_summary, q, k_part, v_part, mask, group, use_reentrant=False)
        new_peak = torch.maximum(peak, part_peak)
        old, new = _factor(peak, new_peak), _factor(part_peak, new_peak)
        numerator = numerator * old[..., None] + part * new[..., None]
        total = total * old + part_total * new
        peak = new_peak
    return (numerator / total.masked_fill(total == 0, 1.0)[..., None]).to(q.dtype)


def _factor(peak: Tensor, new_peak: Tensor) -> Tensor:
    return (peak - new_peak.masked_fill(new_peak == float("-inf"), 0.0)).exp()


def _summary(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unnormalised output, sum of weights and maximum of a chunk of keys (Rabe & Staats 2021, figure 1)."""
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k).to(torch.promote_types(q.dtype, torch.float32))
    scores = scores.masked_fill(~mask, float("-inf"))
    peak = scores.amax(-1).detach()
    weights = (scores - peak.masked_fill(peak == float("-inf"), 0.0)[..., None]).exp()
    return torch.einsum("bhqk,bhkd->bhqd", weights.to(v.dtype), v).to(scores.dtype), weights.sum(-1), peak
