"""Notices the calls that would answer for the student.

Four nets, because each alone misses some: the syntax tree of the answer sees names before anything runs; a function
mode sees `torch.nn.functional`; a dispatch mode sees the operations beneath it; patched names and modules see what does
not go through torch. A forbidden entry is a module ("tokenizers"), a dotted callable
("torch.nn.functional.scaled_dot_product_attention") or an operation ("aten::_scaled_dot_product", a prefix).
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import symtable
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from unittest import mock

from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class ForbiddenCall(BaseException):
    """Raised at a forbidden call. Not an Exception, so that an answer cannot swallow it unseen."""


class Watch(contextlib.AbstractContextManager):
    """`with watch.reading(answer), watch: ...`; then `watch.seen` names what was used."""

    def __init__(self, forbidden: list[str] | tuple[str, ...]) -> None:
        self.names = tuple(n for n in forbidden if "::" not in n)
        self.operations = tuple(n.replace("::", ".") for n in forbidden if "::" in n)
        self.objects = {id(value): name for name in self.names if (value := _lookup(name)) is not None}
        self.seen: set[str] = set()
        self._stack = contextlib.ExitStack()

    @contextlib.contextmanager
    def reading(self, answer: Callable) -> Iterator[None]:
        """Read the answer's source before it runs."""
        self.seen.update(_used_names(answer, self.names, self.objects))
        if self.seen:
            raise ForbiddenCall(next(iter(self.seen)))
        yield

    def __enter__(self) -> Watch:
        self._stack = contextlib.ExitStack()
        for name in self.names:
            self._guard(name)
        if self.names or self.operations:
            self._stack.enter_context(_FunctionNet(self))
            self._stack.enter_context(_OperationNet(self))
        return self

    def __exit__(self, *exc_info) -> None:
        self._stack.close()

    def caught(self, name: str) -> None:
        self.seen.add(name)
        raise ForbiddenCall(name)

    def _guard(self, name: str) -> None:
        """Swap a forbidden module for one that refuses every use, a forbidden callable for one that refuses calls."""
        owner_name, _, attribute = name.rpartition(".")
        owner = _lookup(owner_name)
        if owner is None or isinstance(_lookup(name), types.ModuleType):
            self._stack.enter_context(_module_swapped(name, _Refusing(name, self)))
        elif hasattr(owner, attribute):
            with contextlib.suppress(TypeError):  # attributes of built-in types cannot be swapped: the modes remain
                self._stack.enter_context(mock.patch.object(owner, attribute, _refusing(name, self)))


@contextlib.contextmanager
def _module_swapped(name: str, stand_in: types.ModuleType) -> Iterator[None]:
    """Put `stand_in` into sys.modules, and leave there what an answer imports meanwhile.

    mock.patch.dict would drop it, and torch's compiler, which torch.utils.checkpoint imports, cannot come twice.
    """
    before = sys.modules.get(name)
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        if before is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = before


def _refusing(name: str, watch: Watch) -> Callable:
    def refuse(*args, **kwargs):
        watch.caught(name)

    return refuse


class _Refusing(types.ModuleType):
    """A module of which every attribute is refused."""

    def __init__(self, name: str, watch: Watch) -> None:
        super().__init__(name)
        self.__dict__["_watch"] = watch

    def __getattr__(self, attribute: str):
        if attribute.startswith("__") and attribute != "__path__":
            raise AttributeError(attribute)
        self.__dict__["_watch"].caught(self.__name__)


