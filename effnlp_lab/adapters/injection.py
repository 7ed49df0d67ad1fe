"""Modules found by name. A name that matches nothing is refused, and the nearest names are suggested."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable

from torch import nn

from effnlp_lab.adapters.configurations import Targets
from effnlp_lab.errors import UsageError


def matches(name: str, targets: Targets) -> bool:
    """Whether a module's full name is one of the targets or ends in one of them; a string is a regular expression."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith("." + target) for target in targets)


def find_modules(
    model: nn.Module, targets: Targets, fits: Callable[[nn.Module], bool], kind: str
) -> dict[str, nn.Module]:
    """The modules of a model that targets name, by full name, in the model's order.

    fits: which modules can be adapted; `kind` says it in words ("linear layer"). Raises UsageError for a target that
    matches no module, with the nearest names, and for one that matches only modules that do not fit.
    """
    modules = own_modules(model)
    found = {name: module for name, module in modules.items() if matches(name, targets) and fits(module)}
    for target in (targets,) if isinstance(targets, str) else targets:
        alone = targets if isinstance(targets, str) else (target,)
        hits = [name for name in modules if matches(name, alone)]
        if not hits:
            _refuse_unknown(target, [name for name, module in modules.items() if fits(module)], kind)
        if not any(name in found for name in hits):
            other = type(modules[hits[0]]).__name__
            raise UsageError(f"{target!r} names {hits[0]}, a {other}: expected a {kind}.")
    return found


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by the name it had before anything was adapted; an adapted layer stands for the layer it holds."""
    found: dict[str, nn.Module] = {}
    hidden: list[str] = []
    for name, module in model.named_modules():
        if not name or any(name.startswith(prefix) for prefix in hidden):
            continue
        kind = getattr(type(module), "adapters_inside", None)  # "parts" at a layer, "all" where a model keeps them
        if kind is not None:
            hidden.append(name + ".")
        if kind != "all":
            found[name] = module
    return found


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module where another was."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def nearest(word: str, known: list[str]) -> str:
    """The nearest of some names, as the end of a sentence."""
    known = list(dict.fromkeys(known))
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5) or known[:6]
    return ", ".join(map(repr, near)) if near else "nothing"


def _refuse_unknown(target: str, names: list[str], kind: str) -> None:
    parts = target.count(".") + 1
    endings = [".".join(name.split(".")[-parts:]) for name in names]
    raise UsageError(f"No {kind} of this model is named {target!r}: the nearest are {nearest(target, endings)}.")
