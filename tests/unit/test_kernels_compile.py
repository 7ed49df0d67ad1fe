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
NF4 = {"nf4 dequantize": (0,), "nf4 row": (1,), "nf4 product": (16, 32, 64), "nf4 sum": (0,)}  # rows, as "head_dim"
GPTQ_KERNELS = {"int4 product": (1, 16, 64), "int3 product": (1, 16), "int3 dequantize": (0,), "gptq columns": (0,)}
PAGED = {"paged decode": (64, 128), "paged decode rows": (256,), "paged prompt": (64, 128)}
PAGED_ONCE = (
    "paged sinks", "paged merge", "paged write", "paged write prompt", "rms norm", "silu gate", "greedy token",
)  # fmt: skip
LOSS_ROWS = ("loss rows none", "loss rows forward_kl", "loss rows reverse_kl", "loss rows jsd", "loss multiply")
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton has Linux wheels only")


def wanted(arch: int) -> set[tuple[str, str, int]]:
    """(kernel, dtype, head dimension). float16 and bfloat16 make the same tiles: one float16 size beside bfloat16."""
    half = "fp16" if arch == 75 else "bf16"
    sizes = {(half, dim) for dim in HEAD_DIMS} | {("fp16", 128)}
    if arch != 86:  # the same instructions as sm_80, and the same float32 tiles: only half precision has its own
        sizes |= {("fp32", dim) for dim in HEAD_DIMS if arch > 75 or dim <= 128}
    attention = {(kernel, dtype, dim) for kernel in KERNELS for dtype, dim in sizes}
    attention |= {(kernel, half, dim) for kernel, dims in PAGED.items() for dim in dims}
    if arch == 86:
        return attention
    others = {(kernel, half, rows) for kernel, counts in (NF4 | GPTQ_KERNELS).items() for rows in counts}
    others |= {("nf4 product", "fp32", 64), ("nf4 product", "fp16", 16), ("nf4 row", "fp32", 1), ("nf4 row", "fp16", 1)}
    others |= {("int4 product", "fp32", 64), ("int4 product", "fp16", 16)}
    others |= {("paged decode", "fp32", 128)} | {("paged decode", "fp32", 256) for _ in range(arch > 75)}
    others |= {(kernel, half, 128) for kernel in PAGED_ONCE if arch == 90 or kernel != "paged sinks"}
    others |= {(kernel, half, 0) for kernel in LOSS_ROWS if arch != 80} | {("loss rows jsd", "fp32", 0)}
    others |= {("adamw8bit", half, 0), ("adamw8bit", "fp32", 0), ("adamw8bit masked", half, 0)}
    return attention | others


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
    early = [r for r in records if r["kernel"] in (*PAGED, *PAGED_ONCE, "int4 product", "int3 product")]
    assert early and all(r["waits"] == (arch >= 90) for r in early)  # for the kernel before: early_start.py


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
        "waits": False,
        "error": None,
    } | flags
    try:
        compiled = compile_kernel(arch, kernel, dtype, head_dim, tile, flags)
        record["shared"], record["waits"] = compiled.metadata.shared, "griddepcontrol.wait" in compiled.asm["ptx"]
    except Exception as error:
        record["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(record), flush=True)


def compile_kernel(arch: int, kernel: str, dtype: str, head_dim: int, tile, flags: dict[str, bool]):
    """Compile as a call would: pointers and strides divisible by 16, one query head per key head."""
    if kernel in ADAMW8BIT:
        return compile_adamw8bit(arch, dtype, kernel.endswith("masked"))
    if kernel in GPTQ_KERNELS:
        return compile_quantization(arch, kernel, dtype, head_dim)
    if kernel in PAGED or kernel in PAGED_ONCE:
        return compile_paged(arch, kernel, dtype, head_dim)
    if kernel in LOSS_ROWS:
        return compile_loss_rows(arch, kernel, dtype)
    if kernel in NF4:
        return compile_nf4(arch, kernel, dtype, head_dim)
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
    attributes = aligned(names, signature)
    attributes |= {
        (i, j): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_strides") for j in range(3)
    }
    return compiled(arch, function, signature, constants, attributes, num_warps=tile.warps, num_stages=tile.stages)


def compiled(arch: int, function, signature: dict, constants: dict, attributes: dict, **options: int):
    """What Triton's compiler makes of a kernel for a card of this architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    places = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(function, signature, places, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def aligned(names: list[str], signature: dict, *others: str) -> dict:
    """Pointers, and `others`, divisible by 16."""
    chosen = [i for i, name in enumerate(names) if signature[name][0] == "*" or name in others]
    return {(i,): [["tt.divisibility", 16]] for i in chosen}


def compile_adamw8bit(arch: int, dtype: str, masked: bool):
    """As a step launches it: every pointer aligned, the card's own square root."""
    from effnlp_lab.training import kernel_adamw8bit as room

    constants = {"ROWS": room.ROWS, "MASKED": masked, "APPROXIMATE": True}
    types = {"P": f"*{dtype}", "G": f"*{dtype}", "table": "*i64", "work": "*i32"}
    types |= {"map_signed": "*fp32", "map_unsigned": "*fp32"} | dict.fromkeys(constants, "constexpr")
    names = room.adamw8bit_kernel.arg_names
    signature = {name: types.get(name, "fp32") for name in names}
    attributes = aligned(names, signature)
    return compiled(arch, room.adamw8bit_kernel, signature, constants, attributes, num_warps=room.WARPS)


def compile_quantization(arch: int, kernel: str, dtype: str, inputs: int):
    """Groups of 128 columns; the sum in parts, with a bias; the column loop finds its grids and keeps outliers."""
    from effnlp_lab.early_start import starts_early
    from effnlp_lab.quantization import kernel_gptq, kernel_product, launch_product

    types = {"X": f"*{dtype}", "Bias": f"*{dtype}", "Out": f"*{dtype}", "Plane0": "*i32", "Plane1": "*i32",
             "Scale": "*fp16", "Zero": "*u8", "Parts": "*fp32", "Counters": "*i32"}  # fmt: skip
    bits = 3 if kernel.startswith("int3") else 4
    constants, warps = {"BITS": bits, "RUN": 32, "GROUP": 128, "BLOCK_N": 32}, 4
    function = kernel_product.dequantize_kernel
    if kernel.endswith("product"):
        function = kernel_product.product_kernel
        tile = launch_product.tile_for(inputs, 32, 4 if dtype == "fp32" else 2, arch)
        constants |= {"PER": 4, "SPLIT": True, "BLOCK_N": tile.rows, "HAS_BIAS": True}
        constants["EARLY"] = starts_early(arch)
        if inputs == 1:
            function, constants["BLOCK_B"] = (
                kernel_product.row_kernel,
                launch_product.ONE_ROW // (32 * (32 if bits == 3 else 32 // bits)),
            )
        else:
            constants |= {"BLOCK_M": tile.inputs, "STAGES": tile.stages}
            constants |= {"AHEAD": launch_product.AHEAD if constants["EARLY"] else 0, "EVEN": True}
            constants["PRECISION"] = "ieee" if dtype == "fp32" else "tf32"
        warps = tile.warps
    elif kernel == "gptq columns":
        function, warps = kernel_gptq.columns_kernel, kernel_gptq.WARPS
        types = dict.fromkeys(("W", "U", "Errors", "Scale", "Zero"), "*fp32") | {"Codes": "*u8", "Keep": "*u8"}
        types["Groups"] = "*i64"
        constants = {"BLOCK": 128, "ROWS": kernel_gptq.ROWS, "FIND": 32, "HIGHEST": 15}
        constants |= {"SYMMETRIC": False, "SCALE": "fp16", "KEEPS": True}
    names = function.arg_names
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in names}
    attributes = aligned(names, signature)
    return compiled(arch, function, signature, constants, attributes, num_warps=warps)


