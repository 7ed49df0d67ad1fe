"""What lies between the matrix products of a decoder layer, in one kernel each where plain PyTorch takes five.

They round where the modules of `transformers` round: after the sum, after the normalisation, after the activation.
"""

import triton
import triton.language as tl

from effnlp_lab.early_start import after_the_kernel_before


@triton.jit
def norm_kernel(
    X, Residual, Weight, Out, columns, eps, BLOCK: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr
):
    """RMSNorm of a row (Zhang & Sennrich 2019); with ADD of X + Residual, and the sum goes to Residual. Grid: rows.

    Weight, which no kernel of a model writes, is read while the kernel before this one ends.
    """
    row = tl.program_id(0).to(tl.int64) * columns
    column = tl.arange(0, BLOCK)
    inside = column < columns
    weight = tl.load(Weight + column, mask=inside, other=0.0).to(tl.float32)
    after_the_kernel_before(EARLY)
    x = tl.load(X + row + column, mask=inside, other=0.0)
    if ADD:
        x = (x.to(tl.float32) + tl.load(Residual + row + column, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(Residual + row + column, x, mask=inside)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / columns + eps)
    tl.store(Out + row + column, ((wide * scale).to(x.dtype).to(tl.float32) * weight).to(x.dtype), mask=inside)


@triton.jit
def gate_kernel(Gate, Up, Out, columns, gate_stride, up_stride, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """silu(gate) * up of a row's stretch (Shazeer 2020, SwiGLU). Grid: (rows, ceil(columns / BLOCK))."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    after_the_kernel_before(EARLY)
    gate = tl.load(Gate + row * gate_stride + column, mask=inside, other=0.0)
    up = tl.load(Up + row * up_stride + column, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    active = (wide * tl.sigmoid(wide)).to(gate.dtype)
    tl.store(Out + row * columns + column, (active.to(tl.float32) * up.to(tl.float32)).to(up.dtype), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def greedy_kernel(Logits, Out, Newest, slots, columns, stride, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """Where a row's largest number is, the first of several, for Out and for the row's slot in Newest. Grid: rows.

    Each place of a block keeps its own best.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    where = column
    after_the_kernel_before(EARLY)
    for start in range(0, columns, BLOCK):
        x = tl.load(Logits + row * stride + start + column, mask=start + column < columns, other=float("-inf"))
        better = x.to(tl.float32) > best
        best = tl.where(better, x.to(tl.float32), best)
        where = tl.where(better, start + column, where)
    first = tl.min(tl.where(best == tl.max(best, 0), where, columns - 1), 0)
    tl.store(Out + row, first.to(tl.int64))
    tl.store(Newest + tl.load(slots + row), first.to(tl.int64))
