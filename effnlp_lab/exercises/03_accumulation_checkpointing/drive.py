"""How the answers of lab 03 are called. Runs beside the student's code.

Models here take notes: how often they ran, which graphs and which tensors were still held, what the random state was.
A note does not depend on the machine, and says more than a peak of memory does.
"""

from __future__ import annotations

import hashlib
import types
import weakref

import torch
import torch._dynamo  # optimizers import it at their first step: seconds, which belong in no time limit
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map


def training_memory(answer, shape, batch, length, size, wanted, counts=None):
    """`wanted`: the parts that the case is about. `counts`: per_token and per_pair, where they are not the default."""
    told = answer(shape, batch, length, size, **(counts or {}))
    if not isinstance(told, dict):
        raise TypeError(f"return a dict of numbers of bytes, not a {type(told).__name__}")
    return {name: value for name, value in told.items() if name in wanted}


def steps_of_memory(fixed: int, each: int, square: int, block: int):
    """Peak bytes by batch: fixed + each * b + square * b * b, given out in blocks."""

    def memory(batch: int) -> int:
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ValueError(f"memory({batch!r}): a batch is a whole number of at least 1")
        return -(-(fixed + each * batch + square * batch * batch) // block) * block

    return memory


def largest_batch(answer, curve, capacity):
    memory, asked = steps_of_memory(**curve), []

    def counting(batch):
        asked.append(batch)
        return memory(batch)

    return {"largest": answer(counting, capacity), "calls": len(asked)}


class LanguageModel(nn.Module):
    """Embedding, one hidden layer, output layer. Notes how many of its graphs wait for their backward at once."""

    def __init__(self, weights: dict[str, Tensor], frozen: list[str]) -> None:
        super().__init__()
        for name, value in weights.items():
            self.register_parameter(name, nn.Parameter(value.detach().clone(), requires_grad=name not in frozen))
        self.waiting = self.most_waiting = 0

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.embedding[tokens] @ self.hidden + self.bias)
        logits = hidden @ self.output
        if logits.requires_grad:
            self.waiting += 1
            self.most_waiting = max(self.most_waiting, self.waiting)
            logits.register_hook(self.went_back)
        return logits

    def went_back(self, gradient: Tensor) -> None:
        self.waiting -= 1


def accumulate(answer, weights, micro_batches, frozen, stale, count_graphs):
    model = LanguageModel(weights, frozen)
    for name, gradient in stale.items():
        getattr(model, name).grad = gradient.clone()
    loss = answer(model, micro_batches)
    if loss is None:
        raise TypeError("return the mean loss of the batch: is a return missing?")
    told = {
        "loss": torch.tensor(float(loss), dtype=torch.float32, device=weights["output"].device),
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
    }
    return {**told, "graphs": model.most_waiting} if count_graphs else told


class Piece(nn.Module):
    """A layer with dropout, in one of several forms, that notes its runs, its masks, and which tensors are held."""

    def __init__(self, weights: dict[str, Tensor], form: str) -> None:
        super().__init__()
        for name, value in weights.items():
            self.register_parameter(name, nn.Parameter(value.detach().clone()))
        self.form = form
        self.runs, self.masks, self.storages, self.cut_off = 0, [], [], []

    def forward(self, x, *extras):
        self.runs += 1
        self.cut_off.append(x.grad_fn is None)
        hidden = torch.tanh((self.table[x] if self.form == "ids" else x) @ self.first)
        dropped = self.dropout(hidden)
        self.storages += [weakref.ref(t.untyped_storage()) for t in (hidden, dropped)]
        out = dropped @ self.second
        if self.form == "extras":
            hide, scale, add, nothing = extras
            out = out.masked_fill(hide, 0.0) * scale
            return out + 1 if add and nothing is None else out
        if self.form == "two":
            return out * extras[0]
        if self.form == "nested":
            return {"out": out, "rest": [out.sum(1), (self.masks[-1].sum(1), 7, None)], "first": out[:1] * 2}
        if self.form == "constant":
            return out, self.masks[-1].to(out.dtype) * 3, out.mean()
        return out

    def dropout(self, hidden: Tensor) -> Tensor:
        if self.form == "device dropout":
            dropped = F.dropout(hidden, 0.5)
            self.masks.append(dropped.detach() != 0)
            return dropped
        kept = torch.rand(hidden.shape) < 0.7  # drawn on the CPU, so that the same seed means the same everywhere
        self.masks.append(kept.to(hidden.device))
        return hidden * self.masks[-1] / 0.7

    def held(self) -> int:
        """How many of the tensors that the function made on its way are still in memory."""
        return sum(ref() is not None for ref in self.storages)


def checkpoint(answer, weights, inputs, tracked, form, seed, twice=False, grad=True):
    return run_piece(answer, weights, inputs, tracked, form, seed, twice, grad)


