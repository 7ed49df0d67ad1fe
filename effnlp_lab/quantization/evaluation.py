"""Perplexity: e to the mean loss a token, what quantization is judged by."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effnlp_lab.errors import UsageError


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor, length: int = 512, batch_size: int = 8) -> float:
    """Of a text's tokens [n], cut into pieces of `length` whose first token is not predicted; a rest is left out.

    ids may be [pieces, length] already. Raises UsageError for a text shorter than one piece.
    """
    ids = torch.as_tensor(ids)
    if ids.ndim == 1:
        if len(ids) < length or length < 2:
            raise UsageError(f"The text has {len(ids)} tokens, fewer than one piece of {length} (at least 2).")
        ids = ids[: len(ids) // length * length].view(-1, length)
    device = model.get_input_embeddings().weight.device
    total = 0.0
    for batch in ids.long().split(batch_size):
        batch = batch.to(device)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (ids.shape[0] * (ids.shape[1] - 1)))
