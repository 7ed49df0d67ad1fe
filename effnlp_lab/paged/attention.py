"""Paged attention and the writing of pages: what starts the kernels. On the CPU they run in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import triton
from torch import Tensor

from effnlp_lab.attention import configurations, inputs
from effnlp_lab.attention.configurations import Tile
from effnlp_lab.attention.kernels_common import LOG2_E
from effnlp_lab.early_start import early_options
from effnlp_lab.paged import tiles
from effnlp_lab.paged.cache import check_page_size
from effnlp_lab.paged.kernels import merge_pages_kernel, paged_kernel, write_kernel
from effnlp_lab.paged.kernels_layer import gate_kernel, greedy_kernel, norm_kernel


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    *,
    rows: Tensor | None = None,
    starts: Tensor | None = None,
    most_queries: int | None = None,
    longest: int | None = None,
    window: int | None = None,
    sinks: int = 0,
    q_sink: Tensor | None = None,
    scale: float | None = None,
    splits: int | None = None,
    ragged: bool = False,
    settled: bool = False,
) -> Tensor:
    """Causal attention of the newest queries over pages, like q; see `gathered_attention`, which is its definition.

    q is [batch, queries, heads, head_dim], or [total, heads, head_dim] for sequences with different numbers of queries
    laid end to end: then sequence i has queries starts[i] to starts[i + 1] (int32, [batch + 1]), at most `most_queries`
    of them. k_pages and v_pages are [pages, kv_heads, page_size, head_dim] in q's dtype, bfloat16, float16 or float32;
    page_size is a power of two from 16, head_dim a multiple of 8 from 16 to 256. block_tables is int32
    [any, columns], of which sequence i uses row rows[i] (row i where `rows` is None); lengths int32 [batch] counts the
    keys, the queries' own included. Nothing of it is read on the host: `longest`, a bound on the lengths, is taken from
    the block tables' width unless given. Few rows, queries times query heads a key head, are split over the keys in
    `splits` shares, chosen from the number of multiprocessors and `longest`, and for `ragged` lengths in more.
    settled: what is int32 was not written by the kernel just before, so that it may be read while that one ends.

    Raises ValueError or TypeError, with what to do, for tensors that do not fit.
    """
    if q.ndim == 4:
        batch, queries = q.shape[:2]
        starts = _arange(batch + 1, q.device) * queries
        most_queries, shape, q = queries, q.shape, q.flatten(0, 1)
        q_sink = None if q_sink is None else q_sink.flatten(0, 1)
    elif q.ndim == 3 and starts is not None and most_queries is not None:
        shape = q.shape
    else:
        raise ValueError(
            "q must be [batch, queries, heads, head_dim], or [total, heads, head_dim] with starts and most_queries."
        )
    _check(q, k_pages, v_pages, block_tables, lengths, starts, rows, window, sinks)
    total, heads, head_dim = q.shape
    batch, kv_heads, page_size = lengths.shape[0], k_pages.shape[1], k_pages.shape[2]
    q, out = q.contiguous(), torch.empty_like(q, memory_format=torch.contiguous_format)
    if total == 0:
        return out.view(shape)
    if sinks and q_sink is None:
        q_sink = q
    group = heads // kv_heads
    block_d = configurations.block_d_for(head_dim)
    decode, prompt = tiles.tiles_for(q.device, q.dtype, block_d)
    few = most_queries * group <= decode.queries
    tile = _rows(decode, most_queries * group) if few else prompt
    row_tiles = triton.cdiv(most_queries * group, tile.queries)
    if splits is None:
        longest = block_tables.shape[1] * page_size if longest is None else longest
        longest = longest if window is None else min(longest, window + most_queries)
        kind = "prompt" if not few else "ragged" if ragged else "equal"
        splits = tiles.choose_splits(batch * kv_heads * row_tiles, longest, tile.keys, q.device, kind)
    partial = lse = None
    if splits > 1:
        partial = torch.empty(splits, total * heads, head_dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(splits, total * heads, dtype=torch.float32, device=q.device)
    _start(
        paged_kernel, (row_tiles * splits, kv_heads, batch), tile, q, None if q_sink is None else q_sink.contiguous(),
        k_pages, v_pages, out, partial, lse, block_tables, _arange(batch, q.device) if rows is None else rows, lengths,
        starts, block_tables.stride(0), k_pages.stride(0), row_tiles, splits, total * heads, window or 0,
        sinks if window else 0, inputs.check_scale(scale, head_dim) * LOG2_E.value, KV_HEADS=kv_heads, GROUP=group,
        HEAD_DIM=head_dim, PAGE=page_size, BLOCK_D=block_d, BLOCK_M=tile.queries, BLOCK_N=tile.keys, SPLIT=splits > 1,
        WINDOW=window is not None, SINKS=q_sink is not None, PRECISION=configurations.precision_for(q.dtype),
        SETTLED=settled,
    )  # fmt: skip
    if splits > 1:
        _start(
            merge_pages_kernel, (total * heads,), tiles.merging(splits, block_d), out, partial, lse, splits,
            total * heads, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_S=triton.next_power_of_2(splits),
        )  # fmt: skip
    return out.view(shape)


def write_pages(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """Write keys and values [tokens, kv_heads, head_dim] into pages, in place.

    slots [tokens], int32 or int64, is page * page_size + place in the page; tokens with a slot below 0 are left out.
    """
    _write(None, k, v, k_pages, v_pages, slots, None, None, None, None, False)


def rotate_and_write(
    q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor, positions: Tensor, cos: Tensor,
    sin: Tensor, sink_limit: int | None = None, settled: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Rotate queries and keys to their positions, and write keys and values into pages, in one kernel.

    q is [tokens, heads, head_dim], positions [tokens], cos and sin [positions, head_dim / 2]. Returns the rotated
    queries, and with `sink_limit` those rotated to min(position, sink_limit), for seeing attention sinks. settled: the
    slots and positions were not written by the kernel just before.
    """
    return _write(q, k, v, k_pages, v_pages, slots, positions, cos, sin, sink_limit, settled)


