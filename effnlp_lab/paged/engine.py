"""Continuous batching over a paged cache: requests come and go at every step (Kwon et al. 2023; Yu et al. 2022).

    engine = Engine(load_model("course-base"), load_tokenizer("course-base"))
    outputs = engine.generate(["def main(", "import "], SamplingParams(max_new_tokens=40))
    for token in engine.stream("class "): ...

Greedy output is what `transformers` generates, token for token, whatever is served beside it.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from effnlp_lab.errors import UsageError
from effnlp_lab.paged.blocks import BlockManager
from effnlp_lab.paged.model import PagedModel
from effnlp_lab.paged.requests import Output, Request, RequestError, State, check_length, check_params, check_prompt
from effnlp_lab.paged.runner import Flight, Runner
from effnlp_lab.paged.sampling import SamplingParams
from effnlp_lab.paged.scheduler import Plan, Scheduler
from effnlp_lab.paged.sizes import bytes_per_token_of, pages_for

OnToken = Callable[[int, int], None]
CPU_CACHE_BYTES = 64 << 20


@dataclass
class EngineStats:
    """Counts since the engine was made. `computed` prompt tokens went through the model, `cached` ones did not."""

    steps: int = 0
    computed: int = 0
    cached: int = 0
    generated: int = 0
    preemptions: int = 0
    evictions: int = 0


class Engine:
    """Serves a Llama, Mistral or Qwen2 model of `transformers`.

    page_size: tokens a page, a power of two from 16. pages: how many (None: what `memory_fraction` of the free device
    memory holds, at most what `max_batch` sequences of `max_length` need). max_batch: requests that run side by side.
    max_length: the most tokens of a sequence, prompt and output (None: the model's positions). chunk: the most prompt
    tokens that a step reads. window, sinks: keep only the newest `window` tokens and the first `sinks` of each
    sequence, with positions in the cache (Xiao et al. 2023): max_length may then exceed the model's positions.
    cuda_graphs and fused: None for yes on a CUDA device. lookahead: start each step before the tokens of the one before
    are read, so that the device never waits for the host.

    An engine is for one thread. Raises UsageError for a model or sizes that cannot be served.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any = None, *, page_size: int = 16, pages: int | None = None,
        max_batch: int | None = None, max_length: int | None = None, chunk: int = 2048, prefix_caching: bool = True,
        window: int | None = None, sinks: int = 0, cuda_graphs: bool | None = None, fused: bool | None = None,
        lookahead: bool = True, memory_fraction: float = 0.85,
    ) -> None:  # fmt: skip
        positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        max_length = (positions or 2048) if max_length is None else max_length
        _check_sizes(max_batch, chunk, max_length, positions, window)
        self.model = PagedModel(model, max_length=max_length, window=window, sinks=sinks, fused=fused)
        cuda = self.model.device.type == "cuda"
        max_batch = (256 if cuda else 32) if max_batch is None else max_batch
        if pages is None:
            pages = _pages_that_fit(self.model, page_size, max_batch, max_length, memory_fraction)
        self.tokenizer, self.max_length, self.lookahead = tokenizer, max_length, lookahead
        self.manager = BlockManager(pages, page_size, prefix_caching=prefix_caching)
        window = self.model.window
        if window is not None and pages < pages_for(window + sinks + chunk, page_size) + 2:
            chunk = max(1, (pages - 2) * page_size - window - sinks)
            if chunk < page_size:
                raise UsageError(f"{pages} pages of {page_size} tokens do not hold a window of {window}: give more.")
        self.scheduler = Scheduler(self.manager, max_batch=max_batch, chunk=chunk, window=window, sinks=sinks)
        self.runner = Runner(
            self.model, self.model.cache(pages + 1, page_size), max_batch=max_batch, max_length=max_length,
            cuda_graphs=cuda if cuda_graphs is None else cuda_graphs,
        )  # fmt: skip
        self._stops = _stop_tokens(model)
        self._flights: deque[Flight] = deque()
        self._live: dict[int, Request] = {}
        self._ids = itertools.count()
        self._stats = EngineStats()

    @property
    def stats(self) -> EngineStats:
        """Counts so far."""
        self._stats.preemptions, self._stats.evictions = self.scheduler.preemptions, self.manager.evictions
        return self._stats

    @property
    def unfinished(self) -> int:
        """Requests that are waiting or running."""
        return len(self._live)

    def warm_up(self, modes: Sequence[str] = ("greedy",)) -> None:
        """Compile and record everything now. modes: of "greedy", "sampled" and "filtered" (see SamplingParams)."""
        self.runner.warm_up(modes)

    def submit(self, prompt: Any, params: SamplingParams | None = None, *, on_token: OnToken | None = None) -> Request:
        """Queue a request. prompt: token ids, or a text. on_token(request id, token) is called for each new token.

        Raises RequestError, and queues nothing, for what cannot be served.
        """
        params = check_params(params)
        tokens = check_prompt(prompt, self.model.config.vocab_size, self.tokenizer)
        check_length(
            len(tokens), params.max_new_tokens, self.max_length, self.manager.pages, self.manager.page_size,
            self.scheduler.window is not None,
        )  # fmt: skip
        if on_token is not None and not callable(on_token):
            raise RequestError(f"on_token is a {type(on_token).__name__}: give a function of (request id, token).")
        stops = self._stops if params.stop_token_ids is None else frozenset(params.stop_token_ids)
        request = Request(next(self._ids), tokens, params, stops, on_token, submitted=time.perf_counter())
        request.prompt_length = len(tokens)
        self._live[request.id] = request
        self.scheduler.submit(request)
        return request

    def cancel(self, request: Request | int) -> bool:
        """End a request, waiting or running. Its tokens so far stay. False where it had ended already."""
        request = self._live.get(request) if isinstance(request, int) else request
        if request is None or request.finished:
            return False
        self._finish(request, "cancelled")
        return True

    def step(self) -> bool:
        """Start the next step and read the tokens of the one before. Returns whether anything is left to do."""
        plan = self.scheduler.schedule(settled=not self._flights)
        if not plan and self._flights:
            self._settle()
            plan = self.scheduler.schedule()
        earlier = len(self._flights)
        self._start(plan)
        for _ in range(earlier if self.lookahead else len(self._flights)):
            self._read(self._flights.popleft())
        return bool(self._live)

    def generate(
        self, prompts: Sequence[Any], params: SamplingParams | Sequence[SamplingParams] | None = None, *,
        on_token: OnToken | None = None, progress: bool = False,
    ) -> list[Output]:  # fmt: skip
        """Serve all prompts and return their outputs in the same order. params: one for all, or one for each.

        A prompt that cannot be served gets an output with reason "error" and the sentence; the others go on. If it is
        interrupted, its requests are cancelled.
        """
        if isinstance(prompts, str):
            raise UsageError("prompts is one text: give a list of prompts.")
        each = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise UsageError(f"{len(prompts)} prompts came with {len(each)} sampling parameters: give as many, or one.")
        requests = [self._submit_or_error(prompt, one, on_token) for prompt, one in zip(prompts, each, strict=True)]
        waited_for = [request for request in requests if isinstance(request, Request)]
        try:
            with _bar(len(waited_for), progress) as bar:
                while left := sum(not request.finished for request in waited_for):
                    self.step()
                    bar.update(len(waited_for) - left - bar.n)
                bar.update(len(waited_for) - bar.n)
        except BaseException:
            for request in waited_for:
                self.cancel(request)
            raise
        return [self.output(r) if isinstance(r, Request) else r for r in requests]

    def stream(self, prompt: Any, params: SamplingParams | None = None) -> Iterator[int]:
        """The tokens of one request as they come; other requests run along. Closing the iterator cancels it.

        Raises RequestError at once for what cannot be served.
        """
        return self._follow(self.submit(prompt, params))

    def output(self, request: Request) -> Output:
        """What has come out of a request so far."""
        tokens = request.output
        text = self.tokenizer.decode(tokens) if self.tokenizer is not None else None
        return Output(
            request.id, request.tokens[: request.prompt_length], tokens, request.reason or "unfinished", request.error,
            text, request.cached, request.preemptions, list(request.times),
        )  # fmt: skip

    def _submit_or_error(self, prompt: Any, params: Any, on_token: OnToken | None) -> Request | Output:
        try:
            return self.submit(prompt, params, on_token=on_token)
        except RequestError as error:
            return Output(None, [], [], "error", str(error))

    def _follow(self, request: Request) -> Iterator[int]:
        sent = request.prompt_length
        try:
            while True:
                while sent < len(request.tokens):
                    sent += 1
                    yield request.tokens[sent - 1]
                if request.finished:
                    break
                self.step()
        finally:
            self.cancel(request)
        if request.error:
            raise RequestError(request.error)

    def _start(self, plan: Plan) -> None:
        stats = self._stats
        stats.steps += bool(plan)
        # Decoding first: its rows of the block tables are those that were planned before prompts took what was left.
        if plan.decodes:
            self._flights.append(self.runner.decode(plan.decodes))
        if plan.chunks:
            stats.computed += sum(chunk.count for chunk in plan.chunks)
            stats.cached += sum(chunk.start for chunk in plan.chunks if chunk.request.uploaded == 0)
            flight = self.runner.read(plan.chunks)
            if flight is not None:
                self._flights.append(flight)

    def _settle(self) -> None:
        while self._flights:
            self._read(self._flights.popleft())

    def _read(self, flight: Flight) -> None:
        """Hand out the tokens of a flight. Requests that ended meanwhile are skipped: their token is one too many."""
        tokens, now = flight.tokens(), time.perf_counter()
        for request, token in zip(flight.requests, tokens, strict=True):
            if request.state is not State.DECODING:
                continue
            request.in_flight -= 1
            request.tokens.append(token)
            request.times.append(now - request.submitted)
            self._stats.generated += 1
            known = min(len(request.tokens), request.computed)
            if known % self.manager.page_size == 0:  # a page is full of tokens that are known
                request.sequence.commit(request.tokens[:known])
            if request.on_token is not None and not self._tell(request, token):
                continue
            if token in request.stops:
                self._finish(request, "stop")
            elif len(request.tokens) - request.prompt_length >= request.params.max_new_tokens:
                self._finish(request, "length")

    def _tell(self, request: Request, token: int) -> bool:
        """Call the request's function; whether the request goes on. What it raises ends this request alone."""
        try:
            request.on_token(request.id, token)
        except Exception as error:
            request.error = f"on_token raised {type(error).__name__}: {error}"
            self._finish(request, "error")
        return not request.finished

    def _finish(self, request: Request, reason: str) -> None:
        if not request.finished:
            self.scheduler.finish(request, reason)
            self._live.pop(request.id, None)


