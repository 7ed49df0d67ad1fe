"""The peak memory of a training step, predicted from sizes alone, and the largest batch that fits.

Weights and optimizer state are there all the time. What comes and goes makes the peak, at one of these moments:

- the loss: every activation is kept, and the logits are there three times (log-probabilities, and two gradients);
- the backward of the head: every activation, the gradient of the logits and that of the head's matrix;
- the backward of some layer: activations of the layers before it, gradients of the layers after it;
- the end of backward: all gradients, and one more for a tied embedding, which gets two;
- the optimizer's step: all gradients, and what the optimizer needs for itself.

Rajbhandari et al. 2020 (ZeRO), section 3, for the model state; activations.py for what autograd keeps. Bytes are those
of tensors (`torch.cuda.max_memory_allocated`); the CUDA context and the allocator's unused blocks come on top.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from effnlp_lab.errors import UsageError
from effnlp_lab.training.activations import Precision, layer_activations, outer_activations
from effnlp_lab.training.shapes import ModelShape

CONTEXT_BYTES = 500 * 2**20
"""About what the CUDA context and the loaded kernels of a PyTorch process take on a data-centre card: not predicted."""
WORKSPACE_BYTES = 40 * 2**20
"""What matrix products keep as workspace on a GPU."""


@dataclass(frozen=True)
class TrainingSetup:
    """How a step is run. `batch` is the rows of one micro-batch, `length` their tokens.

    accumulation: micro-batches a step. checkpointing: every layer by itself, as `checkpoint_layers` does. autocast:
    None, torch.bfloat16 or torch.float16 (weights stay in `weights`). optimizer: one of OPTIMIZERS. attention: "sdpa"
    or "eager", without a padding mask. device: "cuda", or "cpu", where a dropout mask takes as much as its input.
    """

    batch: int = 1
    length: int = 512
    accumulation: int = 1
    checkpointing: bool = False
    autocast: torch.dtype | None = None
    weights: torch.dtype = torch.float32
    optimizer: str = "adamw"
    attention: str = "sdpa"
    device: str = "cuda"

    def __post_init__(self) -> None:
        for name in ("batch", "length", "accumulation"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}: it must be at least 1.")
        if self.optimizer not in OPTIMIZERS:
            raise UsageError(f"Unknown optimizer {self.optimizer!r}: expected one of {', '.join(OPTIMIZERS)}.")
        if self.attention not in ("sdpa", "eager"):
            raise UsageError(f"Unknown attention {self.attention!r}: expected 'sdpa' or 'eager'.")

    @property
    def precision(self) -> Precision:
        stream = self.weights.itemsize
        compute = min(stream, self.autocast.itemsize) if self.autocast else stream
        return Precision(stream, compute, 1 if self.device == "cuda" else compute)


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes. `timeline` holds each moment's total, `components` what is there at the highest of them.

    components: weights, gradients, optimizer state, activations (what autograd keeps of layers, last norm and head),
    logits and loss, cast weights (the copies that autocast makes), temporary (what an operation needs while it runs).
    """

    components: dict[str, int]
    timeline: dict[str, int]
    moment: str
    context: int = CONTEXT_BYTES

    @property
    def peak(self) -> int:
        """What torch.cuda.max_memory_allocated will say."""
        return self.timeline[self.moment]

    def table(self) -> str:
        """Plain text: gigabytes by component at the peak."""
        rows = [f"{name:<16}{size / 1e9:8.2f} GB" for name, size in self.components.items() if size]
        return "\n".join([*rows, f"{'peak':<16}{self.peak / 1e9:8.2f} GB, at {self.moment}"])


@dataclass(frozen=True)
class OptimizerCost:
    """Bytes of state, and of what a step needs while it runs, from the shapes of all parameters and their itemsize."""

    state: Callable[[list[tuple[int, ...]]], int]
    temporary: Callable[[list[tuple[int, ...]], int], int]


def _numbers(tensors: list[tuple[int, ...]]) -> int:
    return sum(map(math.prod, tensors))


