"""Flash attention beside PyTorch's backends and flash-attn, forward and backward, results verified alike.

TFLOP/s count 4 * batch * heads * length^2 * head_dim operations forward (half of it causal) and 2.5 times that
backward, as the papers do, whatever a kernel does beyond. Decoding reads the whole cache once: bytes a second beside a
plain copy.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from effnlp_lab.attention import flash_attention, flash_decode
from effnlp_lab.device import Device, ceilings
from effnlp_lab.notebook.bench import Comparison, compare

NEEDS = "cuda"
OURS = "effnlp_lab"
HEADS = 48
# (head dimension, causal) -> (batch, length); batch * length is what fits beside the peers' copies.
FULL = {
    (128, True): ((4, 1024), (4, 2048), (4, 4096), (4, 8192), (2, 16384)),
    (128, False): ((4, 4096), (4, 8192), (2, 16384)),
    (64, True): ((4, 4096), (4, 8192), (2, 16384)),
}
FAST = {(128, True): ((2, 512),), (64, False): ((2, 512),)}
BACKENDS = {"SDPA cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA flash": SDPBackend.FLASH_ATTENTION}


def run(device: Device, folder: Path) -> list[Comparison]:
    """Every size forward and backward, then decoding (small sizes where EFFNLP_FAST asks for them)."""
    small = os.environ.get("EFFNLP_FAST", "").strip().lower() in ("1", "true")
    made = []
    for (head_dim, causal), sizes in (FAST if small else FULL).items():
        for batch, length in sizes:
            made += _attention(batch, length, head_dim, causal, device)
            torch.cuda.empty_cache()
    return [*made, _decoding(8, 2048 if small else 32768, device), _short(device)]


def contestants(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> dict[str, Callable]:
    """Each takes nothing and returns the output [batch, heads, length, head_dim]."""
    found = {OURS: lambda: flash_attention(q, k, v, causal=causal)}
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_func

        # flash-attn's own layout is [batch, length, heads, head_dim]: it gets contiguous tensors in it.
        theirs = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
        for x, y in zip(theirs, (q, k, v), strict=True):
            x.requires_grad_(y.requires_grad)

        def peer():
            return flash_attn_func(*(x.transpose(1, 2) for x in theirs), causal=causal).transpose(1, 2)

        found["flash-attn"] = peer
        peer.inputs, peer.layout = theirs, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)
    for name, backend in BACKENDS.items():
        found[name] = _sdpa(q, k, v, causal, backend)
    return found


def _sdpa(q, k, v, causal: bool, backend: SDPBackend) -> Callable:
    def attend():
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return attend


def _attention(batch: int, length: int, head_dim: int, causal: bool, device: Device) -> list[Comparison]:
    torch.manual_seed(length)
    q, k, v, weight = (
        torch.randn(batch, HEADS, length, head_dim, device="cuda", dtype=device.dtype) for _ in range(4)
    )
    operations = 4 * batch * HEADS * length**2 * head_dim / (2 if causal else 1)
    what = f"{'causal' if causal else 'full'}, {device.dtype}, head dim {head_dim}, length {length}, batch {batch}"
    shared = {
        "ours": OURS,
        "peer": "flash-attn",
        "unit": "TFLOP/s",
        "device": device,
        "limit": ceilings(device).matmul_flops_per_second / 1e12,
        "queued": True,
    }
    forward, missing = _usable(contestants(q, k, v, causal))
    ahead = compare(f"Attention forward, {what}", forward, work=operations, missing=missing, **shared)
    ahead.checks.append(_verify({name: call() for name, call in forward.items()}))

    tensors = [x.requires_grad_() for x in (q, k, v)]
    backward = {
        name: _gradients(call, getattr(call, "inputs", tensors), getattr(call, "layout", lambda x: x)(weight))
        for name, call in contestants(*tensors, causal).items()
        if name in forward
    }
    behind = compare(f"Attention backward, {what}", backward, work=2.5 * operations, missing=missing, **shared)
    for index, gradient in enumerate(("dq", "dk", "dv")):
        behind.checks.append(f"{gradient}: " + _verify({name: call()[index] for name, call in backward.items()}))
    behind.notes.append("Ours is deterministic; so is cuDNN's only where asked for, and flash-attn's default is not.")
    return [ahead, behind]


def _gradients(call: Callable, inputs: list[torch.Tensor], weight: torch.Tensor) -> Callable:
    """The backward alone, of one forward."""
    output = call()
    return lambda: torch.autograd.grad(output, inputs, weight, retain_graph=True)


def _usable(calls: dict[str, Callable]) -> tuple[dict[str, Callable], dict[str, str]]:
    """Those that run here, and why the others do not."""
    usable, missing = {}, {} if "flash-attn" in calls else {"flash-attn": "not installed"}
    for name, call in calls.items():
        try:
            call()
        except RuntimeError as error:
            missing[name] = str(error).splitlines()[0]
        else:
            usable[name] = call
    return usable, missing


def _verify(results: dict[str, torch.Tensor]) -> str:
    """All results within 1% of ours, by norm."""
    ours = results[OURS].float()
    worst = max(((x.float() - ours).norm() / ours.norm()).item() for x in results.values())
    if not worst < 0.01:
        raise AssertionError(f"results differ by {worst:.2%}")
    return f"all within {worst:.1e} of ours by norm"


def _decoding(batch: int, length: int, device: Device) -> Comparison:
    """One new token for 32 query heads on 8 key heads; several caches, so that none is found in L2."""
    caches = [
        [torch.randn(batch, 8, length, 128, device="cuda", dtype=device.dtype) for _ in range(2)] for _ in range(2)
    ]
    q = torch.randn(batch, 32, 1, 128, device="cuda", dtype=device.dtype)
    turn = iter(range(1 << 30))

    def pick():
        return caches[next(turn) % len(caches)]

    def peer():
        from flash_attn import flash_attn_with_kvcache

        k, v = (x.view(batch, length, 8, 128) for x in pick())
        return flash_attn_with_kvcache(q.transpose(1, 2), k, v)

    calls, missing = _usable({OURS: lambda: flash_decode(q, *pick())} | (
        {"flash-attn": peer} if importlib.util.find_spec("flash_attn") else {}
    ))  # fmt: skip
    moved = 2 * caches[0][0].numel() * caches[0][0].element_size()
    return compare(
        f"Decoding: 1 token, batch {batch}, 32 heads on 8, cache of {length}", calls, ours=OURS, peer="flash-attn",
        unit="TB/s", work=moved, device=device, limit=ceilings(device).copy_bytes_per_second / 1e12,
        missing=missing if "flash-attn" in calls else {"flash-attn": "not installed"} | missing, repeats=15, warmup=5,
        queued=True,
    )  # fmt: skip


def _short(device: Device) -> Comparison:
    """A small call, bound by the host: what starting the kernel costs."""
    q, k, v = (torch.randn(1, 8, 128, 64, device="cuda", dtype=device.dtype) for _ in range(3))
    calls, missing = _usable(contestants(q, k, v, True))
    return compare(
        "A short call, the host's time included: forward, causal, 8 heads, length 128", calls, ours=OURS,
        peer="flash-attn", device=device, missing=missing, repeats=30, warmup=10,
    )  # fmt: skip
