"""A model with a cache of fixed size: every row writes its next tokens at its own length, so that ragged batches roll
back by a number alone, nothing moves, and a CUDA graph can replay every pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from effnlp_lab.errors import UsageError
from effnlp_lab.speculative.cached import additive, mask_kind

CAPACITY_MULTIPLE = 64
"""Capacities are rounded up to this: attention kernels like masks whose rows are aligned."""


class SlotCache:
    """What transformers' attention calls with new keys and values: [batch, heads, count, dim] for each layer.

    They are written at `slots` int64 [batch * count], numbers of places in [batch, capacity], and all of the cache is
    given back; the mask says what of it counts.
    """

    is_compileable = True

    def __init__(self, layers: int) -> None:
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers
        self.slots: Tensor | None = None
        self.batch, self.capacity = 0, 0

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        found = []
        for store, new in ((self.keys, key), (self.values, value)):
            if store[layer_idx] is None:
                size = (self.batch * self.capacity, new.shape[1], new.shape[3])
                store[layer_idx] = torch.zeros(size, dtype=new.dtype, device=new.device)
            store[layer_idx].index_copy_(0, self.slots, new.transpose(1, 2).reshape(-1, *store[layer_idx].shape[1:]))
            found.append(store[layer_idx].view(self.batch, self.capacity, *store[layer_idx].shape[1:]).transpose(1, 2))
        return found[0], found[1]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy the keys and values at places `source` to places `target`, both int64 [count], in every layer."""
        for store in (*self.keys, *self.values):
            if store is not None:
                store.index_copy_(0, target, store.index_select(0, source))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions and mask are always given


class StaticCachedModel:
    """A decoder of `transformers` on a SlotCache; `reset` keeps the memory where batch and capacity are the same."""

    graphable = True

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.device = model, model.device
        self.mask_kind = mask_kind(model)
        types = set(getattr(model.config, "layer_types", None) or ["full_attention"])
        if types != {"full_attention"} or getattr(model.config, "sliding_window", None):
            raise UsageError("This model has layers with a window or a state: use DynamicCachedModel for it.")
        self.cache, self.lengths = SlotCache(model.config.num_hidden_layers), None

    def reset(self, batch: int, capacity: int) -> None:
        most = getattr(self.model.config, "max_position_embeddings", None)
        if most is not None and capacity > most + CAPACITY_MULTIPLE:
            raise UsageError(f"{capacity} tokens are more than this model's {most} positions: shorten the request.")
        capacity = -(-capacity // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
        if (batch, capacity) != (self.cache.batch, self.cache.capacity):
            self.cache = SlotCache(self.model.config.num_hidden_layers)
            self.cache.batch, self.cache.capacity = batch, capacity
            self.lengths = torch.zeros(batch, dtype=torch.long, device=self.device)
            self.first = torch.arange(batch, device=self.device)[:, None] * capacity
            self.columns = torch.arange(capacity, device=self.device)
        self.lengths.zero_()

    @torch.no_grad()
    def extend(self, tokens: Tensor, keep: int = 0, *, depth: Tensor | None = None,
               sees: Tensor | None = None) -> Tensor:  # fmt: skip
        """As of CachedModel. For a tree of tokens: depth int64 [count], the position of each after what is held, and
        sees bool [count, count], which of the new tokens each of them sees."""
        count = tokens.shape[1]
        order = torch.arange(count, device=self.device)
        slots = self.lengths[:, None] + order
        self.cache.slots = (self.first + slots).flatten()
        if sees is None:
            visible = self.columns <= slots[:, :, None]
        else:
            place = self.columns - self.lengths[:, None]
            among = sees[:, place.clamp(0, count - 1)].transpose(0, 1) & ((place >= 0) & (place < count))[:, None]
            visible = (place < 0)[:, None] | among
        out = self.model(
            tokens, position_ids=slots if depth is None else self.lengths[:, None] + depth, use_cache=True,
            past_key_values=self.cache, attention_mask=additive(visible[:, None], self.mask_kind), logits_to_keep=keep,
        )  # fmt: skip
        self.lengths += count
        return out.logits

    def truncate(self, lengths: Tensor) -> None:
        self.lengths.copy_(lengths)

    def keep_path(self, start: Tensor, path: Tensor) -> None:
        """Of the tokens held from start [batch] on, move those at path int64 [batch, count] to the front, in order.

        A path is increasing, so nothing is overwritten before it is read; what lies behind is left to `truncate`.
        """
        target = self.first + start[:, None] + torch.arange(path.shape[1], device=self.device)
        self.cache.move((self.first + start[:, None] + path).flatten(), target.flatten())


def pad_prompts(prompts: Sequence[Tensor], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 [batch, longest], filled up on the right, and the lengths [batch]. Raises UsageError for empty prompts."""
    if not prompts:
        raise UsageError("There are no prompts: give at least one.")
    for number, prompt in enumerate(prompts):
        if prompt.ndim != 1 or prompt.numel() == 0 or prompt.is_floating_point():
            raise UsageError(
                f"Prompt {number} has shape {tuple(prompt.shape)} and dtype {prompt.dtype}: expected at least one "
                "token id, int64 [length]."
            )
    ids = torch.nn.utils.rnn.pad_sequence([p.long() for p in prompts], batch_first=True, padding_value=pad)
    return ids.to(device), torch.tensor([p.numel() for p in prompts], device=device)
