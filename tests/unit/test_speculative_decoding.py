"""Whole generations: greedy beside transformers' generate, samples beside the exact distribution of every sequence,
rollback beside reading anew, and what a step does given its uniforms, written out without a cache."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM

from effnlp_lab import speculative as room
from effnlp_lab.course.models import load_model
from effnlp_lab.errors import UsageError

FALSE_ALARM = 1e-6
NEW_GREEDY = 18
VOCABULARY = 6
CACHED = {"static": room.StaticCachedModel, "dynamic": room.DynamicCachedModel, "paged": room.PagedCachedModel}


def llama(seed, layers=2, vocabulary=VOCABULARY, spread=0.5):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, eos_token_id=None, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(spread * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def course():
    return load_model("course-base", device="cpu"), load_model("course-draft", device="cpu")


@pytest.fixture(scope="module")
def prompts():
    """Ragged, one of a single token, one with much to look up."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randint(5, 4000, (n,), generator=generator) for n in (1, 9, 30)]
    return [*found, found[2].repeat(2)]


@pytest.fixture(scope="module")
def greedy(course, prompts):
    how = {"do_sample": False, "max_new_tokens": NEW_GREEDY}
    return [course[0].generate(p[None], attention_mask=torch.ones_like(p[None]), **how)[0] for p in prompts]


def drafters(course):
    base, draft = course
    return {
        "none": lambda kind: None,
        "model": lambda kind: room.DraftModel(kind(draft)),
        "lookup": lambda kind: room.PromptLookup(),
        "early exit": lambda kind: room.early_exit_draft(base, 5, kind),
    }


@pytest.mark.parametrize("cached", CACHED)
@pytest.mark.parametrize("drafter", ["none", "model", "lookup", "early exit"])
def test_greedy_is_transformers_generate(course, prompts, greedy, drafter, cached):
    kind = CACHED[cached]
    decoder = room.SpeculativeDecoder(kind(course[0]), drafters(course)[drafter](kind), gamma=3)
    streamed = [[] for _ in prompts]
    made = decoder.generate(prompts, NEW_GREEDY, on_tokens=lambda row, tokens: streamed[row].extend(tokens))
    for row, expected in enumerate(greedy):
        assert torch.equal(made.sequences[row], expected), row
        assert streamed[row] == made.new[row].tolist() == expected[len(prompts[row]) :].tolist()
    figures = made.statistics
    assert figures.tokens == sum(len(x) for x in made.new) and figures.steps == sum(map(len, figures.trace))
    assert [sum(new for _, new in row) for row in figures.trace] == [len(x) for x in made.new]
    if drafter == "none":
        assert figures.tokens_per_step == 1 and figures.acceptance_rate == 0
    else:
        assert 0 < figures.accepted <= figures.tested <= figures.drafted and figures.tokens_per_step > 1
    again = decoder.generate(prompts[1:3], 10)  # the same decoder, fewer rows, shorter
    assert all(torch.equal(a, b[: len(a)]) for a, b in zip(again.sequences, greedy[1:3], strict=True))


@pytest.mark.parametrize("branching", [(1, 1, 1), (3, 2, 1), (4,)])
def test_greedy_trees_are_transformers_generate(course, prompts, greedy, branching):
    made = room.TreeDecoder(*course, branching).generate(prompts, NEW_GREEDY)
    assert all(torch.equal(a, b) for a, b in zip(made.sequences, greedy, strict=True))
    assert made.statistics.tokens_per_step > 1.2


def test_a_tree_of_one_branch_is_a_chain(course, prompts):
    chain = room.SpeculativeDecoder(*course, gamma=3).generate(prompts, 20)
    tree = room.TreeDecoder(*course, (1, 1, 1)).generate(prompts, 20)
    assert chain.statistics.trace == tree.statistics.trace


def test_adaptive_gamma_changes_no_token(course, prompts, greedy):
    decoder = room.SpeculativeDecoder(*course, gamma=room.AdaptiveGamma(0.1, most=5, start=2))
    made = decoder.generate(prompts, NEW_GREEDY)
    assert all(torch.equal(a, b) for a, b in zip(made.sequences, greedy, strict=True))
    assert len({new for row in made.statistics.trace for _, new in row}) > 3


def test_drafts_are_timed_and_change_nothing(course, prompts, greedy):
    target, draft = course
    decoder, short = (room.SpeculativeDecoder(target, draft, gamma=gamma, ends=()) for gamma in (4, 1))
    with pytest.raises(UsageError, match="generate something first"):
        decoder.seconds_of_drafts()
    before = decoder.generate(prompts, 12).sequences
    short.generate(prompts, 12)
    assert 0 < short.seconds_of_drafts(repeats=9) < decoder.seconds_of_drafts(repeats=9)
    assert all(torch.equal(a, b) for a, b in zip(decoder.generate(prompts, 12).sequences, before, strict=True))
    with pytest.raises(UsageError, match="give a drafter"):
        room.SpeculativeDecoder(target, None).seconds_of_drafts()


