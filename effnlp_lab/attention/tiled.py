"""Flash attention in PyTorch: the same tiles, the same order and the same equations as the Triton kernels.

The twin of `kernels_forward.py` and `kernels_backward.py`, for reading and for machines that Triton does not serve. A
tile is a few rows of Q against a few rows of K and V; the score matrix exists one tile at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effnlp_lab.attention.online_softmax import update_statistics
from effnlp_lab.attention.standard import sees


def tiled_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    block_m: int = 64,
    block_n: int = 64,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp (Dao 2023, FlashAttention-2, algorithm 1). Shapes and masks as in `standard_attention`.

    The log-sum-exp [batch, heads, length_q] is all that the backward needs to make the weights again:
    P = exp(scale * Q K^T - lse). Accumulates in float32 or better.
    """
    k, v = _expand(q, k, v)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:-1], float("-inf"), dtype=dtype, device=q.device)
    for m in range(0, q.shape[2], block_m):
        q_tile = q[:, :, m : m + block_m].to(dtype)
        acc = torch.zeros_like(q_tile)
        total = torch.zeros_like(acc[..., 0])
        peak = torch.full_like(total, float("-inf"))
        for n in range(0, k.shape[2], block_n):
            keep = _tile_mask(q, k, m, n, block_m, block_n, causal, window)
            if not keep.any():
                continue
            k_tile, v_tile = (x[:, :, n : n + block_n].to(dtype) for x in (k, v))
            scores = (q_tile @ k_tile.mT * scale).masked_fill(~keep, float("-inf"))
            peak, total, weights, rescale = update_statistics(peak, total, scores)
            acc = acc * rescale[..., None] + weights @ v_tile
        out[:, :, m : m + block_m] = acc / total.masked_fill(total == 0, 1.0)[..., None]
        lse[:, :, m : m + block_m] = peak + total.log()
    return out, lse


def tiled_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    block_m: int = 64,
    block_n: int = 64,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV by recomputing each tile of weights from the log-sum-exp (Dao 2023, algorithm 2).

    With D = rowsum(dO * O), the gradient through the softmax is dS = P * (dO V^T - D), and then dV = P^T dO,
    dQ = scale * dS K and dK = scale * dS^T Q. Key heads that several query heads share sum their gradients.
    """
    kv_heads = k.shape[1]
    k_all, v_all = _expand(q, k, v)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    dtype = torch.promote_types(q.dtype, torch.float32)
    delta = (out.to(dtype) * dout.to(dtype)).sum(-1)
    dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (q, k_all, v_all))
    for n in range(0, k.shape[2], block_n):
        k_tile, v_tile = (x[:, :, n : n + block_n].to(dtype) for x in (k_all, v_all))
        for m in range(0, q.shape[2], block_m):
            keep = _tile_mask(q, k, m, n, block_m, block_n, causal, window)
            if not keep.any():
                continue
            q_tile, do_tile = (x[:, :, m : m + block_m].to(dtype) for x in (q, dout))
            lse_tile, delta_tile = (x[:, :, m : m + block_m, None] for x in (lse, delta))
            weights = (q_tile @ k_tile.mT * scale - lse_tile).exp().masked_fill(~keep, 0.0)
            dscores = weights * (do_tile @ v_tile.mT - delta_tile)
            dv[:, :, n : n + block_n] += weights.mT @ do_tile
            dk[:, :, n : n + block_n] += dscores.mT @ q_tile * scale
            dq[:, :, m : m + block_m] += dscores @ k_tile * scale
    dk, dv = (x.unflatten(1, (kv_heads, -1)).sum(2) for x in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _expand(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly: use a multiple.")
    group = q.shape[1] // k.shape[1]
    return k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)


def _tile_mask(
    q: Tensor, k: Tensor, m: int, n: int, block_m: int, block_n: int, causal: bool, window: int | None
) -> Tensor:
    """Which scores of the tile at row m and key n count; the last query stands beside the last key."""
    position = torch.arange(m, min(m + block_m, q.shape[2]), device=q.device)[:, None] + k.shape[2] - q.shape[2]
    key = torch.arange(n, min(n + block_n, k.shape[2]), device=q.device)[None, :]
    return sees(position, key, causal=causal, window=window)
