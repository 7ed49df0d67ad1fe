"""How the answers of lab 04 are called. Runs beside the student's code.

Layers are put through a script of steps ("forward", "merge", ...), and what each step showed is noted in order. What a
machine does not change is noted beside the numbers: which parameters are trained, how large a tensor was made on the
way, how often a weight was dequantized and whether a dense copy of it was still held.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Sizes(TorchDispatchMode):
    """Notes the numbers of the largest tensor that an operation made; views make none."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import torch's compiler at the first operation: seconds, inside a time limit

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not getattr(func, "is_view", False):
            sizes = [t.numel() for t in tree_iter(out) if isinstance(t, Tensor)]
            self.largest = max(self.largest, *sizes, 0)
        return out


class Conversions(TorchDispatchMode):
    """Notes whether NaN was turned into whole numbers: what that gives depends on the machine."""

    def __init__(self) -> None:
        super().__init__()
        self.of_nan = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see Sizes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("_to_copy", "copy_") and not out.is_floating_point():
            given = args[-1] if func.overloadpacket.__name__ == "_to_copy" else args[1]
            self.of_nan |= given.is_floating_point() and bool(given.isnan().any())
        return out


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer with these numbers, trained unless somebody freezes it."""
    layer = nn.Linear(*weight.shape[::-1], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def weighed_sum(out: Tensor) -> Tensor:
    """A loss that treats every number differently."""
    return (torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype, device=out.device).view(out.shape) * out).sum()


def started(layer: nn.Module, x: Tensor) -> dict:
    """What a new layer shows: its output, its parameters, and which of them learn."""
    out = layer(x)
    if out.requires_grad:
        weighed_sum(out).backward()
    found = dict(layer.named_parameters())
    return {
        "output": out.detach(),
        "trained": sorted(name for name, p in found.items() if p.requires_grad),
        "parameters": {name: p.detach() for name, p in found.items()},
        "gradients": {name: p.grad for name, p in found.items()},
    }


def scale_of(layer: nn.Module, x: Tensor) -> float | None:
    """The scale of a new layer's update, from the gradient that has reached b; None where none has."""
    a, b = getattr(layer, "a", None), getattr(layer, "b", None)
    if a is None or b is None or b.grad is None or not a.any():
        return None
    weights = torch.linspace(0.5, 1.5, len(b) * x.shape[:-1].numel(), dtype=x.dtype, device=x.device)
    unscaled = weights.view(-1, len(b)).T @ (x.flatten(0, -2) @ a.detach().T)
    if unscaled.shape != b.grad.shape:
        return None
    return ((unscaled * b.grad).sum() / unscaled.square().sum()).item()


def LoRALinear(answer, weight, bias, x, r, alpha, a=None, b=None, script=None):
    """`a`, `b`: trained values, None for a new layer. `script`: steps, see below."""
    base = linear(weight, bias)
    layer = answer(base, r, alpha)
    if script is None:
        return {**started(layer, x), "scale": scale_of(layer, x)}
    with torch.no_grad():
        layer.a.copy_(a)
        layer.b.copy_(b)
    seen = []
    for step in script:
        if step == "forward":
            seen.append(layer(x).detach())
        elif step == "gradients":
            leaf = x.detach().clone().requires_grad_()
            weighed_sum(layer(leaf)).backward()
            seen.append({"x": leaf.grad, "a": layer.a.grad, "b": layer.b.grad, "base": layer.base.weight.grad})
        elif step == "largest":
            with Sizes() as sizes:
                layer(x)
            seen.append(sizes.largest)
        elif step == "weight":
            seen.append(layer.base.weight.detach().clone())
        elif step == "restored":
            seen.append(torch.equal(layer.base.weight.detach(), weight))
        elif step == "train":
            with torch.no_grad():
                layer.b.mul_(-1.5)
        else:  # merge, unmerge, enable, disable
            getattr(layer, step)()
    return seen


