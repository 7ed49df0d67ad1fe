"""The forward kernel of flash attention (Dao 2023, FlashAttention-2, algorithm 1).

A program owns BLOCK_M queries of one head and walks over the keys, BLOCK_N at a time. The running maximum and sum of
the online softmax, and the output so far, stay in registers; the scores never leave the chip.
"""

import triton
import triton.language as tl

from effnlp_lab.attention.kernels_common import find_sequence, key_ranges, locate, sees


@triton.jit(do_not_specialize=["heads", "length_q", "length_k", "window", "global_tokens"])
def forward_kernel(
    Q, K, V, Out, Lse2,
    q_strides, k_strides, v_strides, out_strides, lse_strides,
    cu_seqlens_q, cu_seqlens_k, heads, group, length_q, length_k, window, global_tokens, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, GLOBAL: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: ceil(length_q / BLOCK_M) * heads * batch. `qk_scale` is scale * log2(e), for exp2,
    and Lse2 is the log-sum-exp in base 2: the backward must see exactly these numbers.

    Tiles of one head follow each other, so that its K and V stay in L2; the last rows come first, for under a causal
    mask they see the most keys and should not be what everything waits for.
    """
    tiles = tl.cdiv(length_q, BLOCK_M)
    program = tl.program_id(0)
    row = (tiles - 1 - program % tiles) * BLOCK_M
    head = program // tiles % heads
    batch = program // tiles // heads
    first_q, length_q = find_sequence(cu_seqlens_q, batch, length_q, VARLEN)
    first_k, length_k = find_sequence(cu_seqlens_k, batch, length_k, VARLEN)
    if row >= length_q:
        return

    rows = row + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < length_q)[:, None] & (columns < HEAD_DIM)[None, :]
    at = rows.to(tl.int64)[:, None]
    Q += locate(batch, head, first_q, q_strides)
    q = tl.load(Q + at * q_strides[2] + columns[None, :], mask=inside, other=0.0)
    # A descriptor lets the copy engine fetch whole tiles; what lies outside [length_k, HEAD_DIM] reads as zero.
    K += locate(batch, head // group, first_k, k_strides)
    V += locate(batch, head // group, first_k, v_strides)
    k_tiles = tl.make_tensor_descriptor(K, [length_k, HEAD_DIM], [k_strides[2], 1], [BLOCK_N, BLOCK_D])
    v_tiles = tl.make_tensor_descriptor(V, [length_k, HEAD_DIM], [v_strides[2], 1], [BLOCK_N, BLOCK_D])

    offset = length_k - length_q  # the last query stands beside the last key
    position = rows + offset
    last = tl.minimum(row + BLOCK_M, length_q) - 1 + offset
    global_end, begin, full_begin, full_end, end = key_ranges(
        row + offset, last, length_k, window, global_tokens, BLOCK_N, CAUSAL, WINDOW, GLOBAL
    )
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], -1.0e30, tl.float32)  # finite: a row that sees nothing must not compute -inf minus -inf
    if GLOBAL:
        acc, total, peak = _attend(
            acc, total, peak, q, k_tiles, v_tiles, 0, global_end, position, length_k, window, global_tokens,
            qk_scale, BLOCK_N, CAUSAL, WINDOW, GLOBAL, True, PRECISION,
        )  # fmt: skip
    if WINDOW:
        acc, total, peak = _attend(
            acc, total, peak, q, k_tiles, v_tiles, begin, full_begin, position, length_k, window, global_tokens,
            qk_scale, BLOCK_N, CAUSAL, WINDOW, GLOBAL, True, PRECISION,
        )  # fmt: skip
    acc, total, peak = _attend(
        acc, total, peak, q, k_tiles, v_tiles, full_begin, full_end, position, length_k, window, global_tokens,
        qk_scale, BLOCK_N, CAUSAL, WINDOW, GLOBAL, False, PRECISION,
    )  # fmt: skip
    acc, total, peak = _attend(
        acc, total, peak, q, k_tiles, v_tiles, full_end, end, position, length_k, window, global_tokens,
        qk_scale, BLOCK_N, CAUSAL, WINDOW, GLOBAL, True, PRECISION,
    )  # fmt: skip

    seen = total > 0
    total = tl.where(seen, total, 1.0)
    out = acc / total[:, None]
    lse2 = tl.where(seen, peak * qk_scale + tl.log2(total), float("-inf"))
    Out += locate(batch, head, first_q, out_strides)
    Lse2 += locate(batch, head, first_q, lse_strides)
    tl.store(Out + at * out_strides[2] + columns[None, :], out.to(Out.dtype.element_ty), mask=inside)
    tl.store(Lse2 + rows, lse2, mask=rows < length_q)


@triton.jit
def _attend(
    acc, total, peak, q, k_tiles, v_tiles, begin, end, position, length_k, window, global_tokens, qk_scale,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, GLOBAL: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to keys begin..end, one tile after the other, with the online softmax."""
    for start in range(begin, end, BLOCK_N):
        k = k_tiles.load([start, 0])
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        if MASKED:
            key = start + tl.arange(0, BLOCK_N)
            keep = sees(position[:, None], key[None, :], length_k, window, global_tokens, CAUSAL, WINDOW, GLOBAL)
            scores = tl.where(keep, scores, float("-inf"))
        # The maximum is taken of raw scores: scaling them is part of the fused multiply-add under exp2.
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores * qk_scale - (new_peak * qk_scale)[:, None])
        rescale = tl.exp2((peak - new_peak) * qk_scale)
        total = total * rescale + tl.sum(weights, 1)
        v = v_tiles.load([start, 0])
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        peak = new_peak
    return acc, total, peak
