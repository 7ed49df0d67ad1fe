"""The paged cache: its decoding kernel beside device copy, flash-attn and SDPA; its engine beside transformers.

Decoding reads the whole cache once: bytes a second beside a plain copy. Contestants go through caches that are together
larger than L2. The engine serves requests of mixed length on a model of Llama-1B's shape with random weights, beside
`transformers`' own continuous batching and padded `generate`. `generate_batch` has one number of new tokens for all
requests, as `generate` has; its manager, taken in hand, has one for each: that is the peer. Figures are seconds until
all requests have what they asked for, and notes give tokens a second.

Sizes by environment: EFFNLP_PAGED_PARTS (decode,engine,single), EFFNLP_PAGED_BATCHES, EFFNLP_PAGED_LENGTHS,
EFFNLP_PAGED_REQUESTS, EFFNLP_PAGED_SHORTEST, EFFNLP_PAGED_LONGEST, EFFNLP_PAGED_REPEATS (padded generate runs once),
EFFNLP_PAGED_CHUNK (prompt tokens a step of ours), EFFNLP_PAGED_PADDED (requests a padded batch holds, 0 to leave padded
generate out).
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from effnlp_lab import paged
from effnlp_lab.device import Device, ceilings
from effnlp_lab.notebook.bench import NO_CUDNN_NOTE, Comparison, compare, without_cudnn_attention

NEEDS = "cuda"
OURS = "effnlp_lab paged"
MANAGER = "generate_batch's manager"
HEADS, HEAD_DIM, PAGE, THEIR_PAGE = 32, 128, 16, 256
ROTATED = 256 << 20
"""Bytes of cache that a contestant goes through: five times the L2 cache of an H100."""
LARGEST = 20 << 30
"""Bytes of the largest cache; contestants with a layout of their own need as much again."""
SDPA_LARGEST = 2 << 30
RECORDED = {(1, 1024): 0.25, (1, 32768): 1.96, (16, 8192): 2.70, (128, 4096): 2.98}
"""TB/s of a FlashAttention 3 build on an H100, at 32 heads on 8 and pages of 16: (batch, length)."""


def run(device: Device, folder: Path) -> Iterator[Comparison]:
    """Decoding, then the engine, then one request alone (small sizes where EFFNLP_FAST asks for them)."""
    small = os.environ.get("EFFNLP_FAST", "").strip().lower() in ("1", "true")
    parts = os.environ.get("EFFNLP_PAGED_PARTS", "decode,engine,single").split(",")
    if "decode" in parts:
        for kv_heads in (8, 4):
            for batch in _numbers("EFFNLP_PAGED_BATCHES", (1, 4, 16, 64, 128) if not small else (1, 16)):
                for length in _numbers("EFFNLP_PAGED_LENGTHS", (1024, 4096, 8192, 32768) if not small else (1024,)):
                    if cache_bytes(batch, kv_heads, length) <= LARGEST:
                        yield decoding(batch, kv_heads, length, device)
                        _release()
    if "engine" in parts:
        yield throughput(device, small)
        _release()
    if "single" in parts:
        yield single(device, small)


def cache_bytes(batch: int, kv_heads: int, length: int) -> int:
    """Of one layer in bfloat16."""
    return batch * length * paged.cache_bytes_per_token(1, kv_heads, HEAD_DIM, 2)


# The kernel.


def decoding(batch: int, kv_heads: int, length: int, device: Device) -> Comparison:
    """One new token for each of `batch` sequences of `length`, pages in random order."""
    torch.manual_seed(batch + length)
    size = cache_bytes(batch, kv_heads, length)
    copies, columns = max(1, -(-ROTATED // size)), length // PAGE
    pages = torch.randn(2, copies * batch * columns, kv_heads, PAGE, HEAD_DIM, device="cuda", dtype=device.dtype)
    order = torch.randperm(pages.shape[1], device="cuda", dtype=torch.int32).view(copies, batch, columns)
    q = torch.randn(batch, HEADS, HEAD_DIM, device="cuda", dtype=device.dtype)
    lengths = torch.full((batch,), length, dtype=torch.int32, device="cuda")
    rows, starts = (torch.arange(batch + n, dtype=torch.int32, device="cuda") for n in (0, 1))

    def ours(copy: int) -> Tensor:
        return paged.paged_attention(
            q, *pages, order[copy], lengths, rows=rows, starts=starts, most_queries=1, longest=length
        )

    calls: dict[str, list[Callable[[], Tensor]]] = {OURS: [lambda c=c: ours(c) for c in range(copies)]}
    missing = {}
    theirs = _flash_attn(pages, order, q, lengths)
    if theirs is None:
        missing["flash-attn"] = "not installed"
    else:
        calls["flash-attn"] = theirs
    if size <= SDPA_LARGEST:
        calls["SDPA"] = _sdpa(pages, order, q)
    usable: dict[str, Callable] = {}
    results = {}
    for name, turns in calls.items():
        try:
            results[name] = turns[0]().reshape(batch, HEADS, HEAD_DIM)
            usable[name] = _in_turns(turns)
        except RuntimeError as error:
            missing[name] = str(error).splitlines()[0]
    comparison = compare(
        f"Paged decoding: batch {batch}, length {length}, {HEADS} heads on {kv_heads}, page {PAGE}, cache "
        f"{size / 2**20:.0f} MiB", usable, ours=OURS, peer="flash-attn", unit="TB/s", work=size, device=device,
        limit=ceilings(device).copy_bytes_per_second / 1e12, missing=missing, repeats=21, warmup=3,
        queued=True, in_a_row=8 if size < ROTATED else 1,
    )  # fmt: skip
    comparison.checks.append(_verify(results, pages, order, lengths))
    if "flash-attn" in usable:
        comparison.notes.append(f"flash-attn's pages hold {THEIR_PAGE} tokens, the fewest that it takes.")
    if "SDPA" in usable:
        comparison.notes.append("SDPA reads a contiguous cache.")
    if kv_heads == 8 and (batch, length) in RECORDED:
        comparison.notes.append(f"Recorded for a FlashAttention 3 build, pages of 16: {RECORDED[batch, length]} TB/s.")
    return comparison


def _in_turns(calls: list[Callable[[], Tensor]]) -> Callable[[], Tensor]:
    endless = itertools.cycle(calls)
    return lambda: next(endless)()


def _flash_attn(pages: Tensor, order: Tensor, q: Tensor, lengths: Tensor) -> list[Callable[[], Tensor]] | None:
    """flash-attn on the same tokens, in pages of its own, which lie in random order too."""
    if not importlib.util.find_spec("flash_attn"):
        return None
    from flash_attn import flash_attn_with_kvcache

    if order.shape[2] * PAGE % THEIR_PAGE:
        return None
    shuffle = torch.randperm(order.numel() * PAGE // THEIR_PAGE, device="cuda")
    both = []
    for x in pages:
        blocks = x[order.flatten().long()].transpose(1, 2).reshape(-1, THEIR_PAGE, x.shape[1], HEAD_DIM)
        both.append(blocks[shuffle])
        del blocks
    tables = shuffle.argsort().int().view(*order.shape[:2], -1)
    return [
        lambda table=table: flash_attn_with_kvcache(
            q[:, None], *both, cache_seqlens=lengths, block_table=table, causal=True
        )
        for table in tables
    ]


def _sdpa(pages: Tensor, order: Tensor, q: Tensor) -> list[Callable[[], Tensor]]:
    """PyTorch's attention on contiguous copies."""
    calls = []
    for table in order:
        k, v = (x[table.long()].transpose(1, 2).flatten(2, 3) for x in pages)
        calls.append(lambda k=k, v=v: F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True))
    return calls


