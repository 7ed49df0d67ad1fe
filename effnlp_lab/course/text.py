"""The text that every lab shares: Python that is already on this machine, so that no lab needs a network.

- `course-train`, to pre-train on: the standard library and the installed source of the kit's own dependencies;
- `course-heldout`, to evaluate on: the standard library's modules whose name hashes to 0 modulo 8;
- `course-english`, to adapt to: Python's language reference, as `help()` shows it (`pydoc_data.topics`).

Some of the library is vendored by other packages. Training text therefore drops a file when more than a tenth of its
lines of 40 characters or more also occur in held-out text. The text differs between versions of Python and of the
packages: `text_version` says which ones a figure was measured on. `load_text` also reads files, folders and data sets
of the Hugging Face hub.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from effnlp_lab.errors import UsageError

# The packages whose source is training text, where they are installed.
PACKAGES = (
    "torch", "transformers", "numpy", "matplotlib", "triton", "sympy", "networkx", "jinja2", "einops", "jaxtyping",
    "safetensors", "tokenizers", "huggingface_hub", "regex", "rich", "tqdm", "typer",
)
HELD_OUT_OF = 8  # one module of the standard library in eight
LINE = 40  # characters from which a line counts for deduplication
SHARED = 0.1  # the share of such lines above which a training file is dropped
NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "pydoc_data"})
HUB_NAMES = {"wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1")}
TEXT_FILES = {".txt", ".md", ".rst", ".py", ".text"}
TABLE_FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class Document:
    """One text: a file, a topic of the reference, or a row of a data set."""

    name: str
    text: str


class Text:
    """Documents in an order that is always the same. May be iterated again; files are read as it goes."""

    def __init__(self, name: str, version: str, documents: Callable[[], Iterable[Document]], limit: int | None) -> None:
        self.name, self.version, self.limit = name, version, limit
        self._documents = documents

    def __iter__(self) -> Iterator[Document]:
        return _limited(self._documents(), self.limit)

    def texts(self) -> Iterator[str]:
        """The documents without their names."""
        return (document.text for document in self)

    def __repr__(self) -> str:
        limit = "" if self.limit is None else f", first {self.limit:,} bytes"
        return f"Text({self.name!r}, {self.version}{limit})"


def load_text(
    name: str | Path = "course-train",
    *,
    split: str = "train",
    limit_bytes: int | None = None,
    column: str = "text",
    config: str | None = None,
    streaming: bool = True,
) -> Text:
    """The documents of `name`: a course text, a file, a folder, or a data set of the hub.

    limit_bytes: stop after so many bytes of UTF-8, the last document cut short. For data sets: `split`, `config`, the
    `column` that holds the text, and `streaming` (False downloads all of it first). Raises UsageError for a name that
    is none of these, and for a data set without that column.
    """
    if limit_bytes is not None and limit_bytes < 1:
        raise UsageError(f"limit_bytes={limit_bytes} leaves no text: give a positive number, or None for all of it.")
    known = {"course-train": train_documents, "course-heldout": heldout_documents, "course-english": english_documents}
    word = str(name)
    if word in known:
        return Text(word, text_version(word), known[word], limit_bytes)
    if word.startswith("course-"):
        raise UsageError(f"There is no course text {word!r}: choose one of {', '.join(known)}.")
    path = Path(name).expanduser()
    if path.exists():
        return Text(path.name, "local", lambda: local_documents(path, column), limit_bytes)
    if isinstance(name, Path) or word.startswith((".", "/", "~")) or path.suffix in TEXT_FILES | TABLE_FILES.keys():
        raise UsageError(f"There is no file or folder {word}: check the path, or give a course text or a hub data set.")
    data = _hub(word, config, split, streaming)
    return Text(word, f"hub, split {split}", lambda: _rows(data, word, column), limit_bytes)


def text_version(name: str = "course-heldout") -> str:
    """What the text depends on: the Python version, and for the training text also the packages."""
    version = f"Python {platform.python_version()}"
    if name != "course-train":
        return version
    packages = [f"{package} {found}" for package in PACKAGES if (found := _package_version(package))]
    digest = hashlib.sha256(" ".join(packages).encode()).hexdigest()[:8]
    first = ", ".join(packages[:3])
    return f"{version}, {first} and {max(len(packages) - 3, 0)} more packages ({digest})"


def is_held_out(module: str) -> bool:
    """Whether the top-level module of the standard library called `module` is evaluation text."""
    return int.from_bytes(hashlib.sha256(module.encode()).digest()[:8], "big") % HELD_OUT_OF == 0


def heldout_documents(library: Path | None = None) -> Iterator[Document]:
    """The held-out modules of the standard library (or of the folder `library`)."""
    return (document for document in _library(library) if is_held_out(_module(document.name)))


def train_documents(library: Path | None = None, packages: dict[str, Path] | None = None) -> Iterator[Document]:
    """The rest of the standard library and the packages' source, in the order of a hash of their names.

    Dropped: files that share more than a tenth of their long lines with held-out text, and second copies of a file.
    """
    held = _standard_held_out_lines() if library is None else long_lines(heldout_documents(library))
    sources = [(name, path) for name, path in _library_files(library) if not is_held_out(_module(name))]
    for package, folder in (installed_packages() if packages is None else packages).items():
        sources += [(f"{package}/{name}", path) for name, path in _python_files(folder)]
    seen: set[bytes] = set()
    for document in _read(sources):
        digest = hashlib.sha256(document.text.encode("utf-8")).digest()
        if digest not in seen and shared_lines(document.text, held) <= SHARED:
            seen.add(digest)
            yield document


def english_documents() -> Iterator[Document]:
    """The topics of Python's language reference, by name."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UsageError("This Python lacks pydoc_data (the text of help()): install the whole library.") from None
    return (Document(f"topics/{name}", topics[name]) for name in sorted(topics))


