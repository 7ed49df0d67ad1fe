"""The engine on the CPU: what transformers generates, token for token; what it refuses; sampling; attention sinks."""

from __future__ import annotations

import contextlib
from collections import Counter

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)  # fmt: skip

from effnlp_lab import paged
from effnlp_lab.attention.configurations import Tile
from effnlp_lab.course.models import load_model, load_tokenizer
from effnlp_lab.errors import UsageError
from effnlp_lab.paged import Batch, BlockManager, Engine, RequestError, SamplingParams, Sequence

HEADER = "import os\nimport sys\nfrom collections import defaultdict\n\n\ndef parse(arguments):\n    '''Parse.'''\n"
ENDS = ("    for x in", "    return self.", "class Tree", "    raise ", "def main(", "    if not ")
TINY = {
    "vocab_size": 90, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": None, "bos_token_id": None,
    "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    return load_model("course-base", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("course-base")


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """Some alone, some with one or two headers in common, one long: 3 to 130 tokens."""
    texts = [*ENDS[:2], *(HEADER + end for end in ENDS[:4]), *(HEADER * 2 + end for end in ENDS[2:5]), HEADER * 4]
    return [tokenizer(text)["input_ids"] for text in texts]


@pytest.fixture(scope="module")
def expected(model, prompts):
    return [greedy(model, prompt, 24) for prompt in prompts]


def greedy(model, prompt, new):
    """What transformers generates, alone, from a contiguous cache."""
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return out[0, len(prompt) :].tolist()


def tiny(config=LlamaConfig, seed=0, **changes):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config(**TINY | {"initializer_range": 0.3} | changes)).float().eval()


def ids(count, seed=0):
    return torch.randint(0, 90, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def check_all_free(engine):
    assert engine.unfinished == 0 and not engine.scheduler.active
    assert engine.manager.free_pages == engine.manager.pages


# Equal to transformers.


@pytest.mark.parametrize("options", [
    {}, {"chunk": 13}, {"pages": 22, "max_length": 200, "chunk": 40}, {"lookahead": False, "prefix_caching": False},
    {"page_size": 32, "max_batch": 3, "chunk": 50},
], ids=["plain", "chunked", "preempted", "no lookahead", "small batch"])  # fmt: skip
def test_greedy_output_is_that_of_transformers(model, prompts, expected, options):
    engine = Engine(model, **options)
    outputs = engine.generate(prompts, SamplingParams(max_new_tokens=24))
    assert [output.tokens for output in outputs] == expected
    stops = {model.generation_config.eos_token_id}
    assert all(output.reason == ("stop" if output.tokens[-1] in stops else "length") for output in outputs)
    assert all(len(output.times) == len(output.tokens) for output in outputs)
    assert (engine.stats.preemptions > 0) == ("pages" in options)
    assert (engine.stats.cached > 0) == options.get("prefix_caching", True)
    check_all_free(engine)


def test_a_second_round_finds_its_prompts_and_outputs_in_the_cache(model, prompts, expected):
    engine = Engine(model)
    first = engine.generate(prompts[-1:], SamplingParams(max_new_tokens=24))[0]
    longer = prompts[-1] + first.tokens
    again = engine.generate([longer], SamplingParams(max_new_tokens=5))[0]
    assert again.cached == (len(longer) - 1) // 16 * 16 > len(prompts[-1])
    assert again.tokens == greedy(model, longer, 5)
    whole = longer[:32]  # all of it is cached, and still its last token must be seen
    assert engine.generate([whole], SamplingParams(max_new_tokens=5))[0].cached == 16
    assert engine.generate([whole], SamplingParams(max_new_tokens=5))[0].tokens == greedy(model, whole, 5)


@pytest.mark.parametrize("config,changes", [
    (LlamaConfig, {"attention_bias": True, "head_dim": 32}), (LlamaConfig, {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}}),
    (MistralConfig, {"sliding_window": 7}), (Qwen2Config, {"use_sliding_window": True, "sliding_window": 9,
                                                          "max_window_layers": 1}),
], ids=["llama", "llama3 rotary", "mistral", "qwen2"])  # fmt: skip
def test_other_models(config, changes):
    model = tiny(config, **changes)
    engine = Engine(model, chunk=16, max_length=100)
    prompts = [ids(n, n) for n in (3, 33, 20)]
    outputs = engine.generate(prompts, SamplingParams(max_new_tokens=12))
    assert [output.tokens for output in outputs] == [greedy(model, prompt, 12) for prompt in prompts]
    check_all_free(engine)


