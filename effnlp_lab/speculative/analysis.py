"""How much speculative decoding gives: Leviathan, Kalman and Matias 2023, section 3.

alpha: the acceptance rate, the probability that a drafted token that is tested is accepted; gamma: tokens drafted a
step; c: the time of a pass of the drafter over that of the target. Acceptances are taken as independent.
"""

from __future__ import annotations

from effnlp_lab.errors import UsageError


def expected_tokens(alpha: float, gamma: int) -> float:
    """Tokens a step: 1 + alpha + ... + alpha^gamma = (1 - alpha^(gamma + 1)) / (1 - alpha) (equation 1)."""
    _check(alpha, gamma)
    return gamma + 1.0 if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)


def speedup(alpha: float, gamma: int, cost_ratio: float) -> float:
    """Over decoding with the target alone: expected_tokens / (gamma c + 1) (theorem 3.8)."""
    if not cost_ratio >= 0:
        raise UsageError(f"The cost ratio is {cost_ratio}: expected 0 or more.")
    return expected_tokens(alpha, gamma) / (gamma * cost_ratio + 1)


def best_gamma(alpha: float, cost_ratio: float, most: int = 16) -> int:
    """The gamma from 0 to `most` with the largest speed-up; 0, no speculation, where none gives more than 1."""
    return max(range(most + 1), key=lambda gamma: (speedup(alpha, gamma, cost_ratio), -gamma))


def implied_cost_ratio(measured: float, alpha: float, gamma: int) -> float:
    """The c at which theorem 3.8 gives the speed-up that was measured: (expected_tokens / speedup - 1) / gamma.

    Negative where the speed-up is more than a free drafter could give. Raises UsageError for gamma 0.
    """
    if not measured > 0 or gamma < 1:
        raise UsageError(f"A speed-up of {measured} at gamma {gamma} implies nothing: both must be positive.")
    return (expected_tokens(alpha, gamma) / measured - 1) / gamma


def expected_operations(alpha: float, gamma: int, operation_ratio: float) -> float:
    """Operations a token over those of the target alone: (gamma c' + gamma + 1) / expected_tokens (theorem 3.11);
    c': operations of a drafter's pass over those of the target's."""
    return (gamma * operation_ratio + gamma + 1) / expected_tokens(alpha, gamma)


def _check(alpha: float, gamma: int) -> None:
    if not 0 <= alpha <= 1:
        raise UsageError(f"The acceptance rate is {alpha}: expected a number from 0 to 1.")
    if gamma < 0 or gamma != int(gamma):
        raise UsageError(f"gamma is {gamma}: expected a whole number of drafted tokens.")
