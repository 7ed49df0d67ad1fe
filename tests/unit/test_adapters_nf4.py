"""NF4 beside bitsandbytes bit for bit; the kernels in the interpreter beside PyTorch; layers and models in NF4."""

from __future__ import annotations

import copy
import re
import sys

import pytest
import torch
from torch import nn

from effnlp_lab import adapters
from effnlp_lab.adapters import double_quantization, nf4, nf4_layer
from effnlp_lab.course.models import load_model
from effnlp_lab.errors import UsageError

needs_triton = pytest.mark.skipif(sys.platform != "linux", reason="Triton has Linux wheels only")
SIZES = (1, 2, 63, 64, 65, 4097, 300 * 257)
TENSORS = {
    "random": torch.randn,
    "huge": lambda n: torch.randn(n) * 1e30,
    "tiny": lambda n: torch.randn(n) * 1e-30,
    "denormal": lambda n: torch.randn(n) * 1e-42,
    "constant": lambda n: torch.full((n,), 0.3),
    "zero": torch.zeros,
    "heavy tails": lambda n: torch.randn(n).exp() ** 3 * torch.randn(n).sign(),
    "fp16": lambda n: torch.randn(n).half(),
    "bf16": lambda n: torch.randn(n).bfloat16(),
}


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("kind", TENSORS)
def test_codes_and_scales_are_bitsandbytes_own(kind, block):
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    for size in SIZES:
        x = TENSORS[kind](size)
        codes, state = functional.quantize_4bit(x, blocksize=block, quant_type="nf4")
        ours = adapters.quantize_nf4(x, block=block, double=False)
        assert torch.equal(ours.codes, codes.flatten()) and torch.equal(ours.scales, state.absmax), size
        codes, state = functional.quantize_4bit(x, blocksize=block, quant_type="nf4", compress_statistics=True)
        ours = adapters.quantize_nf4(x, block=block, on_grid=True)
        assert torch.equal(ours.codes, codes.flatten()), size
        assert torch.equal(ours.scales.codes, state.absmax), size
        assert torch.equal(ours.scales.magnitudes, state.state2.absmax), size
        assert torch.equal(ours.scales.mean, state.offset), size


def test_the_nearest_scale_is_bitsandbytes_own_away_from_its_grid():
    """Its definition for other dtypes compares all 256 values; the grid moves a code by one place at most."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    absmax = torch.rand(50 * 256) + 0.5
    ours, on_grid = adapters.double_quantize(absmax), adapters.double_quantize(absmax, on_grid=True)
    values = double_quantization.dynamic_values()
    theirs, _ = torch.ops.bitsandbytes.quantize_blockwise((absmax - absmax.mean()).double(), values, 256)
    assert torch.equal(ours.codes, theirs.to(torch.uint8))
    apart = (ours.codes.int() - on_grid.codes.int()).abs()
    assert 0 < apart.count_nonzero() < 0.01 * apart.numel() and apart.max() <= 1


def test_levels_and_values_are_bitsandbytes_tables():
    functional = pytest.importorskip("bitsandbytes.functional")
    levels = adapters.nf4_levels()
    assert torch.equal(levels, functional.get_4bit_type("nf4", device="cpu"))
    assert levels[7] == 0 and levels[0] == -1 and levels[15] == 1
    assert torch.equal(double_quantization.dynamic_values(), functional.create_dynamic_map())


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(7, 12), (64, 128), (2, 2), (3, 200)])
def test_dequantized_numbers_are_bitsandbytes_own(shape, double):
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    x = torch.randn(shape)
    codes, state = functional.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=double)
    ours = adapters.quantize_nf4(x, double=double, on_grid=True)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        state.dtype = dtype
        assert torch.equal(adapters.dequantize_nf4(ours, dtype), functional.dequantize_4bit(codes, state)), dtype
    assert ours.nbytes < x.nbytes / 4 or x.numel() < 100


def test_double_quantization_costs_an_eighth_of_a_bit_and_little_error():
    torch.manual_seed(0)
    x = torch.randn(1024, 1024)
    once, twice = adapters.quantize_nf4(x, double=False), adapters.quantize_nf4(x)
    assert once.nbytes * 8 / x.numel() == 4.5 and twice.nbytes * 8 / x.numel() == pytest.approx(4.127, abs=1e-3)
    errors = [(adapters.dequantize_nf4(w) - x).square().mean().sqrt() for w in (once, twice)]
    assert errors[0] < errors[1] < 1.01 * errors[0]


@needs_triton
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_dequantization_kernel_is_the_definition_bit_for_bit(dtype, double):
    from effnlp_lab.adapters import launch_nf4

    torch.manual_seed(0)
    for shape, block in (((37, 53), 64), ((1, 1), 64), ((70, 128), 128), ((3, 4096), 4096), ((5,), 32)):
        weight = adapters.quantize_nf4(torch.randn(shape), double=double, block=block)
        out = torch.full(shape, float("nan"), dtype=dtype)
        launch_nf4.dequantize(weight, dtype, out)
        assert torch.equal(out, nf4.dequantize_plain(weight, dtype)), shape


@needs_triton
@pytest.mark.parametrize("rows, splits", [(1, 1), (1, 3), (2, 1), (17, 2), (64, 1), (64, None)])
@pytest.mark.parametrize("double", [True, False])
def test_the_product_kernels_beside_float64(rows, splits, double):
    from effnlp_lab.adapters import launch_nf4

    torch.manual_seed(rows)
    weight = adapters.quantize_nf4(torch.randn(70, 320), double=double)
    dense = nf4.dequantize_plain(weight)
    for dtype, bias in ((torch.float32, torch.randn(70)), (torch.float16, None)):
        x = torch.randn(rows, 320).to(dtype)
        out = launch_nf4.product(x, weight, bias, splits=splits)
        exact = x.double() @ dense.double().T + (0 if bias is None else bias.double())
        plain = nn.functional.linear(x.float(), dense.to(dtype).float(), bias).to(dtype)
        error, usual = (out.double() - exact).abs().max(), (plain.double() - exact).abs().max()
        limit = 2 * usual + torch.finfo(dtype).eps * exact.abs().max()
        assert out.dtype == dtype and error <= limit
        twin = nf4_layer.product_plain(x, weight, bias)
        assert twin.dtype == dtype and (twin.double() - exact).abs().max() <= limit


@needs_triton
def test_the_kernels_refuse_what_they_cannot_do():
    from effnlp_lab.adapters import launch_nf4

    weight = adapters.quantize_nf4(torch.randn(8, 96))
    with pytest.raises(UsageError, match="dequantize the weight"):
        launch_nf4.product(torch.randn(2, 96), weight)
    with pytest.raises(UsageError, match="interpreter"):
        launch_nf4.dequantize(weight, torch.bfloat16)


def permute_bytes(a: int, b: int, pick: int) -> int:
    """PTX's prmt.b32 in its default mode."""
    places = [(a >> 8 * i) & 255 for i in range(4)] + [(b >> 8 * i) & 255 for i in range(4)]
    out = 0
    for i in range(4):
        nibble = (pick >> 4 * i) & 15
        byte = places[nibble & 7]
        out |= ((255 if byte & 128 else 0) if nibble & 8 else byte) << (8 * i)
    return out