def test_rows_end_at_an_end_token(course, prompts, greedy):
    end = int(greedy[1][len(prompts[1]) + 5])
    made = room.SpeculativeDecoder(*course, gamma=4, ends=[end]).generate(prompts, NEW_GREEDY)
    tree = room.TreeDecoder(*course, (2, 1, 1), ends=[end]).generate(prompts, NEW_GREEDY)
    lookup = room.SpeculativeDecoder(course[0], room.PromptLookup(), ends=[end]).generate(prompts, NEW_GREEDY)
    for row, whole in enumerate(greedy):
        new = whole[len(prompts[row]) :].tolist()
        expected = new[: new.index(end) + 1] if end in new else new
        for one in (made, tree, lookup):
            assert one.new[row].tolist() == expected
    assert len(made.new[1]) < NEW_GREEDY <= max(len(x) for x in made.new)


# Rollback.


@pytest.mark.parametrize("cached", CACHED)
def test_what_was_truncated_is_forgotten(cached):
    """Extend, truncate each row elsewhere, extend again: logits as if the rejected tokens had never been."""
    model, generator = llama(0, vocabulary=30), torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 30, (3, 40), generator=generator)
    held = CACHED[cached](model)
    assert isinstance(held, room.CachedModel)
    held.reset(3, 64)
    texts, lengths = [[] for _ in range(3)], torch.zeros(3, dtype=torch.long)
    for start, count, back in (
        (0, 6, (0, 3, 5)),
        (6, 4, (1, 0, 2)),
        (10, 1, (0, 0, 0)),
        (11, 5, (5, 1, 0)),
        (16, 3, (0, 2, 3)),
    ):
        new = tokens[:, start : start + count]
        logits = held.extend(new)
        for row, text in enumerate(texts):
            text += new[row].tolist()
            expected = model(torch.tensor([text])).logits[0, -count:]
            torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(held.extend(new[:, :1], keep=1)[:, -1:].shape and held.lengths, lengths + count + 1)
        lengths = lengths + count - torch.tensor(back)
        held.truncate(lengths)
        texts = [text[: int(n)] for text, n in zip(texts, lengths, strict=True)]


def test_a_dynamic_cache_of_one_row_is_cut():
    held = room.DynamicCachedModel(llama(0))
    held.extend(torch.zeros(1, 9, dtype=torch.long))
    held.truncate(torch.tensor([4]))
    assert held.cache.get_seq_length() == 4 and held.held.shape == (1, 4)


# Sampling, given its uniforms.


@torch.no_grad()
def written_out(target, drafter, prompt, uniforms, gamma, sampling, limit):
    """Algorithm 1 for one row, without a cache, every distribution from the whole text."""

    def distribution(model, ids):
        return sampling.probabilities(model(torch.tensor([ids])).logits[0, -1]).numpy()

    def draw(weights, uniform):
        sums = np.cumsum(weights.astype(np.float64))
        return int(np.flatnonzero(sums > uniform * sums[-1])[0])

    ids, made, gammas = prompt.tolist(), 0, [gamma] if isinstance(gamma, int) else gamma
    for u, gamma in zip(uniforms, itertools.cycle(gammas), strict=False):
        drafted, q = [], []
        for i in range(gamma):
            q.append(distribution(drafter, ids + drafted))
            drafted.append(draw(q[-1], u[i]))
        p = [distribution(target, ids + drafted[:i]) for i in range(gamma + 1)]
        n = min([i for i in range(gamma) if u[gamma + i] > p[i][drafted[i]] / q[i][drafted[i]]] + [gamma])
        rest = p[n] if n == gamma else np.maximum(0, p[n] - q[n])
        new = [*drafted[:n], draw(rest, u[2 * gamma])][: limit - made]
        ids, made = ids + new, made + len(new)
        if made == limit:
            return ids
    raise AssertionError("too few uniforms")


@pytest.mark.parametrize("cached", CACHED)
@pytest.mark.parametrize("sampling", [room.Sampling(1.0), room.Sampling(0.6, top_k=12), room.Sampling(1.4, top_p=0.8)])
def test_given_its_uniforms_the_output_is_the_algorithms(sampling, cached):
    target, small, gamma, limit = llama(0, vocabulary=30), llama(1, 1, vocabulary=30), 3, 12
    texts = [torch.randint(0, 30, (n,), generator=torch.Generator().manual_seed(n)) for n in (1, 4, 11)]
    uniforms = torch.rand(limit, 3, 2 * gamma + 1, generator=torch.Generator().manual_seed(0))
    kind = CACHED[cached]
    decoder = room.SpeculativeDecoder(kind(target), room.DraftModel(kind(small)), gamma=gamma, sampling=sampling)
    made = decoder.generate(texts, limit, uniforms=uniforms)
    for row, text in enumerate(texts):
        expected = written_out(target, small, text, uniforms[:, row].tolist(), gamma, sampling, limit)
        assert made.sequences[row].tolist() == expected
    from_function = decoder.generate(texts, limit, uniforms=lambda step, gamma: uniforms[step])
    assert all(torch.equal(a, b) for a, b in zip(made.sequences, from_function.sequences, strict=True))
    assert 0 < made.statistics.accepted < made.statistics.tested