def _verify(results: dict[str, Tensor], pages: Tensor, order: Tensor, lengths: Tensor) -> str:
    """All results within 1% of ours, by norm. Raises AssertionError otherwise."""
    ours = results[OURS].float()
    assert ours.isfinite().all()
    worst = max(((x.float() - ours).norm() / ours.norm()).item() for x in results.values())
    if not worst < 0.01:
        raise AssertionError(f"results differ by {worst:.2%}")
    return f"{', '.join(results)} within {worst:.1e} of one another by norm"


# The engine.


def throughput(device: Device, small: bool) -> Comparison:
    """All requests submitted at once; seconds until the last has its last token."""
    model = llama_1b(small)
    rounds, new = workload(model.config.vocab_size, small, 1 + _number("EFFNLP_PAGED_REPEATS", 3))
    warm, prompts = rounds[0][:8], rounds[1]
    contestants = {OURS: _Ours(model, prompts, new), MANAGER: _Manager(model, prompts, new),
                   "generate_batch": _GenerateBatch(model, prompts, new)}  # fmt: skip
    size = _number("EFFNLP_PAGED_PADDED", len(prompts))
    missing = {} if size else {"padded generate": "left out"}
    if size:
        contestants["padded generate"] = _Padded(model, prompts, new, size)
    seconds: dict[str, list[float]] = {}
    notes = [f"{sum(map(len, prompts)):,} prompt tokens and {sum(new):,} new ones; each contestant warmed up first. "
             "The prompts of every repetition are new, so that no prefix cache knows them.", NO_CUDNN_NOTE]  # fmt: skip
    for name, contestant in contestants.items():
        try:
            with contestant as serve:
                times = []
                serve(warm, [4] * len(warm))
                for prompts in rounds[1 : 2 if name == "padded generate" else None]:
                    torch.cuda.synchronize()
                    begin = time.perf_counter()
                    serve(prompts, new)
                    times.append(time.perf_counter() - begin)
        except Exception as error:  # a peer of another version, or out of memory: said in the table
            if name == OURS:
                raise
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            seconds[name] = times
            notes.append(f"{name}: {sum(new) / statistics.median(times):,.0f} new tokens a second.")
            if name == "generate_batch":
                times_ours = statistics.median(times) / statistics.median(seconds[OURS])
                notes.append(f"generate_batch makes {max(new):,} tokens for every request; ours is {times_ours:.2f} "
                             "times as fast beside it.")  # fmt: skip
        _release()
    return Comparison(
        f"{len(prompts)} requests, {min(map(len, prompts))} to {max(map(len, prompts))} tokens in, {min(new)} to "
        f"{max(new)} out, Llama-1B's shape, {str(model.dtype).removeprefix('torch.')}", seconds, OURS, MANAGER,
        missing=missing, notes=notes,
    )  # fmt: skip


