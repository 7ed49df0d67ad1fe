"""The backward kernels of flash attention: three passes, no atomics, the same bits at every run.

With the log-sum-exp from the forward, a tile of weights is made again as P = exp(scale * Q K^T - lse). Then, with
D = rowsum(dO * O), the gradients are dS = P * (dO V^T - D), dV = P^T dO, dK = scale * dS^T Q and dQ = scale * dS K
(Dao 2023, FlashAttention-2, algorithm 2). One pass over the rows computes D. One pass gives each tile of keys to a
program, which sums dK and dV over the queries; another gives each tile of queries to a program, which sums dQ over the
keys. Making P and dO V^T twice costs two products in seven, and buys that no two programs add to the same number.
"""

import triton
import triton.language as tl

from effnlp_lab.attention.kernels_common import (
    LOG2_E,
    find_sequence,
    key_ranges,
    locate,
    padded_start,
    row_ranges,
    sees,
)


@triton.jit(do_not_specialize=["heads", "length_q"])
def row_statistics_kernel(
    Out, DOut, Lse2, DLse2, PaddedLse2, Delta,
    out_strides, dout_strides, lse_strides, row_strides,
    cu_seqlens_q, heads, length_q,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Per row: the log-sum-exp, and D = rowsum(dO * O) minus the gradient that reaches the log-sum-exp itself.

    Written with 128 slots a tile: past the last row they hold +inf and 0, which make weights and gradients zero.
    Grid: ceil(length_q / 128) * 128 / BLOCK_M * heads * batch.
    """
    tiles = tl.cdiv(length_q, 128) * (128 // BLOCK_M)
    program = tl.program_id(0)
    row = program % tiles * BLOCK_M
    head = program // tiles % heads
    batch = program // tiles // heads
    first, length = find_sequence(cu_seqlens_q, batch, length_q, VARLEN)
    if row >= tl.cdiv(length, 128) * 128:
        return
    rows = row + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    exists = rows < length
    inside = exists[:, None] & (columns < HEAD_DIM)[None, :]
    at = rows.to(tl.int64)[:, None]
    Out += locate(batch, head, first, out_strides)
    DOut += locate(batch, head, first, dout_strides)
    out = tl.load(Out + at * out_strides[2] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    dout = tl.load(DOut + at * dout_strides[2] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    stats = locate(batch, head, first, lse_strides)
    lse2 = tl.load(Lse2 + stats + rows, mask=exists, other=float("inf"))
    delta = tl.sum(out * dout, 1)
    if DLse2 is not None:
        delta -= tl.load(DLse2 + stats + rows, mask=exists, other=0.0) * LOG2_E
    padded = locate(batch, head, padded_start(first, batch, VARLEN), row_strides)
    tl.store(PaddedLse2 + padded + rows, lse2)
    tl.store(Delta + padded + rows, delta)


@triton.jit(do_not_specialize=["kv_heads", "length_q", "length_k", "window", "global_tokens"])
def dkdv_kernel(
    Q, K, V, DOut, Lse2, Delta, DK, DV,
    q_strides, k_strides, v_strides, dout_strides, row_strides, dk_strides,
    cu_seqlens_q, cu_seqlens_k, kv_heads, group, length_q, length_k, window, global_tokens, qk_scale, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, GLOBAL: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys of one key head, over all queries of the `group` heads that share it.

    Scores are made transposed, [keys, queries], so that P^T and dS^T are where the products want them: in registers.
    Grid: ceil(length_k / BLOCK_N) * kv_heads * batch.
    """
    tiles = tl.cdiv(length_k, BLOCK_N)
    program = tl.program_id(0)
    column = program % tiles * BLOCK_N
    kv_head = program // tiles % kv_heads
    batch = program // tiles // kv_heads
    first_q, length_q = find_sequence(cu_seqlens_q, batch, length_q, VARLEN)
    first_k, length_k = find_sequence(cu_seqlens_k, batch, length_k, VARLEN)
    if column >= length_k:
        return
    K += locate(batch, kv_head, first_k, k_strides)
    V += locate(batch, kv_head, first_k, v_strides)
    k = tl.make_tensor_descriptor(K, [length_k, HEAD_DIM], [k_strides[2], 1], [BLOCK_N, BLOCK_D]).load([column, 0])
    v = tl.make_tensor_descriptor(V, [length_k, HEAD_DIM], [v_strides[2], 1], [BLOCK_N, BLOCK_D]).load([column, 0])

    offset = length_k - length_q
    key = column + tl.arange(0, BLOCK_N)
    last = tl.minimum(column + BLOCK_N, length_k) - 1
    global_end, begin, full_begin, full_end, end = row_ranges(
        column, last, offset, length_q, window, global_tokens, BLOCK_M, CAUSAL, WINDOW, GLOBAL
    )
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(0, group):
        head = kv_head * group + member
        q_head = Q + locate(batch, head, first_q, q_strides)
        dout_head = DOut + locate(batch, head, first_q, dout_strides)
        q_tiles = tl.make_tensor_descriptor(q_head, [length_q, HEAD_DIM], [q_strides[2], 1], [BLOCK_M, BLOCK_D])
        dout_tiles = tl.make_tensor_descriptor(
            dout_head, [length_q, HEAD_DIM], [dout_strides[2], 1], [BLOCK_M, BLOCK_D]
        )
        stats = locate(batch, head, padded_start(first_q, batch, VARLEN), row_strides)
        slots = tl.cdiv(length_q, 128) * 128
        lse2 = tl.make_tensor_descriptor(Lse2 + stats, [slots], [1], [BLOCK_M])
        delta = tl.make_tensor_descriptor(Delta + stats, [slots], [1], [BLOCK_M])
        if GLOBAL and not CAUSAL:
            dk, dv = _sum_over_rows(
                dk, dv, k, v, q_tiles, dout_tiles, lse2, delta, 0, global_end, key, offset, length_k, window,
                global_tokens, qk_scale, BLOCK_M, CAUSAL, WINDOW, GLOBAL, True, PRECISION,
            )  # fmt: skip
        if CAUSAL or WINDOW:
            dk, dv = _sum_over_rows(
                dk, dv, k, v, q_tiles, dout_tiles, lse2, delta, begin, full_begin, key, offset, length_k, window,
                global_tokens, qk_scale, BLOCK_M, CAUSAL, WINDOW, GLOBAL, True, PRECISION,
            )  # fmt: skip
        dk, dv = _sum_over_rows(
            dk, dv, k, v, q_tiles, dout_tiles, lse2, delta, full_begin, full_end, key, offset, length_k, window,
            global_tokens, qk_scale, BLOCK_M, CAUSAL, WINDOW, GLOBAL, False, PRECISION,
        )  # fmt: skip
        if WINDOW:
            dk, dv = _sum_over_rows(
                dk, dv, k, v, q_tiles, dout_tiles, lse2, delta, full_end, end, key, offset, length_k, window,
                global_tokens, qk_scale, BLOCK_M, CAUSAL, WINDOW, GLOBAL, True, PRECISION,
            )  # fmt: skip

    columns = tl.arange(0, BLOCK_D)
    inside = (key < length_k)[:, None] & (columns < HEAD_DIM)[None, :]
    place = locate(batch, kv_head, first_k, dk_strides) + key.to(tl.int64)[:, None] * dk_strides[2] + columns[None, :]
    tl.store(DK + place, (dk * scale).to(DK.dtype.element_ty), mask=inside)
    tl.store(DV + place, dv.to(DV.dtype.element_ty), mask=inside)


@triton.jit
def _sum_over_rows(
    dk, dv, k, v, q_tiles, dout_tiles, lse2, delta, begin, end, key, offset, length_k, window, global_tokens,
    qk_scale,
    BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, GLOBAL: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the share of rows begin..end to dK and dV."""
    for start in range(begin, end, BLOCK_M):
        q = q_tiles.load([start, 0])
        scores_t = tl.dot(k, q.T, input_precision=PRECISION)
        weights_t = tl.exp2(scores_t * qk_scale - lse2.load([start])[None, :])
        if MASKED:
            position = start + offset + tl.arange(0, BLOCK_M)
            keep = sees(position[None, :], key[:, None], length_k, window, global_tokens, CAUSAL, WINDOW, GLOBAL)
            weights_t = tl.where(keep, weights_t, 0.0)
        dout = dout_tiles.load([start, 0])
        dv = tl.dot(weights_t.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dweights_t = tl.dot(v, dout.T, input_precision=PRECISION)
        dscores_t = weights_t * (dweights_t - delta.load([start])[None, :])
        dk = tl.dot(dscores_t.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["heads", "length_q", "length_k", "window", "global_tokens"])
def dq_kernel(
    Q, K, V, DOut, Lse2, Delta, DQ,
    q_strides, k_strides, v_strides, dout_strides, row_strides, dq_strides,
    cu_seqlens_q, cu_seqlens_k, heads, group, length_q, length_k, window, global_tokens, qk_scale, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, GLOBAL: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M queries of one head, over all keys. Grid and order as in the forward kernel."""
    tiles = tl.cdiv(length_q, BLOCK_M)
    program = tl.program_id(0)
    row = (tiles - 1 - program % tiles) * BLOCK_M
    head = program // tiles % heads
    batch = program // tiles // heads
    first_q, length_q = find_sequence(cu_seqlens_q, batch, length_q, VARLEN)
    first_k, length_k = find_sequence(cu_seqlens_k, batch, length_k, VARLEN)
    if row >= length_q:
        return
    Q += locate(batch, head, first_q, q_strides)
    DOut += locate(batch, head, first_q, dout_strides)
    K += locate(batch, head // group, first_k, k_strides)
    V += locate(batch, head // group, first_k, v_strides)
    q = tl.make_tensor_descriptor(Q, [length_q, HEAD_DIM], [q_strides[2], 1], [BLOCK_M, BLOCK_D]).load([row, 0])
    dout = tl.make_tensor_descriptor(DOut, [length_q, HEAD_DIM], [dout_strides[2], 1], [BLOCK_M, BLOCK_D]).load(
        [row, 0]
    )
    k_tiles = tl.make_tensor_descriptor(K, [length_k, HEAD_DIM], [k_strides[2], 1], [BLOCK_N, BLOCK_D])
    v_tiles = tl.make_tensor_descriptor(V, [length_k, HEAD_DIM], [v_strides[2], 1], [BLOCK_N, BLOCK_D])
    rows = row + tl.arange(0, BLOCK_M)
    stats = locate(batch, head, padded_start(first_q, batch, VARLEN), row_strides)
    lse2 = tl.load(Lse2 + stats + rows)
    delta = tl.load(Delta + stats + rows)

    offset = length_k - length_q
    position = rows + offset
    last = tl.minimum(row + BLOCK_M, length_q) - 1 + offset
    global_end, begin, full_begin, full_end, end = key_ranges(
        row + offset, last, length_k, window, global_tokens, BLOCK_N, CAUSAL, WINDOW, GLOBAL
    )
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if GLOBAL:
        dq = _sum_over_keys(
            dq, q, dout, lse2, delta, k_tiles, v_tiles, 0, global_end, position, length_k, window, global_tokens,
            qk_scale, BLOCK_N, CAUSAL, WINDOW, GLOBAL, True, PRECISION,
        )  # fmt: skip
    if WINDOW:
        dq = _sum_over_keys(
            dq, q, dout, lse2, delta, k_tiles, v_tiles, begin, full_begin, position, length_k, window, global_tokens,
            qk_scale, BLOCK_N, CAUSAL, WINDOW, GLOBAL, True, PRECISION,
        )  # fmt: skip
    dq = _sum_over_keys(
        dq, q, dout, lse2, delta, k_tiles, v_tiles, full_begin, full_end, position, length_k, window, global_tokens,
        qk_scale, BLOCK_N, CAUSAL, WINDOW, GLOBAL, False, PRECISION,
    )  # fmt: skip
    dq = _sum_over_keys(
        dq, q, dout, lse2, delta, k_tiles, v_tiles, full_end, end, position, length_k, window, global_tokens,
        qk_scale, BLOCK_N, CAUSAL, WINDOW, GLOBAL, True, PRECISION,
    )  # fmt: skip

    columns = tl.arange(0, BLOCK_D)
    inside = (rows < length_q)[:, None] & (columns < HEAD_DIM)[None, :]
    place = locate(batch, head, first_q, dq_strides) + rows.to(tl.int64)[:, None] * dq_strides[2] + columns[None, :]
    tl.store(DQ + place, (dq * scale).to(DQ.dtype.element_ty), mask=inside)


@triton.jit
def _sum_over_keys(
    dq, q, dout, lse2, delta, k_tiles, v_tiles, begin, end, position, length_k, window, global_tokens, qk_scale,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, GLOBAL: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the share of keys begin..end to dQ."""
    for start in range(begin, end, BLOCK_N):
        k = k_tiles.load([start, 0])
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        weights = tl.exp2(scores * qk_scale - lse2[:, None])
        if MASKED:
            key = start + tl.arange(0, BLOCK_N)
            keep = sees(position[:, None], key[None, :], length_k, window, global_tokens, CAUSAL, WINDOW, GLOBAL)
            weights = tl.where(keep, weights, 0.0)
        v = v_tiles.load([start, 0])
        dweights = tl.dot(dout, v.T, input_precision=PRECISION)
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq
