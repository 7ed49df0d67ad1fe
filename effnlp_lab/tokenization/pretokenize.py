"""Pre-tokenization: cut text into words that no merge will cross, with a regular expression.

`GPT2` is the pattern of Radford et al. (2019), which Hugging Face's `ByteLevel` pre-tokenizer applies; `GPT4` is
tiktoken's `cl100k_base`. Both keep a leading space with its word and never drop a character: the words of a text
joined are the text. White space is Unicode's White_Space property, spelled out, because Python's `\\s` also holds
U+001C..U+001F, which the Rust libraries take for symbols.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache

import regex

from effnlp_lab.errors import UsageError

SPACES = "\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000"

# As published; `compiled` replaces the white space classes by SPACES.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4 = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
PATTERNS = {"gpt2": GPT2, "gpt4": GPT4}


def pattern_source(pattern: str) -> str:
    """The regular expression called `pattern` ("gpt2" or "gpt4"), or `pattern` itself, an expression of one's own."""
    return PATTERNS.get(pattern, pattern)


@lru_cache
def compiled(pattern: str) -> regex.Pattern:
    """`pattern` compiled, with Unicode's white space. Raises UsageError when it is no regular expression."""
    source = pattern_source(pattern)
    if source in PATTERNS.values():
        source = source.replace(r"[^\s", f"[^{SPACES}").replace(r"\s", f"[{SPACES}]").replace(r"\S", f"[^{SPACES}]")
    try:
        return regex.compile(source)
    except regex.error as error:
        raise UsageError(
            f"{pattern!r} is neither 'gpt2' nor 'gpt4' nor a regular expression ({error}): give one of these."
        ) from None


def split(text: str, pattern: str = "gpt2") -> list[str]:
    """The words of `text`, in order. Raises UsageError for anything but a str."""
    _check_text(text)
    return compiled(pattern).findall(text)


def count_words(texts: str | Iterable[str], pattern: str = "gpt2") -> dict[str, int]:
    """How often each word occurs. Each text is cut on its own: no word crosses from one document to the next."""
    expression = compiled(pattern)
    counts: Counter[str] = Counter()
    for text in each_text(texts):
        counts.update(expression.findall(text))
    return dict(counts)


def each_text(texts: str | Iterable[str]) -> Iterator[str]:
    """`texts` as an iterable of str, whatever holds them. Raises UsageError at the first that is not a str."""
    if isinstance(texts, str):
        yield texts
        return
    if isinstance(texts, bytes) or not isinstance(texts, Iterable):
        _check_text(texts)
    for text in texts:
        _check_text(text)
        yield text


def utf8(text: str) -> bytes:
    """The bytes of `text`. Raises UsageError for a lone surrogate, which UTF-8 cannot write."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"The text holds half a surrogate pair at character {error.start}, which UTF-8 cannot write: "
            "read the file with errors='replace', or encode its bytes with `encode_bytes`."
        ) from None


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise UsageError(f"Expected text as str, got {type(text).__name__}: pass one str or many, bytes decoded.")