def llama_1b(small: bool):
    """Random weights, no end of sequence: every request gets all the tokens that it asks for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=2 if small else 16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, max_position_embeddings=4096,
        tie_word_embeddings=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def workload(vocabulary: int, small: bool, rounds: int) -> tuple[list[list[list[int]]], list[int]]:
    """The prompts of each round, of the same lengths and other tokens; and how many new tokens each is to get."""
    dice = random.Random(0)
    shortest, longest = _number("EFFNLP_PAGED_SHORTEST", 100), _number("EFFNLP_PAGED_LONGEST", 128 if small else 1024)
    count = _number("EFFNLP_PAGED_REQUESTS", 16 if small else 256)
    lengths, new = ([dice.randint(shortest, longest) for _ in range(count)] for _ in range(2))
    return [[dice.choices(range(vocabulary), k=length) for length in lengths] for _ in range(rounds)], new


class _Contestant:
    """Entering it gives the function that serves prompts, each with its number of new tokens."""

    def __init__(self, model, prompts, new) -> None:
        self.model, self.prompts, self.new = model, prompts, new

    def __exit__(self, *error) -> None:
        self.__dict__.clear()


class _Ours(_Contestant):
    def __enter__(self):
        longest = max(map(len, self.prompts)) + max(self.new)
        self.engine = paged.Engine(
            self.model,
            max_batch=min(256, len(self.prompts)),
            max_length=longest,
            chunk=_number("EFFNLP_PAGED_CHUNK", 16384),
        )
        self.engine.warm_up()
        return self.serve

    def serve(self, prompts, new) -> None:
        asked = [paged.SamplingParams(max_new_tokens=n, stop_token_ids=()) for n in new]
        outputs = self.engine.generate(prompts, asked)
        assert [len(output.tokens) for output in outputs] == new


class _ContinuousBatching(_Contestant):
    """`transformers`' continuous batching; it leaves the model with another attention."""

    def options(self) -> dict:
        from transformers import GenerationConfig

        config = GenerationConfig(max_new_tokens=max(self.new), do_sample=False, eos_token_id=-1, pad_token_id=0)
        return {"generation_config": config}

    def __exit__(self, *error) -> None:
        self.model.set_attn_implementation("sdpa")
        super().__exit__(*error)


