"""What the mutation operators ask of a syntax tree, and how they build new nodes."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from effnlp_lab.master import INNER_SCOPES
from effnlp_lab.mutation.tables import SILENT, WORDS

Parents = dict[ast.AST, ast.AST]


def left_alone(node: ast.AST, parents: Parents) -> bool:
    """Whether nothing in a subtree is changed: annotations, decorators, docstrings, prints, and what guards say."""
    parent = parents.get(node)
    if isinstance(node, (ast.JoinedStr, ast.Assert, ast.expr_context)):
        return True
    if isinstance(node, ast.keyword) and node.arg in SILENT:
        return True
    if isinstance(node, ast.Expr) and prints(node.value):
        return True
    if isinstance(parent, ast.Raise):
        return True
    if isinstance(parent, ast.Expr) and isinstance(node, ast.Constant):
        return True
    if isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node in parent.decorator_list:
        return True
    return any(node is getattr(parent, name, None) for name in ("annotation", "returns"))


def altered(node: Any, **fields: Any) -> Any:
    """A copy of `node` that differs in `fields`; the rest is shared."""
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def with_item(items: list, index: int, new: Any) -> list:
    return [*items[:index], new, *items[index + 1 :]]


def neighbours_swapped(items: list[ast.expr]) -> Iterator[list[ast.expr]]:
    """The list with two unequal neighbours swapped, for every such pair."""
    for i, (a, b) in enumerate(pairwise(items)):
        if not isinstance(a, ast.Starred) and not isinstance(b, ast.Starred) and ast.dump(a) != ast.dump(b):
            yield [*items[:i], b, a, *items[i + 2 :]]


def words(old: ast.AST, new: ast.AST) -> str:
    return f"{WORDS[type(old)]}-{WORDS[type(new)]}"


def number_node(value: float) -> ast.expr:
    """A number as the parser writes it: the minus is an operator."""
    return ast.UnaryOp(ast.USub(), ast.Constant(-value)) if value < 0 else ast.Constant(value)


def number(node: ast.AST | None) -> int | float | None:
    """The value of a number, negative ones included; None for anything else (True is no number)."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        inner = number(node.operand)
        return None if inner is None else -inner
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    return None


def is_infinity(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr == "inf"
    return (
        isinstance(node, ast.Call)
        and last_name(node.func) == "float"
        and len(node.args) == 1
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    )


def other_text(text: str | bytes) -> str | bytes:
    if isinstance(text, bytes):
        return b"" if text else b"X"
    return "" if text else "X"


def swapped_axes(pattern: str) -> str | None:
    """An einsum or einops pattern with the last two output axes swapped: 'b q d, b k d -> b k q'."""
    left, arrow, right = pattern.partition("->")
    if not arrow or "(" in right:
        return None
    spaced = " " in right.strip()
    axes = right.split() if spaced else list(right.strip())
    if len(axes) < 2 or axes[-1] == axes[-2]:
        return None
    axes[-2:] = axes[:-3:-1]
    return f"{left}-> {' '.join(axes)}" if spaced else f"{left}->{''.join(axes)}"


def offset(node: ast.expr, delta: int) -> ast.expr:
    """node + delta, folded into a number at the end: i + 1 becomes i + 2, or i."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)) and type(number(node.right)) is int:
        delta += number(node.right) if isinstance(node.op, ast.Add) else -number(node.right)
        node = node.left
    if not delta:
        return node
    return ast.BinOp(node, ast.Add() if delta > 0 else ast.Sub(), ast.Constant(abs(delta)))


def is_range(function: ast.expr) -> bool:
    if isinstance(function, ast.Name):
        return function.id == "range"
    return isinstance(function, ast.Attribute) and function.attr == "arange" and last_name(function.value) != "tl"


def counts_places(index: ast.expr) -> bool:
    """Whether an index may be a number that is worked out: not a slice, a constant or a mask."""
    if isinstance(index, ast.BinOp):
        return not isinstance(index.op, (ast.BitAnd, ast.BitOr, ast.BitXor))
    return isinstance(index, (ast.Name, ast.Attribute, ast.Call, ast.Subscript))


def is_launch(node: ast.Subscript, parents: Parents) -> bool:
    """kernel[grid](...)"""
    parent = parents.get(node)
    return isinstance(parent, ast.Call) and parent.func is node


def last_name(function: ast.expr) -> str:
    """The last part of a dotted name."""
    return getattr(function, "attr", getattr(function, "id", ""))


def formats_text(node: ast.BinOp) -> bool:
    return (
        isinstance(node.op, ast.Mod)
        and isinstance(node.left, (ast.JoinedStr, ast.Constant))
        and isinstance(getattr(node.left, "value", ""), (str, bytes))
    )


def prints(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and last_name(node.func) in ("print", "warn")


def only_moves(node: ast.Call) -> bool:
    """x.to(device), x.to(y.device), x.to("cpu"): on a CPU, x."""
    arguments = [*node.args, *(k.value for k in node.keywords)]
    return (
        last_name(node.func) == "to"
        and bool(arguments)
        and all(isinstance(a, ast.Constant) or last_name(a) == "device" for a in arguments)
    )


def function_around(node: ast.AST, parents: Parents) -> Any:
    while not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Module)):
        node = parents[node]
    return node


def stays_defined(node: ast.Assign | ast.AnnAssign, parents: Parents) -> bool:
    """Whether every name that a statement assigns to has a value before it: a parameter, or assigned further up."""
    if isinstance(node, ast.AnnAssign) and node.value is None:
        return False
    function = function_around(node, parents)
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    names = {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    known = {a.arg for a in ast.walk(function.args) if isinstance(a, ast.arg)} if hasattr(function, "args") else set()
    for other in _own_nodes(function):
        if isinstance(other, ast.Name) and isinstance(other.ctx, ast.Store):
            if (other.lineno, other.col_offset) < (node.lineno, node.col_offset):
                known.add(other.id)
        elif isinstance(other, (ast.Global, ast.Nonlocal)):
            known.update(other.names)
    return names <= known


def _own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a function's own scope: not those of functions, lambdas and comprehensions inside it."""
    for node in ast.iter_child_nodes(function):
        if not isinstance(node, INNER_SCOPES):
            yield node
            yield from _own_nodes(node)
