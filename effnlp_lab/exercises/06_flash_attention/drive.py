"""How the answers of lab 06 are called. Runs beside the student's code.

A kernel and its twin write into outputs that lie, like their inputs, in the middle of a larger stretch of memory: an
unmasked load reads NaN there, and an unmasked store leaves a trace there, where it would otherwise read or spoil
whatever is next in memory. Triton's interpreter multiplies float32 exactly where a GPU's tensor cores round to TF32
unless the kernel asks for more: here the interpreter rounds too, so that a kernel is judged alike on both.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from unittest import mock

import torch
import torch._dynamo  # checkpoint imports it at its first call: seconds, which belong in no time limit

from effnlp_lab.exercises.guards import GUARD, UNWRITTEN, Operations


def counted_attention(answer, q, k, v, causal, wanted):
    """`wanted` picks the half that the case is about: "output" or "bytes"."""
    result = answer(q, k, v, causal)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError("return two things, the output and the number of bytes: `return out, moved`")
    return result[0] if wanted == "output" else result[1]


def once(scores: torch.Tensor, values: torch.Tensor, sizes: list[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Blocks of `sizes` keys, made when they are asked for and gone when they are dropped."""
    first = 0
    for size in sizes:
        yield scores[:, first : first + size].clone(), values[first : first + size].clone()
        first += size


def online_softmax(answer, scores, values, sizes):
    return answer(once(scores, values, sizes))


def merge_partials(answer, out_a, lse_a, out_b, lse_b):
    return answer(out_a, lse_a, out_b, lse_b)


def tiled_forward(answer, q, k, v, causal, block_q, block_k):
    return answer(q, k, v, causal, block_q, block_k)


def flash_kernel(answer, q, k, v, causal, block_q, block_k):
    inputs = [guarded(x) for x in (q, k, v)]
    outputs = {"out": unwritten(q), "lse": unwritten(q[..., 0].contiguous().float())}

    def run():
        answer(*inputs, *outputs.values(), causal, block_q, block_k)

    return report(run, inputs, outputs)


flash_kernel_twin = flash_kernel


def flash_backward(answer, q, k, v, out, lse, d_out, causal, block_q, block_k):
    return answer(q, k, v, out, lse, d_out, causal, block_q, block_k)


def tile_plan(answer, queries, keys, block_q, block_k):
    return answer(queries, keys, block_q, block_k)


def window_attention(answer, q, k, v, window, block):
    return answer(q, k, v, window, block)


def chunked_attention(answer, q, k, v, d_out, causal, chunk):
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = answer(*inputs, causal, chunk)
    if not out.requires_grad:
        raise RuntimeError("the output has no gradient: use operations that autograd follows, without no_grad")
    out.backward(d_out)
    return {"out": out.detach(), **{f"d{name}": x.grad for name, x in zip("qkv", inputs, strict=True)}}


def backward_kernel(answer, q, k, v, d_out, lse, delta, causal, block_q, block_k):
    inputs = [guarded(x) for x in (q, k, v, d_out, lse, delta)]
    dq = surrounded(q.float(), -0.0).fill_(0.0)  # what is added past the end is often 0, and -0 + 0 is no longer -0
    outputs = {"dq": dq, "dk": unwritten(k), "dv": unwritten(v)}

    def run():
        answer(*inputs, *outputs.values(), causal, block_q, block_k)

    return report(run, inputs, outputs)


backward_kernel_twin = backward_kernel


def surrounded(like: torch.Tensor, around: float) -> torch.Tensor:
    """A tensor of the shape, strides and dtype of `like`, amid `around` and full of it."""
    extent = 1 + sum((n - 1) * stride for n, stride in zip(like.shape, like.stride(), strict=True))
    buffer = torch.full((2 * GUARD + extent,), around, dtype=like.dtype, device=like.device)
    return buffer.as_strided(like.shape, like.stride(), GUARD)


def guarded(values: torch.Tensor) -> torch.Tensor:
    """A copy of `values` with the same strides, amid NaN."""
    return surrounded(values, math.nan).copy_(values)


def unwritten(like: torch.Tensor) -> torch.Tensor:
    """An output of the shape and strides of `like` that nobody has written yet."""
    return surrounded(like, UNWRITTEN)


def report(run, inputs: list[torch.Tensor], outputs: dict[str, torch.Tensor]) -> dict:
    """Run a kernel or a twin; say what it wrote, where, and what PyTorch did for it."""
    before = [x.clone() for x in inputs]
    around = {name: bits_around(out).clone() for name, out in outputs.items()}
    with tensor_cores(), Operations() as operations:
        run()
    return {
        **{name: out.clone(memory_format=torch.contiguous_format) for name, out in outputs.items()},
        "unwritten": {name: int((out == UNWRITTEN).sum()) for name, out in outputs.items()},
        "outside": {name: written_outside(out, around[name]) for name, out in outputs.items()},
        "inputs changed": any(not torch.equal(a, b) for a, b in zip(inputs, before, strict=True)),
        "largest": operations.largest,
        "operation": operations.name,
    }


def bits_around(out: torch.Tensor) -> torch.Tensor:
    """The stretch of memory in which `out` lies, as whole numbers: -0 and 0 differ, and NaN is itself."""
    whole = {2: torch.int16, 4: torch.int32}[out.element_size()]
    return out.as_strided((out.untyped_storage().nbytes() // out.element_size(),), (1,), 0).view(whole)


def written_outside(out: torch.Tensor, before: torch.Tensor) -> int:
    """How many numbers around `out` have changed."""
    changed = bits_around(out) != before
    return int(changed.sum() - changed.as_strided(out.shape, out.stride(), out.storage_offset()).sum())


@contextlib.contextmanager
def tensor_cores() -> Iterator[None]:
    """Let Triton's interpreter round the float32 factors of a product to TF32 where a GPU would."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        yield
        return
    exact = interpreter.InterpreterBuilder.create_dot

    def product(builder, a, b, d, input_precision, max_num_imprecise_acc):
        if getattr(input_precision, "name", "") == "TF32" and a.data.dtype == b.data.dtype == "float32":
            a, b = (interpreter.TensorHandle(_tf32(x.data), x.dtype) for x in (a, b))
        return exact(builder, a, b, d, input_precision, max_num_imprecise_acc)

    with mock.patch.object(interpreter.InterpreterBuilder, "create_dot", product):
        yield


def _tf32(values):
    """Round to 10 fraction bits, as tensor cores read float32."""
    bits = values.view("uint32").copy() if values.flags.c_contiguous else values.copy(order="C").view("uint32")
    finite = (bits & 0x7F800000) != 0x7F800000
    bits[finite] = (bits[finite] + 0x1000) & 0xFFFFE000
    return bits.view("float32")
