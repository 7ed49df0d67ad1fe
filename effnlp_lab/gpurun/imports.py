"""Which files of the kit a benchmark depends on: what it imports, and what that imports in turn.

So a change of one room lets the benchmarks of the others stand, which together take most of a GPU run's time.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

KIT = "effnlp_lab"
WITH_THEM = {f"{KIT}/course/models.py": (f"{KIT}/course/weights",)}
"""What modules read that is not imported."""
ONLY_SHOW = {Path(KIT, "notebook", name) for name in ("book.py", "book_pictures.py")}
"""What is imported to show what was measured: no figure depends on it."""


def imported(root: Path, *scripts: Path) -> tuple[str, ...]:
    """What `scripts` import, as paths from `root`, sorted: modules of the kit, and packages as a whole where a name of
    theirs is imported (they load names on first use). An import counts wherever in a file it stands."""
    found = {Path(KIT, "__init__.py")}
    waiting = [*scripts]
    while waiting:
        for place in _imports(waiting.pop(), root):
            if place not in found | ONLY_SHOW:
                found.add(place)
                whole = root / place
                waiting += [whole] if whole.is_file() else sorted(whole.rglob("*.py"))
    paths = {place.as_posix() for place in found if not found.intersection(place.parents)}
    return tuple(sorted({*paths, *(more for path, data in WITH_THEM.items() if Path(path) in found for more in data)}))


def _imports(path: Path, root: Path) -> Iterator[Path]:
    package = path.relative_to(root).parts[:-1]
    for node in ast.walk(ast.parse(path.read_bytes())):
        names = []
        if isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            names = [(f"{module}.{alias.name}", module) for alias in node.names]
        for name, module in names:
            place = _place(name, root) or _place(module, root)
            if place is not None and place != Path(KIT):
                yield place


def _place(name: str, root: Path) -> Path | None:
    """The file of a module or the folder of a package of the kit, from `root`; None for anything else."""
    place = Path(*name.split("."))
    if place.parts[:1] != (KIT,):
        return None
    if (root / place / "__init__.py").is_file():
        return place
    return place.with_suffix(".py") if (root / place.with_suffix(".py")).is_file() else None
