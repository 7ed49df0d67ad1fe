"""A model with its cache, behind the three things that speculative decoding does with it: extend, truncate, reset.

Rejected tokens have left keys and values behind, and every row of a batch rejects at another place. To roll back is to
say how many tokens each row still holds. The caches differ in how they forget the rest.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from effnlp_lab.errors import UsageError


@runtime_checkable
class CachedModel(Protocol):
    """A causal language model and what it has read. `lengths` int64 [batch]: tokens held of each row, on the device.

    graphable: whether extend and truncate run without the host, so that a CUDA graph can replay them.
    """

    lengths: Tensor
    graphable: bool
    device: torch.device

    def reset(self, batch: int, capacity: int) -> None:
        """Hold nothing, for `batch` rows that will never hold more than `capacity` tokens."""

    def extend(self, tokens: Tensor, keep: int = 0) -> Tensor:
        """Read tokens int64 [batch, count] after what each row holds, and hold them. Logits [batch, count, vocabulary],
        or of the last `keep` tokens alone."""

    def truncate(self, lengths: Tensor) -> None:
        """Hold only the first lengths [batch] tokens of each row."""


class DynamicCachedModel:
    """On transformers' DynamicCache, which grows by concatenation: all rows get the same new columns.

    A row that is truncated leaves its columns masked; columns that no row holds are cut off. In a batch of one that is
    plain cutting; in a ragged batch holes stay behind. Works for any decoder that takes a 4-dimensional mask.
    """

    graphable = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.device = model, model.device
        self.mask_kind = mask_kind(model)
        self.reset(1, 0)

    def reset(self, batch: int, capacity: int) -> None:
        self.cache = DynamicCache()
        self.held = torch.zeros(batch, 0, dtype=torch.bool, device=self.device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=self.device)

    @torch.no_grad()
    def extend(self, tokens: Tensor, keep: int = 0) -> Tensor:
        batch, count = tokens.shape
        order = torch.arange(count, device=self.device)
        past = self.held[:, None, None, :].expand(batch, 1, count, -1)
        among = (order[:, None] >= order)[None, None].expand(batch, 1, count, count)
        out = self.model(
            tokens, position_ids=self.lengths[:, None] + order, past_key_values=self.cache, use_cache=True,
            attention_mask=additive(torch.cat([past, among], -1), self.mask_kind), logits_to_keep=keep,
        )  # fmt: skip
        self.held = torch.cat([self.held, torch.ones_like(tokens, dtype=torch.bool)], 1)
        self.lengths = self.lengths + count
        return out.logits

    def truncate(self, lengths: Tensor) -> None:
        self.held = self.held & (self.held.long().cumsum(1) <= lengths[:, None])
        self.lengths = lengths.clone()
        used = self.held.any(0).nonzero()
        columns = int(used[-1]) + 1 if len(used) else 0
        self.held = self.held[:, :columns]
        for layer in self.cache.layers:
            if layer.keys is not None and layer.keys.numel():
                layer.keys, layer.values = layer.keys[..., :columns, :], layer.values[..., :columns, :]


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask, True where a token sees a key, as what is added to scores: 0 or -inf."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def mask_kind(model: PreTrainedModel) -> torch.dtype:
    """The dtype of masks for this model. Raises UsageError for attention that takes no mask of every pair."""
    kind = model.config._attn_implementation
    if kind not in ("sdpa", "eager"):
        raise UsageError(f"attn_implementation={kind!r} takes no mask of token and key: load the model with 'sdpa'.")
    return model.dtype
