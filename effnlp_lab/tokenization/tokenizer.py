"""Byte-level byte-pair encoding: train, encode, decode, save and load.

Sennrich, Haddow and Birch (2016); on bytes, Radford et al. (2019). Ids 0..255 are the bytes in GPT-2's order
(`alphabet.py`), id 256 + m is made by merge m, and special tokens come last, as in GPT-2.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import regex

from effnlp_lab.errors import UsageError
from effnlp_lab.tokenization import alphabet, plain
from effnlp_lab.tokenization.plain import Pair
from effnlp_lab.tokenization.pretokenize import GPT2, compiled, count_words, each_text, pattern_source, utf8
from effnlp_lab.tokenization.word_encoder import encode_word

if TYPE_CHECKING:
    import torch
    from torch import Tensor

METHODS = ("auto", "heap", "tensor", "plain")
TIES = ("smallest", "largest")
CACHE_WORDS = 1 << 20
SMALL_TEXT = 1 << 20  # characters; below this the tensors' start-up is not worth it


class Tokenizer:
    """Text to token ids and back.

    tokens: the bytes of each id (of a special token: its text); merges: pairs of ids in the order of training;
    special_tokens: the id of each.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        merges: Sequence[Pair],
        special_tokens: dict[str, int] | None = None,
        pattern: str = "gpt2",
    ) -> None:
        self.tokens = list(tokens)
        self.merges = [tuple(pair) for pair in merges]
        self.special_tokens = dict(special_tokens or {})
        self.pattern = pattern
        self._expression = compiled(pattern)
        special = set(self.special_tokens.values())
        ids = {token: i for i, token in enumerate(self.tokens) if i not in special}
        missing = [byte for byte in range(256) if bytes([byte]) not in ids]
        if missing:
            raise UsageError(f"The vocabulary lacks the byte {missing[0]:#04x}: a byte-level vocabulary holds all 256.")
        self._id_of_byte = [ids[bytes([byte])] for byte in range(256)]
        self._rank = {pair: number for number, pair in enumerate(self.merges)}
        self._merged = [_merged_id(pair, self.tokens, ids) for pair in self.merges]
        _check_special(self.special_tokens, ids)
        by_length = sorted(self.special_tokens, key=len, reverse=True)  # of two that match, the longer
        self._special = regex.compile("|".join(map(regex.escape, by_length))) if by_length else None
        self._cache = _Cache(self._encode_new)
        self._bytes_cache = _Cache(self._encode_utf8)

    @classmethod
    def from_merges(
        cls, merges: Sequence[Pair], special_tokens: Iterable[str] = (), pattern: str = "gpt2"
    ) -> Tokenizer:
        """The tokenizer that `merges` define, with the special tokens after the last merge."""
        tokens = plain.vocabulary(merges, alphabet.ALPHABET)
        names = list(special_tokens)
        special = {name: len(tokens) + number for number, name in enumerate(names)}
        return cls(tokens + [utf8(name) for name in names], merges, special, pattern)

    @classmethod
    def train(
        cls,
        texts: str | Iterable[str],
        vocab_size: int,
        *,
        special_tokens: Iterable[str] = (),
        ties: str = "smallest",
        pattern: str = "gpt2",
        method: str = "auto",
        device: torch.device | str = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ) -> Tokenizer:
        """Train on `texts` to `vocab_size` tokens, the 256 bytes and the special tokens included.

        Fewer come out when the text has no pair left to merge. `ties` says which of two pairs with equal counts goes
        first: the "smallest" pair of ids, as in Hugging Face's trainer, or the "largest". All methods give the same
        merges: "plain" (the definition), "heap" (incremental, `heap_trainer`), "tensor" (whole corpus, on `device`,
        `tensor_trainer`). Raises UsageError for a vocabulary that is too small, an empty text and unknown words.
        """
        special = list(special_tokens)
        _check_training(vocab_size, special, ties, method, pattern)
        merges = _train(texts, vocab_size - len(special), ties, pattern, method, device, progress)
        return cls.from_merges(merges, special, pattern)

    @property
    def vocab_size(self) -> int:
        """The number of ids, special tokens included."""
        return len(self.tokens)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`. With `special`, a special token written in the text becomes its id."""
        if not isinstance(text, str):
            raise UsageError(f"Expected text as str, got {type(text).__name__}: use `encode_bytes` for bytes.")
        if self._special is None or not special:
            return self._encode_plain(text)
        ids: list[int] = []
        begin = 0
        for found in self._special.finditer(text):
            ids += self._encode_plain(text[begin : found.start()])
            ids.append(self.special_tokens[found.group()])
            begin = found.end()
        return ids + self._encode_plain(text[begin:])

    def encode_bytes(self, data: bytes) -> list[int]:
        """Token ids of any bytes; what is not UTF-8 is cut like symbols. `decode_bytes` gives `data` back exactly."""
        if not isinstance(data, bytes | bytearray | memoryview):
            raise UsageError(f"Expected bytes, got {type(data).__name__}: use `encode` for text.")
        return self._encode_plain(bytes(data).decode("utf-8", errors="surrogateescape"))

    def encode_tensor(self, texts: str | Iterable[str], device: torch.device | str = "cpu") -> Tensor:
        """Token ids of a large text, int32 [tokens], the documents one after another; special tokens are plain text.

        Same ids as `encode(text, special=False)`. For GPT-2's pattern the words are found by tensor operations.
        """
        import torch

        from effnlp_lab.tokenization.tensor_encoder import encode_corpus

        if pattern_source(self.pattern) == GPT2:
            return encode_corpus(texts, self._bytes_cache, device)
        ids = array("i", chain.from_iterable(self._encode_plain(text) for text in each_text(texts)))
        return torch.tensor(ids, dtype=torch.int32, device=device)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. A character may span tokens: the bytes are joined first; what is not UTF-8 is U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`. Raises UsageError for an id outside the vocabulary."""
        ids = [int(i) for i in ids]
        if ids and (min(ids) < 0 or max(ids) >= len(self.tokens)):
            wrong = next(i for i in ids if not 0 <= i < len(self.tokens))
            raise UsageError(f"Id {wrong} is outside the vocabulary: ids run from 0 to {len(self.tokens) - 1}.")
        return b"".join([self.tokens[i] for i in ids])

    def ranks(self) -> dict[bytes, int]:
        """The tokens that are not special and their ids, as tiktoken's `mergeable_ranks` (its rank is the id)."""
        special = set(self.special_tokens.values())
        return {token: i for i, token in enumerate(self.tokens) if i not in special}

    def save(self, path: str | Path) -> Path:
        """Write Hugging Face's `tokenizer.json`: to `path` if it ends in .json, else into that folder."""
        from effnlp_lab.tokenization.huggingface import save

        return save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json` (or the folder that holds it). Raises UsageError when it is not byte-level BPE."""
        from effnlp_lab.tokenization.huggingface import load

        return load(path)

    def _encode_plain(self, text: str) -> list[int]:
        if len(self._cache) > CACHE_WORDS:
            self._cache.clear()
        return list(chain.from_iterable(map(self._cache.__getitem__, self._expression.findall(text))))

    def _encode_new(self, word: str) -> tuple[int, ...]:
        try:
            return self._encode_utf8(word.encode("utf-8", errors="surrogateescape"))
        except UnicodeEncodeError:
            utf8(word)  # raises the sentence
            raise

    def _encode_utf8(self, word: bytes) -> tuple[int, ...]:
        return tuple(encode_word([self._id_of_byte[byte] for byte in word], self._rank, self._merged))


class _Cache(dict):
    """Word to ids; a word that is not there yet is encoded and kept."""

    def __init__(self, encode: Callable[..., tuple[int, ...]]) -> None:
        super().__init__()
        self.encode = encode

    def __missing__(self, word: str | bytes) -> tuple[int, ...]:
        ids = self[word] = self.encode(word)
        return ids


def _train(texts, vocab_size: int, ties: str, pattern: str, method: str, device, progress) -> list[Pair]:
    if method == "auto":
        small = isinstance(texts, str) and len(texts) < SMALL_TEXT
        method = "heap" if small or ties == "largest" or pattern_source(pattern) != GPT2 else "tensor"
    if method == "tensor":
        return _train_on_tensors(texts, vocab_size, ties, pattern, device, progress)
    counts = count_words(texts, pattern)
    words = [alphabet.ids_of(utf8(word)) for word in counts]
    _require_words(words)
    if method == "plain":
        return plain.train(words, list(counts.values()), vocab_size, ties)
    from effnlp_lab.tokenization.heap_trainer import train_heap

    return train_heap(words, list(counts.values()), vocab_size, ties)


def _train_on_tensors(texts, vocab_size: int, ties: str, pattern: str, device, progress) -> list[Pair]:
    import torch

    from effnlp_lab.tokenization.tensor_trainer import train_tensor
    from effnlp_lab.tokenization.tensor_words import distinct_words, to_tensor

    if pattern_source(pattern) == GPT2:
        data, lengths, counts = distinct_words(texts, device)
    else:
        table = count_words(texts, pattern)
        words = [utf8(word) for word in table]
        data = to_tensor(b"".join(words), device)
        lengths = torch.tensor([len(word) for word in words], dtype=torch.int64, device=device)
        counts = torch.tensor(list(table.values()), dtype=torch.int64, device=device)
    _require_words(lengths)
    ids = torch.tensor(alphabet.id_of_byte, device=data.device)[data.int()]
    return train_tensor(ids, lengths, counts, vocab_size, ties, progress=progress)


def _require_words(words) -> None:
    if len(words) == 0:
        raise UsageError("The text is empty: training needs at least one word of text.")


def _check_training(vocab_size: int, special: list[str], ties: str, method: str, pattern: str) -> None:
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise UsageError(f"Expected vocab_size as an int, got {type(vocab_size).__name__}.")
    if vocab_size < 256 + len(special):
        raise UsageError(
            f"vocab_size={vocab_size} is too small: the 256 bytes and {len(special)} special tokens need "
            f"at least {256 + len(special)}."
        )
    if ties not in TIES:
        raise UsageError(f"Unknown tie rule {ties!r}: expected 'smallest' or 'largest'.")
    if method not in METHODS:
        raise UsageError(f"Unknown training method {method!r}: expected one of {', '.join(METHODS)}.")
    if len(set(special)) != len(special):
        raise UsageError("A special token is given twice: give each once.")
    compiled(pattern)


def _check_special(special: dict[str, int], ids: dict[bytes, int]) -> None:
    for name in special:
        if not isinstance(name, str) or not name:
            raise UsageError(f"A special token is a non-empty str, got {name!r}.")
        try:
            ordinary = alphabet.bytes_of(name) in ids
        except ValueError:
            ordinary = False
        if ordinary:
            raise UsageError(f"The special token {name!r} is also an ordinary token: choose a name like '<|{name}|>'.")


def _merged_id(pair: Pair, tokens: Sequence[bytes], ids: dict[bytes, int]) -> int:
    left, right = pair
    if not (0 <= left < len(tokens) and 0 <= right < len(tokens)) or tokens[left] + tokens[right] not in ids:
        raise UsageError(f"The merge {pair} makes no token of the vocabulary: merges and vocabulary do not match.")
    return ids[tokens[left] + tokens[right]]