def _eight_bit(tensors: list[tuple[int, ...]]) -> int:
    """A byte for each of two states, and four for each of their blocks of 256; float32 below 4096 numbers."""
    sizes = list(map(math.prod, tensors))
    return sum(2 * n + 8 * -(-n // 256) if n >= 4096 else 8 * n for n in sizes)


def _factored(tensors: list[tuple[int, ...]]) -> int:
    """A number a row and a column of a matrix; a number an entry of a vector. float32."""
    return 4 * sum(math.prod(t[:-1]) + math.prod(t[:-2] + t[-1:]) if len(t) > 1 else math.prod(t) for t in tensors)


def _matrices(tensors: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [t for t in tensors if len(t) > 1]


def _copies_of_largest(copies: int) -> Callable[[list[tuple[int, ...]], int], int]:
    """Float32 copies of one tensor after another; with smaller parameters also of it and of its gradient."""
    return lambda tensors, itemsize: 4 * max(map(math.prod, tensors)) * (copies + (0 if itemsize == 4 else 2))


def _float32_list(copies: int) -> Callable[[list[tuple[int, ...]], int], int]:
    """Float32 lists as long as the parameters; with smaller parameters also float32 copies of them and of gradients."""
    return lambda tensors, itemsize: 4 * _numbers(tensors) * (copies + (0 if itemsize == 4 else 2))


OPTIMIZERS: dict[str, OptimizerCost] = {
    # torch's own, by lists of tensors (its default on a GPU): the square roots of all second moments are there at once.
    "adamw": OptimizerCost(lambda t: 8 * _numbers(t), lambda t, itemsize: itemsize * _numbers(t)),
    "adamw_fused": OptimizerCost(lambda t: 8 * _numbers(t), lambda t, itemsize: 0),
    "adamw8bit": OptimizerCost(_eight_bit, lambda t, itemsize: 0),
    "adafactor": OptimizerCost(_factored, _copies_of_largest(2)),
    "came": OptimizerCost(lambda t: 4 * _numbers(t) + _factored(t) + _factored(_matrices(t)), _copies_of_largest(3)),
    "lion": OptimizerCost(lambda t: 4 * _numbers(t), _float32_list(1)),
    "sgd": OptimizerCost(lambda t: 0, lambda t, itemsize: 0),
    "sgd_momentum": OptimizerCost(lambda t: 4 * _numbers(t), lambda t, itemsize: 0),
}


def optimizer_state_bytes(shape: ModelShape | Any, optimizer: str, weights: torch.dtype = torch.float32) -> int:
    """Bytes of optimizer state. torch's optimizers keep it in the dtype of the weights, ours in float32 or 8 bit."""
    setup = TrainingSetup(optimizer=optimizer, weights=weights)
    size = OPTIMIZERS[optimizer].state(_shape(shape).tensors())
    return size * setup.weights.itemsize // 4 if optimizer in ("adamw", "adamw_fused", "sgd_momentum") else size


def predict_memory(model: ModelShape | Any, setup: TrainingSetup | None = None, **changes: Any) -> MemoryPrediction:
    """The peak of a step after the first (which makes the optimizer state), gradients freed before each step.

    model: a ModelShape or a transformers configuration. `changes` are fields of TrainingSetup:
    predict_memory(config, batch=8, length=512, checkpointing=True).
    """
    setup = replace(setup or TrainingSetup(), **changes)
    return _Step(_shape(model), setup).predict()


def largest_batch(
    model: ModelShape | Any, budget_bytes: int, setup: TrainingSetup | None = None, *, margin: float = 0.05,
    **changes: Any,
) -> int:  # fmt: skip
    """The most rows of a micro-batch whose predicted peak, with context and a margin for fragments, fits; 0 for none.

    budget_bytes: all memory of the card. margin: the share of it that is left free.
    """
    if budget_bytes <= 0 or not 0 <= margin < 1:
        raise UsageError(f"budget_bytes is {budget_bytes} and margin {margin}: expected bytes, and a share below 1.")
    shape, setup = _shape(model), replace(setup or TrainingSetup(), **changes)
    room = budget_bytes * (1 - margin) - (CONTEXT_BYTES if setup.device == "cuda" else 0)

    def fits(batch: int) -> bool:
        return _Step(shape, replace(setup, batch=batch)).predict().peak <= room

    if not fits(1):
        return 0
    high = 2
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class _Step:
    """The sizes of one step, and what is in memory at each of its moments."""

    def __init__(self, shape: ModelShape, setup: TrainingSetup) -> None:
        self.shape, self.setup, self.precision = shape, setup, setup.precision
        attention = setup.attention
        if setup.device == "cuda" and self.precision.compute == 4 and shape.kv_heads != shape.heads:
            attention = "eager"  # no fused kernel takes grouped heads in float32: PyTorch falls back to the definition
        self.attention = attention
        tokens = setup.batch * setup.length
        self.stream = tokens * shape.hidden * self.precision.stream
        self.layer = sum(
            x.bytes for x in layer_activations(shape, setup.batch, setup.length, self.precision, attention)
        )
        self.outer = sum(x.bytes for x in outer_activations(shape, setup.batch, setup.length, self.precision))
        self.logits = tokens * shape.vocabulary * 4
        self.outer -= self.logits  # the log-probabilities are counted with logits and loss
        itemsize = setup.weights.itemsize
        self.weights = shape.parameters * itemsize
        self.state = optimizer_state_bytes(shape, setup.optimizer, setup.weights)
        self.layer_gradients = shape.layer_parameters * itemsize
        self.embedding = shape.vocabulary * shape.hidden * itemsize
        linears = sum(map(math.prod, shape.linear_shapes()))
        cast = self.precision.compute if self.precision.autocast else 0
        self.layer_casts, self.head_cast = linears * cast, shape.vocabulary * shape.hidden * cast

    def predict(self) -> MemoryPrediction:
        moments = dict(
            [self._loss(), *map(self._layer, reversed(range(self.shape.layers))), self._end(), self._update()]
        )
        timeline = {moment: sum(parts.values()) for moment, parts in moments.items()}
        highest = max(timeline, key=timeline.get)
        return MemoryPrediction(moments[highest], timeline, highest)

    def _parts(self, **parts: int) -> dict[str, int]:
        """With weights and state, which are there always, in the order of the table."""
        names = ("gradients", "activations", "logits_and_loss", "cast_weights", "temporary")
        workspace = WORKSPACE_BYTES if self.setup.device == "cuda" else 0
        known = {"weights": self.weights, "optimizer state": self.state}
        known |= {name.replace("_", " "): parts.get(name, 0) for name in names}
        known["temporary"] += workspace
        return known

    def _gradients(self, layers_done: int, embedding: bool = True) -> int:
        """Of the layers whose backward is over, and of the head; all of them where an earlier micro-batch made them."""
        if self.setup.accumulation > 1:
            return self.weights
        return layers_done * self.layer_gradients + (self.embedding if embedding else 0)

    def _kept(self, layers: int) -> int:
        """Activations of the first so many layers."""
        return layers * (self.stream if self.setup.checkpointing else self.layer)

    def _casts(self, layers: int) -> int:
        return 0 if self.setup.checkpointing else layers * self.layer_casts

    def _loss(self) -> tuple[str, dict[str, int]]:
        """Log-probabilities, the gradient of the loss towards them, and that towards the logits."""
        layers = self.shape.layers
        return "the loss", self._parts(
            gradients=self._gradients(0, embedding=False),
            activations=self._kept(layers) + self.outer,
            logits_and_loss=3 * self.logits,
            cast_weights=self._casts(layers) + self.head_cast,
        )

    def _head(self) -> tuple[str, dict[str, int]]:
        """The gradient of the logits, once more where it is cast, and that of the head's matrix."""
        layers, cast = self.shape.layers, self.precision.compute / 4 if self.precision.autocast else 0
        return "the backward of the head", self._parts(
            gradients=self._gradients(0, embedding=False),
            activations=self._kept(layers) + self.outer,
            logits_and_loss=int(self.logits * (1 + cast)),
            cast_weights=self._casts(layers) + self.head_cast,
            temporary=self.embedding + self.stream,
        )

    def _layer(self, index: int) -> tuple[str, dict[str, int]]:
        """The backward of layer `index`, whose activations are all there; with checkpointing they were made again."""
        done = self.shape.layers - 1 - index
        again = (self.layer - self.stream, self.layer_casts) if self.setup.checkpointing else (0, 0)
        return f"the backward of layer {index}", self._parts(
            gradients=self._gradients(done),
            activations=self._kept(index + 1) + again[0],
            cast_weights=self._casts(index + 1) + again[1],
            temporary=self._layer_temporary() + self._waiting(),
        )

    def _waiting(self) -> int:
        """The head's gradient of a tied table, which waits for that of the embedding before it is added to the old."""
        return self.embedding if self.shape.tied and self.setup.accumulation > 1 else 0

    def _layer_temporary(self) -> int:
        """Gradients inside a layer: of the stream, of what runs through the MLP or the scores, and of one matrix."""
        shape, tokens = self.shape, self.setup.batch * self.setup.length
        mlp = 2 * tokens * shape.ffn * self.precision.compute
        scores = self.setup.batch * shape.heads * self.setup.length**2 * 4 if self.attention == "eager" else 0
        matrix = max(map(math.prod, shape.linear_shapes())) * self.precision.compute
        return 2 * self.stream + max(mlp, 2 * scores) + matrix

    def _end(self) -> tuple[str, dict[str, int]]:
        """All gradients. A tied table gets two, which autograd adds in a third; one from before stays beside them."""
        new = (3 if self.shape.tied else 1) * self.embedding
        already = 0 if self.setup.accumulation > 1 else self.embedding
        return "the end of backward", self._parts(gradients=self.weights, temporary=new - already + self.stream)

    def _update(self) -> tuple[str, dict[str, int]]:
        temporary = OPTIMIZERS[self.setup.optimizer].temporary(self.shape.tensors(), self.setup.weights.itemsize)
        return "the optimizer's step", self._parts(gradients=self.weights, temporary=temporary)


def _shape(model: ModelShape | Any) -> ModelShape:
    return model if isinstance(model, ModelShape) else ModelShape.from_config(model)
