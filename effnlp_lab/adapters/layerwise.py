"""Methods that sit at a linear layer. The layer is held by one that also holds a part for each adapter, by name.

    q_proj                    a linear layer
    q_proj: Adapted           base: that layer; parts: {"default": LoRAPart, "other": IA3Part}; active: "default"

So several adapters share one base, and switching is setting a name.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from effnlp_lab.adapters.adapter import Adapter, check_finite
from effnlp_lab.adapters.injection import find_modules, replace_module
from effnlp_lab.adapters.nf4_layer import NF4Linear


class Part(nn.Module):
    """What one adapter does at one layer."""

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """The adapted layer's output, [..., out_features]."""
        raise NotImplementedError

    def tensors(self) -> dict[str, nn.Parameter]:
        """Parameters by the names in which they are saved, after the layer's own name."""
        raise NotImplementedError

    def merged(self, base: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """The base's parameters with the values that take this part in."""
        raise NotImplementedError


class Adapted(nn.Module):
    """A layer and the parts of its adapters. Attributes that it has not itself are the layer's."""

    adapters_inside = "parts"

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.parts = base, nn.ModuleDict()
        self.active: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) if self.active is None else self.parts[self.active](self.base, x)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class LayerAdapter(Adapter):
    """An adapter that is a part at each layer that its configuration's targets name."""

    def __init__(self, model: nn.Module, config: Any, name: str) -> None:
        super().__init__(model, config, name)
        found = find_modules(model, config.targets, is_linear, "linear layer")
        check_finite({layer: m.weight for layer, m in found.items() if not is_nf4(m)}, "the base model")
        parts = {layer: self.make_part(layer, plain_layer(module)) for layer, module in found.items()}
        self.layers: dict[str, Adapted] = {}
        for layer, part in parts.items():
            module = found[layer]
            if not isinstance(module, Adapted):
                module = Adapted(module)
                replace_module(model, layer, module)
            module.parts[name] = part.train(model.training)
            self.layers[layer] = module

    @abstractmethod
    def make_part(self, layer: str, base: nn.Module) -> Part:
        """The new part of one layer."""

    def tensors(self) -> dict[str, nn.Parameter]:
        named = {layer: module.parts[self.name].tensors() for layer, module in self.layers.items()}
        return {f"{layer}.{name}": tensor for layer, tensors in named.items() for name, tensor in tensors.items()}

    def switch(self, on: bool) -> None:
        for module in self.layers.values():
            if on:
                module.active = self.name
            elif module.active == self.name:
                module.active = None

    def merged_weights(self) -> list[tuple[nn.Parameter, Tensor]]:
        changes = []
        for module in self.layers.values():
            changes += module.parts[self.name].merged(module.base)
        return changes

    def remove(self) -> None:
        for layer, module in self.layers.items():
            del module.parts[self.name]
            if not module.parts:
                replace_module(self.model, layer, module.base)


def plain_layer(module: nn.Module) -> nn.Module:
    """The layer itself, without its adapters."""
    return module.base if isinstance(module, Adapted) else module


def is_linear(module: nn.Module) -> bool:
    """Whether a part can sit here: a linear layer, dense or NF4, adapted already or not."""
    return isinstance(plain_layer(module), (nn.Linear, NF4Linear))


def is_nf4(module: nn.Module) -> bool:
    """Whether the layer's weight is in NF4."""
    return isinstance(plain_layer(module), NF4Linear)


def parameter_like(base: nn.Module, *shape: int) -> nn.Parameter:
    """An empty parameter on the layer's device, in float32 also beside 16-bit weights: small steps must count."""
    like = base.codes if isinstance(base, NF4Linear) else base.weight
    dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
    return nn.Parameter(torch.empty(shape, device=like.device, dtype=dtype))
