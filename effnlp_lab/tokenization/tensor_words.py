"""GPT-2's pre-tokenization and the counting of words as tensor operations, on the CPU or a GPU.

Where a word begins under GPT-2's pattern depends on a character and on its neighbours alone, never on the distance, so
that all beginnings are found at once:

- a letter, digit or symbol begins a word unless the character before it is of its own class, or is a space (U+0020),
  which belongs to the word after it;
- white space begins a word where it follows something else, and again at the last character of a run, when something
  else follows: that character either is the space of the next word or stands alone;
- an apostrophe that begins a word and is followed by s, t, m, d, ll, ve or re ends that word there.

Words are then told apart by a 64-bit polynomial hash read off one cumulative sum, and every occurrence is compared with
the word that stands for its hash, so that the counts are exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import regex
import torch
from torch import Tensor

from effnlp_lab.tokenization.pretokenize import SPACES, each_text, utf8

LETTER, NUMBER, SPACE, SYMBOL, EDGE = 0, 1, 2, 3, 4
CPU_CHUNK = 1 << 18  # bytes; the temporaries of a chunk fit a cache
GPU_CHUNK = 1 << 25

_BASE = -0x61C8864680B583EB  # any odd number: it has an inverse modulo 2**64
_LENGTH = -0x604DE39AE16720DB  # not _BASE: a length would look like so much more in the second byte
_INVERSE = (pow(_BASE, -1, 1 << 64) ^ (1 << 63)) - (1 << 63)  # the same bits as a signed integer
_ASSIGNED = 0x40000  # beyond it Unicode has no letters, digits or white space
_SAFE_CUT = regex.compile(rb"(?<=[^\s\x80-\xff\x1c-\x1f])[ \n]")


@dataclass
class Words:
    """The words of one stretch of bytes. `first[k]` is an occurrence of word k; `of` maps occurrences to words.

    start, length: int64 [occurrences], in bytes; of: int64 [occurrences]; first, count, fingerprint: int64 [distinct].
    """

    start: Tensor
    length: Tensor
    of: Tensor
    first: Tensor
    count: Tensor
    fingerprint: Tensor


def chunks(texts: str | Iterable[str], size: int) -> Iterator[tuple[bytes, list[int]]]:
    """The UTF-8 bytes of `texts` in stretches of about `size`, and the offset at which each document (or part) begins.

    A longer document is cut between a word and the white space after it, where the pattern cuts whatever surrounds it.
    """
    held: list[bytes] = []
    begins: list[int] = []
    total = 0
    for text in each_text(texts):
        for piece in _pieces(utf8(text), size):
            held.append(piece)
            begins.append(total)
            total += len(piece)
            if total >= size:
                yield b"".join(held), begins
                held, begins, total = [], [], 0
    if total:
        yield b"".join(held), begins


def distinct_words(texts: str | Iterable[str], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """The distinct words of `texts`: their bytes one after another, uint8, their lengths and their counts, int64."""
    with one_thread(device):
        return _distinct_words(texts, device)


def _distinct_words(texts: str | Iterable[str], device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    hasher = Hasher(torch.device(device))
    tables: list[tuple[Tensor, ...]] = []
    for data, begins in chunks(texts, hasher.chunk):
        held = to_tensor(data, device)
        words = find_words(held, begins, hasher)
        length = words.length[words.first]
        tables.append((held[spans(words.start[words.first], length)], length, words.count, words.fingerprint))
    if not tables:
        empty = torch.zeros(0, dtype=torch.int64, device=device)
        return empty.to(torch.uint8), empty, empty
    data, length, count, fingerprint = (torch.cat(columns) for columns in zip(*tables, strict=True))
    start = torch.cumsum(length, 0) - length
    first, of = _group(fingerprint)
    _require_equal(data, start, length, first[of])
    total = torch.zeros_like(first).index_add_(0, of, count)
    return data[spans(start[first], length[first])], length[first], total


def find_words(data: Tensor, begins: list[int], hasher: Hasher) -> Words:
    """The words of `data`, uint8 [bytes], UTF-8. Words do not cross the offsets `begins`, where documents begin."""
    start = word_starts(data, begins)
    length = torch.diff(start, append=start.new_tensor([len(data)]))
    fingerprint = hasher.words(data, start, length)
    first, of = _group(fingerprint)
    _require_equal(data, start, length, first[of])
    return Words(start, length, of, first, torch.bincount(of, minlength=len(first)), fingerprint[first])


@contextmanager
def one_thread(device: torch.device | str) -> Iterator[None]:
    """On a CPU, keep torch to one thread inside: these are many short operations, and threads that wait cost more."""
    if torch.device(device).type != "cpu":
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def to_tensor(data: bytes, device: torch.device | str) -> Tensor:
    """Bytes as uint8 on `device`."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)


def spans(start: Tensor, length: Tensor) -> Tensor:
    """The indices start[0], start[0] + 1, ... (length[0] of them), start[1], ..., as one int64 tensor."""
    shift = torch.repeat_interleave(start - (torch.cumsum(length, 0) - length), length)
    return torch.arange(len(shift), device=start.device) + shift


