"""The interface of the room: one base, several adapters by name, one of them active.

    add_adapter(model, LoRAConfig(r=8))          freezes the base; the adapter is active and alone is trained
    trainable_parameters(model)                  what goes into the optimizer
    set_adapter(model, "other")                  switch on the same base
    with adapters_disabled(model): ...           the base alone
    merge_adapter(model); unmerge_adapter(model)

Every change is of the model in place, and `remove_adapter` undoes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from torch import nn

from effnlp_lab.adapters.adapter import Adapter
from effnlp_lab.adapters.configurations import Config
from effnlp_lab.adapters.injection import nearest
from effnlp_lab.adapters.nf4_layer import NF4Linear
from effnlp_lab.errors import UsageError

METHODS = {
    "LoRAConfig": ("lora", "LoRA"),
    "IA3Config": ("ia3", "IA3"),
    "BottleneckConfig": ("bottleneck", "Bottleneck"),
    "PromptTuningConfig": ("virtual_tokens", "PromptTuning"),
    "PrefixTuningConfig": ("virtual_tokens", "PrefixTuning"),
    "BitFitConfig": ("selective", "BitFit"),
    "TopLayersConfig": ("selective", "TopLayers"),
}
_REGISTRY = "_effnlp_adapters"


def add_adapter(model: nn.Module, config: Config, name: str = "default") -> Adapter:
    """Add an adapter, freeze the base, and make the new adapter the active one.

    Raises UsageError for a name that is taken or holds a dot, for module names that match nothing (with the nearest
    names), for weights of the base that hold NaN or infinity, and while an adapter is merged.
    """
    if type(config).__name__ not in METHODS:
        raise UsageError(
            f"{type(config).__name__} is no configuration of an adapter: expected one of {', '.join(METHODS)}."
        )
    known = adapters_of(model)
    if not name or "." in name or name in known:
        why = "is taken" if name in known else "cannot name an adapter"
        raise UsageError(f"{name!r} {why}: choose another name, without dots.")
    _refuse_merged(known, "add another")
    home, method = METHODS[type(config).__name__]
    before = {id(p): p.requires_grad for p in model.parameters()}
    for adapter in known.values():
        adapter.activate(False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        adapter = getattr(import_module(f"effnlp_lab.adapters.{home}"), method)(model, config, name)
    except BaseException:
        for parameter in model.parameters():
            parameter.requires_grad_(before.get(id(parameter), False))
        raise
    if not known:
        object.__setattr__(model, _REGISTRY, known)
    known[name] = adapter
    adapter.activate(True)
    return adapter


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """Every adapter of a model by name, in the order of addition."""
    return getattr(model, _REGISTRY, {})


def get_adapter(model: nn.Module, name: str | None = None) -> Adapter:
    """One adapter: by name, or the active one. Raises UsageError with the nearest names."""
    known = adapters_of(model)
    if name is None:
        chosen = [adapter for adapter in known.values() if adapter.active]
        if not chosen:
            raise UsageError("No adapter of this model is active: name one, or call set_adapter first.")
        return chosen[0]
    if name not in known:
        raise UsageError(f"This model has no adapter {name!r}: the nearest are {nearest(name, list(known))}.")
    return known[name]


def set_adapter(model: nn.Module, name: str) -> Adapter:
    """Make one adapter the active one. Raises UsageError for an unknown name, and while another is merged."""
    chosen = get_adapter(model, name)
    _refuse_merged({k: a for k, a in adapters_of(model).items() if a is not chosen}, "switch")
    for adapter in adapters_of(model).values():
        adapter.activate(False)
    chosen.activate(True)
    return chosen


def disable_adapters(model: nn.Module) -> None:
    """Compute with the base alone. Raises UsageError while an adapter is merged into its weights."""
    _refuse_merged(adapters_of(model), "disable it")
    for adapter in adapters_of(model).values():
        if adapter.active:
            adapter.switch(False)


def enable_adapters(model: nn.Module) -> None:
    """Undo `disable_adapters`: the adapter that was active is on again."""
    for adapter in adapters_of(model).values():
        if adapter.active:
            adapter.activate(True)


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """The base alone, for a while."""
    disable_adapters(model)
    try:
        yield
    finally:
        enable_adapters(model)


def merge_adapter(model: nn.Module, name: str | None = None) -> None:
    """Write an adapter (the active one) into the base's weights: no cost at inference any more. See `Adapter.merge`."""
    adapter = get_adapter(model, name)
    if not adapter.merged:
        set_adapter(model, adapter.name)  # and so no other's parameters are in the base's place
    try:
        adapter.merge()
    finally:
        adapter.activate(True)


def unmerge_adapter(model: nn.Module, name: str | None = None) -> None:
    """Undo `merge_adapter`, bit for bit."""
    get_adapter(model, name).unmerge()


def remove_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter away. After the last one the model has its old modules and names; a merged one stays merged."""
    adapter = get_adapter(model, name)
    adapter.activate(False)
    adapter.remove()
    del adapters_of(model)[name]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name: the parameters of the active adapter."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_parameters(model: nn.Module) -> dict[str, float]:
    """{"trained": numbers that are trained, "base": numbers of the base, "share": trained / base}."""
    own = {id(parameter) for adapter in adapters_of(model).values() for parameter in adapter.parameters()}
    trained = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    base = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in own)
    base += sum(module.nf4().shape.numel() for module in model.modules() if isinstance(module, NF4Linear))
    return {"trained": trained, "base": base, "share": trained / base if base else 0.0}


def _refuse_merged(known: dict[str, Adapter], act: str) -> None:
    merged = [name for name, adapter in known.items() if adapter.merged]
    if merged:
        raise UsageError(f"Adapter {merged[0]!r} is merged into the base: unmerge it first to {act}.")
