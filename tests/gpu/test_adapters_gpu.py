"""NF4 kernels compiled, beside PyTorch, float64 and bitsandbytes; adapters on NF4 and dense bases on a card."""

from __future__ import annotations

import pytest
import torch
from plain import in_turn
from torch import nn
from torch.nn import functional as F

from effnlp_lab import adapters
from effnlp_lab.adapters import launch_nf4, nf4
from effnlp_lab.course.models import load_model

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = ((1, 1), (7, 11), (64, 64), (300, 257), (1000, 1024), (4096, 4096), (33, 12288))
RANDOM = [
    tuple(torch.randint(1, 1500, (2,), generator=torch.Generator().manual_seed(seed)).tolist()) for seed in range(6)
]


def random_weight(shape, double=True, block=64, scale=1.0):
    x = torch.randn(shape, device="cuda") * scale
    return adapters.quantize_nf4(x, double=double, block=block)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantization_is_the_definition_bit_for_bit(dtype, double):
    torch.manual_seed(0)
    for shape in (*SHAPES, *RANDOM):
        for block in (64, 4096):
            weight = random_weight(shape, double, block)
            poisoned = torch.full(shape, float("nan"), dtype=DTYPES[dtype], device="cuda")
            out = launch_nf4.dequantize(weight, DTYPES[dtype], poisoned)
            assert torch.equal(out, nf4.dequantize_plain(weight, DTYPES[dtype])), (shape, block)


def test_dequantization_writes_nothing_outside():
    weight = random_weight((37, 53))
    around = torch.full((37 * 53 + 64,), 7.0, dtype=torch.bfloat16, device="cuda")
    launch_nf4.dequantize(weight, torch.bfloat16, around[32 : 32 + 37 * 53].view(37, 53))
    assert (around[:32] == 7).all() and (around[32 + 37 * 53 :] == 7).all()


def test_codes_that_are_not_aligned():
    weight = random_weight((130, 64))
    shifted = torch.cat([weight.codes.new_zeros(1), weight.codes])[1:]
    moved = adapters.NF4Weight(shifted, weight.scales, weight.shape, weight.block)
    assert torch.equal(launch_nf4.dequantize(moved, torch.bfloat16), launch_nf4.dequantize(weight, torch.bfloat16))
    x = torch.randn(3, 64, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(launch_nf4.product(x, moved), launch_nf4.product(x, weight))


@pytest.mark.parametrize("kind", ["random", "huge", "tiny", "constant", "odd", "fp16", "bf16"])
def test_codes_and_scales_are_bitsandbytes_own_on_the_card(kind):
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    shape = (333, 77) if kind == "odd" else (1024, 512)
    x = torch.full(shape, 0.3, device="cuda") if kind == "constant" else torch.randn(shape, device="cuda")
    x = x * {"huge": 1e30, "tiny": 1e-30}.get(kind, 1.0)
    x = x.to(DTYPES.get(kind, torch.float32))
    codes, state = functional.quantize_4bit(x, blocksize=64, quant_type="nf4")
    ours = adapters.quantize_nf4(x, double=False)
    different = int((ours.codes != codes.flatten()).sum())
    assert torch.equal(ours.scales, state.absmax)
    assert different <= 2, f"{different} of {codes.numel()} bytes"  # their reciprocal is the card's approximation
    codes, state = functional.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = adapters.quantize_nf4(x)
    assert torch.equal(ours.scales.magnitudes, state.state2.absmax) and torch.equal(ours.scales.mean, state.offset)
    if kind == "constant":  # every number is the mean: what code a zero has in a block of zeros is of no consequence
        assert not ours.scales.magnitudes.any()
    else:
        apart = (ours.scales.codes.int() - state.absmax.flatten().int()).abs()
        assert apart.max() <= 1 and apart.count_nonzero() <= 2, f"{apart.count_nonzero()} of {apart.numel()} scales"


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantized_numbers_are_bitsandbytes_own_on_the_card(dtype, double):
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    x = torch.randn(2048, 1024, device="cuda").to(DTYPES[dtype])
    codes, state = functional.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=double)
    ours = launch_nf4.dequantize(adapters.quantize_nf4(x, double=double), DTYPES[dtype])
    theirs = functional.dequantize_4bit(codes, state)
    apart = (ours.double() - theirs.double()).abs() > torch.finfo(DTYPES[dtype]).eps * theirs.double().abs()
    assert not apart.any() and (ours == theirs).float().mean() > 0.99


@pytest.mark.parametrize("permute", [True, False])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_beside_float64(dtype, double, permute, monkeypatch):
    monkeypatch.setattr(launch_nf4, "PERMUTE", permute)
    torch.manual_seed(0)
    dtype = DTYPES[dtype]
    for rows in (1, 2, 3, 4, 8, 15, 16, 17, 31, 32, 33, 63, 64):
        for columns, inner in ((1, 64), (70, 320), (1024, 1024), (4096, 4096), (129, 11008)):
            weight = random_weight((columns, inner), double, scale=0.02)
            x = torch.randn(rows, inner, device="cuda", dtype=dtype)
            bias = torch.randn(columns, device="cuda", dtype=dtype) if rows % 2 else None
            torch.empty(64 << 20, device="cuda", dtype=torch.uint8).fill_(255)  # outputs begin as NaN
            out = launch_nf4.product(x, weight, bias)
            dense = nf4.dequantize_plain(weight)
            exact = F.linear(x.double(), dense.double(), None if bias is None else bias.double())
            plain = [F.linear(x, dense.to(dtype), bias)]
            if dtype == torch.float32:  # plain PyTorch adds in two orders, and the worse one counts
                plain.append(in_turn(x, dense.mT) + (0 if bias is None else bias))
            error, usual = (out.double() - exact).abs().max(), max((p.double() - exact).abs().max() for p in plain)
            limit = 2 * usual + torch.finfo(dtype).eps * exact.abs().max()
            assert out.dtype == dtype and error <= limit, (rows, columns, inner, error.item(), limit.item())
            assert torch.equal(out, launch_nf4.product(x, weight, bias)), "not deterministic"


