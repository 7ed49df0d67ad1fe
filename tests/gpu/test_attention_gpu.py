"""Flash attention, compiled: random shapes of every form beside float64, determinism, memory, training, peers."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from plain import in_turn
from torch.nn import functional as F

import effnlp_lab.attention as room

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
MASKS = (
    {},
    {"causal": True},
    {"causal": True, "window": 33},
    {"window": 100},
    {"causal": True, "window": 50, "global_tokens": 7},
    {"window": 40, "global_tokens": 70},
)
SHAPES_A_GROUP = 36
HEAD_DIMS = (32, 64, 80, 128, 256)


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that a kernel should have written, and did not, holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape, dtype, grad=True):
    return torch.randn(*shape, device="cuda").to(dtype).requires_grad_(grad)


def gradients(function, tensors, weight):
    out = function(*tensors)
    return out, *torch.autograd.grad((out.to(weight.dtype) * weight).sum(), tensors)


def excess(ours, plain, exact):
    """Error over what the rule allows: twice the error of plain PyTorch in the same dtype (the worst of `plain`), the
    reference's rounding, and one eps of its range. At most 1 where the rule holds."""
    assert ours.dtype == plain[0].dtype and ours.shape == exact.shape and ours.isfinite().all()
    if not exact.numel():
        return 0.0
    error, *errors = ((x.double() - exact).abs().max().item() for x in (ours, *plain))
    rounding = (exact.to(ours.dtype).double() - exact).abs().max().item()
    return error / (2 * max(errors) + rounding + torch.finfo(ours.dtype).eps * exact.abs().max().item() + 1e-300)


def assert_close(ours, plain, exact, what):
    ratio = excess(ours, [plain], exact)
    assert ratio <= 1, f"{what}: error {ratio:.2f} times what is allowed"


class Recomputed(torch.autograd.Function):
    """Attention in plain PyTorch in the order of any flash attention (Dao 2023), with all the scores in memory.

    Products are added in turn, the gradient of a key over the queries of all heads that share it, and the backward
    makes the weights again from the log-sum-exp. In float32 each brings more rounding, some eps, than a library's
    products and autograd through a softmax.
    """

    @staticmethod
    def forward(ctx, q, k, v, masks):
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        keep = room.visible(q.shape[2], k.shape[2], **masks, device=q.device)
        scores = in_turn(q, k.mT) * q.shape[-1] ** -0.5
        lse = scores.masked_fill(~keep, -torch.inf).logsumexp(-1)
        out = in_turn((scores - lse[..., None]).exp().masked_fill(~keep, 0.0), v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.group, ctx.keep = group, keep
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        weights = (in_turn(q, k.mT) * scale - lse[..., None]).exp().masked_fill(~ctx.keep, 0.0)
        dscores = weights * (in_turn(dout, v.mT) - (dout * out).sum(-1, keepdim=True)) * scale
        shared = [x.unflatten(1, (-1, ctx.group)).flatten(2, 3) for x in (dscores, q, weights, dout)]
        return in_turn(dscores, k), in_turn(shared[0].mT, shared[1]), in_turn(shared[2].mT, shared[3]), None


def recomputed_varlen(q, k, v, cu_q, cu_k, **masks):
    pieces = []
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True):
        part = [x[None].transpose(1, 2) for x in (q[q0:q1], k[k0:k1], v[k0:k1])]
        pieces.append(Recomputed.apply(*part, masks)[0].transpose(0, 1))
    return torch.cat(pieces)


