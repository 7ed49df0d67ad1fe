"""The loop: prompts to tokens, with a drafter or without.

On a GPU small models are bound by the host, which takes longer to start a layer's kernels than they run. So a whole
step, drafts and check and all, becomes one CUDA graph for each gamma; the host starts a step while the one before it
still runs, and reads its report, the only thing that crosses, one step late. A row that ends stays as it is meanwhile.
"""

from __future__ import annotations

import statistics as figures
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from effnlp_lab.errors import UsageError
from effnlp_lab.speculative.adaptive import AdaptiveGamma
from effnlp_lab.speculative.cached import CachedModel
from effnlp_lab.speculative.drafters import Drafter, DraftModel
from effnlp_lab.speculative.sampling import Sampling
from effnlp_lab.speculative.state import FIGURES, BatchState, step
from effnlp_lab.speculative.static_cached import StaticCachedModel, pad_prompts
from effnlp_lab.speculative.statistics import Statistics

AHEAD = 1
"""Steps that the host starts before it reads the report of an earlier one, on a GPU."""
CAPACITY_STEP = 64
"""Buffers are made for a multiple of so many tokens, so that requests of about the same size share them."""


@dataclass
class Generation:
    """sequences: of each prompt, int64 [prompt + new], on the CPU; new: only what was generated."""

    sequences: list[Tensor]
    new: list[Tensor]
    statistics: Statistics


