"""Training some of the model's own parameters: its biases (BitFit), or its last layers.

Ben Zaken et al. 2022, "BitFit: Simple parameter-efficient fine-tuning for transformer-based masked language-models".
The trained parameters are copies that take the place of the originals while the adapter is on: one base serves several,
and what is saved is as small as what is trained.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from effnlp_lab.adapters.adapter import Adapter, Holder, check_finite
from effnlp_lab.adapters.injection import find_modules, own_modules
from effnlp_lab.adapters.layerwise import plain_layer
from effnlp_lab.adapters.nf4_layer import NF4Linear
from effnlp_lab.errors import UsageError


class Selected(Adapter):
    """Copies of chosen parameters. `places`: (module, name in it) of each by its full name."""

    def __init__(self, model: nn.Module, config: Any, name: str, places: dict[str, tuple[nn.Module, str]]) -> None:
        super().__init__(model, config, name)
        self.places = places
        originals = [module._parameters[leaf] for module, leaf in places.values()]
        check_finite(dict(zip(places, originals, strict=True)), "the base model")
        self._holder = f"adapter_{name}"
        if hasattr(model, self._holder):
            raise UsageError(
                f"The model has an attribute {self._holder!r} already: choose another name for the adapter."
            )
        own = [nn.Parameter(original.detach().clone()) for original in originals]
        setattr(model, self._holder, Holder(own=own, base=originals))

    def tensors(self) -> dict[str, nn.Parameter]:
        return dict(zip(self.places, getattr(self.model, self._holder).own, strict=True))

    def switch(self, on: bool) -> None:
        holder = getattr(self.model, self._holder)
        for (module, leaf), parameter in zip(self.places.values(), holder.own if on else holder.base, strict=True):
            module._parameters[leaf] = parameter

    def merged_weights(self) -> list[tuple[nn.Parameter, Tensor]]:
        holder = getattr(self.model, self._holder)
        return list(zip(holder.base, holder.own, strict=True))

    def remove(self) -> None:
        delattr(self.model, self._holder)


class BitFit(Selected):
    """Every bias, or those of the modules that `targets` names."""

    def __init__(self, model: nn.Module, config: Any, name: str) -> None:
        modules = own_modules(model)
        if config.targets:
            modules = find_modules(model, config.targets, _has_bias, "module with a bias")
        places = {f"{n}.bias": (plain_layer(m), "bias") for n, m in modules.items() if _has_bias(m)}
        if not places:
            raise UsageError(
                "This model has no biases to train: load one that has (Llama: attention_bias and mlp_bias)."
            )
        super().__init__(model, config, name, places)


class TopLayers(Selected):
    """Every parameter of the last blocks, and of the norm that follows them."""

    def __init__(self, model: nn.Module, config: Any, name: str) -> None:
        modules = own_modules(model)
        stacks = {n: m for n, m in modules.items() if isinstance(m, nn.ModuleList)}
        if not stacks:
            raise UsageError("This model has no list of blocks (nn.ModuleList), so that none is its last.")
        stack = max(stacks, key=lambda n: len(stacks[n]))
        count = len(stacks[stack])
        if config.layers > count:
            raise UsageError(f"layers is {config.layers} and {stack} has {count}: choose at most {count}.")
        roots = [f"{stack}.{i}" for i in range(count - config.layers, count)]
        if config.final_norm:
            roots += _norms_beside(stack, modules)
        chosen = {n: plain_layer(m) for n, m in modules.items() if any((n + ".").startswith(r + ".") for r in roots)}
        for n, module in chosen.items():
            if isinstance(module, NF4Linear):
                raise UsageError(
                    f"{n} is in NF4 and cannot be trained itself: use LoRA, or a base that is not quantized."
                )
        places = {
            f"{n}.{leaf}": (m, leaf) for n, m in chosen.items() for leaf, p in m._parameters.items() if p is not None
        }
        super().__init__(model, config, name, places)


def _has_bias(module: nn.Module) -> bool:
    return plain_layer(module)._parameters.get("bias") is not None


def _norms_beside(stack: str, modules: dict[str, nn.Module]) -> list[str]:
    """The norms that are children of the module that holds the blocks, as the last one is in most models."""
    parent, dot, _ = stack.rpartition(".")
    beside = [n for n in modules if n.rpartition(".")[0] == parent and n != stack]
    return [n for n in beside if "norm" in type(modules[n]).__name__.lower()]