def compile_loss_rows(arch: int, kernel: str, dtype: str):
    """float32 logits and a gradient of `dtype` over them, a hard loss at another temperature, labels left out."""
    from effnlp_lab.distillation import kernel_rows
    from effnlp_lab.distillation.settings import KINDS

    function, warps, constants = kernel_rows.multiply_kernel, kernel_rows.UNIT_WARPS, {"BLOCK": kernel_rows.UNIT_BLOCK}
    types = {"X": f"*{dtype}", "Factor": "*fp32", "numel": "i64"}
    if kernel != "loss multiply":
        function, warps = kernel_rows.loss_rows_kernel, kernel_rows.WARPS
        constants = {"KIND": KINDS.index(kernel.split()[-1]), "BLOCK": kernel_rows.BLOCK, "SAME": False}
        constants |= dict.fromkeys(("HARD", "LABELS", "GRADIENT"), True)
        types = dict.fromkeys(("Student", "Teacher", "Scale", "Losses"), "*fp32")
        types |= {"Gradient": f"*{dtype}", "Labels": "*i64"}
        types |= dict.fromkeys(("inverse_temperature", "beta", "soft_factor", "weight_hard"), "fp32")
    names = function.arg_names
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in names}
    strides = ("student_stride", "teacher_stride", "gradient_stride")
    attributes = aligned(names, signature, "vocabulary", *strides)
    return compiled(arch, function, signature, constants, attributes, num_warps=warps)


