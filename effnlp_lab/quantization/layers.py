"""The decoder layers of a model, the linear modules in them, and one layer at a time on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from effnlp_lab.errors import UsageError
from effnlp_lab.quantization.checks import check_modules
from effnlp_lab.quantization.linear import QuantizedLinear


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the list of the model's layers: the longest list of modules of one class.

    `model.layers` in Llama and its kin, `model.decoder.layers` in OPT. Raises UsageError for a model without one.
    """
    found = [
        (name, module) for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(layer) for layer in module}) == 1
        and any(isinstance(inner, nn.Linear | QuantizedLinear) for inner in module[0].modules())
    ]  # fmt: skip
    if not found:
        raise UsageError(
            f"{type(model).__name__} has no list of layers with linear modules: give a causal language model of "
            "transformers, such as a Llama."
        )
    return max(found, key=lambda item: len(item[1]))


def linear_names(model: nn.Module, patterns: Sequence[str] | None = None) -> list[list[str]]:
    """For each decoder layer the names, within the layer, of its linear modules (quantized ones too) to be quantized.

    patterns: whole names or their last parts ("q_proj", "mlp.up_proj", "model.layers.0.self_attn.q_proj"); None: all.
    Raises UsageError, with the nearest names, for one that matches nothing.
    """
    prefix, layers = decoder_layers(model)
    names = [
        [name for name, module in layer.named_modules() if isinstance(module, nn.Linear | QuantizedLinear)]
        for layer in layers
    ]
    if patterns is None:
        return names
    whole = [[f"{prefix}.{index}.{name}" for name in inner] for index, inner in enumerate(names)]
    chosen = set(check_modules(patterns, [name for inner in whole for name in inner]))
    return [
        [name for name, full in zip(inner, fulls, strict=True) if full in chosen]
        for inner, fulls in zip(names, whole, strict=True)
    ]


def replace_linears(layer: nn.Module, new: dict[str, QuantizedLinear]) -> None:
    """Put quantized layers in the place of the modules of these names."""
    for name, module in new.items():
        parent, _, last = name.rpartition(".")
        setattr(layer.get_submodule(parent) if parent else layer, last, module)


@contextmanager
def on_device(layer: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """The layer on `device`, and back where it was afterwards."""
    home = next(layer.parameters()).device
    layer.to(device)
    try:
        yield layer
    finally:
        layer.to(home)
