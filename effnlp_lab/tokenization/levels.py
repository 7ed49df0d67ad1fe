"""Tokenizers by whole words and by single characters, to compare subwords with.

Both have a closed vocabulary: what training did not see (or saw too seldom) becomes the unknown token, and the text
cannot be read back. A word is a run of non-space characters cut as `split` cuts it, with its leading space.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from effnlp_lab.errors import UsageError
from effnlp_lab.tokenization.pretokenize import each_text, split

UNKNOWN = "<unk>"


class _ClosedVocabulary:
    """Id 0 is the unknown token; the others are the most frequent pieces of the training text, ties by code point."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = [UNKNOWN, *pieces]
        self._id = {piece: number for number, piece in enumerate(self.pieces) if number}

    @staticmethod
    def cut(text: str) -> list[str]:
        raise NotImplementedError

    @classmethod
    def train(cls, texts: str | Iterable[str], vocab_size: int | None = None):
        """Keep all pieces, or the `vocab_size - 1` most frequent. Raises UsageError for an empty text."""
        if vocab_size is not None and vocab_size < 2:
            raise UsageError(f"vocab_size={vocab_size} is too small: the unknown token and one piece need at least 2.")
        counts: Counter[str] = Counter()
        for text in each_text(texts):
            counts.update(cls.cut(text))
        if not counts:
            raise UsageError("The text is empty: training needs at least one word of text.")
        ranked = sorted(counts, key=lambda piece: (-counts[piece], piece))
        return cls(ranked if vocab_size is None else ranked[: vocab_size - 1])

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        return [self._id.get(piece, 0) for piece in self.cut(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """The pieces of `ids` joined; unknown ones read "<unk>"."""
        return "".join(self.pieces[i] for i in ids)


class WordTokenizer(_ClosedVocabulary):
    """One token a word."""

    @staticmethod
    def cut(text: str) -> list[str]:
        return split(text)


class CharTokenizer(_ClosedVocabulary):
    """One token a character (Unicode code point)."""

    @staticmethod
    def cut(text: str) -> list[str]:
        return list(text)