@pytest.mark.parametrize("splits", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_every_split_gives_the_same_but_for_rounding(rows, splits):
    torch.manual_seed(0)
    weight, bias = random_weight((200, 2048)), torch.randn(200, device="cuda")
    x = torch.randn(rows, 2048, device="cuda")
    torch.testing.assert_close(
        launch_nf4.product(x, weight, bias, splits=splits), F.linear(x, nf4.dequantize_plain(weight), bias),
        rtol=1e-4, atol=1e-3,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("tokens", [5, 700])
def test_a_qlora_layer_forward_and_backward_beside_float64(tokens, dtype):
    torch.manual_seed(0)
    dtype = DTYPES[dtype]
    linear = nn.Linear(512, 768, device="cuda", dtype=dtype)
    layer = adapters.NF4Linear.from_linear(linear).requires_grad_(False)
    dense = nf4.dequantize_plain(layer.nf4())
    x = torch.randn(tokens, 512, device="cuda", dtype=dtype, requires_grad=True)
    a = torch.randn(16, 512, device="cuda", requires_grad=True)
    b = (torch.randn(768, 16, device="cuda") * 0.1).requires_grad_(True)
    g = torch.randn(tokens, 768, device="cuda", dtype=dtype)
    out = adapters.lora_linear(x, layer, a, b, 0.5)
    ours = (out, *torch.autograd.grad(out, (x, a, b), g))

    def definition(kind):
        inputs = [t.detach().to(dtype).to(kind).requires_grad_() for t in (x, a, b)]
        weight, bias = dense.to(dtype).to(kind), layer.bias.to(kind)
        result = F.linear(inputs[0], weight, bias) + F.linear(F.linear(inputs[0], inputs[1]) * 0.5, inputs[2])
        return (result, *torch.autograd.grad(result, inputs, g.to(kind)))

    for mine, plain, exact in zip(ours, definition(dtype), definition(torch.float64), strict=True):
        error, usual = (mine.double() - exact).abs().max(), (plain.double() - exact).abs().max()
        assert error <= 2 * usual + torch.finfo(dtype).eps * exact.abs().max()


def test_a_qlora_step_needs_no_dense_weights_at_once():
    """Peak of a step over the resting model: less than half of what all weights in bfloat16 would take."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(4096, 4096, bias=False, device="cuda", dtype=torch.bfloat16) for _ in range(12)))
    dense = sum(p.nbytes for p in layers.parameters())
    adapters.quantize_model(layers)
    adapters.add_adapter(layers, adapters.LoRAConfig(targets=r"\d+", r=8))
    x = torch.randn(8, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layers(x).float().square().mean().backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layers(x).float().square().mean().backward()
    assert torch.cuda.max_memory_allocated() - before < dense / 2


def test_course_base_in_nf4_trains_and_generates_as_dequantized():
    torch.manual_seed(0)
    model = load_model("course-base", device="cuda", dtype=torch.bfloat16)
    twin = load_model("course-base", device="cuda", dtype=torch.bfloat16)
    for name in adapters.quantize_model(model):
        twin.get_submodule(name).weight.data.copy_(nf4.dequantize_plain(model.get_submodule(name).nf4()))
    ids = torch.randint(5, 4000, (4, 33), device="cuda")
    for rows in (ids, ids[:1, :1]):
        with torch.no_grad():
            one, two = model(rows).logits.float(), twin(rows).logits.float()
        assert (one - two).abs().max() < 0.5 * two.std() and (one - two).abs().mean() < 0.05 * two.std()
    losses = []
    for each in (model, twin):
        torch.manual_seed(1)
        adapters.add_adapter(each, adapters.LoRAConfig(r=8, targets=("q_proj", "down_proj")))
        optimizer = torch.optim.AdamW(adapters.trainable_parameters(each).values(), lr=5e-3)
        for _ in range(10):
            loss = each(ids, labels=ids).loss
            optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


@pytest.mark.parametrize(
    "method", ["LoRAConfig", "IA3Config", "BottleneckConfig", "PromptTuningConfig", "BitFitConfig"]
)
def test_methods_train_on_the_card(method):
    torch.manual_seed(0)
    model = load_model("course-base", device="cuda", dtype=torch.bfloat16)
    adapters.add_adapter(model, getattr(adapters, method)())
    ids = torch.randint(5, 4000, (4, 33), device="cuda")
    optimizer = torch.optim.AdamW(adapters.trainable_parameters(model).values(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert losses[-1] < losses[0]