class _GenerateBatch(_ContinuousBatching):
    """The function. Its manager is kept from call to call, so that its graphs are recorded before the clock starts."""

    def __enter__(self):
        self.serve([prompt[::-1] for prompt in self.prompts], self.new)
        return lambda prompts, new: None if len(prompts) < len(self.prompts) else self.serve(prompts, new)

    def serve(self, prompts, new) -> None:
        outputs = self.model.generate_batch(prompts, persistent_manager=True, **self.options())
        assert all(len(o.generated_tokens) >= n for o, n in zip(outputs.values(), new, strict=True))

    def __exit__(self, *error) -> None:
        self.model.destroy_cached_continuous_batching_manager()
        super().__exit__(*error)


class _Manager(_ContinuousBatching):
    """What is behind the function, with each request's own number of new tokens."""

    def __enter__(self):
        options = self.options()
        if hints := _workload_hints(self.prompts, self.new):
            options["workload_hints"] = hints
        self.context = self.model.continuous_batching_context_manager(**options)
        self.manager = self.context.__enter__()
        return self.serve

    def serve(self, prompts, new) -> None:
        ids = {
            self.manager.add_request(p, max_new_tokens=n, eos_token_id=-1): n for p, n in zip(prompts, new, strict=True)
        }
        stop = time.monotonic() + 600
        while ids:
            result = self.manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                assert len(result.generated_tokens) == ids.pop(result.request_id), result.error
            assert result is not None or self.manager.is_running() and time.monotonic() < stop, "it stopped"

    def __exit__(self, *error) -> None:
        self.context.__exit__(*error)
        super().__exit__(*error)


def _workload_hints(prompts, new):
    try:
        from transformers.generation.continuous_batching.utils import WorkloadHints
    except ImportError:
        return None
    return WorkloadHints(
        max_prompt_length=max(map(len, prompts)), max_generated_length=max(new), num_requests=len(prompts)
    )


class _Padded(_Contestant):
    def __init__(self, model, prompts, new, size: int) -> None:
        super().__init__(model, prompts, new)
        self.size = size

    def __enter__(self):
        return self.serve

    def serve(self, prompts, new) -> None:
        for i in range(0, len(prompts), self.size):
            self._batch(prompts[i : i + self.size], new[i : i + self.size])

    def _batch(self, prompts, new) -> None:
        """All padded to the longest prompt, all generating until the longest is done."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device="cuda")
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device="cuda")
        with without_cudnn_attention():
            out = self.model.generate(ids, attention_mask=mask, max_new_tokens=max(new), do_sample=False)
        assert out.shape[1] == longest + max(new)


def single(device: Device, small: bool) -> Comparison:
    """One request alone: what a step costs when nothing is beside it."""
    model, new = llama_1b(small), 32 if small else 128
    prompt = list(range(1, 129))
    engine = paged.Engine(model, max_batch=1, max_length=512, prefix_caching=False)
    engine.warm_up()
    asked = paged.SamplingParams(max_new_tokens=new, stop_token_ids=())
    ids = torch.tensor([prompt], device="cuda")

    def generate() -> Tensor:
        with without_cudnn_attention():
            return model.generate(ids, max_new_tokens=new, do_sample=False)

    made = compare(
        f"One request of {len(prompt)} tokens, {new} new, Llama-1B's shape",
        {OURS: lambda: engine.generate([prompt], asked), "generate": generate},
        ours=OURS, peer="generate", device=device, repeats=3, warmup=1,
    )  # fmt: skip
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    floor = weights / ceilings(device).copy_bytes_per_second
    made.notes.append(NO_CUDNN_NOTE)
    made.notes.append(f"A token costs ours {made.median(OURS) / new * 1e3:.2f} ms; reading the weights takes "
                      f"{floor * 1e3:.2f} ms.")  # fmt: skip
    return made


def _number(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def _numbers(name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    given = os.environ.get(name)
    return tuple(map(int, given.split(","))) if given else default


def _release() -> None:
    gc.collect()
    torch.cuda.empty_cache()
