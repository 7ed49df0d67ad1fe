"""Masks with L0 regularization (Louizos, Welling and Kingma 2018): random, exactly 0 or 1 often, with gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from effnlp_lab.errors import UsageError

TEMPERATURE = 2 / 3
"""beta of the paper: lower is nearer to 0 or 1."""
STRETCH = (-0.1, 1.1)
"""gamma and zeta: the interval that is cut to [0, 1]; what lies outside becomes exactly 0 or 1."""


class HardConcrete(nn.Module):
    """A mask of `shape`; each entry keeps something of the model, or takes it out.

    log_alpha: the parameter, 0 where keeping and taking out are equally likely. `sample` needs uniforms; `expected` is
    the probability of not being 0, and `decided` what a trained mask comes to.
    """

    def __init__(self, *shape: int, keep: float = 0.99) -> None:
        """keep: the probability, at first, that an entry is not 0. Raises UsageError unless it is inside (0, 1)."""
        super().__init__()
        if not 0 < keep < 1:
            raise UsageError(f"keep is {keep}: expected a probability between 0 and 1, both excluded.")
        self.log_alpha = nn.Parameter(torch.full(shape, math.log(keep / (1 - keep)) + _shift()))

    def sample(self, uniforms: Tensor) -> Tensor:
        """A mask in [0, 1] from uniforms in (0, 1) of the same shape (equations 10 and 11)."""
        noise = torch.log(uniforms) - torch.log1p(-uniforms)
        return _cut(torch.sigmoid((noise + self.log_alpha) / TEMPERATURE))

    def draw(self) -> Tensor:
        """`sample` with uniforms of torch's own generator."""
        eps = torch.finfo(self.log_alpha.dtype).eps
        return self.sample(torch.rand_like(self.log_alpha).clamp(eps, 1 - eps))

    def expected(self) -> Tensor:
        """P(entry is not 0), of the same shape (equation 12)."""
        return torch.sigmoid(self.log_alpha - _shift())

    def decided(self, kept: int | None = None) -> Tensor:
        """The mask without randomness (equation 13); with `kept`, only so many entries of the last dimension stay, the
        most likely ones, and stay above 0."""
        mask = _cut(torch.sigmoid(self.log_alpha))
        if kept is None:
            return mask
        top = self.log_alpha.topk(kept, dim=-1).indices
        least = torch.tensor(1e-3, dtype=mask.dtype, device=mask.device)
        return torch.zeros_like(mask).scatter(-1, top, torch.maximum(mask.gather(-1, top), least))


def _cut(x: Tensor) -> Tensor:
    low, high = STRETCH
    return (x * (high - low) + low).clamp(0, 1)


def _shift() -> float:
    low, high = STRETCH
    return TEMPERATURE * math.log(-low / high)
