"""Predictions as numbers: read from a cell's text, which is never run, and graded by how close they are."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from typing import Any

from effnlp_lab.exercises.spec import Guess, Prediction

_OPERATORS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: lambda a, b: a**b if abs(b) <= 64 else math.nan,
}


def closeness(prediction: Prediction, guess: Guess, value: float) -> float:
    """From 0 to 1: 1 within the guess's range, and less in a straight line down to 0 at the prediction's reach."""
    return max(_within(prediction, low, high, value) for low, high in guess.ranges)


def _within(prediction: Prediction, low: float, high: float, value: float) -> float:
    if low <= value <= high:
        return 1.0
    bound = low if value < low else high
    if prediction.scale == "difference":
        return max(0.0, 1.0 - abs(value - bound) / prediction.reach)
    return max(0.0, 1.0 - abs(math.log(value / bound)) / math.log(prediction.reach)) if value > 0 else 0.0


def in_words(guess: Guess) -> str:
    """What the measurement gives: "12 to 13, or 7 to 8 on a GPU at full size"."""
    told = [f"{low:g}" + (f" to {high:g}" if high > low else "") for low, high in guess.ranges]
    return told[0] if len(told) == 1 else f"{told[0]}, or {told[1]} on a GPU at full size"


def points_of(prediction: Prediction, values: Mapping[str, float | None]) -> float:
    """What predicted values earn; a guess without a value earns nothing of its share."""
    shares = [closeness(prediction, g, v) for g in prediction.guesses if (v := values.get(g.variable)) is not None]
    return round(prediction.points * sum(shares) / len(prediction.guesses), 2)


def predicted_values(prediction: Prediction, source: str) -> dict[str, float | None]:
    """Variable of each guess -> the number that a cell's text gives it, None where it gives none.

    Numbers may be spelled out with + - * / and **; a cell that computes them otherwise gives none.
    """
    found: dict[str, Any] = {}
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        body = []
    for node in body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                found[ast.unparse(target)] = _value(node.value)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            found[ast.unparse(node.target)] = _value(node.value)
    return {guess.variable: _looked_up(found, guess.variable) for guess in prediction.guesses}


def base_name(variable: str) -> str:
    """The name that a guess's variable begins with: my_growth of my_growth["tiled"]."""
    return variable.partition("[")[0]


def _looked_up(found: Mapping[str, Any], variable: str) -> float | None:
    name, _, key = variable.partition("[")
    value = found.get(ast.unparse(ast.parse(variable)), found.get(name))
    if key and isinstance(value, dict):
        value = value.get(ast.literal_eval(key.rstrip("]")))
    return value if isinstance(value, float) and math.isfinite(value) else None


def _value(node: ast.expr) -> Any:
    """A number as float, a dict of such; None for everything else."""
    try:
        if isinstance(node, ast.Dict):
            return {ast.literal_eval(k): _value(v) for k, v in zip(node.keys, node.values, strict=True) if k}
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            inner = _value(node.operand)
            return -inner if isinstance(node.op, ast.USub) else inner
        if isinstance(node, ast.BinOp):
            return float(_OPERATORS[type(node.op)](_value(node.left), _value(node.right)))
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return float(node.value)
    except (ArithmeticError, KeyError, TypeError, ValueError, RecursionError):
        pass
    return None
