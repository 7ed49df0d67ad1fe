"""What an exercise is called, what it is worth, and within which limits it is judged; what else a lab asks for."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

Variant = Mapping[str, str]

PREDICTION_POINTS = 0.25  # of one prediction, by closeness; 0 for none
WRITTEN_POINTS = 1.0  # of one written answer, by a person with a rubric


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
            chosen[name] = values[_hashed(key, f"{student}/{self.name}/{name}") % len(values)]
        return chosen

    def all_variants(self) -> list[Variant]:
        """Every combination of the parameters' values, the public one first."""
        return [dict(zip(self.variants, values, strict=True)) for values in itertools.product(*self.variants.values())]

    def in_words(self, variant: Variant) -> str:
        """What a variant asks for, in the sentences that the notebook shows."""
        return " ".join(self.variant_text.get(value, f"Your {name}: {value}.") for name, value in variant.items())

    def score(self, passed: Mapping[str, bool]) -> float:
        """Points for the parts that passed: a plain, finite float between 0 and `points`."""
        if all(passed.get(part, False) for part in self.parts):
            return float(self.points)
        share = sum(share for part, share in self.parts.items() if passed.get(part, False))
        return round(float(self.points) * share, 2)


@dataclass(frozen=True)
class Guess:
    """One number that a student predicts: `variable` as the notebook spells it, `my_growth["tiled"]` say.

    `low` to `high` is what the measurement gives, from machine to machine; `full` is another such range where a GPU
    and the full size give another number. The nearer range counts.
    """

    variable: str
    low: float
    high: float
    full: tuple[float, float] | None = None

    @property
    def ranges(self) -> tuple[tuple[float, float], ...]:
        return ((self.low, self.high),) if self.full is None else ((self.low, self.high), self.full)


@dataclass(frozen=True)
class Prediction:
    """Numbers that a student writes down before a measurement, graded by how close they are.

    Within a guess's range a number earns its whole share. Beyond, the share falls in a straight line to nothing at
    `reach`: a factor (counted in logarithms), or, with scale "difference", a distance.
    """

    name: str
    guesses: tuple[Guess, ...]
    reach: float = 3.0
    scale: Literal["ratio", "difference"] = "ratio"
    points: float = PREDICTION_POINTS

    def __post_init__(self) -> None:
        ratio = self.scale == "ratio"
        ranges = [pair for guess in self.guesses for pair in guess.ranges]
        if not ranges or self.reach <= ratio or any(low > high or (ratio and low <= 0) for low, high in ranges):
            raise SpecError(f"prediction {self.name}: expected guesses of low <= high (above 0 for a ratio), and a "
                            "reach above 1 for a ratio, above 0 for a difference")


@dataclass(frozen=True)
class Written:
    """A question that is answered in words. A person grades it; the rubric stands in the master."""

    name: str
    points: float = WRITTEN_POINTS


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
    predictions: tuple[Prediction, ...] = ()
    written: tuple[Written, ...] = ()

    def __post_init__(self) -> None:
        names = [one.name for one in (*self.exercises, *self.predictions, *self.written)]
        if len(set(names)) != len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise SpecError(f"lab {self.name}: two things are called {twice!r}; give one another name")

    @property
    def number(self) -> str:
        return self.name.partition("_")[0]

    @property
    def notebook(self) -> str:
        """The notebook's name without its number or ending: '06_flash_attention' holds 'flash_attention'."""
        return self.name.partition("_")[2]

    @property
    def points(self) -> float:
        """All that the lab is worth: what its checks give, its predictions and its written answers."""
        return self.checked_points + float(sum(one.points for one in (*self.predictions, *self.written)))

    @property
    def checked_points(self) -> float:
        """What the checks give in all; a Triton exercise and its PyTorch twin count once."""
        return float(sum(e.points for e in self.exercises if e.twin_of is None))

    def variant_of(self, exercise: str, student: str | None, key: str = "") -> Variant:
        """One student's variant of an exercise.

        With a key, nobody has the public variant of every core exercise of a lab: one of them, which the key picks
        too, is another then. So the public solution, pasted unchanged, fails somewhere for everybody.
        """
        spec = self.exercise(exercise)
        core = [e for e in self.exercises if e.kind == "core" and e.variants]
        mine = spec.variant_of(student, key)
        if not (student and key and core) or any(e.variant_of(student, key) != e.public_variant() for e in core):
            return mine
        drawn = _hashed(key, f"{student}/{self.name}")
        if core[drawn % len(core)] is not spec:
            return mine
        others = [variant for variant in spec.all_variants() if variant != spec.public_variant()]
        return others[drawn // len(core) % len(others)]

    def prediction(self, name: str) -> Prediction:
        """The prediction of that name. Raises SpecError where there is none."""
        found = next((one for one in self.predictions if one.name == name), None)
        if found is None:
            raise SpecError(f"lab {self.name} has no prediction {name!r}; "
                            f"it has {', '.join(p.name for p in self.predictions) or 'none'}")
        return found

    def exercise(self, name: str) -> Exercise:
        for exercise in self.exercises:
            if exercise.name == name:
                return exercise
        raise SpecError(f"lab {self.name} has no exercise {name!r}; it has {', '.join(e.name for e in self.exercises)}")


def _hashed(key: str, text: str) -> int:
    """A number that only who has the key can tell: HMAC-SHA256."""
    return int.from_bytes(hmac.new(key.encode(), text.encode(), hashlib.sha256).digest()[:8], "big")
