"""Standard attention: the definition that every other module of this room is compared with.

It writes the whole score matrix to memory, batch x heads x queries x keys numbers, and works in any floating dtype:
in float64 it is the reference, in half precision it is what plain PyTorch code does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def visible(
    length_q: int,
    length_k: int,
    *,
    causal: bool = False,
    window: int | None = None,
    dilation: int = 1,
    global_tokens: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which keys each query sees: a boolean matrix [length_q, length_k].

    The last query stands beside the last key, so query i has position i + length_k - length_q (a mask aligned bottom
    right, as decoding needs). `causal` keeps keys up to the query's own position. `window` W keeps W keys, the query's
    own position counted as one of them: keys at distance 0 to W - 1, before the query and, unless causal, after it.
    (Mistral counts so too; flash-attn's `window_size=(left, right)` counts the neighbours alone, so W is left = W - 1.)
    With `dilation` d the window takes every d-th key. `global_tokens` G makes the first G positions visible to all and
    all visible to them, within what causal allows (Beltagy et al. 2020, Longformer; under a causal mask these are the
    attention sinks of Xiao et al. 2023).
    """
    position = torch.arange(length_q, device=device)[:, None] + length_k - length_q
    key = torch.arange(length_k, device=device)[None, :]
    return sees(position, key, causal=causal, window=window, dilation=dilation, global_tokens=global_tokens)


def sees(
    position: Tensor,
    key: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    dilation: int = 1,
    global_tokens: int = 0,
) -> Tensor:
    """The rule of `visible` for given positions of queries [queries, 1] and of keys [1, keys]."""
    distance = (position - key).abs()
    keep = distance % dilation == 0
    if window is not None:
        keep &= distance < window * dilation
    if global_tokens:
        keep |= (key < global_tokens) | (position < global_tokens)
    return keep & (key <= position) if causal else keep


def standard_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    dilation: int = 1,
    global_tokens: int = 0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * Q K^T) V with all scores in memory (Vaswani et al. 2017, equation 1).

    q is [batch, heads, length_q, head_dim]; k and v are [batch, kv_heads, length_k, head_dim], and query head h reads
    key head h // (heads // kv_heads). `scale` is 1 / sqrt(head_dim) unless given; see `visible` for the masks. A query
    that sees no key gives a row of zeros. With `return_lse` also the log-sum-exp of each query's scaled scores,
    [batch, heads, length_q] (-inf where no key is seen). Raises ValueError where heads do not divide.
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly: use a multiple.")
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
    keep = visible(
        q.shape[2],
        k.shape[2],
        causal=causal,
        window=window,
        dilation=dilation,
        global_tokens=global_tokens,
        device=q.device,
    )
    scores = scores.masked_fill(~keep, float("-inf"))
    sees_a_key = keep.any(-1, keepdim=True)
    # A row of -inf alone has no softmax: give it finite scores, then zero its weights.
    weights = scores.masked_fill(~sees_a_key, 0.0).softmax(-1).masked_fill(~sees_a_key, 0.0)
    out = torch.einsum("bhqk,bhkd->bhqd", weights, v)
    return (out, scores.logsumexp(-1)) if return_lse else out


def standard_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **masks
) -> Tensor:
    """Standard attention over sequences of different lengths laid end to end.

    q is [total_q, heads, head_dim], k and v are [total_k, kv_heads, head_dim]; sequence i is rows cu_seqlens[i] to
    cu_seqlens[i + 1]. Takes the same masks as `standard_attention`, each sequence by itself.
    """
    pieces = [
        standard_attention(*(x[None].transpose(1, 2) for x in (q[q0:q1], k[k0:k1], v[k0:k1])), **masks)
        for (q0, q1), (k0, k1) in zip(_spans(cu_seqlens_q), _spans(cu_seqlens_k), strict=True)
    ]
    return torch.cat([piece[0].transpose(0, 1) for piece in pieces])


def standard_attention_bytes(
    batch: int, heads: int, length: int, head_dim: int, itemsize: int, *, tiles_only: bool = False
) -> int:
    """Bytes that attention must move through device memory, forward, with as many queries as keys.

    Standard attention reads Q and K, writes the scores, reads and writes them in the softmax, reads the weights and V,
    and writes the output (Dao et al. 2022, algorithm 0). With `tiles_only` the scores stay on the chip, and what is
    left is reading Q, K, V and writing the output once.
    """
    tensors = 4 * batch * heads * length * head_dim * itemsize
    return tensors if tiles_only else tensors + 4 * batch * heads * length * length * itemsize


def _spans(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    edges = cu_seqlens.tolist()
    return list(zip(edges[:-1], edges[1:], strict=True))