def compile_nf4(arch: int, kernel: str, dtype: str, rows: int):
    """As a model launches it: scales in 8 bits, 16-bit levels from registers, a bias where no split needs a sum."""
    from effnlp_lab.adapters import kernels_nf4, launch_nf4

    tile = launch_nf4.TILES[arch]
    function, outputs, warps = {
        "nf4 dequantize": (kernels_nf4.dequantize_kernel, 0, launch_nf4.DEQUANTIZE_WARPS),
        "nf4 row": (kernels_nf4.row_kernel, launch_nf4.ROW_TILE.outputs, launch_nf4.ROW_TILE.warps),
        "nf4 product": (kernels_nf4.product_kernel, tile.outputs, tile.warps),
        "nf4 sum": (kernels_nf4.sum_splits_kernel, 0, 4),
    }[kernel]
    names = function.arg_names
    sizes = {"BLOCK_M": rows, "BLOCK_N": outputs, "BLOCK_B": launch_nf4.ROW_BLOCKS}
    sizes["STAGES"] = launch_nf4.ROW_TILE.stages if kernel == "nf4 row" else tile.stages
    sizes["BLOCK_WORDS"] = 8
    sizes["TILE"] = launch_nf4.SUM_TILE if kernel == "nf4 sum" else launch_nf4.DEQUANTIZE_TILE
    flags = {
        "DOUBLE": True,
        "PERMUTE": dtype != "fp32",
        "BIAS": True,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
    }
    constants = {name: value for name, value in (sizes | flags).items() if name in names}
    types = {"Words": "*i32", "Scales": "*u8"} | dict.fromkeys(("Magnitudes", "Mean", "Values", "Parts"), "*fp32")
    types |= {"Levels": "*fp32" if kernel == "nf4 dequantize" else f"*{dtype}"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, f"*{dtype}" if name[0].isupper() else "i32") for name in names}
    attributes = aligned(names, signature, "numel", "columns", "blocks")
    return compiled(arch, function, signature, constants, attributes, num_warps=warps)


def compile_paged(arch: int, kernel: str, dtype: str, head_dim: int):
    """32 query heads on 8, pages of 16: decoding with 4 rows a key head and with as many as it takes, split."""
    from effnlp_lab.attention.configurations import Tile
    from effnlp_lab.early_start import starts_early
    from effnlp_lab.paged import kernels, kernels_layer, tiles

    decode, prompt = tiles.table()[arch, 4 if dtype == "fp32" else 2, head_dim]
    tile = prompt if kernel == "paged prompt" else decode
    rows = tile.queries if kernel in ("paged prompt", "paged decode rows") else 16
    sinks = kernel == "paged sinks"
    constants = {
        "KV_HEADS": 8, "GROUP": 4, "HEAD_DIM": head_dim, "PAGE": 16, "BLOCK_D": head_dim, "BLOCK_M": rows,
        "BLOCK_N": tile.keys, "SPLIT": kernel != "paged prompt", "WINDOW": sinks, "SINKS": sinks,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
    }  # fmt: skip
    function = kernels.paged_kernel
    if kernel == "paged merge":
        function, tile = kernels.merge_pages_kernel, tiles.merging(tiles.MAX_SPLITS, head_dim)
        constants = {"HEAD_DIM": head_dim, "BLOCK_D": head_dim, "BLOCK_S": tiles.MAX_SPLITS}
    elif kernel.startswith("paged write"):
        function, tile = kernels.write_kernel, Tile(0, 0, 4, 1)
        constants = {"HEADS": 32, "KV_HEADS": 8, "HEAD_DIM": head_dim, "PAGE": 16, "BLOCK_H": 32, "BLOCK_KV": 8}
        constants |= {"BLOCK_HALF": head_dim // 2, "ROTARY": True, "SINKS": True}
    elif kernel == "rms norm":
        function, tile = kernels_layer.norm_kernel, Tile(0, 0, tiles.NORM_WARPS, 1)
        constants = {"BLOCK": 4096, "ADD": True}
    elif kernel == "silu gate":
        function, tile, constants = kernels_layer.gate_kernel, Tile(0, 0, 4, 1), {"BLOCK": tiles.GATE_BLOCK}
    elif kernel == "greedy token":
        function, tile = kernels_layer.greedy_kernel, Tile(0, 0, tiles.GREEDY_WARPS, 1)
        constants = {"BLOCK": tiles.GREEDY_BLOCK}
    if not sinks and function is kernels.paged_kernel:
        constants["QSink"] = None
    constants["EARLY"] = starts_early(arch)
    if function in (kernels.paged_kernel, kernels.write_kernel):
        constants["SETTLED"] = kernel != "paged write prompt"
    types = dict.fromkeys(("Partial", "Lse"), "*fp32") | dict.fromkeys(("tables", "rows", "lengths", "starts"), "*i32")
    types |= {"Out": "*i64", "Newest": "*i64"} if kernel == "greedy token" else {}
    whole = "*i64" if kernel == "paged write prompt" else "*i32"  # as a prompt's batch and a decoding step pass them
    types |= {"slots": whole, "positions": whole, "qk_scale": "fp32", "eps": "fp32"}
    types |= dict.fromkeys(constants, "constexpr")
    names = function.arg_names
    signature = {name: types.get(name, f"*{dtype}" if name[0].isupper() else "i32") for name in names}
    steps = [name for name in names if name.endswith("_stride") and name != "table_stride"]
    attributes = aligned(names, signature, *steps)
    return compiled(arch, function, signature, constants, attributes, num_warps=tile.warps, num_stages=tile.stages)


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
