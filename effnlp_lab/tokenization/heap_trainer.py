"""Byte-pair encoding trained incrementally: the production algorithm, in plain Python.

The definition (`plain.train`) recounts every pair for every merge. But a merge changes the words that hold its pair and
no others, so we keep an index from pairs to words, correct the counts for those words alone, and keep the pairs in a
heap. A count in the heap may be stale: it is corrected when it comes to the top (lazy deletion), which is safe because
the count of an existing pair only ever falls: pairs that gain occurrences hold the new token.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence

from effnlp_lab.tokenization.plain import Pair


def train_heap(
    words: Sequence[Sequence[int]], counts: Sequence[int], vocab_size: int, ties: str = "smallest", first_id: int = 256
) -> list[Pair]:
    """The same merges in the same order as `plain.train(words, counts, vocab_size, ties, first_id)`."""
    words = [list(word) for word in words]
    sign = 1 if ties == "smallest" else -1  # the heap pops the smallest key, so "largest" negates the ids
    pairs: dict[Pair, int] = defaultdict(int)
    holders: dict[Pair, set[int]] = defaultdict(set)
    for number, (word, count) in enumerate(zip(words, counts, strict=True)):
        for pair in zip(word, word[1:], strict=False):
            pairs[pair] += count
            holders[pair].add(number)
    heap = [(-count, sign * left, sign * right) for (left, right), count in pairs.items()]
    heapq.heapify(heap)

    merges: list[Pair] = []
    while heap and first_id + len(merges) < vocab_size:
        negative, left, right = heapq.heappop(heap)
        pair = (sign * left, sign * right)
        if pairs[pair] != -negative:
            if pairs[pair] > 0:
                heapq.heappush(heap, (-pairs[pair], left, right))
            continue
        if negative >= 0:
            break
        new_id = first_id + len(merges)
        merges.append(pair)
        grown: set[Pair] = set()
        for number in holders.pop(pair):
            _merge_in_place(words[number], pair, new_id, counts[number], number, pairs, holders, grown)
        del pairs[pair]
        for other in grown:
            if pairs[other] > 0:
                heapq.heappush(heap, (-pairs[other], sign * other[0], sign * other[1]))
    return merges


def _merge_in_place(
    word: list[int], pair: Pair, new_id: int, count: int, number: int, pairs: dict, holders: dict, grown: set
) -> None:
    """Merge `pair` in one word, and correct the counts of the neighbours that the merge breaks and makes."""
    left, right = pair
    position, last = 0, len(word) - 1
    while position < last:
        if word[position] != left or word[position + 1] != right:
            position += 1
            continue
        word[position : position + 2] = [new_id]
        last -= 1
        if position > 0:
            before = word[position - 1]
            pairs[before, left] -= count
            made = (before, new_id)
            pairs[made] += count
            holders[made].add(number)
            grown.add(made)
        if position < last:
            after = word[position + 1]
            pairs[right, after] -= count
            made = (new_id, after)
            pairs[made] += count
            holders[made].add(number)
            grown.add(made)
        position += 1
