"""The product of a few rows with weights of 2, 3, 4 or 8 bits in Triton, and codes turned into 16-bit weights.

C' = W X': the many rows of W fill the tile of the tensor cores and the few of X are its narrow side, so that one row of
X wastes little. A tile of words is read once; each shift of it is a tile of codes (packing.py), which becomes floats
without a conversion instruction: a code in the low bits of 2^23's mantissa is the float 2^23 + code, and subtracting
2^23 + zero leaves code - zero, a small whole number that 16 bits hold exactly. The scale multiplies sums, not weights.

Few tiles would leave most of the card idle: the sum over columns is split among programs, which write their parts down;
the last one to finish a tile adds the parts in their order, so that the result is the same at every run.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnlp_lab.quantization.packing import PLANES, PackedWeight


@triton.jit
def centred(codes, zero):
    """code - zero as float32, for codes of at most 23 bits in int32 [N, K] and zero as float32 [N]."""
    return (codes | 0x4B000000).to(tl.float32, bitcast=True) - (zero + 8388608.0)[:, None]


@triton.jit
def words_at(Plane, block, end, rows, row, word, RUN: tl.constexpr):
    """Words [BLOCK_N, ...] of blocks before `end`: read once by one program, so the first to leave the cache."""
    place = (block * rows + row[:, None]) * RUN + word[None, :]
    mask = (row < rows)[:, None] & (block + 0 * word[None, :] < end)
    return tl.load(Plane + place, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def words_of(Plane0, Plane1, block, end, rows, row, word, BITS: tl.constexpr, RUN: tl.constexpr):
    """The words of a block: with 3 bits two tiles of lower bits and one of the highest, else one tile thrice."""
    if BITS == 3:
        low0 = words_at(Plane0, 2 * block, 2 * end, rows, row, word, RUN)
        low1 = words_at(Plane0, 2 * block + 1, 2 * end, rows, row, word, RUN)
        high = words_at(Plane1, block, end, rows, row, word, RUN)
    else:
        low0 = words_at(Plane0, block, end, rows, row, word, RUN)
        low1 = low0
        high = low0
    return low0, low1, high


@triton.jit
def grid_of(Scale, Zero, first, row, rows, columns, GROUP: tl.constexpr):
    """Scale and zero, float32 [BLOCK_N], of the group that column `first` belongs to; 0 beyond the last."""
    known = row < tl.where(first < columns, rows, 0)
    place = first // GROUP * rows + row
    scale = tl.load(Scale + place, mask=known, other=0.0).to(tl.float32)
    return scale, tl.load(Zero + place, mask=known, other=0).to(tl.float32)


@triton.jit
def codes_of(low0, low1, high, i, BITS: tl.constexpr):
    """Code i of each word; with 3 bits the lower two of codes 0 to 15 are in low0, of 16 to 31 in low1."""
    if BITS == 3:
        low = tl.where(i < 16, low0, low1)
        codes = ((low >> (2 * (i % 16))) & 3) | (((high >> i) & 1) << 2)
    else:
        codes = (low0 >> (BITS * i)) & ((1 << BITS) - 1)
    return codes


@triton.jit
def group_product(
    X, Scale, Zero, low0, low1, high, row, m, word, first, index, inputs, rows, columns, stride_x,
    BITS: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr, PER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What PER runs of columns from `first`, which share a scale, add to the tile; index: the first code."""
    scale, zero = grid_of(Scale, Zero, first, row, rows, columns, GROUP)
    sums = tl.zeros((row.shape[0], m.shape[0]), dtype=tl.float32)
    for i in tl.static_range(PER):
        k = first + i * RUN + word
        x = tl.load(
            X + m[None, :].to(tl.int64) * stride_x + k[:, None],
            mask=(m < inputs)[None, :] & (k < columns)[:, None], other=0.0,
        )  # fmt: skip
        w = centred(codes_of(low0, low1, high, index + i, BITS), zero).to(x.dtype)
        sums = tl.dot(w, x, sums, input_precision=PRECISION)
    return sums * scale[:, None]