class Cycle(room.AdaptiveGamma):
    """Gammas that do not depend on anything."""

    gammas = (3, 1, 2)

    def reset(self):
        self._count, self.gamma = 0, self.gammas[0]

    def update(self, accepted, tested):
        self._count += 1
        self.gamma = self.gammas[self._count % 3]


@pytest.mark.parametrize("cached", CACHED)
def test_given_its_uniforms_also_when_gamma_changes(cached):
    """The drafter has always read all of the text, whatever was drafted and accepted before."""
    target, small, limit, sampling = llama(0, vocabulary=30), llama(0, vocabulary=30), 14, room.Sampling(1.0)
    with torch.no_grad():
        small.lm_head.weight.mul_(0.8)  # near to the target: whole drafts are accepted, too
    text, kind = torch.tensor([3, 1, 4, 1, 5]), CACHED[cached]
    generator = torch.Generator().manual_seed(1)
    uniforms = [torch.rand(1, 2 * gamma + 1, generator=generator) for _ in range(limit) for gamma in Cycle.gammas]
    decoder = room.SpeculativeDecoder(
        kind(target), room.DraftModel(kind(small)), gamma=Cycle(0.1, most=3, start=3), sampling=sampling
    )
    made = decoder.generate([text], limit, uniforms=lambda step, gamma: uniforms[step])
    expected = written_out(target, small, text, [u[0].tolist() for u in uniforms], Cycle.gammas, sampling, limit)
    assert made.sequences[0].tolist() == expected
    assert (3, 4) in made.statistics.trace[0] and made.statistics.accepted < made.statistics.tested


def test_seeds():
    decoder = room.SpeculativeDecoder(llama(0), llama(1, 1), gamma=2, sampling=room.Sampling(1.0))
    texts = [torch.tensor([1, 2, 3])] * 8
    one, same, other = (decoder.generate(texts, 10, seed=seed).sequences for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Sampling: the exact distribution over all sequences of three tokens.

NEW = 3
TEXTS = [torch.tensor(x) for x in ([1, 2, 3, 1, 2], [4], [0, 5, 0, 5, 0, 5, 0])]
SETTINGS = (room.Sampling(0.5), room.Sampling(1.0, top_k=4), room.Sampling(1.5, top_p=0.8))


@torch.no_grad()
def exact(target, text, sampling):
    """P of every sequence of NEW tokens, [6^NEW], from one pass over all of them."""
    everything = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=NEW)))
    ids = torch.cat([text.expand(len(everything), -1), everything], 1)
    p = sampling.probabilities(target(ids).logits[:, len(text) - 1 : -1].double())
    return p.gather(-1, everything[..., None]).squeeze(-1).prod(1)


def chi_square(observed, probabilities):
    """The p-value; what is expected fewer than ten times is put together."""
    expected = observed.sum() * probabilities / probabilities.sum()
    assert observed[probabilities == 0].sum() == 0  # what is impossible never occurs
    rare = expected < 10
    lumped = [np.append(x[~rare], x[rare].sum()) for x in (observed, expected)]
    keep = lumped[1] > 0
    return stats.chisquare(lumped[0][keep], lumped[1][keep]).pvalue if keep.sum() > 1 else 1.0


def decoder_of(method, target, small, sampling):
    if method == "tree":
        return room.TreeDecoder(target, small, (2, 2), sampling=sampling)
    drafter = {"model": small, "lookup": room.PromptLookup(2), "early exit": None}[method]
    drafter = room.early_exit_draft(target, 1) if method == "early exit" else drafter
    return room.SpeculativeDecoder(target, drafter, gamma=2, sampling=sampling)


def p_values(method, sampling, each=1000):
    """Of each text, all of them in one ragged batch."""
    target, small = llama(0, spread=0.35), llama(1, 1, spread=0.35)
    batch = [text for text in TEXTS for _ in range(each)]
    made = decoder_of(method, target, small, sampling).generate(batch, NEW, seed=11)
    places = VOCABULARY ** torch.arange(NEW - 1, -1, -1)
    found = []
    for index, text in enumerate(TEXTS):
        codes = torch.stack(made.new[index * each : (index + 1) * each]) @ places
        observed = torch.bincount(codes, minlength=VOCABULARY**NEW).numpy()
        found.append(chi_square(observed, exact(target, text, sampling).numpy()))
    return found, made.statistics


