"""The order of the 256 byte tokens, and the printable letters that stand for them in a `tokenizer.json`.

GPT-2 (Radford et al., 2019) writes each byte as a visible Unicode letter: the printable bytes of Latin-1 as themselves,
the other 68 as U+0100 onwards. Its vocabulary, Hugging Face's trainer and tiktoken's GPT-2 ranks number the bytes in
the order of those letters: id 0 is "!", and the space is id 220. We use that order, because it decides ties: "the
smallest pair of ids" is then the same pair here and in `tokenizers`, and so are all merges after it.
"""

from __future__ import annotations

PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
OTHERS = [byte for byte in range(256) if byte not in set(PRINTABLE)]

# byte_of_id[i] is the byte of token i; id_of_byte[b] is the token of byte b.
byte_of_id: tuple[int, ...] = (*PRINTABLE, *OTHERS)
id_of_byte: tuple[int, ...] = tuple(byte_of_id.index(byte) for byte in range(256))

# `bytes.translate` with this table maps raw bytes to ids in one call.
ID_TABLE = bytes(id_of_byte)
ALPHABET: tuple[bytes, ...] = tuple(bytes([byte]) for byte in byte_of_id)

letter_of_byte: dict[int, str] = {byte: chr(byte) for byte in PRINTABLE}
letter_of_byte.update({byte: chr(256 + number) for number, byte in enumerate(OTHERS)})
byte_of_letter: dict[str, int] = {letter: byte for byte, letter in letter_of_byte.items()}


def ids_of(data: bytes) -> list[int]:
    """The byte tokens of `data`: a word as training and encoding start with it."""
    return list(data.translate(ID_TABLE))


def letters_of(token: bytes) -> str:
    """A token as `tokenizer.json` writes it: one printable letter a byte."""
    return "".join(letter_of_byte[byte] for byte in token)


def bytes_of(letters: str) -> bytes:
    """The inverse of `letters_of`. Raises ValueError for a letter that stands for no byte."""
    try:
        return bytes(byte_of_letter[letter] for letter in letters)
    except KeyError as missing:
        raise ValueError(
            f"{letters!r} is not a byte-level token: the letter {missing.args[0]!r} stands for no byte."
        ) from None