def long_lines(documents: Iterable[Document]) -> set[str]:
    """The lines of at least 40 characters, white space at their ends apart."""
    return {line for document in documents for line in _long(document.text)}


def shared_lines(text: str, held: set[str]) -> float:
    """The share of a text's long lines that are in `held`; 0 for a text without long lines."""
    lines = list(_long(text))
    return sum(line in held for line in lines) / len(lines) if lines else 0.0


def installed_packages() -> dict[str, Path]:
    """The folders of those of `PACKAGES` that are installed. Imports none of them."""
    found = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            found[package] = Path(next(iter(spec.submodule_search_locations)))
    return found


def local_documents(path: Path, column: str = "text") -> Iterator[Document]:
    """A text file, a table (.jsonl, .json, .parquet, .csv: one document a row), or a folder's, ordered by name."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if _readable(file, path))
    if not files:
        raise UsageError(f"The folder {path.name} holds no text: expected {', '.join(sorted(TEXT_FILES))} or a table.")
    for file in files:
        name = file.name if file == path else file.relative_to(path).as_posix()
        if file.suffix in TABLE_FILES:
            load = _datasets().load_dataset
            rows = load(TABLE_FILES[file.suffix], data_files=str(file), split="train", streaming=True)
            yield from _rows(rows, name, column)
        elif (text := _text_of(file)) is not None:
            yield Document(name, text)
        else:
            raise UsageError(f"{name} is not UTF-8 text: convert it first.")


def _long(text: str) -> Iterator[str]:
    return (line for raw in text.splitlines() if len(line := raw.strip()) >= LINE)


def _limited(documents: Iterable[Document], limit: int | None) -> Iterator[Document]:
    if limit is None:
        yield from documents
        return
    left = limit
    for document in documents:
        data = document.text.encode("utf-8")
        if len(data) >= left:
            yield Document(document.name, data[:left].decode("utf-8", errors="ignore"))
            return
        left -= len(data)
        yield document


def _library(library: Path | None) -> Iterator[Document]:
    return _read(_library_files(library))


def _library_files(library: Path | None) -> list[tuple[str, Path]]:
    folder = Path(sysconfig.get_paths()["stdlib"]) if library is None else library
    files = _python_files(folder, NOT_LIBRARY)
    if not files:
        raise UsageError(f"No Python source in {folder}: the course text needs the standard library as files.")
    return [(name, path) for name, path in files if not _is_table(name)]


def _is_table(name: str) -> bool:
    return name.startswith("encodings/") and name.split("/")[-1] not in ("__init__.py", "aliases.py")


@lru_cache
def _python_files(folder: Path, skipped: frozenset[str] = frozenset()) -> list[tuple[str, Path]]:
    """The .py files below `folder` with their names relative to it, but for those in folders named in `skipped`."""
    files = ((path.relative_to(folder), path) for path in folder.rglob("*.py"))
    return [(name.as_posix(), path) for name, path in files if not skipped.intersection(name.parts)]


def _read(files: list[tuple[str, Path]]) -> Iterator[Document]:
    """The documents of `files`, ordered by a hash of their names, so that a part of them is a fair sample."""
    for name, path in sorted(files, key=lambda file: hashlib.sha256(file[0].encode()).digest()):
        text = _text_of(path)
        if text:
            yield Document(name, text)


def _text_of(path: Path) -> str | None:
    """The file's text, or None when it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _module(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


@lru_cache(maxsize=1)
def _standard_held_out_lines() -> set[str]:
    return long_lines(heldout_documents())


def _package_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _readable(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.is_file() and not hidden and file.suffix in TEXT_FILES | TABLE_FILES.keys()


def _rows(data: Iterable[dict[str, Any]], name: str, column: str) -> Iterator[Document]:
    for number, row in enumerate(data):
        if column not in row:
            raise UsageError(f"{name} has no column {column!r}: choose one of {', '.join(row)} with column=.")
        if row[column]:
            yield Document(f"{name}/{number}", str(row[column]))


def _hub(name: str, config: str | None, split: str, streaming: bool) -> Iterable[dict[str, Any]]:
    path, usual = HUB_NAMES.get(name, (name, None))
    try:
        return _datasets().load_dataset(path, config or usual, split=split, streaming=streaming)
    except UsageError:
        raise
    except Exception as error:  # the hub's libraries raise many kinds, from HTTP errors to FileNotFoundError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"The data set {name!r} could not be loaded from the hub ({reason}): check its name, config and split and "
            "the network, or use a course text, which needs none."
        ) from error


def _datasets():
    try:
        import datasets
    except ImportError:
        raise UsageError("Data sets and tables need the package `datasets`: pip install datasets.") from None
    return datasets
