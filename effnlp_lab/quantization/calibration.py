"""Calibration text, and what of it reaches each layer of a model: the Hessians, with one layer on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effnlp_lab.errors import UsageError
from effnlp_lab.quantization.hessian import Hessian


def calibration_sequences(ids: Tensor, count: int = 128, length: int = 2048, *, seed: int = 0) -> Tensor:
    """`count` pieces of `length` tokens from random places of a text, int64 [count, length].

    ids: the text's tokens, [n]. Raises UsageError for a text shorter than one sequence.
    """
    ids = torch.as_tensor(ids).flatten()
    if count < 1 or length < 1:
        raise UsageError(f"{count} sequences of {length} tokens calibrate nothing: give at least 1 of at least 1.")
    if len(ids) < length:
        raise UsageError(
            f"The calibration text has {len(ids)} tokens, fewer than one sequence of {length}: give more text, or a "
            "smaller length."
        )
    starts = torch.randint(len(ids) - length + 1, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([ids[start : start + length] for start in starts.tolist()]).long()


class _Reached(Exception):
    """The first layer was called: nothing behind it needs to run."""


class Activations:
    """What flows between the layers for each batch of the calibration text, and the layers' other arguments.

    states: [batch, length, hidden] a batch, on the device where a quarter of its free memory holds them all, else on
    the CPU, from where a batch at a time travels.
    """

    def __init__(self, model: nn.Module, layers: nn.ModuleList, ids: Tensor, batch_size: int,
                 device: torch.device) -> None:  # fmt: skip
        self.device = device
        self.states: list[Tensor] = []
        self.named: list[dict[str, Any]] = []

        def catch(module: nn.Module, args: tuple, named: dict[str, Any]) -> None:
            named = dict(named)
            self.states.append(args[0] if args else named.pop("hidden_states"))
            self.named.append(named)
            raise _Reached

        home = model.get_input_embeddings().weight.device
        hook = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            for batch in ids.split(batch_size):
                try:
                    model(input_ids=batch.to(home), use_cache=False)
                except _Reached:
                    pass
        finally:
            hook.remove()
        size = sum(state.numel() * state.element_size() for state in self.states)
        self.home = torch.device("cpu") if size > _free_bytes(device) // 4 else device
        self.states = [state.to(self.home) for state in self.states]

    def run(self, layer: nn.Module, *, keep: bool) -> None:
        """Every batch through `layer`, which is on the device; keep: its outputs are the next layer's inputs."""
        for index, state in enumerate(self.states):
            output = layer(state.to(self.device), **to_device(self.named[index], self.device))
            if keep:
                output = output[0] if isinstance(output, tuple) else output
                self.states[index] = output.to(self.home)

    def hessians(self, layer: nn.Module, names: list[str]) -> list[tuple[list[str], Hessian]]:
        """The Hessians of the linear modules `names` of `layer`; modules that receive one tensor share one."""
        watch = _Watch(layer, names)
        try:
            for index, state in enumerate(self.states):
                watch.seen.clear()
                layer(state.to(self.device), **to_device(self.named[index], self.device))
        finally:
            watch.remove()
        shared: dict[str, list[str]] = {}
        for name in names:
            shared.setdefault(watch.leader.get(name, name), []).append(name)
        return [(several, watch.found[first]) for first, several in shared.items()]


class _Watch:
    """Hooks that add up a Hessian for each different input tensor of a layer's linear modules."""

    def __init__(self, layer: nn.Module, names: list[str]) -> None:
        self.seen: dict[tuple, tuple[str, Tensor]] = {}  # of one pass; holds the tensors, so that no address returns
        self.leader: dict[str, str] = {}
        self.found = {name: Hessian(layer.get_submodule(name).in_features) for name in names}
        self.hooks = [layer.get_submodule(name).register_forward_pre_hook(self._hook(name)) for name in names]

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, args: tuple) -> None:
            x = args[0]
            first, _ = self.seen.setdefault((x.data_ptr(), x.shape, x.stride()), (name, x))
            if self.leader.setdefault(name, first) == name:
                self.found[name].add(x)

        return add

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def to_device(value: Any, device: torch.device) -> Any:
    """The tensors of nested tuples, lists and dicts on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(to_device(inner, device) for inner in value)
    if type(value) is dict:
        return {key: to_device(inner, device) for key, inner in value.items()}
    return value


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 << 62
