"""Byte-pair encoding trained on the whole corpus by tensor operations, on the CPU or a GPU: many merges at a time.

The definition makes one merge, then looks again. Take the pairs in the order in which they would be merged were they
independent (highest count first, then the smallest ids). The longest prefix in which no two occurrences overlap in the
corpus can be merged at once, and gives exactly the merges that one at a time would give:

- no occurrence of one pair of the prefix overlaps one of another, so none of their counts changes on the way;
- a pair that comes to be, such as (new token, y), occurs at most as often as the pair (right half, y) that it replaces.
  That pair is not in the prefix (it overlaps one that is), so it ranks after all of it, and so does the new pair: at an
  equal count its ids are larger, because a new id is larger than all before it.

(With ties going to the largest ids the last step fails at equal counts, so there a batch ends where the count drops.)

32,512 merges take some 800 batches. As in `heap_trainer`, only what changes is touched: the occurrences of a pair are
all made in one batch and only disappear after it, so that they lie side by side in one array, the index, and a stale
entry is one whose position no longer begins that pair. A doubly linked list joins the tokens that are left.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from effnlp_lab.tokenization.plain import Pair
from effnlp_lab.tokenization.tensor_words import one_thread, spans

POOL = 4096  # pairs held ready; the rest wait below a threshold until these are used up
NO_RANK = 1 << 30


def train_tensor(
    flat: Tensor,
    lengths: Tensor,
    counts: Tensor,
    vocab_size: int,
    ties: str = "smallest",
    first_id: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> list[Pair]:
    """The same merges in the same order as `plain.train`, for words given as tensors on the device to work on.

    flat: integers [symbols], all words one after another; lengths: int64 [words], each at least 1; counts: int64
    [words]. `progress` is called with (merges so far, merges wanted) after each batch.
    """
    wanted = max(vocab_size - first_id, 0)
    if len(flat) == 0 or wanted == 0:
        return []
    with one_thread(flat.device):
        return _train(_Corpus(flat, lengths, counts), wanted, ties, first_id, progress)


def _train(corpus: _Corpus, wanted: int, ties: str, first_id: int, progress) -> list[Pair]:
    ranking = _Ranking(corpus, ties)
    batches: list[Tensor] = []
    made, width = 0, 16
    while made < wanted:
        candidates, counted, below = ranking.top(min(width, wanted - made))
        if len(candidates) == 0:
            break
        position, rank = corpus.occurrences(candidates)
        size = corpus.independent(position, rank, len(candidates))
        if ties == "largest":
            size = _whole_groups(counted, below, size)
        chosen = candidates[: max(size, 1)]
        kept = rank < len(chosen)
        position, rank = position[kept], rank[kept]
        if size == 0:
            position, rank = corpus.without_overlaps(position, rank)
        ranking.add(corpus.merge(chosen, position, first_id + made + rank))
        batches.append(torch.stack([corpus.left[chosen], corpus.right[chosen]], 1))
        made += len(chosen)
        width = max(16, min(1024, 2 * len(chosen) + 8))
        if progress:
            progress(made, wanted)
    return [tuple(pair) for pair in torch.cat(batches).tolist()] if batches else []


def _whole_groups(counted: Tensor, below: int, size: int) -> int:
    """The longest part of the first `size` candidates after which the count drops; 1 when there is none."""
    following = torch.cat([counted[1:], counted.new_tensor([below])])
    drops = torch.nonzero(counted[:size] > following[:size])
    return int(drops[-1]) + 1 if len(drops) else min(size, 1)


class _Corpus:
    """The words as a linked list of tokens, their pairs, and the index from pairs to positions.

    Per position: token, next, previous (`end` where there is none), weight (the count of its word) and pair (the number
    of the pair that begins here, -1 for none). Per pair: left and right token, count, and its slice of `index`.
    """

    def __init__(self, flat: Tensor, lengths: Tensor, counts: Tensor) -> None:
        self.end = end = len(flat)
        self.device = device = flat.device
        extra = torch.zeros(1, dtype=torch.int64, device=device)
        self.token = torch.cat([flat.long(), extra - 1])
        self.next = torch.arange(1, end + 2, device=device)
        self.previous = torch.arange(-1, end, device=device)
        last = torch.cumsum(lengths, 0) - 1
        self.next[last] = end
        self.previous[last + 1 - lengths] = end
        self._close()
        self.weight = torch.cat([torch.repeat_interleave(counts.long(), lengths), extra])
        self.pair = torch.full((end + 1,), -1, device=device)
        self.rank = torch.full((end + 1,), NO_RANK, device=device)  # scratch, always left as it was
        self.pairs = self.indexed = 0
        self.left, self.right, self.count, self.begin, self.length = (extra.repeat(1 << 16) for _ in range(5))
        self.index = extra.repeat(2 * end + 1024)
        self._new_pairs(torch.nonzero(self.next[:end] != end).squeeze(1))

    def occurrences(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Where `pairs` begin now: positions, and for each the number of its pair within `pairs`."""
        length = self.length[pairs]
        rank = torch.repeat_interleave(torch.arange(len(pairs), device=self.device), length)
        position = self.index[spans(self.begin[pairs], length)]
        alive = self.pair[position] == pairs[rank]
        return position[alive], rank[alive]

    def independent(self, position: Tensor, rank: Tensor, total: int) -> int:
        """How many of the pairs, from the first, can be merged at once; 0 when the first overlaps itself."""
        self.rank[position] = rank
        following = self.rank[self.next[position]]
        self.rank[position] = NO_RANK
        clash = torch.where(following < NO_RANK, torch.maximum(rank, following), NO_RANK)
        return min(int(clash.min()), total)

    def without_overlaps(self, position: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
        """Of a pair (a, a) in runs of a, every second occurrence from the left."""
        position = torch.sort(position).values
        self.rank[position] = 0
        first = self.rank[self.previous[position]] == NO_RANK
        self.rank[position] = NO_RANK
        number = torch.arange(len(position), device=self.device)
        start = torch.cummax(torch.where(first, number, 0), 0).values
        kept = (number - start) % 2 == 0
        return position[kept], rank[kept]

    def merge(self, chosen: Tensor, left: Tensor, token: Tensor) -> range:
        """Put `token` [occurrences] at the positions `left`, drop the ones after them; the numbers of the new pairs."""
        right = self.next[left]
        after = self.next[right]
        self.rank[right] = 0
        before = self.previous[left]
        before = before[self.rank[before] == NO_RANK]  # else it is another occurrence's right half, counted there
        self.rank[right] = NO_RANK
        broken = torch.cat([before, right])
        broken = broken[self.pair[broken] >= 0]
        self.count.index_add_(0, self.pair[broken], -self.weight[broken])
        self.count[chosen] = 0
        self.token[left] = token
        self.pair[right] = self.pair[left] = -1
        self.next[left], self.previous[after] = after, left
        self._close()
        self.rank[left] = 0
        before = self.previous[left]
        before = before[(self.rank[before] == NO_RANK) & (before != self.end)]
        self.rank[left] = NO_RANK
        return self._new_pairs(torch.cat([left[after != self.end], before]))

    def _close(self) -> None:
        self.next[self.end] = self.previous[self.end] = self.end

    def _new_pairs(self, position: Tensor) -> range:
        """Number, count and index the pairs that begin at `position`; all of them are new."""
        if len(position) == 0:
            return range(self.pairs, self.pairs)
        key, order = torch.sort((self.token[position] << 32) | self.token[self.next[position]], stable=True)
        position = position[order]
        fresh = torch.ones_like(key, dtype=torch.bool)
        fresh[1:] = key[1:] != key[:-1]
        number = torch.cumsum(fresh, 0) - 1
        begin = torch.nonzero(fresh).squeeze(1)
        new = range(self.pairs, self.pairs + len(begin))
        self._reserve(new.stop, self.indexed + len(position))
        span = slice(new.start, new.stop)
        self.left[span], self.right[span] = key[begin] >> 32, key[begin] & 0xFFFFFFFF
        self.count[span] = torch.zeros_like(begin).index_add_(0, number, self.weight[position])
        self.begin[span] = begin + self.indexed
        self.length[span] = torch.diff(begin, append=begin.new_tensor([len(position)]))
        self.index[self.indexed : self.indexed + len(position)] = position
        self.pair[position] = number + new.start
        self.pairs, self.indexed = new.stop, self.indexed + len(position)
        return new

    def _reserve(self, pairs: int, indexed: int) -> None:
        while pairs > len(self.left):
            for name in ("left", "right", "count", "begin", "length"):
                setattr(self, name, torch.cat([getattr(self, name), torch.zeros_like(getattr(self, name))]))
        if indexed > len(self.index):
            self.index = torch.cat([self.index, self.index.new_zeros(max(indexed - len(self.index), self.end // 2))])


class _Ranking:
    """Which pairs are next. Those with a count of at least `threshold` are held in `pool`, all of them."""

    def __init__(self, corpus: _Corpus, ties: str) -> None:
        self.corpus, self.ties = corpus, ties
        self.pool = torch.empty(0, dtype=torch.int64, device=corpus.device)
        self.threshold = 1

    def top(self, width: int) -> tuple[Tensor, Tensor, int]:
        """The first `width` pairs in the order of merging, their counts, and the highest count among the others."""
        corpus = self.corpus
        count = corpus.count[self.pool]
        self.pool, count = self.pool[count >= self.threshold], count[count >= self.threshold]
        if len(self.pool) == 0:
            counts = corpus.count[: corpus.pairs]
            if corpus.pairs:
                self.threshold = max(int(torch.topk(counts, min(POOL, corpus.pairs)).values[-1]), 1)
            self.pool = torch.nonzero(counts >= self.threshold).squeeze(1)
            count = corpus.count[self.pool]
        candidates = self.pool
        if len(candidates) > width + 1:  # one more, to know the count after the last
            enough = count >= torch.topk(count, width + 1).values[-1]
            candidates, count = candidates[enough], count[enough]
        order = torch.argsort((corpus.left[candidates] << 32) | corpus.right[candidates],
                              descending=self.ties == "largest")
        order = order[torch.argsort(count[order], descending=True, stable=True)]
        candidates, count = candidates[order], count[order]
        below = int(count[width]) if len(count) > width else self.threshold - 1
        return candidates[:width], count[:width], below

    def add(self, pairs: range) -> None:
        """Take note of new pairs."""
        if len(pairs):
            new = torch.nonzero(self.corpus.count[pairs.start : pairs.stop] >= self.threshold).squeeze(1)
            self.pool = torch.cat([self.pool, new + pairs.start])
