"""Every kernel compiles for every architecture of the table, and fits the card's shared memory.

Triton compiles for a card that is not here. That needs Triton outside its interpreter, so each architecture compiles in
a process of its own, which this file is also the program of: `python test_kernels_compile.py 90`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAD_DIMS = (32, 64, 128, 256)
KERNELS = ("forward", "row_statistics", "dkdv", "dq", "decode", "merge")
ADAMW8BIT = ("adamw8bit", "adamw8bit masked")
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton has Linux wheels only")


def wanted(arch: int) -> set[tuple[str, str, int]]:
    """(kernel, dtype, head dimension). float16 and bfloat16 make the same tiles: one float16 size beside bfloat16."""
    half = "fp16" if arch == 75 else "bf16"
    sizes = {(half, dim) for dim in HEAD_DIMS} | {("fp16", 128)}
    if arch != 86:  # the same instructions as sm_80, and the same float32 tiles: only half precision has its own
        sizes |= {("fp32", dim) for dim in HEAD_DIMS if arch > 75 or dim <= 128}
    optimizer = {("adamw8bit", half, 0), ("adamw8bit", "fp32", 0), ("adamw8bit masked", half, 0)}
    if arch == 86:
        optimizer = set()
    return {(kernel, dtype, dim) for kernel in KERNELS for dtype, dim in sizes} | optimizer


@pytest.mark.parametrize("arch", (75, 80, 86, 90))
def test_every_kernel_compiles_and_fits(arch):
    from effnlp_lab.attention.configurations import SHARED_MEMORY

    records = compile_in_a_process(arch)
    combinations = [(r["kernel"], r["dtype"], r["head_dim"]) for r in records]
    assert wanted(arch) <= set(combinations), wanted(arch) - set(combinations)
    broken = [r for r in records if r["error"]]
    assert not broken, broken[0]
    too_big = [r for r in records if r["shared"] > SHARED_MEMORY[arch]]
    assert not too_big, too_big


def test_what_does_not_fit_is_seen():
    (record,) = compile_in_a_process(90, "--oversized")
    assert not record["error"] and record["shared"] > 227 * 1024


def compile_in_a_process(arch: int, *flags: str) -> list[dict]:
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, str(Path(__file__).resolve()), str(arch), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


# What follows runs in the other process.


def main(arch: int, oversized: bool) -> None:
    from effnlp_lab.attention.configurations import Tile

    if oversized:
        report(arch, "forward", "fp16", 256, Tile(64, 64, 4, 4))
        return
    for kernel, dtype, head_dim in sorted(wanted(arch)):
        report(arch, kernel, dtype, head_dim)
    for kernel in ("forward", "dkdv", "dq"):
        report(arch, kernel, "fp16", 128, WINDOW=True, GLOBAL=True, CAUSAL=False, VARLEN=True)


def report(arch: int, kernel: str, dtype: str, head_dim: int, tile=None, **flags: bool) -> None:
    record = {
        "kernel": kernel,
        "dtype": dtype,
        "head_dim": head_dim,
        "shared": 0,
        "registers": 0,
        "error": None,
    } | flags
    try:
        compiled = compile_kernel(arch, kernel, dtype, head_dim, tile, flags)
        record["shared"] = compiled.metadata.shared
    except Exception as error:
        record["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(record), flush=True)


def compile_kernel(arch: int, kernel: str, dtype: str, head_dim: int, tile, flags: dict[str, bool]):
    """Compile as a call would: pointers and strides divisible by 16, one query head per key head."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if kernel in ADAMW8BIT:
        return compile_adamw8bit(arch, dtype, kernel.endswith("masked"))
    function, tile = find(arch, kernel, dtype, head_dim, tile)
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(32, head_dim),
        "BLOCK_M": tile.queries,
        "BLOCK_N": tile.keys,
        "CAUSAL": True,
        "WINDOW": False,
        "GLOBAL": False,
        "VARLEN": False,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        "group": 1,
        "DLse2": None,
    } | flags
    if not constants["VARLEN"]:
        constants |= {"cu_seqlens_q": None, "cu_seqlens_k": None}
    names = function.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else type_of(name, dtype) for name in names}
    divisible = [["tt.divisibility", 16]]
    attributes = {(i,): divisible for i, name in enumerate(names) if signature[name][:1] == "*"}
    attributes |= {(i, j): divisible for i, name in enumerate(names) if name.endswith("_strides") for j in range(3)}
    source = ASTSource(
        function, signature, {(names.index(name),): value for name, value in constants.items()}, attributes
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def compile_adamw8bit(arch: int, dtype: str, masked: bool):
    """As a step launches it: every pointer aligned, the card's own square root."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from effnlp_lab.training import kernel_adamw8bit as room

    constants = {"ROWS": room.ROWS, "MASKED": masked, "APPROXIMATE": True}
    types = {"P": f"*{dtype}", "G": f"*{dtype}", "table": "*i64", "work": "*i32"}
    types |= {"map_signed": "*fp32", "map_unsigned": "*fp32"} | dict.fromkeys(constants, "constexpr")
    names = room.adamw8bit_kernel.arg_names
    signature = {name: types.get(name, "fp32") for name in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] == "*"}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(room.adamw8bit_kernel, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": room.WARPS})


def find(arch: int, kernel: str, dtype: str, head_dim: int, tile):
    from effnlp_lab.attention import configurations, decoding, kernels_backward, kernels_forward

    functions = {
        "forward": kernels_forward.forward_kernel,
        "row_statistics": kernels_backward.row_statistics_kernel,
        "dkdv": kernels_backward.dkdv_kernel,
        "dq": kernels_backward.dq_kernel,
        "decode": decoding.decode_kernel,
        "merge": decoding.merge_kernel,
    }
    fixed = {"row_statistics": configurations.Tile(32, 0, 4, 1), "merge": configurations.Tile(64, 0, 4, 1)}
    row = configurations.table()[arch, 4 if dtype == "fp32" else 2, max(32, head_dim)]
    return functions[kernel], tile or fixed.get(kernel) or row[kernel]


def type_of(name: str, dtype: str):
    if name.endswith("_strides"):
        return ("i32", "i32", "i32")
    if name in ("Lse", "Lse2", "PaddedLse2", "Delta", "Partial"):
        return "*fp32"
    if name in ("lengths", "cu_seqlens_q", "cu_seqlens_k"):
        return "*i32"
    if name in ("scale", "qk_scale"):
        return "fp32"
    return f"*{dtype}" if name[0].isupper() else "i32"


if __name__ == "__main__":
    main(int(sys.argv[1]), "--oversized" in sys.argv)
