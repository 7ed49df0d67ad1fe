"""Rows of text, JSON lines, Parquet and Hugging Face `datasets`, read from front to back behind one interface.

A source has a `fingerprint`, is iterated row by row, and has `rows(start=None)`: pairs (place, row), where a place is
small, fit for JSON, and says where that row begins. `rows(place)` begins again with that row, without reading what lies
before it: at a byte of a text file, in a row group of a Parquet file, at a recent state of a `datasets` stream.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from effnlp_lab.errors import UsageError

SNAPSHOT = 64  # rows between two states of a `datasets` stream
ROWS_AT_ONCE = 1024  # rows of a Parquet file that are in memory as Python objects
PROBE = 1 << 16  # bytes at either end of a file that go into its fingerprint


def open_source(name: Any, column: str | None = None, **options: Any) -> Source:
    """The source that `name` is: by suffix a file, a folder of files of one kind, a list of them, or else a data set.

    .txt and .md are `TextSource`, .jsonl `JsonLinesSource`, .parquet `ParquetSource`; any other name is looked up on
    the hub, and an `IterableDataset` is taken as it is (`HubSource`). column: give this column of each row alone.
    Raises UsageError for a path that is not there, and for files of several kinds or of an unknown one.
    """
    if not isinstance(name, str | Path | list | tuple):
        return HubSource(name, column, **options)
    looks_like_a_path = not isinstance(name, str) or name.startswith((".", "/", "~")) or Path(name).suffix in KINDS
    if not looks_like_a_path and not Path(name).exists():
        return HubSource(name, column, **options)
    files = _files(name, tuple(KINDS))
    suffixes = sorted({path.suffix for path in files})
    kinds = {KINDS.get(suffix) for suffix in suffixes}
    if len(kinds) != 1 or None in kinds:
        raise UsageError(
            f"Cannot tell what {', '.join(suffixes)} files are: give files of one kind ({', '.join(KINDS)})."
        )
    kind = kinds.pop()
    return kind(files, **options) if kind is TextSource else kind(files, column, **options)


class Source:
    """What all sources have. A subclass gives `rows`."""

    fingerprint: str

    def rows(self, start: Any = None) -> Iterator[tuple[Any, Any]]:
        """(place, row) pairs, from the row on whose place is `start`."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        return (row for _, row in self.rows())


class TextSource(Source):
    """UTF-8 text: a row is a line without its newline (lines of white space alone are no rows), or with unit="file" a
    file.

    files: a path, a folder, or a list of paths. A place is [file, byte, line number]. Raises UsageError for files
    that are not there or hold nothing, and, naming file and line, for bytes that are no UTF-8.
    """

    suffixes: tuple[str, ...] = (".txt", ".md")

    def __init__(self, files: Any, unit: str = "line") -> None:
        if unit not in ("line", "file"):
            raise UsageError(f"Unknown unit {unit!r}: expected 'line' or 'file'.")
        self.files, self.unit = _files(files, self.suffixes), unit
        self.fingerprint = _fingerprint(self.files, type(self).__name__, unit)

    def rows(self, start: Any = None) -> Iterator[tuple[Any, Any]]:
        first, byte, line = start or (0, 0, 1)
        for number in range(first, len(self.files)):
            with open(self.files[number], "rb") as file:
                file.seek(byte)
                for raw in file if self.unit == "line" else iter(file.read, b""):
                    if not raw.isspace():
                        yield (number, byte, line), self._row(raw, self.files[number], line)
                    byte, line = byte + len(raw), line + 1
            byte, line = 0, 1

    def _row(self, raw: bytes, path: Path, line: int) -> Any:
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            where = f"line {line}" if self.unit == "line" else f"byte {error.start}"
            raise UsageError(f"{path}, {where}: this is no UTF-8 ({error.reason}); convert the file first.") from None
        return text.rstrip("\r\n") if self.unit == "line" else text


class JsonLinesSource(TextSource):
    """JSON lines: a row is the object of a line, or its `column`. Blank lines are no rows.

    Raises UsageError like `TextSource`, and, naming file and line, for a line that is no JSON object or lacks `column`.
    """

    suffixes = (".jsonl",)

    def __init__(self, files: Any, column: str | None = None) -> None:
        super().__init__(files)
        self.column = column
        self.fingerprint = _fingerprint(self.files, "JsonLinesSource", column)

    def _row(self, raw: bytes, path: Path, line: int) -> Any:
        try:
            row = json.loads(raw)
        except ValueError as error:
            what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "no UTF-8"
            raise UsageError(f"{path}, line {line}: this is no JSON ({what}); mend or remove the line.") from None
        if not isinstance(row, dict):
            raise UsageError(f"{path}, line {line}: expected a JSON object, found a {type(row).__name__}.")
        return row if self.column is None else _column_of(row, self.column, f"{path}, line {line}")


