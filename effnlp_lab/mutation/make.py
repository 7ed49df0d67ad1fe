"""Mutants of one exercise: changes applied to the solution's text, with ids that stay, and no duplicates.

Only the nodes that an operator replaces are written anew; comments and layout around them stay. An id tells the
exercise, the line within its solution (blanks and markers apart, from 1), the operator, and which of several it is.
"""

from __future__ import annotations

import ast
import os
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from effnlp_lab.master import BEGIN, END, Cell, regions, solution_source
from effnlp_lab.mutation.nodes import Parents, left_alone
from effnlp_lab.mutation.operators import OPERATORS, Change

WHOLE = 80  # characters of a text that are shown as they are


@dataclass(frozen=True)
class Mutant:
    """One small change of a solution. `source` is the whole cell; `line` counts in that text, from 1."""

    id: str
    line: int
    old: str
    new: str
    source: str

    @property
    def exercise(self) -> str:
        return self.id.partition(":")[0]

    @property
    def change(self) -> str:
        """The change in one line; of long texts only what differs and a little around it."""
        old, new = " ".join(self.old.split()), " ".join(self.new.split())
        same = len(os.path.commonprefix([old, new]))
        tail = min(len(os.path.commonprefix([old[::-1], new[::-1]])), len(old) - same, len(new) - same)
        if max(len(old), len(new)) <= WHOLE:
            same = tail = 0
        return f"{_excerpt(old, same, tail)}  ->  {_excerpt(new, same, tail)}"


def mutants_of(cell: Cell) -> list[Mutant]:
    """All mutants of an exercise's cell, in the order of the text."""
    return make(cell.name or "", solution_source(cell), solution_lines(cell.source))


def solution_lines(source: str) -> list[int]:
    """Lines of `solution_source` (from 1) that lie inside the solution regions of a cell's source."""
    inside = {n for first, last in regions(source) for n in range(first + 1, last)}
    kept = [n for n, line in enumerate(source.splitlines(), 1) if BEGIN not in line and END not in line]
    return [new for new, old in enumerate(kept, 1) if old in inside]


def make(exercise: str, source: str, lines: Collection[int] | None = None) -> list[Mutant]:
    """All mutants of `source` within `lines` (everywhere by default)."""
    tree = ast.parse(source)
    allowed = sorted(lines) if lines is not None else list(range(1, len(source.splitlines()) + 1))
    number = {line: n for n, line in enumerate(allowed, 1)}
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    counts: Counter[str] = Counter()
    seen = {normal(source)}
    found = []
    for change in _changes(tree, parents, number.keys()):
        line = change.old.lineno
        prefix = f"{exercise}:{number[line]}:{change.operator}"
        counts[prefix] += 1
        text = _apply(source, tree, parents, change)
        key = normal(text) if text is not None else None
        if key is None or key in seen:
            continue
        seen.add(key)
        found.append(Mutant(f"{prefix}:{counts[prefix]}", line, ast.unparse(change.old), ast.unparse(change.new), text))
    return sorted(found, key=lambda mutant: mutant.line)


def _changes(node: ast.AST, parents: Parents, lines: Collection[int]) -> Iterator[Change]:
    """The changes of every node that lies within `lines` as a whole, outer nodes first."""
    if left_alone(node, parents):
        return
    for operator in OPERATORS:
        for change in operator(node, parents):
            if {change.old.lineno, change.old.end_lineno} <= set(lines):
                yield change
    for child in ast.iter_child_nodes(node):
        yield from _changes(child, parents, lines)


def _apply(source: str, tree: ast.Module, parents: Parents, change: Change) -> str | None:
    """The text with one change, parenthesized where it has to be; None where that is not Python."""
    intended = _replaced(tree, parents, change)
    for text in (ast.unparse(change.new), f"({ast.unparse(change.new)})"):
        mutated = _spliced(source, change.old, text)
        try:
            if ast.dump(ast.parse(mutated)) == intended:
                compile(mutated, "<mutant>", "exec", dont_inherit=True)
                return mutated
        except SyntaxError:
            continue
    return None


def _replaced(tree: ast.Module, parents: Parents, change: Change) -> str:
    """The dump of the tree with the change made in the tree itself: what the changed text has to parse to."""
    parent = parents[change.old]
    for name, value in ast.iter_fields(parent):
        if value is change.old:
            setattr(parent, name, change.new)
            try:
                return ast.dump(tree)
            finally:
                setattr(parent, name, value)
        if isinstance(value, list) and any(item is change.old for item in value):
            setattr(parent, name, [change.new if item is change.old else item for item in value])
            try:
                return ast.dump(tree)
            finally:
                setattr(parent, name, value)
    raise LookupError(f"{ast.dump(change.old)} is no child of its parent")


def _spliced(source: str, node: ast.AST, text: str) -> str:
    """`source` with `text` where `node` stood. Columns count UTF-8 bytes."""
    lines = [line.encode() for line in source.splitlines(keepends=True)]
    first, last = node.lineno - 1, node.end_lineno - 1
    before = b"".join(lines[:first]) + lines[first][: node.col_offset]
    after = lines[last][node.end_col_offset :] + b"".join(lines[last + 1 :])
    return (before + text.encode() + after).decode()


def normal(source: str) -> str:
    """A text that is the same for sources which do the same at first sight: no layout, no dead branches, no x + 0."""
    return ast.dump(_Folded().visit(ast.parse(source)))


class _Folded(ast.NodeTransformer):
    def visit_Pass(self, node):
        return None

    def visit_If(self, node):
        self.generic_visit(node)
        if isinstance(node.test, ast.Constant):
            return node.body if node.test.value else node.orelse
        calls = any(isinstance(n, (ast.Call, ast.NamedExpr, ast.Await)) for n in ast.walk(node.test))
        return node if node.body or node.orelse or calls else None

    def visit_While(self, node):
        self.generic_visit(node)
        return node.orelse if isinstance(node.test, ast.Constant) and not node.test.value else node

    def visit_IfExp(self, node):
        self.generic_visit(node)
        if isinstance(node.test, ast.Constant):
            return node.body if node.test.value else node.orelse
        return node

    def visit_comprehension(self, node):
        self.generic_visit(node)
        node.ifs = [test for test in node.ifs if not (isinstance(test, ast.Constant) and test.value)]
        return node

    def visit_BinOp(self, node):
        self.generic_visit(node)
        left, right = _plain_int(node.left), _plain_int(node.right)
        neutral = {ast.Add: 0, ast.Sub: 0, ast.Mult: 1, ast.Pow: 1}.get(type(node.op))
        if neutral is not None and right == neutral:
            return node.left
        if neutral is not None and left == neutral and isinstance(node.op, (ast.Add, ast.Mult)):
            return node.right
        return node


def _plain_int(node: ast.expr) -> int | None:
    return node.value if isinstance(node, ast.Constant) and type(node.value) is int else None


def _excerpt(text: str, same: int, tail: int, around: int = 24) -> str:
    """A text without most of the `same` characters that it begins with and the `tail` that it ends with."""
    first, last = max(0, same - around), min(len(text), len(text) - tail + around)
    middle = text[first:last]
    if len(middle) > WHOLE:
        middle = f"{middle[: WHOLE // 2]}...{middle[-WHOLE // 2 :]}"
    return f"{'...' if first else ''}{middle}{'...' if last < len(text) else ''}"
