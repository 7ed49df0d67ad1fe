"""Flash decoding: attention of a few new queries over a long cache of keys, split over the keys.

Dao et al. 2023, "Flash-Decoding for long-context inference". With one query a head there are too few query tiles to
fill a GPU, so the keys are split among programs, and a second kernel merges the partial outputs by their log-sum-exps.
The query heads that share a key head are packed into the rows of one tile: each key is read once for all of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnlp_lab.attention import configurations, inputs
from effnlp_lab.attention.flash import _aligned, _launch
from effnlp_lab.attention.kernels_common import LN_2, LOG2_E


def flash_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
    splits: int | None = None,
) -> Tensor:
    """Causal attention of the newest queries over a cache, [batch, heads, queries, head_dim] like q.

    k and v are [batch, kv_heads, capacity, head_dim]; of sequence b the first lengths[b] rows count (all where
    `lengths` is None), and the last query stands beside the last of them. `window` as in `flash_attention`. `splits` is
    chosen from the number of multiprocessors and the length unless given. Queries times query heads per key head may be
    at most 64 (32 for head dimensions above 128). No gradients. Raises ValueError or TypeError for inputs that do not
    fit.
    """
    inputs.check_tensors(q, k, v, dims=4, layout="[batch, heads, length, head_dim]")
    if q.shape[0] != k.shape[0] or q.shape[0] == 0:
        raise ValueError(f"q has batch {q.shape[0]} and k has {k.shape[0]}: they must be equal and at least 1.")
    inputs.check_heads(q.shape[1], k.shape[1])
    inputs.check_masks(True, window, 0)
    scale = inputs.check_scale(scale, q.shape[3])
    batch, heads, queries, head_dim = q.shape
    kv_heads, capacity = k.shape[1], k.shape[2]
    rows = heads // kv_heads * queries
    block_d = configurations.block_d_for(head_dim)
    tile = configurations.tile_for("decode", q.device, q.dtype, block_d)
    if rows > tile.queries:
        raise ValueError(
            f"{queries} queries for {heads // kv_heads} heads a group are {rows} rows; decoding takes {tile.queries}: "
            "use flash_attention."
        )
    lengths = _check_lengths(lengths, batch, capacity, q.device)
    if queries == 0 or capacity == 0:
        return torch.zeros_like(q)
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    tile = configurations.Tile(max(16, triton.next_power_of_2(rows)), tile.keys, tile.warps, tile.stages)
    splits = _choose_splits(splits, batch * kv_heads, capacity, tile.keys, q.device)
    partial = torch.empty(splits, batch, heads, queries, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(splits, batch, heads, queries, dtype=torch.float32, device=q.device)
    _launch(
        decode_kernel, batch * kv_heads * splits, tile, q, k, v, partial, lse, lengths, q.stride()[:3], k.stride()[:3],
        v.stride()[:3], batch, kv_heads, heads // kv_heads, queries, splits, window or 0, scale * LOG2_E.value,
        HEAD_DIM=head_dim, BLOCK_D=block_d, WINDOW=window is not None, PRECISION=configurations.precision_for(q.dtype),
    )  # fmt: skip
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    merge = configurations.Tile(triton.next_power_of_2(splits), 0, 4, 1)
    _launch(
        merge_kernel, batch * heads * queries, merge, out, partial, lse, splits, batch * heads * queries,
        HEAD_DIM=head_dim, BLOCK_D=block_d,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["batch", "kv_heads", "queries", "splits", "window"])
def decode_kernel(
    Q, K, V, Partial, Lse,
    lengths,
    q_strides, k_strides, v_strides,
    batch, kv_heads, group, queries, splits, window, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One share of the keys of one key head, for all the queries that read it. Grid: batch * kv_heads * splits.

    Row r of the tile is query r % queries of query head r // queries of the group.
    """
    program = tl.program_id(0)
    split = program % splits
    kv_head = program // splits % kv_heads
    sequence = program // splits // kv_heads
    length = tl.load(lengths + sequence)
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    exists = rows < group * queries
    head = kv_head * group + rows // queries
    query = rows % queries
    position = length - queries + query
    where = sequence.to(tl.int64) * q_strides[0] + head * q_strides[1] + query * q_strides[2]
    inside = exists[:, None] & (columns < HEAD_DIM)[None, :]
    q = tl.load(Q + where[:, None] + columns[None, :], mask=inside, other=0.0)

    first = 0
    if WINDOW:
        first = tl.maximum(length - queries - window + 1, 0) // BLOCK_N * BLOCK_N
    share = tl.cdiv(tl.cdiv(tl.maximum(length - first, 0), splits), BLOCK_N) * BLOCK_N
    begin = first + split * share
    end = tl.minimum(begin + share, length)
    K += sequence.to(tl.int64) * k_strides[0] + kv_head.to(tl.int64) * k_strides[1]
    V += sequence.to(tl.int64) * v_strides[0] + kv_head.to(tl.int64) * v_strides[1]
    k_tiles = tl.make_tensor_descriptor(K, [length, HEAD_DIM], [k_strides[2], 1], [BLOCK_N, BLOCK_D])
    v_tiles = tl.make_tensor_descriptor(V, [length, HEAD_DIM], [v_strides[2], 1], [BLOCK_N, BLOCK_D])
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], -1.0e30, tl.float32)
    for start in range(begin, end, BLOCK_N):
        scores = tl.dot(q, k_tiles.load([start, 0]).T, input_precision=PRECISION)
        key = start + tl.arange(0, BLOCK_N)
        keep = key[None, :] <= position[:, None]
        if WINDOW:
            keep = keep & (position[:, None] - key[None, :] < window)
        scores = tl.where(keep, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores * qk_scale - (new_peak * qk_scale)[:, None])
        rescale = tl.exp2((peak - new_peak) * qk_scale)
        total = total * rescale + tl.sum(weights, 1)
        v = v_tiles.load([start, 0])
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        peak = new_peak

    seen = total > 0  # a split past the end of its sequence saw nothing: its share must come out as zero, not 0/0
    total = tl.where(seen, total, 1.0)
    lse = tl.where(seen, (peak * qk_scale + tl.log2(total)) * LN_2, float("-inf"))
    row = ((split * batch + sequence).to(tl.int64) * kv_heads + kv_head) * group * queries + rows
    tl.store(Partial + row[:, None] * HEAD_DIM + columns[None, :], acc / total[:, None], mask=inside)
    tl.store(Lse + row, lse, mask=exists)


