"""A table of sixteen 16-bit numbers in registers: NF4 codes become levels by permuting bytes, without touching memory.

`prmt` picks four bytes out of eight, each by three bits. So the low bytes of the levels are two eights of bytes, picked
by the low three bits of a code, and the code's fourth bit chooses between the two; the high bytes likewise. Four codes
are turned at once: those in one byte of two words.
"""

from __future__ import annotations

import torch

from effnlp_lab.adapters.nf4 import nf4_levels


def table(dtype: str) -> list[list[str]]:
    """Four registers of low bytes and four of high bytes of the levels in a 16-bit dtype, as hexadecimal constants."""
    numbers = nf4_levels().to(getattr(torch, dtype)).view(torch.int16).tolist()
    planes = [[(number >> shift) & 255 for number in numbers] for shift in (0, 8)]
    words = [[sum(plane[4 * i + j] << (8 * j) for j in range(4)) for i in range(4)] for plane in planes]
    return [[f"0x{word:08x}" for word in plane] for plane in words]


def assembly(dtype: str) -> str:
    """PTX, from two words ($8, $9) to eight pairs ($0 to $7): pair j holds the levels of both words' code j."""
    low, high = table(dtype)
    lines = [".reg .b32 c, pick, side, a, b, l, h;"]
    for byte in range(4):  # four codes: those in this byte of the two words
        lines += [
            f"prmt.b32 c, $8, $9, 0x{(4 + byte) * 16 + byte:04x};",
            "and.b32 pick, c, 0x7777;",
            "shr.b32 side, c, 3;",
            "and.b32 side, side, 0x1111;",
            "prmt.b32 side, 0x0000ff00, 0, side;",  # a byte of ones where the code is 8 or more
        ]
        for plane, name in ((low, "l"), (high, "h")):
            lines += [
                f"prmt.b32 a, {plane[0]}, {plane[1]}, pick;",
                f"prmt.b32 b, {plane[2]}, {plane[3]}, pick;",
                f"lop3.b32 {name}, b, a, side, 0xe4;",  # side ? b : a
            ]
        lines += [f"prmt.b32 ${2 * byte}, l, h, 0x7351;", f"prmt.b32 ${2 * byte + 1}, l, h, 0x6240;"]
    return "{ " + " ".join(lines) + " }"
