"""A model on the pages of the paged room: its kernels read and write them, its fused operations carry the rest.

Every row is given the pages of its whole capacity when it starts, so that a step needs nothing of the host; to roll
back is to lower a length, and what lies behind it in the pages is written over.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from effnlp_lab.errors import UsageError
from effnlp_lab.paged.batch import Batch, slots_of
from effnlp_lab.paged.blocks import BlockManager
from effnlp_lab.paged.model import PagedModel
from effnlp_lab.paged.sequence import Sequence
from effnlp_lab.paged.sizes import pages_for

SLACK = 512
"""Positions beyond the model's own that tables are made for: rejected drafts at the end of the longest text."""


class PagedCachedModel:
    """A CachedModel for Llama, Mistral and Qwen2 models. fused: as of PagedModel, None for its kernels on a GPU."""

    graphable = True

    def __init__(self, model: PreTrainedModel, *, page_size: int = 16, fused: bool | None = None) -> None:
        self.model, self.device, self.page_size = model, model.device, page_size
        self.paged = PagedModel(model, max_length=model.config.max_position_embeddings + SLACK, fused=fused)
        if self.paged.window is not None:
            raise UsageError("This model attends through a window: use DynamicCachedModel for it.")
        self.lengths, self._size = None, (0, 0)

    def reset(self, batch: int, capacity: int) -> None:
        if capacity > self.paged.max_length:
            raise UsageError(f"{capacity} tokens are more than this model's positions: shorten the request.")
        if self._size != (batch, capacity):
            pages = batch * pages_for(capacity, self.page_size)
            self.cache = self.paged.cache(pages, self.page_size)
            self.manager = BlockManager(pages, self.page_size)
            self.sequences = [Sequence(self.manager) for _ in range(batch)]
            for sequence in self.sequences:
                sequence.append(capacity)
            tables = [sequence.pages for sequence in self.sequences]
            self.block_tables = torch.tensor(tables, dtype=torch.int32, device=self.device)
            self.lengths = torch.zeros(batch, dtype=torch.long, device=self.device)
            self._size = (batch, capacity)
        self.lengths.zero_()

    @torch.no_grad()
    def extend(self, tokens: Tensor, keep: int = 0) -> Tensor:
        batch, count = tokens.shape
        rows = torch.arange(batch, device=self.device)
        positions = (self.lengths[:, None] + torch.arange(count, device=self.device)).flatten()
        owners = rows[:, None].expand(batch, count).flatten()
        slots = slots_of(self.block_tables, owners, positions, self.page_size)
        starts = torch.arange(batch + 1, device=self.device, dtype=torch.int32) * count
        hidden = self.paged.forward(
            Batch(
                tokens.flatten(), positions, slots, self.block_tables, rows.int(), (self.lengths + count).int(), starts,
                most_queries=count, longest=self._size[1], uniform=True,
            ),
            self.cache,
        )  # fmt: skip
        self.lengths += count
        hidden = hidden.view(batch, count, -1)
        return self.paged.logits(hidden[:, -keep:] if keep else hidden)

    def truncate(self, lengths: Tensor) -> None:
        self.lengths.copy_(lengths)
