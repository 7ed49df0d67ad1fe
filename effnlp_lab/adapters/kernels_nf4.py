"""Triton kernels for NF4: dequantization, and products of few rows that read the codes themselves.

Codes are read as words of 32 bits, eight codes each: one thread turns a word into eight neighbouring numbers, which is
16 bytes of a 16-bit result and so one store. In the products the scale of a block waits until the block's 64 terms are
summed: it costs one multiplication in 64, and the levels go into the tensor cores as they are.
"""

import triton
import triton.language as tl

from effnlp_lab.adapters.permutation_nf4 import assembly

BLOCK = tl.constexpr(64)
"""Weights that share a scale, in the products; eight words."""
PERMUTE_BF16 = tl.constexpr(assembly("bfloat16"))
PERMUTE_FP16 = tl.constexpr(assembly("float16"))
OPERANDS = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 2))
EIGHT_BF16 = tl.constexpr((tl.bfloat16,) * 8)
EIGHT_FP16 = tl.constexpr((tl.float16,) * 8)


@triton.jit
def find_scales(index, keep, Scales, Magnitudes, Mean, Values, DOUBLE: tl.constexpr):
    """The absmax of blocks: read, or decoded from 8 bits (see double_quantization.py), with the same roundings."""
    if DOUBLE:
        code = tl.load(Scales + index, mask=keep, other=0).to(tl.int32)
        magnitude = tl.load(Magnitudes + index // 256, mask=keep, other=0.0)
        scale = tl.load(Values + code) * magnitude + tl.load(Mean)
    else:
        scale = tl.load(Scales + index, mask=keep, other=0.0)
    return scale


@triton.jit
def code_shifts():
    """Where in a word, whose first byte is the lowest, its eight codes lie: of two in a byte the high one is first."""
    place = tl.arange(0, 8)
    return place // 2 * 8 + 4 - place % 2 * 4


@triton.jit
def dequantize_kernel(
    Words, Out, Levels, Scales, Magnitudes, Mean, Values, numel,
    TILE: tl.constexpr, BLOCK_WORDS: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Program i writes the numbers of words i TILE to (i + 1) TILE, each word's block having BLOCK_WORDS words.

    Levels float32 [16]. Indices within a program are 32 bits, as is the number of a block.
    """
    first = tl.program_id(0).to(tl.int64) * TILE
    left = numel - first * 8
    word = tl.arange(0, TILE)
    keep = word * 8 < left
    words = tl.load(Words + first + word, mask=keep, other=0)
    block = (first // BLOCK_WORDS).to(tl.int32) + word // BLOCK_WORDS
    scale = find_scales(block, keep, Scales, Magnitudes, Mean, Values, DOUBLE)
    codes = (words[:, None] >> code_shifts()[None, :]) & 15
    out = tl.load(Levels + codes) * scale[:, None]
    at = word[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(Out + first * 8 + at, out.to(Out.dtype.element_ty), mask=at < left)


@triton.jit
def decode(words, Levels, PERMUTE: tl.constexpr):
    """The levels of words [A, B], [A, B, 8] in the dtype of Levels: read from the table, or put together from bytes."""
    if PERMUTE:
        if Levels.dtype.element_ty == tl.bfloat16:
            x = tl.inline_asm_elementwise(PERMUTE_BF16, OPERANDS, [words], dtype=EIGHT_BF16, is_pure=True, pack=2)
        else:
            x = tl.inline_asm_elementwise(PERMUTE_FP16, OPERANDS, [words], dtype=EIGHT_FP16, is_pure=True, pack=2)
        even = tl.join(tl.join(x[0], x[4]), tl.join(x[2], x[6]))
        odd = tl.join(tl.join(x[1], x[5]), tl.join(x[3], x[7]))
        levels = tl.reshape(tl.join(even, odd), [words.shape[0], words.shape[1], 8])
    else:
        levels = tl.load(Levels + ((words[:, :, None] >> code_shifts()[None, None, :]) & 15))
    return levels


@triton.jit
def row_kernel(
    X, Words, Out, Bias, Levels, Scales, Magnitudes, Mean, Values, columns, blocks, blocks_each,
    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, DOUBLE: tl.constexpr, PERMUTE: tl.constexpr, BIAS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One row of X times the weight. Grid (tiles of BLOCK_N outputs, splits): see `product_kernel`.

    A thread sums the terms of its words in float32; the sum of a block is multiplied by the block's scale.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    in_n = n < columns
    end = tl.minimum((split + 1) * blocks_each, blocks)
    total = tl.zeros([BLOCK_N, BLOCK_B], dtype=tl.float32)
    for start in tl.range(split * blocks_each, end, BLOCK_B, num_stages=STAGES):
        block, word = start + tl.arange(0, BLOCK_B), start * 8 + tl.arange(0, BLOCK_B * 8)
        in_b, in_w = block < end, word < end * 8
        words_at = Words + n.to(tl.int64)[:, None] * (blocks * 8) + word[None, :]
        words = tl.load(words_at, mask=in_n[:, None] & in_w[None, :], other=0)
        x = tl.load(X + word[:, None] * 8 + tl.arange(0, 8)[None, :], mask=in_w[:, None], other=0.0).to(tl.float32)
        terms = tl.sum(decode(words, Levels, PERMUTE).to(tl.float32) * x[None, :, :], 2)
        index = n.to(tl.int64)[:, None] * blocks + block[None, :]
        scale = find_scales(index, in_n[:, None] & in_b[None, :], Scales, Magnitudes, Mean, Values, DOUBLE)
        total += tl.sum(tl.reshape(terms, [BLOCK_N, BLOCK_B, 8]), 2) * scale
    out = tl.sum(total, 1)
    if BIAS:
        out += tl.load(Bias + n, mask=in_n, other=0.0).to(tl.float32)
    tl.store(Out + split.to(tl.int64) * columns + n, out.to(Out.dtype.element_ty), mask=in_n)


@triton.jit
def product_kernel(
    X, Words, Out, Bias, Levels, Scales, Magnitudes, Mean, Values, rows, columns, blocks, blocks_each,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOUBLE: tl.constexpr, PERMUTE: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All rows of X [rows, 64 blocks] times BLOCK_N rows of the weight, over one split of its columns, transposed.

    Grid (tiles of BLOCK_N outputs, splits). Split s sums blocks s blocks_each to (s + 1) blocks_each into slice s of
    Out [splits, rows, columns]; with one split Out is the result, and BIAS adds the bias.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    inner = tl.arange(0, BLOCK)
    in_n, in_m = n < columns, m < rows
    words_at = Words + n.to(tl.int64)[:, None] * (blocks * 8) + tl.arange(0, 8)[None, :]
    x_at = X + m[None, :] * (blocks * BLOCK) + inner[:, None]
    total = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for block in tl.range(split * blocks_each, tl.minimum((split + 1) * blocks_each, blocks), num_stages=STAGES):
        words = tl.load(words_at + block * 8, mask=in_n[:, None], other=0)
        x = tl.load(x_at + block * BLOCK, mask=in_m[None, :], other=0.0)
        weight = tl.reshape(decode(words, Levels, PERMUTE), [BLOCK_N, BLOCK])
        scale = find_scales(n.to(tl.int64) * blocks + block, in_n, Scales, Magnitudes, Mean, Values, DOUBLE)
        total += tl.dot(weight, x, input_precision=PRECISION) * scale[:, None]
    if BIAS:
        total += tl.load(Bias + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    at = (split * rows + m).to(tl.int64)[None, :] * columns + n[:, None]
    tl.store(Out + at, total.to(Out.dtype.element_ty), mask=in_n[:, None] & in_m[None, :])


@triton.jit
def sum_splits_kernel(Parts, Out, Bias, numel, columns, splits, TILE: tl.constexpr, BIAS: tl.constexpr):
    """Out [numel] is the sum of Parts [splits, numel], first to last, with the bias of its column."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    keep = at < numel
    total = tl.zeros([TILE], dtype=tl.float32)
    for split in range(0, splits):
        total += tl.load(Parts + split * numel + at, mask=keep, other=0.0)
    if BIAS:
        total += tl.load(Bias + at % columns, mask=keep, other=0.0).to(tl.float32)
    tl.store(Out + at, total.to(Out.dtype.element_ty), mask=keep)
