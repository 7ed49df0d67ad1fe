"""The same operations with fused kernels: for a decoding step, whose many small operations would cost more than its
matrix products."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effnlp_lab.paged import attention as kernels
from effnlp_lab.paged.batch import Batch
from effnlp_lab.paged.operations import PlainOperations
from effnlp_lab.paged.sinks import cache_position

if TYPE_CHECKING:
    from effnlp_lab.paged.model import PagedModel


class FusedOperations(PlainOperations):
    """Kernels for normalisation, rotation with writing, attention and activation; joint projections."""

    def __init__(self, model: PagedModel) -> None:
        super().__init__(model)
        layers = model.decoder.layers
        self._joint: dict[nn.Module, tuple[Tensor, Tensor | None] | None] = {}
        for layer in layers:
            attention, mlp = layer.self_attn, layer.mlp
            self._joint[attention] = joined(attention.q_proj, attention.k_proj, attention.v_proj)
            self._joint[mlp] = joined(mlp.gate_proj, mlp.up_proj)
        self._silu = model.config.hidden_act in ("silu", "swish")
        limit = cache_position(model.max_length, model.windows[0], model.sinks) if model.sinks else None
        self._sink_limit = limit

    def angles(self, batch: Batch) -> None:
        return None

    def norm(self, module: nn.Module, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        out = kernels.rms_norm(x, module.weight, module.variance_epsilon, residual)
        return out, x if residual is None else residual

    def project(self, attention: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._joint[attention] is None:
            return super().project(attention, x)
        model = self.model
        qkv = F.linear(x, *self._joint[attention]).unflatten(1, (-1, model.head_dim))
        return qkv.split((model.heads, model.kv_heads, model.kv_heads), dim=1)

    def rotate_and_write(self, q, k, v, pages, batch, angles):
        model = self.model
        return kernels.rotate_and_write(
            q, k, v, *pages, batch.slots, batch.positions, model.cos, model.sin, self._sink_limit, settled=True
        )

    def attend(self, q, q_sink, pages, batch, window):
        return kernels.paged_attention(
            q, *pages, batch.block_tables, batch.lengths, rows=batch.rows, starts=batch.starts,
            most_queries=batch.most_queries, longest=batch.longest, window=window, sinks=self.model.sinks,
            q_sink=q_sink, splits=batch.splits, ragged=True, settled=True,
        )  # fmt: skip

    def feed_forward(self, mlp: nn.Module, x: Tensor) -> Tensor:
        if not self._silu:
            return super().feed_forward(mlp, x)
        if self._joint[mlp] is None:
            gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        else:
            gate, up = F.linear(x, *self._joint[mlp]).chunk(2, dim=1)
        return mlp.down_proj(kernels.silu_and_multiply(gate, up))

    def greedy(self, logits: Tensor, newest: Tensor, slots: Tensor) -> Tensor:
        return kernels.greedy(logits, newest, slots)


def joined(*layers: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of plain linear layers with one input, as one; the layers' own become views of them.

    None where a layer is not a plain `nn.Linear` (LoRA, quantized weights), or only some have a bias.
    """
    if not all(_is_plain(layer) for layer in layers) or len({layer.bias is None for layer in layers}) > 1:
        return None
    weight = _side_by_side([layer.weight for layer in layers])
    return weight, None if layers[0].bias is None else _side_by_side([layer.bias for layer in layers])


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks


@torch.no_grad()
def _side_by_side(parameters: list[nn.Parameter]) -> Tensor:
    """One tensor of which the parameters are consecutive parts; where they are so already, without a copy."""
    first = parameters[0].data
    starts = [p.data_ptr() - first.data_ptr() for p in parameters]
    sizes = [p.numel() * p.element_size() for p in parameters]
    one_storage = len({p.untyped_storage().data_ptr() for p in parameters}) == 1
    if one_storage and starts == [0, *itertools.accumulate(sizes[:-1])] and all(p.is_contiguous() for p in parameters):
        return first.as_strided((sum(len(p) for p in parameters), *first.shape[1:]), first.stride())
    whole = torch.cat([p.data for p in parameters])
    for p, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
        p.data = part
    return whole
