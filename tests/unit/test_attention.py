"""The attention room on the CPU: definitions against torch's own attention, kernels in Triton's interpreter."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

import effnlp_lab.attention as room
from effnlp_lab.attention import configurations

MASKS = (
    {},
    {"causal": True},
    {"causal": True, "window": 9},
    {"window": 9},
    {"causal": True, "window": 20, "global_tokens": 5},
    {"window": 20, "global_tokens": 5},
)


def draw(*shape, dtype=torch.float64, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def qkv(batch=1, heads=2, kv_heads=1, length_q=37, length_k=53, dim=32, dtype=torch.float64):
    q = draw(batch, heads, length_q, dim, dtype=dtype, seed=1)
    return q, *(draw(batch, kv_heads, length_k, dim, dtype=dtype, seed=s) for s in (2, 3))


def gradients(function, tensors, weight):
    out = function(*tensors)
    return out, *torch.autograd.grad((out * weight.to(out.dtype)).sum(), tensors)


def close(ours, plain, exact, what=""):
    """The kit's rule: twice plain PyTorch's error in the same dtype, the reference's rounding, one eps of its range."""
    assert ours.dtype == plain.dtype and ours.shape == exact.shape
    if not exact.numel():
        return
    eps = torch.finfo(ours.dtype).eps
    error, allowed = (ours.double() - exact).abs().max(), 2 * (plain.double() - exact).abs().max()
    rounding = (exact.to(ours.dtype).double() - exact).abs().max()
    assert error <= allowed + rounding + eps * exact.abs().max(), f"{what}: error {error:.1e}, allowed {allowed:.1e}"


