"""How the kernels of a paged cache are cut, per architecture. Tune here.

Decoding waits for memory: what counts is how many bytes are under way, so small tiles, several in flight, and several
programs on a multiprocessor. Reading a prompt waits for the tensor cores: large tiles.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
import triton

from effnlp_lab.attention.configurations import INTERPRETED, Tile, architecture, capability_of

PROGRAMS_PER_SM = 2
"""Decoding programs that run side by side on a multiprocessor; their shared memory must allow it."""
MAX_SPLITS = 128
FULL_WAVES = 3
"""Programs that do not all run at once come in at least so many waves: of two, the second waits for stragglers."""
SHORT_SHARE = 1024
"""But not by shares of fewer keys than this, whose partial outputs cost more than the waiting."""
RAGGED_WAVES = 4
"""Waves of programs that sequences of different lengths, the longest first, are cut into: enough to even them out."""
PROMPT_SPLITS = 8
NORM_WARPS = 8
GATE_BLOCK = 1024
ONE_WARP = 1024
GREEDY_BLOCK, GREEDY_WARPS = 8192, 8

# (architecture, bytes a number, columns of a tile) -> (decoding, reading a prompt). `queries` is the most rows that one
# program takes; decoding takes as few as it needs, 16 at least.
_TABLE: dict[tuple[int, int, int], tuple[Tile, Tile]] = {}


def _add(arch: int, itemsize: int, block_d: int, decode: Tile, prompt: Tile) -> None:
    _TABLE[arch, itemsize, block_d] = decode, prompt


# fmt: off
#    arch  bytes dim  decode               prompt
_add(90,   2,    32,  Tile(64, 128, 4, 4), Tile(128, 64, 4, 3))
_add(90,   2,    64,  Tile(64, 128, 4, 3), Tile(128, 64, 4, 3))
_add(90,   2,    128, Tile(64, 64, 4, 3),  Tile(128, 64, 8, 3))
_add(90,   2,    256, Tile(32, 32, 4, 3),  Tile(64, 32, 4, 2))
_add(80,   2,    32,  Tile(64, 128, 4, 3), Tile(128, 64, 4, 2))
_add(80,   2,    64,  Tile(64, 64, 4, 3),  Tile(128, 64, 4, 2))
_add(80,   2,    128, Tile(64, 64, 4, 2),  Tile(128, 64, 8, 2))
_add(80,   2,    256, Tile(32, 32, 4, 2),  Tile(64, 32, 4, 2))
_add(86,   2,    32,  Tile(64, 64, 4, 3),  Tile(128, 64, 4, 2))
_add(86,   2,    64,  Tile(64, 64, 4, 2),  Tile(128, 64, 4, 2))
_add(86,   2,    128, Tile(64, 64, 4, 2),  Tile(64, 64, 4, 2))
_add(86,   2,    256, Tile(32, 32, 4, 2),  Tile(64, 32, 4, 1))
_add(75,   2,    32,  Tile(64, 64, 4, 1),  Tile(64, 64, 4, 1))
_add(75,   2,    64,  Tile(64, 64, 4, 1),  Tile(64, 64, 4, 1))
_add(75,   2,    128, Tile(64, 32, 4, 1),  Tile(64, 32, 4, 1))
_add(75,   2,    256, Tile(32, 16, 4, 1),  Tile(32, 16, 4, 1))
for _arch in (75, 80, 86, 90):  # exact float32 products run on the ordinary units: small tiles
    _add(_arch, 4, 32,  Tile(64, 32, 4, 1), Tile(32, 32, 4, 1))
    _add(_arch, 4, 64,  Tile(64, 32, 4, 1), Tile(32, 32, 8, 1))
    _add(_arch, 4, 128, Tile(64, 32, 8, 1), Tile(32, 32, 8, 1))
    if _arch > 75:  # the smallest tile does not fit
        _add(_arch, 4, 256, Tile(32, 16, 8, 1), Tile(16, 16, 8, 1))
# fmt: on


def tiles_for(device: torch.device, dtype: torch.dtype, block_d: int) -> tuple[Tile, Tile]:
    """The tiles for decoding and for reading a prompt on a device. Raises ValueError for what does not fit the card."""
    if device.type != "cuda":
        return INTERPRETED, INTERPRETED
    key = architecture(capability_of(device)), dtype.itemsize, block_d
    if key not in _TABLE:
        raise ValueError(f"float32 with head dimension {block_d} does not fit this card's shared memory: use float16.")
    return _TABLE[key]


def table() -> dict[tuple[int, int, int], tuple[Tile, Tile]]:
    """The whole table: (architecture, bytes a number, columns of a tile) -> (decode, prompt)."""
    return dict(_TABLE)


@functools.cache
def choose_splits(
    programs: int, longest: int, block: int, device: torch.device, kind: Literal["equal", "ragged", "prompt"] = "equal"
) -> int:
    """In how many shares to cut the keys of each sequence, so that `programs` times as many fill the card.

    longest: the most keys of a sequence. A card works in waves of as many programs as fit, and a last wave of a few
    takes as long as a full one: with equal lengths take the fewest shares that keep the waves nearly as full as any
    number could, and rather one wave or several than two, where that makes no short shares. Ragged lengths have no such
    last wave: take enough shares for several waves. A prompt has many rows, whose partial outputs cost much: take
    shares only while the card is not full.
    """
    most = max(1, min(MAX_SPLITS, -(-longest // block)))
    if device.type != "cuda":
        return min(most, 3)
    wave = PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
    if kind == "prompt":
        return min(most, PROMPT_SPLITS, max(1, wave // programs))
    if kind == "ragged":
        return min(most, max(1, round(RAGGED_WAVES * wave / programs)))
    waves = {n: programs * n / wave for n in range(1, most + 1)}
    even = {n: count for n, count in waves.items() if count <= 1 or count >= FULL_WAVES and longest >= n * SHORT_SHARE}
    full = {n: count / math.ceil(count) for n, count in (even or waves).items()}
    return next(n for n, share in full.items() if share >= 0.9 * max(full.values()))


def merging(splits: int, block_d: int) -> Tile:
    """How a row's partial outputs are merged: a few numbers, for which one warp is enough."""
    return Tile(0, 0, 1 if triton.next_power_of_2(splits) * block_d <= ONE_WARP else 4, 1)