def run_ptx(source: str, words: tuple[int, int]) -> list[int]:
    """The eight results of a block of the four instructions that the table in registers is made of."""
    names: dict[str, int] = {"$8": words[0], "$9": words[1]}

    def value(name: str) -> int:
        return names[name] if name in names else int(name, 0)

    for line in source.strip("{} ").split(";"):
        parts = re.split(r"[,\s]+", line.strip())
        if parts[0] in ("", ".reg"):
            continue
        kind, to, *rest = parts
        operands = [value(name) for name in rest]
        if kind == "prmt.b32":
            names[to] = permute_bytes(*operands)
        elif kind == "and.b32":
            names[to] = operands[0] & operands[1]
        elif kind == "shr.b32":
            names[to] = operands[0] >> operands[1]
        elif kind == "lop3.b32":
            a, b, c, table = operands
            bits = [(table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1))) & 1 for i in range(32)]
            names[to] = sum(bit << i for i, bit in enumerate(bits))
        else:
            raise AssertionError(kind)
    return [names[f"${j}"] for j in range(8)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_table_in_registers_gives_every_level_in_every_place(dtype):
    from effnlp_lab.adapters.permutation_nf4 import assembly

    source = assembly(dtype)
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (40, 2, 4), dtype=torch.uint8, generator=generator)
    seen = set()
    for pair in packed:
        words = [int.from_bytes(bytes(word.tolist()), "little") for word in pair]
        codes = [nf4.unpack(word).tolist() for word in pair]
        numbers = torch.tensor(run_ptx(source, tuple(words))).to(torch.int32).view(torch.int16).view(8, 2)
        expected = torch.tensor(codes).T
        levels = adapters.nf4_levels().to(getattr(torch, dtype))[expected]
        assert torch.equal(numbers.view(getattr(torch, dtype)), levels)
        seen |= {(place, code) for place, code in enumerate(codes[0])}
    assert len(seen) > 100  # of the 128 pairs of a place and a code