class SpeculativeDecoder:
    """`SpeculativeDecoder(target, DraftModel(small), gamma=4).generate([ids], max_new_tokens=64).sequences[0]`.

    target: a decoder of transformers, or a CachedModel (on a GPU a PagedCachedModel takes about a third of a static
    one's time). drafter: a Drafter, a smaller model of transformers, or None for the target alone. gamma: tokens
    drafted a step, or an AdaptiveGamma. sampling: greedy by default. ends: token ids after which a row is over; None
    takes the model's own, () none. graphs: CUDA graphs, None where they can be had. Buffers, caches and graphs stay for
    the next call.
    """

    def __init__(self, target: PreTrainedModel | CachedModel, drafter: Drafter | PreTrainedModel | None = None, *,
                 gamma: int | AdaptiveGamma = 4, sampling: Sampling | None = None,
                 ends: Iterable[int] | None = None, graphs: bool | None = None) -> None:  # fmt: skip
        """Raises UsageError for a gamma below 1 with a drafter, and for graphs where something needs the host."""
        self.target = StaticCachedModel(target) if isinstance(target, nn.Module) else target
        self.drafter = DraftModel(drafter) if isinstance(drafter, nn.Module) else drafter
        self.device = self.target.device
        self.adaptive = gamma if isinstance(gamma, AdaptiveGamma) else None
        self.gamma = 0 if self.drafter is None else gamma
        self.most_gamma = self.adaptive.most if self.drafter is not None and self.adaptive else self.gamma
        if self.drafter is not None and (not isinstance(self.most_gamma, int) or self.most_gamma < 1):
            raise UsageError(f"gamma is {gamma}: expected at least 1 drafted token (drafter=None decodes without).")
        self.sampling = sampling or Sampling()
        self.ends = torch.tensor(_ends_of(self.target, ends), dtype=torch.long, device=self.device)
        able = self.target.graphable and (self.drafter is None or self.drafter.graphable) and self.device.type == "cuda"
        if graphs and not able:
            raise UsageError("CUDA graphs need a CUDA device, a static cache and a drafter that does not use the host.")
        self.graphs = able if graphs is None else graphs
        self._size: tuple[int, int] = (0, 0)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Tensor], max_new_tokens: int, *, seed: int | None = None,
                 uniforms: Tensor | Callable[[int, int], Tensor] | None = None,
                 on_tokens: Callable[[int, list[int]], Any] | None = None) -> Generation:  # fmt: skip
        """Continue prompts, each int64 [length], by up to `max_new_tokens`; lengths may differ.

        uniforms: [steps, batch, 2 gamma + 1] in [0, 1), or a function (step, gamma) -> [batch, 2 gamma + 1]: the first
        gamma draw the drafts, the next gamma accept, the last draws the token that follows. Without them a generator
        seeded with `seed` (None: torch's own seed). on_tokens: called with a row and its new tokens as they come.
        Raises UsageError for empty prompts, a limit below 1 and too few uniforms.
        """
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}: expected at least 1.")
        ids, lengths = pad_prompts(prompts, 0, self.device)
        batch = ids.shape[0]
        started = time.perf_counter()
        try:
            self._prepare(batch, ids.shape[1] + max_new_tokens + self.most_gamma + 1)
            self._prefill(ids, lengths, max_new_tokens)
            self._single = min(prompt.numel() for prompt in prompts) == 1
        except Exception:
            self._size = (0, 0)  # buffers of a size that the models refused are not used again
            raise
        source = _Uniforms(self, uniforms, seed, batch)
        statistics = Statistics(trace=[[] for _ in range(batch)])
        if self.adaptive:
            self.adaptive.reset()
        self._wait()
        begun = time.perf_counter()
        self._run(source, statistics, on_tokens)
        self._wait()
        statistics.seconds, statistics.prefill_seconds = time.perf_counter() - begun, begun - started
        made, tokens, before = self.state.made.tolist(), self.state.tokens.cpu(), lengths.tolist()
        sequences = [tokens[row, : before[row] + made[row]].clone() for row in range(batch)]
        new = [one[before[row] :] for row, one in enumerate(sequences)]
        return Generation(sequences, new, statistics)

    @torch.no_grad()
    def seconds_of_drafts(self, repeats: int = 30) -> float:
        """Seconds that the drafts of one step take, the median, with the caches as the last `generate` left them.

        With graphs they are a graph of their own. Raises UsageError without a drafter, and before any `generate`.
        """
        if self.drafter is None or not self._size[0]:
            raise UsageError("There are no drafts to time: give a drafter, and generate something first.")
        state, gamma = self.state, self.most_gamma

        def draft() -> None:
            self.drafter.draft(state.tokens, state.held, gamma, state.uniforms[:, :gamma], self.sampling, False)

        draft()
        if self.graphs:
            torch.cuda.synchronize(self.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(self.device), torch.cuda.graph(graph):
                draft()
            draft = graph.replay
        times = []
        for _ in range(repeats):
            self._wait()
            begin = time.perf_counter()
            draft()
            self._wait()
            times.append(time.perf_counter() - begin)
        return figures.median(times)

    def _prepare(self, batch: int, capacity: int) -> None:
        """Buffers for `batch` rows of `capacity` tokens; larger ones than needed are used as they are."""
        if self._size[0] == batch and self._size[1] >= capacity:
            return
        self._size = (batch, -(-capacity // CAPACITY_STEP) * CAPACITY_STEP)
        self.state = BatchState.empty(*self._size, self.most_gamma, self.ends)
        self._forget_graphs()

    def _forget_graphs(self) -> None:
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._seen: set[int] = set()
        self._caches: list[Tensor] = []
        self._weights: list[int] = []

    def _memory(self) -> tuple[list[Tensor], list[int]]:
        """What graphs know by address: caches, which another decoder may have made anew, and weights, which may have
        been moved. Where either changed, graphs are made again."""
        cached = [one for one in (self.target, getattr(self.drafter, "cached", None)) if one is not None]
        weights = [p.data_ptr() for one in cached for p in one.model.parameters()] if self.graphs else []
        return [one.lengths for one in cached], weights

    def _prefill(self, ids: Tensor, lengths: Tensor, limit: int) -> None:
        batch, capacity = self._size
        self.state.start(ids, lengths, limit)
        self.target.reset(batch, capacity)
        if ids.shape[1] > 1:
            self.target.extend(ids[:, :-1], keep=1)
        self.target.truncate(lengths - 1)
        if self.drafter is not None:
            self.drafter.start(ids, lengths, capacity)
        caches, weights = self._memory()
        if [id(x) for x in caches] != [id(x) for x in self._caches] or weights != self._weights:
            self._forget_graphs()
            self._caches, self._weights = caches, weights

    def _run(self, source: _Uniforms, statistics: Statistics, on_tokens: Callable | None) -> None:
        ahead = AHEAD if self.device.type == "cuda" else 0
        waiting: deque[_Report] = deque()
        number, active = 0, [True] * self._size[0]
        while any(active):
            if source.has(number):
                waiting.append(self._launch(number, source))
                number += 1
            elif not waiting:
                raise UsageError(f"There are uniforms for {number} steps, and rows are not finished: give more.")
            if len(waiting) <= ahead and source.has(number):
                continue
            report = waiting.popleft()
            self._take(report.read(), report.gamma, active, statistics, on_tokens)

    def _launch(self, number: int, source: _Uniforms) -> _Report:
        gamma = self.adaptive.gamma if self.adaptive and self.drafter is not None else self.gamma
        if not self.sampling.greedy:
            self.state.uniforms[:, : 2 * gamma + 1] = source.take(number, gamma)
        fresh = number == 0 and self._single
        if not self.graphs or fresh or gamma not in self._seen:
            step(self.state, self.target, self.drafter, gamma, self.sampling, fresh)
            if not fresh:
                self._seen.add(gamma)
        else:
            if gamma not in self._graphs:
                self._graphs[gamma] = self._capture(gamma)
            self._graphs[gamma].replay()
        return _Report(self.state.report, gamma)

    def _capture(self, gamma: int) -> torch.cuda.CUDAGraph:
        """The step as a graph; capturing does not run it."""
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph):
            step(self.state, self.target, self.drafter, gamma, self.sampling, False)
        return graph

    def _take(self, report: list[list[int]], gamma: int, active: list[bool], statistics: Statistics,
              on_tokens: Callable | None) -> None:  # fmt: skip
        accepted_in_step = tested_in_step = 0
        for row, line in enumerate(report):
            if not active[row]:
                continue
            made, accepted, tested, drafted, finished = line[: len(FIGURES)]
            statistics.add(row, made, accepted, tested, drafted)
            accepted_in_step, tested_in_step = accepted_in_step + accepted, tested_in_step + tested
            active[row] = not finished
            if on_tokens is not None and made:
                on_tokens(row, line[len(FIGURES) : len(FIGURES) + made])
        if self.adaptive:
            self.adaptive.update(accepted_in_step, tested_in_step)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Report:
    """A step's report on its way to the host."""

    def __init__(self, report: Tensor, gamma: int) -> None:
        self.gamma, self.event = gamma, None
        if report.device.type == "cuda":
            self.values = torch.empty(report.shape, dtype=report.dtype, pin_memory=True)
            self.values.copy_(report, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.values = report.clone()

    def read(self) -> list[list[int]]:
        if self.event is not None:
            self.event.synchronize()
        return self.values.tolist()


class _Uniforms:
    """Where a step's uniforms come from."""

    def __init__(self, decoder: SpeculativeDecoder, given: Tensor | Callable | None, seed: int | None,
                 batch: int) -> None:  # fmt: skip
        self.given, self.batch, self.device = given, batch, decoder.device
        if isinstance(given, Tensor) and (given.ndim != 3 or given.shape[1:] != (batch, 2 * decoder.most_gamma + 1)):
            raise UsageError(
                f"The uniforms have shape {tuple(given.shape)}: expected [steps, {batch}, "
                f"{2 * decoder.most_gamma + 1}]."
            )
        if isinstance(given, Tensor) and decoder.adaptive:
            raise UsageError("With an adaptive gamma give the uniforms as a function (step, gamma).")
        self.generator = torch.Generator(self.device)
        self.generator.manual_seed(torch.initial_seed() if seed is None else seed)

    def has(self, number: int) -> bool:
        return not isinstance(self.given, Tensor) or number < self.given.shape[0]

    def take(self, number: int, gamma: int) -> Tensor:
        if self.given is None:
            return torch.rand(self.batch, 2 * gamma + 1, device=self.device, generator=self.generator)
        return self.given[number] if isinstance(self.given, Tensor) else self.given(number, gamma).to(self.device)


def _ends_of(target: CachedModel, ends: Iterable[int] | None) -> list[int]:
    if ends is not None:
        return list(ends)
    model = getattr(target, "model", None)
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [] if found is None else list(found) if isinstance(found, list | tuple) else [found]
