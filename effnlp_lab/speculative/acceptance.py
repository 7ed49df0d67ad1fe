"""What becomes of a draft: algorithm 1 of Leviathan, Kalman and Matias 2023, for a batch, on the device.

p are the target's distributions at gamma + 1 positions, q the drafter's at gamma, of which the drafted tokens were
drawn. Token i is kept while its uniform r_i <= p_i(x_i) / q_i(x_i); at the first that is not, a token is drawn from
norm(max(0, p - q)), and where all are kept one more from p: a step always gives one token more than it accepts. The
output has distribution p whatever q is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from effnlp_lab.errors import UsageError
from effnlp_lab.speculative.sampling import sample_from


class Verified(NamedTuple):
    """Of each row, int64 [batch]: drafted tokens that were accepted; the token that follows them; drafted tokens that
    were tested, which are the accepted ones and the first rejected one. What follows a rejection was never tested."""

    accepted: Tensor
    token: Tensor
    tested: Tensor


def adjusted_distribution(p: Tensor, q: Tensor) -> Tensor:
    """norm(max(0, p - q)) [..., vocabulary]: what a token that replaces a rejected one is drawn from.

    Where rounding leaves nothing of the difference (p equals q, and nothing can be rejected), it is p.
    """
    rest = _rest(p, q)
    return rest / rest.sum(-1, keepdim=True)


def verify_drafts(p: Tensor, q: Tensor | None, drafts: Tensor, uniforms: Tensor, last_uniform: Tensor,
                  counts: Tensor | None = None) -> Verified:  # fmt: skip
    """p [batch, gamma + 1, vocabulary], q [batch, gamma, vocabulary], drafts int64 [batch, gamma], uniforms
    [batch, gamma] in [0, 1) that decide on them, last_uniform [batch] that draws the token after them.

    q None: the drafts are certain (each q is 1 at its token), as those of a lookup. counts [batch]: how many of a row's
    drafts there are; the rest of the row is filling. No value is read by the host. A ratio of 0 rejects, also where the
    uniform is exactly 0. Raises UsageError for shapes that do not belong together.
    """
    batch, gamma = drafts.shape
    _check(p, q, drafts, uniforms, last_uniform)
    if gamma == 0:
        nothing = torch.zeros(batch, dtype=torch.long, device=p.device)
        return Verified(nothing, sample_from(p[:, 0], last_uniform), nothing)
    at_p = p[:, :gamma].gather(-1, drafts.unsqueeze(-1)).squeeze(-1)
    ratio = at_p if q is None else at_p / q.gather(-1, drafts.unsqueeze(-1)).squeeze(-1)
    accepted, tested = _leading((uniforms <= ratio) & (at_p > 0), counts)
    rows = torch.arange(batch, device=p.device)
    place = accepted.clamp(max=gamma - 1)
    here = p[rows, accepted]
    if q is None:
        rest = here.scatter(-1, drafts[rows, place].unsqueeze(-1), 0.0)
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, here)
    else:
        rest = _rest(here, q[rows, place])
    all_kept = accepted == (gamma if counts is None else counts)
    return Verified(accepted, sample_from(torch.where(all_kept[:, None], here, rest), last_uniform), tested)


def verify_greedy(best: Tensor, drafts: Tensor, counts: Tensor | None = None) -> Verified:
    """The same at temperature 0, where p is all on the target's best token: best int64 [batch, gamma + 1]."""
    gamma = drafts.shape[1]
    accepted, tested = _leading(best[:, :gamma] == drafts, counts)
    return Verified(accepted, best.gather(1, accepted.unsqueeze(1)).squeeze(1), tested)


def _leading(kept: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """How many lead each row without a gap, and how many were looked at to find out."""
    gamma = kept.shape[1]
    if counts is not None:
        kept = kept & (torch.arange(gamma, device=kept.device) < counts.unsqueeze(1))
    accepted = kept.long().cumprod(1).sum(1)
    return accepted, torch.minimum(accepted + 1, counts) if counts is not None else (accepted + 1).clamp(max=gamma)


def _rest(p: Tensor, q: Tensor) -> Tensor:
    rest = (p - q).clamp(min=0)
    return torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)


def _check(p: Tensor, q: Tensor | None, drafts: Tensor, uniforms: Tensor, last_uniform: Tensor) -> None:
    batch, gamma = drafts.shape
    if p.ndim != 3 or p.shape[:2] != (batch, gamma + 1):
        raise UsageError(
            f"p has shape {tuple(p.shape)}: the target gives gamma + 1 distributions, "
            f"[{batch}, {gamma + 1}, vocabulary]."
        )
    if q is not None and q.shape != (batch, gamma, p.shape[2]):
        raise UsageError(f"q has shape {tuple(q.shape)}: expected {(batch, gamma, p.shape[2])}.")
    if uniforms.shape != (batch, gamma) or last_uniform.shape != (batch,):
        raise UsageError(
            f"The uniforms have shapes {tuple(uniforms.shape)} and {tuple(last_uniform.shape)}: expected "
            f"{(batch, gamma)} and {(batch,)}."
        )
