"""How well a tokenizer fits a text: fertility, tokens a byte, unknown rate.

Fertility is tokens a word (Acs, 2019; Rust et al., 2021): 1 when every word is one token. A tokenizer trained on
English and code spends several tokens on a word of Greek or Hindi, and so has less context and costs more there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import regex

from effnlp_lab.errors import UsageError


class Encoder(Protocol):
    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Fit:
    """Counts of one text under one tokenizer, and their ratios."""

    tokens: int
    words: int
    characters: int
    bytes: int
    unknown: int

    @property
    def fertility(self) -> float:
        """Tokens a word: a run of letters, marks and digits; where a script writes no spaces, a character."""
        return self.tokens / self.words

    @property
    def tokens_per_byte(self) -> float:
        return self.tokens / self.bytes

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens

    @property
    def unknown_rate(self) -> float:
        """The share of tokens that are the unknown token; 0 for byte-level tokenizers."""
        return self.unknown / self.tokens


# Scripts that write no spaces between words: each character counts as a word.
_WORD = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*|[\p{L}\p{N}][\p{L}\p{M}\p{N}_]*"
)


def fit(tokenizer: Encoder, text: str, unknown_id: int | None = None) -> Fit:
    """Encode `text` and count. `unknown_id` is the id of the unknown token, for tokenizers that have one.

    Raises UsageError for a text without words.
    """
    words = sum(1 for _ in _WORD.finditer(text))
    if words == 0:
        raise UsageError("The text holds no word: fertility needs letters or digits.")
    ids = tokenizer.encode(text)
    unknown = 0 if unknown_id is None else sum(1 for i in ids if i == unknown_id)
    return Fit(len(ids), words, len(text), len(text.encode("utf-8")), unknown)


def fertility(tokenizer: Encoder, samples: Mapping[str, str] | None = None) -> dict[str, Fit]:
    """The fit of each sample; without samples, of one sentence in eight languages, and of code (`SCRIPTS`)."""
    samples = SCRIPTS if samples is None else samples
    return {name: fit(tokenizer, text) for name, text in samples.items()}


# Universal Declaration of Human Rights, article 1 (first sentence), as published by the United Nations.
SCRIPTS: dict[str, str] = {
    "English": "All human beings are born free and equal in dignity and rights.",
    "German": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "Greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "Russian": "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "Arabic": "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق.",
    "Hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "Chinese": "人人生而自由,在尊严和权利上一律平等。",
    "Japanese": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "Python": "def mean(values):\n    return sum(values) / len(values) if values else None\n",
}
