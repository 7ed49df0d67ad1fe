"""What a decoder layer does beside its matrix products, in plain PyTorch as its modules define it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from effnlp_lab.paged.batch import Batch
from effnlp_lab.paged.gathered import gathered_attention, gathered_attention_varlen
from effnlp_lab.paged.sinks import cache_position

if TYPE_CHECKING:
    from effnlp_lab.paged.model import PagedModel

Pages = tuple[Tensor, Tensor]


class Operations(Protocol):
    """The steps of `PagedModel.forward`; x is [total, hidden_size], q, k and v [total, heads, head_dim]."""

    def angles(self, batch: Batch) -> object:
        """What `rotate_and_write` needs to know of the positions, made once for all layers."""

    def norm(self, module: nn.Module, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(normalised x + residual, x + residual)."""

    def project(self, attention: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v."""

    def rotate_and_write(
        self, q: Tensor, k: Tensor, v: Tensor, pages: Pages, batch: Batch, angles: object
    ) -> tuple[Tensor, Tensor | None]:
        """Rotated queries, with sinks also for them; rotated keys and the values go to the pages."""

    def attend(self, q: Tensor, q_sink: Tensor | None, pages: Pages, batch: Batch, window: int | None) -> Tensor:
        """Attention over the pages, like q."""

    def feed_forward(self, mlp: nn.Module, x: Tensor) -> Tensor:
        """The layer's feed-forward block."""

    def greedy(self, logits: Tensor, newest: Tensor, slots: Tensor) -> Tensor:
        """The most likely token of each row, int64, the first where several are; also into newest[slots]."""


class PlainOperations:
    """For any device and dtype. The results are those of the model's own modules, to the last bit but for attention."""

    def __init__(self, model: PagedModel) -> None:
        self.model = model

    def angles(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Cosines and sines [total, 1, head_dim] at the tokens' positions, and with sinks at those in the cache."""
        model, positions = self.model, [batch.positions]
        if model.sinks:
            positions.append(cache_position(batch.positions, model.windows[0], model.sinks))
        return [tuple(x[p].repeat(1, 2)[:, None] for x in (model.cos, model.sin)) for p in positions]

    def norm(self, module: nn.Module, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        x = x if residual is None else residual + x
        return module(x), x

    def project(self, attention: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        return tuple(projection(x).unflatten(1, (-1, self.model.head_dim)) for projection in projections)

    def rotate_and_write(self, q, k, v, pages, batch, angles):
        for cached, new in zip(pages, (_rotate(k, *angles[0]), v), strict=True):
            page_size = cached.shape[2]
            cached[batch.slots // page_size, :, batch.slots % page_size] = new
        return _rotate(q, *angles[0]), _rotate(q, *angles[1]) if self.model.sinks else None

    def attend(self, q, q_sink, pages, batch, window):
        shared = {"window": window, "sinks": self.model.sinks, "scale": self.model.head_dim**-0.5}
        tables = batch.block_tables[batch.rows.long()]
        if not batch.uniform:
            return gathered_attention_varlen(q, *pages, tables, batch.lengths, batch.starts, q_sink=q_sink, **shared)
        columns = -(-batch.longest // pages[0].shape[2])
        equal = [x if x is None else x.unflatten(0, (len(batch.lengths), -1)) for x in (q, q_sink)]
        out = gathered_attention(equal[0], *pages, tables[:, :columns], batch.lengths, q_sink=equal[1], **shared)
        return out.flatten(0, 1)

    def feed_forward(self, mlp: nn.Module, x: Tensor) -> Tensor:
        return mlp(x)

    def greedy(self, logits: Tensor, newest: Tensor, slots: Tensor) -> Tensor:
        tokens = logits.argmax(-1)
        newest.index_copy_(0, slots.long(), tokens)
        return tokens


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) in Llama's layout, where number i pairs with number i + head_dim / 2."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin
