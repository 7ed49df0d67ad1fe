"""Flash attention: exact attention that never writes the score matrix to memory, as one autograd function.

Dao et al. 2022 (FlashAttention) and Dao 2023 (FlashAttention-2). Memory is linear in the length: the forward keeps its
output and one log-sum-exp per row, from which the backward makes the weights again. The backward is deterministic.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor

from effnlp_lab.attention import configurations, inputs
from effnlp_lab.attention.kernels_backward import dkdv_kernel, dq_kernel, row_statistics_kernel
from effnlp_lab.attention.kernels_common import LOG2_E
from effnlp_lab.attention.kernels_forward import forward_kernel


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    global_tokens: int = 0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * Q K^T) V, differentiable, in memory linear in the length.

    q is [batch, heads, length_q, head_dim]; k and v are [batch, kv_heads, length_k, head_dim] in float16, bfloat16 or
    float32 (float32 is exact, not TF32). Heads are grouped: query head h reads key head h // (heads // kv_heads). Head
    dimensions are multiples of 8 up to 256; lengths are any, 0 too.

    The last query stands beside the last key. `causal` hides later keys. `window` W shows W keys, the query's own
    position included (unless causal, also W - 1 after it); flash-attn's `window_size=(W - 1, 0)` is the same.
    `global_tokens` G, with a window, keeps the first G keys visible to all, and unless causal shows everything to the
    first G queries. A query that sees no key gives zeros. `scale` is 1 / sqrt(head_dim) unless given.

    Returns the output like q, and with `return_lse` also the log-sum-exp [batch, heads, length_q] in float32, which
    carries gradients too. Raises ValueError or TypeError, with what to do, for inputs that do not fit.
    """
    inputs.check_tensors(q, k, v, dims=4, layout="[batch, heads, length, head_dim]")
    if q.shape[0] != k.shape[0] or q.shape[0] == 0:
        raise ValueError(f"q has batch {q.shape[0]} and k has {k.shape[0]}: they must be equal and at least 1.")
    inputs.check_heads(q.shape[1], k.shape[1])
    inputs.check_masks(causal, window, global_tokens)
    problem = _Problem(
        batch=q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        length_q=q.shape[2],
        length_k=k.shape[2],
        head_dim=q.shape[3],
        causal=causal,
        window=window,
        global_tokens=global_tokens,
        scale=inputs.check_scale(scale, q.shape[3]),
    )
    out, lse2 = FlashAttention.apply(q, k, v, problem)
    return (out, lse2 * math.log(2)) if return_lse else out


