"""Speculative decoding of course-base beside transformers' assisted generation with the same two models, and beside
decoding with the target alone; then the table of Leviathan et al. 2023: acceptance, gamma, speed, and what theorem 3.8
predicts from the measured acceptance rate and cost ratio.

One request at a time, prompts from held-out modules of Python's library, always the same number of new tokens. Ours
run whole steps as CUDA graphs, with and without a drafter alike: on pages with the paged room's fused operations, or
on a static cache with transformers' own, many small kernels, of which a pass over a few tokens costs more than one
over a single token.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from effnlp_lab import speculative as room
from effnlp_lab.course.models import load_model, load_tokenizer
from effnlp_lab.course.text import load_text
from effnlp_lab.device import Device
from effnlp_lab.notebook.bench import NO_CUDNN_NOTE, Comparison, compare, without_cudnn_attention

NEEDS = "cuda"
PLAIN, ASSISTED, GENERATE = "target alone (ours)", "transformers assisted", "transformers generate"
PROMPTS, PROMPT, NEW = 4, 128, 128
BESIDE = 2
"""Prompts of the runs beside transformers, whose tokens take thirty times as long."""
CACHES = {"paged": room.PagedCachedModel, "static": room.StaticCachedModel}
TABLES = {"paged": ((0.0, 0.5, 1.0, 1.5), (1, 2, 4)), "static": ((0.0, 1.0), (2, 4))}
"""Temperatures and gammas for each kind of cache."""
CLOSE = 0.15


def run(device: Device, folder: Path) -> Iterator[Comparison]:
    """The tables, then greedy and sampled beside transformers (small sizes where EFFNLP_FAST asks for them)."""
    small = os.environ.get("EFFNLP_FAST", "").strip().lower() in ("1", "true")
    target, draft = (load_model(name, device=device) for name in ("course-base", "course-draft"))
    for model in (target, draft):
        model.generation_config.eos_token_id = None  # every contestant makes the same number of tokens
    texts, new, best = prompts(2 if small else PROMPTS), 32 if small else NEW, {}
    for name, kind in CACHES.items():
        temperatures, gammas = TABLES["static" if small else name]
        best[name], table = speed_table(name, kind, target, draft, texts, new, temperatures, gammas, device)
        yield table
    for temperature in (0.0, 1.0):
        yield beside(target, draft, texts[:BESIDE], new, temperature, best["paged"][temperature], device)


def prompts(count: int) -> list[Tensor]:
    """Beginnings of held-out modules, PROMPT tokens each."""
    tokenizer, found = load_tokenizer(), []
    for text in load_text("course-heldout").texts():
        ids = tokenizer(text[:4000])["input_ids"]
        if len(ids) >= PROMPT:
            found.append(torch.tensor(ids[:PROMPT]))
        if len(found) == count:
            return found
    raise AssertionError("too little held-out text")


def decoders(kind: Callable, target, draft, temperature: float, gamma: int) -> dict[str, room.SpeculativeDecoder]:
    """Ours, with every way to draft; each has caches of its own."""
    sampling = room.Sampling(temperature)
    drafters = {PLAIN: None, "draft model": room.DraftModel(kind(draft)), "prompt lookup": room.PromptLookup(),
                "early exit, 2 layers": room.early_exit_draft(target, 2, kind)}  # fmt: skip
    return {name: room.SpeculativeDecoder(kind(target), drafter, gamma=gamma, sampling=sampling, ends=())
            for name, drafter in drafters.items()}  # fmt: skip


def all_of(decoder: room.SpeculativeDecoder, texts: list[Tensor], new: int) -> Callable[[], list[Tensor]]:
    return lambda: [decoder.generate([text], new, seed=index).new[0] for index, text in enumerate(texts)]


def theirs(target, draft, texts: list[Tensor], new: int, temperature: float) -> dict[str, Callable]:
    """transformers' own, with its defaults for the number of drafted tokens."""
    how = {"do_sample": temperature > 0, "max_new_tokens": new, "pad_token_id": 0}
    if temperature:
        how |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}

    def each(**more):
        def work():
            torch.manual_seed(0)
            found = []
            for text in texts:
                ids = text[None].to(target.device)
                with without_cudnn_attention():
                    out = target.generate(ids, attention_mask=torch.ones_like(ids), **how, **more)
                found.append(out[0, len(text) :].cpu())
            return found

        return work

    return {GENERATE: each(), ASSISTED: each(assistant_model=draft)}


