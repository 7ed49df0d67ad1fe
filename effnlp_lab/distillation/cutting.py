"""What the masks leave of a model, as a smaller model that plain `transformers` opens.

It computes what the masked model computes. Mask values are folded into the weights that write what they scale. The
dropped dimensions of the residual stream are zero everywhere, so only the mean in RMSNorm has to be mended: a sum over
d dimensions divided by d becomes one over k divided by k, which a weight times sqrt(d / k) and an epsilon times d / k
undo exactly.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from effnlp_lab.distillation.prunable import PrunableModel
from effnlp_lab.errors import UsageError


@torch.no_grad()
def cut(prunable: PrunableModel) -> PreTrainedModel:
    """The smaller model, in the target's shape, on the same device and in evaluation mode; the masked one is unchanged.

    The most likely entries of each mask stay, in the target's number (`prunable.harden = True` evaluates the same).
    """
    model, counts, sizes = prunable.model, prunable.counts, prunable.sizes
    if any("layer_types" == key and len(set(value or ())) > 1 for key, value in vars(model.config).items()):
        raise UsageError("Layers of several types cannot be cut: this model mixes kinds of attention.")
    before, prunable.harden = prunable.harden, True
    try:
        masks = {kind: mask.double() for kind, mask in prunable.decided().items()}
    finally:
        prunable.harden = before
    device = next(model.parameters()).device
    for kind, shape in (("layers", (sizes["layers"],)), ("heads", (sizes["layers"], sizes["heads"])),
                        ("mlp", (sizes["layers"], sizes["mlp"])), ("hidden", (sizes["hidden"],))):  # fmt: skip
        masks.setdefault(kind, torch.ones(shape, dtype=torch.float64, device=device))
    small = _empty(model, counts, sizes)
    hidden = masks["hidden"].nonzero().squeeze(1)
    width = masks["hidden"][hidden]
    norm_factor = math.sqrt(sizes["hidden"] / counts["hidden"])

    _copy(small.model.embed_tokens, model.model.embed_tokens, columns=hidden, scale_columns=width)
    last = model.model.norm.weight[hidden].double() * norm_factor
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        last = last / width  # the tied head got the mask of the embedding with its weight
    else:
        _copy(small.lm_head, model.lm_head, columns=hidden)
    small.model.norm.weight.copy_(last)
    for layer, index in zip(small.model.layers, masks["layers"].nonzero().squeeze(1).tolist(), strict=True):
        _cut_layer(layer, model.model.layers[index], index, masks, hidden, width * masks["layers"][index], norm_factor)
    return small.eval()


def _cut_layer(new: nn.Module, old: nn.Module, index: int, masks: dict[str, Tensor], hidden: Tensor, write: Tensor,
               norm_factor: float) -> None:  # fmt: skip
    """One layer: inputs at `hidden`, heads and MLP by their masks, outputs times `write` [kept hidden]."""
    groups = masks["heads"][index]
    query, key = _of_groups(groups, old.self_attn.q_proj), _of_groups(groups, old.self_attn.k_proj)
    mlp = masks["mlp"][index].nonzero().squeeze(1)
    for name in ("input_layernorm", "post_attention_layernorm"):
        getattr(new, name).weight.copy_(getattr(old, name).weight[hidden].double() * norm_factor)
    for name, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
        _copy(getattr(new.self_attn, name), getattr(old.self_attn, name), rows=rows, columns=hidden)
    each = query.numel() // int(groups.count_nonzero())
    by_head = groups[groups.nonzero().squeeze(1)].repeat_interleave(each)
    _copy(new.self_attn.o_proj, old.self_attn.o_proj, rows=hidden, columns=query, scale_rows=write,
          scale_columns=by_head)  # fmt: skip
    for name in ("gate_proj", "up_proj"):
        _copy(getattr(new.mlp, name), getattr(old.mlp, name), rows=mlp, columns=hidden)
    _copy(new.mlp.down_proj, old.mlp.down_proj, rows=hidden, columns=mlp, scale_rows=write,
          scale_columns=masks["mlp"][index][mlp])  # fmt: skip


def _of_groups(groups: Tensor, projection: nn.Linear) -> Tensor:
    """The rows of a projection that belong to the groups that stay."""
    each = projection.weight.shape[0] // groups.numel()
    return torch.arange(projection.weight.shape[0], device=groups.device)[(groups != 0).repeat_interleave(each)]


def _copy(new: nn.Module, old: nn.Module, *, rows: Tensor | None = None, columns: Tensor | None = None,
          scale_rows: Tensor | None = None, scale_columns: Tensor | None = None) -> None:  # fmt: skip
    """A part of a weight [out, in], scaled; the bias goes with the rows."""
    weight = old.weight.double()
    weight = weight if rows is None else weight[rows]
    weight = weight if columns is None else weight[:, columns]
    weight = weight if scale_columns is None else weight * scale_columns
    new.weight.copy_(weight if scale_rows is None else weight * scale_rows[:, None])
    if getattr(old, "bias", None) is not None:
        bias = old.bias.double() if rows is None else old.bias.double()[rows]
        new.bias.copy_(bias if scale_rows is None else bias * scale_rows)


def _empty(model: PreTrainedModel, counts: dict[str, int], sizes: dict[str, int]) -> PreTrainedModel:
    """A model of the target's shape."""
    config = copy.deepcopy(model.config)
    old = model.config
    per_group = old.num_attention_heads // sizes["heads"]
    config.head_dim = getattr(old, "head_dim", None) or old.hidden_size // old.num_attention_heads
    config.num_hidden_layers, config.hidden_size = counts["layers"], counts["hidden"]
    config.intermediate_size = counts["mlp"]
    config.num_key_value_heads, config.num_attention_heads = counts["heads"], counts["heads"] * per_group
    config.rms_norm_eps = old.rms_norm_eps * sizes["hidden"] / counts["hidden"]
    if isinstance(getattr(old, "layer_types", None), list):
        config.layer_types = old.layer_types[: counts["layers"]]
    with torch.random.fork_rng(devices=[]):
        small = type(model)(config)
    return small.to(next(model.parameters()).device, next(model.parameters()).dtype)
