"""A `transformers` model of Llama's kind on a paged cache: its own modules and weights, with another attention.

The decoder is walked layer by layer, over the tokens of all sequences laid end to end. Two sets of operations do what
is between the matrix products: plain PyTorch (operations.py), which is how the modules define it, and fused kernels for
CUDA devices (fused.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effnlp_lab.errors import UsageError
from effnlp_lab.paged.batch import Batch
from effnlp_lab.paged.cache import PagedCache
from effnlp_lab.paged.operations import Operations, PlainOperations
from effnlp_lab.paged.sinks import check_window
from effnlp_lab.paged.sizes import kv_shape

MODEL_TYPES = ("llama", "mistral", "qwen2")
ROTARY_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings that depend on the position alone; others change with the length of the sequence."""


class PagedModel:
    """Runs a causal language model of `transformers` (Llama, Mistral, Qwen2) over a `PagedCache`.

    max_length: how many positions there are to be. `window` and `sinks` give every layer a rolling window with
    attention sinks (see sinks.py); a model's own sliding window is kept otherwise. `fused`: None for the fused kernels
    where the model is on a CUDA device; True also runs them in Triton's interpreter. They lay the weights of the
    projections that share an input side by side in memory, where the model then finds them too. Raises UsageError for a
    model of another kind.
    """

    def __init__(
        self, model: nn.Module, *, max_length: int, window: int | None = None, sinks: int = 0, fused: bool | None = None
    ) -> None:
        check_model(model)
        check_window(window, sinks)
        self.config, self.decoder, self.head = model.config, model.model, model.lm_head
        self.sinks, self.max_length = sinks, max_length
        weight = self.decoder.embed_tokens.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.heads = self.config.num_attention_heads
        self.kv_heads, self.head_dim = kv_shape(self.config)
        self.windows = [window or _own_window(layer.self_attn, self.config) for layer in self.decoder.layers]
        self.cos, self.sin = self._angles(max_length)
        self.operations: Operations = PlainOperations(self)
        if self.device.type == "cuda" if fused is None else fused:
            from effnlp_lab.paged.fused import FusedOperations

            self.operations = FusedOperations(self)

    @property
    def window(self) -> int | None:
        """How far back any layer sees, None for all the way."""
        return None if None in self.windows else max(self.windows)

    def cache(self, pages: int, page_size: int = 16) -> PagedCache:
        """An empty cache for this model."""
        layers = len(self.decoder.layers)
        return PagedCache(layers, self.kv_heads, self.head_dim, pages, page_size, dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def forward(self, batch: Batch, cache: PagedCache) -> Tensor:
        """The last hidden states [total, hidden_size] of the batch's tokens, whose keys and values go to the cache."""
        do = self.operations
        x, residual = self.decoder.embed_tokens(batch.ids), None
        angles = do.angles(batch)
        for index, layer in enumerate(self.decoder.layers):
            x, residual = do.norm(layer.input_layernorm, x, residual)
            q, k, v = do.project(layer.self_attn, x)
            q, q_sink = do.rotate_and_write(q, k, v, cache.layer(index), batch, angles)
            out = do.attend(q, q_sink, cache.layer(index), batch, self.windows[index])
            x = layer.self_attn.o_proj(out.flatten(1))
            x, residual = do.norm(layer.post_attention_layernorm, x, residual)
            x = do.feed_forward(layer.mlp, x)
        return do.norm(self.decoder.norm, x, residual)[0]

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """The logits [rows, vocabulary] of hidden states [rows, hidden_size], in the model's dtype."""
        return self.head(hidden)

    def _angles(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every position, [length, head_dim / 2]; a head's two halves share them."""
        rotary = self.decoder.rotary_emb
        x, step = torch.empty(1, dtype=self.dtype, device=self.device), 1 << 16
        parts = [
            rotary(x, torch.arange(i, min(i + step, length), device=self.device)[None]) for i in range(0, length, step)
        ]
        half = self.head_dim // 2
        return tuple(torch.cat([p[which][0, :, :half] for p in parts]).contiguous() for which in (0, 1))


def check_model(model: nn.Module) -> None:
    """Raise UsageError, with the reason, for a model that a paged cache does not serve."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in MODEL_TYPES or not hasattr(model, "lm_head"):
        raise UsageError(f"A {kind} model is not served: give a causal language model of {', '.join(MODEL_TYPES)}.")
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotary not in ROTARY_TYPES:
        raise UsageError(
            f"The model's rotary embedding ({rotary}) changes with the length of a sequence, so that cached keys would "
            f"be wrong: models with {', '.join(ROTARY_TYPES)} are served."
        )


def _own_window(attention: nn.Module, config) -> int | None:
    """The sliding window of a layer's own, if it has one: Qwen2 keeps it in the layer, Mistral in the configuration."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
