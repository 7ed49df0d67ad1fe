"""What runs in the next step: admit, read prompts in chunks, decode, preempt. Knows nothing of tensors.

Iteration-level scheduling (Yu et al. 2022, Orca): a request joins and leaves the batch at any step. Chunked prefill
(Agrawal et al. 2023, Sarathi): a step reads at most `chunk` prompt tokens, so that a long prompt does not hold up the
others. First come, first served; where pages run out the latest arrival is preempted, gives back its pages and is
computed again (Kwon et al. 2023, section 4.5, recomputation).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from effnlp_lab.paged.blocks import BlockManager, OutOfPages
from effnlp_lab.paged.requests import Request, State
from effnlp_lab.paged.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """`count` tokens of a request from `start`, to be read in this step; the last chunk gives its first new token."""

    request: Request
    start: int
    count: int
    last: bool


@dataclass
class Plan:
    """One step: chunks of prompts to read, and requests that decode one token. They are started in this order."""

    chunks: list[Chunk] = field(default_factory=list)
    decodes: list[Request] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.chunks or self.decodes)


class Scheduler:
    """Waiting and active requests, at most `max_batch` active, each in a slot of its own.

    `window` and `sinks`: only the last `window` tokens and the first `sinks` are ever seen again, so that pages between
    them are given back as a request grows.
    """

    def __init__(
        self, manager: BlockManager, *, max_batch: int, chunk: int, window: int | None = None, sinks: int = 0
    ) -> None:
        self.manager, self.max_batch, self.chunk = manager, max_batch, chunk
        self.window, self.sinks = window, sinks
        self.waiting: deque[Request] = deque()
        self.active: list[Request] = []  # in order of arrival
        self.preemptions = 0
        self._slots = list(range(max_batch))[::-1]

    def submit(self, request: Request) -> None:
        """Queue a request behind all others."""
        self.waiting.append(request)

    def schedule(self, *, settled: bool = True) -> Plan | None:
        """The next step; the requests in it are brought forward as if it had been started.

        Tokens may be in flight. A request can only be preempted when all of its tokens are known: where that has become
        necessary and not everything is `settled`, nothing is planned and None returned. Read all tokens, then call
        again with settled=True.
        """
        decodes = []
        self._roll()
        for request in list(self.active):
            if request.state is not State.DECODING or request.exhausted:
                continue
            while not self._grow(request):
                if not settled:
                    return None
                self.preempt(self.active[-1])
                if request.state is State.WAITING:
                    break
            else:
                decodes.append(request)
        for request in decodes:
            request.computed += 1
            request.in_flight += 1
        plan = Plan(self._chunks(), decodes)
        if not plan and settled and self.active:  # prompts under a window wait for one another's pages
            self.preempt(self.active[-1])
            return self.schedule()
        return plan

    def preempt(self, request: Request) -> None:
        """Take back a request's pages; it waits at the front of the queue, to be read again with what came out."""
        self._leave(request)
        request.state, request.computed, request.uploaded = State.WAITING, 0, 0
        request.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(request)

    def finish(self, request: Request, reason: str) -> None:
        """Take a request out, wherever it is, and give back what it holds."""
        if request.state is State.WAITING:
            self.waiting.remove(request)
        else:
            self._leave(request)
        request.state, request.reason = State.FINISHED, reason

    def _leave(self, request: Request) -> None:
        self.active.remove(request)
        self._slots.append(request.slot)
        request.sequence.free()
        request.sequence, request.slot = None, -1

    def _grow(self, request: Request) -> bool:
        """Room for the newest token of a request, which may be there already. False where no page is free.

        A page that is shared is full, so that the sequence never asks for a copy.
        """
        if request.sequence.length > request.next_position:
            return True
        try:
            request.sequence.append(1)
        except OutOfPages:
            return False
        return True

    def _chunks(self) -> list[Chunk]:
        """Prompts that are being read go on; then the waiting are admitted, in order, while there is room."""
        chunks, budget = [], self.chunk
        for request in list(self.active):
            if request.state is State.READING and budget:
                chunk = self._next_chunk(request, budget)
                if chunk is None:
                    break
                chunks.append(chunk)
                budget -= chunk.count
        while budget and self.waiting and len(self.active) < self.max_batch and self._admit(self.waiting[0]):
            request = self.waiting.popleft()
            chunk = self._next_chunk(request, budget)
            chunks.append(chunk)
            budget -= chunk.count
        return chunks

    def _admit(self, request: Request) -> bool:
        """Give a request its slot and the pages of all its tokens, those that are cached included.

        A page for each request that decodes is left free, so that what is admitted is not preempted at once. With a
        window pages are taken chunk by chunk, and this only looks whether the first is there.
        """
        sequence = Sequence(self.manager)
        cached = sequence.match(request.tokens[:-1]) if self.manager.prefix_caching else 0
        count = len(request.tokens) - cached
        if self.window is not None:
            count = min(count, self.chunk)
        needed = sequence.pages_to_append(count) - len(sequence.pages)
        reserve = sum(other.state is State.DECODING for other in self.active)
        if needed + reserve > self.manager.free_pages:
            if self.active or needed > self.manager.free_pages:
                sequence.free()
                return False
        if self.window is None:
            sequence.append(count)
        request.sequence, request.computed, request.uploaded = sequence, cached, 0
        request.cached = cached if not request.preemptions else request.cached
        request.slot, request.state = self._slots.pop(), State.READING
        self.active.append(request)
        return True

    def _next_chunk(self, request: Request, budget: int) -> Chunk | None:
        """The next tokens of a prompt; None where a window needs pages that are not there yet."""
        start = request.computed
        count = min(budget, len(request.tokens) - start)
        missing = start + count - request.sequence.length
        if missing > 0:
            try:
                request.sequence.append(missing)
            except OutOfPages:
                return None
        request.computed += count
        last = request.computed == len(request.tokens)
        if last:
            request.state = State.DECODING
            request.in_flight += 1
        # What this step writes may be shared by what comes later in the same step: keys are written before any is read.
        request.sequence.commit(request.tokens[: request.computed])
        return Chunk(request, start, count, last)

    def _roll(self) -> None:
        """Give back pages that no query from now on sees. What the steps before this one read, they have read."""
        for request in self.active if self.window is not None else ():
            request.sequence.roll(self.window, self.sinks, request.computed)
