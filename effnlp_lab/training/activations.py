"""What autograd keeps of a decoder layer until backward: a list, operation by operation.

An operation keeps what its derivative needs and no more: a product keeps both factors, a sum or a scaling by a constant
nothing, ReLU and softmax their result, dropout its mask. A tensor that two operations keep counts once. So the list of
a layer follows from its code; `torch.autograd.graph.saved_tensors_hooks` shows the same. A token has T numbers of ...

| kept | by | numbers a token | OPT | Llama |
|---|---|---|---|---|
| input of the layer | norm | hidden | float32 under autocast | always float32 |
| normed, before its weight | product with the weight | hidden | - | float32 under autocast |
| input of q, k, v | linear | hidden | once; under autocast a cast copy for each | the same |
| q, k, v, output | attention | 2 heads + 2 KV heads, times head_dim | | q and k rotated |
| log-sum-exp | attention, sdpa | heads | float32 | float32 |
| weights of attention | softmax, and product with v, eager | heads x length | float32, and cast | the same |
| mask | dropout | hidden | 1 byte (on a CPU: as the input) | - |
| input of the second norm | norm | hidden | as of the first | the same |
| input of the MLP | linear | hidden | once | once; under autocast twice |
| inside the MLP | ReLU; SiLU, product, linear | ffn | 1 | 4: gate, SiLU of it, up, product |
"""

from __future__ import annotations

from dataclasses import dataclass

from effnlp_lab.training.shapes import ModelShape


@dataclass(frozen=True)
class Precision:
    """Bytes a number: of the residual stream (`stream`), of what linear layers see (`compute`), of a dropout mask."""

    stream: int = 4
    compute: int = 4
    mask: int = 1

    @property
    def autocast(self) -> bool:
        return self.stream != self.compute


@dataclass(frozen=True)
class Saved:
    """One kept tensor: the operation that keeps it, what it is, and its bytes."""

    operation: str
    what: str
    bytes: int


def layer_activations(shape: ModelShape, batch: int, length: int, precision: Precision, attention: str) -> list[Saved]:
    """Every tensor that one layer keeps, for `batch` rows of `length` tokens; attention is "sdpa" or "eager"."""
    tokens = batch * length
    compute = precision.compute
    casts = 3 if precision.autocast else 1  # autocast casts the input of each linear layer anew
    hidden = tokens * shape.hidden
    kept = [
        *_norm(shape, "norm before attention", tokens, precision),
        Saved("linear q, k, v", "input" if casts == 1 else "input, cast three times", casts * hidden * compute),
        *attention_activations(shape, batch, length, precision, attention),
        *_dropout(shape, "dropout after attention", hidden, precision),
        *_norm(shape, "norm before the MLP", tokens, precision),
    ]
    inner = tokens * shape.ffn * compute
    if shape.family == "opt":
        kept += [
            Saved("linear 1", "input", hidden * compute),
            Saved("ReLU, linear 2", "result of ReLU", inner),
            *_dropout(shape, "dropout after the MLP", hidden, precision),
        ]
    else:
        casts = 2 if precision.autocast else 1
        kept += [
            Saved("linear gate, up", "input" if casts == 1 else "input, cast twice", casts * hidden * compute),
            Saved("SiLU", "gate", inner),
            Saved("product", "SiLU of gate", inner),
            Saved("product", "up", inner),
            Saved("linear down", "product", inner),
        ]
    return kept


def attention_activations(
    shape: ModelShape, batch: int, length: int, precision: Precision, attention: str
) -> list[Saved]:
    """What the attention of one layer keeps. Eager attention of grouped heads repeats keys and values first."""
    tokens, compute = batch * length, precision.compute
    kv_width = shape.kv_width if attention == "sdpa" else shape.attention_width
    kept = [
        Saved("attention", "q", tokens * shape.attention_width * compute),
        Saved("attention", "k, v", 2 * tokens * kv_width * compute),
        Saved("attention, linear out", "output", tokens * shape.attention_width * compute),
    ]
    scores = batch * shape.heads * length**2
    if attention == "sdpa":
        return [*kept, Saved("attention", "log-sum-exp", tokens * shape.heads * 4)]
    kept.append(Saved("softmax", "weights in float32", scores * 4))
    return [*kept, Saved("product with v", "weights, cast", scores * compute)] if compute < 4 else kept


def _norm(shape: ModelShape, name: str, tokens: int, precision: Precision) -> list[Saved]:
    hidden = tokens * shape.hidden
    if shape.family == "opt":
        return [Saved(name, "input", hidden * precision.stream), Saved(name, "mean, 1 / deviation", tokens * 8)]
    return [
        Saved(name, "input, in float32", hidden * 4),
        Saved(name, "1 / root mean square", tokens * 4),
        Saved(name, "normed, before its weight", hidden * precision.stream),
    ]


def _dropout(shape: ModelShape, name: str, numbers: int, precision: Precision) -> list[Saved]:
    return [Saved(name, "mask", numbers * precision.mask)] if shape.family == "opt" and shape.dropout else []


def outer_activations(shape: ModelShape, batch: int, length: int, precision: Precision) -> list[Saved]:
    """What is kept outside the layers: by the last norm, the head and the loss, and the angles of rotary positions."""
    tokens = batch * length
    angles = 2 * length * shape.head_dim * precision.stream if shape.family == "llama" else 0
    return [
        *([Saved("rotary positions", "cosines and sines, for all layers", angles)] if angles else []),
        *_norm(shape, "last norm", tokens, precision),
        Saved("linear head", "input", tokens * shape.hidden * precision.compute),
        Saved("log-softmax", "log-probabilities in float32", tokens * shape.vocabulary * 4),
    ]
