"""Gamma that follows the acceptance: easy text is drafted far ahead, hard text hardly at all."""

from __future__ import annotations

from effnlp_lab.errors import UsageError
from effnlp_lab.speculative.analysis import best_gamma


class AdaptiveGamma:
    """The gamma that theorem 3.8 of Leviathan et al. 2023 finds best for the acceptance rate of the recent steps.

    cost_ratio: time of a drafter's pass over the target's, measured on this machine. memory: the weight of what was
    seen before, of each tested token. At least one token is always drafted: a drafter that was left out would have to
    read what it missed before it could be asked again.
    """

    def __init__(self, cost_ratio: float, *, most: int = 8, start: int = 4, memory: float = 0.97) -> None:
        """start: the first gamma. Raises UsageError for a start outside 1 to most and a memory outside (0, 1)."""
        if not 1 <= start <= most:
            raise UsageError(f"start is {start}: expected a gamma from 1 to most={most}.")
        if not 0 < memory < 1:
            raise UsageError(f"memory is {memory}: expected a number between 0 and 1.")
        self.cost_ratio, self.most, self.start, self.memory = cost_ratio, most, start, memory
        self.reset()

    def reset(self) -> None:
        self.gamma, self._accepted, self._tested = self.start, 0.0, 0.0

    @property
    def acceptance_rate(self) -> float:
        """Of recent steps; three quarters, with the weight of four tokens, to begin with."""
        return (self._accepted + 3) / (self._tested + 4)

    def update(self, accepted: int, tested: int) -> None:
        """Take in one step's counts, over all rows."""
        keep = self.memory**tested
        self._accepted, self._tested = keep * self._accepted + accepted, keep * self._tested + tested
        self.gamma = max(1, best_gamma(self.acceptance_rate, self.cost_ratio, self.most))
