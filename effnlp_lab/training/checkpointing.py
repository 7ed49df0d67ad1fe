"""Activation checkpointing: keep a function's inputs, drop what it computed, and compute it again in backward.

Chen et al. 2016, "Training deep nets with sublinear memory cost". With L layers in segments of sqrt(L), a step keeps
sqrt(L) inputs of segments and, in backward, the activations of one segment: O(sqrt(L)) in place of O(L), for one more
forward. The second run must be the first one again: same random numbers (or dropout differs), same autocast dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from effnlp_lab.errors import UsageError


def checkpoint(function: Callable[..., Any], *args: Any, keep_random_state: bool = True, **kwargs: Any) -> Any:
    """function(*args, **kwargs), whose activations are not kept but computed again in backward.

    Arguments and results may be nested in tuples, lists and dicts, and hold what is no tensor. Gradients flow to the
    tensors among the arguments that require them and to the parameters that the function uses, bit for bit those of a
    plain call; every floating result is taken to require a gradient. `keep_random_state=False` spares saving the states
    of the generators where nothing is random. The function must not depend on what changes between the two runs.
    torch.autograd.grad and a second backward through the same graph are not supported: parameters that the function
    uses get their gradients by accumulation.
    """
    leaves, structure = tree_flatten((args, kwargs))
    run = _Run(function, structure, keep_random_state)
    anchor = torch.empty(0, requires_grad=True)  # makes autograd record the call where no argument requires a gradient
    flat = _Checkpoint.apply(run, anchor, *leaves)
    return tree_unflatten(list(flat), run.output_structure)


class _Run:
    """What both runs of a function share, and what only the first can know."""

    def __init__(self, function: Callable[..., Any], structure: Any, keep_random_state: bool) -> None:
        self.function, self.structure, self.keep_random_state = function, structure, keep_random_state
        self.output_structure: Any = None
        self.random: _RandomState | None = None
        self.autocast: list[dict[str, Any]] = []

    def __call__(self, leaves: Sequence[Any]) -> list[Any]:
        args, kwargs = tree_unflatten(list(leaves), self.structure)
        outputs, self.output_structure = tree_flatten(self.function(*args, **kwargs))
        return outputs


class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run: _Run, anchor: Tensor, *leaves: Any) -> tuple[Any, ...]:
        devices = sorted({leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)} | {"cpu"})
        run.autocast = [_autocast_settings(device) for device in devices]
        if run.keep_random_state:
            run.random = _RandomState([leaf for leaf in leaves if isinstance(leaf, Tensor)])
        # Not cached: a weight that autocast casts here is cast without a graph, and a later use of it would get that.
        with _autocast([settings | {"cache_enabled": False} for settings in run.autocast]):
            outputs = run(leaves)
        ctx.run = run
        ctx.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        ctx.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.save_for_backward(*(leaves[i] for i in ctx.places))
        ctx.set_materialize_grads(False)
        # An output that is an input would be the same tensor on both sides of the graph.
        inputs = {id(leaves[i]) for i in ctx.places}
        return tuple(x.view_as(x) if id(x) in inputs else x for x in outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *output_gradients: Tensor | None) -> tuple[Any, ...]:
        run, leaves = ctx.run, list(ctx.others)
        for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            leaves[place] = tensor.detach().requires_grad_(ctx.needs_input_grad[2 + place])
        with torch.enable_grad(), _autocast(run.autocast), run.random.restored() if run.random else ExitStack():
            outputs = run(leaves)
        pairs = [
            (output, gradient)
            for output, gradient in zip(outputs, output_gradients, strict=True)
            if gradient is not None and isinstance(output, Tensor) and output.requires_grad
        ]
        if pairs:
            torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
        return None, None, *(leaf.grad if isinstance(leaf, Tensor) and leaf.requires_grad else None for leaf in leaves)


class _RandomState:
    """The states of the CPU's generator and of those of the devices of some tensors."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.cpu = torch.get_rng_state()
        used = {tensor.get_device() for tensor in tensors if tensor.is_cuda}
        if not used and torch.cuda.is_available() and torch.cuda.is_initialized():
            used = {torch.cuda.current_device()}  # the function may still make tensors there
        self.devices = {index: torch.cuda.get_rng_state(index) for index in sorted(used)}

    @contextmanager
    def restored(self):
        """These states inside, and afterwards those from before again."""
        with torch.random.fork_rng(devices=list(self.devices)):
            torch.set_rng_state(self.cpu)
            for index, state in self.devices.items():
                torch.cuda.set_rng_state(state, index)
            yield


def _autocast_settings(device: str) -> dict[str, Any]:
    return {
        "device_type": device,
        "enabled": torch.is_autocast_enabled(device),
        "dtype": torch.get_autocast_dtype(device),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }


@contextmanager
def _autocast(settings: Sequence[dict[str, Any]]):
    with ExitStack() as stack:
        for one in settings:
            stack.enter_context(torch.autocast(**one))
        yield


def sqrt_segments(layers: int) -> int:
    """How many segments keep the least: about sqrt(layers), for as many layers in each.

    With s segments of L / s layers, s inputs and the activations of L / s layers are held at once: least at s = sqrt(L)
    where both weigh the same.
    """
    if layers < 1:
        raise UsageError(f"{layers} layers cannot be cut: there must be at least 1.")
    return max(1, round(math.sqrt(layers)))


def checkpoint_sequential(functions: Sequence[Callable[[Any], Any]], x: Any, segments: int | None = None) -> Any:
    """The functions one after another, each segment of them checkpointed. `segments` is sqrt_segments unless given.

    Raises UsageError where there are fewer functions than segments.
    """
    functions = list(functions)
    segments = sqrt_segments(len(functions)) if segments is None else segments
    if not 1 <= segments <= len(functions):
        raise UsageError(
            f"{len(functions)} functions cannot be cut in {segments} segments: give 1 to {len(functions)}."
        )
    edges = [round(i * len(functions) / segments) for i in range(segments + 1)]
    for first, end in zip(edges[:-1], edges[1:], strict=True):
        x = checkpoint(_one_after_another, functions[first:end], x)
    return x


def _one_after_another(functions: Sequence[Callable[[Any], Any]], x: Any) -> Any:
    for function in functions:
        x = function(x)
    return x


def checkpoint_layers(model: nn.Module, enabled: bool = True) -> int:
    """Checkpoint every layer of a `transformers` model (the longest nn.ModuleList in it); returns how many.

    Layers run as before in evaluation and where no gradient is wanted. A key-value cache is switched off while
    training: the second run would append to it again. `enabled=False` takes the checkpoints off. Raises UsageError for
    a model without a list of layers.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise UsageError(f"{type(model).__name__} has no nn.ModuleList of layers: wrap its parts with checkpoint().")
    layers = max(lists, key=len)
    for layer in layers:
        if "forward" in vars(layer) and hasattr(layer.forward, "checkpointed"):
            del layer.forward
        if enabled:
            layer.forward = _checkpointed(layer)
    return len(layers)


def _checkpointed(layer: nn.Module) -> Callable[..., Any]:
    plain = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return plain(*args, **kwargs)
        for name in ("past_key_values", "past_key_value"):
            if kwargs.get(name) is not None:
                kwargs[name] = None
        if kwargs.get("use_cache"):
            kwargs["use_cache"] = False
        return checkpoint(plain, *args, **kwargs)

    forward.checkpointed = plain
    return forward
