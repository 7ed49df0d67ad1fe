"""Writing token shards: all of a folder appears under its name at once, or nothing does. The format: see shards.py."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from effnlp_lab.errors import UsageError
from effnlp_lab.streaming.order import whole
from effnlp_lab.streaming.shards import ENDS, FORMAT, INDEX, VERSION, Shards, token_dtype, write_atomically

SHARD_TOKENS = 1 << 26  # 128 MiB of uint16
_WRITING: set[Path] = set()  # the hidden folders of this process's open writers


def write_shards(folder: str | Path, documents: Iterable, vocab_size: int, shard_tokens: int = SHARD_TOKENS) -> Shards:
    """Write every document (a sequence of ids) to a new folder and open it. Raises UsageError like `ShardWriter`."""
    with ShardWriter(folder, vocab_size, shard_tokens) as writer:
        for document in documents:
            writer.add(document)
    return Shards(folder)


class ShardWriter:
    """Writes a folder of shards: `with ShardWriter(folder, vocab_size) as writer: writer.add(ids)`.

    A shard is closed when the next document would take it over `shard_tokens`; a longer document has a shard to
    itself. Until the `with` block ends well, everything lies in a hidden folder beside the target; an error removes
    it, and what a killed writer left is removed by the next one. Raises UsageError when the folder exists, when
    nothing was written, and for ids that are no whole numbers of the vocabulary.
    """

    def __init__(self, folder: str | Path, vocab_size: int, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder, self.vocab_size, self.shard_tokens = (
            Path(folder),
            vocab_size,
            whole("shard_tokens", shard_tokens, 1),
        )
        self.dtype = token_dtype(vocab_size)
        self.documents = 0
        self._part: Path | None = None
        self._shards: list[dict[str, Any]] = []

    def __enter__(self) -> ShardWriter:
        self._refuse_existing()
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        part = _part_folder(self.folder.resolve(), os.getpid())
        if part in _WRITING:
            raise UsageError(f"{self.folder} is being written by this process already: close that writer.")
        _remove_leftovers(self.folder)
        part.mkdir()
        _WRITING.add(part)
        self._part = part
        return self

    def add(self, ids: Any) -> None:
        """Append one document: a list, array or tensor of ids, [length]. A document may be empty."""
        if self._part is None:
            raise UsageError("The writer is not open: use `with ShardWriter(...) as writer:`.")
        document = _checked(ids, self.documents, self.vocab_size).astype(self.dtype)
        if not self._shards or self._size and self._size + len(document) > self.shard_tokens:
            self._open_shard()
        self._tokens.write(document.tobytes())
        self._size += len(document)
        self._ends.write(np.array(self._size, ENDS).tobytes())
        self.documents += 1
        self._shards[-1].update(tokens=self._size, documents=self._shards[-1]["documents"] + 1)

    def __exit__(self, kind, error, trace) -> None:
        part, self._part = self._part, None
        try:
            self._close_shard()
            if kind is None:
                self._finish(part)
        finally:
            _WRITING.discard(part)
            shutil.rmtree(part, ignore_errors=True)  # after a rename there is nothing to remove

    def _finish(self, part: Path) -> None:
        if not self.documents:
            raise UsageError(f"Nothing was written to {self.folder}: expected at least one document.")
        write_atomically(part / INDEX, json.dumps(_index(self.vocab_size, self.dtype, self._shards), indent=1) + "\n")
        self._refuse_existing()
        os.rename(part, self.folder)
        _sync_folder(self.folder.parent)

    def _open_shard(self) -> None:
        self._close_shard()
        name = f"{len(self._shards):05d}"
        self._tokens, self._ends = _HashedFile(self._part / f"{name}.tokens"), _HashedFile(self._part / f"{name}.ends")
        self._size = 0
        self._shards.append({"name": name, "tokens": 0, "documents": 0})

    def _close_shard(self) -> None:
        if self._shards and "tokens_sha256" not in self._shards[-1]:
            self._shards[-1].update(tokens_sha256=self._tokens.close(), ends_sha256=self._ends.close())

    def _refuse_existing(self) -> None:
        if self.folder.exists():
            raise UsageError(f"{self.folder} exists already: remove it, or write to another folder.")


class _HashedFile:
    """A file that is written once; closing it forces it to disk and gives its SHA-256."""

    def __init__(self, path: Path) -> None:
        self._file, self._hash = open(path, "xb", buffering=1 << 20), hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)

    def close(self) -> str:
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
        return self._hash.hexdigest()


def _checked(ids: Any, number: int, vocab_size: int) -> np.ndarray:
    try:
        document = np.asarray(ids)
    except (ValueError, TypeError):
        document = np.empty((0, 0))
    if document.ndim != 1 or document.size and document.dtype.kind not in "iu":
        raise UsageError(
            f"Document {number} is no sequence of whole numbers: give the ids that the tokenizer made of it."
        )
    if document.size and not (0 <= document.min() and document.max() < vocab_size):
        place = int(((document < 0) | (document >= vocab_size)).argmax())
        raise UsageError(
            f"Document {number} holds the id {document[place]} at position {place}: ids of this vocabulary go from 0 "
            f"to {vocab_size - 1}; encode it with the tokenizer of this vocabulary."
        )
    return document


def _index(vocab_size: int, dtype: np.dtype, shards: list[dict[str, Any]]) -> dict[str, Any]:
    totals = {name: sum(shard[name] for shard in shards) for name in ("tokens", "documents")}
    return {
        "format": FORMAT,
        "version": VERSION,
        "vocab_size": vocab_size,
        "dtype": dtype.str,
        **totals,
        "shards": shards,
    }


def _part_folder(folder: Path, process: int) -> Path:
    return folder.with_name(f".{folder.name}.{socket.gethostname()}.{process}.part")


def _remove_leftovers(folder: Path) -> None:
    """Remove what writers of this machine left for `folder` when they were killed."""
    head, tail = _part_folder(folder, 0).name.removesuffix("0.part"), ".part"
    for path in folder.parent.iterdir():
        process = path.name.removeprefix(head).removesuffix(tail)
        if path.name.startswith(head) and path.name.endswith(tail) and process.isdigit():
            if int(process) == os.getpid() or not psutil.pid_exists(int(process)):  # ours: of a namesake before us
                shutil.rmtree(path, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Force a rename to disk, where the system lets a folder be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
