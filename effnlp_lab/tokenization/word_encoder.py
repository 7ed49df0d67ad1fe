"""Encoding one word: of the merges that apply, the one that training made first; until none applies."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from effnlp_lab.tokenization.plain import Pair

LONG = 256  # beyond this many symbols a heap beats a scan
NO_RANK = 1 << 60


def encode_word(ids: Sequence[int], rank: Mapping[Pair, int], merged: Sequence[int]) -> list[int]:
    """The tokens of one word. `rank[pair]` is the merge that joins a pair, `merged[rank]` the token it makes.

    Equal to `plain.encode`: a merge's new pairs all have later ranks, so that one occurrence at a time, leftmost first,
    is the same as all occurrences at once.
    """
    if len(ids) > LONG:
        return _encode_long(ids, rank, merged)
    ids = list(ids)
    ranks = [rank.get(pair, NO_RANK) for pair in zip(ids, ids[1:], strict=False)]
    while ranks:
        best = min(ranks)
        if best == NO_RANK:
            break
        at = ranks.index(best)
        ids[at : at + 2] = [merged[best]]
        del ranks[at]
        if at > 0:
            ranks[at - 1] = rank.get((ids[at - 1], ids[at]), NO_RANK)
        if at < len(ranks):
            ranks[at] = rank.get((ids[at], ids[at + 1]), NO_RANK)
    return ids


def _encode_long(ids: Sequence[int], rank: Mapping[Pair, int], merged: Sequence[int]) -> list[int]:
    """The same in O(n log n): the pairs wait in a heap by rank and position, the tokens form a linked list."""
    ids, end = list(ids), len(ids)
    following, previous = list(range(1, end + 1)), list(range(-1, end - 1))
    heap = [(rank[pair], at) for at, pair in enumerate(zip(ids, ids[1:], strict=False)) if pair in rank]
    heapq.heapify(heap)
    while heap:
        best, at = heapq.heappop(heap)
        after = following[at]
        if ids[at] < 0 or after == end or rank.get((ids[at], ids[after])) != best:
            continue  # one of its halves was merged since
        ids[at], ids[after] = merged[best], -1
        following[at] = following[after]
        if following[at] < end:
            previous[following[at]] = at
        for start in (previous[at], at):
            stop = following[start] if start >= 0 else end
            if stop < end and (ids[start], ids[stop]) in rank:
                heapq.heappush(heap, (rank[ids[start], ids[stop]], start))
    return [token for token in ids if token >= 0]
