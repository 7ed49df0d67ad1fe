"""What a reference is made of: random cases, right outputs, and the known mistakes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from effnlp_lab.exercises.compare import Finding, compare, dtype_of
from effnlp_lab.exercises.spec import Variant


@dataclass(frozen=True)
class Case:
    """One named input. `budget` is a multiple of what the reference's `frugal` run costs, by meter name."""

    name: str
    inputs: Mapping[str, Any]
    part: str = "core"
    device: Literal["any", "cuda"] = "any"
    budget: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None


@dataclass(frozen=True)
class Edit:
    """A slip: in the solution's source `old`, which occurs there exactly once, becomes `new`."""

    old: str
    new: str


@dataclass(frozen=True)
class Mistake:
    """A wrong answer that students really give, and the sentence to show.

    `change` is one or more edits of the solution, or the whole text of a wrong cell. `seen_on` "cpu" says that only
    Triton's interpreter is sure to show it: a wild read whose value is masked away leaves no trace on a card, and a
    race ends differently there every time.
    """

    name: str
    sentence: str
    change: Edit | tuple[Edit, ...] | str
    seen_on: Literal["any", "cpu"] = "any"


def edit(old: str, new: str) -> Edit:
    return Edit(old, new)


class Rng:
    """Random inputs, the same for the same seed on every machine: Python's `random` and a CPU torch generator."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.torch = torch.Generator("cpu").manual_seed(seed % (1 << 63))

    def int(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return self._random.randint(low, high)

    def ints(self, count: int, low: int, high: int) -> list[int]:
        return [self._random.randint(low, high) for _ in range(count)]

    def choice(self, options: Sequence) -> Any:
        return self._random.choice(options)

    def shuffled(self, items: Sequence) -> list:
        return self._random.sample(items, len(items))

    def float(self, low: float = 0.0, high: float = 1.0) -> float:
        return self._random.uniform(low, high)

    def bytes(self, count: int) -> bytes:
        return self._random.randbytes(count)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=self.torch, dtype=torch.float32) * scale).to(dtype)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.rand(*shape, generator=self.torch, dtype=torch.float32).to(dtype)


class Reference:
    """Judges one exercise. A lab's reference.py has a subclass for each, in `REFERENCES`."""

    exercise: str
    mistakes: tuple[Mistake, ...] = ()

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        """Random named cases, the nasty ones too; tensors on the CPU."""
        raise NotImplementedError

    def expected(self, inputs: Mapping[str, Any], variant: Variant) -> Any:
        """The right outputs; floating-point tensors in float64."""
        raise NotImplementedError

    def plain(self, inputs: Mapping[str, Any], variant: Variant) -> Any:
        """The outputs of plain PyTorch in the inputs' own dtype, whose error sets the tolerance; None: exact."""
        return None

    def frugal(self, inputs: Mapping[str, Any], variant: Variant) -> Any:
        """The implementation whose cost a budget is a multiple of. Needed only by cases that have a budget."""
        raise NotImplementedError

    def verify(self, inputs: Mapping[str, Any], outputs: Any, expected: Any, variant: Variant) -> Finding | None:
        """None when the outputs are right. By default: same kinds, shapes, dtypes, and values by the tolerance rule."""
        return compare(outputs, expected, self.plain(inputs, variant), dtype_of(inputs))

    def same_slip(self, outputs: Any, wrong: Any) -> bool:
        """Whether a student's wrong outputs are those of a known mistake."""
        return compare(outputs, wrong, None, None, rough=True) is None
