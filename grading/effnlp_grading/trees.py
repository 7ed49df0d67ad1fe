"""Code as a bag of fragments that stay the same when it is renamed, reordered or laid out anew.

A fragment is the hash of a subtree of the syntax tree in a normal form: names that the code binds itself are all one
name, docstrings and annotations are left out, operands of commutative operators and statements of a block are sorted,
`x += y` is `x = x + y`, and `a > b` is `b < a`. Two bags are compared as tree kernels compare trees, by the subtrees
that they share (Collins and Duffy, 2001), in the manner of fingerprints: a hash stands for each fragment, and those
that everybody has are discounted (Schleimer, Wilkerson and Aiken, 2003).
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field

SMALLEST = 4  # nodes of a subtree that counts
COMMUTATIVE = (ast.Add, ast.Mult, ast.BitOr, ast.BitAnd, ast.BitXor)
MIRRORED = {ast.Gt: "Lt", ast.GtE: "LtE"}
BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")


@dataclass
class Fragments:
    """The fragments of one piece of code: how often each occurs, its nodes, and the lines (from 1) where it stands."""

    counts: Counter[str] = field(default_factory=Counter)
    sizes: dict[str, int] = field(default_factory=dict)
    lines: dict[str, set[int]] = field(default_factory=dict)


@functools.lru_cache(maxsize=50_000)
def fragments_of(source: str) -> Fragments | None:
    """The fragments of a cell, to be read alone; None where it is not Python. Lines that are magics are left out."""
    lines = ["" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines()]
    try:
        tree = ast.parse("\n".join(lines))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    walker = _Walker(tree)
    try:
        walker.visit(tree)
    except RecursionError:
        return None
    return walker.found


class _Walker:
    """Puts a tree into normal form, from the leaves up, and keeps every subtree of some size."""

    def __init__(self, tree: ast.Module) -> None:
        self.found = Fragments()
        self.own, self.alias = _bound(tree)

    def visit(self, node: ast.AST) -> tuple[str, int]:
        """The normal form's hash and its number of nodes."""
        told, size = self._form(node)
        key = hashlib.blake2b(told.encode(), digest_size=8).hexdigest()
        if size >= SMALLEST and isinstance(node, (ast.expr, ast.stmt, ast.comprehension, ast.Module)):
            self.found.counts[key] += 1
            self.found.sizes[key] = size
            if hasattr(node, "lineno"):
                self.found.lines.setdefault(key, set()).update(range(node.lineno, node.end_lineno + 1))
        return key, size

    def _form(self, node: ast.AST) -> tuple[str, int]:
        if isinstance(node, ast.Name):
            return (f"name {self.alias.get(node.id, node.id)}" if node.id not in self.own else "a name"), 1
        if isinstance(node, ast.Constant):
            return f"{type(node.value).__name__} {node.value!r}", 1
        if isinstance(node, ast.AugAssign):
            added = ast.BinOp(node.target, node.op, node.value)
            return self._told("Assign", [self.visit(node.target), self.visit(ast.copy_location(added, node))])
        if isinstance(node, ast.AnnAssign):
            return self._told("Assign", [self.visit(n) for n in (node.target, node.value) if n is not None])
        if isinstance(node, ast.BinOp) and isinstance(node.op, COMMUTATIVE):
            return self._told(type(node.op).__name__, sorted(self.visit(n) for n in _chain(node, type(node.op))))
        if isinstance(node, ast.BoolOp):
            return self._told(type(node.op).__name__, sorted(self.visit(n) for n in node.values))
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            return self._comparison(node)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return self._function(node)
        if isinstance(node, ast.Call):
            keywords = sorted((k.arg or "**", *self.visit(k.value)) for k in node.keywords)
            parts = [self.visit(node.func), *(self.visit(n) for n in node.args)]
            return self._told("Call", [*parts, *((f"{name}={key}", size) for name, key, size in keywords)])
        return self._plain(node)

    def _plain(self, node: ast.AST) -> tuple[str, int]:
        """Any other node: its kind, its words, its children in order, its blocks sorted."""
        words, parts = [type(node).__name__], []
        for name, value in ast.iter_fields(node):
            if name in ("ctx", "type_comment", "type_ignores", "type_params", "returns"):
                continue
            if isinstance(value, list):
                children = [self.visit(n) for n in _without_docstring(value, name) if isinstance(n, ast.AST)]
                parts += [(f"{name}:", 0), *(sorted(children) if name in BLOCKS else children)]
                words += [str(item) for item in value if not isinstance(item, ast.AST)]
            elif isinstance(value, ast.AST):
                parts.append(self.visit(value))
            elif value is not None and not (isinstance(node, ast.ClassDef) and name == "name"):
                words.append(f"{name} {value}")
        return self._told(" ".join(words), parts)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> tuple[str, int]:
        arguments = node.args
        count = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
        defaults = [self.visit(n) for n in (*arguments.defaults, *arguments.kw_defaults) if n is not None]
        body = node.body if isinstance(node.body, list) else [node.body]
        inner = sorted(self.visit(n) for n in _without_docstring(body, "body"))
        made = [self.visit(n) for n in getattr(node, "decorator_list", [])]
        return self._told(f"function of {count}", [*made, *defaults, *inner])

    def _comparison(self, node: ast.Compare) -> tuple[str, int]:
        kind = type(node.ops[0])
        sides = [self.visit(node.left), self.visit(node.comparators[0])]
        if kind in MIRRORED:
            return self._told(MIRRORED[kind], sides[::-1])
        return self._told(kind.__name__, sorted(sides) if kind in (ast.Eq, ast.NotEq) else sides)

    @staticmethod
    def _told(words: str, parts: list[tuple[str, int]]) -> tuple[str, int]:
        return f"{words}({' '.join(key for key, _ in parts)})", 1 + sum(size for _, size in parts)


def _chain(node: ast.BinOp, kind: type) -> list[ast.expr]:
    """The operands of a + b + c, of whatever shape the tree is."""
    found: list[ast.expr] = []
    for side in (node.left, node.right):
        same = isinstance(side, ast.BinOp) and isinstance(side.op, kind)
        found += _chain(side, kind) if same else [side]
    return found


def _without_docstring(body: list, name: str) -> list:
    if name != "body":
        return body
    return [n for n in body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)) and not isinstance(
        n, (ast.Pass, ast.Import, ast.ImportFrom))]


def _bound(tree: ast.Module) -> tuple[set[str], dict[str, str]]:
    """Names that the code binds itself, and what imported ones stand for."""
    own: set[str] = set()
    alias: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            own.add(node.id)
        elif isinstance(node, ast.arg):
            own.add(node.arg)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            own.add(node.name)
        elif isinstance(node, ast.Import):
            alias |= {one.asname: one.name for one in node.names if one.asname}
        elif isinstance(node, ast.ImportFrom):
            alias |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
    return own - alias.keys(), alias


def defined_in(source: str) -> list[str]:
    """Functions and classes that a cell defines at its top."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return re.findall(r"^(?:def|class)\s+(\w+)", source, re.MULTILINE)
    return [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))]
