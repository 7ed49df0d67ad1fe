"""The paged room, compiled: its kernels on random shapes beside float64, and the engine beside transformers."""

from __future__ import annotations

import collections
import gc
import inspect
import itertools
import random

import pytest
import torch
from torch.nn import functional as F

from effnlp_lab import paged
from effnlp_lab.course.models import load_model, load_tokenizer
from effnlp_lab.paged import Batch, BlockManager, Engine, PagedModel, SamplingParams, Sequence
from effnlp_lab.paged import attention as kernels
from effnlp_lab.paged.kernels import merge_pages_kernel, paged_kernel, write_kernel
from effnlp_lab.paged.kernels_layer import gate_kernel, greedy_kernel, norm_kernel

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
KERNELS = (paged_kernel, merge_pages_kernel, write_kernel, gate_kernel, greedy_kernel, norm_kernel)
HEAD_DIMS = (32, 64, 80, 128, 256)
SHAPES_A_GROUP = 24
TIE = 2e-4
"""Logits of two tokens that lie no further apart are within rounding of one another: float32 sums of a few hundred
numbers, of logits around 10, taken in another order."""


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that a kernel should have written, and did not, holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.backends.cuda.matmul.allow_tf32 = False
    assert torch.empty(3, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def excess(ours, plain, exact):
    """Error over what the rule allows: twice the error of plain PyTorch in the same dtype (the worst of `plain`), the
    reference's rounding, and one eps of its range. At most 1 where the rule holds."""
    assert ours.dtype == plain[0].dtype and ours.shape == exact.shape and ours.isfinite().all()
    error, *errors = ((x.double() - exact).abs().max().item() for x in (ours, *plain))
    rounding = (exact.to(ours.dtype).double() - exact).abs().max().item()
    return error / (2 * max(errors) + rounding + torch.finfo(ours.dtype).eps * exact.abs().max().item() + 1e-300)


def in_turn(a, b):
    """a @ b, one product added after the other, as a kernel's program adds them (a library splits long sums)."""
    out = a.new_zeros(*a.shape[:-1], b.shape[-1])
    for column, row in zip(a.unbind(-1), b.unbind(-2), strict=True):
        out.addcmul_(column[..., None], row[..., None, :])
    return out


def attend_in_turn(q, k, v, window=None):
    """Attention of one sequence in its own dtype, sums taken in turn: q [queries, heads, dim], k [kv_heads, n, dim]."""
    group = q.shape[1] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    key = torch.arange(k.shape[1], device=q.device)
    position = (k.shape[1] - q.shape[0] + torch.arange(q.shape[0], device=q.device))[:, None]
    keep = key <= position
    if window is not None:
        keep &= key > position - window
    scores = (in_turn(q.transpose(0, 1), k.mT) * q.shape[-1] ** -0.5).masked_fill(~keep, -torch.inf)
    weights = (scores - scores.logsumexp(-1, keepdim=True)).exp()
    return in_turn(weights, v).transpose(0, 1)


def problem(dice, lengths, kv_heads, head_dim, page, dtype):
    """Pages in any order, NaN wherever no sequence has a token; tables with more rows and columns than are used."""
    counts = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(counts) + 2, device="cuda")
    tables = order[-1].int().repeat(len(lengths) + 3, max(counts) + 2)
    rows = torch.tensor(dice.sample(range(len(lengths) + 3), len(lengths)), dtype=torch.int32, device="cuda")
    pages = torch.randn(2, len(order), kv_heads, page, head_dim, device="cuda").to(dtype)
    used = 0
    for row, n, count in zip(rows.tolist(), lengths, counts, strict=True):
        tables[row, :count] = order[used : used + count].int()
        used += count
        if n % page:
            pages[:, tables[row, count - 1].item(), :, n % page :] = torch.nan
    pages[:, order[used:]] = torch.nan
    return *pages, tables, rows, torch.tensor(lengths, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_shapes(dtype, head_dim):
    """15 groups of 24 shapes: decoding 1 to 8 queries, chunks of prompts, ragged mixtures; windows, sinks, splits."""
    dice = random.Random(f"{dtype} {head_dim}")
    torch.manual_seed(head_dim)
    broken = []
    for i in range(SHAPES_A_GROUP):
        form = ("one query", "few queries", "prompts", "ragged")[i % 4]
        kv_heads, group = dice.choice([(8, 4), (4, 8), (2, 1), (1, 7), (2, 16)])
        page = dice.choice([16, 16, 32, 64])
        batch = dice.choice([1, 2, 5])
        longest = dice.choice([17, 64, 300, 1500])
        queries = {"one query": 1, "few queries": dice.randint(2, 8), "prompts": dice.randint(9, 200)}.get(form)
        counts = [queries or dice.choice([1, 3, 8, 40, 150]) for _ in range(batch)]
        lengths = [count + dice.choice([0, dice.randint(0, longest)]) for count in counts]
        masks = dice.choice([{}, {}, {"window": 33}, {"window": 40, "sinks": 5}])
        broken += _compare(dice, form, counts, lengths, kv_heads, group, head_dim, page, DTYPES[dtype], masks)
    assert not broken, "\n".join(broken)


def _compare(dice, form, counts, lengths, kv_heads, group, head_dim, page, dtype, masks):
    what = f"{form} {counts} {lengths} {kv_heads}x{group} page {page} {masks}"
    k_pages, v_pages, tables, rows, lens = problem(dice, lengths, kv_heads, head_dim, page, dtype)
    starts = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device="cuda")
    q = torch.randn(sum(counts), kv_heads * group, head_dim, device="cuda").to(dtype)
    extra = {"q_sink": torch.randn_like(q.float()).to(dtype)} if "sinks" in masks else {}
    shared = {"rows": rows, "starts": starts, "most_queries": max(counts)} | masks | extra
    splits = dice.choice([None, None, 1, 7])
    few = max(counts) * group <= 32
    ours = paged.paged_attention(q, k_pages, v_pages, tables, lens, **shared, splits=splits if few else None)
    again = paged.paged_attention(q, k_pages, v_pages, tables, lens, **shared, splits=splits if few else None)
    assert torch.equal(ours, again), f"{what}: differs from run to run"
    mine = tables[rows.long()]
    plain = [paged.gathered_attention_varlen(q, k_pages, v_pages, mine, lens, starts, **masks, **extra)]
    wide = {name: x.double() for name, x in extra.items()}
    exact = paged.gathered_attention_varlen(
        q.double(), k_pages.double(), v_pages.double(), mine, lens, starts, **masks, **wide
    )
    if dtype == torch.float32 and not extra:
        plain.append(_in_turn(q, k_pages, v_pages, mine, lengths, counts, masks))
    allowed = 2 if extra and dtype == torch.float32 else 1  # with sinks there is no second order of sums beside it
    ratio = excess(ours, plain, exact)
    return [f"{what}: error {ratio:.2f} times what is allowed"] if ratio > allowed else []