def run_piece(call, weights, inputs, tracked, form, seed, twice, grad, dtype=None) -> dict:
    """Forward and backward of a piece through `call(function, *inputs)`. `tracked`: which inputs require gradients."""
    if dtype is not None:
        weights = {name: value.to(dtype) for name, value in weights.items()}
        inputs = [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    piece = Piece(weights, form)
    leaves = {i: inputs[i].detach().clone().requires_grad_() for i in tracked}
    given = [torch.sin(leaves[i]) if i in leaves else x for i, x in enumerate(inputs)]  # an earlier layer's outputs
    torch.default_generator.manual_seed(seed)
    with torch.set_grad_enabled(grad):
        outputs = call(piece, *given)
        if twice:
            outputs = call(piece, outputs, *given[1:])
    runs, held = [piece.runs], piece.held()
    torch.rand(2)  # a later layer draws random numbers too
    loss = weighed_sum(outputs)
    if grad and loss.requires_grad:
        loss.backward()
    runs.append(piece.runs)
    random_state = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()[:16]
    notes = {"runs": runs, "held": held, "same masks": masks_agree(piece.masks, 2 if twice else 1)}
    if held:
        notes["first input cut off"] = piece.cut_off[0]  # tells two ways apart in which tensors are held
    if form == "device dropout":
        return notes
    gradients = {f"input {i}": leaf.grad for i, leaf in leaves.items()}
    gradients |= {name: p.grad for name, p in piece.named_parameters()}
    shown = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, outputs)
    return {"outputs": shown, "gradients": gradients, "random state": random_state, **notes}


def weighed_sum(outputs) -> Tensor:
    """A loss that treats every number of every floating-point output differently."""
    total = torch.zeros(())
    for x in tree_iter(outputs):
        if isinstance(x, Tensor) and x.is_floating_point():
            weights = torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype, device=x.device).view(x.shape)
            total = total.to(x) + (weights * x).sum()
    return total


def masks_agree(masks: list[Tensor], calls: int) -> bool:
    """Whether each call's recomputation drew the mask of its first run; the last call is recomputed first."""
    first, again = masks[:calls], masks[calls:][::-1]
    return all(torch.equal(a, b) for a, b in zip(first, again, strict=False))


class Precisions(TorchDispatchMode):
    """Notes the dtypes of matrix products, and the delicate operations that gave a half-precision result."""

    PRODUCTS = frozenset("mm bmm addmm baddbmm mv addmv dot addbmm".split())
    DELICATE = frozenset(
        """exp exp2 expm1 log log2 log1p pow square rsqrt sqrt reciprocal sum mean var var_mean std norm cumsum prod
        linalg_vector_norm _softmax _log_softmax logsumexp nll_loss_forward nll_loss cross_entropy_loss
        native_layer_norm _fused_rms_norm rms_norm""".split()
    )

    def __init__(self) -> None:
        super().__init__()
        self.products: list[str] = []
        self.half: set[str] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import torch's compiler at the first operation: seconds, inside a time limit

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in self.PRODUCTS:
            self.products.append(str(args[0].dtype).removeprefix("torch."))
        elif name.rstrip("_") in self.DELICATE or name in self.DELICATE:
            if any(isinstance(t, Tensor) and t.dtype in (torch.float16, torch.bfloat16) for t in tree_iter(out)):
                self.half.add("loss" if self.products else "norm")
        return out


def mixed_loss(answer, x, gain, weight, targets):
    with Precisions() as seen:
        loss = answer(x, gain, weight, targets)
    if not isinstance(loss, Tensor) or loss.ndim:
        raise TypeError("return the mean loss as a tensor of no dimensions")
    return {"loss": loss.detach().float(), "dtype": str(loss.dtype).removeprefix("torch."),
            "products in": sorted(set(seen.products)), "in half precision": sorted(seen.half)}


PARAMETERS = {"matrix": (3, 4), "bias": (4,), "last": (2,)}


def scaled_step(answer, start, gradients, unused, scale, max_norm, groups):
    """`start`: all parameters in one row. `gradients`: the true ones, a row for each step. `unused`: the parameter that
    takes no part in the first step, if any."""
    weights = {name: nn.Parameter(part) for name, part in parted(start.clone()).items()}
    listed = list(weights.values())
    optimizer = torch.optim.SGD([{"params": [p]} for p in listed] if groups else listed, lr=0.5, momentum=0.9)
    scaler = types.SimpleNamespace(scale=scale, good_steps=0)
    stepped, scales, after = [], [], []
    for row in gradients:
        optimizer.zero_grad()
        for name, gradient in parted(row.clone()).items():
            if name != unused or after:
                weights[name].grad = gradient * scaler.scale
        told = answer(scaler, optimizer, max_norm)
        stepped.append(told if told is None else bool(told))
        scales.append(float(scaler.scale))
        after.append(torch.cat([p.detach().flatten() for p in listed]))
    return {"parameters": torch.stack(after), "stepped": stepped, "scale": scales}


def parted(row: Tensor) -> dict[str, Tensor]:
    """The parameters that lie in one row."""
    parts = row.split([torch.Size(shape).numel() for shape in PARAMETERS.values()])
    return {name: part.view(shape) for (name, shape), part in zip(PARAMETERS.items(), parts, strict=True)}


class Layer(nn.Module):
    """One layer of a stack; notes how often it ran, and whether the output of its first run is still held."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.runs, self.storage = 0, None

    def forward(self, x: Tensor) -> Tensor:
        out = torch.tanh(x @ self.weight)
        self.runs += 1
        if self.storage is None:
            self.storage = weakref.ref(out.untyped_storage())
        return out


def checkpoint_segments(answer, weights, x):
    return run_stack(answer, weights, x)


def run_stack(call, weights, x) -> dict:
    layers = [Layer(weight) for weight in weights]
    leaf = x.detach().clone().requires_grad_()
    out = call(layers, leaf)
    held = [i for i, layer in enumerate(layers) if layer.storage is not None and layer.storage() is not None]
    weighed_sum(out).backward()
    return {"out": out.detach(), "gradients": [leaf.grad, *(layer.weight.grad for layer in layers)],
            "runs": [layer.runs for layer in layers], "held": held}


def factored_update(answer, gradient, row, column, decay):
    return answer(gradient, row, column, decay)
