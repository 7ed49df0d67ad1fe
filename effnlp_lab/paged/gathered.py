"""Paged attention by its definition: gather the pages of each sequence, then attend as usual.

It copies the whole cache of every sequence, and works in any floating dtype: float64 makes it the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gathered_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    *,
    window: int | None = None,
    sinks: int = 0,
    q_sink: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention of the newest queries over pages, [batch, queries, heads, head_dim] like q.

    k_pages and v_pages are [pages, kv_heads, page_size, head_dim]; block_tables [batch, columns] names the page of
    tokens 0 to page_size - 1 of each sequence, then of the next, and so on; lengths [batch] counts the tokens that are
    in the pages, the queries' own included: the last query stands beside the last of them. Query head h reads key head
    h // (heads // kv_heads). `window` W shows W keys, the query's own position included, and `sinks` S also the first S
    keys. Sinks may be seen from another position than the rest: then q_sink holds the queries rotated for them (see
    sinks.py). Pages outside lengths and window are not used, whatever the block table says there.
    """
    batch, queries, heads, head_dim = q.shape
    k, v = _gather(k_pages, block_tables), _gather(v_pages, block_tables)
    key = torch.arange(k.shape[2], device=q.device)
    position = (lengths[:, None] - queries + torch.arange(queries, device=q.device))[..., None]  # [batch, queries, 1]
    keep = key <= position
    if window is not None:
        keep &= (key > position - window) | (key < sinks)
    v = v.masked_fill(~keep.any(1)[:, None, :, None], 0.0)  # weights of zero do not hide what is not a number
    scores = _scores(q, k)
    if q_sink is not None:
        scores = torch.where(key < sinks, _scores(q_sink, k), scores)
    scale = head_dim**-0.5 if scale is None else scale
    scores = (scores * scale).masked_fill(~keep[:, None, None], float("-inf"))
    sees = keep.any(-1)[:, None, None, :, None]
    weights = scores.masked_fill(~sees, 0.0).softmax(-1).masked_fill(~sees, 0.0)
    return torch.einsum("bhgqk,bhkd->bqhgd", weights, v).reshape(batch, queries, heads, head_dim)


def gathered_attention_varlen(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_tables: Tensor, lengths: Tensor, starts: Tensor, **masks
) -> Tensor:
    """The same for sequences with different numbers of queries laid end to end: q is [total, heads, head_dim].

    Sequence i has queries starts[i] to starts[i + 1]. `masks` as for `gathered_attention`, with q_sink like q.
    """
    edges, page_size, q_sink = starts.tolist(), k_pages.shape[2], masks.pop("q_sink", None)
    out = torch.empty_like(q)
    for i, (first, end, length) in enumerate(zip(edges[:-1], edges[1:], lengths.tolist(), strict=True)):
        mine, table = slice(first, end), block_tables[i : i + 1, : -(-length // page_size)]
        sink = None if q_sink is None else q_sink[None, mine]
        out[mine] = gathered_attention(
            q[None, mine], k_pages, v_pages, table, lengths[i : i + 1], q_sink=sink, **masks
        )[0]  # fmt: skip
    return out


def _gather(pages: Tensor, block_tables: Tensor) -> Tensor:
    """[batch, kv_heads, columns * page_size, head_dim]. Columns without a page get any page."""
    found = pages[block_tables.clamp(0, pages.shape[0] - 1).long()]  # [batch, columns, kv_heads, page_size, head_dim]
    return found.transpose(1, 2).flatten(2, 3)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """[batch, kv_heads, group, queries, keys]; heads group by division."""
    return torch.einsum("bqhgd,bhkd->bhgqk", q.unflatten(2, (k.shape[1], -1)), k)