def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    global_tokens: int = 0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Flash attention over sequences of different lengths laid end to end, without padding.

    q is [total_q, heads, head_dim]; k and v are [total_k, kv_heads, head_dim]. cu_seqlens_* [batch + 1] are cumulative
    lengths, int32 or int64, from 0 to the total; a sequence may be empty. They are checked on the host: keep them on
    the CPU to spare a synchronisation. Masks as in `flash_attention`, each sequence by itself. The log-sum-exp is
    [heads, total_q].
    """
    inputs.check_tensors(q, k, v, dims=3, layout="[total, heads, head_dim]")
    inputs.check_heads(q.shape[1], k.shape[1])
    inputs.check_masks(causal, window, global_tokens)
    edges_q = inputs.check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.shape[0], "q")
    edges_k = inputs.check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k.shape[0], "k")
    if len(edges_q) != len(edges_k):
        raise ValueError(
            f"cu_seqlens_q tells of {len(edges_q) - 1} sequences and cu_seqlens_k of {len(edges_k) - 1}: "
            "they must agree."
        )
    problem = _Problem(
        batch=len(edges_q) - 1,
        heads=q.shape[1],
        kv_heads=k.shape[1],
        length_q=_longest(edges_q),
        length_k=_longest(edges_k),
        head_dim=q.shape[2],
        causal=causal,
        window=window,
        global_tokens=global_tokens,
        scale=inputs.check_scale(scale, q.shape[2]),
        cu_seqlens_q=cu_seqlens_q.to(q.device, torch.int32, non_blocking=True).contiguous(),
        cu_seqlens_k=cu_seqlens_k.to(q.device, torch.int32, non_blocking=True).contiguous(),
    )
    out, lse2 = FlashAttention.apply(q, k, v, problem)
    return (out, lse2 * math.log(2)) if return_lse else out


@dataclass(frozen=True)
class _Problem:
    """Sizes and masks of one call. Lengths are the longest where sequences differ; then cu_seqlens are set."""

    batch: int
    heads: int
    kv_heads: int
    length_q: int
    length_k: int
    head_dim: int
    causal: bool
    window: int | None
    global_tokens: int
    scale: float
    cu_seqlens_q: Tensor | None = field(default=None, repr=False)
    cu_seqlens_k: Tensor | None = field(default=None, repr=False)

    @property
    def varlen(self) -> bool:
        return self.cu_seqlens_q is not None

    def strides(self, x: Tensor) -> tuple[int, int, int]:
        """Strides over batch, head and row, for [batch, heads, length, dim] and for [total, heads, dim]."""
        return (0, x.stride(1), x.stride(0)) if self.varlen else x.stride()[:3]

    def row_strides(self, x: Tensor) -> tuple[int, int, int]:
        """The same for numbers that there is one of per row: [batch, heads, length] and [heads, total]."""
        return (0, x.stride(0), 1) if self.varlen else (x.stride(0), x.stride(1), 1)

    def masks(self) -> dict[str, int]:
        return {"window": self.window or 0, "global_tokens": self.global_tokens}

    def constants(self, dtype: torch.dtype) -> dict[str, object]:
        """What the kernels are compiled for."""
        return {
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": configurations.block_d_for(self.head_dim),
            "CAUSAL": self.causal,
            "WINDOW": self.window is not None,
            "GLOBAL": self.global_tokens > 0,
            "VARLEN": self.varlen,
            "PRECISION": configurations.precision_for(dtype),
        }


class FlashAttention(torch.autograd.Function):
    """Forward: output and log-sum-exp in base 2. Backward: D, then dK and dV, then dQ, recomputing the weights."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, problem: _Problem) -> tuple[Tensor, Tensor]:
        q, k, v = _aligned(q), _aligned(k), _aligned(v)
        out, lse2 = _forward(q, k, v, problem)
        ctx.save_for_backward(q, k, v, out, lse2)
        ctx.problem = problem
        ctx.set_materialize_grads(False)
        return out, lse2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor | None, dlse2: Tensor | None):
        q, k, v, out, lse2 = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        return *_backward(q, k, v, out, lse2, dout, dlse2, ctx.problem), None


