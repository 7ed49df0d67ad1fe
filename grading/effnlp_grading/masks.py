"""What a submission must not see of the kit and of the libraries: all that would answer for the student."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import effnlp_lab
from effnlp_lab import exercises

KIT = Path(effnlp_lab.__file__).resolve().parent
ANSWERING = ("flash_attn", "peft", "bitsandbytes", "liger_kernel", "xformers")  # in every lab
ABSENT = 'raise ModuleNotFoundError(f"{__name__} is not here while an answer is graded", name=__name__)\n'
SUPPORT = frozenset({"torch", "numpy", "triton", "regex", "scipy"})  # never masked whole: answers are written with them


@cache
def masked_modules(lab: str) -> tuple[str, ...]:
    """Top-level packages and rooms of the kit that are masked for a lab: its room, and what its exercises forbid."""
    spec = exercises.lab(lab)
    named = {name for exercise in spec.exercises for name in exercise.forbidden if "::" not in name}
    whole = {name for name in named if "." not in name and name not in SUPPORT}
    rooms = {name for name in named if name.startswith("effnlp_lab.") and name.count(".") == 1}
    own = {f"effnlp_lab.{spec.room}"} if spec.room else set()
    return tuple(sorted(whole | rooms | own | set(ANSWERING)))


def kit_masks(lab: str) -> Iterator[tuple[str, bool]]:
    """Paths within effnlp_lab that are masked, and whether each is a folder: rooms, references, built answers."""
    for name in masked_modules(lab):
        package, _, room = name.partition(".")
        if package == "effnlp_lab" and (KIT / room).is_dir():
            yield room, True
    for folder in sorted(p for p in (KIT / "exercises").iterdir() if p.is_dir()):
        for name in ("reference.py", "sources.json"):
            if (folder / name).is_file():
                yield f"exercises/{folder.name}/{name}", False
        for cached in folder.rglob("__pycache__"):
            yield str(cached.relative_to(KIT)), True
    for name in ("mutation", "course/recipe"):
        if (KIT / name).is_dir():
            yield name, True


def library_masks(lab: str) -> Iterator[tuple[Path, bool]]:
    """Files and folders of installed libraries that are masked, and whether each is a folder."""
    owners = _distributions()
    for name in masked_modules(lab):
        if "." in name:
            continue
        spec = importlib.util.find_spec(name)
        if spec is None:
            continue
        if spec.submodule_search_locations:
            yield from ((Path(place), True) for place in spec.submodule_search_locations if Path(place).is_dir())
        elif spec.origin and Path(spec.origin).is_file():
            yield Path(spec.origin), False
        for owner in owners.get(name, ()):
            folder = getattr(metadata.distribution(owner), "_path", None)  # its metadata: availability checks read it
            if folder is not None and Path(folder).is_dir():
                yield Path(folder), True


@cache
def _distributions() -> dict[str, list[str]]:
    return dict(metadata.packages_distributions())
