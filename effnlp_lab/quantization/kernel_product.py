"""The product of a few rows with weights of 2, 3, 4 or 8 bits in Triton, and codes turned into 16-bit weights.

C' = W X': the many rows of W fill the tile of the tensor cores and the few of X are its narrow side, so that one row of
X wastes little. A tile of words is read once; each shift of it is a tile of codes (packing.py), which becomes floats
without a conversion instruction: a code in the low bits of 2^23's mantissa is the float 2^23 + code, and subtracting
2^23 + zero leaves code - zero, a small whole number that 16 bits hold exactly. The scale multiplies sums, not weights.

On sm_90 a product may start while the kernel before it ends (early_start.py): what it does before it waits is to read
its first words of weights, which no kernel of a model writes.

Few tiles would leave most of the card idle: the sum over columns is split among programs, which write their parts down;
the last one to finish a tile adds the parts in their order, so that the result is the same at every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from effnlp_lab.early_start import after_the_kernel_before


@triton.jit
def centred(codes, zero):
    """code - zero as float32, for codes of at most 23 bits in int32 [N, K] and zero as float32 [N]."""
    return (codes | 0x4B000000).to(tl.float32, bitcast=True) - (zero + 8388608.0)[:, None]


@triton.jit
def fetch_ahead(Plane, block, end, rows, row, RUN: tl.constexpr, BLOCK_N: tl.constexpr, AHEAD: tl.constexpr):
    """Ask for the first AHEAD lines of 128 bytes of words of blocks before `end` to come into the L2 cache."""
    LINES: tl.constexpr = BLOCK_N * RUN // 32  # of one block
    lane = tl.arange(0, AHEAD)
    here = block + lane // LINES
    word = (row * RUN + lane % LINES * 32) % (rows * RUN)
    place = tl.minimum(here, end - 1) * rows * RUN + word
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [Plane + place], dtype=tl.int32, is_pure=False, pack=1
    )


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
def centred_in_place(words, zero, i: tl.constexpr, BITS: tl.constexpr):
    """`centred` of code i of words [N, K], most without a shift: at bit AT a code counts 2^AT times itself."""
    AT: tl.constexpr = BITS * i if BITS * i + BITS <= 23 else BITS * i - 12
    if AT == BITS * i:
        bits = words & (((1 << BITS) - 1) << AT)
    else:
        bits = (words >> 12) & (((1 << BITS) - 1) << AT)
    large = (bits | 0x4B000000).to(tl.float32, bitcast=True)
    return large * (1.0 / (1 << AT)) - (zero + 8388608.0 / (1 << AT))[:, None]


@triton.jit
def group_product(
    x_at, low0, low1, high, scale, zero, word, first, index, columns,
    BITS: tl.constexpr, RUN: tl.constexpr, PER: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What PER runs of columns from `first`, which share a scale, add to the tile; index: the first code."""
    sums = tl.zeros((scale.shape[0], x_at.shape[1]), dtype=tl.float32)
    for i in tl.static_range(PER):
        if EVEN:
            x = tl.load(x_at + (first + i * RUN))
        else:
            x = tl.load(x_at + (first + i * RUN), mask=(first + i * RUN + word < columns)[:, None], other=0.0)
        if BITS == 3:
            w = centred(codes_of(low0, low1, high, index + i, BITS), zero)
        else:
            w = centred_in_place(low0, zero, index + i, BITS)
        sums = tl.dot(w.to(x.dtype), x, sums, input_precision=PRECISION)
    return sums * scale[:, None]


@triton.jit
def part_at(Parts, s, splits, size, place, inside):
    """Part s of a tile, as other programs wrote it; zeros where there are not so many."""
    return tl.load(Parts + s * size + place, mask=inside & (s < splits), other=0.0, cache_modifier=".cg")


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
            for s in range(0, splits, 4):  # four on their way at a time
                part0 = part_at(Parts, s, splits, size, place, inside)
                part1 = part_at(Parts, s + 1, splits, size, place, inside)
                part2 = part_at(Parts, s + 2, splits, size, place, inside)
                part3 = part_at(Parts, s + 3, splits, size, place, inside)
                total = total + part0 + part1 + part2 + part3
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
    STAGES: tl.constexpr, EVEN: tl.constexpr, EARLY: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Out [inputs, rows] = X [inputs, columns] W'. PER: runs of columns that share a scale; SPLIT: several parts."""
    tile, split, band = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = band * BLOCK_M + tl.arange(0, BLOCK_M)
    word = tl.arange(0, RUN)
    COUNT: tl.constexpr = 32 if BITS == 3 else 32 // BITS  # runs of columns in a block
    share = tl.cdiv(blocks, splits)
    if AHEAD:
        TILES: tl.constexpr = 2 if BITS == 3 else 1
        fetch_ahead(Plane0, TILES * split * share, TILES * blocks, rows, tile * BLOCK_N, RUN, BLOCK_N, AHEAD)
    scale, zero = grid_of(Scale, Zero, split * share * (COUNT * RUN), row, rows, columns, GROUP)
    after_the_kernel_before(EARLY)
    known = tl.minimum(m, inputs - 1).to(tl.int64)  # what is beyond is not written
    x_at = X + known[None, :] * stride_x + word[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for block in tl.range(split * share, tl.minimum(split * share + share, blocks), num_stages=STAGES):
        low0, low1, high = words_of(Plane0, Plane1, block, blocks, rows, row, word, BITS, RUN)
        if BITS == 3:  # 32 runs in a row would take the compiler a minute
            for part in range(COUNT // PER):
                first = block * (COUNT * RUN) + part * (PER * RUN)
                scale1, zero1 = grid_of(Scale, Zero, first + PER * RUN, row, rows, columns, GROUP)  # of the next
                total += group_product(
                    x_at, low0, low1, high, scale, zero, word, first, part * PER, columns,
                    BITS, RUN, PER, EVEN, PRECISION,
                )  # fmt: skip
                scale, zero = scale1, zero1
        else:
            for part in tl.static_range(COUNT // PER):
                first = block * (COUNT * RUN) + part * (PER * RUN)
                scale1, zero1 = grid_of(Scale, Zero, first + PER * RUN, row, rows, columns, GROUP)
                total += group_product(
                    x_at, low0, low1, high, scale, zero, word, first, part * PER, columns,
                    BITS, RUN, PER, EVEN, PRECISION,
                )  # fmt: skip
                scale, zero = scale1, zero1

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
    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, HAS_BIAS: tl.constexpr, EARLY: tl.constexpr,
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
        if start == split * share:
            after_the_kernel_before(EARLY)
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
