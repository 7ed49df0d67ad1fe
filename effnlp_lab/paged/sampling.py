"""How the next token is chosen: temperature, top-k, top-p, and one uniform number a token from the request's seed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from effnlp_lab.errors import UsageError


@dataclass(frozen=True)
class SamplingParams:
    """What a request asks for.

    temperature 0 takes the likeliest token. top_k keeps the k likeliest (0: all), then top_p the likeliest whose
    probabilities add up to top_p (1: all; Holtzman et al. 2020). `seed` alone decides the random numbers of a request,
    whatever else is served beside it. `stop_token_ids` ends it, None for the model's end-of-sequence tokens; the stop
    token is the last of the output. Raises UsageError for numbers out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not _whole(self.max_new_tokens) or self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens!r}: it must be a whole number, 1 or more.")
        if not _real(self.temperature) or self.temperature < 0:
            raise UsageError(f"temperature is {self.temperature!r}: it must be a number, 0 (greedy) or more.")
        if not _whole(self.top_k) or self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k!r}: it must be a whole number, 0 for all tokens.")
        if not _real(self.top_p) or not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p!r}: it must be above 0 and at most 1.")
        if not _whole(self.seed) or not 0 <= self.seed < 1 << 53:
            raise UsageError(f"seed is {self.seed!r}: it must be a whole number from 0, below 2 to the 53.")
        stops = self.stop_token_ids
        if stops is not None and not (isinstance(stops, Iterable) and all(_whole(x) for x in stops)):
            raise UsageError(f"stop_token_ids is {stops!r}: give whole numbers, () for none, or None for the model's.")

    @property
    def mode(self) -> str:
        """One of "greedy", "sampled", or "filtered" where the tokens must be sorted."""
        if self.temperature == 0:
            return "greedy"
        return "filtered" if self.top_k or self.top_p < 1 else "sampled"


def probabilities(
    logits: Tensor, temperature: Tensor, top_k: Tensor | None = None, top_p: Tensor | None = None
) -> Tensor:
    """The distribution that a token is drawn from, [rows, vocabulary] in float32 (float64 for float64 logits).

    temperature, top_k and top_p are [rows], with the meaning they have in SamplingParams; None keeps all tokens. A
    temperature of 0 puts everything on the likeliest token, the first of equal ones. Tokens as likely as the last that
    is kept are kept too.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    greedy = temperature <= 0
    scores = wide / torch.where(greedy, 1.0, temperature).to(wide.dtype)[:, None]
    if top_k is not None or top_p is not None:
        ordered = scores.sort(-1, descending=True).values
        scores = scores.masked_fill(scores < _lowest_kept(ordered, top_k, top_p), float("-inf"))
    one_hot = torch.zeros_like(scores).scatter_(1, wide.argmax(-1, keepdim=True), 1.0)
    return torch.where(greedy[:, None], one_hot, scores.softmax(-1))


def _lowest_kept(ordered: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """The smallest score that survives, [rows, 1], from scores in falling order."""
    count = torch.full(ordered.shape[:1], ordered.shape[1], device=ordered.device)
    if top_k is not None:
        count = torch.where(top_k > 0, top_k.clamp(max=ordered.shape[1]).long(), count)
    if top_p is not None:
        lowest = ordered.gather(1, count[:, None] - 1)
        kept = ordered.masked_fill(ordered < lowest, float("-inf")).softmax(-1)
        before = kept.cumsum(-1) - kept
        wanted = (before < top_p.to(kept.dtype)[:, None]) & (kept > 0)
        count = torch.where(top_p < 1, torch.minimum(count, wanted.sum(-1).clamp(min=1)), count)
    return ordered.gather(1, count[:, None] - 1)


def sample(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which the cumulative distribution passes each uniform number of [0, 1): int64 [rows].

    Summed in float64, so that given its uniforms the output is what the definition gives.
    """
    cumulative = probabilities.double().cumsum(-1)
    target = uniforms.double() * cumulative[:, -1]
    return torch.searchsorted(cumulative, target[:, None], right=True).squeeze(1).clamp(max=probabilities.shape[1] - 1)


def uniforms(seeds: Tensor, counters: Tensor) -> Tensor:
    """A uniform number of [0, 1) for each (seed, counter), int64 [rows] each: float64 with 53 random bits.

    The finalizer of SplitMix64 (Steele et al. 2014) over both, in whole-number tensor operations, which wrap around.
    """
    state = _mix(_mix(seeds * _GAMMA + 1) + (counters + 1) * _GAMMA)
    return (_shift(state, 11)).double() * 2.0**-53


_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in: torch's own shift repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _whole(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _real(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)
