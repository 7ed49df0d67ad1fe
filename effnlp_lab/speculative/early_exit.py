"""Leaving the network early where it is sure: confident adaptive language modelling (CALM, Schuster et al. 2022).

After each layer the head is asked; where its two likeliest tokens are far enough apart, the token is taken and the
upper layers are left out. Later tokens attend to those layers too, so the state is handed up to them as it is, to make
their keys and values.

How far apart is enough is not guessed. Thresholds are tried from the safest down on texts drawn like those to come; for
each, "the mean loss is above delta" is tested, and the first that cannot be rejected ends the search (fixed-sequence
testing; Angelopoulos et al. 2021, Learn then Test). The threshold before it has a mean loss of at most delta with
probability 1 - epsilon, whatever the model and however many thresholds there were.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from effnlp_lab.errors import UsageError


def confidence(logits: Tensor) -> Tensor:
    """The likeliest token's probability less the second's, [...] from logits [..., vocabulary] (the softmax response,
    section 3.4)."""
    top = logits.float().softmax(-1).topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


def calibrate_threshold(thresholds: Sequence[float], losses: Tensor, *, delta: float, epsilon: float) -> float | None:
    """The lowest threshold that keeps the mean loss at most delta with probability at least 1 - epsilon.

    thresholds: from the safest (highest) down. losses [texts, thresholds]: of each calibration text at each, in [0, 1],
    such as the share of tokens that differ from the full model's. None where not even the safest can be shown to be
    safe: more texts are needed, or a larger delta. Raises UsageError for losses outside [0, 1], thresholds that do not
    fall and levels outside (0, 1).
    """
    if not 0 < delta < 1 or not 0 < epsilon < 1:
        raise UsageError(f"delta={delta} and epsilon={epsilon}: expected numbers between 0 and 1.")
    if losses.ndim != 2 or losses.shape[1] != len(thresholds) or losses.shape[0] == 0:
        raise UsageError(f"losses have shape {tuple(losses.shape)}: expected [texts, {len(thresholds)} thresholds].")
    if any(b >= a for a, b in zip(thresholds, thresholds[1:], strict=False)):
        raise UsageError("The thresholds must fall, from the safest to the boldest.")
    if not bool(((losses >= 0) & (losses <= 1)).all()):
        raise UsageError("Losses must lie in [0, 1]: divide by the largest that can occur.")
    chosen = None
    for threshold, column in zip(thresholds, losses.double().T, strict=True):
        if p_value(float(column.mean()), len(column), delta) > epsilon:
            break
        chosen = threshold
    return chosen


def p_value(mean: float, count: int, delta: float) -> float:
    """Of "the expected loss is above delta", from the mean of `count` losses in [0, 1]: the smaller of Hoeffding's and
    Bentkus's bound (Angelopoulos et al. 2021, proposition 1 and section 2.3)."""
    if mean >= delta:
        return 1.0
    distance = _divergence(mean, delta)
    hoeffding = math.exp(-count * distance)
    bentkus = math.e * _binomial_cdf(math.ceil(count * mean - 1e-9), count, delta)
    return min(1.0, hoeffding, bentkus)


class EarlyExitDecoder:
    """Greedy decoding of one text with a Llama-type model that leaves early; `exits` has the layers of each new token.

    threshold: of the confidence; above 1 nothing leaves early, and the output is the full model's. least: layers that
    every token passes.
    """

    def __init__(self, model: PreTrainedModel, threshold: float, *, least: int = 1) -> None:
        base = getattr(model, "model", None)
        if not hasattr(base, "layers") or not hasattr(base, "norm") or not hasattr(base, "rotary_emb"):
            raise UsageError(f"{type(model).__name__} is not built like Llama (model.layers, norm, rotary_emb).")
        if not 1 <= least <= len(base.layers):
            raise UsageError(f"least is {least}: expected 1 to {len(base.layers)} layers.")
        self.model, self.base, self.threshold, self.least = model, base, threshold, least
        self.exits: list[int] = []

    @torch.no_grad()
    def generate(self, prompt: Tensor, max_new_tokens: int, ends: Sequence[int] = ()) -> Tensor:
        """prompt int64 [length] -> int64 [length + new]. The prompt passes through all layers."""
        if prompt.ndim != 1 or prompt.numel() == 0:
            raise UsageError(f"The prompt has shape {tuple(prompt.shape)}: expected at least one token id, [length].")
        cache, self.exits = DynamicCache(), []
        ids = prompt.to(self.model.device)
        logits = self.model(ids[None], past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        new = [int(logits.argmax())]
        self.exits.append(len(self.base.layers))
        while len(new) < max_new_tokens and new[-1] not in ends:
            new.append(self._next(new[-1], len(ids) + len(new) - 1, cache))
        return torch.cat([ids, torch.tensor(new, device=ids.device)])

    def _next(self, token: int, position: int, cache: DynamicCache) -> int:
        """The token after `token` at `position`, whose keys and values join every layer's."""
        device, layers = self.model.device, self.base.layers
        hidden = self.base.embed_tokens(torch.tensor([[token]], device=device))
        turns = self.base.rotary_emb(hidden, torch.tensor([[position]], device=device))
        for index, layer in enumerate(layers):
            hidden = layer(hidden, position_embeddings=turns, past_key_values=cache, use_cache=True)
            logits = self.model.lm_head(self.base.norm(hidden))[0, 0]
            if index + 1 >= self.least and (index + 1 == len(layers) or float(confidence(logits)) >= self.threshold):
                break
        self.exits.append(index + 1)
        for upper in layers[index + 1 :]:
            self._hand_up(upper, hidden, turns, cache)
        return int(logits.argmax())

    def _hand_up(self, layer: nn.Module, hidden: Tensor, turns: tuple[Tensor, Tensor], cache: DynamicCache) -> None:
        """Keys and values of a layer that was left out, from the state that left below it (section 3.2)."""
        attention, state = layer.self_attn, layer.input_layernorm(hidden)
        key, value = (
            project(state).view(1, 1, -1, attention.head_dim).transpose(1, 2)
            for project in (attention.k_proj, attention.v_proj)
        )
        cosine, sine = (x.unsqueeze(1) for x in turns)
        half = key.shape[-1] // 2
        turned = torch.cat([-key[..., half:], key[..., :half]], -1)
        cache.update(key * cosine + turned * sine, value, attention.layer_idx)


def _divergence(a: float, b: float) -> float:
    """a log(a / b) + (1 - a) log((1 - a) / (1 - b)): the relative entropy of two coins."""
    first = a * math.log(a / b) if a > 0 else 0.0
    return first + ((1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0)


def _binomial_cdf(successes: int, count: int, probability: float) -> float:
    """P(a binomial variable is at most `successes`)."""
    logs = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        + k * math.log(probability) + (count - k) * math.log1p(-probability)
        for k in range(successes + 1)
    ]  # fmt: skip
    top = max(logs)
    return min(1.0, math.exp(top) * math.fsum(math.exp(x - top) for x in logs))