def check_like_standard(function, tensors, **masks):
    """Output and gradients of `function` beside standard attention in float64 and in the tensors' own dtype."""
    weight = draw(*tensors[0].shape, seed=9, grad=False)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    results = (
        gradients(lambda *x: function(*x, **masks), tensors, weight),
        gradients(lambda *x: room.standard_attention(*x, **masks), tensors, weight),
        gradients(lambda *x: room.standard_attention(*x, **masks), exact, weight),
    )
    for name, ours, plain, right in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        close(ours, plain, right, f"{name} {masks} {[tuple(x.shape) for x in tensors]}")


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles in a small problem, and tiles that are not square."""
    monkeypatch.setattr(configurations, "INTERPRETED", configurations.Tile(16, 32, 1, 1))


# The definition.


@pytest.mark.parametrize("length_q,length_k", [(37, 37), (1, 20), (20, 53)])
@pytest.mark.parametrize("masks", MASKS)
def test_standard_attention_is_torchs_attention(length_q, length_k, masks):
    q, k, v = qkv(length_q=length_q, length_k=length_k, heads=4, kv_heads=2)
    keep = torch.tensor(
        [[_sees(i + length_k - length_q, j, **masks) for j in range(length_k)] for i in range(length_q)]
    )
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=True)
    torch.testing.assert_close(room.standard_attention(q, k, v, **masks), wanted)


def _sees(position, key, causal=False, window=None, global_tokens=0):
    """The masks in words, one pair at a time."""
    if causal and key > position:
        return False
    if window is None or key < global_tokens or position < global_tokens:
        return True
    return key in range(position - window + 1, position + (1 if causal else window))


def test_a_window_keeps_as_many_keys_as_it_says():
    assert room.visible(10, 10, causal=True, window=3).sum(1).tolist() == [1, 2] + [3] * 8
    dilated = room.visible(10, 10, causal=True, window=3, dilation=2)
    assert dilated[9].nonzero().flatten().tolist() == [5, 7, 9]


def test_queries_that_see_nothing_give_zeros():
    q, k, v = qkv(length_q=8, length_k=3)
    out, lse = room.standard_attention(q, k, v, causal=True, return_lse=True)
    assert (out[:, :, :5] == 0).all() and (lse[:, :, :5] == float("-inf")).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_bytes_of_standard_attention_grow_with_the_square():
    small, large = (room.standard_attention_bytes(1, 1, n, 64, 2) for n in (1024, 2048))
    assert small == 4 * 1024 * 64 * 2 + 4 * 1024 * 1024 * 2 and 3 < large / small < 4
    assert room.standard_attention_bytes(1, 1, 2048, 64, 2, tiles_only=True) == 4 * 2048 * 64 * 2


# Online softmax, tiles, chunks, linear attention: plain PyTorch.


def test_online_softmax_is_softmax():
    x = torch.cat([draw(5, 200) * 30, torch.full((1, 200), float("-inf"), dtype=torch.float64)])
    x[0, 3] = 700.0
    for block in (1, 7, 64, 500):
        ours = room.one_pass_softmax(x, block)
        torch.testing.assert_close(ours[:5], x[:5].softmax(-1))
        assert (ours[5] == 0).all()


def test_merged_partials_are_the_whole():
    q, k, v = qkv()
    parts = [room.standard_attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(0, 20), slice(20, 53))]
    out, lse = room.merge_partials(*parts[0], *parts[1])
    wanted, wanted_lse = room.standard_attention(q, k, v, return_lse=True)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse)
    nothing = torch.zeros_like(out), torch.full_like(lse, float("-inf"))
    assert room.merge_partials(*nothing, *nothing)[0].isfinite().all()
    torch.testing.assert_close(room.merge_partials(*nothing, wanted, wanted_lse)[0], wanted)


@pytest.mark.parametrize("masks", MASKS[:4])
@pytest.mark.parametrize("length_q,length_k", [(37, 53), (53, 37), (1, 70)])
def test_the_pytorch_twin_is_standard_attention(masks, length_q, length_k):
    q, k, v = qkv(length_q=length_q, length_k=length_k, heads=4, kv_heads=2)
    out, lse = room.tiled_forward(q, k, v, block_m=16, block_n=8, **masks)
    wanted, wanted_lse = room.standard_attention(q, k, v, return_lse=True, **masks)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse)
    weight = draw(*out.shape, seed=5, grad=False)
    grads = room.tiled_backward(q, k, v, out, lse, weight, block_m=16, block_n=8, **masks)
    for ours, right in zip(grads, torch.autograd.grad(wanted, (q, k, v), weight), strict=True):
        torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("masks", MASKS[:4])
@pytest.mark.parametrize("length_q,length_k", [(37, 53), (53, 37), (0, 5)])
def test_chunked_attention_is_standard_attention(masks, length_q, length_k):
    q, k, v = qkv(length_q=length_q, length_k=length_k, heads=4, kv_heads=2)
    weight = draw(*q.shape, seed=5, grad=False)
    ours = gradients(lambda *x: room.chunked_attention(*x, query_chunk=10, key_chunk=16, **masks), (q, k, v), weight)
    wanted = gradients(lambda *x: room.standard_attention(*x, **masks), (q, k, v), weight)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_linear_attention_is_its_definition():
    q, k, v = draw(2, 3, 50, 8, seed=1), draw(2, 3, 50, 8, seed=2), draw(2, 3, 50, 5, seed=3)
    weights = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
    for causal in (False, True):
        w = weights.tril() if causal else weights
        torch.testing.assert_close(
            room.linear_attention(q, k, v, causal=causal, chunk=16), w @ v / w.sum(-1, keepdim=True)
        )
    state, steps = None, []
    for i in range(50):
        out, state = room.linear_attention_step(state, q[:, :, i], k[:, :, i], v[:, :, i])
        steps.append(out)
    torch.testing.assert_close(torch.stack(steps, 2), room.linear_attention(q, k, v, causal=True))


# The kernels, in the interpreter.


@pytest.mark.parametrize("masks", MASKS)
def test_flash_attention_is_standard_attention(masks, small_tiles):
    check_like_standard(room.flash_attention, qkv(length_q=45, length_k=70, dtype=torch.float32), **masks)


@pytest.mark.parametrize(
    "shape",
    [
        dict(length_q=1, length_k=100, dim=40),  # decoding, and a head dimension that is no power of two
        dict(length_q=70, length_k=33),  # queries that see nothing
        dict(batch=2, heads=4, kv_heads=2, length_q=20, length_k=20, dim=64),
        dict(length_q=64, length_k=64, heads=1),
        dict(length_q=5, length_k=3, dim=8),
    ],
)
def test_flash_attention_takes_odd_shapes(shape, small_tiles):
    check_like_standard(room.flash_attention, qkv(dtype=torch.float32, **shape), causal=True)


def test_one_key_takes_all_the_weight(small_tiles):
    q, k, v = qkv(length_q=5, length_k=1, dtype=torch.float32)
    out = room.flash_attention(q, k, v)
    torch.testing.assert_close(out, v.expand(1, 2, 5, 32))
    dq, dk = torch.autograd.grad(out.sin().sum(), (q, k))
    assert dq.abs().max() < 1e-5 and dk.abs().max() < 1e-5  # nothing to choose between


def test_flash_attention_in_half_precision(small_tiles):
    check_like_standard(room.flash_attention, qkv(dtype=torch.float16), causal=True)


def test_flash_attention_reads_any_strides(small_tiles):
    q, k, v = (
        x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in qkv(dtype=torch.float32)
    )
    check_like_standard(room.flash_attention, (q, k, v), causal=True)
    wide = draw(1, 2, 37, 66, dtype=torch.float32)[..., 1:33]  # rows that start at odd addresses
    check_like_standard(room.flash_attention, (wide.detach().requires_grad_(), k, v))
    room.flash_attention(q, k, v).sum().backward()  # a gradient that is one number, expanded
    assert q.grad is not None and q.grad.isfinite().all()


def test_the_log_sum_exp_carries_gradients(small_tiles):
    tensors = qkv(dtype=torch.float32)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    out, lse = room.flash_attention(*tensors, causal=True, return_lse=True)
    wanted_out, wanted = room.standard_attention(*exact, causal=True, return_lse=True)
    torch.testing.assert_close(lse.double(), wanted, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad((lse.sin() + out.sum(-1)).sum(), tensors)
    for a, b in zip(ours, torch.autograd.grad((wanted.sin() + wanted_out.sum(-1)).sum(), exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


LENGTHS = ((7, 40, 0, 33), (20, 40, 5, 0))


@pytest.mark.parametrize("masks", ({"causal": True}, {"window": 9}, {"causal": True, "window": 12, "global_tokens": 3}))
def test_ragged_batches(masks, small_tiles):
    """Sequences of different lengths, empty ones on either side too."""
    cu_q, cu_k = (torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32) for lengths in LENGTHS)
    tensors = (
        draw(int(cu_q[-1]), 2, 32, dtype=torch.float32, seed=1),
        *(draw(int(cu_k[-1]), 1, 32, dtype=torch.float32, seed=s) for s in (2, 3)),
    )
    exact = [x.detach().double().requires_grad_() for x in tensors]
    weight = draw(*tensors[0].shape, seed=9, grad=False)
    ours = gradients(lambda *x: room.flash_attention_varlen(*x, cu_q, cu_k, **masks), tensors, weight)
    plain = gradients(lambda *x: room.standard_attention_varlen(*x, cu_q, cu_k, **masks), tensors, weight)
    right = gradients(lambda *x: room.standard_attention_varlen(*x, cu_q, cu_k, **masks), exact, weight)
    for a, b, c in zip(ours, plain, right, strict=True):
        close(a, b, c, str(masks))


def test_empty_lengths_give_empty_and_zero():
    q, k, v = qkv(length_q=0, length_k=5, dtype=torch.float32)
    assert room.flash_attention(q, k, v).shape == (1, 2, 0, 32)
    q, k, v = qkv(length_q=5, length_k=0, dtype=torch.float32)
    out = room.flash_attention(q, k, v)
    assert (out == 0).all()
    out.sum().backward()
    assert (q.grad == 0).all() and k.grad.shape == k.shape


@pytest.mark.parametrize("dilation,causal,length_q", [(3, True, 40), (2, False, 40), (4, True, 2), (1, True, 33)])
def test_dilated_windows(dilation, causal, length_q, small_tiles):
    tensors = qkv(batch=2, length_q=length_q, length_k=40, dtype=torch.float32)
    masks = {"window": 5, "dilation": dilation, "causal": causal}
    check_like_standard(room.dilated_window_attention, tensors, **masks)


def test_sliding_windows_with_global_tokens(small_tiles):
    tensors = qkv(dtype=torch.float32)
    check_like_standard(room.sliding_window_attention, tensors, window=6, global_tokens=4, causal=True)


@pytest.mark.parametrize("splits", (None, 1, 3, 50))
def test_flash_decoding(splits, monkeypatch):
    monkeypatch.setattr(configurations, "INTERPRETED", configurations.Tile(64, 16, 1, 1))
    with torch.no_grad():
        q, k, v = qkv(batch=3, heads=6, kv_heads=2, length_q=2, length_k=90, dtype=torch.float32)
        lengths = torch.tensor([90, 17, 2])
        for window in (None, 20):
            ours = room.flash_decode(q, k, v, lengths, splits=splits, window=window)
            for i, n in enumerate(lengths.tolist()):
                one = slice(i, i + 1)
                right = room.standard_attention(
                    *(x.double() for x in (q[one], k[one, :, :n], v[one, :, :n])), causal=True, window=window
                )
                torch.testing.assert_close(ours[one].double(), right, rtol=1e-5, atol=1e-5)
        assert (room.flash_decode(q, k, v, torch.zeros(3, dtype=torch.int32)) == 0).all()


# Refusals: one sentence, before any kernel.


def f32(*shape):
    return torch.zeros(*shape, dtype=torch.float32)


BAD = {
    "heads": ((f32(1, 3, 8, 32), f32(1, 2, 8, 32), f32(1, 2, 8, 32)), {}, ValueError, "evenly"),
    "no heads": ((f32(1, 0, 8, 32), f32(1, 0, 8, 32), f32(1, 0, 8, 32)), {}, ValueError, "at least one"),
    "head dimension": ((f32(1, 1, 8, 300),) * 3, {}, ValueError, "multiple of 8"),
    "odd head dimension": ((f32(1, 1, 8, 33),) * 3, {}, ValueError, "multiple of 8"),
    "head dimensions differ": ((f32(1, 1, 8, 32), f32(1, 1, 8, 64), f32(1, 1, 8, 64)), {}, ValueError, "equal"),
    "k and v differ": ((f32(1, 1, 8, 32), f32(1, 1, 8, 32), f32(1, 1, 9, 32)), {}, ValueError, "one shape"),
    "dtypes differ": ((f32(1, 1, 8, 32), f32(1, 1, 8, 32).half(), f32(1, 1, 8, 32)), {}, TypeError, "one dtype"),
    "integers": ((f32(1, 1, 8, 32).int(),) * 3, {}, TypeError, "float16"),
    "float64": ((f32(1, 1, 8, 32).double(),) * 3, {}, TypeError, "float16"),
    "devices differ": (
        (f32(1, 1, 8, 32), *(torch.zeros(1, 1, 8, 32, device="meta"),) * 2),
        {},
        ValueError,
        "one device",
    ),
    "meta": ((torch.zeros(1, 1, 8, 32, device="meta"),) * 3, {}, ValueError, "tiled_forward"),
    "bfloat16": ((f32(1, 1, 8, 32).bfloat16(),) * 3, {}, ValueError, "bfloat16"),
    "empty batch": ((f32(0, 1, 8, 32),) * 3, {}, ValueError, "at least 1"),
    "batches differ": ((f32(2, 1, 8, 32), f32(1, 1, 8, 32), f32(1, 1, 8, 32)), {}, ValueError, "equal"),
    "3 dimensions": ((f32(1, 8, 32),) * 3, {}, ValueError, "dimensions"),
    "a list": (([1.0], f32(1, 1, 8, 32), f32(1, 1, 8, 32)), {}, TypeError, "torch.Tensor"),
    "window 0": ((f32(1, 1, 8, 32),) * 3, {"window": 0}, ValueError, "1 or more"),
    "window 2.5": ((f32(1, 1, 8, 32),) * 3, {"window": 2.5}, ValueError, "1 or more"),
    "scale": ((f32(1, 1, 8, 32),) * 3, {"scale": -1.0}, ValueError, "positive"),
    "globals alone": ((f32(1, 1, 8, 32),) * 3, {"global_tokens": 3}, ValueError, "window"),
    "causal": ((f32(1, 1, 8, 32),) * 3, {"causal": "yes"}, TypeError, "True or False"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_a_sentence(name, monkeypatch):
    from effnlp_lab.attention import flash

    monkeypatch.setattr(flash, "_launch", lambda *_, **__: pytest.fail("a kernel was started"))
    tensors, masks, kind, word = BAD[name]
    with pytest.raises(kind, match=word) as caught:
        room.flash_attention(*tensors, **masks)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "cu_q,cu_k,kind,word",
    [
        ([0, 5, 10], [0, 10], ValueError, "agree"),
        ([0, 5, 9], [0, 5, 10], ValueError, "rows of q"),
        ([1, 5, 10], [0, 5, 10], ValueError, "from 1"),
        ([0, 12, 10], [0, 5, 10], ValueError, "falls"),
        ([0], [0], ValueError, "at least one"),
        ([0.0, 10.0], [0, 10], TypeError, "int32"),
    ],
)
def test_bad_cumulative_lengths_get_a_sentence(cu_q, cu_k, kind, word):
    x = f32(10, 2, 32)
    with pytest.raises(kind, match=word):
        room.flash_attention_varlen(x, x, x, torch.tensor(cu_q), torch.tensor(cu_k))


def test_decoding_refuses_what_it_cannot_take():
    q, k = f32(1, 8, 9, 32), f32(1, 1, 20, 32)
    with pytest.raises(ValueError, match="flash_attention"):
        room.flash_decode(q, k, k)
    with pytest.raises(TypeError, match="lengths"):
        room.flash_decode(q[:, :, :1], k, k, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="at least 1"):
        room.flash_decode(q[:, :, :1], k, k, splits=0)


def test_every_architecture_has_a_tile():
    for capability, arch in {
        (7, 5): 75,
        (8, 0): 80,
        (8, 6): 86,
        (8, 9): 86,
        (9, 0): 90,
        (10, 0): 90,
        (12, 0): 86,
    }.items():
        assert configurations.architecture(capability) == arch
    for (_, _, block_d), tiles in configurations.table().items():
        assert block_d in (32, 64, 128, 256)
        assert all(128 % tiles[name].queries == 0 for name in ("forward", "dkdv", "dq"))  # padded_start relies on it
