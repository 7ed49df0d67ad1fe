"""Byte-pair encoding as the papers define it, with nothing made fast: the definition that the rest of this room equals.

Sennrich, Haddow and Birch (2016), algorithm 1, on bytes instead of characters (Radford et al., 2019). A *word* is one
pre-token: merges never cross its edges. Ids 0..255 are the bytes (in which order is `alphabet.py`'s business) and
merge number m makes id 256 + m, so that a lower id is an earlier merge.
"""

from __future__ import annotations

from collections.abc import Sequence

Pair = tuple[int, int]


def count_pairs(words: Sequence[Sequence[int]], counts: Sequence[int]) -> dict[Pair, int]:
    """How often each pair of neighbours occurs: word w counts `counts[w]` times.

    Occurrences overlap: (1, 1) occurs twice in [1, 1, 1]. A pair that occurs nowhere is not in the answer.
    """
    pairs: dict[Pair, int] = {}
    for word, count in zip(words, counts, strict=True):
        for pair in zip(word, word[1:], strict=False):
            pairs[pair] = pairs.get(pair, 0) + count
    return pairs


def merge(word: Sequence[int], pair: Pair, new_id: int) -> list[int]:
    """`word` with each occurrence of `pair` replaced by `new_id`, from left to right; occurrences do not overlap.

    merge([1, 1, 1], (1, 1), 9) is [9, 1].
    """
    merged: list[int] = []
    position = 0
    while position < len(word):
        if position + 1 < len(word) and (word[position], word[position + 1]) == tuple(pair):
            merged.append(new_id)
            position += 2
        else:
            merged.append(word[position])
            position += 1
    return merged


def best_pair(pairs: dict[Pair, int], ties: str = "smallest") -> Pair:
    """The pair with the highest count; among equals the smallest (or the largest) pair of ids, compared as tuples."""
    highest = max(pairs.values())
    tied = (pair for pair, count in pairs.items() if count == highest)
    return min(tied) if ties == "smallest" else max(tied)


def train(
    words: Sequence[Sequence[int]], counts: Sequence[int], vocab_size: int, ties: str = "smallest", first_id: int = 256
) -> list[Pair]:
    """The merges, in order: count all pairs, merge the most frequent one everywhere, and again.

    Ends with `vocab_size - first_id` merges, or earlier when no pair is left.
    """
    words = [list(word) for word in words]
    merges: list[Pair] = []
    while first_id + len(merges) < vocab_size:
        pairs = {pair: count for pair, count in count_pairs(words, counts).items() if count > 0}
        if not pairs:
            break
        pair = best_pair(pairs, ties)
        words = [merge(word, pair, first_id + len(merges)) for word in words]
        merges.append(pair)
    return merges


def encode(word: Sequence[int], merges: Sequence[Pair], first_id: int = 256) -> list[int]:
    """One word as token ids: of the pairs present, merge the one that training merged first; until none is left."""
    rank = {pair: number for number, pair in enumerate(merges)}
    word = list(word)
    while len(word) > 1:
        pair = min(zip(word, word[1:], strict=False), key=lambda pair: rank.get(pair, len(rank)))
        if pair not in rank:
            break
        word = merge(word, pair, first_id + rank[pair])
    return word


def vocabulary(merges: Sequence[Pair], alphabet: Sequence[bytes]) -> list[bytes]:
    """The bytes of every token: `alphabet[id]` for the first ids, then for each merge its two halves joined."""
    tokens = list(alphabet)
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return tokens


def decode(ids: Sequence[int], tokens: Sequence[bytes]) -> str:
    """Text of `ids`. The bytes are joined first: a character may span tokens; what is not UTF-8 becomes U+FFFD."""
    return b"".join(tokens[i] for i in ids).decode("utf-8", errors="replace")
