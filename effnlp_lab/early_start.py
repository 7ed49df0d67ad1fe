"""Programmatic dependent launch: on sm_90 a kernel may start while the kernel before it ends.

A kernel of some microseconds spends a good part of them on its start and its end. One that may start early does what
depends on nothing, waits for the kernel before it, and only then reads what that one wrote, or writes anything.
"""

from __future__ import annotations

import triton
from triton import language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def starts_early(arch: int) -> bool:
    """Whether cards of an architecture (90 for compute capability 9.0) let a kernel start early."""
    return arch >= 90


def early_options(arch: int) -> dict[str, bool]:
    """What a kernel with EARLY among its constants is started with."""
    return {"EARLY": True, "launch_pdl": True} if starts_early(arch) else {"EARLY": False}


@triton.jit
def after_the_kernel_before(EARLY: tl.constexpr):
    """Wait for the end of the kernel before this one, if this one may start early; and let the next one start."""
    wait_for_the_kernel_before(EARLY)
    let_the_next_start(EARLY)


@triton.jit
def wait_for_the_kernel_before(EARLY: tl.constexpr):
    """The first half of it, for a kernel that needs the whole card until its end."""
    if EARLY:
        gdc_wait()


@triton.jit
def let_the_next_start(EARLY: tl.constexpr):
    """The second half: the next kernel starts once every program has come here, or has ended."""
    if EARLY:
        gdc_launch_dependents()
