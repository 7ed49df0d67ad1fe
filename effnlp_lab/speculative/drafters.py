"""Where drafts come from: a smaller model, the target's own first layers, or the text so far.

A drafter is given the tokens of a batch and how many the caches hold; of each row one more is known, its newest, which
no model has read. It works on the device alone, so that a whole step can be one CUDA graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from effnlp_lab.errors import UsageError
from effnlp_lab.speculative.cached import CachedModel
from effnlp_lab.speculative.sampling import Sampling, sample_from
from effnlp_lab.speculative.static_cached import StaticCachedModel


class Draft(NamedTuple):
    """tokens int64 [batch, gamma]; probabilities [batch, gamma, vocabulary], the distributions that they were drawn
    from, or None where they are certain; counts int64 [batch], how many of them a row has, or None for all."""

    tokens: Tensor
    probabilities: Tensor | None = None
    counts: Tensor | None = None


class Drafter(Protocol):
    """graphable: whether `draft` runs without the host."""

    graphable: bool

    def start(self, ids: Tensor, lengths: Tensor, capacity: int) -> None:
        """Prompts int64 [batch, longest] of `lengths` tokens; no row will ever have more than `capacity`."""

    def draft(self, tokens: Tensor, held: Tensor, gamma: int, uniforms: Tensor, sampling: Sampling,
              fresh: bool) -> Draft:  # fmt: skip
        """tokens int64 [batch, capacity], of which each row has held + 1; uniforms [batch, gamma] to draw with; fresh:
        a row has one token alone, so nothing was read before its newest."""


class DraftModel:
    """Drafts from a model with the target's vocabulary, token after token, under the same temperature, top-k and top-p.

    After a step in which all was accepted, the model has not read its own last token. So the first pass of a step reads
    the row's last two tokens, the first of them for the second time where it was read before: same token, same place,
    same keys, and one shape for all cases.
    """

    def __init__(self, model: PreTrainedModel | CachedModel) -> None:
        self.cached = StaticCachedModel(model) if isinstance(model, nn.Module) else model
        self.graphable = self.cached.graphable

    def start(self, ids: Tensor, lengths: Tensor, capacity: int) -> None:
        self.cached.reset(ids.shape[0], capacity)
        if ids.shape[1] > 1:
            self.cached.extend(ids[:, :-1], keep=1)
        self.cached.truncate(lengths - 1)

    def draft(self, tokens: Tensor, held: Tensor, gamma: int, uniforms: Tensor, sampling: Sampling,
              fresh: bool) -> Draft:  # fmt: skip
        again = 0 if fresh else 1
        self.cached.truncate(held - again)
        places = held[:, None] + torch.arange(-again, 1, device=held.device)
        new, drafted, distributions = tokens.gather(1, places), [], []
        for index in range(gamma):
            logits = self.cached.extend(new, keep=1)[:, -1]
            if sampling.greedy:
                token = logits.argmax(-1)
            else:
                distributions.append(sampling.probabilities(logits))
                token = sample_from(distributions[-1], uniforms[:, index])
            drafted.append(token)
            new = token[:, None]
        return Draft(torch.stack(drafted, 1), torch.stack(distributions, 1) if distributions else None)


class PromptLookup:
    """Drafts what followed the last n tokens where they occurred before, in prompt or output (Saxena 2023).

    The longest n-gram from `most` down to `least` tokens that occurs earlier decides, and of its occurrences the latest
    that gamma tokens follow, else the latest. Costs next to nothing; where nothing occurs before, nothing is drafted.
    """

    graphable = True

    def __init__(self, most: int = 3, least: int = 1) -> None:
        if not 1 <= least <= most:
            raise UsageError(f"n-grams of {least} to {most} tokens: expected 1 <= least <= most.")
        self.most, self.least = most, least

    def start(self, ids: Tensor, lengths: Tensor, capacity: int) -> None:
        pass

    def draft(self, tokens: Tensor, held: Tensor, gamma: int, uniforms: Tensor, sampling: Sampling,
              fresh: bool) -> Draft:  # fmt: skip
        width, last = tokens.shape[1], held[:, None]
        ends = torch.arange(width, device=tokens.device)  # the place of an earlier n-gram's last token
        score = torch.zeros_like(tokens)
        same = (ends < last).expand_as(tokens)
        for n in range(1, self.most + 1):
            shifted = torch.nn.functional.pad(tokens, (n - 1, 0), value=-1)[:, :width]  # [place - (n - 1)]
            newest = tokens.gather(1, (last - (n - 1)).clamp(min=0))
            same = same & (shifted == newest) & (last >= n - 1)
            if n >= self.least:
                score = torch.where(same, n * 2 * width, score)
        room = (last - ends).clamp(max=gamma)  # tokens that follow there
        score = torch.where(score > 0, score + (room == gamma) * width + ends, 0)
        best = score.argmax(1, keepdim=True)
        found = score.gather(1, best) > 0
        counts = torch.where(found, (last - best).clamp(max=gamma), 0).squeeze(1)
        places = (best + 1 + torch.arange(gamma, device=tokens.device)).clamp(max=width - 1)
        return Draft(tokens.gather(1, places), None, counts)


def early_exit_draft(model: PreTrainedModel, layers: int,
                     cached: Callable[[PreTrainedModel], CachedModel] = StaticCachedModel) -> DraftModel:  # fmt: skip
    """Drafts from the first `layers` layers of the target itself, with its last norm and head; no weight is copied.

    cached: what the shallow model is held by. Raises UsageError for a number of layers that is not below the model's,
    and for models of another build than Llama's.
    """
    base = getattr(model, "model", None)
    total = len(getattr(base, "layers", ()))
    if not total or not hasattr(base, "norm"):
        raise UsageError(f"{type(model).__name__} is not built like Llama (model.layers, model.norm).")
    if not 1 <= layers < total:
        raise UsageError(f"A draft from {layers} of {total} layers: expected 1 to {total - 1}.")
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = config.layer_types[:layers]
    shallow, inner = copy.copy(model), copy.copy(base)
    for module in (shallow, inner):
        module._modules, module.config = dict(module._modules), config
    inner._modules["layers"] = nn.ModuleList(base.layers[:layers])
    shallow._modules["model"] = inner
    return DraftModel(cached(shallow))
