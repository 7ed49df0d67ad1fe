"""Verdicts on disk: one file a submission, one line a verdict, written as each one comes.

A file belongs to one text of a submission (its digest): what was judged of it is never judged again, and is lost
neither when the proctor is killed nor when grading is interrupted.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class Record:
    """The verdicts of one submission. `Record(None, digest)` keeps them in memory only."""

    def __init__(self, path: Path | None, digest: str, facts: Mapping[str, Any] | None = None) -> None:
        self.path, self.digest = path, digest
        self.verdicts: dict[str, dict[str, Any]] = {}
        self.predictions: dict[str, dict[str, Any]] = {}
        self.done: dict[str, Any] | None = None
        lines = read_lines(path) if path is not None else []
        if lines and lines[0].get("submission") == digest:
            if not path.read_bytes().endswith(b"\n"):  # a line was cut off: what follows gets a line of its own
                self._append(None)
            for line in lines[1:]:
                if "exercise" in line:
                    self.verdicts[line["exercise"]] = line
                elif "prediction" in line:
                    self.predictions[line["prediction"]] = line
                elif "finished" in line:
                    self.done = line
        elif path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, json.dumps({"submission": digest, **(facts or {})}) + "\n")

    def keep(self, verdict: Mapping[str, Any]) -> None:
        """Keep a verdict, on an exercise or on a prediction; it is on disk when this returns."""
        if "prediction" in verdict:
            self.predictions[verdict["prediction"]] = dict(verdict)
        else:
            self.verdicts[verdict["exercise"]] = dict(verdict)
        self._append(verdict)

    def finish(self, facts: Mapping[str, Any]) -> None:
        """All of the submission is judged."""
        self.done = {"finished": True, **facts}
        self._append(self.done)

    def _append(self, line: Mapping[str, Any] | None) -> None:
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" if line is None else json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_record(path: Path) -> list[dict[str, Any]]:
    """The verdicts on exercises in a file, in order; lines that were cut off are left out."""
    return verdicts_in(read_lines(path))


def verdicts_in(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a file's lines, the verdicts on exercises."""
    return [line for line in lines if "exercise" in line]


def key_of(folder: Path, name: str) -> bytes:
    """A key of the course in `folder`, made when there is none; nobody else on this machine can read it."""
    path = folder / name
    with contextlib.suppress(FileExistsError):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    return path.read_text().strip().encode()


class Seeds:
    """Seeds that only the course knows: a keyed hash of student, exercise and text. EFFNLP_SEED fixes them all."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def of_course(cls, folder: Path) -> Seeds:
        """With the key of the course in `folder`, made when there is none."""
        return cls(key_of(folder, "seed_key"))

    def seed(self, student: str, exercise: str, digest: str) -> int:
        if os.environ.get("EFFNLP_SEED"):
            return int(os.environ["EFFNLP_SEED"])
        told = hmac.new(self._key, f"{student}/{exercise}/{digest}".encode(), hashlib.sha256).digest()
        return int.from_bytes(told[:4], "big")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What is in a file of records: a header, verdicts, an end; lines that were cut off are left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text("utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):  # the last line may have been cut off
            line = json.loads(text)
            if isinstance(line, dict):
                lines.append(line)
    return lines


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of records, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, "".join(json.dumps(line) + "\n" for line in lines))


def _replace(path: Path, text: str) -> None:
    other = path.with_name(f".{path.name}.{os.getpid()}")
    other.write_text(text, "utf-8")
    other.replace(path)
