"""How products with packed weights are launched: tiles by architecture and number of rows, splits, and their room."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from effnlp_lab.early_start import early_options
from effnlp_lab.quantization.kernel_product import dequantize_kernel, product_kernel, row_kernel
from effnlp_lab.quantization.packing import PLANES, PackedWeight


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


AHEAD = 256
"""Lines of 128 bytes that a program of `product_kernel` asks for while the kernel before it still runs."""


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
        return Tile(64, 16, 4, 2, 6)
    if width == 64 and inputs <= 64:
        return Tile(64, 64, 4, 2, 2)
    return Tile(64, width, 4, 2 if bits == 2 else 3)


def product(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, split: int | None = None) -> Tensor:
    """x [inputs, columns] @ weight.T + bias, in x's dtype. Groups must be a multiple of 16 columns."""
    inputs, rows = len(x), weight.rows
    out = torch.empty(inputs, rows, dtype=x.dtype, device=x.device)
    if not inputs:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    arch = _architecture(x.device)
    tile = tile_for(inputs, weight.run, x.element_size(), arch, weight.bits)
    tiles, bands = triton.cdiv(rows, tile.rows), triton.cdiv(inputs, tile.inputs)
    count = max(32 // bits for bits in PLANES[weight.bits])
    blocks = triton.cdiv(weight.columns, count * weight.run)
    split = split or split_for(tiles * bands, blocks, _processors(x.device), tile.programs)
    parts, counters = workspace(x.device, split * inputs * rows if split > 1 else 0, tiles * bands)
    arguments = (weight.planes[0], weight.planes[-1], weight.scale, weight.zero, out if bias is None else bias, out,
                 parts, counters)  # fmt: skip
    sizes = {"BITS": weight.bits, "RUN": weight.run, "GROUP": weight.group_size, "PER": runs_per_scale(weight)}
    sizes |= early_options(arch)
    sizes |= {"SPLIT": split > 1, "BLOCK_N": tile.rows, "HAS_BIAS": bias is not None, "num_warps": tile.warps}
    if tile.inputs == 1:
        block_b = max(1, ONE_ROW // (count * weight.run))
        row_kernel[(tiles, split)](x, *arguments, rows, weight.columns, blocks, split, BLOCK_B=block_b, **sizes)
    else:
        product_kernel[(tiles, split, bands)](
            x, *arguments, inputs, rows, weight.columns, blocks, split, x.stride(0), BLOCK_M=tile.inputs,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32", STAGES=tile.stages,
            AHEAD=AHEAD if sizes["EARLY"] else 0, EVEN=weight.columns % (count * weight.run) == 0, **sizes,
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
    """Into how many parts to cut the sum, so that each processor of the card has some `programs` programs to run.

    Twice as many where that shares the work out more evenly: 172 tiles keep 132 processors busy for two rounds of which
    the second is nearly empty, 3 x 172 for four that are nearly full.
    """
    wanted = max(1, min(blocks, processors * programs // max(tiles, 1)))
    most = max(1, min(blocks, 2 * processors * programs // max(tiles, 1)))
    rounds = {parts: triton.cdiv(parts * tiles, processors) / parts for parts in range(wanted, most + 1)}
    evenest = min(rounds, key=rounds.get)
    wanted = evenest if rounds[evenest] < 0.9 * rounds[wanted] else wanted
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
