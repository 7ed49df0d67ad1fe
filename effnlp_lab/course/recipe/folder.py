"""The folder that the recipe works in: whose it is, which stage runs, and files that are whole or not there."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from effnlp_lab.course.recipe.settings import Recipe
from effnlp_lab.course.text import text_version
from effnlp_lab.errors import UsageError

FREE = ("compile", "checkpoint_seconds")  # settings that change no product
OF_THE_BASE = ("base", "library_repeats", "seed")  # settings that no earlier stage depends on


def claim(folder: Path, recipe: Recipe) -> None:
    """Note in the folder what it is for. Raises UsageError when it holds products of other settings, or of other text.

    Settings of a stage that has not begun may still change: `recipe.json` follows.
    """
    wanted = {"recipe": json.loads(json.dumps(asdict(recipe))), "text": text_version("course-train")}
    path = folder / "recipe.json"
    if path.exists():
        held = read_json(path)
        for name, value in wanted["recipe"].items():
            if held["recipe"].get(name) != value and _begun(folder, name):
                raise UsageError(
                    f"{folder} was begun with other settings ({name} differs): give the same ones to go on, or another "
                    "--folder to start anew."
                )
        if held["text"] != wanted["text"]:
            raise UsageError(
                f"{folder} was begun on other text ({held['text']}; here it is {wanted['text']}): go on there, or give "
                "another --folder."
            )
    write_json(path, wanted)


def _begun(folder: Path, setting: str) -> bool:
    """Whether a stage that depends on this setting has begun."""
    if setting in FREE:
        return False
    if setting == "draft":
        return (folder / "draft").exists() or (folder / "draft.json").exists()
    return setting not in OF_THE_BASE or (folder / "base").exists() or (folder / "base.json").exists()


@contextmanager
def stage(folder: Path, name: str) -> Iterator[None]:
    """Say which stage runs, and add its time to `times.json`, also when it is interrupted."""
    print(f"{name} ...", flush=True)
    begin = time.perf_counter()
    try:
        yield
    finally:
        times = read_times(folder)
        times[name] = round(times.get(name, 0.0) + time.perf_counter() - begin, 2)
        write_json(folder / "times.json", times)
    print(f"{name}: {times[name]:.1f} s so far", flush=True)


def read_times(folder: Path) -> dict[str, float]:
    """Wall-clock seconds of each stage, all calls together."""
    path = folder / "times.json"
    return read_json(path) if path.exists() else {}


def read_json(path: Path) -> Any:
    """Raises UsageError for a file that is missing or holds no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} is missing: bring the whole folder, or give another to start anew.") from None
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}): remove the folder to start anew.") from None


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    from effnlp_lab.streaming.shards import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1) + "\n")
