"""What runs on the device: the slots' tables and newest tokens, reading chunks of prompts, decoding steps.

A step is started and not waited for. Everything that the next step needs, the newest token of each request among it,
stays on the device; the host learns of the tokens when it asks for them (`Flight.tokens`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from effnlp_lab.paged.batch import Batch, to_device
from effnlp_lab.paged.cache import PagedCache
from effnlp_lab.paged.graphs import CapturedStep, batch_sizes
from effnlp_lab.paged.model import PagedModel
from effnlp_lab.paged.requests import Request
from effnlp_lab.paged.sampling import probabilities, sample, uniforms
from effnlp_lab.paged.scheduler import Chunk
from effnlp_lab.paged.sequence import NO_PAGE
from effnlp_lab.paged.sizes import pages_for

MODES = ("greedy", "sampled", "filtered")
INPUTS = 4
"""What a decoding step is told of each row: slot, position, place in the cache, length."""
WARM_UP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
"""Of a prompt: from one row of an attention tile to more than fill it, whatever heads share it."""
SHARES = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass
class Flight:
    """Tokens on their way from the device: one for each request."""

    requests: Sequence[Request]
    _tokens: Tensor
    _event: torch.cuda.Event | None = None

    def tokens(self) -> list[int]:
        """Wait for them."""
        if self._event is not None:
            self._event.synchronize()
        return self._tokens.tolist()


class Runner:
    """The state of `max_batch` slots on the device, and one more slot that padded rows of a step use.

    The last page of the cache belongs to that slot: what padding writes there nobody reads.
    """

    def __init__(
        self, model: PagedModel, cache: PagedCache, *, max_batch: int, max_length: int, cuda_graphs: bool
    ) -> None:
        self.model, self.cache, self.max_batch, self.max_length = model, cache, max_batch, max_length
        self.cuda_graphs = cuda_graphs
        device, slots = model.device, max_batch + 1
        columns = pages_for(max_length, cache.page_size)
        self.block_tables = torch.full((slots, columns), cache.pages - 1, dtype=torch.int32, device=device)
        self.newest = torch.zeros(slots, dtype=torch.int64, device=device)
        self.sampling = torch.tensor([[0.0, 0.0, 1.0, 0.0]] * slots, dtype=torch.float64, device=device)
        self.sizes = batch_sizes(max_batch)
        self._padding = np.array([[max_batch], [0], [(cache.pages - 1) * cache.page_size], [1]], np.int32)
        self._starts = torch.arange(slots, dtype=torch.int32, device=device)
        self._captured: dict[tuple[int, str], tuple[Tensor, CapturedStep]] = {}
        self._pool: tuple[int, int] | None = None

    @torch.no_grad()
    def read(self, chunks: Sequence[Chunk]) -> Flight | None:
        """Read chunks of prompts. What ends with its last token gets its first new one."""
        requests = [chunk.request for chunk in chunks]
        self._upload(requests)
        spans = [range(chunk.start, chunk.start + chunk.count) for chunk in chunks]
        ids = [token for chunk, span in zip(chunks, spans, strict=True)
               for token in chunk.request.tokens[span.start : span.stop]]  # fmt: skip
        slots = [request.slot for request in requests]
        batch = Batch.from_lists(ids, spans, self.block_tables, slots, self.cache.page_size)
        hidden = self.model.forward(batch, self.cache)
        ends, done = -1, []
        for chunk in chunks:
            ends += chunk.count
            if chunk.last:
                done.append((ends, chunk.request.slot, chunk.start + chunk.count - 1))
        if not done:
            return None
        columns = [x for column in zip(*done, strict=True) for x in column]
        last, rows, positions = to_device(columns, hidden.device).view(3, -1)
        ready = [chunk.request for chunk in chunks if chunk.last]
        tokens = self._choose(self.model.logits(hidden[last]), rows, positions, _mode(ready))
        return self._send(ready, tokens)

    @torch.no_grad()
    def decode(self, requests: Sequence[Request]) -> Flight:
        """One more token for each request.

        The longest come first: a kernel starts its rows in order, and the longest must not come last, alone.
        """
        requests = sorted(requests, key=lambda request: request.computed, reverse=True)
        self._upload(requests)
        mode, page_size = _mode(requests), self.cache.page_size
        size = next(n for n in self.sizes if n >= len(requests)) if self.cuda_graphs else len(requests)
        rows = np.empty((INPUTS, size), np.int32)
        rows[:] = self._padding
        slots, positions, places, lengths = rows[:, : len(requests)]
        slots[:] = [request.slot for request in requests]
        lengths[:] = [request.computed for request in requests]
        positions[:] = lengths - 1
        last = [request.sequence.pages[(request.computed - 1) // page_size] for request in requests]
        places[:] = np.array(last, np.int32) * page_size + positions % page_size
        if not self.cuda_graphs:
            inputs = to_device(rows, self.model.device, torch.int32)
            return self._send(requests, self._decode(inputs, mode, requests[0].computed))
        inputs, step = self._step(size, mode)
        inputs.copy_(torch.from_numpy(rows).pin_memory(), non_blocking=True)
        return self._send(requests, step.replay())

    @torch.no_grad()
    def warm_up(self, modes: Sequence[str] = ("greedy",)) -> None:
        """Compile kernels and record the decoding steps of all sizes now rather than when they are first needed.

        Attention is compiled for every size of its tile, with the keys in one piece and split, and the merge of the
        shares for every power of two of them.
        """
        for count in sorted({min(n, self.max_length) for n in WARM_UP_TOKENS}):
            batch = Batch.from_lists([0] * count, [range(count)], self.block_tables, [self.max_batch],
                                     self.cache.page_size)  # fmt: skip
            for splits in SHARES if count == 1 else SHARES[:2]:
                hidden = self.model.forward(replace(batch, splits=splits), self.cache)
        slots = to_device([self.max_batch], self.model.device)
        for mode in modes:
            self._choose(self.model.logits(hidden[-1:]), slots, slots * 0, mode)
            for size in reversed(self.sizes) if self.cuda_graphs else ():
                self._step(size, mode)
        if not self.cuda_graphs:
            self._decode(to_device(self._padding, self.model.device, torch.int32), modes[0], self.max_length)

    def _step(self, size: int, mode: str) -> tuple[Tensor, CapturedStep]:
        """The inputs [INPUTS, size] and the recorded step for them."""
        if (size, mode) not in self._captured:
            inputs = torch.from_numpy(self._padding).to(self.model.device).repeat(1, size)
            step = CapturedStep(lambda: self._decode(inputs, mode, self.max_length), self._pool)
            self._pool = step.graph.pool()
            self._captured[size, mode] = inputs, step
        return self._captured[size, mode]

    @torch.no_grad()
    def _decode(self, inputs: Tensor, mode: str, longest: int) -> Tensor:
        """inputs int32 [INPUTS, rows]: slots, positions of the newest tokens, their places in the cache, lengths."""
        slots, positions, places, lengths = inputs
        batch = Batch(
            self.newest[slots], positions, places, self.block_tables, slots, lengths, self._starts[: len(slots) + 1],
            most_queries=1, longest=longest, uniform=True,
        )  # fmt: skip
        return self._choose(self.model.logits(self.model.forward(batch, self.cache)), slots, positions, mode)

    def _choose(self, logits: Tensor, slots: Tensor, positions: Tensor, mode: str) -> Tensor:
        """The next token of each slot, int64; it becomes the slot's newest."""
        if mode == "greedy":
            return self.model.operations.greedy(logits, self.newest, slots)
        temperature, top_k, top_p, seed = self.sampling[slots].unbind(1)
        filters = (top_k.long(), top_p.float()) if mode == "filtered" else ()
        chances = probabilities(logits, temperature.float(), *filters)
        tokens = sample(chances, uniforms(seed.long(), positions.long()))
        self.newest.index_copy_(0, slots.long(), tokens)
        return tokens

    def _upload(self, requests: Sequence[Request]) -> None:
        """Bring the device's block tables up to date, and the sampling parameters of who has just come."""
        entries: list[tuple[int, int, int]] = []
        new = []
        for request in requests:
            pages, known = request.sequence.pages, request.uploaded
            if known == len(pages):
                continue
            if known == 0:
                new.append(request)
            slot = request.slot
            entries += [(slot, i, pages[i]) for i in range(known, len(pages)) if pages[i] != NO_PAGE]
            request.uploaded = len(pages)
        if entries:
            flat = [x for column in zip(*entries, strict=True) for x in column]
            slots, columns, pages = to_device(flat, self.model.device).view(3, -1)
            self.block_tables[slots, columns] = pages.int()
        if new:
            asked = [request.params for request in new]
            rows = [[p.temperature, p.top_k, p.top_p, p.seed] for p in asked]
            values = to_device(rows, self.model.device, torch.float64)
            self.sampling[to_device([request.slot for request in new], self.model.device)] = values

    def _send(self, requests: Sequence[Request], tokens: Tensor) -> Flight:
        """Start copying the tokens to the host."""
        tokens = tokens[: len(requests)]
        if tokens.device.type != "cuda":
            return Flight(requests, tokens)
        host = torch.empty(len(requests), dtype=torch.int64, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return Flight(requests, host, event)


def _mode(requests: Sequence[Request]) -> str:
    """The least work that serves all of them."""
    return MODES[max(MODES.index(request.params.mode) for request in requests)]