def _in_turn(q, k_pages, v_pages, tables, lengths, counts, masks):
    out, page = [], k_pages.shape[2]
    for part, table, n in zip(q.split(counts), tables, lengths, strict=True):
        pages = table[: -(-n // page)].long()
        k, v = (x[pages].transpose(0, 1).flatten(1, 2)[:, :n] for x in (k_pages, v_pages))
        out.append(attend_in_turn(part, k, v, **masks))
    return torch.cat(out)


def test_many_sequences_and_long_ones():
    """Grids as in serving: 200 ragged sequences on one hand, 40,000 keys in 128 shares on the other."""
    dice = random.Random(1)
    for lengths in ([dice.randint(1, 900) for _ in range(200)], [40_000, 3]):
        k_pages, v_pages, tables, rows, lens = problem(dice, lengths, 8, 64, 16, torch.bfloat16)
        q = torch.randn(len(lengths), 1, 32, 64, device="cuda").bfloat16()
        exact = paged.gathered_attention(q.double(), k_pages.double(), v_pages.double(), tables[rows.long()], lens)
        plain = paged.gathered_attention(q, k_pages, v_pages, tables[rows.long()], lens)
        for options in ({}, {"ragged": True}, {"splits": 128}):
            ours = paged.paged_attention(q, k_pages, v_pages, tables, lens, rows=rows, **options)
            assert excess(ours, [plain], exact) <= 1, (len(lengths), options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_and_writing(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

    tokens, heads, kv_heads, dim = 300, 12, 3, 80
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim, device="cuda").to(DTYPES[dtype])
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    angles = torch.arange(500, device="cuda")[:, None] * 0.8 ** torch.arange(dim // 2, device="cuda")
    cos, sin = (x.to(DTYPES[dtype]) for x in (angles.cos(), angles.sin()))
    positions = torch.randint(0, 500, (tokens,), device="cuda")
    slots = torch.randperm(40 * 16, device="cuda")[:tokens]
    slots[7] = -1
    pages = [torch.zeros(40, kv_heads, 16, dim, dtype=DTYPES[dtype], device="cuda") for _ in range(2)]
    rotated, sink = paged.rotate_and_write(q, k, v, *pages, slots, positions, cos, sin, 100)

    def wanted(at, kind):
        both = (x[at].repeat(1, 2).to(kind) for x in (cos, sin))
        return apply_rotary_pos_emb(q.to(kind), k.to(kind), *both, unsqueeze_dim=1)

    for ours, at in ((rotated, positions), (sink, positions.clamp(max=100))):
        assert excess(ours, [wanted(at, q.dtype)[0]], wanted(at, torch.float64)[0]) <= 1
    written = slots >= 0
    places = slots[written] // 16, slice(None), slots[written] % 16
    exact = wanted(positions, torch.float64)[1][written]
    assert excess(pages[0][places], [wanted(positions, q.dtype)[1][written]], exact) <= 1
    assert torch.equal(pages[1][places], v[written])
    assert pages[1].count_nonzero() <= written.sum() * kv_heads * dim

    x, residual = (torch.randn(70, 2048, device="cuda").to(DTYPES[dtype]) for _ in range(2))
    norm = LlamaRMSNorm(2048).to("cuda", DTYPES[dtype]).requires_grad_(False)
    total = x + residual
    out = kernels.rms_norm(x, norm.weight, norm.variance_epsilon, residual)
    assert torch.equal(residual, total)
    exact = total.double() * (total.double().pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    assert excess(out, [norm(total)], exact) <= 1
    gate, up = torch.randn(70, 6000, device="cuda").to(DTYPES[dtype]).chunk(2, dim=1)
    ours = kernels.silu_and_multiply(gate, up)
    assert excess(ours, [F.silu(gate) * up], F.silu(gate.double()) * up.double()) <= 1

    logits = torch.randn(70, 128256, device="cuda").to(DTYPES[dtype])
    newest, slots = torch.full((100,), -1, device="cuda"), torch.randperm(100, device="cuda")[:70].int()
    likeliest = logits.float().argmax(-1)
    assert torch.equal(kernels.greedy(logits, newest, slots), likeliest) and torch.equal(newest[slots], likeliest)
    assert (newest == -1).sum() == 30


# The engine.


@pytest.fixture(scope="module")
def model():
    return load_model("course-base", device="cuda", dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts():
    """200 prompts of 2 to 700 tokens of Python's library, in 20 families that share a beginning."""
    import argparse
    import typing

    dice, tokenizer = random.Random(7), load_tokenizer("course-base")
    text = "".join(inspect.getsource(module) for module in (argparse, inspect, random, typing))
    ids, made = tokenizer(text)["input_ids"], []
    for _ in range(20):
        start, shared = dice.randrange(len(ids) - 2000), dice.choice([1, 15, 16, 40, 130, 400])
        for _ in range(10):
            tail = dice.randrange(1500) + start
            made.append(ids[start : start + shared] + ids[tail : tail + dice.choice([1, 2, 7, 30, 100, 300])])
    dice.shuffle(made)
    return made


@pytest.fixture(scope="module")
def expected(model, prompts):
    """What transformers generates: in batches of 40, padded on the left."""
    texts = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for some in (order[i : i + 40] for i in range(0, len(order), 40)):
        longest = max(len(prompts[i]) for i in some)
        ids = torch.tensor([[0] * (longest - len(prompts[i])) + prompts[i] for i in some], device="cuda")
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in some], device="cuda")
        out = model.generate(ids, attention_mask=mask, max_new_tokens=48, do_sample=False)[:, longest:].tolist()
        stop, pad = model.generation_config.eos_token_id, model.generation_config.pad_token_id
        for i, tokens in zip(some, out, strict=True):
            end = tokens.index(stop) + 1 if stop in tokens else len(tokens)
            assert all(token == pad for token in tokens[end:])
            texts[i] = tokens[:end]
    return [texts[i] for i in range(len(prompts))]


def check_equal(model, prompts, outputs, expected):
    """Token for token. Where the two differ for the first time, transformers' own two best logits must be a tie."""
    ties = []
    for prompt, ours, theirs in zip(prompts, outputs, expected, strict=True):
        if ours == theirs:
            continue
        first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        assert first is not None, f"one ended earlier: {len(ours)} and {len(theirs)} tokens"
        logits = model(torch.tensor([prompt + theirs[:first]], device="cuda")).logits[0, -1].float()
        gap = (logits.max() - logits[[ours[first], theirs[first]]]).max().item()
        assert gap <= TIE, f"{len(prompt)} tokens: differs at token {first}, where the logits are {gap:.1e} apart"
        ties.append(gap)
    print(f"{len(prompts) - len(ties)} of {len(prompts)} equal, {len(ties)} parted at a tie {ties}")
    assert len(ties) <= len(prompts) // 50


@pytest.mark.parametrize("options", [
    {}, {"pages": 170, "chunk": 96, "max_batch": 64, "max_length": 800}, {"cuda_graphs": False, "lookahead": False},
    {"fused": False, "cuda_graphs": False, "max_batch": 40, "prefix_caching": False},
], ids=["all", "preempted and chunked", "eager", "plain"])  # fmt: skip
def test_200_prompts_give_what_transformers_generates(model, prompts, expected, options):
    engine = Engine(model, **options)
    outputs = engine.generate(prompts, SamplingParams(max_new_tokens=48))
    print(engine.stats)
    check_equal(model, prompts, [output.tokens for output in outputs], expected)
    assert (engine.stats.preemptions > 0) == ("pages" in options)
    assert (engine.stats.cached > 0) == options.get("prefix_caching", True)
    assert engine.manager.free_pages == engine.manager.pages and engine.unfinished == 0


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8}, {"temperature": 0.8, "top_k": 50, "top_p": 0.9}])
def test_cuda_graphs_give_what_eager_steps_give(model, prompts, sampling):
    asked = [SamplingParams(max_new_tokens=40, seed=i, stop_token_ids=(), **sampling) for i in range(11)]
    texts = []
    for graphs in (True, False):
        engine = Engine(model, cuda_graphs=graphs)
        if graphs:
            engine.warm_up(("greedy",))
        texts.append([o.tokens for o in engine.generate(prompts[:11], asked)])
    if sampling:  # a uniform number may fall where rounding moves the cumulative distribution
        assert sum(a != b for a, b in zip(*texts, strict=True)) <= 1
    else:
        check_equal(model, prompts[:11], *texts)


@pytest.mark.parametrize("options", [
    {}, {"pages": 170, "chunk": 96, "max_batch": 64, "max_length": 800}, {"cuda_graphs": False, "max_batch": 48},
    {"window": 100, "sinks": 4, "max_length": 800},
], ids=["all", "preempted and chunked", "eager", "window"])  # fmt: skip
def test_nothing_is_compiled_after_the_warm_up(model, prompts, monkeypatch, options):
    """A server's first requests must not wait for a compiler. Triton's own caches of kernels tell."""
    for kernel in KERNELS:
        monkeypatch.setattr(kernel, "device_caches", collections.defaultdict(kernel.create_binder))

    def compiled():
        return {kernel.fn.__name__: len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in KERNELS}

    engine = Engine(model, **options)
    engine.warm_up()
    warm = compiled()
    engine.generate(prompts, SamplingParams(max_new_tokens=12))
    assert all(warm.values()) and compiled() == warm


def test_all_sizes_are_recorded_on_one_stream(model):
    """For each stream that it meets, cuBLAS keeps a workspace: here at most as many as for four."""
    torch._C._cuda_clearCublasWorkspaces()
    engine = Engine(model, max_batch=256, max_length=512)
    engine.warm_up()
    assert len(engine.runner.sizes) > 20
    del engine
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch._C._cuda_clearCublasWorkspaces()
    assert 0 < before - torch.cuda.memory_allocated() <= 4 * 33 * 2**20


def test_a_seed_gives_the_same_text_whatever_is_served_beside_it(model, prompts):
    asked = SamplingParams(max_new_tokens=30, temperature=0.7, seed=5)
    alone = Engine(model).generate(prompts[:1], asked)[0].tokens
    crowd = Engine(model).generate(prompts[:30], asked)[0].tokens
    assert alone == crowd


def test_cancelled_requests_leave_the_others_alone(model, prompts, expected):
    engine = Engine(model, max_batch=48)
    requests = [engine.submit(prompt, SamplingParams(max_new_tokens=48)) for prompt in prompts[:90]]
    for number in itertools.count():
        if number % 3 == 0 and number // 3 < 30:
            engine.cancel(requests[number])
        if not engine.step():
            break
    kept = [i for i in range(90) if requests[i].reason != "cancelled"]
    assert len(kept) < 90 and any(requests[i].output for i in range(90) if i not in kept)
    check_equal(model, [prompts[i] for i in kept], [requests[i].output for i in kept], [expected[i] for i in kept])
    for i in set(range(90)) - set(kept):
        assert requests[i].output == expected[i][: len(requests[i].output)]
    assert engine.manager.free_pages == engine.manager.pages


def test_half_precision_is_as_exact_as_transformers(prompts):
    """Logits of ragged chunks in bfloat16 beside float32, by the rule."""
    wide = load_model("course-base", device="cuda", dtype=torch.float32)
    half = load_model("course-base", device="cuda", dtype=torch.bfloat16)
    plain = [half(torch.tensor([prompt], device="cuda")).logits[0] for prompt in prompts[:12]]
    inner = PagedModel(half, max_length=1024)
    manager, cache = BlockManager(800, 16), inner.cache(800)
    sequences, pieces = [Sequence(manager) for _ in range(12)], [[] for _ in range(12)]
    for start, end in ((0, 1), (1, 9), (9, 150), (150, 151), (151, 1024)):
        chosen = [i for i in range(12) if len(prompts[i]) > start]
        if not chosen:
            continue
        tokens = [prompts[i][start:end] for i in chosen]
        for i, new in zip(chosen, tokens, strict=True):
            sequences[i].append(len(new))
        hidden = inner.forward(Batch.of([sequences[i] for i in chosen], tokens, "cuda"), cache)
        for i, part in zip(chosen, inner.logits(hidden).split([len(new) for new in tokens]), strict=True):
            pieces[i].append(part)
    with torch.no_grad():
        for prompt, ours, theirs in zip(prompts, pieces, plain, strict=False):
            exact = wide(torch.tensor([prompt], device="cuda")).logits[0].double()
            assert excess(torch.cat(ours), [theirs], exact) <= 1


def test_sinks_in_kernels_and_in_plain_pytorch(model, prompts):
    long = max(prompts, key=len)
    texts = []
    for fused in (True, False):
        engine = Engine(model, window=100, sinks=4, max_length=4000, chunk=64, fused=fused, cuda_graphs=fused)
        params = SamplingParams(max_new_tokens=300, stop_token_ids=())
        texts.append([o.tokens for o in engine.generate([long, prompts[0]], params)])
        assert engine.manager.free_pages == engine.manager.pages
    same = [sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*pair, strict=True)))
            for pair in zip(*texts, strict=True)]  # fmt: skip
    assert min(same) >= 200, same  # over 300 tokens two orders of sums may part at a tie


def test_layers_that_are_not_plain_are_called_as_they_are(model, prompts, expected):
    """A subclass of nn.Linear, as LoRA's or a quantized one, is not put beside others."""
    changed = load_model("course-base", device="cuda", dtype=torch.float32)

    class Mine(torch.nn.Linear):
        pass

    for layer in changed.model.layers[::2]:
        layer.self_attn.k_proj.__class__ = Mine
        layer.mlp.up_proj.__class__ = Mine
    outputs = Engine(changed, max_batch=16).generate(prompts[:16], SamplingParams(max_new_tokens=48))
    check_equal(model, prompts[:16], [o.tokens for o in outputs], expected[:16])
