"""Token shards: ids on disk as a tokenizer made them, two or four bytes each, memory-mapped when read.

A folder holds, for each shard, `00000.tokens` (its documents end to end, little-endian uint16 where the vocabulary fits
65,536 ids, else uint32) and `00000.ends` (where each document ends, as uint64 counted in tokens from the shard's
beginning), and one `index.json` with counts and SHA-256 checksums. A document never crosses shards. The folder
appears under its name when all of it is on disk: whoever finds it finds all of it.

Mapped pages belong to the system's file cache: they come on first touch and go when memory is short, so a process may
read more than its memory holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from effnlp_lab.errors import UsageError

FORMAT, VERSION = "effnlp token shards", 1
INDEX = "index.json"
ENDS = np.dtype("<u8")
CHUNK = 1 << 22  # bytes read at a time by `verify`


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32, little-endian, that holds ids 0 to vocab_size - 1."""
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or not 1 <= vocab_size <= 1 << 32:
        raise UsageError(f"vocab_size is {vocab_size!r}: expected a whole number from 1 to 2**32.")
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class Shards:
    """A folder of shards, read lazily through memory maps. Safe to fork and to pickle: maps are opened on first use.

    tokens, documents: how many there are; starts: the number of tokens before each shard. `fingerprint` depends on the
    contents alone, wherever the folder lies. With `vocab_size`, refuses shards of another vocabulary. Raises UsageError
    for a folder without an index, an index that does not fit together, and a file whose size is not the index's.
    """

    def __init__(self, folder: str | Path, vocab_size: int | None = None) -> None:
        self.folder = Path(folder)
        self.index = _read_index(self.folder)
        self.vocab_size, self.dtype = self.index["vocab_size"], np.dtype(self.index["dtype"])
        if vocab_size is not None and vocab_size != self.vocab_size:
            raise UsageError(
                f"The shards in {self.folder} have a vocabulary of {self.vocab_size} ids, and {vocab_size} were "
                "expected: use the tokenizer that they were written with, or write them again."
            )
        self.shards: list[dict[str, Any]] = self.index["shards"]
        self.starts = [0, *accumulate(shard["tokens"] for shard in self.shards)]
        self.first_documents = [0, *accumulate(shard["documents"] for shard in self.shards)]
        self.tokens, self.documents = self.starts.pop(), self.first_documents.pop()
        self.fingerprint = hashlib.sha256(json.dumps(self.index, sort_keys=True).encode()).hexdigest()[:16]
        self._tokens: dict[int, np.ndarray] = {}
        self._ends: dict[int, np.ndarray] = {}
        self._sizes = {f"{shard['name']}.tokens": shard["tokens"] * self.dtype.itemsize for shard in self.shards}
        self._sizes.update((f"{shard['name']}.ends", shard["documents"] * ENDS.itemsize) for shard in self.shards)
        for name in self._sizes:
            self._check_size(name)

    def document(self, number: int) -> np.ndarray:
        """Document `number` as a read-only view [length] of the map."""
        if not 0 <= number < self.documents:
            raise IndexError(f"There is no document {number}: {self.folder} holds {self.documents}.")
        shard = bisect_right(self.first_documents, number) - 1
        ends, local = self.ends(shard), number - self.first_documents[shard]
        return self.shard_tokens(shard)[int(ends[local - 1]) if local else 0 : int(ends[local])]

    def tokens_at(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop of all shards laid end to end: a view inside one shard, a copy across several."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"There are no tokens {start} to {stop}: {self.folder} holds {self.tokens}.")
        shard = bisect_right(self.starts, start) - 1
        begin = start - self.starts[shard]
        piece = self.shard_tokens(shard)[begin : begin + stop - start]
        if len(piece) == stop - start:
            return piece
        return np.concatenate([piece, self.tokens_at(start + len(piece), stop)])

    def lengths(self) -> np.ndarray:
        """The length of every document, int64 [documents]: 8 bytes a document in memory."""
        return np.concatenate([np.diff(self.ends(i).astype(np.int64), prepend=0) for i in range(len(self.shards))])

    def shard_tokens(self, shard: int) -> np.ndarray:
        """All tokens of one shard, mapped."""
        if shard not in self._tokens:
            self._tokens[shard] = self._map(f"{self.shards[shard]['name']}.tokens", self.dtype)
        return self._tokens[shard]

    def ends(self, shard: int) -> np.ndarray:
        """Where each document of one shard ends, mapped: uint64, counted from the shard's beginning."""
        if shard not in self._ends:
            self._ends[shard] = self._map(f"{self.shards[shard]['name']}.ends", ENDS)
        return self._ends[shard]

    def verify(self, progress: bool = False) -> Shards:
        """Read everything once and compare it with the checksums. Raises UsageError naming the first bad file."""
        from tqdm.auto import tqdm

        for number, shard in enumerate(tqdm(self.shards, "shards", disable=not progress)):
            for kind in ("tokens", "ends"):
                path = self.folder / f"{shard['name']}.{kind}"
                if _sha256(path) != shard[f"{kind}_sha256"]:
                    raise UsageError(f"{path} is not what was written (its checksum differs): copy or write it again.")
            ends = self.ends(number)
            if ends[-1] != shard["tokens"] or (ends[1:] < ends[:-1]).any():
                raise UsageError(
                    f"{self.folder}: the document boundaries of shard {shard['name']} do not fit its tokens."
                )
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokens": {}, "_ends": {}}

    def __repr__(self) -> str:
        return f"Shards({str(self.folder)!r}: {self.documents:,} documents, {self.tokens:,} tokens, {self.dtype.name})"

    def _map(self, name: str, dtype: np.dtype) -> np.ndarray:
        self._check_size(name)
        return np.memmap(self.folder / name, dtype, "r").view(np.ndarray) if self._sizes[name] else np.empty(0, dtype)

    def _check_size(self, name: str) -> None:
        path, expected = self.folder / name, self._sizes[name]
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise UsageError(f"{path} is missing, and {INDEX} lists it: copy or write the shards again.") from None
        if size != expected:
            kind = "truncated" if size < expected else "too long"
            raise UsageError(
                f"{path} is {kind}: it has {size} bytes, and {INDEX} says {expected}; copy or write the shards again."
            )


def write_atomically(path: Path, text: str) -> None:
    """Write `text` beside `path`, force it to disk, and rename: whoever opens `path` finds the old or the new whole."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{folder} holds no token shards (no {INDEX}): write them with `write_shards`.") from None
    except ValueError as error:  # not UTF-8, or not JSON
        raise UsageError(f"{path} is damaged ({error}): copy or write the shards again.") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise UsageError(f"{path} is not an index of token shards: give a folder that `write_shards` made.")
    if index.get("version") != VERSION:
        raise UsageError(f"{path} has version {index.get('version')!r} of the format, and {VERSION} is read here.")
    try:
        good = _fits_together(index)
    except (KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise UsageError(f"{path} does not fit together (counts, dtype or names): copy or write the shards again.")
    return index


def _fits_together(index: dict[str, Any]) -> bool:
    shards = index["shards"]
    hexadecimal = re.compile("[0-9a-f]{64}")
    return (
        index["dtype"] == token_dtype(index["vocab_size"]).str
        and len(shards) > 0
        and all(isinstance(shard[key], int) and shard[key] >= 0 for shard in shards for key in ("tokens", "documents"))
        and all(shard["documents"] > 0 for shard in shards)
        and all(index[key] == sum(shard[key] for shard in shards) for key in ("tokens", "documents"))
        and [shard["name"] for shard in shards] == [f"{number:05d}" for number in range(len(shards))]
        and all(hexadecimal.fullmatch(shard[key]) for shard in shards for key in ("tokens_sha256", "ends_sha256"))
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
    return digest.hexdigest()