@triton.jit
def finish(
    total, row, m, rows, inputs, split, splits, counter, Bias, Out, Parts, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """Write the tile [BLOCK_N, BLOCK_M], or one part of it; who finishes a tile last adds its parts in their order."""
    inside = (m < inputs)[None, :] & (row < rows)[:, None]
    place = m[None, :].to(tl.int64) * rows + row[:, None]
    last = True
    if SPLIT:
        size = rows.to(tl.int64) * inputs
        tl.store(Parts + split * size + place, total, mask=inside)
        tl.debug_barrier()  # all of the program's numbers are written before it says so
        before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        last = before == splits - 1
        if last:
            tl.debug_barrier()
            total = tl.zeros_like(total)
            for s in range(splits):
                total += tl.load(Parts + s * size + place, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(counter, 0)  # ready for the next product
    if last:
        if HAS_BIAS:
            total += tl.load(Bias + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
        tl.store(Out + place, total.to(Out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["inputs", "splits"])
def product_kernel(
    X, Plane0, Plane1, Scale, Zero, Bias, Out, Parts, Counters, inputs, rows, columns, blocks, splits, stride_x,
    BITS: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr, PER: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Out [inputs, rows] = X [inputs, columns] W'. PER: runs of columns that share a scale; SPLIT: several parts."""
    tile, split, band = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = band * BLOCK_M + tl.arange(0, BLOCK_M)
    word = tl.arange(0, RUN)
    COUNT: tl.constexpr = 32 if BITS == 3 else 32 // BITS  # runs of columns in a block
    share = tl.cdiv(blocks, splits)
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for block in tl.range(split * share, tl.minimum(split * share + share, blocks), num_stages=STAGES):
        low0, low1, high = words_of(Plane0, Plane1, block, blocks, rows, row, word, BITS, RUN)
        if BITS == 3:  # 32 runs in a row would take the compiler a minute
            for part in range(COUNT // PER):
                first = block * (COUNT * RUN) + part * (PER * RUN)
                total += group_product(
                    X, Scale, Zero, low0, low1, high, row, m, word, first, part * PER, inputs, rows, columns, stride_x,
                    BITS, RUN, GROUP, PER, PRECISION,
                )  # fmt: skip
        else:
            for part in tl.static_range(COUNT // PER):
                first = block * (COUNT * RUN) + part * (PER * RUN)
                total += group_product(
                    X, Scale, Zero, low0, low1, high, row, m, word, first, part * PER, inputs, rows, columns, stride_x,
                    BITS, RUN, GROUP, PER, PRECISION,
                )  # fmt: skip

    counter = Counters + band * tl.num_programs(0) + tile
    finish(total, row, m, rows, inputs, split, splits, counter, Bias, Out, Parts, SPLIT, HAS_BIAS)


@triton.jit
def code_in_place(low0, low1, high, i: tl.constexpr, BITS: tl.constexpr):
    """Code i of each word as float32, times a power of two, and that power's inverse: most need no shift.

    Bits below 23 of a word, under the exponent of 2^23, are a float that many above 2^23.
    """
    AT: tl.constexpr = 0 if BITS == 3 else BITS * i if BITS * i + BITS <= 23 else BITS * i - 12
    if BITS == 3:
        bits = codes_of(low0, low1, high, i, BITS)
    elif AT == BITS * i:
        bits = low0 & (((1 << BITS) - 1) << AT)
    else:
        bits = (low0 >> 12) & (((1 << BITS) - 1) << AT)
    return (bits | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0, 1.0 / (1 << AT)


@triton.jit(do_not_specialize=["splits"])
def row_kernel(
    X, Plane0, Plane1, Scale, Zero, Bias, Out, Parts, Counters, rows, columns, blocks, splits,
    BITS: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr, PER: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """`product_kernel` for one row of X, without tiles of tensor cores: BLOCK_B blocks a step, all warps share the sum.

    The zero point multiplies the sum of the inputs, once for a group.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_B * RUN)
    COUNT: tl.constexpr = 32 if BITS == 3 else 32 // BITS
    share = tl.cdiv(blocks, splits)
    end = tl.minimum(split * share + share, blocks)
    total = tl.zeros((BLOCK_N, BLOCK_B), dtype=tl.float32)
    for start in range(split * share, end, BLOCK_B):
        block, each = start + lane // RUN, start + tl.arange(0, BLOCK_B)
        word = lane % RUN
        low0, low1, high = words_of(Plane0, Plane1, block[None, :], end, rows, row, word, BITS, RUN)
        for part in tl.static_range(COUNT // PER):
            dots = tl.zeros((BLOCK_N, BLOCK_B * RUN), dtype=tl.float32)
            sums = tl.zeros((BLOCK_B * RUN,), dtype=tl.float32)
            for i in tl.static_range(PER):
                k = block * (COUNT * RUN) + (part * PER + i) * RUN + word
                x = tl.load(X + k, mask=(k < columns) & (block < end), other=0.0).to(tl.float32)
                codes, power = code_in_place(low0, low1, high, part * PER + i, BITS)
                dots += codes * (x * power)[None, :]
                sums += x
            dots = tl.sum(tl.reshape(dots, (BLOCK_N, BLOCK_B, RUN)), 2)
            sums = tl.sum(tl.reshape(sums, (BLOCK_B, RUN)), 1)
            first = each * (COUNT * RUN) + part * (PER * RUN)
            scale, zero = grid_of(Scale, Zero, first[None, :], row[:, None], rows, columns, GROUP)
            total += scale * (dots - zero * sums[None, :])
    m = tl.arange(0, 1)
    finish(tl.sum(total, 1)[:, None], row, m, rows, 1, split, splits, Counters + tile, Bias, Out, Parts, SPLIT,
           HAS_BIAS)  # fmt: skip


@triton.jit
def dequantize_kernel(
    Plane0, Plane1, Scale, Zero, Out, rows, columns, BITS: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of columns of BLOCK_N rows: Out [rows, columns] = scale * (code - zero)."""
    block = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    word = tl.arange(0, RUN)
    COUNT: tl.constexpr = 32 if BITS == 3 else 32 // BITS
    low0, low1, high = words_of(Plane0, Plane1, block, block + 1, rows, row, word, BITS, RUN)
    for i in tl.static_range(COUNT):
        first = block * (COUNT * RUN) + i * RUN
        k = first + word
        scale, zero = grid_of(Scale, Zero, first, row, rows, columns, GROUP)
        w = centred(codes_of(low0, low1, high, i, BITS), zero) * scale[:, None]
        out = Out + row[:, None].to(tl.int64) * columns + k[None, :]
        tl.store(out, w.to(Out.dtype.element_ty), mask=(row < rows)[:, None] & (k < columns)[None, :])


@dataclass(frozen=True)
class Tile:
    """Rows of W and of X in a tile, warps a program, tiles in flight, and programs for each processor of the card."""

    rows: int
    inputs: int
    warps: int = 4
    stages: int = 3
    programs: int = 4


ONE_ROW = 4096
"""Columns that a step of `row_kernel` takes."""


def tile_for(inputs: int, run: int, itemsize: int, arch: int, bits: int = 4) -> Tile:
    """The tile for so many rows of X: timed on sm_90, chosen to compile and to fit elsewhere."""
    if arch == 0:  # Triton's interpreter: as few tiles as may be
        return Tile(32, 1 if inputs == 1 else 16, 1, 1)
    if inputs == 1:
        return Tile(8, 1, 4, 1)
    width = min(64, max(16, 1 << (inputs - 1).bit_length()))
    if itemsize == 4:
        return Tile(32, 16, 4, 1)
    if arch < 80:
        return Tile(32, min(width, 32), 4, 1)
    if arch in (86, 89) or arch >= 120:  # 99 KiB of shared memory
        return Tile(64, min(width, 32), 4, 2)
    if width == 16:
        return Tile(64, 16, 4, 2, 12)
    return Tile(64, width, 4, 2 if bits == 2 else 3, 4 if width < 64 or inputs > 64 else 2)


def product(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, split: int | None = None) -> Tensor:
    """x [inputs, columns] @ weight.T + bias, in x's dtype. Groups must be a multiple of 16 columns."""
    inputs, rows = len(x), weight.rows
    out = torch.empty(inputs, rows, dtype=x.dtype, device=x.device)
    if not inputs:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    tile = tile_for(inputs, weight.run, x.element_size(), _architecture(x.device), weight.bits)
    tiles, bands = triton.cdiv(rows, tile.rows), triton.cdiv(inputs, tile.inputs)
    count = max(32 // bits for bits in PLANES[weight.bits])
    blocks = triton.cdiv(weight.columns, count * weight.run)
    split = split or split_for(tiles * bands, blocks, _processors(x.device), tile.programs)
    parts, counters = workspace(x.device, split * inputs * rows if split > 1 else 0, tiles * bands)
    arguments = (weight.planes[0], weight.planes[-1], weight.scale, weight.zero, out if bias is None else bias, out,
                 parts, counters)  # fmt: skip
    sizes = {"BITS": weight.bits, "RUN": weight.run, "GROUP": weight.group_size, "PER": runs_per_scale(weight)}
    sizes |= {"SPLIT": split > 1, "BLOCK_N": tile.rows, "HAS_BIAS": bias is not None, "num_warps": tile.warps}
    if tile.inputs == 1:
        block_b = max(1, ONE_ROW // (count * weight.run))
        row_kernel[(tiles, split)](x, *arguments, rows, weight.columns, blocks, split, BLOCK_B=block_b, **sizes)
    else:
        product_kernel[(tiles, split, bands)](
            x, *arguments, inputs, rows, weight.columns, blocks, split, x.stride(0), BLOCK_M=tile.inputs,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32", STAGES=tile.stages, **sizes,
        )  # fmt: skip
    return out


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weights [rows, columns]. Groups must be a multiple of 16 columns."""
    out = torch.empty(weight.rows, weight.columns, dtype=dtype, device=weight.scale.device)
    count = max(32 // bits for bits in PLANES[weight.bits])
    grid = (triton.cdiv(weight.rows, 32), triton.cdiv(weight.columns, count * weight.run))
    dequantize_kernel[grid](
        weight.planes[0], weight.planes[-1], weight.scale, weight.zero, out, weight.rows, weight.columns,
        BITS=weight.bits, RUN=weight.run, GROUP=weight.group_size, BLOCK_N=32, num_warps=4,
    )  # fmt: skip
    return out


def runs_per_scale(weight: PackedWeight) -> int:
    """Runs of columns of a block that surely share a group: what divides both the group and the block; at most 8."""
    count = max(32 // bits for bits in PLANES[weight.bits])
    return math.gcd(weight.group_size // weight.run, count, 8)


def split_for(tiles: int, blocks: int, processors: int, programs: int) -> int:
    """Into how many parts to cut the sum, so that each processor of the card has some `programs` programs to run."""
    wanted = max(1, min(blocks, processors * programs // max(tiles, 1)))
    return triton.cdiv(blocks, triton.cdiv(blocks, wanted))  # no part is empty


_WORKSPACES: dict[tuple, list[tuple[Tensor, Tensor]]] = {}


def workspace(device: torch.device, numbers: int, counters: int) -> tuple[Tensor, Tensor]:
    """Room for the parts of sums, and counters at zero, which every product leaves at zero; one for each stream.

    One that became too small is kept, and the next is at least twice as large: CUDA graphs go on writing to the first.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    known = _WORKSPACES.setdefault((device, stream), [])
    if not known or len(known[-1][0]) < numbers or len(known[-1][1]) < counters:
        before = [2 * len(part) for part in known[-1]] if known else [1 << 20, 1 << 12]
        parts = torch.empty(max(before[0], numbers), dtype=torch.float32, device=device)
        known.append((parts, torch.zeros(max(before[1], counters), dtype=torch.int32, device=device)))
    return known[-1]


@functools.cache
def _architecture(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
