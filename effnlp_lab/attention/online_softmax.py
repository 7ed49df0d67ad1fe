"""Softmax in one pass, and the merge of two partial attentions: the two equations behind flash attention."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def one_pass_softmax(x: Tensor, block: int = 64) -> Tensor:
    """softmax(x) over the last dimension, from a running maximum and sum (Milakov & Gimelshein 2018, algorithm 3).

    Reads x in blocks of `block` columns, once for the statistics and once for the output. When a block raises the
    maximum from m to m', the sum so far was counted in units of e^m and is brought to e^m' by the factor e^(m - m').
    A row of -inf alone gives zeros.
    """
    peak, total = running_statistics(x.split(block, dim=-1), x.shape[:-1], x)
    safe_peak, safe_total = peak.masked_fill(total == 0, 0.0), total.masked_fill(total == 0, 1.0)
    return (x - safe_peak[..., None]).exp() / safe_total[..., None]


def running_statistics(blocks: Iterable[Tensor], shape: torch.Size, like: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and sum of e^(x - maximum) of each row, over blocks of columns that are seen once each."""
    peak = torch.full(shape, float("-inf"), dtype=like.dtype, device=like.device)
    total = torch.zeros(shape, dtype=like.dtype, device=like.device)
    for block in blocks:
        peak, total, _, _ = update_statistics(peak, total, block)
    return peak, total


def update_statistics(peak: Tensor, total: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of the online softmax over a block of scores [..., rows, columns].

    Returns the new maximum and sum, the block's weights e^(scores - new maximum), and the factor e^(old - new maximum)
    that brings everything summed before to the new maximum. Rows that have seen -inf alone keep weights of zero.
    """
    new_peak = torch.maximum(peak, scores.amax(-1)) if scores.shape[-1] else peak
    safe_peak = new_peak.masked_fill(new_peak == float("-inf"), 0.0)  # -inf minus -inf is not a number
    weights = (scores - safe_peak[..., None]).exp()
    rescale = (peak - safe_peak).exp()
    return new_peak, total * rescale + weights.sum(-1), weights, rescale


def merge_partials(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

    out_* are [..., head_dim], already normalised; lse_* are their log-sum-exps [...]. With Z = e^lse, the union's sum
    is Z_a + Z_b and its output (Z_a out_a + Z_b out_b) / (Z_a + Z_b). An empty set has lse -inf; two empty sets give
    zeros.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    safe = lse.masked_fill(lse == float("-inf"), 0.0)
    share_a, share_b = (lse_a - safe).exp()[..., None], (lse_b - safe).exp()[..., None]
    return (out_a * share_a + out_b * share_b).to(out_a.dtype), lse