def _write(q, k, v, k_pages, v_pages, slots, positions, cos, sin, sink_limit, settled):
    tokens, kv_heads, head_dim = k.shape
    heads = kv_heads if q is None else q.shape[1]
    q_out = None if q is None else torch.empty(tokens, heads, head_dim, dtype=q.dtype, device=q.device)
    q_sink = None if sink_limit is None else torch.empty_like(q_out)
    q, k, v = (x if x is None or _rows_whole(x) else x.contiguous() for x in (q, k, v))
    if tokens:
        _start(
            write_kernel, (tokens,), Tile(0, 0, 4, 1), q, k, v, q_out, q_sink, k_pages, v_pages, cos, sin, slots,
            positions, 0 if q is None else q.stride(0), k.stride(0), v.stride(0), k_pages.stride(0), sink_limit or 0,
            HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, PAGE=k_pages.shape[2],
            BLOCK_H=triton.next_power_of_2(heads), BLOCK_KV=triton.next_power_of_2(kv_heads),
            BLOCK_HALF=triton.next_power_of_2(head_dim // 2), ROTARY=q is not None, SINKS=q_sink is not None,
            SETTLED=settled,
        )  # fmt: skip
    return q_out, q_sink


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """RMSNorm of rows [rows, columns]; with a residual of x + residual, which is written into `residual`."""
    out = torch.empty_like(x)
    if x.shape[0]:
        _start(
            norm_kernel, (x.shape[0],), Tile(0, 0, tiles.NORM_WARPS, 1), x, residual, weight, out, x.shape[1], eps,
            BLOCK=triton.next_power_of_2(x.shape[1]), ADD=residual is not None,
        )  # fmt: skip
    return out


def silu_and_multiply(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both [rows, columns] with contiguous rows."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.shape[0]:
        grid = gate.shape[0], triton.cdiv(gate.shape[1], tiles.GATE_BLOCK)
        _start(
            gate_kernel, grid, Tile(0, 0, 4, 1), gate, up, out, gate.shape[1], gate.stride(0), up.stride(0),
            BLOCK=tiles.GATE_BLOCK,
        )  # fmt: skip
    return out


def greedy(logits: Tensor, newest: Tensor, slots: Tensor) -> Tensor:
    """The token [rows], int64, with the largest logit of each row of [rows, vocabulary], the first of several.

    It becomes the newest token of the row's slot: newest[slots[i]] is written too.
    """
    out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    if len(out):
        _start(
            greedy_kernel, (len(out),), Tile(0, 0, tiles.GREEDY_WARPS, 1), logits, out, newest, slots, logits.shape[1],
            logits.stride(0), BLOCK=tiles.GREEDY_BLOCK,
        )  # fmt: skip
    return out


def _start(kernel: Callable, grid: tuple[int, ...], tile: Tile, *arguments, **constants) -> None:
    """Start a kernel on the device of its tensors."""
    device = next(x.device for x in arguments if isinstance(x, Tensor))
    if device.type != "cuda":
        kernel[grid](*arguments, **constants, EARLY=False)
        return
    constants |= early_options(configurations.architecture(configurations.capability_of(device)))
    elsewhere = device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[grid](*arguments, **constants, num_warps=tile.warps, num_stages=tile.stages)


def _rows(tile: Tile, rows: int) -> Tile:
    """A tile of as few rows as hold these."""
    return Tile(max(16, triton.next_power_of_2(rows)), tile.keys, tile.warps, tile.stages)


def _arange(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=device)


def _rows_whole(x: Tensor) -> bool:
    """Whether each token's heads lie one after the other; tokens may be apart."""
    return x.stride(2) == 1 and x.stride(1) == x.shape[2]


def _check(q, k_pages, v_pages, block_tables, lengths, starts, rows, window, sinks) -> None:
    """Refuse what does not fit, looking at shapes alone."""
    inputs.check_device(q.device, q.dtype)
    inputs.check_head_dim(q.shape[-1])
    inputs.check_masks(True, window, 0)
    if k_pages.ndim != 4 or k_pages.shape != v_pages.shape or k_pages.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"k_pages and v_pages must both be [pages, kv_heads, page_size, {q.shape[-1]}]; they are "
            f"{tuple(k_pages.shape)} and {tuple(v_pages.shape)}."
        )
    if not q.dtype == k_pages.dtype == v_pages.dtype or q.dtype not in inputs.DTYPES:
        raise TypeError(f"q and the pages must share bfloat16, float16 or float32, not {q.dtype} and {k_pages.dtype}.")
    if not k_pages[0].is_contiguous() or not v_pages[0].is_contiguous() or k_pages.stride() != v_pages.stride():
        raise ValueError("Pages must be contiguous [kv_heads, page_size, head_dim], alike for keys and values.")
    check_page_size(k_pages.shape[2])
    inputs.check_heads(q.shape[1], k_pages.shape[1])
    for name, x in (("block_tables", block_tables), ("lengths", lengths), ("starts", starts), ("rows", rows)):
        if x is not None and (x.dtype != torch.int32 or x.device != q.device or x.stride(-1) != 1):
            raise TypeError(f"{name} must be int32 on {q.device}, contiguous; it is {x.dtype} on {x.device}.")
    if block_tables.ndim != 2 or lengths.ndim != 1 or starts.shape[0] != lengths.shape[0] + 1:
        raise ValueError("block_tables must be [any, columns], lengths [batch] and starts [batch + 1].")
    if rows is None and block_tables.shape[0] < lengths.shape[0] or rows is not None and rows.shape != lengths.shape:
        raise ValueError(f"{lengths.shape[0]} sequences need as many rows of the block tables.")
    if sinks < 0 or sinks and window is None:
        raise ValueError(f"sinks is {sinks}: it counts keys seen beside a window, so give a window and 0 or more.")