@triton.jit(do_not_specialize=["splits", "rows"])
def merge_kernel(Out, Partial, Lse, splits, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr):
    """Output of one row from its partial ones: sum of e^(lse_i - lse) out_i, always in the same order. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    lse = tl.load(Lse + split * rows.to(tl.int64) + row, mask=split < splits, other=float("-inf"))
    peak = tl.max(lse, 0)
    share = tl.exp(lse - tl.where(peak > float("-inf"), peak, 0.0))
    where = (split * rows.to(tl.int64) + row)[:, None] * HEAD_DIM + columns[None, :]
    inside = (split < splits)[:, None] & (columns < HEAD_DIM)[None, :]
    partial = tl.load(Partial + where, mask=inside, other=0.0)
    total = tl.sum(share, 0)
    out = tl.sum(partial * share[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(Out + row * HEAD_DIM + columns, out.to(Out.dtype.element_ty), mask=columns < HEAD_DIM)


def _choose_splits(splits: int | None, programs: int, capacity: int, block: int, device: torch.device) -> int:
    """In how many shares to cut the keys, at most 64, each of at least two tiles.

    Two programs fit on a multiprocessor, and the card works in waves of as many as fit: a last wave of a few programs
    takes as long as a full one. So take the fewest shares that keep all waves nearly as full as any number could.
    """
    if splits is not None:
        if splits < 1:
            raise ValueError(f"splits is {splits}: the keys must be split in at least 1 share.")
        return min(splits, 64)
    most = max(1, min(64, triton.cdiv(capacity, 2 * block)))
    if device.type != "cuda":
        return min(most, 4)
    wave = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    full = [programs * n / (wave * triton.cdiv(programs * n, wave)) for n in range(1, most + 1)]
    return next(n for n, share in enumerate(full, start=1) if share >= 0.9 * max(full))


def _check_lengths(lengths: Tensor | None, batch: int, capacity: int, device: torch.device) -> Tensor:
    """int32 [batch] on the device. The kernel alone reads their values: no synchronisation in the decoding loop."""
    if lengths is None:
        return torch.full((batch,), capacity, dtype=torch.int32, device=device)
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64) or lengths.shape != (batch,):
        raise TypeError(f"lengths must be an int32 or int64 tensor with one entry for each of {batch} sequences.")
    return lengths.to(device, torch.int32).clamp(0, capacity)
