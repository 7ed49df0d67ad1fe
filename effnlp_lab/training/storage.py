"""The files of a run: a checkpoint that is whole or absent, the best weights, and a log with one JSON line a step.

A checkpoint is written beside the old one, flushed to the disk, and only then named in `checkpoint.json`, which is
replaced in one step: a process killed at any moment leaves the old or the new, never half of one. `checkpoint.json`
also holds size and SHA-256, so that a file that was cut or damaged later is refused and not loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effnlp_lab.errors import UsageError


class RunFolder:
    """Where one run keeps its files."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.log_path = self.path / "log.jsonl"

    def save(self, name: str, step: int, content: dict[str, Any]) -> Path:
        """Write `content` as the newest file `name` ("checkpoint" or "best"), and remove the older one.

        Raises UsageError for what could not be read again: the reader takes tensors and plain values alone, no code.
        """
        check_plain(content, name)
        self.path.mkdir(parents=True, exist_ok=True)
        target = self.path / f"{name}-{step:09d}.pt"
        part = target.with_suffix(".part")
        with part.open("wb") as file:
            torch.save(content, file)
            _flush(file)
        record = {"file": target.name, "step": step, "bytes": part.stat().st_size, "sha256": _sha256(part)}
        os.replace(part, target)
        self._write_text(self.path / f"{name}.json", json.dumps(record, indent=1) + "\n")
        for old in self.path.glob(f"{name}-*"):
            if old != target:
                old.unlink()
        return target

    def load(self, name: str) -> dict[str, Any] | None:
        """The newest file `name`, on the CPU, or None where there is none. Raises UsageError where it is damaged."""
        index = self.path / f"{name}.json"
        if not index.exists():
            return None
        try:
            record = json.loads(index.read_text(encoding="utf-8"))
            target, size, digest = self.path / record["file"], record["bytes"], record["sha256"]
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{index} is damaged: {_what_to_do(self.path, name)}") from None
        if not target.exists():
            raise UsageError(f"{index.name} names {target}, which is not there: {_what_to_do(self.path, name)}")
        found = target.stat().st_size
        if found != size:
            raise UsageError(f"{target} has {found:,} of {size:,} bytes, so it was cut: {_what_to_do(self.path, name)}")
        if _sha256(target) != digest:
            raise UsageError(f"{target} was changed after it was written: {_what_to_do(self.path, name)}")
        return torch.load(target, map_location="cpu", weights_only=True)

    def step_of(self, name: str) -> int | None:
        """The step of the newest file `name`, or None."""
        try:
            return int(json.loads((self.path / f"{name}.json").read_text(encoding="utf-8"))["step"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def clear(self) -> None:
        """Remove the checkpoint, the best weights and the log of an earlier run."""
        for name in ("checkpoint", "best"):
            (self.path / f"{name}.json").unlink(missing_ok=True)
            for old in self.path.glob(f"{name}-*"):
                old.unlink()
        self.log_path.unlink(missing_ok=True)

    def append_log(self, lines: Iterable[dict[str, Any]]) -> None:
        """Add lines to the log."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def read_log(self) -> list[dict[str, Any]]:
        """Every line of the log; a last line that was cut by a kill is left out."""
        if not self.log_path.exists():
            return []
        found = []
        for line in self.log_path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def cut_log(self, step: int) -> None:
        """Drop the lines of steps after `step`: they will be run again."""
        if self.log_path.exists():
            kept = [json.dumps(line) + "\n" for line in self.read_log() if line.get("step", 0) <= step]
            self._write_text(self.log_path, "".join(kept))

    def _write_text(self, path: Path, text: str) -> None:
        part = path.with_name(path.name + ".part")
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            _flush(file)
        os.replace(part, path)
        if os.name == "posix":  # the new name itself reaches the disk with its folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


PLAIN = (Tensor, nn.Parameter, str, bytes, int, float, bool, type(None), torch.dtype, torch.device, torch.Size)


def check_plain(value: Any, where: str) -> None:
    """Refuse, by its place, what is neither a tensor nor a plain value nor a dict, list or tuple of such."""
    if type(value) in (dict, OrderedDict):
        for key, inner in value.items():
            check_plain(inner, f"{where}.{key}")
    elif type(value) in (list, tuple):
        if value and not all(type(inner) in (int, float) for inner in value):
            for index, inner in enumerate(value):
                check_plain(inner, f"{where}.{index}")
    elif type(value) not in PLAIN:
        raise UsageError(
            f"{where} is a {type(value).__name__}, which a checkpoint cannot hold: let state_dict() give tensors, "
            "numbers, strings, and dicts and lists of them."
        )


def check_same_model(saved: Mapping[str, Tensor], model: nn.Module, where: Path) -> None:
    """Refuse weights of another model, and name the first difference."""
    own = model.state_dict()
    for name in [*own, *saved]:
        if name not in saved or name not in own:
            which = "the checkpoint lacks" if name not in saved else "this model lacks"
            raise UsageError(f"{where} is of another model: {which} {name!r}. Use another folder, or that model.")
        if saved[name].shape != own[name].shape or saved[name].dtype != own[name].dtype:
            kinds = " and ".join(f"{tuple(x.shape)} {str(x.dtype)[6:]}" for x in (saved[name], own[name]))
            raise UsageError(
                f"{where} is of another model: {name!r} is {kinds} in checkpoint and model. Use another folder, or "
                "that model."
            )


def _what_to_do(path: Path, name: str) -> str:
    return f"restore the file, or delete {path / (name + '*')} to start anew."


def _flush(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
