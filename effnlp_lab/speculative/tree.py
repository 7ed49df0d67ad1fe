"""Several drafts at once: a tree of tokens that shares beginnings, checked by the target in one pass.

Each node sees the text and its own ancestors, by a mask; its position is its depth. At a node whose children were drawn
from q one by one, each child is accepted with probability min(1, p / q), and after each that is not, p becomes
norm(max(0, p - q)): the token that is kept in the end, a child or one drawn from what is left of p, has the target's
distribution (Miao et al. 2024, SpecInfer, algorithm 2). Greedy trees hold the drafter's best tokens and keep the path
that the target would have taken.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from effnlp_lab.errors import UsageError
from effnlp_lab.speculative.decoder import Generation, _ends_of
from effnlp_lab.speculative.sampling import Sampling, sample_from
from effnlp_lab.speculative.static_cached import StaticCachedModel, pad_prompts
from effnlp_lab.speculative.statistics import Statistics


@dataclass(frozen=True)
class TokenTree:
    """Every node of one depth has as many children: branching (3, 2) has 3 nodes and 6 below them.

    Node 0 is the newest token of the text; the others follow, depth by depth, the children of a node side by side.
    """

    branching: tuple[int, ...]
    parent: tuple[int, ...] = field(init=False)
    depth: tuple[int, ...] = field(init=False)
    first: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        if not self.branching or min(self.branching) < 1:
            raise UsageError(f"The branching is {self.branching}: expected depths of at least 1 child each.")
        parent, depth, first = [-1], [0], [0]
        for level, width in enumerate(self.branching, start=1):
            first.append(len(parent))
            for node in range(first[level - 1], first[level]):
                parent += [node] * width
                depth += [level] * width
        for name, value in (("parent", parent), ("depth", depth), ("first", first)):
            object.__setattr__(self, name, tuple(value))

    @property
    def nodes(self) -> int:
        return len(self.parent)

    def level(self, depth: int) -> slice:
        """The nodes of a depth."""
        return slice(self.first[depth], self.first[depth + 1] if depth + 1 < len(self.first) else self.nodes)

    def sees(self) -> Tensor:
        """bool [nodes, nodes]: each node sees itself and its ancestors."""
        seen = torch.zeros(self.nodes, self.nodes, dtype=torch.bool)
        for node, parent in enumerate(self.parent):
            if parent >= 0:
                seen[node] = seen[parent]
            seen[node, node] = True
        return seen

    def uniforms(self) -> int:
        """How many a step needs of each row: one to draw each node but the newest, one to accept at each child that a
        path may meet, one for the last token."""
        return self.nodes - 1 + sum(self.branching) + 1


class TreeDecoder:
    """Decoding with a tree of drafts a step, for a batch, on static caches. Works on every device, without graphs."""

    def __init__(self, target: PreTrainedModel, drafter: PreTrainedModel, branching: Sequence[int] = (3, 2, 1), *,
                 sampling: Sampling | None = None, ends: Iterable[int] | None = None) -> None:  # fmt: skip
        self.target, self.drafter = StaticCachedModel(target), StaticCachedModel(drafter)
        self.tree, self.sampling, self.device = TokenTree(tuple(branching)), sampling or Sampling(), target.device
        self.ends = set(_ends_of(self.target, ends))
        self.sees = self.tree.sees().to(self.device)
        self.depth = torch.tensor(self.tree.depth, device=self.device)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Tensor], max_new_tokens: int, *, seed: int | None = None) -> Generation:
        """Continue prompts, each int64 [length], by up to `max_new_tokens`; errors as of SpeculativeDecoder."""
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}: expected at least 1.")
        ids, lengths = pad_prompts(prompts, 0, self.device)
        batch, longest = ids.shape
        generator = torch.Generator(self.device)
        generator.manual_seed(torch.initial_seed() if seed is None else seed)
        tokens = [prompt.tolist() for prompt in prompts]
        started = time.perf_counter()
        for cached in (self.target, self.drafter):
            cached.reset(batch, longest + max_new_tokens + 2 * self.tree.nodes)
            if longest > 1:
                cached.extend(ids[:, :-1], keep=1)
        statistics = Statistics(trace=[[] for _ in range(batch)])
        held, active, made, begun = lengths - 1, [True] * batch, [0] * batch, time.perf_counter()
        while any(active):
            uniforms = torch.rand(batch, self.tree.uniforms(), device=self.device, generator=generator)
            path, counts = self._step(tokens, held, uniforms)
            new = torch.zeros_like(held)
            for row, (one, count) in enumerate(zip(path.tolist(), counts.tolist(), strict=True)):
                if not active[row]:
                    continue
                kept = one[: count + 1][: max_new_tokens - made[row]]
                end = next((place for place, token in enumerate(kept) if token in self.ends), None)
                kept = kept if end is None else kept[: end + 1]
                tokens[row] += kept
                made[row] += len(kept)
                new[row] = len(kept)
                tested = min(count + 1, len(self.tree.branching))
                statistics.add(row, len(kept), count, tested, self.tree.nodes - 1)
                active[row] = end is None and made[row] < max_new_tokens
            held = held + new
        statistics.seconds, statistics.prefill_seconds = time.perf_counter() - begun, begun - started
        sequences = [torch.tensor(row) for row in tokens]
        before = [prompt.numel() for prompt in prompts]
        return Generation(sequences, [x[n:] for x, n in zip(sequences, before, strict=True)], statistics)

    def _step(self, tokens: list[list[int]], held: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """New tokens of each row, int64 [batch, depths + 1], and how many of them are drafts. The caches afterwards
        hold the newest token and the accepted path from `held` on."""
        newest = torch.tensor([row[-1] for row in tokens], device=self.device)[:, None]
        before = torch.tensor([row[-2] if len(row) > 1 else row[-1] for row in tokens], device=self.device)[:, None]
        nodes, q = self._draft(newest, before, held, uniforms[:, : self.tree.nodes - 1])
        self.target.truncate(held)
        logits = self.target.extend(nodes, depth=self.depth, sees=self.sees)
        p, rest = self.sampling.probabilities(logits), uniforms[:, self.tree.nodes - 1 :]
        places, count, token = _walk(self.tree, p, q, nodes, rest, self.sampling.greedy)
        self.target.keep_path(held, torch.cat([torch.zeros_like(newest), places], 1))
        path = torch.cat([nodes.gather(1, places), token[:, None]], 1)
        return path.scatter(1, count[:, None], token[:, None]), count

    def _draft(self, newest: Tensor, before: Tensor, held: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Node tokens int64 [batch, nodes], and the distribution that the children of each inner node were drawn from,
        [batch, inner nodes, vocabulary]."""
        again = (held > 0).long()  # the token before the newest is read again, see DraftModel; a first token has none
        self.drafter.truncate(held - again)
        if bool((again == 0).any()):  # rows of one token: the newest alone, in all rows
            self.drafter.truncate(held)
            logits = self.drafter.extend(newest)
        else:
            logits = self.drafter.extend(torch.cat([before, newest], 1), keep=1)
        self.drafter.truncate(held)
        nodes, q, known = newest, [], None
        for level, width in enumerate(self.tree.branching, start=1):
            known = self.sampling.probabilities(logits)  # [batch, nodes of the level above, vocabulary]
            q.append(known)
            if self.sampling.greedy:
                children = logits.topk(width, dim=-1).indices.flatten(1)
            else:
                at = self.tree.level(level)
                drawn = uniforms[:, at.start - 1 : at.stop - 1].unflatten(1, (-1, width))
                wide = known[:, :, None].expand(-1, -1, width, -1)
                children = sample_from(wide.reshape(-1, wide.shape[-1]), drawn.flatten()).view(newest.shape[0], -1)
            nodes = torch.cat([nodes, children], 1)
            if level < len(self.tree.branching):
                size = nodes.shape[1]
                self.drafter.truncate(held)
                out = self.drafter.extend(nodes, keep=children.shape[1], depth=self.depth[:size],
                                          sees=self.sees[:size, :size])  # fmt: skip
                logits = out[:, -children.shape[1] :]
        return nodes, torch.cat(q, 1)


