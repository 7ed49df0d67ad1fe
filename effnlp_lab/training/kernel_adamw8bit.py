"""The fused kernel of 8-bit AdamW: one pass over memory for all tensors of a group.

Each number is read once and written once: both states are decoded, moved on, and coded again with the new largest
magnitude of their block, and the parameter is updated, all in registers. With bfloat16 parameters that is 10 bytes a
number, with float32 16; a step made of separate operations moves about three times as many.

Decoding reads the map (1 KiB, which stays in the first-level cache). Coding uses no table. Within decade i the code is
linear in the magnitude, with slopes that fall from decade to decade: the position on the map is a concave function of
pieces, which is the least of its seven straight lines. Its whole part is the code, except that the value halfway
between the last cell of a decade and the first of the next lies a fifth into that first cell.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnlp_lab.training.blockwise import dynamic_map

COLUMNS = tl.constexpr(7)
"""Of a row of the table: addresses of parameter, gradient, codes of both states, their magnitudes; the number count."""
ROWS = 2
"""Blocks of 256 numbers that one program updates."""
WARPS = 1
SCALARS = ("beta1", "rest1", "beta2", "rest2", "step_size", "root2", "eps", "decay")


@triton.jit
def nearest_cell(magnitude, CELLS: tl.constexpr, SLOPE: tl.constexpr, START: tl.constexpr):
    """A number whose whole part is the cell nearest to a magnitude in [0, 1]; decade i begins at cell CELLS 2^i.

    SLOPE and START are of the line of the first decade, bent so that the bound to zero, too, lies 0.2 into its first
    cell. A decade begins at a power of two, which is a position without its mantissa: taken from 0.2 before, what is
    less than that into a decade is held below its beginning, and nothing else is changed, but that 1 stays in a cell.
    """
    position = tl.minimum(magnitude * SLOPE + START, magnitude * (CELLS * 2e5 / 0.9) + CELLS * 16 / 9)
    position = tl.minimum(position, magnitude * (CELLS * 4e4 / 0.9) + CELLS * 32 / 9)
    position = tl.minimum(position, magnitude * (CELLS * 8e3 / 0.9) + CELLS * 64 / 9)
    position = tl.minimum(position, magnitude * (CELLS * 1600 / 0.9) + CELLS * 128 / 9)
    position = tl.minimum(position, magnitude * (CELLS * 320 / 0.9) + CELLS * 256 / 9)
    position = tl.minimum(position, magnitude * (CELLS * 64 / 0.9) + CELLS * 512 / 9)
    decade = ((position - 0.2).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.minimum(position, 2 * decade - 0.5)


@triton.jit
def code_signed(x):
    """The nearest of 256 values to x in [-1, 1]: 127 is zero, 0 to 126 and 128 to 254 the cells, 255 is 1."""
    cell = nearest_cell(tl.abs(x), 1, 1e6 / 0.9, 1.2 - 0.275 / 0.9)
    cell = tl.where(x > 0.996484375, 128.5, cell)
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    return ((cell.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True).to(tl.int32) + 127).to(tl.uint8)


@triton.jit
def code_unsigned(x):
    """The nearest of 256 values to x in [0, 1]: 0 is zero, 1 to 254 the cells, 255 is 1."""
    cell = nearest_cell(x, 2, 0.8e6 / 0.3875, 2.2 - 0.13 / 0.3875)
    return (tl.where(x > 0.9982421875, 256.5, cell).to(tl.int32) - 1).to(tl.uint8)


@triton.jit
def over_root(m, v, root2, eps, APPROXIMATE: tl.constexpr):
    """m / (sqrt(v) root2 + eps). The card's own approximations are good to 2^-22; the interpreter has none."""
    if APPROXIMATE:
        root = tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [v], tl.float32, True, 1)
        divisor = root * root2 + eps
        return m * tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [divisor], tl.float32, True, 1)
    return m / (tl.sqrt(v) * root2 + eps)


