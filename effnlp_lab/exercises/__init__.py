"""The exercises of every lab: spec, drive and reference, found by the lab's folder name."""

from __future__ import annotations

import base64
import difflib
import functools
import json
import zlib
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from effnlp_lab.errors import EffnlpError
from effnlp_lab.exercises.spec import Exercise, Lab

if TYPE_CHECKING:
    from effnlp_lab.exercises.reference import Reference

_HERE = Path(__file__).parent


def lab_names() -> list[str]:
    """Folder names of the labs that have a spec, in order."""
    return sorted(p.parent.name for p in _HERE.glob("[0-9][0-9]_*/spec.py"))


@functools.cache
def lab(name: str) -> Lab:
    """The lab called `name`: its folder, its number or its title word ('01_tokenization', '01', 'tokenization')."""
    names = lab_names()
    for full in names:
        if name in (full, full[:2], full[3:]):
            return import_module(f"{__name__}.{full}.spec").LAB
    near = difflib.get_close_matches(name, [*names, *(n[3:] for n in names)], n=2)
    hint = f"did you mean {' or '.join(near)}" if near else f"there are {', '.join(names)}"
    raise EffnlpError(f"There is no lab {name!r}: {hint}.")


@functools.cache
def find(exercise: str) -> tuple[Lab, Exercise]:
    """The exercise of that name and its lab; names are unique across the labs."""
    everything = {e.name: (one, e) for one in map(lab, lab_names()) for e in one.exercises}
    if exercise not in everything:
        near = difflib.get_close_matches(exercise, everything, n=2)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise EffnlpError(f"There is no exercise {exercise!r}.{hint}")
    return everything[exercise]


def drive_module(lab_name: str) -> ModuleType:
    """How the lab's answers are called. It runs beside the student's code and imports torch alone."""
    return import_module(f"{__name__}.{lab_name}.drive")


def reference_module(lab_name: str) -> ModuleType:
    """Cases, right outputs and known mistakes of the lab: the trusted side."""
    return import_module(f"{__name__}.{lab_name}.reference")


def reference_of(exercise: str) -> Reference:
    """What judges the exercise called `exercise`."""
    owner, spec = find(exercise)
    return reference_module(owner.name).REFERENCES[spec.name]


@functools.cache
def sources(lab_name: str) -> dict[str, Any]:
    """Texts that `effnlp build` derives from the lab's master: given code, blanks, known mistakes spelled out."""
    path = _HERE / lab_name / "sources.json"
    found = json.loads(path.read_text("utf-8")) if path.exists() else {"given": "", "exercises": {}}
    for texts in found["exercises"].values():
        if isinstance(texts["mistakes"], str):  # packed, in a student's repository
            texts["mistakes"] = json.loads(zlib.decompress(base64.b85decode(texts["mistakes"])))
    return found
