"""Speculative decoding with CUDA graphs: beside transformers, beside itself without graphs, beside the exact
distribution, and its time beside assisted generation."""

from __future__ import annotations

import importlib.util
import itertools
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM

from effnlp_lab import speculative as room
from effnlp_lab.course.models import load_model
from effnlp_lab.device import resolve
from effnlp_lab.notebook.bench import timed

ROOT = Path(__file__).parents[2]
FALSE_ALARM, NEW = 1e-6, 3
CACHED = {"static": room.StaticCachedModel, "paged": room.PagedCachedModel}


def benchmark():
    """benchmarks/speculative.py."""
    spec = importlib.util.spec_from_file_location("benchmark_speculative", ROOT / "benchmarks" / "speculative.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def course():
    return [load_model(name, device="cuda", dtype=torch.float32) for name in ("course-base", "course-draft")]


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    found = [torch.randint(5, 4000, (n,), generator=generator) for n in (1, 9, 30, 200)]
    return [*found, found[2].repeat(2)]


def drafter(name, course, kind):
    made = {"none": lambda: None, "model": lambda: room.DraftModel(kind(course[1])), "lookup": room.PromptLookup,
            "early exit": lambda: room.early_exit_draft(course[0], 4, kind)}  # fmt: skip
    return made[name]()


@pytest.mark.parametrize("cached", CACHED)
@pytest.mark.parametrize("name", ["none", "model", "lookup", "early exit"])
def test_greedy_is_transformers_generate(course, prompts, name, cached):
    """In float32, where passes of different lengths choose the same tokens; graphs of every gamma that is met."""
    kind = CACHED[cached]
    gamma = room.AdaptiveGamma(0.1, most=4, start=3) if name == "model" else 3
    decoder = room.SpeculativeDecoder(kind(course[0]), drafter(name, course, kind), gamma=gamma)
    assert decoder.graphs
    for _ in range(2):
        made = decoder.generate(prompts, 48)
        for text, ours in zip(prompts, made.sequences, strict=True):
            ids = text[None].cuda()
            theirs = course[0].generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=48)
            assert torch.equal(ours, theirs[0].cpu())
    assert decoder._graphs and (name == "none" or made.statistics.tokens_per_step > 1)


def test_greedy_trees(course, prompts):
    made = room.TreeDecoder(*course, (3, 2, 1)).generate(prompts, 32)
    plain = room.SpeculativeDecoder(course[0]).generate(prompts, 32)
    assert all(torch.equal(a, b) for a, b in zip(made.sequences, plain.sequences, strict=True))