class ParquetSource(Source):
    """Parquet: a row is a dict, or its `column`. In memory: one row group's pages, and `ROWS_AT_ONCE` rows.

    files: a path, a folder, or a list of paths. A place is [file, row group, row]. Raises UsageError for files that are
    not there, are no Parquet, hold no rows, or lack `column`.
    """

    def __init__(self, files: Any, column: str | None = None) -> None:
        self.files, self.column = _files(files, (".parquet",)), column
        self.fingerprint = _fingerprint(self.files, "ParquetSource", column)
        for path in self.files:
            self._open(path).close()

    def rows(self, start: Any = None) -> Iterator[tuple[Any, Any]]:
        first, group, skip = start or (0, 0, 0)
        for number in range(first, len(self.files)):
            with self._open(self.files[number]) as file:
                for group in range(group, file.metadata.num_row_groups):  # noqa: B020  the first begins where we stand
                    for row, value in self._group(file, group, skip):
                        yield (number, group, row), value
                    skip = 0
            group = 0

    def _group(self, file: Any, group: int, skip: int) -> Iterator[tuple[int, Any]]:
        row = 0
        columns = None if self.column is None else [self.column]
        for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns):
            if row + len(batch) > skip:
                fresh = batch.slice(max(0, skip - row))
                values = fresh.to_pylist() if self.column is None else fresh.column(0).to_pylist()
                yield from enumerate(values, row + len(batch) - len(fresh))
            row += len(batch)

    def _open(self, path: Path) -> Any:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UsageError("Parquet needs the package `pyarrow`: pip install pyarrow.") from None
        try:
            file = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowInvalid, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UsageError(f"{path} is no Parquet file ({reason}): copy or write it again.") from None
        if self.column is not None and self.column not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            file.close()
            raise UsageError(f"{path} has no column {self.column!r}: choose one of {names}.")
        return file


class HubSource(Source):
    """A data set of the hub (or of a local folder) in streaming mode, or an IterableDataset that is there already.

    A row is a dict, or its `column`. config, split, and further options go to `datasets.load_dataset`. A place is a
    state of the stream, at most `SNAPSHOT` rows old, and the rows to skip from there. Every process reads all of it,
    whatever `datasets` would deal out to workers. Hand it over unshuffled: its own shuffle buffer is not part of its
    state. Raises UsageError for a data set that cannot be loaded, and for a missing column.
    """

    def __init__(
        self, data: Any, column: str | None = None, *, config: str | None = None, split: str = "train", **options: Any
    ) -> None:
        self.column = column
        self._name = data if isinstance(data, str) else type(data).__name__
        self._data = _load(data, config, split, options) if isinstance(data, str) else data
        if not hasattr(self._data, "load_state_dict") or not hasattr(self._data, "iter"):
            raise UsageError(f"A {self._name} is no IterableDataset: load it with streaming=True.")
        names = self._data.column_names
        if names and column is not None:
            _column_of(dict.fromkeys(names), column, self._name)
            self._data = self._data.select_columns([column])
        known = [self._name, config, split, column, names, str(getattr(self._data.info, "version", None))]
        self.fingerprint = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]

    def rows(self, start: Any = None) -> Iterator[tuple[Any, Any]]:
        state, skip = start or (None, 0)
        data = copy.deepcopy(self._data)  # its state belongs to this iteration alone
        if state is not None:
            data.load_state_dict(state)
        for block in data.iter(SNAPSHOT):  # unlike plain iteration, `iter` deals nothing out to torch's workers
            after = data.state_dict()
            for number, row in enumerate(_rows_of(block)):
                if number >= skip:
                    where = f"A row of {self._name}"
                    yield (state, number), row if self.column is None else _column_of(row, self.column, where)
            state, skip = after, 0


KINDS: dict[str, type[Source]] = {
    ".txt": TextSource, ".md": TextSource, ".jsonl": JsonLinesSource, ".parquet": ParquetSource,
}  # fmt: skip


def _files(files: Any, suffixes: tuple[str, ...]) -> list[Path]:
    """A path, the files of a folder that have one of `suffixes`, by name, or a list of paths."""
    if isinstance(files, list | tuple):
        found = [path for each in files for path in _files(each, suffixes)]
    else:
        path = Path(files).expanduser()
        if not path.exists():
            raise UsageError(f"There is no file or folder {path}: check the path.")
        found = sorted(each for each in path.rglob("*") if each.suffix in suffixes) if path.is_dir() else [path]
    if not found:
        raise UsageError(f"There is no {' or '.join(suffixes)} file in {files}: check the path.")
    if not any(path.stat().st_size for path in found):
        raise UsageError(f"{', '.join(map(str, found[:3]))}: nothing but empty files; write them again.")
    return found


def _fingerprint(files: list[Path], *settings: Any) -> str:
    """Of the files' names, sizes and both ends: cheap for large files, and the same on another machine."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            digest.update(file.read(PROBE))
            file.seek(max(0, size - PROBE))
            digest.update(file.read(PROBE))
    return digest.hexdigest()[:16]


def _column_of(row: dict[str, Any], column: str, where: str) -> Any:
    if column not in row:
        raise UsageError(f"{where} has no column {column!r}: choose one of {', '.join(row)}.")
    return row[column]


def _rows_of(block: dict[str, list]) -> Iterator[dict[str, Any]]:
    return (dict(zip(block, values, strict=True)) for values in zip(*block.values(), strict=True))


def _load(name: str, config: str | None, split: str, options: dict[str, Any]) -> Any:
    try:
        import datasets
    except ImportError:
        raise UsageError("Data sets need the package `datasets`: pip install datasets.") from None
    try:
        return datasets.load_dataset(name, config, split=split, streaming=True, **options)
    except Exception as error:  # the hub's libraries raise many kinds, from HTTP errors to FileNotFoundError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"The data set {name!r} could not be loaded ({reason}): check its name, config and split, and the network."
        ) from error
