"""The kernels of a paged cache: attention through a block table, its merge, and writing keys and values into pages.

Kwon et al. 2023, section 5.1, with flash decoding's split over the keys (Dao et al. 2023). A tile's rows are queries
times the query heads that share a key head, so that each key is read once for all of them: 4 or 8 rows when decoding, a
whole tile of them when a prompt is read.
"""

import triton
import triton.language as tl

from effnlp_lab.attention.kernels_common import LN_2
from effnlp_lab.early_start import after_the_kernel_before, let_the_next_start, wait_for_the_kernel_before

# Small tensors begin anywhere in a larger one: a kernel for each alignment of each would be compiled over and over.
_ANYWHERE = ["tables", "rows", "lengths", "starts", "slots", "positions"]


@triton.jit(
    do_not_specialize=["table_stride", "tiles", "splits", "total_rows", "window", "sinks"],
    do_not_specialize_on_alignment=_ANYWHERE,
)
def paged_kernel(
    Q, QSink, K, V, Out, Partial, Lse,
    tables, rows, lengths, starts,
    table_stride, page_stride, tiles, splits, total_rows, window, sinks, qk_scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr, SETTLED: tl.constexpr,
):  # fmt: skip
    """One share of the keys of one key head, for one tile of the queries that read it.

    Grid: (tiles * splits, KV_HEADS, batch). Row r of a sequence is query r // GROUP and head r % GROUP of the group.
    `rows` [batch] names each sequence's row in the block tables; `starts` [batch + 1] its queries; `lengths` [batch]
    counts its keys, and the last query stands beside the last of them. Q and Out are [total, heads, HEAD_DIM]; with
    SPLIT the output goes to Partial [splits, total * heads, HEAD_DIM], in float32, and Lse [splits, total * heads].
    SETTLED: the lower-case tensors were written before the kernel before this one, and may be read while it ends.
    """
    wait_for_the_kernel_before(EARLY and not SETTLED)
    tile = tiles - 1 - tl.program_id(0) // splits  # the last queries see the most keys: they begin first
    split = tl.program_id(0) % splits
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2)
    first_query = tl.load(starts + sequence)
    queries = tl.load(starts + sequence + 1) - first_query
    if tile * BLOCK_M >= queries * GROUP:
        return
    length = tl.load(lengths + sequence)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = row // GROUP
    columns = tl.arange(0, BLOCK_D)
    exists = query < queries
    inside = exists[:, None] & (columns < HEAD_DIM)[None, :]
    place = (first_query + query) * (KV_HEADS * GROUP) + kv_head * GROUP + row % GROUP  # among [total, heads]
    where = place.to(tl.int64)[:, None] * HEAD_DIM + columns[None, :]

    # The keys that this tile sees, and this program's share of them.
    position = length - queries + query
    last_query = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, queries - 1)
    end = length - queries + last_query + 1
    first = 0
    if WINDOW:
        first = tl.maximum(length - queries + tile * BLOCK_M // GROUP - window + 1, 0)
        if SINKS:
            first = tl.maximum(first, sinks)
    begin = first // BLOCK_N * BLOCK_N
    share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), splits), BLOCK_N) * BLOCK_N
    begin += split * share
    sink_end = 0
    if SINKS:
        sink_end = tl.where(split == 0, tl.minimum(sinks, end), 0)
    end = tl.minimum(begin + share, end)
    table = tables + tl.load(rows + sequence).to(tl.int64) * table_stride
    page = _pages_at(table, begin, first, end, PAGE, BLOCK_N)
    wait_for_the_kernel_before(EARLY and SETTLED)
    if SPLIT:
        if (begin >= end) & (sink_end == 0):  # nothing to see here: only the merge must know
            tl.store(Lse + split.to(tl.int64) * total_rows + place, float("-inf"), mask=exists)
            return

    K += kv_head * (PAGE * HEAD_DIM)
    V += kv_head * (PAGE * HEAD_DIM)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], -1.0e30, tl.float32)  # finite: a row that sees nothing must not compute -inf minus -inf
    if SINKS:
        q = tl.load(QSink + where, mask=inside, other=0.0)
        acc, total, peak = _attend(
            acc, total, peak, q, K, V, table, _pages_at(table, 0, 0, sink_end, PAGE, BLOCK_N), 0, sink_end, 0, position,
            window, page_stride, qk_scale, HEAD_DIM, PAGE, BLOCK_D, BLOCK_N, False, PRECISION,
        )  # fmt: skip
    q = tl.load(Q + where, mask=inside, other=0.0)
    acc, total, peak = _attend(
        acc, total, peak, q, K, V, table, page, begin, end, first, position, window, page_stride, qk_scale,
        HEAD_DIM, PAGE, BLOCK_D, BLOCK_N, WINDOW, PRECISION,
    )  # fmt: skip

    seen = total > 0
    total = tl.where(seen, total, 1.0)
    out = acc / total[:, None]
    if SPLIT:
        lse = tl.where(seen, (peak * qk_scale + tl.log2(total)) * LN_2, float("-inf"))
        at = split.to(tl.int64) * total_rows + place
        tl.store(Partial + at[:, None] * HEAD_DIM + columns[None, :], out, mask=inside)
        tl.store(Lse + at, lse, mask=exists)
    else:
        tl.store(Out + where, out.to(Out.dtype.element_ty), mask=inside)
    let_the_next_start(EARLY)  # not before: its programs would take room from ours that are still to begin