def _check_sizes(max_batch: int | None, chunk: int, max_length: int, positions: int | None, window: int | None) -> None:
    for name, value in (("max_batch", max_batch), ("chunk", chunk), ("max_length", max_length)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UsageError(f"{name} is {value!r}: give a whole number, 1 or more.")
    if positions and max_length > positions and window is None:
        raise UsageError(
            f"max_length is {max_length} and the model knows {positions} positions: lower it, or give a window and "
            "sinks, with which a sequence may grow on."
        )


def _pages_that_fit(model: PagedModel, page_size: int, max_batch: int, max_length: int, fraction: float) -> int:
    """As many pages as the memory holds, but no more than the requests can use; for one full sequence at least."""
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
        free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
        room = int(free * fraction)
    else:
        room = CPU_CACHE_BYTES
    each = page_size * bytes_per_token_of(model.config, model.dtype.itemsize)
    one = pages_for(max_length, page_size)
    return max(min(room // each, max_batch * one), one if model.device.type == "cpu" else 1)


def _stop_tokens(model: nn.Module) -> frozenset[int]:
    """The end-of-sequence tokens that `transformers` would stop at."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = model.config.eos_token_id if found is None else found
    return frozenset(() if found is None else [found] if isinstance(found, int) else found)


def _bar(total: int, progress: bool):
    from tqdm.auto import tqdm

    return tqdm(total=total, disable=not progress, unit="request", leave=False)