def test_the_fused_operations_give_the_same(monkeypatch):
    """All kernels of the engine, in Triton's interpreter; the model keeps its weights, side by side now."""
    model = tiny(attention_bias=True, num_hidden_layers=1)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    prompts = [ids(n, n) for n in (3, 20)]
    wanted = [greedy(model, prompt, 4) for prompt in prompts]
    for _ in range(2):
        engine = Engine(model, chunk=16, max_length=64, fused=True)
        assert [o.tokens for o in engine.generate(prompts, SamplingParams(max_new_tokens=4))] == wanted
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    first = model.model.layers[0].self_attn
    assert first.k_proj.weight.data_ptr() == first.q_proj.weight.data_ptr() + first.q_proj.weight.numel() * 4


@pytest.mark.parametrize("options", [{}, {"window": 24, "sinks": 2}], ids=["all keys", "window"])
def test_a_warm_engine_starts_no_kernel_of_another_kind(monkeypatch, options):
    """What a kernel is compiled for: its constants, its tile and its arguments' types. In Triton's interpreter."""
    from effnlp_lab.paged import attention, runner, tiles

    assert runner.SHARES[-1] == tiles.MAX_SPLITS
    monkeypatch.setattr(runner, "SHARES", runner.SHARES[:3])  # the interpreter takes long, and at most 3 shares
    monkeypatch.setattr(tiles, "INTERPRETED", Tile(8, 16, 4, 1))
    start, kinds = attention._start, set()

    def noted(kernel, grid, tile, *arguments, **constants):
        types = tuple(x.dtype if isinstance(x, torch.Tensor) else type(x) for x in arguments)
        kinds.add((kernel.fn.__name__, tile, types, tuple(constants.items())))
        start(kernel, grid, tile, *arguments, **constants)

    monkeypatch.setattr(attention, "_start", noted)
    engine = Engine(tiny(num_hidden_layers=1), chunk=24, max_length=48, page_size=16, fused=True, **options)
    engine.warm_up()
    warm, prompts = set(kinds), [ids(n, n) for n in (3, 40, 17, 1)]
    kinds.clear()
    engine.generate([*prompts, prompts[1]], SamplingParams(max_new_tokens=4))
    assert engine.stats.cached or options
    assert kinds and kinds <= warm, kinds - warm


def test_forward_append_and_truncate_for_several_tokens_a_step(model, tokenizer):
    """What speculative decoding needs: logits of several new tokens at once, and a cache that can be rolled back."""
    prompt = tokenizer(HEADER * 2)["input_ids"]
    inner = paged.PagedModel(model, max_length=256)
    manager, cache = BlockManager(16, 16), inner.cache(16)
    sequence, other = Sequence(manager), Sequence(manager)

    def run(tokens, sequences=(sequence,)):
        for s, new in zip(sequences, tokens, strict=True):
            cache.copy(s.append(len(new)))
        return inner.logits(inner.forward(Batch.of(sequences, tokens, "cpu"), cache))

    exact = model(torch.tensor([prompt])).logits[0]
    run([prompt[:20]])
    run([[1, 2, 3, 4]])
    sequence.truncate(20)
    torch.testing.assert_close(run([prompt[20:27]]), exact[20:27], rtol=1e-4, atol=1e-4)
    both = run([prompt[27:30], prompt[:5]], (sequence, other))
    torch.testing.assert_close(both, torch.cat([exact[27:30], exact[:5]]), rtol=1e-4, atol=1e-4)
    child = sequence.fork()
    run([[5, 6, 7]], (child,))
    torch.testing.assert_close(run([prompt[30:33]]), exact[30:33], rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError):
        Batch.of([other], [prompt], "cpu")