@pytest.mark.parametrize("sampling", SETTINGS, ids=lambda s: f"T{s.temperature} k{s.top_k} p{s.top_p}")
@pytest.mark.parametrize("method", ["model", "lookup", "early exit", "tree"])
def test_sequences_have_the_targets_distribution(method, sampling):
    found, statistics = p_values(method, sampling)
    assert min(found) > FALSE_ALARM, found
    assert 0.02 < statistics.acceptance_rate < 0.98  # there was something to accept and to reject


def test_the_chi_square_sees_a_draft_without_temperature(monkeypatch):
    """q taken at temperature 1 while drafts are drawn at 0.5: the output is another distribution, and is seen."""
    plain = room.Sampling.probabilities
    seen = []

    def wrong(self, logits):
        found = plain(self, logits)
        seen.append(found)
        return found

    monkeypatch.setattr(room.Sampling, "probabilities", wrong)
    from effnlp_lab.speculative import state

    check = state.verify_drafts
    monkeypatch.setattr(
        state, "verify_drafts", lambda p, q, *rest: check(p, q.sqrt() / q.sqrt().sum(-1, keepdim=True), *rest)
    )
    found, _ = p_values("model", room.Sampling(0.5))
    assert min(found) < FALSE_ALARM


# Early exit.


def test_early_exit_with_a_high_threshold_is_the_whole_model(course, prompts, greedy):
    base = course[0]
    for row in (0, 1):
        decoder = room.EarlyExitDecoder(base, 1.1)
        assert torch.equal(decoder.generate(prompts[row], NEW_GREEDY), greedy[row]) and set(decoder.exits) == {8}
    early = room.EarlyExitDecoder(base, 0.3, least=2)
    out = early.generate(prompts[1], NEW_GREEDY)
    assert len(out) == len(greedy[1]) and 2 <= min(early.exits) < 8
    # The first token that left early: that of the layers below, on the whole text.
    first = next(i for i, layer in enumerate(early.exits) if layer < 8)
    text = out[: len(prompts[1]) + first]
    states = base.model(text[None], output_hidden_states=True).hidden_states[early.exits[first]]
    logits = base.lm_head(base.model.norm(states[0, -1]))
    assert int(logits.argmax()) == int(out[len(text)])


# What is refused.


def test_what_is_refused(course):
    base, draft = course
    decoder = room.SpeculativeDecoder(base, draft, gamma=2, sampling=room.Sampling(1.0))
    text = torch.tensor([5, 6, 7])
    for call, message in (
        (lambda: decoder.generate([], 4), "no prompts"),
        (lambda: decoder.generate([text, text[:0]], 4), "Prompt 1 has shape"),
        (lambda: decoder.generate([text.float()], 4), "Prompt 0"),
        (lambda: decoder.generate([text], 0), "max_new_tokens is 0"),
        (lambda: decoder.generate([text], 5000), "more than this model's 1024 positions"),
        (lambda: decoder.generate([text], 4, uniforms=torch.rand(4, 1, 3)), r"expected \[steps, 1, 5\]"),
        (lambda: decoder.generate([text], 40, uniforms=torch.rand(2, 1, 5)), "uniforms for 2 steps"),
        (lambda: room.SpeculativeDecoder(base, draft, gamma=0), "at least 1 drafted token"),
        (lambda: room.SpeculativeDecoder(base, draft, graphs=True), "CUDA graphs need"),
        (lambda: room.early_exit_draft(base, 8), "expected 1 to 7"),
        (lambda: room.PromptLookup(1, 2), "least <= most"),
        (lambda: room.TokenTree(()), "branching"),
        (lambda: room.EarlyExitDecoder(base, 0.5, least=9), "least is 9"),
    ):
        with pytest.raises(UsageError, match=message):
            call()


def test_lookup_takes_the_longest_and_the_latest():
    lookup = room.PromptLookup(3, 1)
    tokens = torch.tensor([[7, 8, 9, 1, 2, 3, 8, 9, 4, 5, 6, 7, 8, 9, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 0, 0] + [0] * 10])
    made = lookup.draft(tokens, torch.tensor([13, 5]), 3, None, room.Sampling(), False)
    assert made.counts.tolist() == [3, 0] and made.tokens[0].tolist() == [1, 2, 3] and made.probabilities is None
    again = lookup.draft(torch.tensor([[4, 4, 4, 4, 0, 0, 0]]), torch.tensor([3]), 3, None, room.Sampling(), False)
    assert again.counts.tolist() == [1] and again.tokens[0, 0] == 4