def beside(target, draft, texts: list[Tensor], new: int, temperature: float, gamma: int, device: Device) -> Comparison:
    """Ours, on a paged cache and the draft model on a static one too, and transformers' in turns."""
    own = decoders(CACHES["paged"], target, draft, temperature, gamma)
    own["draft model, static cache"] = decoders(CACHES["static"], target, draft, temperature, gamma)["draft model"]
    calls = {who: all_of(decoder, texts, new) for who, decoder in own.items()}
    calls |= theirs(target, draft, texts, new, temperature)
    made = {who: call() for who, call in calls.items()}
    counts = {who: {len(x) for x in each} for who, each in made.items()}
    if any(count != {new} for count in counts.values()):
        raise AssertionError(f"not all made {new} tokens: {counts}")
    result = compare(
        f"course-base, temperature {temperature:g}, gamma {gamma}: {len(texts)} requests one by one, {PROMPT} tokens "
        f"in, {new} out",
        calls, ours="draft model", peer=ASSISTED, device=device, repeats=3, warmup=0,
    )  # fmt: skip
    tokens = len(texts) * new
    result.notes.append(NO_CUDNN_NOTE)
    result.notes += [f"{who}: {tokens / result.median(who):,.0f} tokens/s" for who in calls]
    speeds = {who: result.median(PLAIN) / result.median(who) for who in own if who != PLAIN}
    said = ", ".join(f"{who} {value:.2f}x" for who, value in speeds.items())
    result.notes.append(f"Over the target alone, prompts' passes included: {said}.")
    if temperature == 0:
        same = [torch.equal(a, b) for a, b in zip(made[GENERATE], made["draft model"], strict=True)]
        result.notes.append(
            f"{sum(same)} of {len(same)} greedy texts are transformers' to the last token, in {device.dtype} (passes "
            "of different lengths round differently; in float32 all are, as tests say)."
        )
    return result


def speed_table(name: str, kind: Callable, target, draft, texts: list[Tensor], new: int, temperatures, gammas,
                device: Device) -> tuple[dict[float, int], Comparison]:  # fmt: skip
    """Measured and predicted speed-ups by temperature, drafting method and gamma; and the best gamma of the model."""
    lines, best, seconds, off = [], {}, {}, []
    for temperature in temperatures:
        speeds, base = {}, 0.0
        for gamma in gammas:
            own = decoders(kind, target, draft, temperature, gamma)
            plain = own.pop(PLAIN)
            base = base or step_seconds(plain, texts, new)[0]
            seconds[f"{PLAIN}, temperature {temperature:g}"] = [base]
            for method, decoder in own.items():
                each, alpha, per_step = step_seconds(decoder, texts, new)
                c = decoder.seconds_of_drafts() / gamma / base
                measured, predicted = base / each, room.speedup(alpha, gamma, c)
                counted = per_step / (gamma * c + 1)
                lines.append(
                    f"{method}, temperature {temperature:g}, gamma {gamma}: acceptance {alpha:.3f}, {per_step:.2f} "
                    f"tokens a step, c {c:.3f}, speed-up {measured:.2f}, predicted {predicted:.2f} ({counted:.2f} from "
                    "the tokens counted)"
                )
                seconds[f"{method}, temperature {temperature:g}, gamma {gamma}"] = [each]
                if method == "draft model":
                    speeds[gamma] = measured
                    off.append((measured / predicted, measured / counted, temperature, gamma))
        best[temperature] = max(speeds, key=speeds.get)
    first = temperatures[0]
    made = Comparison(
        f"Seconds a token after the prompt, course-base, {name} cache", seconds,
        ours=f"draft model, temperature {first:g}, gamma {best[first]}", peer=f"{PLAIN}, temperature {first:g}",
    )  # fmt: skip
    made.notes = lines
    within = sum(abs(ratio - 1) <= CLOSE for ratio, *_ in off)
    worst = max(off, key=lambda one: abs(one[0] - 1))
    made.notes.append(
        f"Draft model: {within} of {len(off)} speed-ups are within {CLOSE:.0%} of theorem 3.8; the furthest is "
        f"{worst[0]:.2f} times it, {worst[1]:.2f} times what the counted tokens give (temperature {worst[2]:g}, gamma "
        f"{worst[3]})."
    )
    return best, made


def step_seconds(decoder: room.SpeculativeDecoder, texts: list[Tensor], new: int) -> tuple[float, float, float]:
    """Seconds a token without the prompt's pass, acceptance rate, tokens a step: the median of three rounds."""
    rounds = []
    for number in range(4):  # the first makes the graphs
        made = [decoder.generate([text], new, seed=index).statistics for index, text in enumerate(texts)]
        tokens, steps = sum(x.tokens for x in made), sum(x.steps for x in made)
        tested, accepted = sum(x.tested for x in made), sum(x.accepted for x in made)
        if number:
            rounds.append(sum(x.seconds for x in made) / tokens)
    return statistics.median(rounds), accepted / max(tested, 1), tokens / steps