# Requests that cannot be served, and those that end early.


@pytest.mark.parametrize("prompt,params,word", [
    ([], None, "empty"), ("", None, "empty"), ([5, -1], None, "-1"), ([5, 4096], None, "4096"), ([5, 1.5], None, "1.5"),
    ([True], None, "True"), ([1, None], None, "None"), (None, None, "NoneType"), (torch.zeros(1, 3), None, "tensor"),
    (b"abc", None, "bytes"), ([[1, 2]], None, r"\[1, 2\]"), ([5] * 1000, SamplingParams(max_new_tokens=25), "1024"),
    ([5], {"temperature": 1}, "dict"),
])  # fmt: skip
def test_a_bad_request_gets_a_sentence_and_the_others_go_on(model, tokenizer, prompts, expected, prompt, params, word):
    engine = Engine(model, tokenizer)
    with pytest.raises(RequestError, match=word):
        engine.submit(prompt, params)
    good = SamplingParams(max_new_tokens=24)
    bad, other = engine.generate([prompt, prompts[1]], [params, good])
    assert other.tokens == expected[1] and other.text == tokenizer.decode(expected[1])
    assert bad.reason == "error" and bad.error.endswith((".", "None")) and bad.error.count("\n") == 0
    assert bad.tokens == [] and bad.error[0].isupper()
    check_all_free(engine)


def test_more_pages_than_there_are_and_a_text_without_a_tokenizer(model):
    engine = Engine(model, pages=3)
    with pytest.raises(RequestError, match="4 pages, and the cache has 3"):
        engine.submit([5] * 40, SamplingParams(max_new_tokens=9))
    with pytest.raises(RequestError, match="tokenizer"):
        engine.submit("text")
    with pytest.raises(RequestError, match="on_token"):
        engine.submit([5], SamplingParams(max_new_tokens=1), on_token=3)
    assert engine.submit([5] * 40, SamplingParams(max_new_tokens=8)).error is None


