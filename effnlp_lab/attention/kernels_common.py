"""What the forward and backward kernels share: where a sequence lies, which tiles a tile must visit, and the mask.

A tile of queries and a tile of keys are in one of three relations: every pair counts (full), none does (skipped), or
some do (masked). Only masked tiles pay for a mask; for a causal attention they are the ones on the diagonal.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def find_sequence(cu_seqlens, batch, length, VARLEN: tl.constexpr):
    """First row and length of a sequence: from the cumulative lengths, or the same for all."""
    first = tl.full([], 0, tl.int64)
    if VARLEN:
        first = tl.load(cu_seqlens + batch).to(tl.int64)
        length = (tl.load(cu_seqlens + batch + 1) - first).to(tl.int32)
    return first, length


@triton.jit
def locate(batch, head, first, strides):
    """Offset of a sequence's first row in a tensor with strides (batch, head, row); 64 bits, tensors may be large."""
    return batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + first * strides[2]


@triton.jit
def padded_start(first, batch, VARLEN: tl.constexpr):
    """Where a sequence's row statistics start: it has slots of 128 rows to itself, so that no load needs a mask."""
    return (first // 128 + batch) * 128 if VARLEN else first


@triton.jit
def sees(
    position, key, length_k, window, global_tokens, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, GLOBAL: tl.constexpr
):
    """Which keys count for a query at `position`, among keys that exist. Shapes broadcast."""
    keep = key < length_k
    if WINDOW:
        near = position - key < window
        if not CAUSAL:
            near = near & (key - position < window)
        if GLOBAL:
            near = near | (key < global_tokens) | (position < global_tokens)
        keep = keep & near
    if CAUSAL:
        keep = keep & (key <= position)
    return keep


@triton.jit
def key_ranges(
    first, last, length_k, window, global_tokens,
    BLOCK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, GLOBAL: tl.constexpr,
):  # fmt: skip
    """The keys that queries at positions first..last visit: (global_end, begin, full_begin, full_end, end).

    Keys in [0, global_end) are seen as global tokens, those in [full_begin, full_end) by every one of these queries,
    and the rest of [begin, end) by some. All but `end` are multiples of BLOCK.
    """
    begin = 0
    full_begin = 0
    end = length_k
    full_end = length_k
    if CAUSAL:
        end = tl.minimum(end, last + 1)
        full_end = tl.minimum(full_end, first + 1)
    elif WINDOW:
        end = tl.minimum(end, last + window)
        full_end = tl.minimum(full_end, first + window)
    if WINDOW:
        begin = first - window + 1
        full_begin = last - window + 1
    if GLOBAL:
        if first < global_tokens:  # a global query among them sees beyond the window: mask every tile
            begin = 0
            full_begin = length_k
            if not CAUSAL:
                end = length_k
    return _round_ranges(begin, full_begin, full_end, end, global_tokens, BLOCK, GLOBAL)


@triton.jit
def row_ranges(
    first, last, offset, length_q, window, global_tokens,
    BLOCK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, GLOBAL: tl.constexpr,
):  # fmt: skip
    """The rows of Q that visit keys first..last: (global_end, begin, full_begin, full_end, end), as in `key_ranges`.

    Row i has position i + offset. Rows past the last query count as full: their weights come out as zero.
    """
    begin = 0
    full_begin = 0
    end = length_q
    full_end = tl.cdiv(length_q, BLOCK) * BLOCK
    if CAUSAL:
        begin = first - offset
        full_begin = last - offset
    elif WINDOW:
        begin = first - window + 1 - offset
        full_begin = last - window + 1 - offset
    if WINDOW:
        end = tl.minimum(end, last + window - offset)
        full_end = tl.minimum(full_end, first + window - offset)
    if GLOBAL:
        if first < global_tokens:  # a global key among them is seen from beyond the window: mask every tile
            full_begin = length_q
            end = length_q
            if not CAUSAL:
                begin = 0
    return _round_ranges(begin, full_begin, full_end, end, global_tokens - offset, BLOCK, GLOBAL and not CAUSAL)


@triton.jit
def _round_ranges(begin, full_begin, full_end, end, global_end, BLOCK: tl.constexpr, GLOBAL: tl.constexpr):
    begin = tl.maximum(begin, 0) // BLOCK * BLOCK
    full_end = tl.maximum(full_end, 0) // BLOCK * BLOCK
    full_begin = tl.cdiv(tl.maximum(full_begin, 0), BLOCK) * BLOCK
    full_begin = tl.maximum(tl.minimum(full_begin, tl.cdiv(tl.maximum(end, 0), BLOCK) * BLOCK), begin)
    full_end = tl.maximum(full_end, full_begin)
    if GLOBAL:
        global_end = tl.minimum(tl.cdiv(tl.maximum(global_end, 0), BLOCK) * BLOCK, begin)
    else:
        global_end = 0
    return global_end, begin, full_begin, full_end, end
