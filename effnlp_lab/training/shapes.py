"""The sizes of a decoder that decide its memory, read from a `transformers` configuration of OPT or Llama type."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from effnlp_lab.errors import UsageError


@dataclass(frozen=True)
class ModelShape:
    """OPT: layer norm, biases, learned positions, ReLU. Llama: RMS norm, rotary positions, grouped heads, gated MLP."""

    family: str  # "opt" or "llama"
    layers: int
    hidden: int
    heads: int
    ffn: int
    vocabulary: int
    kv_heads: int
    head_dim: int
    positions: int = 0  # rows of the table of learned positions
    tied: bool = True  # one matrix embeds tokens and makes logits
    attention_bias: bool = False
    mlp_bias: bool = False
    dropout: float = 0.0

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """Of a `transformers` OPTConfig or LlamaConfig (or one of the same fields and layers, such as Mistral's).

        Raises UsageError for other families and for OPT with an embedding projection (opt-350m).
        """
        family = getattr(config, "model_type", None)
        heads, hidden = getattr(config, "num_attention_heads", 0), getattr(config, "hidden_size", 0)
        if family == "opt":
            if config.word_embed_proj_dim != hidden or not config.do_layer_norm_before:
                raise UsageError(
                    "OPT with projected embeddings or layer norm after attention (opt-350m) is not covered."
                )
            return cls(
                family="opt", layers=config.num_hidden_layers, hidden=hidden, heads=heads, ffn=config.ffn_dim,
                vocabulary=config.vocab_size, kv_heads=heads, head_dim=hidden // heads,
                positions=config.max_position_embeddings + 2, tied=config.tie_word_embeddings,
                attention_bias=config.enable_bias, mlp_bias=config.enable_bias, dropout=config.dropout,
            )  # fmt: skip
        if family in ("llama", "mistral"):
            return cls(
                family="llama", layers=config.num_hidden_layers, hidden=hidden, heads=heads,
                ffn=config.intermediate_size, vocabulary=config.vocab_size, kv_heads=config.num_key_value_heads,
                head_dim=getattr(config, "head_dim", None) or hidden // heads, tied=config.tie_word_embeddings,
                attention_bias=getattr(config, "attention_bias", False), mlp_bias=getattr(config, "mlp_bias", False),
            )  # fmt: skip
        raise UsageError(
            f"The memory model covers OPT and Llama configurations, not {family or type(config).__name__}."
        )

    @property
    def attention_width(self) -> int:
        """Numbers a token has in queries and in the attention's output."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Numbers a token has in keys, and as many in values."""
        return self.kv_heads * self.head_dim

    def linear_shapes(self) -> list[tuple[int, int]]:
        """[out, in] of the matrices of one layer, in the order in which they are used."""
        attention = [(self.attention_width, self.hidden), *[(self.kv_width, self.hidden)] * 2]
        attention.append((self.hidden, self.attention_width))
        inward = 2 if self.family == "llama" else 1  # gate and up
        return [*attention, *[(self.ffn, self.hidden)] * inward, (self.hidden, self.ffn)]

    def layer_tensors(self) -> list[tuple[int, ...]]:
        """The shape of every parameter of one layer."""
        linears = self.linear_shapes()
        biased = (linears[:4] if self.attention_bias else []) + (linears[4:] if self.mlp_bias else [])
        norms = [(self.hidden,)] * (4 if self.family == "opt" else 2)
        return [*linears, *((out,) for out, _ in biased), *norms]

    def outer_tensors(self) -> list[tuple[int, ...]]:
        """The shape of every parameter outside the layers: embeddings, last norm, and the head where it is not tied."""
        embedding = (self.vocabulary, self.hidden)
        positions = [(self.positions, self.hidden)] if self.positions else []
        norm = [(self.hidden,)] * (2 if self.family == "opt" else 1)
        return [embedding, *positions, *norm, *([] if self.tied else [embedding])]

    def tensors(self) -> list[tuple[int, ...]]:
        """The shape of every parameter."""
        return [*self.outer_tensors(), *self.layer_tensors() * self.layers]

    @property
    def layer_parameters(self) -> int:
        """How many numbers the parameters of one layer have."""
        return sum(map(math.prod, self.layer_tensors()))

    @property
    def parameters(self) -> int:
        """How many numbers all parameters have."""
        return sum(map(math.prod, self.tensors()))
