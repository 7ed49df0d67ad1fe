"""Reads a submission's text outside the sandbox, where nothing that it does can change what is read.

`forbidden_in` finds the calls that would answer for the student, even when the notebook has disarmed the nets that
watch it run. `signs_in` finds what honest answers have no use for; it takes no points, and asks a person to look.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence

from effnlp_grading.plan import Step
from effnlp_lab.exercises.spec import Exercise

KIT_INSIDE = ("effnlp_lab.notebook", "effnlp_lab.exercises", "effnlp_lab.mutation", "effnlp_inside", "effnlp_grading")
SIGNS = {
    "sys.modules": "reaches into sys.modules",
    "gc.get_objects": "walks the interpreter's objects",
    "gc.get_referrers": "walks the interpreter's objects",
    "sys._getframe": "looks at the frames that call it",
    "inspect.stack": "looks at the frames that call it",
    "inspect.currentframe": "looks at the frames that call it",
    "os._exit": "ends its process",
    "os.fork": "starts processes",
    "subprocess": "starts processes",
    "socket": "opens sockets",
    "ctypes": "calls native code",
    "importlib.reload": "reloads modules",
}


def forbidden_in(exercise: Exercise, steps: Sequence[Step]) -> list[str]:
    """Forbidden names that the exercise's own cell, or a function of the student's that it names, refers to."""
    names = [n for n in exercise.forbidden if "::" not in n]
    if not names:
        return []
    trees = [(step, tree) for step in steps if step.kind == "run" and (tree := _parse(step.source)) is not None]
    alias = dict(pair for _, tree in trees for pair in _imports(tree))
    functions = {node.name: node for step, tree in trees if not step.given for node in tree.body
                 if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    waiting: list[ast.AST] = [tree for step, tree in trees if step.answers == exercise.name]
    seen, found = set(), set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        for name in _dotted_names(node, alias):
            found.update(f for f in names if name == f or name.startswith(f + "."))
            if name in functions:
                waiting.append(functions[name])
    return sorted(found)


def signs_in(steps: Iterable[Step]) -> list[str]:
    """Sentences on what a person should look at, in the student's own cells."""
    found = []
    for step in steps:
        tree = None if step.given or step.kind != "run" else _parse(step.source)
        if tree is None:
            continue
        alias = dict(_imports(tree))
        for name in {*alias.values(), *_dotted_names(tree, alias)}:
            if name.startswith(KIT_INSIDE):
                found.append(f"{step.answers or 'a cell'} reaches into the kit ({name})")
            found += [f"{step.answers or 'a cell'} {what} ({name})" for sign, what in SIGNS.items()
                      if name == sign or name.startswith(sign + ".")]
    return sorted(set(found))


def _parse(source: str) -> ast.Module | None:
    """The cell as Python; lines that are magics are left out."""
    lines = ["" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines()]
    try:
        return ast.parse("\n".join(lines))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """What imported names stand for: `F` -> torch.nn.functional."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                yield (one.asname, one.name) if one.asname else (one.name.split(".")[0], one.name.split(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for one in node.names:
                yield one.asname or one.name, f"{node.module}.{one.name}"


def _dotted_names(tree: ast.AST, alias: dict[str, str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)):
            name = _dotted(node)
            if name:
                first, _, rest = name.partition(".")
                yield ".".join(filter(None, (alias.get(first, first), rest)))
        elif isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{one.name}" for one in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant) \
                and isinstance(node.args[0].value, str) \
                and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("__import__", "import_module"):
            yield node.args[0].value


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    base = _dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{base}.{node.attr}" if base else ""