@pytest.mark.parametrize("changes", [
    {"max_new_tokens": 0}, {"max_new_tokens": 1.5}, {"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1},
    {"top_p": 0.0}, {"top_p": 1.1}, {"seed": -1}, {"seed": 1 << 60}, {"stop_token_ids": ("a",)}, {"stop_token_ids": 3},
])  # fmt: skip
def test_sampling_parameters_out_of_range(changes):
    with pytest.raises(UsageError, match=next(iter(changes))):
        SamplingParams(**changes)


@pytest.mark.parametrize("options", [
    {"page_size": 24}, {"max_batch": 0}, {"chunk": 0}, {"max_length": 2000}, {"sinks": 4}, {"window": 0},
    {"window": 400, "pages": 20},
])  # fmt: skip
def test_an_engine_that_cannot_be(model, options):
    with pytest.raises(UsageError):
        Engine(model, **options)


def test_models_of_another_kind():
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50))
    with pytest.raises(UsageError, match="gpt2"):
        Engine(gpt2)
    dynamic = tiny(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    with pytest.raises(UsageError, match="dynamic"):
        Engine(dynamic)
    with pytest.raises(UsageError, match="Linear"):
        Engine(torch.nn.Linear(3, 3))


def test_cancelled_while_waiting_reading_and_decoding(model, prompts, expected):
    """The cancelled keep what came out; the pages come back; the others are not disturbed."""
    engine = Engine(model, max_batch=3, chunk=60)
    params = SamplingParams(max_new_tokens=24)
    requests = [engine.submit(prompt, params) for prompt in prompts[:6]]
    long = engine.submit(prompts[-1], params)
    for _ in range(5):
        engine.step()
    decoding, waiting = requests[0], requests[5]
    assert engine.cancel(decoding) and engine.cancel(waiting.id) and not engine.cancel(decoding)
    assert not engine.cancel(12345)
    reading = None
    while engine.step():
        if long.state.value == "reading" and reading is None:
            reading = engine.cancel(long)
    assert reading and long.output == [] and engine.output(long).reason == "cancelled"
    assert waiting.output == [] and decoding.output == expected[0][: len(decoding.output)] != []
    assert [r.output for r in requests[1:5]] == expected[1:5]
    check_all_free(engine)


def test_streams_run_side_by_side_and_closing_one_cancels_it(model, prompts, expected):
    engine = Engine(model)
    params = SamplingParams(max_new_tokens=24)
    first, second = engine.stream(prompts[0], params), engine.stream(prompts[1], params)
    with pytest.raises(RequestError):
        engine.stream([], params)
    heads = [next(first), next(second), next(first)]
    assert heads == [expected[0][0], expected[1][0], expected[0][1]]
    second.close()
    assert engine.unfinished == 1
    assert [*heads[::2], *first] == expected[0]
    check_all_free(engine)


def test_a_callback_sees_every_token_and_its_error_ends_its_request_alone(model, prompts, expected):
    engine = Engine(model)
    seen = []

    def on_token(number, token):
        seen.append((number, token))
        if number == 1 and sum(n == 1 for n, _ in seen) == 3:
            raise KeyError("mine")

    params = SamplingParams(max_new_tokens=24)
    good, bad = engine.generate(prompts[:2], params, on_token=on_token)
    assert good.tokens == expected[0] == [token for number, token in seen if number == 0]
    assert bad.reason == "error" and "KeyError" in bad.error and bad.tokens == expected[1][:3]
    check_all_free(engine)


def test_an_interruption_cancels_what_was_asked_for(model, prompts):
    engine = Engine(model)

    def on_token(number, token):
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        engine.generate(prompts[:3], on_token=on_token)
        pytest.fail("the interruption was swallowed")
    check_all_free(engine)


def test_stop_tokens(model, prompts, expected):
    stop = next(token for token in expected[0][2:] if token not in expected[0][:2])
    engine = Engine(model)
    params = SamplingParams(max_new_tokens=24, stop_token_ids=(stop,))
    output = engine.generate([prompts[0]], params)[0]
    assert output.reason == "stop" and output.tokens == expected[0][: expected[0].index(stop) + 1]


# Sampling.


def test_the_distribution_is_that_of_transformers_own_filters():
    logits = torch.randn(4, 60, generator=torch.Generator().manual_seed(0)) * 3
    temperature, top_k, top_p = torch.tensor([0.5, 1.0, 1.5, 0.0]), torch.tensor([7, 0, 25, 3]), torch.tensor(
        [1.0, 0.6, 0.8, 0.5]
    )  # fmt: skip
    ours = paged.probabilities(logits, temperature, top_k, top_p)
    for row in range(3):
        scores = TemperatureLogitsWarper(temperature[row].item())(None, logits[row : row + 1])
        if top_k[row]:
            scores = TopKLogitsWarper(int(top_k[row]))(None, scores)
        scores = TopPLogitsWarper(top_p[row].item())(None, scores)
        torch.testing.assert_close(ours[row], scores.softmax(-1)[0])
    assert ours[3].argmax() == logits[3].argmax() and ours[3].max() == 1 and ours[3].sum() == 1
    plain = paged.probabilities(logits, torch.ones(4))
    torch.testing.assert_close(plain, logits.softmax(-1))


def test_a_token_is_where_the_cumulative_distribution_passes_its_uniform():
    p = torch.tensor([[0.0, 0.25, 0.25, 0.0, 0.5, 0.0]]).repeat(6, 1)
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert paged.sample(p, uniforms).tolist() == [1, 1, 2, 4, 4, 4]


def test_uniform_numbers_are_uniform_and_independent():
    """20 x 20 cells of neighbouring numbers, across counters and across seeds: chi-square with 399 degrees of freedom
    stays below 550 but once in a million."""
    seeds, counters = torch.meshgrid(torch.arange(200), torch.arange(200), indexing="ij")
    u = paged.uniforms(seeds.flatten(), counters.flatten()).view(200, 200)
    assert u.min() >= 0 and u.max() < 1 and u.unique().numel() == u.numel()
    for a, b in ((u[:, :-1], u[:, 1:]), (u[:-1], u[1:])):
        cells = torch.bincount(((a * 20).long() * 20 + (b * 20).long()).flatten(), minlength=400).double()
        chi_square = ((cells - cells.mean()) ** 2 / cells.mean()).sum()
        assert 250 < chi_square < 550


def test_a_seed_gives_the_same_text_whatever_is_served_beside_it(model, prompts):
    asked = [SamplingParams(max_new_tokens=24, temperature=0.9, seed=i, top_k=40 * (i % 2), top_p=0.95 - 0.05 * (i % 3))
             for i in range(6)]  # fmt: skip
    outputs = Engine(model).generate(prompts[:6], asked)
    tight = Engine(model, pages=11, max_length=170, chunk=20)
    again = tight.generate(prompts[:6], asked)
    alone = [Engine(model).generate([prompt], one)[0] for prompt, one in zip(prompts[:2], asked, strict=False)]
    assert tight.stats.preemptions > 0
    assert [o.tokens for o in outputs] == [o.tokens for o in again]
    assert [o.tokens for o in outputs[:2]] == [o.tokens for o in alone]
    other = Engine(model).generate(prompts[:1], SamplingParams(max_new_tokens=24, temperature=0.9, seed=77))[0]
    assert other.tokens != outputs[0].tokens


def test_first_tokens_have_the_models_distribution():
    """300 seeds of one prompt: chi-square over the likely tokens, the rest as one; once in a million a false alarm."""
    model = tiny(num_hidden_layers=1)
    prompt, count = ids(5), 300
    exact = model(torch.tensor([prompt])).logits[0, -1].detach().double().softmax(-1)
    params = [SamplingParams(max_new_tokens=1, temperature=1.0, seed=i) for i in range(count)]
    found = Counter(o.tokens[0] for o in Engine(model, max_length=64).generate([prompt] * count, params))
    likely = [i for i in range(90) if exact[i] * count >= 5]
    pairs = [(found[i], exact[i] * count) for i in likely]
    rest = 1 - sum(exact[i] for i in likely)
    pairs.append((count - sum(found[i] for i in likely), rest * count))
    from scipy.stats import chi2

    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in pairs)
    assert chi2.sf(float(statistic), len(pairs) - 1) > 1e-6


# Attention sinks.


def test_sinks_stand_at_their_positions_in_the_cache():
    """One layer's keys depend on token and position alone: the rolling cache is then a fresh text of what it keeps."""
    model, window, sinks = tiny(num_hidden_layers=1), 20, 4
    engine = Engine(model, window=window, sinks=sinks, max_length=400, chunk=16, pages=8)
    prompt = ids(70)
    output = engine.generate([prompt], SamplingParams(max_new_tokens=200))[0]
    text = prompt + output.tokens
    for end in (len(prompt), len(prompt) + 1, 150, len(text) - 1):
        kept = [text[i] for i in paged.kept_tokens(end, window, sinks)]
        assert len(kept) == window + sinks
        logits = model(torch.tensor([kept])).logits[0, -1]
        assert logits[text[end]] >= logits.max() - 1e-3
    check_all_free(engine)


def test_a_window_that_holds_everything_changes_nothing(model, prompts, expected):
    engine = Engine(model, window=300, sinks=4, chunk=50)
    outputs = engine.generate(prompts[:3], SamplingParams(max_new_tokens=24))
    assert [output.tokens for output in outputs] == expected[:3]
