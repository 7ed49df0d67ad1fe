"""What an exercise is called, what it is worth, and within which limits it is judged."""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

Variant = Mapping[str, str]


class SpecError(ValueError):
    """A spec that contradicts itself; the sentence says where."""


@dataclass(frozen=True)
class Exercise:
    """One blank in a lab.

    `parts` shares out the points: every case of the reference names a part, and a part is earned when all of its
    cases pass. Cases that need a GPU belong to no part: they are counted apart (see `gpu_points`). `seconds` limits
    one case on a CPU, compilation apart. `forbidden` names modules, functions and operations that would answer for
    the student. The first value of every entry of `variants` is the public one. An exercise that is the `twin_of`
    another shares its points: a student solves either. `may_modify` names inputs that an answer may change; `fresh`
    says that the answer must not share memory with its inputs.
    """

    name: str
    points: float
    minutes: int
    difficulty: Literal[1, 2, 3, 4, 5]
    title: str
    signature: str
    kind: Literal["core", "stretch"] = "core"
    parts: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({"core": 1.0}))
    seconds: float = 10.0
    forbidden: tuple[str, ...] = ()
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    variant_text: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    needs_gpu: bool = False
    needs_triton: bool = False
    twin_of: str | None = None
    may_modify: tuple[str, ...] = ()
    fresh: bool = False

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise SpecError(f"exercise {self.name!r}: the name must be a Python identifier")
        if not (math.isfinite(self.points) and self.points >= 0):
            raise SpecError(f"exercise {self.name}: points must be a finite number of at least 0, not {self.points}")
        if not math.isclose(sum(self.parts.values()), 1.0, abs_tol=1e-9) or min(self.parts.values()) <= 0:
            raise SpecError(f"exercise {self.name}: the shares of its parts must be positive and add up to 1")
        if not 1 <= self.difficulty <= 5:
            raise SpecError(f"exercise {self.name}: difficulty goes from 1 to 5, not {self.difficulty}")

    def public_variant(self) -> Variant:
        """The variant that everybody has who gives no name."""
        return {name: values[0] for name, values in self.variants.items()}

    def variant_of(self, student: str | None, key: str = "") -> Variant:
        """The variant of one student: a keyed hash (HMAC-SHA256) picks each parameter. Nobody's is the public one."""
        if not student:
            return self.public_variant()
        chosen = {}
        for name, values in self.variants.items():
            digest = hmac.new(key.encode(), f"{student}/{self.name}/{name}".encode(), hashlib.sha256).digest()
            chosen[name] = values[int.from_bytes(digest[:8], "big") % len(values)]
        return chosen

    def score(self, passed: Mapping[str, bool]) -> float:
        """Points for the parts that passed: a plain, finite float between 0 and `points`."""
        if all(passed.get(part, False) for part in self.parts):
            return float(self.points)
        share = sum(share for part, share in self.parts.items() if passed.get(part, False))
        return round(float(self.points) * share, 2)


@dataclass(frozen=True)
class Lab:
    """One notebook: its exercises in order, its room, and what a course needs to know to plan it."""

    name: str
    title: str
    hours: float
    exercises: tuple[Exercise, ...]
    room: str | None = None
    graded: bool = True
    summary: str = ""
    prerequisites: str = "PyTorch modules and autograd, softmax attention"

    def __post_init__(self) -> None:
        names = [e.name for e in self.exercises]
        if len(set(names)) != len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise SpecError(f"lab {self.name}: two exercises are called {twice!r}; give one another name")

    @property
    def number(self) -> str:
        return self.name.partition("_")[0]

    @property
    def notebook(self) -> str:
        """The notebook's name without its number or ending: '06_flash_attention' holds 'flash_attention'."""
        return self.name.partition("_")[2]

    @property
    def points(self) -> float:
        """All that the lab is worth; a Triton exercise and its PyTorch twin count once."""
        return float(sum(e.points for e in self.exercises if e.twin_of is None))

    def exercise(self, name: str) -> Exercise:
        for exercise in self.exercises:
            if exercise.name == name:
                return exercise
        raise SpecError(f"lab {self.name} has no exercise {name!r}; it has {', '.join(e.name for e in self.exercises)}")