@pytest.mark.parametrize("cached", CACHED)
@pytest.mark.parametrize("sampling", [room.Sampling(1.0), room.Sampling(0.7, top_k=50, top_p=0.9)])
def test_graphs_change_nothing(course, prompts, sampling, cached):
    kind = CACHED[cached]
    uniforms = torch.rand(64, len(prompts), 7, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    found = []
    for graphs in (True, False):
        decoder = room.SpeculativeDecoder(
            kind(course[0]), room.DraftModel(kind(course[1])), gamma=3, sampling=sampling, graphs=graphs
        )
        found.append(decoder.generate(prompts, 40, uniforms=uniforms))
    for a, b in zip(found[0].sequences, found[1].sequences, strict=True):
        assert torch.equal(a, b)
    assert found[0].statistics.trace == found[1].statistics.trace


def test_a_cache_that_another_decoder_made_anew(course, prompts):
    """Graphs that know the old memory are not replayed."""
    draft = room.DraftModel(course[1])
    one, two = (room.SpeculativeDecoder(course[0], draft, gamma=2) for _ in range(2))
    expected = one.generate(prompts[1:3], 30).sequences
    two.generate(prompts[1:2], 300)
    torch.cuda.empty_cache()
    again = one.generate(prompts[1:3], 30).sequences
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


def test_weights_that_were_moved(course, prompts):
    """A paged model lays weights side by side: a graph that knows where they were is not replayed."""
    target = load_model("course-base", device="cuda", dtype=torch.float32)
    decoder = room.SpeculativeDecoder(target, room.PromptLookup(), gamma=2)
    expected = decoder.generate(prompts[1:3], 30).sequences
    room.PagedCachedModel(target)
    for parameter in target.parameters():
        parameter.data = parameter.data.clone()
    torch.cuda.empty_cache()
    again = decoder.generate(prompts[1:3], 30).sequences
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


def test_half_precision_chooses_what_the_target_finds_best(prompts):
    """Each token has the highest logit of a whole pass in float32, up to bfloat16's rounding."""
    target, draft = (load_model(name, device="cuda", dtype=torch.bfloat16) for name in ("course-base", "course-draft"))
    exact = load_model("course-base", device="cuda", dtype=torch.float32)
    for kind in CACHED.values():
        decoder = room.SpeculativeDecoder(kind(target), room.DraftModel(kind(draft)), gamma=4)
        for text, ids in zip(prompts, decoder.generate(prompts, 64).sequences, strict=True):
            with torch.no_grad():
                logits = exact(ids[None].cuda()).logits[0, len(text) - 1 : -1]
            chosen = logits.gather(1, ids[len(text) :, None].cuda()).squeeze(1)
            assert (chosen >= logits.amax(1) - 0.25).all()


# The exact distribution of sequences of three tokens.


def tiny(seed, layers):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=6, hidden_size=32, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, eos_token_id=None, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(0.35 * torch.randn_like(parameter))
    return model.cuda()


def p_value(target, decoder, text, each, seed):
    sampling = decoder.sampling
    everything = torch.tensor(list(itertools.product(range(6), repeat=NEW)), device="cuda")
    ids = torch.cat([text.cuda().expand(len(everything), -1), everything], 1)
    with torch.no_grad():
        p = sampling.probabilities(target(ids).logits[:, len(text) - 1 : -1].double())
    p = p.gather(-1, everything[..., None]).squeeze(-1).prod(1).cpu().numpy()
    new = torch.stack(decoder.generate([text] * each, NEW, seed=seed).new)
    observed = torch.bincount(new @ (6 ** torch.arange(NEW - 1, -1, -1)), minlength=len(p)).numpy()
    assert observed[p == 0].sum() == 0
    expected = each * p / p.sum()
    rare = expected < 10
    lumped = [np.append(x[~rare], x[rare].sum()) for x in (observed, expected)]
    keep = lumped[1] > 0
    return stats.chisquare(lumped[0][keep], lumped[1][keep]).pvalue


@pytest.mark.parametrize("cached", CACHED)
@pytest.mark.parametrize("sampling", [room.Sampling(0.5), room.Sampling(1.0, top_k=4), room.Sampling(1.5, top_p=0.8)])
@pytest.mark.parametrize("name", ["model", "lookup", "early exit"])
def test_sequences_have_the_targets_distribution(name, sampling, cached):
    models, kind = (tiny(0, 2), tiny(1, 1)), CACHED[cached]
    chosen = room.early_exit_draft(models[0], 1, kind) if name == "early exit" else drafter(name, models, kind)
    decoder = room.SpeculativeDecoder(kind(models[0]), chosen, gamma=2, sampling=sampling)
    for seed in range(2):  # eager steps, then graphs
        assert p_value(models[0], decoder, torch.tensor([0, 5, 0, 5, 0, 1]), 20_000, seed) > FALSE_ALARM


# Time.


@pytest.mark.alone
@pytest.mark.parametrize("cached", CACHED)
def test_faster_than_assisted_generation_and_than_the_target_alone(cached):
    bench = benchmark()
    target, draft = (load_model(name, device="cuda") for name in ("course-base", "course-draft"))
    for model in (target, draft):
        model.generation_config.eos_token_id = None
    texts, new = bench.prompts(2), 96
    own = bench.decoders(CACHED[cached], target, draft, 0.0, 3)
    calls = {name: bench.all_of(decoder, texts, new) for name, decoder in own.items()}
    calls |= bench.theirs(target, draft, texts, new, 0.0)
    seconds = {}
    for name, call in calls.items():
        call(), call()
        seconds[name] = statistics.median(timed(call, resolve("cuda")) for _ in range(3))
    assert seconds["draft model"] < seconds[bench.ASSISTED], seconds
    assert min(seconds[name] for name in own if name != bench.PLAIN) < seconds[bench.PLAIN], seconds
