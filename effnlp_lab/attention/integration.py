"""Our flash attention as an attention implementation of `transformers`.

    register_with_transformers()
    model = LlamaForCausalLM.from_pretrained(..., attn_implementation="effnlp_attention")

Models then train and generate with it: grouped heads, sliding windows, left and right padding, packed sequences and
key-value caches included. Padding is never computed: padded batches become sequences laid end to end. What the kernels
do not have (dropout, soft-capping, learned sinks, masks of other shapes) is refused with a sentence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effnlp_lab.attention.flash import flash_attention, flash_attention_varlen

NAME = "effnlp_attention"
"""`transformers` takes every name with "flash" in it for a package to import, so ours has none."""


def register_with_transformers() -> str:
    """Register with `transformers` (5 or newer), and return the name to give as `attn_implementation`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, transformers_attention)
    AttentionMaskInterface.register(NAME, transformers_mask)
    return NAME


def transformers_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention as `transformers` calls it: query [batch, heads, queries, head_dim] -> [batch, queries, heads,
    head_dim].

    `attention_mask` is what `transformers_mask` made: None; a boolean [batch, keys] where True marks real tokens; or
    whole numbers [batch, keys] that number packed sequences. Raises ValueError for what the kernels do not do.
    """
    for name, given in (("dropout", dropout), ("softcap", softcap), ("s_aux (learned sinks)", s_aux)):
        if given is not None and not (isinstance(given, float | int) and given == 0):
            raise ValueError(f"{NAME} has no {name}: set it to zero in the model's configuration, or use 'sdpa'.")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    masks = {"causal": causal, "window": sliding_window, "scale": scaling}
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings leave q and k in float32, and v not
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    if sliding_window is not None and not causal:
        raise ValueError(f"{NAME} takes a model's sliding window with a causal mask only: use 'sdpa' for this model.")
    if attention_mask is None:
        return flash_attention(query, key, value, **masks).transpose(1, 2), None
    if attention_mask.ndim != 2:
        raise ValueError(
            f"{NAME} takes a mask [batch, keys] of real and padded tokens, not one of shape "
            f"{tuple(attention_mask.shape)}: pass the tokenizer's attention_mask, or use 'sdpa'."
        )
    return _ragged(query, key, value, attention_mask, masks), None


def transformers_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=None,
    attention_mask: Tensor | None = None,
    **_: object,
) -> Tensor | None:
    """The mask that `transformers_attention` gets, made once a forward pass.

    A mask without padding becomes None. Packed sequences, which `transformers` finds from position ids, are seen in the
    mask function (a token there does not see the token before it) and numbered. Raises ValueError where the function
    lets tokens see later ones, as prefix and image masks do.
    """
    if attention_mask is not None:
        attention_mask = attention_mask[:, -kv_length:].bool()
        # A static cache is longer than what it holds: then the mask says how many of its rows count.
        return None if attention_mask.shape[1] == kv_length and bool(attention_mask.all()) else attention_mask
    if (held := int(q_offset) + q_length - kv_offset) < kv_length:
        return torch.ones(batch_size, held, dtype=torch.bool)
    return _packed_segments(batch_size, q_length, mask_function) if q_length == kv_length > 1 else None


def _packed_segments(batch: int, length: int, mask_function) -> Tensor | None:
    """Number the sequences packed in each row [batch, length], by asking whether each token sees the one before it."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if mask_function in (None, causal_mask_function, bidirectional_mask_function):
        return None
    device = _device_of(mask_function)
    rows, head = torch.arange(batch, device=device)[:, None], torch.zeros((), dtype=torch.long, device=device)
    here, before = (torch.arange(start, start + length - 1, device=device)[None, :] for start in (1, 0))
    sees_before = torch.as_tensor(mask_function(rows, head, here, before)).expand(batch, length - 1)
    sees_after = torch.as_tensor(mask_function(rows, head, before, here)).expand(batch, length - 1)
    if bool((sees_after & sees_before).any()):
        raise ValueError(
            f"{NAME} was given a mask that lets tokens see later ones (a prefix or an image mask): use 'sdpa'."
        )
    if bool(sees_before.all()) or not bool(sees_before.any()):
        return None  # one sequence a row (a window of one key sees nothing before it)
    return torch.nn.functional.pad((~sees_before).long(), (1, 0)).cumsum(1)


def _device_of(mask_function) -> torch.device:
    """The device of the tensors that a mask function holds in its closure, however deep."""
    stack, seen = [mask_function], set()
    while stack:
        thing = stack.pop()
        if isinstance(thing, Tensor):
            return thing.device
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        stack.extend(cell.cell_contents for cell in getattr(thing, "__closure__", None) or ())
        stack.extend(thing if isinstance(thing, list | tuple) else ())
    return torch.device("cpu")


def _ragged(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, masks: dict) -> Tensor:
    """Attention of the real tokens, laid end to end; padded positions give zeros. [batch, queries, heads, dim]."""
    batch, _, queries, _ = query.shape
    keys, mask = mask.shape[1], mask.to(query.device)
    mask_q = mask[:, keys - queries :]
    if mask.dtype == torch.bool:
        index_k, index_q = mask.flatten().nonzero().squeeze(1), mask_q.flatten().nonzero().squeeze(1)
        lengths_k, lengths_q = mask.sum(1), mask_q.sum(1)
    else:  # packed: every token is real, and a new sequence starts where the number changes
        index_k, index_q = (torch.arange(m.numel(), device=mask.device) for m in (mask, mask_q))
        lengths_k = torch.cat([torch.unique_consecutive(row, return_counts=True)[1] for row in mask])
        lengths_q = lengths_k
    packed = flash_attention_varlen(
        _rows(query).index_select(0, index_q),
        _rows(key[:, :, :keys]).index_select(0, index_k),
        _rows(value[:, :, :keys]).index_select(0, index_k),
        _cumulative(lengths_q),
        _cumulative(lengths_k),
        **masks,
    )
    out = packed.new_zeros(batch * queries, *packed.shape[1:]).index_copy(0, index_q, packed)
    return out.view(batch, queries, *packed.shape[1:])


def _rows(x: Tensor) -> Tensor:
    """[batch, heads, length, dim] -> [batch * length, heads, dim]."""
    return x.transpose(1, 2).flatten(0, 1)


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32).cpu()
