"""GPTQ's column loop in one kernel: a program holds a few rows of a block in registers through all of its columns.

In PyTorch a column costs a dozen launches, and a layer of 4096 columns 50,000 of them. Here it costs a row of the
inverse's factor from the cache and one rank-one update in registers. Column j is taken out by a sum in which all others
are zero. Divisions are rounded as IEEE says, so that codes agree with PyTorch's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnlp_lab.quantization import grid

ROWS = 8
"""Rows of a program: with one warp that is 32 numbers a thread for a block of 128 columns."""
WARPS = 1
WIDER = tl.constexpr(grid.WIDER)


@triton.jit
def round_even(x):
    """The nearest whole number, halves to even, for magnitudes below 2^22: what adding 1.5 * 2^23 leaves."""
    x = tl.minimum(tl.maximum(x, -4194304.0), 4194303.0)
    return (x + 12582912.0) - 12582912.0


@triton.jit
def grid_of(low, high, HIGHEST: tl.constexpr, SYMMETRIC: tl.constexpr, SCALE: tl.constexpr):
    """Scale and zero point of rows whose weights lie in [low, high], as grid.find_grid makes them."""
    low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
    if SYMMETRIC:
        high = tl.maximum(-low, high) * WIDER
        low = -high
    scale = tl.where(high == low, 1.0, tl.div_rn(high - low, low * 0 + HIGHEST))
    if SCALE == "fp16":
        scale = tl.maximum(scale, 6.103515625e-05).to(tl.float16).to(tl.float32)
    elif SCALE == "bf16":
        scale = tl.maximum(scale, 1.1754943508222875e-38).to(tl.bfloat16).to(tl.float32)
    if SYMMETRIC:
        zero = low * 0 + (HIGHEST + 1) // 2
    else:
        zero = tl.minimum(round_even(tl.div_rn(-low, scale)), HIGHEST)
    return scale, zero


@triton.jit
def columns_kernel(
    W, U, Codes, Errors, Scale, Zero, Groups, Keep, rows, columns, start, stride_w, stride_u, stride_scale,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, FIND: tl.constexpr, HIGHEST: tl.constexpr, SYMMETRIC: tl.constexpr,
    SCALE: tl.constexpr, KEEPS: tl.constexpr,
):  # fmt: skip
    """Columns start to start + columns of W [rows, *], corrected in place; Errors [rows, BLOCK] is for the rest.

    FIND: columns of a group whose grid is found here, where groups end inside the block; 0: Scale and Zero hold it.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (col < columns)[None, :]
    place = row[:, None] * stride_w + start + col[None, :]
    w = tl.load(W + place, mask=inside, other=0.0)
    if KEEPS:
        keep = tl.load(Keep + place, mask=inside, other=0) != 0
    codes = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    errors = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    factor = U + start.to(tl.int64) * (stride_u + 1)
    scale = tl.full((ROWS,), 1.0, dtype=tl.float32)
    zero = tl.zeros((ROWS,), dtype=tl.float32)
    for j in range(0, columns):
        group = tl.load(Groups + start + j)
        if FIND > 0:
            if (start + j) % FIND == 0:
                seen = ((col >= j) & (col < j + FIND))[None, :] & inside
                if KEEPS:
                    seen = seen & (keep == 0)
                only = tl.where(seen, w, 0.0)
                scale, zero = grid_of(tl.min(only, 1), tl.max(only, 1), HIGHEST, SYMMETRIC, SCALE)
                tl.store(Scale + row * stride_scale + group, scale, mask=row < rows)
                tl.store(Zero + row * stride_scale + group, zero, mask=row < rows)
        else:
            scale = tl.load(Scale + row * stride_scale + group, mask=row < rows, other=1.0)
            zero = tl.load(Zero + row * stride_scale + group, mask=row < rows, other=0.0)
        # The factor's row j is zero before column j, so that columns done stay as they are.
        u = tl.load(factor + j * stride_u + col, mask=(col > j) & (col < columns), other=0.0)
        diagonal = tl.load(factor + j * stride_u + j)
        here = (col == j)[None, :]
        value = tl.sum(tl.where(here, w, 0.0), 1)
        code = tl.minimum(tl.maximum(round_even(tl.div_rn(value, scale)) + zero, 0.0), HIGHEST)
        rounded = scale * (code - zero)
        if KEEPS:
            kept = tl.sum(tl.where(here & keep, 1, 0), 1) > 0
            rounded = tl.where(kept, value, rounded)
        error = tl.div_rn(value - rounded, rounded * 0 + diagonal)
        w = tl.where(here, rounded[:, None], w - error[:, None] * u[None, :])
        codes = tl.where(here, code[:, None], codes)
        errors = tl.where(here, error[:, None], errors)
    tl.store(W + place, w, mask=inside)
    tl.store(Codes + place, codes.to(tl.uint8), mask=inside)
    tl.store(Errors + row[:, None] * BLOCK + col[None, :], errors, mask=(row < rows)[:, None])


def quantize_block(
    work: Tensor, upper: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, groups: Tensor, start: int, end: int, *,
    find: int, bits: int, symmetric: bool, scale_dtype: torch.dtype, keep: Tensor | None,
) -> Tensor:  # fmt: skip
    """One block in place: work, codes [rows, columns], scale and zero [rows, groups]. Returns the errors, as a view.

    All float32 and contiguous; groups: int64 [columns], the group of each column.
    """
    rows, width = len(work), 1 << max(end - start - 1, 15).bit_length()
    errors = torch.empty(rows, width, dtype=torch.float32, device=work.device)
    marks = codes if keep is None else keep.contiguous().view(torch.uint8)
    kinds = {torch.float16: "fp16", torch.bfloat16: "bf16"}
    columns_kernel[(triton.cdiv(rows, ROWS),)](
        work, upper, codes, errors, scale, zero, groups, marks, rows, end - start, start, work.stride(0),
        upper.stride(0), scale.stride(0), BLOCK=width, ROWS=ROWS, FIND=find, HIGHEST=(1 << bits) - 1,
        SYMMETRIC=symmetric, SCALE=kinds.get(scale_dtype, "fp32"), KEEPS=keep is not None, num_warps=WARPS,
    )  # fmt: skip
    return errors[:, : end - start]