def compare(ours, standard, recomputed, tensors, what):
    """What breaks the rule, as sentences. In float32 plain PyTorch adds in two orders, and the worse one counts."""
    weight = torch.randn_like(tensors[0], dtype=torch.float32)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    torch.backends.cuda.matmul.allow_tf32 = False
    first, again = (gradients(ours, tensors, weight) for _ in range(2))
    plain = [gradients(standard, tensors, weight)]
    if tensors[0].dtype == torch.float32:
        plain.append(gradients(recomputed, tensors, weight))
    right, broken = gradients(standard, exact, weight.double()), []
    for name, a, b, c, *others in zip(("out", "dq", "dk", "dv"), first, again, right, *plain, strict=True):
        assert torch.equal(a, b), f"{what}: {name} differs from run to run"
        ratio = excess(a, others, c)
        if ratio > 1:
            broken.append(f"{what} {name}: error {ratio:.2f} times what is allowed")
    return broken


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_shapes(dtype, head_dim):
    """15 groups of 36 shapes: 540 in all. Of the six masks a group takes four, so that it compiles fewer kernels."""
    group = list(DTYPES).index(dtype) + HEAD_DIMS.index(head_dim)
    masks = [MASKS[(group + i) % len(MASKS)] for i in (0, 1, 3, 4)]
    dice = random.Random(f"{dtype} {head_dim}")
    torch.manual_seed(group)
    broken = []
    for i in range(SHAPES_A_GROUP):
        form = ("equal", "one query", "few queries", "more queries", "ragged", "ragged")[i % 6]
        kwargs = masks[(i // 6) % (2 if form == "ragged" else 4)]
        kv_heads, share = dice.choice([(1, 1), (2, 1), (1, 4), (2, 3)])
        if form == "ragged":
            broken += _ragged(dice, kv_heads * share, kv_heads, head_dim, DTYPES[dtype], kwargs)
        else:
            broken += _dense(form, dice, kv_heads * share, kv_heads, head_dim, DTYPES[dtype], kwargs)
    assert not broken, "\n".join(broken)


def _dense(form, dice, heads, kv_heads, head_dim, dtype, masks):
    length_k = dice.choice([1, 17, 64, 128, 129, 200, 255, 256, 333, 511])
    length_q = {
        "equal": length_k,
        "one query": 1,
        "few queries": dice.randint(1, length_k),
        "more queries": length_k + dice.randint(1, 90),
    }[form]
    batch = dice.choice([1, 2])
    q = draw(batch, heads, length_q, head_dim, dtype=dtype)
    if dice.random() < 0.5:  # as a model has it: heads inside, rows of all heads together
        q = q.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    k, v = (draw(batch, kv_heads, length_k, head_dim, dtype=dtype) for _ in range(2))
    if length_k == 1 and not masks.get("causal"):
        masks = masks | {"causal": True}  # one key: gradients of q and k are exactly zero, and plain PyTorch's are too
    if length_k == 1:
        return _only_outputs(q, k, v, masks)
    return compare(
        lambda *x: room.flash_attention(*x, **masks),
        lambda *x: room.standard_attention(*x, **masks),
        lambda *x: Recomputed.apply(*x, masks),
        (q, k, v),
        f"{form} {tuple(q.shape)} {tuple(k.shape)} {masks}",
    )


def _only_outputs(q, k, v, masks):
    ours, plain = room.flash_attention(q, k, v, **masks), room.standard_attention(q, k, v, **masks)
    ratio = excess(ours, [plain], room.standard_attention(*(x.double() for x in (q, k, v)), **masks))
    return [f"one key: error {ratio:.2f} times what is allowed"] if ratio > 1 else []


def _ragged(dice, heads, kv_heads, head_dim, dtype, masks):
    lengths_k = [dice.choice([0, 1, 5, 64, 100, 128, 200]) for _ in range(5)] + [129]
    lengths_q = [dice.choice([0, n, n, min(n, 3), n + 20]) for n in lengths_k[:-1]] + [129]
    cu_q, cu_k = (torch.tensor([0, *itertools.accumulate(n)], device="cuda") for n in (lengths_q, lengths_k))
    q = draw(sum(lengths_q), heads, head_dim, dtype=dtype)
    k, v = (draw(sum(lengths_k), kv_heads, head_dim, dtype=dtype) for _ in range(2))
    return compare(
        lambda *x: room.flash_attention_varlen(*x, cu_q, cu_k, **masks),
        lambda *x: room.standard_attention_varlen(*x, cu_q, cu_k, **masks),
        lambda *x: recomputed_varlen(*x, cu_q, cu_k, **masks),
        (q, k, v),
        f"ragged {lengths_q} {lengths_k} {heads}/{kv_heads} {masks}",
    )


def test_other_sequences_and_rows_past_the_end_are_never_read():
    """NaN in a neighbouring sequence, in unused memory after the tensors or in another head must not spread."""
    x = torch.full((3, 300, 2, 64), float("nan"), device="cuda", dtype=torch.bfloat16)
    x[:, 100:170] = torch.randn(3, 70, 2, 64, device="cuda").bfloat16()
    q, k, v = (t[100:170].transpose(0, 1)[None].detach().requires_grad_() for t in x)
    out = room.flash_attention(q, k, v, causal=True)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(t.isfinite().all() for t in (out, *grads))
    edges = torch.tensor([0, 100, 170, 300])
    packed = room.flash_attention_varlen(*x, edges, edges, causal=True)
    assert torch.equal(packed[100:170].transpose(0, 1)[None], out)


def test_large_scores_do_not_overflow():
    q, k, v = (draw(1, 2, 300, 64, dtype=torch.bfloat16) for _ in range(3))
    q, k = (q * 300).detach().requires_grad_(), (k * 300).detach().requires_grad_()
    out, *grads = gradients(lambda *x: room.flash_attention(*x, causal=True), (q, k, v), torch.ones_like(q))
    exact = room.standard_attention(*(x.double() for x in (q, k, v)), causal=True)
    plain = room.standard_attention(q, k, v, causal=True)
    assert_close(out, plain, exact, "large scores")
    assert all(g.isfinite().all() for g in grads)


def test_equal_to_flash_attn_with_its_own_windows():
    """flash-attn counts the neighbours: our window of 64 keys is its (63, 0)."""
    flash_attn = pytest.importorskip("flash_attn")
    q, k, v = (draw(2, n, 500, 128, dtype=torch.bfloat16, grad=False) for n in (8, 2, 2))
    theirs = flash_attn.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True, window_size=(63, 0))
    torch.testing.assert_close(
        room.flash_attention(q, k, v, causal=True, window=64), theirs.transpose(1, 2), rtol=0, atol=0.02
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", (64, 128, 256))
def test_decoding(dtype, head_dim):
    torch.manual_seed(head_dim)
    for kv_heads, share, queries, capacity in ((8, 4, 1, 5000), (2, 8, 4, 700), (1, 1, 1, 65), (4, 1, 8, 3000)):
        lengths = torch.tensor([capacity, capacity // 3 + queries, queries], device="cuda")
        q = draw(3, kv_heads * share, queries, head_dim, dtype=DTYPES[dtype], grad=False)
        k, v = (draw(3, kv_heads, capacity, head_dim, dtype=DTYPES[dtype], grad=False) for _ in range(2))
        for i, n in enumerate(lengths.tolist()):  # rows past a sequence's length are not to be read
            k[i, :, n:], v[i, :, n:] = float("nan"), float("nan")
        for window in (None, 200):
            ours = room.flash_decode(q, k, v, lengths, window=window)
            assert torch.equal(ours, room.flash_decode(q, k, v, lengths, window=window))
            for i, n in enumerate(lengths.tolist()):
                one = [x[i : i + 1] for x in (q, k[:, :, :n], v[:, :, :n])]
                masks = {"causal": True, "window": window}
                plain = [room.standard_attention(*one, **masks)]
                if dtype == "fp32":
                    plain.append(Recomputed.apply(*one, masks))
                exact = room.standard_attention(*(x.double() for x in one), **masks)
                ratio = excess(ours[i : i + 1], plain, exact)
                assert ratio <= 1, f"decode {capacity} {n} {window}: error {ratio:.2f} times what is allowed"


def test_memory_is_linear_in_the_length():
    def peak(length):
        q, k, v = (draw(1, 2, length, 64, dtype=torch.bfloat16) for _ in range(3))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        room.flash_attention(q, k, v, causal=True).backward(torch.ones_like(q))
        return torch.cuda.max_memory_allocated() - before

    peak(1024)
    sizes = {n: peak(n) for n in (32 << 10, 64 << 10, 128 << 10)}
    assert sizes[128 << 10] < 2.1 * sizes[64 << 10] < 4.4 * sizes[32 << 10]
    assert sizes[128 << 10] < 12 * (
        2 * (128 << 10) * 64 * 2
    )  # a dozen tensors like q; one head's scores would be 34 GB


@pytest.mark.parametrize("autocast,slack", ((False, 0.02), (True, 0.05)))
def test_a_llama_trains_to_the_same_loss(autocast, slack):
    """On the bytes of Python's library our curve differs from SDPA's hardly more than those of SDPA's own backends."""
    transformers = pytest.importorskip("transformers")
    name = room.register_with_transformers()
    text = torch.frombuffer(bytearray(library_text()), dtype=torch.uint8).long()
    backends = torch.nn.attention.SDPBackend
    curves = {}
    for run, backend in (("fused", backends.EFFICIENT_ATTENTION), ("math", backends.MATH), (name, backends.MATH)):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=4, attn_implementation=name if run == name else "sdpa",
        )  # fmt: skip
        net = transformers.LlamaForCausalLM(config).to("cuda")
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(1)
        losses = []
        for _ in range(200):
            starts = torch.randint(0, len(text) - 256, (16, 1), generator=generator)
            ids = text[starts + torch.arange(256)].cuda()
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast), torch.nn.attention.sdpa_kernel(backend):
                loss = net(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        curves[run] = torch.stack(losses).float().unfold(0, 20, 20).mean(1).cpu()
    own = (curves["fused"] - curves["math"]).abs().max()
    ours = (curves["math"] - curves[name]).abs().max()
    assert curves[name][-1] < curves[name][0] - 0.5, curves
    assert ours <= 2 * own + slack, (ours, own, curves)


def library_text():
    import argparse
    import inspect
    import typing

    return "".join(inspect.getsource(module) for module in (argparse, inspect, typing, random)).encode()


def test_a_llama_generates_the_same_text():
    transformers = pytest.importorskip("transformers")
    name = room.register_with_transformers()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="sdpa", pad_token_id=0, eos_token_id=255,
    )  # fmt: skip
    net = transformers.LlamaForCausalLM(config).cuda().eval()
    ids = torch.randint(1, 255, (3, 40), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :25] = 0
    texts = {}
    for implementation in ("sdpa", name):
        net.set_attn_implementation(implementation)
        texts[implementation] = net.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False)
    assert torch.equal(texts["sdpa"], texts[name])


def test_patterns_and_twins_on_the_gpu():
    q, k, v = (draw(2, n, 300, 64, dtype=torch.float32) for n in (4, 2, 2))
    exact = [x.detach().double() for x in (q, k, v)]
    dilated = {"window": 9, "dilation": 4, "causal": True}
    ours = room.dilated_window_attention(q, k, v, **dilated)
    torch.testing.assert_close(ours.double(), room.standard_attention(*exact, **dilated), rtol=1e-4, atol=1e-5)
    out, lse = room.tiled_forward(q, k, v, causal=True)
    flash, flash_lse = room.flash_attention(q, k, v, causal=True, return_lse=True)
    torch.testing.assert_close(flash, out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(flash_lse, lse, rtol=1e-4, atol=1e-5)


def test_beside_torchs_own_attention_at_full_size():
    q, k, v = (draw(2, 16, 4096, 128, dtype=torch.bfloat16) for _ in range(3))
    weight = torch.randn_like(q)
    ours = gradients(lambda *x: room.flash_attention(*x, causal=True), (q, k, v), weight)
    theirs = gradients(lambda *x: F.scaled_dot_product_attention(*x, is_causal=True), (q, k, v), weight)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).float().norm() / b.float().norm() < 0.01
