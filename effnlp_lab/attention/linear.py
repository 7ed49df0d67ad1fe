"""Linear attention: no softmax, and so no score matrix at all.

Katharopoulos et al. 2020, "Transformers are RNNs". With a positive feature map phi in the place of exp, the weight of
key j for query i is phi(q_i) . phi(k_j); the sums over keys can be taken first, and the cost is linear in the length.
It is another function than softmax attention, not an approximation of it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def feature_map(x: Tensor) -> Tensor:
    """phi(x) = elu(x) + 1 (equation 7): positive everywhere, with a gradient everywhere."""
    return F.elu(x) + 1


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, chunk: int = 128) -> Tensor:
    """phi(Q) (phi(K)^T V) / phi(Q) sum(phi(K)) (equations 4 to 6).

    q is [batch, heads, length_q, head_dim], k and v are [batch, heads, length_k, head_dim or value_dim]; accumulates
    in float32 or better and returns v's dtype. With `causal`, query i sums keys 0 to i, and lengths must be equal:
    chunks of `chunk` queries see what came before through a running state [head_dim, value_dim] and each other through
    a small masked product, so memory is linear in the length. Raises ValueError for shapes that do not fit.
    """
    if k.shape[:-1] != v.shape[:-1] or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: batch and heads must be "
            "equal, q and k share a head dimension, k and v a length."
        )
    dtype = torch.promote_types(v.dtype, torch.float32)
    q, k, values = feature_map(q.to(dtype)), feature_map(k.to(dtype)), v.to(dtype)
    if not causal:
        state = torch.einsum("bhkd,bhkv->bhdv", k, values)
        total = torch.einsum("bhqd,bhd->bhq", q, k.sum(2))
        return _divide(torch.einsum("bhqd,bhdv->bhqv", q, state), total).to(v.dtype)
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"Causal linear attention needs as many queries as keys, not {q.shape[2]} and {k.shape[2]}.")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}: it must be at least 1.")
    return _causal(q, k, values, chunk).to(v.dtype)


def linear_attention_step(
    state: tuple[Tensor, Tensor] | None, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One token of causal linear attention as a recurrence (equations 16 to 20): memory does not grow with the length.

    q, k, v are [batch, heads, dim]. `state` is (sum of phi(k) v^T, sum of phi(k)), None at the start. Returns the
    output [batch, heads, value_dim] and the new state.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    q, k, values = feature_map(q.to(dtype)), feature_map(k.to(dtype)), v.to(dtype)
    product, total = k[..., :, None] * values[..., None, :], k
    if state is not None:
        product, total = state[0] + product, state[1] + total
    out = _divide(torch.einsum("bhd,bhdv->bhv", q, product), (q * total).sum(-1))
    return out.to(v.dtype), (product, total)


def _causal(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    batch, heads, _, head_dim = q.shape
    state = q.new_zeros(batch, heads, head_dim, v.shape[-1])
    total = q.new_zeros(batch, heads, head_dim)
    pieces = []
    for q_part, k_part, v_part in zip(*(x.split(chunk, dim=2) for x in (q, k, v)), strict=True):
        scores = (q_part @ k_part.mT).tril()
        before = torch.einsum("bhqd,bhdv->bhqv", q_part, state)
        norm = scores.sum(-1) + torch.einsum("bhqd,bhd->bhq", q_part, total)
        pieces.append(_divide(before + scores @ v_part, norm))
        state = state + k_part.mT @ v_part
        total = total + k_part.sum(2)
    return torch.cat(pieces, dim=2)


def _divide(numerator: Tensor, total: Tensor) -> Tensor:
    """phi is positive, but underflows to zero far below zero: such a row is zero, not 0/0."""
    return numerator / total.masked_fill(total == 0, 1.0)[..., None]
