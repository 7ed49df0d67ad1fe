"""What every method is: parameters, tensors to save, on and off, merged or not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from effnlp_lab.errors import UsageError


class Adapter(ABC):
    """One adapter on one model. Made by `add_adapter`, which keeps the base frozen.

    A method says which parameters it adds (`parameters`), under which names they are saved (`tensors`), and how it is
    turned on and off. `merge` is for those whose effect can be written into the base's weights.
    """

    def __init__(self, model: nn.Module, config: Any, name: str) -> None:
        self.model, self.config, self.name = model, config, name
        self.merged = False
        self.active = False
        self._kept: list[tuple[nn.Parameter, Tensor]] = []

    @abstractmethod
    def tensors(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by the model's own names: what is trained, saved and loaded."""

    @abstractmethod
    def switch(self, on: bool) -> None:
        """Let the model be computed with the adapter, or without."""

    @abstractmethod
    def remove(self) -> None:
        """Leave the model as it was before the adapter was added."""

    def merged_weights(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Parameters of the base with the values that take the adapter in. Raises UsageError where there are none."""
        raise UsageError(f"{type(self.config).__name__[:-6]} cannot be merged: it changes no weight of the base.")

    def activate(self, on: bool) -> None:
        """Turn on or off; a merged adapter stays in the base's weights until it is unmerged."""
        self.active = on
        self.switch(on and not self.merged)
        for parameter in self.parameters():
            parameter.requires_grad_(on and not self.merged)

    def parameters(self) -> list[nn.Parameter]:
        """Each once."""
        return list({id(parameter): parameter for parameter in self.tensors().values()}.values())

    @torch.no_grad()
    def merge(self) -> None:
        """Write the adapter into the base's weights. Their old values are kept in host memory for `unmerge`.

        Raises UsageError when it is merged already, for NaN or infinity, and for a method without merged weights.
        """
        if self.merged:
            raise UsageError(
                f"Adapter {self.name!r} is merged already: a second merge would add it twice; unmerge first."
            )
        check_finite(self.tensors(), f"adapter {self.name!r}")
        changes = self.merged_weights()
        self._kept = [(parameter, parameter.detach().to("cpu", copy=True)) for parameter, _ in changes]
        for parameter, value in changes:
            parameter.copy_(value)
        self.merged = True
        self.activate(self.active)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the base's weights their old values back, bit for bit. Raises UsageError when it is not merged."""
        if not self.merged:
            raise UsageError(f"Adapter {self.name!r} is not merged: there is nothing to unmerge.")
        for parameter, value in self._kept:
            parameter.copy_(value)
        self._kept, self.merged = [], False
        self.activate(self.active)


class Holder(nn.Module):
    """Where a model keeps the parameters of an adapter that sits at no single layer: they move with it."""

    adapters_inside = "all"

    def __init__(self, **lists: list[nn.Parameter]) -> None:
        super().__init__()
        for name, parameters in lists.items():
            setattr(self, name, nn.ParameterList(parameters))


def check_finite(tensors: dict[str, Tensor], what: str) -> None:
    """Refuse NaN and infinity, and name the first tensor that holds one."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UsageError(
                f"{what[0].upper() + what[1:]} holds NaN or infinity in {name}: train it again, or load another."
            )
