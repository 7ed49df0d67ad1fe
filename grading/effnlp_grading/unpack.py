"""The files in what a learning platform hands out: a zip (with zips in it), a folder, or one file.

Nothing is ever written under a name from an archive. Archives are read in pieces and within limits: what climbs out,
links elsewhere, is locked, or unpacks to far more than it holds is left out, with a sentence, and the rest goes on.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import IO

from effnlp_grading.repair import MOST_BYTES
from effnlp_grading.times import in_utc
from effnlp_lab.errors import UsageError

WANTED = (".ipynb", ".html", ".htm", ".txt", ".csv")
MOST_FILES = 50_000
MOST_ARCHIVE = 512 << 20  # bytes of a zip within a zip
MOST_TOTAL = 8 << 30  # bytes of all that is unpacked
MOST_RATIO = 200  # unpacked to packed bytes, of a file or an archive of more than SMALL
SMALL = 4 << 20
DEEPEST = 3  # zips in zips
_PIECE = 1 << 16
_JUNK = re.compile(r"(^|/)(__MACOSX/|\.ipynb_checkpoints/|\.DS_Store$|\._)")


@dataclass(frozen=True)
class Found:
    """A file: its path (through the archives that it is in), its bytes and when it was written there."""

    path: PurePosixPath
    data: bytes
    written: datetime | None = None


@dataclass(frozen=True)
class LeftOut:
    """A file that is not read, and why."""

    path: PurePosixPath
    why: str


class _TooMuch(Exception):
    """A member that unpacks to more than it may."""


def files_in(source: Path) -> Iterator[Found | LeftOut]:
    """The files of WANTED kinds in a zip, a folder or a file, in the order of their paths; others are passed over.

    Raises UsageError where there is no such file.
    """
    budget = _Budget()
    if source.is_dir():
        yield from _in_folder(source, budget)
    elif not source.is_file():
        raise UsageError(f"There is no file {source}: name the zip, the folder or the notebook that was handed out.")
    elif source.suffix.lower() == ".zip" or zipfile.is_zipfile(source):
        with source.open("rb") as stream:
            yield from _in_zip(stream, PurePosixPath(), source.name, 1, budget)
    else:
        yield from _of_file(source, PurePosixPath(source.name), budget)


@dataclass
class _Budget:
    """What may still be unpacked, of all archives together."""

    files: int = field(default_factory=lambda: MOST_FILES)
    total: int = field(default_factory=lambda: MOST_TOTAL)

    def file(self) -> bool:
        self.files -= 1
        return self.files >= 0


def _in_folder(folder: Path, budget: _Budget) -> Iterator[Found | LeftOut]:
    paths = sorted(Path(where, name) for where, _, names in os.walk(folder) for name in names)
    for path in paths:
        yield from _of_file(path, PurePosixPath(path.relative_to(folder).as_posix()), budget)


def _of_file(path: Path, shown: PurePosixPath, budget: _Budget) -> Iterator[Found | LeftOut]:
    if _JUNK.search(shown.as_posix()):
        return
    if path.is_symlink() or not path.is_file():
        yield LeftOut(shown, "it is a link or no plain file, and links are not followed")
    elif shown.suffix.lower() == ".zip":
        with path.open("rb") as stream:
            yield from _in_zip(stream, shown, shown.name, 1, budget)
    elif shown.suffix.lower() in WANTED:
        facts = path.stat()
        if facts.st_size > MOST_BYTES:
            yield LeftOut(shown, f"it has {facts.st_size:,} bytes, and at most {MOST_BYTES:,} are read")
        else:
            yield Found(shown, path.read_bytes(), in_utc(datetime.fromtimestamp(facts.st_mtime).astimezone()))


def _in_zip(stream: IO[bytes], within: PurePosixPath, name: str, depth: int, budget: _Budget
            ) -> Iterator[Found | LeftOut]:
    shown = within if within.parts else PurePosixPath(name)
    if depth > DEEPEST:
        yield LeftOut(shown, f"it is a zip in a zip in a zip, and at most {DEEPEST} deep are opened")
        return
    try:
        archive = zipfile.ZipFile(stream)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        yield LeftOut(shown, f"it is no zip that can be opened ({str(error)[:100] or type(error).__name__})")
        return
    with archive:
        for member in sorted(archive.infolist(), key=lambda one: one.filename):
            if member.is_dir() or _JUNK.search(member.filename):
                continue
            if not budget.file():
                yield LeftOut(shown, f"it has more than {MOST_FILES:,} files: the rest of them is not read")
                return
            yield from _member(archive, member, within, depth, budget)


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, within: PurePosixPath, depth: int, budget: _Budget
            ) -> Iterator[Found | LeftOut]:
    name = member.filename.replace("\\", "/")
    path = within / PurePosixPath(name.lstrip("/"))
    if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in PurePosixPath(name).parts or "\0" in name:
        yield LeftOut(path, "its path climbs out of the archive")
        return
    if stat.S_ISLNK(member.external_attr >> 16):
        yield LeftOut(path, "it is a link, and links are not followed")
        return
    kind = path.suffix.lower()
    if kind != ".zip" and kind not in WANTED:
        return
    with tempfile.SpooledTemporaryFile(max_size=SMALL) as copy:
        try:
            _copy(archive, member, copy, MOST_ARCHIVE if kind == ".zip" else MOST_BYTES, budget)
        except _TooMuch as error:
            yield LeftOut(path, str(error))
            return
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError, ValueError
                ) as error:
            yield LeftOut(path, f"it cannot be unpacked ({str(error)[:100] or type(error).__name__})")
            return
        copy.seek(0)
        if kind == ".zip":
            yield from _in_zip(copy, path, path.name, depth + 1, budget)
        else:
            yield Found(path, copy.read(), _time_of(member))


def _copy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, copy: IO[bytes], most: int, budget: _Budget) -> None:
    """Unpack a member in pieces, counting what really comes: an archive may say anything about its sizes."""
    got = 0
    with archive.open(member) as packed:
        while piece := packed.read(_PIECE):
            got += len(piece)
            budget.total -= len(piece)
            if got > SMALL and got > MOST_RATIO * max(member.compress_size, 1):
                raise _TooMuch(f"it unpacks to more than {MOST_RATIO} times its size, as zip bombs do")
            if got > most:
                raise _TooMuch(f"it unpacks to more than {most:,} bytes")
            if budget.total < 0:
                raise _TooMuch(f"the archive unpacks to more than {MOST_TOTAL:,} bytes in all")
            copy.write(piece)


def _time_of(member: zipfile.ZipInfo) -> datetime | None:
    try:
        found = datetime(*member.date_time)
    except ValueError:
        return None
    return in_utc(found) if found.year > 1980 else None