class Wrapped(nn.Module):
    """What `make` gives: the layer, a number to train and one to leave."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.gain = nn.Parameter(torch.ones(1))
        self.fixed = nn.Parameter(torch.ones(1), requires_grad=False)


class Projection(nn.Linear):
    """A linear layer by another name."""


KINDS = {
    "linear": lambda: nn.Linear(2, 2),
    "projection": lambda: Projection(2, 2),
    "norm": lambda: nn.LayerNorm(2),
    "embedding": lambda: nn.Embedding(3, 2),
}


def model_of(modules: dict[str, str]) -> nn.Module:
    """A model with a module of some kind at each dotted name."""
    model = nn.Module()
    for name, kind in modules.items():
        *path, leaf = name.split(".")
        parent = model
        for step in path:
            if step not in parent._modules:
                parent.add_module(step, nn.Module())
            parent = parent._modules[step]
        parent.add_module(leaf, KINDS[kind]())
    return model


def inject(answer, modules, targets):
    """`targets`: a list for each call. The last call may be refused."""
    model = model_of(modules)
    original = {name: module for name, module in model.named_modules() if name in modules}
    made, told = [], {"names": [], "refused": None}
    for wanted in targets:
        before = state_of(model, original)
        calls = len(made)

        def make(layer):
            made.append(next((name for name, module in original.items() if module is layer), "another layer"))
            return Wrapped(layer)

        try:
            told["names"].append(answer(model, list(wanted), make))
        except ValueError as error:
            unchanged = state_of(model, original) == before and len(made) == calls
            named = [target for target in wanted if repr(target) in str(error) or target in str(error)]
            told["refused"] = {"unchanged": unchanged, "named": named}
    return {**told, "made": sorted(made), **state_of(model, original)}


def state_of(model: nn.Module, original: dict[str, nn.Module]) -> dict:
    """Which names hold a wrapped layer, which the layer they had, and what is trained."""
    wrapped = [name for name, module in model.named_modules() if isinstance(module, Wrapped)]
    kept = [name for name, module in original.items() if place(model, name) is module]
    inside = [name for name in wrapped if getattr(place(model, name), "base", None) is original.get(name)]
    trained = sorted(name for name, p in model.named_parameters() if p.requires_grad)
    return {"wrapped": wrapped, "kept": kept, "inside": inside, "trained": trained}


def place(model: nn.Module, name: str) -> nn.Module | None:
    """The module at a dotted name, None where there is none."""
    for step in name.split("."):
        model = getattr(model, step, None)
    return model


def Bottleneck(answer, weight, bias, x, size, trained=None):
    """`trained`: numbers for the adapter's parameters by name, None for a new adapter."""
    base = linear(weight, bias)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    layer = answer(base, size)
    if trained is None:
        return started(layer, x)
    with torch.no_grad():
        for name, values in trained.items():
            layer.get_parameter(name).copy_(values)
    leaf = x.detach().clone().requires_grad_()
    out = layer(leaf)
    weighed_sum(out).backward()
    return {"output": out.detach(), "gradient of x": leaf.grad}


def affine_int8(answer, x, block):
    return answer(x, block)


def NF4(answer, what, **inputs):
    if what == "levels":  # made of nothing, and so on the CPU
        levels, like = answer.levels(), inputs["like"]
        return levels.to(like.device) if isinstance(levels, Tensor) else levels
    return getattr(answer, what)(**inputs)


def double_quantize(answer, absmax, group):
    with Conversions() as seen:
        told = answer(absmax, group)
    return {"told": told, "NaN became a number": seen.of_nan}


def qlora_linear(answer, weight, x, a, b, scaling, learns):
    """`learns`: which of x, a, b require gradients."""
    held, calls = [], []

    def dequantize():
        dense = weight * 1.0
        held.append(weakref.ref(dense.untyped_storage()))
        calls.append(None)
        return dense

    def alive():
        return sum(ref() is not None for ref in held)

    leaves = {n: t.detach().clone().requires_grad_(n in learns) for n, t in (("x", x), ("a", a), ("b", b))}
    out = answer(leaves["x"], leaves["a"], leaves["b"], scaling, dequantize)
    told = {"output": out.detach().clone(), "held": alive(), "calls": [len(calls)]}
    weighed_sum(out).backward()
    told["calls"].append(len(calls))
    return {**told, "gradients": {name: leaf.grad for name, leaf in leaves.items()}}


def serve_adapters(answer, x, weight, bias, adapters, names):
    calls = []

    def base(rows):
        calls.append(None)
        return nn.functional.linear(rows, weight, bias)

    out = answer(x, base, {name: tuple(parts) for name, parts in adapters.items()}, names)
    return {"output": out, "calls of base": len(calls)}


def in_subspace(answer, start, directions, z):
    z = z.detach().clone().requires_grad_()
    point = answer(start, directions, z)
    if not isinstance(point, dict):
        raise TypeError(f"return a dict of tensors, not a {type(point).__name__}")
    loss = sum(weighed_sum(torch.sin(point[name])) for name in sorted(point))
    if loss.requires_grad:
        loss.backward()
    return {"point": {name: value.detach() for name, value in point.items()}, "gradient": z.grad}