def _forward(q: Tensor, k: Tensor, v: Tensor, problem: _Problem) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse2 = torch.empty(_row_shape(q, problem), dtype=torch.float32, device=q.device)
    if problem.length_q == 0 or problem.length_k == 0:
        return out.zero_(), lse2.fill_(float("-inf"))
    tile = configurations.tile_for("forward", q.device, q.dtype, configurations.block_d_for(problem.head_dim))
    _launch(
        forward_kernel,
        triton.cdiv(problem.length_q, tile.queries) * problem.heads * problem.batch,
        tile,
        *(q, k, v, out, lse2),
        *(problem.strides(x) for x in (q, k, v, out)),
        problem.row_strides(lse2),
        *(problem.cu_seqlens_q, problem.cu_seqlens_k),
        *(problem.heads, problem.heads // problem.kv_heads, problem.length_q, problem.length_k),
        **problem.masks(),
        qk_scale=problem.scale * LOG2_E.value,
        **problem.constants(q.dtype),
    )
    return out, lse2


def _backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse2: Tensor, dout: Tensor, dlse2: Tensor | None, problem: _Problem
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    if problem.length_q == 0 or problem.length_k == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    dout = _aligned(dout)
    padded_lse2, delta = _row_statistics(out, dout, lse2, dlse2, problem)
    tensors = (q, k, v, dout, padded_lse2, delta)
    strides = (*(problem.strides(x) for x in (q, k, v, dout)), problem.row_strides(padded_lse2))
    sequences = (problem.cu_seqlens_q, problem.cu_seqlens_k)
    group = problem.heads // problem.kv_heads
    scales = {"qk_scale": problem.scale * LOG2_E.value, "scale": problem.scale}
    shared = problem.masks() | scales | problem.constants(q.dtype)
    block_d = shared["BLOCK_D"]

    tile = configurations.tile_for("dkdv", q.device, q.dtype, block_d)
    programs = triton.cdiv(problem.length_k, tile.keys) * problem.kv_heads * problem.batch
    _launch(
        dkdv_kernel, programs, tile, *tensors, dk, dv, *strides, problem.strides(dk), *sequences,
        problem.kv_heads, group, problem.length_q, problem.length_k, **shared,
    )  # fmt: skip
    tile = configurations.tile_for("dq", q.device, q.dtype, block_d)
    programs = triton.cdiv(problem.length_q, tile.queries) * problem.heads * problem.batch
    _launch(
        dq_kernel, programs, tile, *tensors, dq, *strides, problem.strides(dq), *sequences,
        problem.heads, group, problem.length_q, problem.length_k, **shared,
    )  # fmt: skip
    return dq, dk, dv


def _row_statistics(
    out: Tensor, dout: Tensor, lse2: Tensor, dlse2: Tensor | None, problem: _Problem
) -> tuple[Tensor, Tensor]:
    """The log-sum-exp and D of every row, each sequence padded to slots of 128 rows (see `padded_start`)."""
    if problem.varlen:
        shape = (problem.heads, (out.shape[0] // 128 + problem.batch) * 128)
    else:
        shape = (problem.batch, problem.heads, triton.cdiv(problem.length_q, 128) * 128)
    padded_lse2, delta = (torch.empty(shape, dtype=torch.float32, device=out.device) for _ in range(2))
    block_d = configurations.block_d_for(problem.head_dim)
    block_m = 128 if configurations.interpreted(out.device) else 32
    programs = triton.cdiv(problem.length_q, 128) * (128 // block_m) * problem.heads * problem.batch
    _launch(
        row_statistics_kernel, programs, configurations.Tile(block_m, 0, 4, 1), out, dout, lse2,
        None if dlse2 is None else dlse2.contiguous(), padded_lse2, delta, problem.strides(out), problem.strides(dout),
        problem.row_strides(lse2), problem.row_strides(padded_lse2), problem.cu_seqlens_q, problem.heads,
        problem.length_q, HEAD_DIM=problem.head_dim, BLOCK_D=block_d, VARLEN=problem.varlen,
    )  # fmt: skip
    return padded_lse2, delta


def _launch(kernel, programs: int, tile: configurations.Tile, *arguments, **keywords) -> None:
    """Start a kernel with its tile, on the device of its tensors."""
    device = arguments[0].device
    keywords |= {"BLOCK_M": tile.queries} | ({"BLOCK_N": tile.keys} if tile.keys else {})
    if configurations.interpreted(device):
        kernel[(programs,)](*arguments, **keywords)
        return
    triton.set_allocator(_scratch)  # descriptors made in a kernel live in memory that Triton asks us for
    elsewhere = device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[(programs,)](*arguments, **keywords, num_warps=tile.warps, num_stages=tile.stages)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _aligned(x: Tensor) -> Tensor:
    """x as the copy engine can read it: rows without gaps inside, and every row starting at a multiple of 16 bytes."""
    if x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x
    steps = [step * x.element_size() for step, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    ready = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)
    return x if ready else x.clone(memory_format=torch.contiguous_format)


def _row_shape(q: Tensor, problem: _Problem) -> tuple[int, ...]:
    return (q.shape[1], q.shape[0]) if problem.varlen else tuple(q.shape[:3])


def _longest(edges: list[int]) -> int:
    return max(b - a for a, b in zip(edges[:-1], edges[1:], strict=True))
