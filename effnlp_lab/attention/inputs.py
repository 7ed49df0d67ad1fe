"""What attention accepts. Every refusal is one sentence and comes before any kernel starts."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from effnlp_lab.attention.configurations import capability_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_tensors(q: Tensor, k: Tensor, v: Tensor, *, dims: int, layout: str) -> None:
    """Refuse what is not three floating tensors of one dtype and device, of the shape that `layout` names."""
    for name, x in zip("qkv", (q, k, v), strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(x).__name__}.")
        if x.ndim != dims:
            raise ValueError(f"{name} must be {layout}, with {dims} dimensions; it has shape {tuple(x.shape)}.")
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{name} is {_name(x.dtype)}: flash attention takes float16, bfloat16 or float32; convert it."
            )
    if not q.dtype == k.dtype == v.dtype:
        kinds = ", ".join(f"{n} is {_name(x.dtype)}" for n, x in zip("qkv", (q, k, v), strict=True))
        raise TypeError(f"q, k and v must have one dtype, but {kinds}: convert them to the same.")
    if not q.device == k.device == v.device:
        places = ", ".join(f"{n} is on {x.device}" for n, x in zip("qkv", (q, k, v), strict=True))
        raise ValueError(f"q, k and v must be on one device, but {places}: move them to the same.")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, not {tuple(k.shape)} and {tuple(v.shape)}.")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q has head dimension {q.shape[-1]} and k has {k.shape[-1]}: they must be equal.")
    check_head_dim(q.shape[-1])
    check_device(q.device, q.dtype)


def check_heads(heads: int, kv_heads: int) -> None:
    """Grouped-query attention: each key head serves the same number of query heads."""
    if heads == 0 or kv_heads == 0:
        raise ValueError(f"q has {heads} heads and k has {kv_heads}: there must be at least one of each.")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key heads evenly: use a multiple.")


def check_head_dim(head_dim: int) -> None:
    """The copy engine moves 16 bytes at a time, and a tile must fit on the chip."""
    if head_dim % 8 or not 8 <= head_dim <= 256:
        raise ValueError(
            f"Head dimension {head_dim} is not supported: it must be a multiple of 8 from 8 to 256; "
            "pad q, k and v with zeros."
        )


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """Compiled on a CUDA device, interpreted on the CPU; bfloat16 needs a card that has it."""
    if device.type == "cuda":
        if dtype == torch.bfloat16 and capability_of(device) < (8, 0):
            raise ValueError("bfloat16 needs a GPU of compute capability 8.0 or newer: use float16 on this card.")
        return
    if device.type != "cpu":
        raise ValueError(f"Triton kernels do not run on {device.type}: use `tiled_forward`, their twin in PyTorch.")
    if not interpreting():
        raise ValueError(
            "The tensors are on the CPU, where Triton kernels run only in the interpreter: move them to a CUDA device, "
            "or set TRITON_INTERPRET=1 before Triton is imported."
        )
    if dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter computes bfloat16 wrongly: use float32 or float16 on the CPU.")


def check_masks(causal: bool, window: int | None, global_tokens: int) -> None:
    """A window counts keys, its own position included, so it is at least 1."""
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(
            f"window is {window!r}: it counts the keys a query sees, itself included, so give 1 or more, or None."
        )
    if isinstance(global_tokens, bool) or not isinstance(global_tokens, int) or global_tokens < 0:
        raise ValueError(f"global_tokens is {global_tokens!r}: it must be a whole number, 0 or more.")
    if global_tokens and window is None:
        raise ValueError("global_tokens without a window changes nothing: give a window too.")
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be True or False, not {causal!r}.")


def check_scale(scale: float | None, head_dim: int) -> float:
    """The softmax scale, 1 / sqrt(head_dim) unless given. Positive: the kernels take the maximum before scaling."""
    if scale is None:
        return 1 / math.sqrt(head_dim)
    if not (isinstance(scale, int | float) and math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale is {scale!r}: it must be a positive number; fold a sign into q.")
    return float(scale)


def check_cu_seqlens(name: str, cu_seqlens: Tensor, rows: int, tensor: str) -> list[int]:
    """Cumulative lengths [batch + 1] as a list: whole numbers from 0 to `rows`, never falling."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1:
        raise TypeError(f"{name} must be a 1-dimensional int32 or int64 tensor of cumulative lengths.")
    edges = cu_seqlens.tolist()
    if len(edges) < 2:
        raise ValueError(
            f"{name} has {len(edges)} entries: it needs one more than there are sequences, and at least one sequence."
        )
    if edges[0] != 0 or edges[-1] != rows:
        raise ValueError(
            f"{name} runs from {edges[0]} to {edges[-1]}, but must run from 0 to the {rows} rows of {tensor}."
        )
    if any(b < a for a, b in zip(edges[:-1], edges[1:], strict=True)):
        raise ValueError(
            f"{name} falls somewhere: cumulative lengths never do; give torch.cumsum of the lengths, after a 0."
        )
    return edges


def interpreting() -> bool:
    """Whether Triton kernels run in the interpreter in this process."""
    import triton.language as tl

    # A jit function of Triton's own library shows in which mode Triton was imported.
    return type(tl.sum).__name__ == "InterpretedFunction" and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