def _group(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Equal keys together: for each group its first member, and for each key the number of its group."""
    order = torch.argsort(keys, stable=True)
    fresh = torch.ones_like(order, dtype=torch.bool)
    fresh[1:] = keys[order[1:]] != keys[order[:-1]]
    group = torch.empty_like(order)
    group[order] = torch.cumsum(fresh, 0) - 1
    return order[fresh], group


def word_starts(data: Tensor, begins: list[int]) -> Tensor:
    """The offsets at which words begin, int64 [words], ascending."""
    edge = torch.tensor(sorted({begin for begin in begins if begin < len(data)}), device=data.device)
    if bool((data < 128).all()):
        return torch.nonzero(_starts(data, _classes(data.device)[data.int()], edge)).squeeze(1)
    lead, points = _decode(data)
    starts = _starts(points, _classes(data.device)[points], torch.searchsorted(lead, edge))
    return lead[starts]


def _starts(points: Tensor, kind: Tensor, edge: Tensor) -> Tensor:
    """Whether a word begins at each character. points: code points; kind: classes; edge: where documents begin."""
    before, after = torch.full_like(kind, EDGE), torch.full_like(kind, EDGE)
    before[1:], after[:-1] = kind[:-1], kind[1:]
    begins = torch.zeros_like(kind, dtype=torch.bool)
    begins[edge] = True
    before[edge] = EDGE
    after[edge[edge > 0] - 1] = EDGE
    follows_space = torch.zeros_like(begins)
    follows_space[1:] = points[:-1] == ord(" ")
    follows_space[edge] = False
    last_space = (after != SPACE) & (after != EDGE)
    starts = torch.where(kind == SPACE, (before != SPACE) | last_space, (before != kind) & ~follows_space)

    quote = torch.nonzero((points == ord("'")) & starts).squeeze(1)
    one, two = (_ahead(points, begins, quote, step) for step in (1, 2))
    two = torch.where(one < 0, one, two)
    short = (one == ord("s")) | (one == ord("t")) | (one == ord("m")) | (one == ord("d"))
    long = ((one == ord("l")) & (two == ord("l"))) | (((one == ord("v")) | (one == ord("r"))) & (two == ord("e")))
    starts[quote[short | long] + 1] = False
    ends = torch.cat([quote[short] + 2, quote[long] + 3])
    starts[ends[ends < len(points)]] = True
    return starts


def _ahead(points: Tensor, begins: Tensor, at: Tensor, step: int) -> Tensor:
    """The code point `step` after `at`, or -1 beyond the end of the text or of the document."""
    target = (at + step).clamp(max=len(points) - 1)
    return torch.where((at + step < len(points)) & ~begins[target], points[target].int(), -1)


def _decode(data: Tensor) -> tuple[Tensor, Tensor]:
    """Where each character of UTF-8 `data` begins, int64, and its code point, int32."""
    lead = torch.nonzero((data & 0xC0) != 0x80).squeeze(1)
    padded = torch.cat([data, data.new_zeros(3)]).int()
    first, *rest = (padded[lead + step] for step in range(4))
    second, third, fourth = (byte & 0x3F for byte in rest)
    points = torch.where(first < 0x80, first, ((first & 0x1F) << 6) | second)
    points = torch.where(first >= 0xE0, ((first & 0x0F) << 12) | (second << 6) | third, points)
    points = torch.where(first >= 0xF0, ((first & 0x07) << 18) | (second << 12) | (third << 6) | fourth, points)
    return lead, points


class Hasher:
    """Polynomial hashes of words modulo 2**64: differences of one cumulative sum, shifted back to power 0."""

    def __init__(self, device: torch.device) -> None:
        self.chunk = CPU_CHUNK if device.type == "cpu" else GPU_CHUNK
        self.device = device
        self._grow(1 << 12)

    def words(self, data: Tensor, start: Tensor, length: Tensor) -> Tensor:
        """int64 [words]"""
        if len(data) > len(self.power):
            self._grow(2 * len(data))
        total = torch.cumsum(data * self.power[: len(data)], 0)
        upto = total[start + length - 1]
        before = torch.where(start > 0, total[(start - 1).clamp(min=0)], 0)
        return (upto - before) * self.inverse[start] + length * _LENGTH

    def _grow(self, size: int) -> None:
        first = torch.arange(size, device=self.device) == 0
        self.power, self.inverse = (torch.cumprod(torch.where(first, 1, base), 0) for base in (_BASE, _INVERSE))


def _require_equal(data: Tensor, start: Tensor, length: Tensor, representative: Tensor) -> None:
    """Check that each word is byte for byte the word that represents it. `data` is its words one after another."""
    same = torch.equal(length, length[representative])
    if same:
        shift = torch.repeat_interleave(start[representative] - start, length)
        same = torch.equal(data, data[torch.arange(len(data), device=data.device) + shift])
    if not same:
        raise RuntimeError("Two different words have the same 64-bit hash: use method='heap', which needs none.")


@lru_cache(maxsize=4)
def _classes(device: torch.device) -> Tensor:
    """uint8 [0x110000]: the class of every code point, as the `regex` package has it."""
    letters = "".join(map(chr, range(0xD800))) + " " * 0x800 + "".join(map(chr, range(0xE000, _ASSIGNED)))
    kinds = np.full(0x110000, SYMBOL, dtype=np.uint8)
    for kind, expression in ((LETTER, r"\p{L}+"), (NUMBER, r"\p{N}+"), (SPACE, f"[{SPACES}]+")):
        for run in regex.finditer(expression, letters):
            kinds[run.start() : run.end()] = kind
    kinds[0xD800:0xE000] = SYMBOL
    return torch.from_numpy(kinds).to(device)


def _pieces(data: bytes, size: int) -> Iterator[bytes]:
    begin = 0
    while len(data) - begin > 2 * size:
        cut = _SAFE_CUT.search(data, begin + size)
        if cut is None:
            break
        yield data[begin : cut.start()]
        begin = cut.start()
    if begin < len(data):
        yield data[begin:]
