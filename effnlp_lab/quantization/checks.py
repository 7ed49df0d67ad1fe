"""What the room accepts, and the sentences for what it does not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from effnlp_lab.errors import UsageError

BITS = (2, 3, 4, 8)


def check_bits(bits: int) -> int:
    """The highest code of `bits` bits. Raises UsageError for bits that are not offered."""
    if isinstance(bits, bool) or bits not in BITS:
        raise UsageError(f"{bits!r} bits are not offered: choose one of {', '.join(map(str, BITS))}.")
    return (1 << bits) - 1


def check_group_size(group_size: int | None, columns: int, name: str = "the weight") -> int:
    """The columns of a group; None (or -1) makes one group of a row. Raises UsageError where it does not divide."""
    if group_size is None or group_size == -1:
        return columns
    if group_size < 1 or columns % group_size:
        fitting = [size for size in (16, 32, 64, 128, 256) if columns % size == 0]
        choices = ", ".join(map(str, fitting)) + " or None" if fitting else "None"
        raise UsageError(
            f"A group size of {group_size} does not divide the {columns} input columns of {name}: choose {choices} "
            "(None is one group for a whole row)."
        )
    return group_size


def check_weight(weight: Tensor, name: str = "the weight") -> Tensor:
    """A matrix of finite floats [rows, columns]. Raises UsageError for other shapes, NaN and infinity."""
    if weight.ndim != 2 or not weight.is_floating_point():
        raise UsageError(
            f"{name} is {str(weight.dtype)[6:]} of shape {list(weight.shape)}: expected floats [rows, columns]."
        )
    if not torch.isfinite(weight).all():
        row, column = (~torch.isfinite(weight)).nonzero()[0].tolist()
        raise UsageError(
            f"{name} holds {weight[row, column].item()} at row {row}, column {column}: quantize finite weights "
            "(was the checkpoint saved after training diverged?)."
        )
    return weight


def check_hessian(hessian: Tensor, columns: int, name: str = "the weight") -> Tensor:
    """A square float matrix with a row for each input column of the weight. Raises UsageError for other shapes."""
    if tuple(hessian.shape) != (columns, columns) or not hessian.is_floating_point():
        raise UsageError(
            f"The Hessian of {name} has shape {list(hessian.shape)} for {columns} input columns: expected floats of "
            f"shape [{columns}, {columns}], from inputs of this very layer."
        )
    return hessian


def check_modules(patterns: Sequence[str], names: Iterable[str]) -> list[str]:
    """The names of linear modules that one of the patterns is, or is the last part of ("q_proj", "mlp.up_proj").

    Raises UsageError, with the nearest names, for a pattern that matches nothing.
    """
    names = list(names)
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            endings = {".".join(name.split(".")[-n:]) for name in names for n in range(1, name.count(".") + 2)}
            near = difflib.get_close_matches(pattern, sorted(endings, key=lambda n: (len(n), n)), n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(_last_parts(names))}."
            raise UsageError(f"No linear module is called {pattern!r}: {hint}")
    return [name for name in names if any(_matches(name, pattern) for pattern in patterns)]


def _matches(name: str, pattern: str) -> bool:
    return bool(pattern) and (name == pattern or name.endswith(f".{pattern}"))


def _last_parts(names: list[str]) -> list[str]:
    return sorted({name.split(".")[-1] for name in names})[:8]
