"""The mutation operators: which small changes of a syntax tree to try. See `OPERATORS` for the list.

An operator is a function of a node that yields changes: an operator's name, the node to replace, and what replaces it.
Operators know nothing of texts, ids or duplicates (`make.py` does). None makes a change that means the same on every
input, such as swapping the arguments of `max`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from typing import NamedTuple

from effnlp_lab.mutation.nodes import (
    Parents,
    altered,
    counts_places,
    formats_text,
    function_around,
    is_infinity,
    is_launch,
    is_range,
    last_name,
    neighbours_swapped,
    number,
    number_node,
    offset,
    only_moves,
    other_text,
    stays_defined,
    swapped_axes,
    with_item,
    words,
)
from effnlp_lab.mutation.tables import (
    ARITHMETIC,
    CASTS,
    COMMUTATIVE,
    COMPARISONS,
    DTYPES,
    SCALING,
    SILENT,
    SYMMETRIC,
    TERMS,
    TWIN,
)


class Change(NamedTuple):
    """`new` instead of `old`. `new` may share children with `old`."""

    operator: str
    old: ast.AST
    new: ast.AST


Operator = Callable[[ast.AST, Parents], Iterator[Change]]


def arithmetic(node: ast.AST, parents: Parents) -> Iterator[Change]:
    """a + b to a - b and so on; x += y to x -= y, and to x = y."""
    if isinstance(node, ast.AugAssign):
        other = ARITHMETIC.get(type(node.op))
        if other:
            yield Change(f"augment-{words(node.op, other())}", node, altered(node, op=other()))
        yield Change("augment-assign", node, ast.Assign([node.target], node.value, lineno=node.lineno))
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and not formats_text(node):
        other = ARITHMETIC[type(node.op)]()
        yield Change(f"arith-{words(node.op, other)}", node, altered(node, op=other))


def dropped_operand(node: ast.AST, parents: Parents) -> Iterator[Change]:
    """x * scale to x, x / n to x, x + bias to x, mask & bound to mask. A constant is never kept."""
    if not isinstance(node, ast.BinOp) or formats_text(node) or not isinstance(node.op, SCALING + TERMS):
        return
    name = "scale-drop" if isinstance(node.op, SCALING) else "term-drop"
    kept = (node.left, node.right) if isinstance(node.op, COMMUTATIVE) else (node.left,)
    for operand in kept:
        if number(operand) is None:
            yield Change(name, node, operand)


def comparison(node: ast.AST, parents: Parents) -> Iterator[Change]:
    """< to <= and to >=, == to !=, `in` to `not in`, ..."""
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            for other in (kind() for kind in COMPARISONS[type(op)]):
                yield Change(f"compare-{words(op, other)}", node, altered(node, ops=with_item(node.ops, i, other)))


def boolean(node: ast.AST, parents: Parents) -> Iterator[Change]:
    """`and` to `or`, one operand left out; `not`, `-` and `~` left out."""
    if isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield Change(f"bool-{words(node.op, other)}", node, altered(node, op=other))
        for i in range(len(node.values)):
            rest = node.values[:i] + node.values[i + 1 :]
            yield Change("bool-drop", node, rest[0] if len(rest) == 1 else altered(node, values=rest))
    elif isinstance(node, ast.UnaryOp):
        name = {ast.Not: "not-drop", ast.USub: "minus-drop", ast.Invert: "invert-drop"}.get(type(node.op))
        if name:
            yield Change(name, node, node.operand)


def constant(node: ast.AST, parents: Parents) -> Iterator[Change]:
    """Numbers to their neighbours and to 0, infinity to 0, True to False, strings to others."""
    if is_infinity(node):
        yield Change("const-finite", node, ast.Constant(0.0))
        return
    parent = parents.get(node)
    if number(parent) is not None or (parent is not None and is_infinity(parent)):
        return  # -1 is one number, float("inf") one constant
    value = number(node)
    if isinstance(value, int):
        for name, other in (("plus", value + 1), ("minus", value - 1), ("zero", 0)):
            if other != value and not (name == "zero" and abs(value) == 1):
                yield Change(f"const-{name}", node, number_node(other))
    elif isinstance(value, float):
        if 0 < abs(value) < 1e4:  # beyond that it stands for "very large", and twice as much does too
            name, factor = ("tenfold", 10) if abs(value) < 1e-3 else ("double", 2)
            yield Change(f"const-{name}", node, number_node(float(f"{value * factor:.12g}")))
        yield Change("const-zero" if value else "const-one", node, number_node(0.0 if value else 1.0))
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield Change("const-flip", node, ast.Constant(not node.value))
    elif isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)):
        yield Change("const-text", node, ast.Constant(other_text(node.value)))
        swapped = swapped_axes(node.value) if isinstance(node.value, str) else None
        if swapped:
            yield Change("const-axes", node, ast.Constant(swapped))


def off_by_one(node: ast.AST, parents: Parents) -> Iterator[Change]:
    """range(n), x[a:b] and x[i] one too far and one too short."""
    if isinstance(node, ast.Call) and is_range(node.func):
        for i, bound in enumerate(node.args[:2]):
            yield from _moved("range", node, bound, lambda new, i=i: altered(node, args=with_item(node.args, i, new)))
        if len(node.args) == 1 and not isinstance(node.args[0], ast.Starred):
            yield Change("range-first", node, altered(node, args=[ast.Constant(1), node.args[0]]))
    elif isinstance(node, ast.Slice):
        for name, bound in (("lower", node.lower), ("upper", node.upper)):
            yield from _moved("slice", node, bound, lambda new, name=name: altered(node, **{name: new}))
        backwards = (number(node.step) or 1) < 0
        if not backwards and node.lower is None and (node.upper or node.step):
            yield Change("slice-first", node, altered(node, lower=ast.Constant(1)))
        if not backwards and node.upper is None and node.lower:
            yield Change("slice-last", node, altered(node, upper=number_node(-1)))
    elif isinstance(node, ast.Subscript) and not is_launch(node, parents):
        whole = node.slice
        for i, part in enumerate(whole.elts if isinstance(whole, ast.Tuple) else [whole]):
            if counts_places(part):
                yield from _moved(
                    "index",
                    node,
                    part,
                    lambda new, i=i: altered(
                        node,
                        slice=altered(whole, elts=with_item(whole.elts, i, new))
                        if isinstance(whole, ast.Tuple)
                        else new,
                    ),
                )


def dropped_statement(node: ast.AST, parents: Parents) -> Iterator[Change]:
    """Assignments to what stays defined, calls, updates, raises, deletions, and returns before the last statement."""
    name = ""
    if isinstance(node, (ast.Assign, ast.AnnAssign)) and stays_defined(node, parents):
        name = "assign"
    elif isinstance(node, ast.AugAssign):
        name = "augment"
    elif isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
        name = "call"
    elif isinstance(node, ast.Raise):
        name = "raise"
    elif isinstance(node, ast.Delete) and not any(isinstance(t, ast.Name) for t in node.targets):
        name = "delete"
    elif isinstance(node, ast.Return) and function_around(node, parents).body[-1] is not node:
        name = "return"
    if name:
        yield Change(f"drop-{name}", node, ast.Pass())


def swapped_return(node: ast.AST, parents: Parents) -> Iterator[Change]:
    """return a, b to return b, a."""
    if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
        for swapped in neighbours_swapped(node.value.elts):
            yield Change("return-swap", node, altered(node, value=altered(node.value, elts=swapped)))


def call(node: ast.AST, parents: Parents) -> Iterator[Change]:
    """Unequal neighbouring arguments swapped, a keyword left out, max to min, x.float() to x."""
    if not isinstance(node, ast.Call):
        return
    name = last_name(node.func)
    if name not in SYMMETRIC and name not in ("print", "isinstance"):
        for swapped in neighbours_swapped(node.args):
            yield Change("args-swap", node, altered(node, args=swapped))
    for i, keyword in enumerate(node.keywords):
        if keyword.arg and keyword.arg not in SILENT:
            yield Change("keyword-drop", node, altered(node, keywords=node.keywords[:i] + node.keywords[i + 1 :]))
    if name in TWIN:
        key = "id" if isinstance(node.func, ast.Name) else "attr"
        yield Change(f"call-{name}-{TWIN[name]}", node, altered(node, func=altered(node.func, **{key: TWIN[name]})))
    if name in CASTS and isinstance(node.func, ast.Attribute) and not only_moves(node):
        yield Change("cast-drop", node, node.func.value)


def dtype(node: ast.AST, parents: Parents) -> Iterator[Change]:
    """torch.float32 to torch.float16 and torch.float64, and back."""
    if isinstance(node, ast.Attribute):
        for other in DTYPES.get(node.attr, ()):
            yield Change(f"dtype-{node.attr}-{other}", node, altered(node, attr=other))


def condition(node: ast.AST, parents: Parents) -> Iterator[Change]:
    """The tests of `if`, of `a if test else b` and in comprehensions always true and always false; `while` never."""
    if isinstance(node, (ast.If, ast.IfExp)):
        tests, values = [node.test], (True, False)
    elif isinstance(node, ast.While):
        tests, values = [node.test], (False,)
    elif isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
        tests, values = [test for generator in node.generators for test in generator.ifs], (True, False)
    else:
        return
    for test in tests:
        if not isinstance(test, ast.Constant):
            for value in values:
                yield Change(f"test-{str(value).lower()}", test, ast.Constant(value))


def loop_exit(node: ast.AST, parents: Parents) -> Iterator[Change]:
    """`break` to `continue` and back."""
    if isinstance(node, ast.Break):
        yield Change("break-continue", node, ast.Continue())
    elif isinstance(node, ast.Continue):
        yield Change("continue-break", node, ast.Break())


OPERATORS: tuple[Operator, ...] = (
    arithmetic,
    dropped_operand,
    comparison,
    boolean,
    constant,
    off_by_one,
    dropped_statement,
    swapped_return,
    call,
    dtype,
    condition,
    loop_exit,
)


def _moved(name: str, node: ast.AST, bound: ast.expr | None, build: Callable) -> Iterator[Change]:
    """`bound` + 1 and - 1 in its place; numbers are left to `constant`."""
    if bound is None or isinstance(bound, ast.Starred) or number(bound) is not None or isinstance(bound, ast.Constant):
        return
    for word, delta in (("plus", 1), ("minus", -1)):
        yield Change(f"{name}-{word}", node, build(offset(bound, delta)))