@triton.jit(do_not_specialize=["beta1", "rest1", "beta2", "rest2", "step_size", "root2", "eps", "decay"])
def adamw8bit_kernel(
    P, G, table, work, map_signed, map_unsigned,
    beta1, rest1, beta2, rest2, step_size, root2, eps, decay,
    ROWS: tl.constexpr, MASKED: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Program i updates chunk work[i, 1] of tensor work[i, 0]. Grid: rows of work.

    P and G are any parameter and gradient of the group, for their types. table [tensors, 7] int64, work [programs, 2]
    int32. rest is 1 - beta, step_size lr / (1 - beta1^t), root2 1 / sqrt(1 - beta2^t), decay 1 - lr weight_decay. With
    MASKED the chunk may reach past the end and nothing need be aligned; else every address is a multiple of 16.
    """
    program = tl.program_id(0).to(tl.int64)
    entry = table + tl.load(work + 2 * program).to(tl.int64) * COLUMNS
    first_block = tl.load(work + 2 * program + 1).to(tl.int64) * ROWS
    p_address, g_address = tl.load(entry), tl.load(entry + 1)
    m_address, v_address = tl.load(entry + 2), tl.load(entry + 3)
    m_scales = tl.load(entry + 4).to(tl.pointer_type(tl.float32)) + first_block
    v_scales = tl.load(entry + 5).to(tl.pointer_type(tl.float32)) + first_block
    first = first_block * 256
    p_at, g_at = p_address.to(P.dtype) + first, g_address.to(G.dtype) + first
    m_at, v_at = m_address.to(tl.pointer_type(tl.uint8)) + first, v_address.to(tl.pointer_type(tl.uint8)) + first
    if not MASKED:
        p_at, g_at = tl.multiple_of(p_at, 16), tl.multiple_of(g_at, 16)
        m_at, v_at = tl.multiple_of(m_at, 16), tl.multiple_of(v_at, 16)

    blocks, inner = tl.arange(0, ROWS), tl.arange(0, ROWS * 256)
    if MASKED:
        left = tl.load(entry + 6) - first
        inside, block_inside = inner < left, blocks * 256 < left
        m_codes = tl.load(m_at + inner, mask=inside, other=0)
        v_codes = tl.load(v_at + inner, mask=inside, other=0)
        g = tl.load(g_at + inner, mask=inside, other=0.0).to(tl.float32)
        p = tl.load(p_at + inner, mask=inside, other=0.0).to(tl.float32)
        m_scale = tl.load(m_scales + blocks, mask=block_inside, other=0.0)
        v_scale = tl.load(v_scales + blocks, mask=block_inside, other=0.0)
    else:
        m_codes, v_codes = tl.load(m_at + inner), tl.load(v_at + inner)
        g, p = tl.load(g_at + inner).to(tl.float32), tl.load(p_at + inner).to(tl.float32)
        m_scale, v_scale = tl.load(m_scales + blocks), tl.load(v_scales + blocks)

    m = tl.reshape(tl.load(map_signed + m_codes.to(tl.int64)), [ROWS, 256]) * (m_scale * beta1)[:, None]
    v = tl.reshape(tl.load(map_unsigned + v_codes.to(tl.int64)), [ROWS, 256]) * (v_scale * beta2)[:, None]
    g, p = tl.reshape(g, [ROWS, 256]), tl.reshape(p, [ROWS, 256])
    m += rest1 * g
    v += rest2 * (g * g)
    p = p * decay - step_size * over_root(m, v, root2, eps, APPROXIMATE)
    p = tl.reshape(p, [ROWS * 256]).to(P.dtype.element_ty)
    if MASKED:
        keep = tl.reshape(inside, [ROWS, 256])
        m, v = tl.where(keep, m, 0.0), tl.where(keep, v, 0.0)
    m_scale, v_scale = tl.max(tl.abs(m), 1), tl.max(v, 1)
    m_codes = tl.reshape(code_signed(m * (1 / tl.maximum(m_scale, 1e-37))[:, None]), [ROWS * 256])
    v_codes = tl.reshape(code_unsigned(v * (1 / tl.maximum(v_scale, 1e-37))[:, None]), [ROWS * 256])

    if MASKED:
        tl.store(p_at + inner, p, mask=inside)
        tl.store(m_at + inner, m_codes, mask=inside)
        tl.store(v_at + inner, v_codes, mask=inside)
        tl.store(m_scales + blocks, m_scale, mask=block_inside)
        tl.store(v_scales + blocks, v_scale, mask=block_inside)
    else:
        tl.store(p_at + inner, p)
        tl.store(m_at + inner, m_codes)
        tl.store(v_at + inner, v_codes)
        tl.store(m_scales + blocks, m_scale)
        tl.store(v_scales + blocks, v_scale)


def launch(parameter: Tensor, gradient: Tensor, table: Tensor, work: Tensor, masked: bool,
           scalars: dict[str, float]) -> None:  # fmt: skip
    """Run one work list. parameter and gradient: any of the group, for their types; table and work on their device."""
    device = parameter.device
    maps = dynamic_map(True, device), dynamic_map(False, device)
    arguments = (parameter, gradient, table, work, *maps, *(scalars[name] for name in SCALARS))
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        adamw8bit_kernel[(work.shape[0],)](
            *arguments, ROWS=ROWS, MASKED=masked, APPROXIMATE=device.type == "cuda", num_warps=WARPS
        )