@triton.jit
def _pages_at(table, begin, first, end, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The pages of the tile of keys that starts at `begin`."""
    key = begin + tl.arange(0, BLOCK_N)
    return tl.load(table + key // PAGE, mask=_between(key, first, end), other=0)


@triton.jit
def _attend(
    acc, total, peak, q, K, V, table, page, begin, end, first, position, window, page_stride, qk_scale,
    HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to keys begin..end of one key head, those before `first` left out, with the online softmax.

    `page` are the pages of the first tile. Those of the next one are always looked up one tile ahead, so that the
    copies of its keys need not wait for them.
    """
    offsets = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        key = start + offsets
        held = _between(key, first, end)
        where = page.to(tl.int64) * page_stride + key % PAGE * HEAD_DIM
        inside = held[:, None]
        if BLOCK_D != HEAD_DIM:
            inside = inside & (columns < HEAD_DIM)[None, :]
        k = tl.load(K + where[:, None] + columns[None, :], mask=inside, other=0.0)
        page = _pages_at(table, start + BLOCK_N, first, end, PAGE, BLOCK_N)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        keep = held[None, :] & (key[None, :] <= position[:, None])
        if WINDOW:
            keep = keep & (key[None, :] > position[:, None] - window)
        scores = tl.where(keep, scores, float("-inf"))
        # The maximum is taken of raw scores: scaling them is part of the fused multiply-add under exp2.
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores * qk_scale - (new_peak * qk_scale)[:, None])
        rescale = tl.exp2((peak - new_peak) * qk_scale)
        total = total * rescale + tl.sum(weights, 1)
        v = tl.load(V + where[:, None] + columns[None, :], mask=inside, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        peak = new_peak
    return acc, total, peak


@triton.jit
def _between(key, first, end):
    return (key >= first) & (key < end)


@triton.jit(do_not_specialize=["splits", "total_rows"])
def merge_pages_kernel(
    Out, Partial, Lse, splits, total_rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Output of one row from its partial ones: sum of e^(lse_i - lse) out_i, always in the same order. Grid: rows.

    An empty share has lse -inf, and its partial output was never written: it is not read.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_S)
    columns = tl.arange(0, BLOCK_D)
    at = split.to(tl.int64) * total_rows + row
    after_the_kernel_before(EARLY)
    lse = tl.load(Lse + at, mask=split < splits, other=float("-inf"))
    peak = tl.max(lse, 0)
    share = tl.exp(lse - tl.where(peak > float("-inf"), peak, 0.0))
    inside = (share > 0)[:, None] & (columns < HEAD_DIM)[None, :]
    partial = tl.load(Partial + at[:, None] * HEAD_DIM + columns[None, :], mask=inside, other=0.0)
    total = tl.sum(share, 0)
    out = tl.sum(partial * share[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(Out + row * HEAD_DIM + columns, out.to(Out.dtype.element_ty), mask=columns < HEAD_DIM)


@triton.jit(do_not_specialize=["sink_limit"], do_not_specialize_on_alignment=_ANYWHERE)
def write_kernel(
    Q, K, V, QOut, QSink, KPages, VPages, Cos, Sin,
    slots, positions, q_stride, k_stride, v_stride, page_stride, sink_limit,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_HALF: tl.constexpr,
    ROTARY: tl.constexpr, SINKS: tl.constexpr, EARLY: tl.constexpr, SETTLED: tl.constexpr,
):  # fmt: skip
    """Write the key and value of one token into its page; with ROTARY rotate key and queries first. Grid: tokens.

    `slots` [tokens] is page * PAGE + place in the page, below 0 for a token to leave out. Cos and Sin are
    [positions, HEAD_DIM / 2]. With SINKS the queries are also rotated to where they stand in a rolling cache: at their
    position, but never beyond `sink_limit`. SETTLED: as in `paged_kernel`.
    """
    after_the_kernel_before(EARLY and not SETTLED)
    token = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, BLOCK_HALF)
    slot = tl.load(slots + token)
    head = tl.arange(0, BLOCK_KV)
    inside = (head < KV_HEADS)[:, None] & (half < HEAD_DIM // 2)[None, :]
    low = head[:, None] * HEAD_DIM + half[None, :]
    if ROTARY:
        position = tl.load(positions + token)
    after_the_kernel_before(EARLY and SETTLED)
    k_low = tl.load(K + token * k_stride + low, mask=inside, other=0.0)
    k_high = tl.load(K + token * k_stride + low + HEAD_DIM // 2, mask=inside, other=0.0)
    v_low = tl.load(V + token * v_stride + low, mask=inside, other=0.0)
    v_high = tl.load(V + token * v_stride + low + HEAD_DIM // 2, mask=inside, other=0.0)
    if ROTARY:
        cos, sin = _angles(Cos, Sin, position, half, HEAD_DIM)
        k_low, k_high = _rotate(k_low, k_high, cos, sin)
        heads = tl.arange(0, BLOCK_H)
        q_inside = (heads < HEADS)[:, None] & (half < HEAD_DIM // 2)[None, :]
        q_place = heads[:, None] * HEAD_DIM + half[None, :]
        q_low = tl.load(Q + token * q_stride + q_place, mask=q_inside, other=0.0)
        q_high = tl.load(Q + token * q_stride + q_place + HEAD_DIM // 2, mask=q_inside, other=0.0)
        at = token * (HEADS * HEAD_DIM) + q_place
        low_out, high_out = _rotate(q_low, q_high, cos, sin)
        tl.store(QOut + at, low_out, mask=q_inside)
        tl.store(QOut + at + HEAD_DIM // 2, high_out, mask=q_inside)
        if SINKS:
            cos, sin = _angles(Cos, Sin, tl.minimum(position, sink_limit), half, HEAD_DIM)
            low_out, high_out = _rotate(q_low, q_high, cos, sin)
            tl.store(QSink + at, low_out, mask=q_inside)
            tl.store(QSink + at + HEAD_DIM // 2, high_out, mask=q_inside)
    inside = (head < tl.where(slot >= 0, KV_HEADS, 0))[:, None] & (half < HEAD_DIM // 2)[None, :]
    page = slot.to(tl.int64) // PAGE * page_stride + slot % PAGE * HEAD_DIM
    place = page + head[:, None] * (PAGE * HEAD_DIM) + half[None, :]
    tl.store(KPages + place, k_low, mask=inside)
    tl.store(KPages + place + HEAD_DIM // 2, k_high, mask=inside)
    tl.store(VPages + place, v_low, mask=inside)
    tl.store(VPages + place + HEAD_DIM // 2, v_high, mask=inside)


@triton.jit
def _angles(Cos, Sin, position, half, HEAD_DIM: tl.constexpr):
    at = position.to(tl.int64) * (HEAD_DIM // 2) + half
    inside = half < HEAD_DIM // 2
    cos = tl.load(Cos + at, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(Sin + at, mask=inside, other=0.0).to(tl.float32)
    return cos[None, :], sin[None, :]


@triton.jit
def _rotate(low, high, cos, sin):
    """Rotary embedding of the two halves of a head (Su et al. 2021, in the layout of Llama)."""
    x, y = low.to(tl.float32), high.to(tl.float32)
    return (x * cos - y * sin).to(low.dtype), (y * cos + x * sin).to(low.dtype)
