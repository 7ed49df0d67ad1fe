"""Prompt tuning and prefix tuning: learned tokens before the text. The model's weights are not touched.

Prompt tuning (Lester et al. 2021, "The power of scale for parameter-efficient prompt tuning") learns embeddings, which
go through all layers like those of words. Prefix tuning (Li and Liang 2021, "Prefix-tuning", section 4) learns what
they would have become: keys and values for each layer, put into the cache. Both work by rewriting what the model is
called with; the logits are those of the text alone, so that every method is evaluated alike. `generate` works too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effnlp_lab.adapters.adapter import Adapter, Holder
from effnlp_lab.errors import UsageError

IGNORED = -100
"""The label of a position that the loss leaves out."""


class VirtualTokens(Adapter):
    """What both have in common: one parameter `tokens`, and hooks around the model's call."""

    def __init__(self, model: nn.Module, config: Any, name: str) -> None:
        super().__init__(model, config, name)
        if not hasattr(model, "config") or not hasattr(model, "get_input_embeddings"):
            raise UsageError(f"{type(model).__name__} is no transformers language model: virtual tokens need one.")
        self.embedding = model.get_input_embeddings()
        self.tokens = nn.Parameter(self.first_values().float())
        self._holder, self._hooks = f"adapter_{name}", []
        if hasattr(model, self._holder):
            raise UsageError(
                f"The model has an attribute {self._holder!r} already: choose another name for the adapter."
            )
        setattr(model, self._holder, Holder(tokens=[self.tokens]))

    def first_values(self) -> Tensor:
        """What the parameter begins with."""
        raise NotImplementedError

    def insert(self, named: dict[str, Any]) -> None:
        """Put the virtual tokens into the arguments of a call that begins a text."""
        raise NotImplementedError

    def tensors(self) -> dict[str, nn.Parameter]:
        return {"prompt_embeddings": self.tokens}

    def switch(self, on: bool) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if on:
            self._hooks = [
                self.model.register_forward_pre_hook(self._before, with_kwargs=True),
                self.model.register_forward_hook(self._after, with_kwargs=True),
            ]

    def remove(self) -> None:
        delattr(self.model, self._holder)

    def _before(self, model: nn.Module, args: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        named = dict(named)
        if len(args) > 1:
            raise UsageError(
                "With virtual tokens, give the model's arguments by name: only input_ids may come without."
            )
        if args:
            named["input_ids"] = args[0]
        mask, positions = named.get("attention_mask"), named.get("position_ids")
        if mask is not None:
            if mask.dim() != 2:
                raise UsageError("With virtual tokens, attention_mask must be [batch, length], not made for each head.")
            named["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], self.config.tokens), mask], dim=1)
        if positions is not None:
            named["position_ids"] = positions + self.config.tokens
        named.pop("cache_position", None)
        cache = named.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            self.insert(named)
        return (), named

    def _after(self, model: nn.Module, args: tuple, named: dict[str, Any], out: Any) -> Any:
        return out


class PromptTuning(VirtualTokens):
    """`tokens` [tokens, hidden]: embeddings before the text's own."""

    def first_values(self) -> Tensor:
        weight = self.embedding.weight
        chosen = torch.randint(weight.shape[0], (self.config.tokens,), device=weight.device)
        return weight.detach()[chosen].clone()

    def insert(self, named: dict[str, Any]) -> None:
        ids, embeds = named.pop("input_ids", None), named.pop("inputs_embeds", None)
        embeds = self.embedding(ids) if embeds is None else embeds
        batch, count = embeds.shape[0], self.config.tokens
        prompt = self.tokens.to(embeds.dtype).expand(batch, -1, -1)
        named["inputs_embeds"] = torch.cat([prompt, embeds], dim=1)
        if named.get("labels") is not None:
            labels = named["labels"]
            named["labels"] = torch.cat([labels.new_full((batch, count), IGNORED), labels], dim=1)
        if named.get("position_ids") is not None:
            positions = named["position_ids"]
            first = torch.arange(count, device=positions.device).expand(positions.shape[0], -1)
            named["position_ids"] = torch.cat([first, positions], dim=1)

    def _after(self, model: nn.Module, args: tuple, named: dict[str, Any], out: Any) -> Any:
        embeds = named.get("inputs_embeds")
        if embeds is not None and out.logits.shape[1] == embeds.shape[1]:
            out.logits = out.logits[:, self.config.tokens :]
        return out


class PrefixTuning(VirtualTokens):
    """`tokens` [tokens, layers * 2 * kv_heads * head_dim]: for each layer keys, then values, head after head."""

    def first_values(self) -> Tensor:
        layers, heads, head_dim = self._shape()
        size = (self.config.tokens, layers * 2 * heads * head_dim)
        return torch.randn(size, device=self.embedding.weight.device) * 0.02

    def insert(self, named: dict[str, Any]) -> None:
        from transformers import DynamicCache

        layers, heads, head_dim = self._shape()
        inputs = named.get("input_ids") if named.get("input_ids") is not None else named["inputs_embeds"]
        values = self.tokens.to(self.embedding.weight.dtype).view(self.config.tokens, layers, 2, heads, head_dim)
        values = values.permute(1, 2, 3, 0, 4)[:, :, None].expand(-1, -1, inputs.shape[0], -1, -1, -1)
        cache = named.get("past_key_values")
        cache = DynamicCache(config=self.model.config) if cache is None else cache
        for layer, (key, value) in enumerate(values):
            cache.update(key, value, layer)
        named["past_key_values"] = cache

    def _shape(self) -> tuple[int, int, int]:
        config = self.model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return config.num_hidden_layers, heads, head_dim
