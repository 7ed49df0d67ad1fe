"""How the NF4 kernels are launched: tiles by architecture, and the splits that give every multiprocessor work."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from effnlp_lab.adapters import kernels_nf4
from effnlp_lab.adapters.double_quantization import DoubleQuantized, dynamic_values
from effnlp_lab.adapters.nf4 import NF4Weight, nf4_levels
from effnlp_lab.errors import UsageError

PERMUTE = True
"""Whether compiled 16-bit products take levels from registers (permutation_nf4.py) or, as elsewhere, from a table."""
DEQUANTIZE_TILE, DEQUANTIZE_WARPS = 512, 4
"""Words a program, a multiple of every block's; warps a program."""
SUM_TILE = 1024
PROGRAMS, ROW_PROGRAMS = 6, 2
"""Programs that each multiprocessor should have at least, for one row the second; columns are split to get there."""
MOST_SPLITS = 8


@dataclass(frozen=True)
class Tile:
    """Outputs of a program, warps up to 16 rows, tiles in flight."""

    outputs: int
    warps: int
    stages: int


# Timed on sm_90; the others compile and fit. sm_75 has no asynchronous copies to keep tiles in flight.
TILES = {75: Tile(64, 2, 1), 80: Tile(64, 2, 3), 90: Tile(64, 2, 3)}
ROW_TILE = Tile(8, 2, 1)
"""For products of one row, of which a step takes ROW_BLOCKS blocks."""
ROW_BLOCKS = 16
INTERPRETED = Tile(64, 1, 1)


def dequantize(weight: NF4Weight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The kernel's `dequantize_plain`: the same numbers, bit for bit. `out`: where to write, contiguous."""
    _check_dtype(weight.device, dtype)
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    numel = weight.shape.numel()
    words = as_words(weight.codes)
    grid = (triton.cdiv(triton.cdiv(numel, 8), DEQUANTIZE_TILE),)
    with _on(weight.device):
        kernels_nf4.dequantize_kernel[grid](
            words, out, nf4_levels(weight.device), *_scales(weight), numel, TILE=DEQUANTIZE_TILE,
            BLOCK_WORDS=weight.block // 8, DOUBLE=isinstance(weight.scales, DoubleQuantized),
            num_warps=DEQUANTIZE_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def takes(rows: Tensor, weight: NF4Weight) -> bool:
    """Whether `product` can: blocks of 64 that no row of the weight shares, and at most 64 rows."""
    return weight.block == 64 and len(weight.shape) == 2 and weight.shape[1] % 64 == 0 and 0 < rows.shape[0] <= 64


def product(rows: Tensor, weight: NF4Weight, bias: Tensor | None = None, splits: int | None = None) -> Tensor:
    """rows Wᵀ + bias, [rows, out] in the rows' dtype, for 1 to 64 rows; sums in float32, always in the same order.

    Raises UsageError where `takes` is False.
    """
    if not takes(rows, weight):
        raise UsageError(
            f"The NF4 product takes 1 to 64 rows and blocks of 64 that divide a row of the weight, not {rows.shape[0]} "
            f"rows and blocks of {weight.block} in rows of {weight.shape[-1]}: dequantize the weight."
        )
    _check_dtype(rows.device, rows.dtype)
    count, columns, blocks = rows.shape[0], weight.shape[0], weight.shape[1] // 64
    compiled = rows.device.type == "cuda"
    tile = INTERPRETED if not compiled else ROW_TILE if count == 1 else TILES[_architecture(rows.device)]
    programs = triton.cdiv(columns, tile.outputs)
    if splits is None:
        wanted = (ROW_PROGRAMS if count == 1 else PROGRAMS) * (_multiprocessors(rows.device) if compiled else 1)
        splits = choose_splits(programs, blocks, wanted)
    each = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, each)
    out = torch.empty(count, columns, dtype=rows.dtype, device=rows.device)
    parts = out if splits == 1 else torch.empty(splits, count, columns, dtype=torch.float32, device=rows.device)
    permute = PERMUTE and compiled and rows.dtype.itemsize == 2
    levels = _levels(rows.device, rows.dtype)
    inputs = (
        rows.contiguous(),
        as_words(weight.codes),
        parts,
        bias if bias is not None else out,
        levels,
        *_scales(weight),
    )
    flags = {
        "DOUBLE": isinstance(weight.scales, DoubleQuantized),
        "PERMUTE": permute,
        "BIAS": bias is not None and splits == 1,
        "BLOCK_N": tile.outputs,
        "num_warps": tile.warps if count <= 16 or not compiled else 2 * tile.warps,
        "STAGES": tile.stages,
    }
    with _on(rows.device):
        if count == 1:
            kernels_nf4.row_kernel[(programs, splits)](*inputs, columns, blocks, each, BLOCK_B=ROW_BLOCKS, **flags)
        else:
            kernels_nf4.product_kernel[(programs, splits)](
                *inputs, count, columns, blocks, each, BLOCK_M=max(16, triton.next_power_of_2(count)),
                PRECISION="ieee" if rows.dtype == torch.float32 else "tf32", **flags,
            )  # fmt: skip
        if splits > 1:
            kernels_nf4.sum_splits_kernel[(triton.cdiv(out.numel(), SUM_TILE),)](
                parts, out, bias if bias is not None else out, out.numel(), columns, splits, TILE=SUM_TILE,
                BIAS=bias is not None,
            )  # fmt: skip
    return out


def choose_splits(programs: int, blocks: int, wanted: int) -> int:
    """Into how many parts to cut the columns, so that `programs` become about as many as are wanted."""
    return max(1, min(round(wanted / programs), MOST_SPLITS, blocks // 4))


def as_words(codes: Tensor) -> Tensor:
    """Codes as 32-bit words: a view where their number and their address allow it, else a padded copy."""
    if codes.numel() % 4 or codes.storage_offset() % 4:
        codes = torch.nn.functional.pad(codes, (0, -codes.numel() % 4))
    return codes.view(torch.int32)


def _scales(weight: NF4Weight) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `find_scales` takes; scales that are not in 8 bits have no magnitudes, mean and values, and none is read."""
    if isinstance(weight.scales, DoubleQuantized):
        return weight.scales.codes, weight.scales.magnitudes, weight.scales.mean, dynamic_values(weight.device)
    return (weight.scales,) * 4


@functools.cache
def _levels(device: torch.device, dtype: torch.dtype) -> Tensor:
    return nf4_levels(device).to(dtype)


@functools.cache
def _architecture(device: torch.device) -> int:
    capability = torch.cuda.get_device_capability(device)
    return max((arch for arch in TILES if arch <= capability[0] * 10 + capability[1]), default=75)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _check_dtype(device: torch.device, dtype: torch.dtype) -> None:
    if device.type == "cpu" and dtype == torch.bfloat16:
        raise UsageError("Triton's interpreter computes bfloat16 wrongly: use float32 or float16 on a CPU.")


def _on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
