"""A batch that is being generated, and one speculative step on it. Nothing here is read by the host.

Each row has `held` + 1 tokens: what the caches hold, and the newest, which nothing has read. A step drafts after the
newest, has the target read the newest and the drafts in one pass, and writes down what was accepted and the token that
follows; `held` grows by as much. Rows that have ended go along and stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effnlp_lab.speculative.acceptance import Verified, verify_drafts, verify_greedy
from effnlp_lab.speculative.cached import CachedModel
from effnlp_lab.speculative.drafters import Draft, Drafter
from effnlp_lab.speculative.sampling import Sampling

FIGURES = ("made", "accepted", "tested", "drafted", "finished")
"""The first columns of a report; the step's tokens follow."""


@dataclass
class BatchState:
    """Buffers that steps work on in place, all on one device.

    tokens int64 [batch, capacity]; held, made, limit int64 [batch]; finished bool [batch]; uniforms float32
    [batch, 2 gamma + 1] of the coming step: gamma to draft with, gamma to accept with, one for the last token; report
    int64 [batch, 5 + gamma + 1]; ends int64 [count].
    """

    tokens: Tensor
    held: Tensor
    made: Tensor
    limit: Tensor
    finished: Tensor
    uniforms: Tensor
    report: Tensor
    ends: Tensor

    @classmethod
    def empty(cls, batch: int, capacity: int, most_gamma: int, ends: Tensor) -> BatchState:
        device = ends.device
        held, made, limit = (torch.zeros(batch, dtype=torch.long, device=device) for _ in range(3))
        return cls(
            torch.zeros(batch, capacity, dtype=torch.long, device=device), held, made, limit,
            torch.zeros(batch, dtype=torch.bool, device=device),
            torch.zeros(batch, 2 * most_gamma + 1, device=device),
            torch.zeros(batch, len(FIGURES) + most_gamma + 1, dtype=torch.long, device=device), ends,
        )  # fmt: skip

    def start(self, ids: Tensor, lengths: Tensor, limit: int) -> None:
        """Begin with prompts int64 [batch, longest] of `lengths` tokens, to be continued by up to `limit` each."""
        self.tokens.zero_()
        self.tokens[:, : ids.shape[1]] = ids
        self.held.copy_(lengths - 1)
        self.made.zero_()
        self.limit.fill_(limit)
        self.finished.zero_()


def step(state: BatchState, target: CachedModel, drafter: Drafter | None, gamma: int, sampling: Sampling,
         fresh: bool) -> None:  # fmt: skip
    """One step of every row; `state.report` says what it came to. gamma 0 is decoding with the target alone."""
    if gamma:
        draft = drafter.draft(state.tokens, state.held, gamma, state.uniforms[:, :gamma], sampling, fresh)
    else:
        draft = Draft(state.tokens[:, :0])
    newest = state.tokens.gather(1, state.held[:, None])
    target.truncate(state.held)
    logits = target.extend(torch.cat([newest, draft.tokens], 1))
    outcome = _verify(logits, draft, state, gamma, sampling)

    order = torch.arange(gamma + 1, device=state.tokens.device)
    filled = torch.cat([draft.tokens, outcome.token[:, None]], 1)
    written = torch.where(order == outcome.accepted[:, None], outcome.token[:, None], filled)
    is_end = (written[:, :, None] == state.ends).any(-1) & (order <= outcome.accepted[:, None])
    before_end = (is_end.long().cumsum(1) - is_end.long() == 0) & (order <= outcome.accepted[:, None])
    new = torch.minimum(before_end.sum(1), state.limit - state.made)
    active = ~state.finished
    new = torch.where(active, new, 0)
    state.tokens.scatter_(1, state.held[:, None] + 1 + order, written)
    state.held += new
    state.made += new
    state.finished |= (is_end & (order < new[:, None])).any(1) | (state.made >= state.limit)

    counts = torch.full_like(new, gamma) if draft.counts is None else draft.counts
    figures = [new, *(torch.where(active, x, 0) for x in (outcome.accepted, outcome.tested, counts)), state.finished]
    state.report[:, : len(FIGURES)] = torch.stack([x.long() for x in figures], 1)
    state.report[:, len(FIGURES) : len(FIGURES) + gamma + 1] = written


def _verify(logits: Tensor, draft: Draft, state: BatchState, gamma: int, sampling: Sampling) -> Verified:
    if sampling.greedy:
        return verify_greedy(logits.argmax(-1), draft.tokens, draft.counts)
    return verify_drafts(
        sampling.probabilities(logits), draft.probabilities, draft.tokens, state.uniforms[:, gamma : 2 * gamma],
        state.uniforms[:, 2 * gamma], draft.counts,
    )  # fmt: skip
