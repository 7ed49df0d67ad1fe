"""The order of an epoch, and who gets what of it.

`Order` is a pure function of (seed, epoch): every process computes the same one and none sends it to another. `Split`
says which positions of that order a rank delivers at each step. Both know nothing of workers, and the order knows
nothing of ranks: with another number of either, the same items come at the same steps (elastic determinism).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from effnlp_lab.errors import UsageError

REMAINDERS = ("keep", "drop", "repeat")
SMALL = 1 << 16  # items up to which an epoch's order is a table
ROUNDS = 8
GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


def mix64(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 numbers that scatters them: the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draws(key: int, first: int, count: int) -> np.ndarray:
    """Numbers `first` to first + count of the uint64 sequence that `key` begins: SplitMix64 with random access."""
    counter = np.arange(first + 1, first + 1 + count, dtype=np.uint64)
    return mix64(np.uint64(key & MASK) + counter * np.uint64(GOLDEN))


def key_of(*numbers: int) -> int:
    """One 64-bit key from several whole numbers, each in its place: seed, epoch, and what the key is for."""
    key = 0
    for number in numbers:
        key = int(draws(key ^ (number & MASK), 0, 1)[0])
    return key


class Order:
    """The order of `length` items in an epoch: `order.at(positions)` are the items at those positions.

    Up to 65,536 items: all items sorted by a keyed 64-bit hash of their number. Above, nothing is materialised: a
    Feistel network of `ROUNDS` rounds permutes the numbers of as many bits as `length` needs, and a result that is no
    item is permuted again until it is one (cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary finite
    domains", section 3; the network: Luby and Rackoff 1988). Neither depends on the version of any library. Without
    `shuffle`, item i is at position i. Raises UsageError for what is no whole number, and for a negative length or
    epoch.
    """

    def __init__(self, length: int, seed: int = 0, epoch: int = 0, shuffle: bool = True) -> None:
        self.length, self.seed, self.epoch = whole("length", length, 0), whole("seed", seed), whole("epoch", epoch, 0)
        self.shuffle = shuffle
        self._key = key_of(seed, epoch)
        self._table = np.argsort(draws(self._key, 0, length)) if shuffle and length <= SMALL else None
        self._keys = draws(self._key, 0, ROUNDS)

    def __len__(self) -> int:
        return self.length

    def at(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """The items at `positions`, int64 of the same shape. Positions run from 0 to length - 1."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and not (0 <= positions.min() and positions.max() < self.length):
            raise IndexError(f"An epoch of {self.length} items has positions 0 to {self.length - 1}.")
        if not self.shuffle:
            return positions.copy()
        if self._table is not None:
            return self._table[positions]
        return self._walk(positions.astype(np.uint64)).astype(np.int64)

    def _walk(self, x: np.ndarray) -> np.ndarray:
        bits = (self.length - 1).bit_length()
        x = feistel(x, bits, self._keys)
        while (outside := x >= np.uint64(self.length)).any():
            x[outside] = feistel(x[outside], bits, self._keys)
        return x


def feistel(x: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """Permute the uint64 numbers below 2**bits: each round mixes a keyed hash of one half into the other half.

    A round is undone by doing it again, since it leaves the half that it hashes alone: so all of it is a bijection.
    """
    low = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)
    left, right = x >> low, x & low_mask
    for number, key in enumerate(keys):
        if number % 2:
            right = right ^ mix64(left + key) & low_mask
        else:
            left = left ^ mix64(right + key) & high_mask
    return left << low | right


class LengthOrder:
    """An order in which the `group` items of a global batch have about the same length (uniform-length batching).

    Takes the positions of `order` in pools of `pool` groups, sorts each pool by length, cuts it into groups, and
    shuffles the groups of a pool; without `pool`, all of the epoch is one pool. Small pools shuffle better, large
    pools pad less. The sort of one pool is in memory at a time. A last group that is not full stays last. lengths:
    [order.length].
    """

    def __init__(self, order: Order, lengths: Sequence[int], group: int, pool: int | None = None) -> None:
        self.order, self.length = order, order.length
        self.lengths = whole_lengths(lengths)
        self.group, self.pool = whole("group", group, 1), pool and whole("pool", pool, 1)
        if len(self.lengths) != self.length:
            raise UsageError(f"There are {len(self.lengths)} lengths for {self.length} items: expected one for each.")
        self._size = self.group * pool if pool else max(self.length, 1)
        self._pool_items = lru_cache(maxsize=2)(self._sorted_pool)

    def __len__(self) -> int:
        return self.length

    def at(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """The items at `positions`, int64 of the same shape."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and not (0 <= positions.min() and positions.max() < self.length):
            raise IndexError(f"An epoch of {self.length} items has positions 0 to {self.length - 1}.")
        out, pools = np.empty_like(positions), positions // self._size
        for pool in np.unique(pools):
            here = pools == pool
            out[here] = self._pool_items(int(pool))[positions[here] - pool * self._size]
        return out

    def _sorted_pool(self, pool: int) -> np.ndarray:
        first = pool * self._size
        items = self.order.at(np.arange(first, min(first + self._size, self.length)))
        items = items[np.lexsort((items, self.lengths[items]))]
        full = len(items) // self.group
        if not self.order.shuffle or not full:
            return items
        turns = np.argsort(draws(key_of(self.order.seed, self.order.epoch, 1 + pool), 0, full))
        groups = items[: full * self.group].reshape(full, self.group)[turns]
        return np.concatenate([groups.reshape(-1), items[full * self.group :]])


@dataclass(frozen=True)
class Split:
    """Which positions of an epoch a rank delivers at each step.

    Step t takes the next batch_size * ranks positions (the global batch) after `start`, and rank r every `ranks`-th of
    them from the r-th on, as torch's DistributedSampler does. What is left at the end of the epoch, by `remainder`:

    - "keep": it is dealt out in the same way. Nothing is lost and nothing comes twice; the last batch is short, and
      some ranks may have one item less, or no last batch at all.
    - "drop": it waits for another epoch, and every batch is full.
    - "repeat": positions from the epoch's beginning fill it up to a multiple of `ranks`, so that all ranks have as many
      items (what ranks that average gradients need); up to ranks - 1 items come twice.
    """

    length: int
    batch_size: int
    rank: int = 0
    ranks: int = 1
    remainder: str = "keep"
    start: int = 0

    def __post_init__(self) -> None:
        check_split(self.batch_size, self.rank, self.ranks, self.remainder)
        if not 0 <= self.start <= self.length:
            raise UsageError(f"Position {self.start} is outside this epoch of {self.length} items.")
        if self.remainder != "repeat" and self.length < self.ranks:
            raise UsageError(
                f"{self.ranks} ranks cannot share {self.length} items: use fewer ranks, or remainder='repeat'."
            )
        if self.remainder == "drop" and self.length < self.global_batch:
            raise UsageError(
                f"{self.length} items fill no global batch of {self.global_batch}, and remainder='drop' delivers "
                "full ones alone: use a smaller batch_size, or remainder='keep'."
            )

    @property
    def global_batch(self) -> int:
        """Items of all ranks in one step."""
        return self.batch_size * self.ranks

    @property
    def end(self) -> int:
        """The position that the last step ends at; beyond `length` where items come twice."""
        left = self.length - self.start
        if self.remainder == "keep":
            return self.length
        if self.remainder == "drop":
            return self.start + left // self.global_batch * self.global_batch
        return self.start + -(-left // self.ranks) * self.ranks

    @property
    def steps(self) -> int:
        """Steps until the epoch ends, the same for every rank."""
        return -(-(self.end - self.start) // self.global_batch)

    def positions(self, step: int) -> np.ndarray:
        """This rank's positions at `step`, counted from `start`: int64 [batch_size] or fewer in the last step."""
        first = self.start + step * self.global_batch
        found = np.arange(first + self.rank, min(first + self.global_batch, self.end), self.ranks)
        return found if self.end <= self.length else found % self.length

    def after(self, step: int) -> int:
        """How many items of the epoch all ranks together have delivered once `step` is done."""
        return min(self.start + (step + 1) * self.global_batch, self.length)


def check_split(batch_size: int, rank: int, ranks: int, remainder: str) -> None:
    """Refuse a batch size, rank or rule that makes no split."""
    whole("batch_size", batch_size, 1)
    whole("ranks", ranks, 1)
    whole("rank", rank, 0)
    if rank >= ranks:
        raise UsageError(f"rank is {rank}, and {ranks} ranks have numbers 0 to {ranks - 1}.")
    if remainder not in REMAINDERS:
        raise UsageError(f"Unknown remainder {remainder!r}: expected one of {', '.join(REMAINDERS)}.")


def whole(name: str, value: int, least: int | None = None) -> int:
    """`value` as an int. Raises UsageError where it is no whole number, or below `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or least is not None and number < least:
        bound = "" if least is None else f", {least} or more"
        raise UsageError(f"{name} is {value!r}: expected a whole number{bound}.")
    return number


def whole_lengths(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Lengths as int64. Raises UsageError where one is negative, not a number, or not whole, and says which."""
    try:
        found = np.asarray(lengths)
    except (ValueError, TypeError):
        found = np.empty((0, 0))
    if found.ndim != 1 or found.size and found.dtype.kind not in "iuf":
        raise UsageError("Lengths must be one row of whole numbers, one for each item.")
    bad = ~(found >= 0)  # NaN is not
    if found.dtype.kind == "f":
        bad |= ~((found == np.floor(found)) & (found < 2.0**62))
    if bad.any():
        place = int(bad.argmax())
        raise UsageError(f"The length of item {place} is {found[place]}: expected a whole number of tokens, 0 or more.")
    return found.astype(np.int64, copy=False)