def _walk(tree: TokenTree, p: Tensor, q: Tensor, nodes: Tensor, uniforms: Tensor,
          greedy: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """From the newest token down: nodes of the path [batch, depths] (after its end: any), its length, the token after
    it. uniforms [batch, sum of branching + 1]."""
    batch, rows = nodes.shape[0], torch.arange(nodes.shape[0], device=nodes.device)
    here = torch.zeros(batch, dtype=torch.long, device=nodes.device)  # the node that each row has reached
    left, going = p[:, 0], torch.ones(batch, dtype=torch.bool, device=nodes.device)
    count, places, used = torch.zeros_like(here), [], 0
    for level, width in enumerate(tree.branching):
        above, below = tree.level(level), tree.level(level + 1)
        children = below.start + (here - above.start).clamp(min=0) * width
        drawn_from, chosen = q[rows, here.clamp(max=q.shape[1] - 1)], torch.full_like(here, -1)
        for child in range(width):
            token = nodes[rows, (children + child).clamp(max=tree.nodes - 1)]
            asked = going & (chosen < 0)
            at_p, at_q = left[rows, token], drawn_from[rows, token]
            kept = at_p > 0 if greedy else (uniforms[:, used] <= at_p / at_q) & (at_p > 0)
            used += 1
            chosen = torch.where(asked & kept, children + child, chosen)
            if not greedy:
                less = (left - drawn_from).clamp(min=0)
                total = less.sum(-1, keepdim=True)
                less = torch.where(total > 0, less / total, left)
                left = torch.where((asked & ~kept)[:, None], less, left)
        going = going & (chosen >= 0)
        here = torch.where(going, chosen, here)
        left = torch.where(going[:, None], p[rows, here], left)
        count = count + going
        places.append(torch.where(going, here, tree.nodes - 1))
    return torch.stack(places, 1), count, sample_from(left, uniforms[:, -1])
