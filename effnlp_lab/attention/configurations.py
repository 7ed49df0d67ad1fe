"""Tile shapes per architecture: the one table that decides how the kernels are cut.

Measured on sm_90 (H100, CUDA 13, Triton 3.6). sm_75, sm_80 and sm_86 are chosen so that every kernel compiles and fits
the card's shared memory, which a test checks with the compiler; they were not timed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch

Pass = Literal["forward", "dkdv", "dq", "decode"]


@dataclass(frozen=True)
class Tile:
    """Rows of Q and of K (and V) in a tile, warps a program, and tiles in flight (the software pipeline's stages).

    In decoding, `queries` is the most rows that one program takes.
    """

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2


SHARED_MEMORY = {75: 64 * 1024, 80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one program may use, by architecture (86 stands for 86 and 89)."""

# (architecture, bytes a number, head dimension rounded up to a power of two) -> one tile per pass.
_TABLE: dict[tuple[int, int, int], dict[str, Tile]] = {}


def _add(arch: int, itemsize: int, block_d: int, forward: Tile, dkdv: Tile, dq: Tile, decode: Tile) -> None:
    _TABLE[arch, itemsize, block_d] = {"forward": forward, "dkdv": dkdv, "dq": dq, "decode": decode}


# fmt: off
#    arch  bytes dim  forward               dkdv                  dq                    decode
_add(90,   2,    32,  Tile(64, 64, 4, 3),   Tile(64, 64, 4, 3),   Tile(64, 64, 4, 3),   Tile(64, 128, 4, 3))
_add(90,   2,    64,  Tile(64, 128, 4, 2),  Tile(128, 64, 4, 2),  Tile(64, 64, 4, 2),   Tile(64, 128, 4, 3))
_add(90,   2,    128, Tile(64, 64, 4, 3),   Tile(64, 64, 4, 2),   Tile(64, 64, 4, 2),   Tile(64, 64, 4, 3))
_add(90,   2,    256, Tile(128, 64, 8, 2),  Tile(64, 64, 8, 2),   Tile(128, 32, 8, 2),  Tile(32, 32, 4, 3))
_add(80,   2,    32,  Tile(128, 64, 4, 2),  Tile(64, 64, 4, 2),   Tile(64, 64, 4, 2),   Tile(64, 64, 4, 2))
_add(80,   2,    64,  Tile(128, 64, 4, 2),  Tile(64, 64, 4, 2),   Tile(64, 64, 4, 2),   Tile(64, 64, 4, 2))
_add(80,   2,    128, Tile(128, 64, 8, 2),  Tile(32, 64, 4, 2),   Tile(64, 32, 4, 2),   Tile(64, 64, 4, 2))
_add(80,   2,    256, Tile(64, 32, 4, 2),   Tile(32, 32, 4, 1),   Tile(32, 32, 4, 1),   Tile(32, 32, 4, 2))
_add(86,   2,    32,  Tile(128, 64, 4, 2),  Tile(64, 64, 4, 2),   Tile(64, 64, 4, 2),   Tile(64, 64, 4, 2))
_add(86,   2,    64,  Tile(128, 64, 4, 2),  Tile(64, 64, 4, 1),   Tile(64, 64, 4, 1),   Tile(64, 64, 4, 2))
_add(86,   2,    128, Tile(64, 64, 4, 2),   Tile(32, 64, 4, 1),   Tile(64, 32, 4, 1),   Tile(64, 64, 4, 2))
_add(86,   2,    256, Tile(64, 32, 4, 1),   Tile(32, 32, 4, 1),   Tile(32, 32, 4, 1),   Tile(32, 32, 4, 2))
_add(75,   2,    32,  Tile(64, 64, 4, 1),   Tile(32, 64, 4, 1),   Tile(64, 32, 4, 1),   Tile(64, 64, 4, 1))
_add(75,   2,    64,  Tile(64, 64, 4, 1),   Tile(32, 64, 4, 1),   Tile(64, 32, 4, 1),   Tile(64, 64, 4, 1))
_add(75,   2,    128, Tile(64, 32, 4, 1),   Tile(32, 32, 4, 1),   Tile(32, 32, 4, 1),   Tile(64, 32, 4, 1))
_add(75,   2,    256, Tile(32, 32, 4, 1),   Tile(16, 16, 4, 1),   Tile(16, 16, 4, 1),   Tile(32, 16, 4, 1))
for _arch in (75, 80, 86, 90):  # exact float32 products run on the ordinary units: small tiles
    _add(_arch, 4, 32,  Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(64, 32, 4, 1))
    _add(_arch, 4, 64,  Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(64, 32, 8, 1))
    _add(_arch, 4, 128, Tile(32, 32, 8, 1), Tile(16, 32, 8, 1), Tile(32, 16, 8, 1), Tile(64, 32, 8, 1))
    if _arch > 75:  # the smallest tile needs 65 KiB
        _add(_arch, 4, 256, Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(32, 16, 8, 1))
# fmt: on

INTERPRETED = Tile(64, 64, 1, 1)
"""The tile in Triton's interpreter, where a tile costs about 3.5 ms whatever its size."""


def tile_for(which: Pass, device: torch.device, dtype: torch.dtype, block_d: int) -> Tile:
    """The tile of one pass on a device: a row of the table, or the interpreter's."""
    if device.type != "cuda":
        return INTERPRETED
    arch = architecture(capability_of(device))
    if (arch, dtype.itemsize, block_d) not in _TABLE:
        raise ValueError(
            f"float32 with a head dimension above {block_d // 2} does not fit in this card's "
            f"{SHARED_MEMORY[arch] // 1024} KiB of shared memory: use float16."
        )
    return _TABLE[arch, dtype.itemsize, block_d][which]


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, asked for once: asking takes as long as starting a kernel."""
    return torch.cuda.get_device_capability(device)


def architecture(capability: tuple[int, int]) -> int:
    """The table's architecture for a compute capability: the newest that offers no more shared memory than the card."""
    major, minor = capability
    if major < 8:
        return 75
    if major == 8:
        return 80 if minor in (0, 7) else 86
    return 86 if major == 12 else 90  # consumer Blackwell (12.x) has 99 KiB, data-centre Blackwell (10.x) 227 KiB


def block_d_for(head_dim: int) -> int:
    """Columns of a tile: the head dimension rounded up to a power of two, at least 32."""
    return max(32, 1 << (head_dim - 1).bit_length())


def precision_for(dtype: torch.dtype) -> str:
    """Triton multiplies float32 in TF32, with three decimal digits, unless told otherwise."""
    return "ieee" if dtype == torch.float32 else "tf32"


def interpreted(device: torch.device) -> bool:
    """Whether kernels on this device run in Triton's interpreter."""
    return device.type == "cpu"


def table() -> dict[tuple[int, int, int], dict[str, Tile]]:
    """The whole table: (architecture, bytes a number, columns of a tile) -> the tile of each pass."""
    return dict(_TABLE)
