"""Codes, grids, GPTQ and the products, beside torch, numpy, bitsandbytes and float64 definitions."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from effnlp_lab import quantization as room
from effnlp_lab.errors import UsageError
from effnlp_lab.quantization import llm_int8
from effnlp_lab.quantization.gptq import block_for
from effnlp_lab.quantization.spqr import most_sensitive, outlier_gain

needs_triton = pytest.mark.skipif(sys.platform != "linux", reason="Triton has Linux wheels only")


def layer(rows, columns, dtype=torch.float64, seed=0, rank=None):
    """A weight, and the Hessian of correlated inputs of some rank with a little noise."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = draw(500, rank or columns // 3) @ draw(rank or columns // 3, columns)
    if rank is None:
        inputs += 0.1 * draw(500, columns)
    hessian = room.Hessian(columns)
    hessian.add(inputs)
    return draw(rows, columns).to(dtype), hessian.matrix.to(dtype)


def column_loop(weight, hessian, bits, group_size, damping=0.01, order=None):
    """Equations 2 and 3 of the paper as they stand: the inverse of what is left, one row and column less at a time."""
    weight, hessian = weight.double().clone(), hessian.double().clone()
    columns = weight.shape[1]
    mean = hessian.diagonal().mean()
    dead = hessian.diagonal() == 0
    hessian += torch.diag(damping * mean + dead.double())
    fixed = torch.arange(columns) if order is None else order
    grids = {g: room.find_grid(weight[:, g * group_size : (g + 1) * group_size], bits)
             for g in range(columns // group_size)}  # fmt: skip
    inverse = torch.linalg.inv(hessian[fixed][:, fixed])
    codes, left = torch.zeros_like(weight), fixed.tolist()
    while left:
        j, group = left[0], left[0] // group_size
        if order is None and j % group_size == 0:
            grids[group] = room.find_grid(weight[:, j : j + group_size], bits)
        scale, zero = grids[group]
        codes[:, j] = ((weight[:, j] / scale).round() + zero).clamp(0, 2**bits - 1)
        error = weight[:, j] - scale * (codes[:, j] - zero)
        weight[:, left] -= error[:, None] / inverse[0, 0] * inverse[0][None, :]
        inverse = (inverse - inverse[:, :1] @ inverse[:1] / inverse[0, 0])[1:, 1:]
        left = left[1:]
    return codes.to(torch.uint8)


@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("dim", (None, 1))
def test_affine_codes_are_torchs(dim, symmetric):
    x = torch.randn(7, 33) * 3 + 1
    ours = room.affine_quantize(x, dim=dim, symmetric=symmetric)
    scale, zero = (part.expand(7, 1).flatten() for part in (ours.scale, ours.zero))
    theirs = torch.fake_quantize_per_channel_affine(x, scale, zero, 0, -128, 127)
    # torch multiplies by 1/scale, so that a half may fall to the other side
    assert ((ours.dequantize() - theirs).abs() > 1e-6).float().mean() < 0.01
    assert ((ours.dequantize() - x).abs() <= ours.scale * 0.5001).all()


def test_affine_products_are_exact_sums():
    a, b = room.affine_quantize(torch.rand(5, 3000) + 1, dim=1), room.affine_quantize(torch.rand(9, 3000) - 2)
    exact = a.dequantize(torch.float64) @ b.dequantize(torch.float64).T
    torch.testing.assert_close(room.affine_matmul(a, b).double(), exact, rtol=1e-6, atol=1e-6)
    most = torch.full((1, 3000), 127, dtype=torch.int8)
    assert room.int8_matmul(most, most).item() == 127 * 127 * 3000


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize("symmetric", (False, True))
def test_round_to_nearest_is_torchs_fake_quantization(bits, symmetric):
    weight = torch.randn(6, 96) * torch.logspace(-3, 3, 6)[:, None]
    weight[2] = 0
    weight[3] = weight[3].abs() + 1
    for group_size in (16, 48, None):
        ours = room.round_to_nearest(weight, bits, group_size, symmetric=symmetric)
        size = group_size or 96
        theirs = torch.fake_quantize_per_channel_affine(
            weight.view(-1, size), ours.scale.flatten(), ours.zero.flatten().int(), 0, 0, 2**bits - 1
        ).view(6, 96)
        different = (ours.dequantize() - theirs).abs() > 1e-6 * theirs.abs()
        assert different.float().mean() < 0.01  # halves: torch multiplies by 1/scale
        step = ours.scale.repeat_interleave(size, 1)
        assert ((ours.dequantize() - weight).abs() <= (1.0001 if symmetric else 0.5001) * step + 1e-9).all()
        assert (ours.dequantize()[2] == 0).all()


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_streams_of_bits_are_numpys(bits):
    codes = torch.randint(0, 2**bits, (5, 37), dtype=torch.uint8)
    single = np.unpackbits(codes.numpy()[..., None], axis=-1, bitorder="little")[..., :bits].reshape(5, -1)
    packed = room.pack_bits(codes, bits)
    assert np.array_equal(packed.numpy(), np.packbits(single, axis=-1, bitorder="little"))
    assert packed.shape[1] == -(-37 * bits // 8)
    assert torch.equal(room.unpack_bits(packed, bits, 37), codes)


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize("group_size,columns", ((32, 320), (16, 48), (None, 70)))
def test_packed_words_hold_the_codes(bits, group_size, columns):
    quantized = room.round_to_nearest(torch.randn(9, columns), bits, group_size)
    packed = room.pack(quantized)
    assert torch.equal(packed.unpack().codes, quantized.codes)
    assert torch.equal(packed.unpack().dequantize(), quantized.dequantize())
    word = packed.planes[0][0, 4, 3].item() & 0xFFFFFFFF
    bits0 = 2 if bits == 3 else bits
    codes = quantized.codes[4, 3 : 32 // bits0 * packed.run : packed.run].int()
    assert [word >> (bits0 * i) & (2**bits0 - 1) for i in range(len(codes))] == (codes & (2**bits0 - 1)).tolist()


@pytest.mark.parametrize("bits,rows,columns,group_size", (
    (4, 12, 192, 64), (3, 7, 192, 48), (2, 12, 160, 160), (4, 9, 288, 96), (3, 5, 512, 256), (4, 1, 1, 1),
))  # fmt: skip
def test_gptq_is_the_papers_column_loop(bits, rows, columns, group_size):
    weight, hessian = layer(rows, columns, seed=1, rank=None if columns > 1 else 1)
    expected = column_loop(weight, hessian, bits, group_size)
    ours = room.gptq_quantize(weight, hessian, bits, group_size)
    assert torch.equal(ours.codes, expected)
    half = room.gptq_quantize(weight, 3 * hessian, bits, group_size, block=40)  # neither a factor nor the block matters
    assert torch.equal(half.codes, expected)
    single = room.gptq_quantize(weight.float(), hessian.float(), bits, group_size)
    assert (single.codes == expected).float().mean() >= 0.999
    if columns > 1:
        plain = room.round_to_nearest(weight, bits, group_size)
        error, worse = (room.layer_error(weight, q.dequantize(torch.float64), hessian) for q in (ours, plain))
        assert error < 0.5 * worse


def test_act_order_is_the_loop_in_that_order_and_undone():
    weight, hessian = layer(8, 96)
    order = torch.argsort(hessian.diagonal(), descending=True)
    ours = room.gptq_quantize(weight, hessian, 3, 32, act_order=True)
    assert torch.equal(ours.codes, column_loop(weight, hessian, 3, 32, order=order))


def test_hessians_that_are_no_full_rank():
    for seed, rank, dead in ((0, 5, ()), (1, None, (0, 17, 63)), (2, 5, (3,))):
        weight, hessian = layer(6, 64, seed=seed, rank=rank)
        hessian[list(dead)], hessian[:, list(dead)] = 0, 0
        ours = room.gptq_quantize(weight, hessian, 4, 32)
        assert torch.equal(ours.codes, column_loop(weight, hessian, 4, 32))
        plain = room.round_to_nearest(weight, 4, 32)
        error, worse = (room.layer_error(weight, q.dequantize(torch.float64), hessian) for q in (ours, plain))
        assert error < worse
    nothing = room.gptq_quantize(weight, torch.zeros_like(hessian), 4, 32)  # no input was ever seen
    assert torch.equal(nothing.codes, room.round_to_nearest(weight, 4, 32).codes)


def test_the_factor_is_of_the_inverse():
    _, hessian = layer(1, 48)
    upper = room.inverse_factor(hessian, 0.05)
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(48)
    torch.testing.assert_close(upper, torch.linalg.cholesky(torch.linalg.inv(damped), upper=True))


def test_a_hessian_in_parts_is_that_of_all():
    x = torch.randn(3, 40, 16, dtype=torch.float64)
    ours = room.Hessian(16)
    for part in x:
        ours.add(part)
    torch.testing.assert_close(ours.matrix, 2 * torch.cov(x.flatten(0, 1).T, correction=0) + 2 * torch.outer(
        x.mean((0, 1)), x.mean((0, 1))))  # fmt: skip


def test_blocks_begin_with_groups():
    for group_size, columns in ((128, 4096), (48, 960), (96, 960), (256, 1024), (320, 960), (500, 500), (1, 77)):
        size = block_for(group_size, columns)
        assert 1 <= size <= 128
        if group_size != columns:
            assert size % group_size == 0 or group_size % size == 0


@needs_triton
@pytest.mark.parametrize("bits,group_size,act_order,dtype", (
    (4, 16, False, torch.float32), (3, 48, True, torch.float32), (2, None, False, torch.float16),
))  # fmt: skip
def test_the_fused_columns_are_the_loop(bits, group_size, act_order, dtype):
    weight, hessian = layer(11, 144 if group_size == 16 else 48)
    single = weight.float(), hessian.float()
    options = {"act_order": act_order, "scale_dtype": dtype}
    ours = room.gptq_quantize(*single, bits, group_size, fused=True, **options)
    plain = room.gptq_quantize(*single, bits, group_size, fused=False, **options)
    torch.testing.assert_close(ours.scale, plain.scale)
    assert torch.equal(ours.zero, plain.zero)
    exact = room.gptq_quantize(weight, hessian, bits, group_size, **options)
    assert (ours.codes == exact.codes).float().mean() >= 0.999


@needs_triton
@pytest.mark.parametrize("bits,group_size,rows,columns,inputs,dtype", (
    (4, 128, 40, 512, 3, torch.float16),
    (4, 32, 70, 288, 17, torch.float32),
    (3, 64, 33, 320, 1, torch.float16),
    (3, 1056, 20, 1056, 2, torch.float32),
    (2, 48, 32, 240, 5, torch.float32),
    (8, 256, 32, 256, 2, torch.float16),
))  # fmt: skip
def test_the_product_kernel_is_dequantize_then_multiply(bits, group_size, rows, columns, inputs, dtype):
    from effnlp_lab.quantization.launch_product import dequantize, product, workspace

    torch.manual_seed(bits)
    quantized = room.round_to_nearest(torch.randn(rows, columns) + 0.3, bits, group_size, scale_dtype=torch.float16)
    packed = room.pack(quantized)
    x, bias = (torch.randn(inputs, columns) + 0.5).to(dtype), torch.randn(rows).to(dtype)
    exact = x.double() @ quantized.dequantize(torch.float64).T + bias.double()
    room_for_error = 2 * torch.finfo(dtype).eps * exact.abs().max()
    for split in (1, 3):
        parts, counters = workspace(x.device, 1 << 16, 64)
        parts.fill_(float("nan"))
        ours = product(x, packed, bias, split=min(split, packed.planes[-1].shape[0]))
        assert (ours.double() - exact).abs().max() <= room_for_error
        assert not counters.any()
    twin = room.quantized_matmul(x, packed, bias)
    assert (twin.double() - exact).abs().max() <= 3 * room_for_error
    assert torch.equal(dequantize(packed, torch.float32), quantized.dequantize())


def test_llm_int8_beside_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    x, weight = torch.randn(20, 96).half(), torch.randn(48, 96).half()
    x[:, 5] *= 30
    x[3, 77] = -60
    codes, absmax = llm_int8.quantize_int8_weight(weight)
    theirs, statistics, _ = functional.int8_vectorwise_quant(weight.clone())
    assert (codes.int() - theirs.int()).abs().max() <= 1 and (codes != theirs).float().mean() < 0.01
    torch.testing.assert_close(absmax, statistics, rtol=0, atol=0)
    _, _, columns = functional.int8_vectorwise_quant(x.clone(), threshold=6.0)
    assert torch.equal(llm_int8.outlier_columns(x), columns) and columns.tolist() == [5, 77]
    exact = x.double() @ weight.double().T
    mixed = room.llm_int8_linear(x, codes, absmax, weight=weight).double()
    all_int8 = room.llm_int8_linear(x, codes, absmax, threshold=0).double()
    assert (mixed - exact).norm() < 0.02 * exact.norm() and (mixed - exact).norm() < 0.6 * (all_int8 - exact).norm()
    ordinary = torch.randn(20, 96).half().clamp(-5, 5)
    rows, row_statistics, _ = functional.int8_vectorwise_quant(ordinary.clone(), threshold=6.0)
    total = functional.int8_linear_matmul(rows, theirs)
    plain = functional.int8_mm_dequant(total, row_statistics, statistics)
    ours = room.llm_int8_linear(ordinary, theirs, statistics)
    torch.testing.assert_close(ours, plain.half(), rtol=0.01, atol=0.05)


def test_llm_int8_has_the_error_that_its_scales_allow():
    x, weight, bias = torch.randn(2, 9, 64), torch.randn(30, 64), torch.randn(30)
    codes, absmax = llm_int8.quantize_int8_weight(weight)
    columns = llm_int8.outlier_columns(x.view(-1, 64), 2.5)
    assert 0 < len(columns) < 64
    own = codes.double() * absmax.double()[:, None] / 127
    rest = torch.ones(64, dtype=torch.bool).index_fill_(0, columns, False)
    rows, row_absmax = llm_int8.int8_rows(x.view(-1, 64).masked_fill(x.view(-1, 64).abs() >= 2.5, 0))
    coded = rows.double() * row_absmax.double()[:, None] / 127
    exact = coded[:, rest] @ own[:, rest].T + x.view(-1, 64)[:, columns].double() @ own[:, columns].T + bias
    ours = room.llm_int8_linear(x, codes, absmax, bias, threshold=2.5)
    torch.testing.assert_close(ours.view(-1, 30).double(), exact, rtol=1e-5, atol=1e-5)


def test_spqr_keeps_what_hurts_most():
    weight, hessian = layer(24, 96, dtype=torch.float32)
    places = torch.rand(24, 96, generator=torch.Generator().manual_seed(3)) < 0.01
    weight[places] *= 8
    errors = []
    for share in (0.0, 0.01, 0.05):
        ours = room.spqr_quantize(weight, hessian, 3, 16, outliers=share)
        assert ours.outliers.values().numel() <= share * weight.numel()
        errors.append(room.layer_error(weight, ours.dequantize(), hessian))
        x = torch.randn(2, 5, 96)
        torch.testing.assert_close(ours.matmul(x), x @ ours.dequantize().T, rtol=1e-4, atol=1e-4)
    assert errors[1] < 0.8 * errors[0] and errors[2] < errors[1]
    assert abs(ours.bits_per_weight() - (3 + 24 / 16 + 32 * 0.05)) < 0.01
    plain = room.gptq_quantize(weight, hessian, 3, 16, scale_dtype=torch.float16)
    none = room.spqr_quantize(weight, hessian, 3, 16, outliers=0.0)
    assert torch.equal(none.dequantize(), plain.dequantize())


def test_an_outliers_gain_is_the_error_that_goes_with_it():
    weight, group = torch.randn(3, 32), 16
    diagonal = torch.rand(32) + 0.5
    gain = outlier_gain(weight, diagonal, 3, group)
    for row, column in ((0, 3), (2, 31)):
        first = column // group * group
        members = [j for j in range(first, first + group)]

        def error(columns, row=row):
            part = weight[row, columns].double()[None]
            rounded = room.round_to_nearest(part, 3, None).dequantize(torch.float64)
            return ((part - rounded) ** 2 / diagonal[columns].double() ** 2).sum().item()

        assert gain[row, column].item() == pytest.approx(
            error(members) - error([j for j in members if j != column]), rel=1e-3, abs=1e-4
        )
    assert most_sensitive(torch.tensor([[3.0, -1.0, 2.0, 5.0]]), 0.5).tolist() == [[True, False, False, True]]


@needs_triton
def test_spqrs_kernel_keeps_the_same_weights():
    weight, hessian = layer(5, 32, dtype=torch.float32)
    ours, plain = (room.spqr_quantize(weight, hessian, 3, 16, outliers=0.05, fused=f) for f in (True, False))
    torch.testing.assert_close(ours.dequantize(), plain.dequantize())


def test_bits_a_weight():
    quantized = room.round_to_nearest(torch.randn(4, 256), 4, 128, scale_dtype=torch.float16)
    assert quantized.bits_per_weight() == 4 + 24 / 128
    assert room.pack(quantized).nbytes() * 8 / (4 * 256) == quantized.bits_per_weight()


WEIGHT, EYE = torch.randn(4, 64), torch.eye(64)
BAD = torch.where(torch.arange(64) == 7, float("nan"), WEIGHT)


@pytest.mark.parametrize("call,words", (
    (lambda: room.round_to_nearest(WEIGHT, 5), "5 bits are not offered: choose one of 2, 3, 4, 8"),
    (lambda: room.round_to_nearest(WEIGHT, 4, 48, name="q_proj"), "48 does not divide the 64 input columns of q_proj"),
    (lambda: room.round_to_nearest(BAD, 4, 64, name="up"), "up holds nan at row 0, column 7"),
    (lambda: room.gptq_quantize(WEIGHT / 0, EYE, 4, 64), "the weight holds"),
    (lambda: room.round_to_nearest(WEIGHT[0], 4), r"of shape \[64\]: expected floats \[rows, columns\]"),
    (lambda: room.gptq_quantize(WEIGHT, EYE[:5], 4, 64), r"shape \[5, 64\] for 64 input columns"),
    (lambda: room.gptq_quantize(WEIGHT, -EYE, 4, 64, name="o"), "Hessian of o is not positive definite with damping"),
    (lambda: room.gptq_quantize(WEIGHT, torch.ones(64, 64), 4, 64, damping=0.0), "raise the damping"),
    (lambda: room.gptq_quantize(WEIGHT, EYE * float("nan"), 4, 64), "not finite: the calibration inputs hold NaN"),
    (lambda: room.gptq_quantize(WEIGHT, EYE, 4, 64, damping=-1), "damping is -1: expected a number of at least 0"),
    (lambda: room.gptq_quantize(WEIGHT, EYE, 4, 64, block=0), "A block of 0 columns"),
    (lambda: room.round_to_nearest(WEIGHT * 1e7, 4, 64, scale_dtype=torch.float16), "scale_dtype=torch.float32"),
    (lambda: room.Hessian(4).matrix, "has seen no inputs"),
    (lambda: room.Hessian(4).add(WEIGHT), "Inputs of 64 numbers for a Hessian of 4 columns"),
    (lambda: room.pack_bits(torch.tensor([9], dtype=torch.uint8), 3), "below 8 for 3 bits"),
    (lambda: room.affine_quantize(BAD), "NaN, infinity or integers"),
    (lambda: room.affine_matmul(room.affine_quantize(WEIGHT), room.affine_quantize(EYE[:, :5])), "of 64 and 5 columns"),
    (lambda: room.quantized_matmul(EYE[:, :5], room.pack(room.round_to_nearest(WEIGHT, 4, 64))), "Inputs of 5 numbers"),
    (lambda: room.spqr_quantize(WEIGHT, EYE, outliers=1.5), "share of 1.5 of the weights"),
    (lambda: room.llm_int8_linear(WEIGHT, *llm_int8.int8_rows(WEIGHT), threshold=-1), "threshold of -1"),
    (lambda: room.calibration_sequences(torch.arange(5), 2, 8), "has 5 tokens, fewer than one sequence of 8"),
))  # fmt: skip
def test_bad_input_gets_a_sentence(call, words):
    with pytest.raises(UsageError, match=words):
        call()
