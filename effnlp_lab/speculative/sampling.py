"""Temperature, top-k and top-p as a distribution, and a token from a distribution and a uniform.

Speculative decoding preserves the distribution that it is given, whatever that is. So target and drafter both turn
logits into probabilities here first; a draft made at another temperature than it is checked at is still right, only
rarely accepted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effnlp_lab.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. Then, in transformers' order: top_k most likely tokens (0: all), of these the fewest
    whose probabilities reach top_p. Raises UsageError for values outside their range."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"The temperature is {self.temperature}: expected 0 (greedy) or more.")
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise UsageError(f"top_k is {self.top_k}: expected a whole number, 0 for all tokens.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}: expected more than 0, at most 1.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1

    def probabilities(self, logits: Tensor) -> Tensor:
        """float32 (float64 from float64) [..., vocabulary] from logits of that shape; greedy: all on the first of the
        largest."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.greedy:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p < 1:
            ordered, order = logits.sort(dim=-1)
            removed = ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p
            removed[..., -1] = False
            logits = logits.masked_fill(torch.zeros_like(removed).scatter_(-1, order, removed), -torch.inf)
        return logits.softmax(-1)


def sample_from(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first token whose cumulative weight exceeds uniform * total: int64 [...].

    weights [..., vocabulary], not negative, of any positive sum; uniforms [...] in [0, 1). A token of weight zero is
    never drawn. Sums are in float64, so that a uniform of 24 bits never reaches the total.
    """
    sums = weights.cumsum(-1, dtype=torch.float64)
    wanted = uniforms.double().unsqueeze(-1) * sums[..., -1:]
    return torch.searchsorted(sums, wanted, right=True).squeeze(-1)