class _FunctionNet(TorchFunctionMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if id(func) in self.watch.objects:
            self.watch.caught(self.watch.objects[id(func)])
        return func(*args, **(kwargs or {}))


class _OperationNet(TorchDispatchMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch
        self.known: dict[Callable, str | None] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import torch's compiler at the first operation: seconds, inside a time limit

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in self.known:  # an answer runs the same few operations thousands of times
            self.known[func] = next((f for f in self.watch.operations if str(func).startswith(f)), None)
        if self.known[func]:
            self.watch.caught(self.known[func])
        return func(*args, **(kwargs or {}))


def _lookup(name: str) -> object | None:
    """The object of a dotted name, if its module is imported already."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        value = sys.modules.get(".".join(parts[:end]))
        if value is not None:
            for attribute in parts[end:]:
                value = getattr(value, attribute, None)
            return value
    return None


def _used_names(answer: Callable, forbidden: tuple[str, ...], objects: dict[int, str]) -> set[str]:
    """Forbidden names that the answer's source, and the notebook's functions that it calls, refer to."""
    if not forbidden:
        return set()
    seen: set[str] = set()
    waiting, done = [answer], set()
    while waiting:
        item = waiting.pop()
        item = inspect.unwrap(getattr(item, "fn", item)) if callable(getattr(item, "fn", item)) else item
        if id(item) in done:
            continue
        done.add(id(item))
        try:
            tree, reached = _parsed(inspect.getsource(item))
        except (OSError, TypeError, SyntaxError):
            continue  # built-ins and what was made by exec without source: the other nets remain
        scope = getattr(item, "__globals__", None) or getattr(
            sys.modules.get(getattr(item, "__module__", "")), "__dict__", {}
        )
        scope = {name: scope[name] for name in reached if name in scope}  # arguments hide globals
        for node in ast.walk(tree):
            for name, value in _references(node, scope):
                hit = objects.get(id(value)) or next(
                    (f for f in forbidden if name == f or name.startswith(f + ".")), None
                )
                if hit:
                    seen.add(hit)
                elif _is_students(value, item):
                    waiting.append(value)
    return seen


@functools.lru_cache(maxsize=256)
def _parsed(source: str) -> tuple[ast.Module, set[str]]:
    """The syntax tree of a function or class, and the names that it takes from the notebook."""
    source = textwrap.dedent(source)
    return ast.parse(source), _global_names(symtable.symtable(source, "answer", "exec"))


def _global_names(table: symtable.SymbolTable) -> set[str]:
    """Names that some function or class of a source takes from the notebook, or the source's outermost lines use."""
    outermost = table.get_type() == "module"
    found = {s.get_name() for s in table.get_symbols() if s.is_referenced() and (outermost or s.is_global())}
    return found.union(*map(_global_names, table.get_children()))


def _references(node: ast.AST, scope: dict) -> Iterator[tuple[str, object]]:
    """Qualified names that one node of a syntax tree stands for."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, None) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield from ((f"{node.module}.{alias.name}", None) for alias in node.names)
    elif (
        isinstance(node, ast.Call)
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
        and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("__import__", "import_module")
    ):
        yield node.args[0].value, None
    elif isinstance(node, (ast.Name, ast.Attribute)):
        value = _resolve(node, scope)
        if value is not None:
            module = getattr(value, "__module__", None) or ""
            if isinstance(value, types.ModuleType):
                yield value.__name__, value
            else:
                yield f"{module}.{getattr(value, '__qualname__', type(value).__qualname__)}", value
                yield f"{type(value).__module__}.{type(value).__qualname__}", None


def _resolve(node: ast.AST, scope: dict):
    """What a dotted name means in `scope`, without running anything of the student's (None: not known)."""
    if isinstance(node, ast.Name):
        return scope.get(node.id)
    base = _resolve(node.value, scope) if isinstance(node, ast.Attribute) else None
    if isinstance(base, types.ModuleType) or isinstance(base, type):
        return inspect.getattr_static(base, node.attr, None)
    return None


def _is_students(value: object, beside: object) -> bool:
    """Whether a value is a function or class of the same notebook as `beside`."""
    inner = getattr(value, "fn", value)
    return isinstance(inner, (types.FunctionType, type)) and getattr(inner, "__module__", None) == getattr(
        beside, "__module__", object()
    )


def importable(name: str) -> bool:
    """Whether a forbidden name exists here (a name that no installed library has is a slip in a spec)."""
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
        return True
    module, _, attribute = name.rpartition(".")
    with contextlib.suppress(ImportError):
        return hasattr(importlib.import_module(module), attribute) if module else False
    return False