def test_an_nf4_layer_and_its_gradients_beside_the_dense_one():
    torch.manual_seed(0)
    linear = nn.Linear(96, 40)
    layer = adapters.NF4Linear.from_linear(linear)
    dense = adapters.dequantize_nf4(layer.nf4())
    x = torch.randn(2, 5, 96, requires_grad=True)
    out, expected = layer(x), nn.functional.linear(x, dense, linear.bias)
    torch.testing.assert_close(out, expected)
    g = torch.randn_like(out)
    one = torch.autograd.grad(out, (x, layer.bias), g)
    two = torch.autograd.grad(expected, (x, linear.bias), g)
    for mine, other in zip(one, two, strict=True):
        torch.testing.assert_close(mine, other)
    a, b = torch.randn(3, 96, requires_grad=True), torch.randn(40, 3, requires_grad=True)
    layer.requires_grad_(False), linear.requires_grad_(False)
    out = adapters.lora_linear(x, layer, a, b, 0.5)
    expected = nn.functional.linear(x, dense + 0.5 * b @ a, linear.bias)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    one, two = torch.autograd.grad(out, (x, a, b), g), torch.autograd.grad(expected, (x, a, b), g)
    for mine, other in zip(one, two, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_the_backward_pass_keeps_no_dense_weight():
    """What autograd saves of a QLoRA layer: its input, h, A and B; nothing of the size of the weight."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"q_proj": nn.Linear(256, 512, bias=False)})
    adapters.quantize_model(model)
    adapters.add_adapter(model, adapters.LoRAConfig(targets=("q_proj",), r=4))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        model["q_proj"](torch.randn(8, 256, requires_grad=True))
    assert saved and max(saved) <= 8 * 256


def test_scales_stay_float32_when_the_model_is_cast():
    layer = adapters.NF4Linear.from_linear(nn.Linear(128, 64))
    before = adapters.dequantize_nf4(layer.nf4())
    for other in (copy.deepcopy(layer).half(), copy.deepcopy(layer).to(torch.bfloat16), copy.deepcopy(layer).double()):
        assert torch.equal(adapters.dequantize_nf4(other.nf4()), before) and other.bias.dtype != torch.float32
    again = adapters.NF4Linear.from_linear(nn.Linear(128, 64))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(adapters.dequantize_nf4(again.nf4()), before)


def test_a_model_in_nf4_is_bitsandbytes_model_and_trains_an_adapter(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = load_model("course-base", device="cpu")
    ids = torch.randint(5, 4000, (2, 9), generator=torch.Generator().manual_seed(0))
    model, theirs = copy.deepcopy(base), copy.deepcopy(base)
    names = adapters.quantize_model(model, double=False)
    assert len(names) == 7 * 8 and "lm_head" not in names
    for name in names:
        linear = theirs.get_submodule(name)
        new = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, quant_type="nf4", compress_statistics=False
        )
        new.weight = bitsandbytes.nn.Params4bit(linear.weight.data, False, quant_type="nf4", compress_statistics=False)
        new.bias = linear.bias
        parent, _, leaf = name.rpartition(".")
        setattr(theirs.get_submodule(parent), leaf, new.to("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    adapters.add_adapter(model, adapters.LoRAConfig(r=4))
    with pytest.raises(UsageError, match="NF4 cannot take a merge"):
        adapters.merge_adapter(model)
    losses = []
    optimizer = torch.optim.AdamW(adapters.trainable_parameters(model).values(), lr=1e-2)
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    adapters.save_adapter(model, tmp_path)
    adapters.load_adapter(base, tmp_path)  # onto the dense base


@pytest.mark.parametrize(
    "act, words",
    [
        (lambda: adapters.quantize_nf4(torch.randn(64), bits=3), "4 bits, not 3"),
        (lambda: adapters.quantize_nf4(torch.randn(64), block=48), "A block of 48 is not offered"),
        (lambda: adapters.quantize_nf4(torch.tensor([1.0, float("nan")])), "NaN or infinity"),
        (lambda: adapters.quantize_nf4(torch.arange(4)), "int64 numbers are not quantized"),
        (lambda: adapters.quantize_nf4(torch.randn(0, 3)), "no numbers"),
        (lambda: adapters.double_quantize(torch.tensor([float("inf")])), "NaN or infinity"),
        (lambda: adapters.double_quantize(torch.randn(3, 3)), "one float32 number a block"),
        (
            lambda: adapters.nf4_linear(torch.randn(2, 5), adapters.quantize_nf4(torch.randn(4, 6))),
            "the weight takes 6",
        ),
    ],
)
def test_bad_input_gets_a_sentence(act, words):
    with pytest.raises(UsageError, match=words) as caught:
        act()
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_a_model_that_cannot_be_quantized_is_what_it_was():
    model = nn.ModuleDict({"up_proj": nn.Linear(64, 64), "down_proj": nn.Linear(64, 64)})
    for options, words in (
        ({"bits": 2}, "4 bits, not 2"),
        ({"block": 100}, "block of 100"),
        ({"targets": ("dwn_proj",)}, "'down_proj'"),
    ):
        with pytest.raises(UsageError, match=words):
            adapters.quantize_model(model, **options)
    adapters.add_adapter(model, adapters.LoRAConfig(targets=("up_proj",)))
    with pytest.raises(UsageError, match="has adapters already"):
        adapters.quantize_model(model)
    adapters.remove_adapter(model, "default")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model["down_proj"].weight.data[0, 0] = float("inf")
    with pytest.raises(UsageError, match="down_proj: The weights hold NaN"):
        adapters.quantize_model(model)
    assert all(type(module) is nn.Linear and module.weight.requires_grad for module in model.values())
    assert nf4_layer.has_kernels(torch.device("cpu"), torch.float32) is False
