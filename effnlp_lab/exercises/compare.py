"""Whether two values are the same: kinds, shapes, dtypes, and numbers by the tolerance rule, told in sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Finding:
    """Why an answer is wrong: one sentence for the student, and details to look at."""

    sentence: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Foreign:
    """Stands for a value that cannot leave its process: the name of its type, and the start of its repr."""

    type_name: str
    text: str = ""


def dtype_of(inputs: Any) -> torch.dtype | None:
    """The dtype of the first floating-point tensor among the inputs."""
    for _, leaf in _leaves(inputs):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf.dtype
    return None


def tolerance(expected: torch.Tensor, plain: torch.Tensor | None, dtype: torch.dtype) -> float:
    """Largest error allowed: twice plain PyTorch's, plus the reference's rounding, plus eps(dtype) * max|expected|."""
    finite = expected[torch.isfinite(expected)]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    eps = torch.finfo(dtype).eps
    rounding = 0.5 * eps * largest
    plain_error = 0.0
    if plain is not None:
        gap = (plain.double() - expected).abs()
        gap = gap[torch.isfinite(gap)]
        plain_error = gap.max().item() if gap.numel() else 0.0
    return 2 * plain_error + rounding + eps * largest


def leafwise(change: Callable[..., Any], first: Any, *others: Any) -> Any:
    """The structure `first` with change(leaf, the leaf of each other) for its leaves; tuples become lists.

    The others are of the same form; None stands for None at every leaf.
    """
    if isinstance(first, Mapping):
        parts = {key: [None if other is None else other[key] for other in others] for key in first}
        return {key: leafwise(change, value, *parts[key]) for key, value in first.items()}
    if isinstance(first, (list, tuple)):
        parts = [[None if other is None else other[i] for other in others] for i in range(len(first))]
        return [leafwise(change, value, *rest) for value, rest in zip(first, parts, strict=True)]
    return change(first, *others)


def compare(
    got: Any,
    want: Any,
    plain: Any = None,
    dtype: torch.dtype | None = None,
    rough: bool = False,
    path: str = "your answer",
) -> Finding | None:
    """The first difference between two structures, in a sentence, or None."""
    if isinstance(got, Foreign):
        return Finding(f"{path} is {kind_of(got)}, where {kind_of(want)} was expected", {"got": got.text})
    if isinstance(want, torch.Tensor):
        return _compare_tensors(got, want, plain, dtype, rough, path)
    if isinstance(want, float):
        return _compare_floats(got, want, rough, path)
    if got is None and want is not None:
        return Finding(f"{path} is None, where {kind_of(want)} was expected: is a return missing?")
    if isinstance(want, dict):
        return _compare_maps(got, want, plain, dtype, rough, path)
    if isinstance(want, (list, tuple)):
        return _compare_sequences(got, want, plain, dtype, rough, path)
    if type(got) is not type(want):
        return Finding(f"{path} is {kind_of(got)}, where {kind_of(want)} was expected", {"got": brief(got)})
    if got != want:
        return Finding(f"{path} is {brief(got)}, and {brief(want)} is right")
    return None


def _compare_floats(got, want, rough, path) -> Finding | None:
    if isinstance(got, bool) or not isinstance(got, (int, float)):
        return Finding(f"{path} is {kind_of(got)}, where a number was expected", {"got": brief(got)})
    if math.isnan(got) and not math.isnan(want):
        return Finding(f"{path} is NaN, and {brief(want)} is right: look for 0/0 or inf - inf")
    slack = 1e-3 if rough else 1e-6
    if not (
        got == want or math.isclose(got, want, rel_tol=slack, abs_tol=1e-9) or (math.isnan(got) and math.isnan(want))
    ):
        return Finding(f"{path} is {brief(float(got))}, and {brief(want)} is right")
    return None


def _compare_maps(got, want, plain, dtype, rough, path) -> Finding | None:
    if not isinstance(got, dict):
        return Finding(f"{path} is {kind_of(got)}, where a dict was expected", {"got": brief(got)})
    missing = [k for k in want if k not in got]
    extra = [k for k in got if k not in want]
    if missing:
        return Finding(
            f"{path} lacks the key {brief(missing[0])} ({len(missing)} missing of {len(want)})",
            {"expected": brief(want), "got": brief(got)},
        )
    if extra:
        return Finding(
            f"{path} has a key too many: {brief(extra[0])} ({len(extra)} too many)",
            {"expected": brief(want), "got": brief(got)},
        )
    for key, value in want.items():
        where = f"{path}[{brief(key)}]"
        found = compare(got[key], value, plain[key] if isinstance(plain, dict) else None, dtype, rough, where)
        if found:
            return found
    return None


def _compare_sequences(got, want, plain, dtype, rough, path) -> Finding | None:
    if not isinstance(got, (list, tuple)):
        return Finding(f"{path} is {kind_of(got)}, where {kind_of(want)} was expected", {"got": brief(got)})
    for i, (g, w) in enumerate(zip(got, want, strict=False)):
        p = plain[i] if isinstance(plain, (list, tuple)) and i < len(plain) else None
        found = compare(g, w, p, dtype, rough, f"{path}[{i}]")
        if found:
            return Finding(
                found.sentence,
                {"expected": brief(want), "got": brief(got), **found.details}
                if not isinstance(w, torch.Tensor)
                else found.details,
            )
    if len(got) != len(want):
        return Finding(
            f"{path} has {len(got)} items, and {len(want)} are right", {"expected": brief(want), "got": brief(got)}
        )
    if type(got) is not type(want):
        return Finding(f"{path} is {kind_of(got)}, where {kind_of(want)} was expected")
    return None


def _compare_tensors(got, want, plain, dtype, rough, path) -> Finding | None:
    if got is None:
        return Finding(f"{path} is None, where {kind_of(want)} was expected: is a return missing?")
    if not isinstance(got, torch.Tensor):
        return Finding(f"{path} is {kind_of(got)}, where {kind_of(want)} was expected", {"got": brief(got)})
    if got.shape != want.shape:
        return Finding(f"{path} has shape {tuple(got.shape)}, and {tuple(want.shape)} is right")
    floating = want.is_floating_point()
    if not rough:
        right = (dtype or got.dtype) if want.dtype == torch.float64 and floating else want.dtype
        if got.dtype != right:
            return Finding(f"{path} has dtype {_name(got.dtype)}, and {_name(right)} is right")
    if not want.numel():
        return None
    if not floating:
        if torch.equal(got.cpu(), want.cpu()):
            return None
        at = _position(got.cpu() != want.cpu())
        return Finding(f"{path} differs at {at}: {brief(got[at].item())}, and {brief(want[at].item())} is right")
    got64, want64 = got.detach().cpu().double(), want.detach().cpu().double()
    strange = torch.isnan(got64) & ~torch.isnan(want64)
    if strange.any():
        return Finding(
            f"{path} has NaN at {_position(strange)} ({int(strange.sum())} of {got.numel()} values): "
            "look for 0/0, inf - inf or a fully masked row"
        )
    lacking = torch.isnan(want64) & ~torch.isnan(got64)
    if lacking.any():
        return Finding(f"{path} is {brief(got64[_position(lacking)].item())} at {_position(lacking)}, and NaN is right")
    infinite = torch.isinf(got64) & (got64 != want64)
    if infinite.any():
        return Finding(
            f"{path} is infinite at {_position(infinite)}, where {brief(want64[_position(infinite)].item())} "
            "is right: look for a division by 0 or an overflow"
        )
    gap = torch.where(got64 == want64, torch.zeros_like(got64), (got64 - want64).abs())
    gap = torch.nan_to_num(gap, nan=0.0, posinf=math.inf)
    scale = want64[torch.isfinite(want64)].abs().max().item() if torch.isfinite(want64).any() else 0.0
    allowed = (
        2e-2 * scale + 1e-6
        if rough and got.dtype in (torch.float16, torch.bfloat16)
        else 1e-3 * scale + 1e-6
        if rough
        else tolerance(want64, plain.detach().cpu() if isinstance(plain, torch.Tensor) else None, got.dtype)
    )
    worst = gap.max().item()
    if worst <= allowed:
        return None
    at = _position(gap == gap.max())
    return Finding(
        f"{path} is off by {worst:.3g} at {at}: {got64[at].item():.6g}, and {want64[at].item():.6g} is right "
        f"(allowed: {allowed:.2g})",
        {
            "shape": tuple(got.shape),
            "dtype": _name(got.dtype),
            "largest error": worst,
            "allowed": allowed,
            "values off": f"{int((gap > allowed).sum())} of {gap.numel()}",
        },
    )


def _position(where: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in where.nonzero()[0])


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for k, v in value.items():
            yield from _leaves(v, f"{path}[{k!r}]")
    elif isinstance(value, (list, tuple)):
        for i, v in enumerate(value):
            yield from _leaves(v, f"{path}[{i}]")
    else:
        yield path, value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def kind_of(value: Any) -> str:
    """A value's kind in words: 'a tensor of shape (2, 3)', 'a list of 4', 'None'."""
    if value is None:
        return "None"
    if isinstance(value, torch.Tensor):
        return (
            f"a {_name(value.dtype)} tensor of shape {tuple(value.shape)}"
            if value.dtype != torch.float64
            else f"a tensor of shape {tuple(value.shape)}"
        )
    if isinstance(value, (list, tuple, dict, set)):
        return f"a {type(value).__name__} of {len(value)}"
    name = getattr(value, "type_name", type(value).__name__)
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def brief(value: Any, most: int = 120) -> str:
    """A short repr."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."
