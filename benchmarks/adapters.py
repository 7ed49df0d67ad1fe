"""NF4 beside bitsandbytes: dequantization, products of few rows, and a training step of LoRA and QLoRA beside PEFT.

Weights rotate: several copies, together larger than the L2 cache, so that each run finds them in memory. The GPU's time
alone is measured for the kernels (the host starts a run while the card is busy), the whole step for training.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from effnlp_lab import adapters
from effnlp_lab.adapters import launch_nf4, nf4
from effnlp_lab.device import Device, ceilings
from effnlp_lab.notebook.bench import Comparison, compare

NEEDS = "cuda"
OURS = "effnlp_lab NF4"
PEER = "bitsandbytes NF4"
DENSE = "cuBLAS bf16"
COPY = "a copy of as many bytes"
SHAPES = ((4096, 4096), (14336, 4096), (28672, 8192))
ROWS = (1, 4, 16, 64)
ROTATED = 200 << 20
"""Bytes of codes to rotate through: four times the L2 cache of an H100."""
BATCH, LENGTH, RANK = 8, 2048, 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def run(device: Device, folder: Path) -> list[Comparison]:
    """Dequantization and products by shape, then training steps (small sizes where EFFNLP_FAST asks for them)."""
    small = os.environ.get("EFFNLP_FAST", "").strip().lower() in ("1", "true")
    made = []
    for shape in SHAPES[:1] if small else SHAPES:
        made.append(_dequantization(shape, device))
        _free()
        for rows in ROWS[::3] if small else ROWS:
            made.append(_products(shape, rows, device))
            _free()
    return [*made, _step(False, small), _step(True, small)]


class Copies:
    """Several weights of one shape, quantized by us and by bitsandbytes, taken in turns by each contestant."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, dense: bool = False) -> None:
        torch.manual_seed(shape[0])
        count = max(2, -(-ROTATED // (shape[0] * shape[1] // 2)))
        weights = [torch.randn(shape, device="cuda", dtype=dtype) * 0.02 for _ in range(count)]
        self.ours = [adapters.quantize_nf4(weight) for weight in weights]
        self.theirs = (
            [_quantize_theirs(weight) for weight in weights] if importlib.util.find_spec("bitsandbytes") else []
        )
        self.dense = weights if dense else []

    def turns(self, items: list) -> Iterator:
        return itertools.cycle(items)


def _quantize_theirs(weight: Tensor):
    import bitsandbytes.functional as functional

    return functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)


def _dequantization(shape: tuple[int, int], device: Device) -> Comparison:
    copies = Copies(shape, torch.bfloat16)
    out = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    ours = copies.turns(copies.ours)
    contestants: dict[str, Callable] = {OURS: lambda: launch_nf4.dequantize(next(ours), torch.bfloat16, out)}
    half = (copies.ours[0].nbytes + out.nbytes) // 2
    sources = copies.turns([torch.empty(half, dtype=torch.uint8, device="cuda") for _ in range(1 + ROTATED // half)])
    target = torch.empty(half, dtype=torch.uint8, device="cuda")
    contestants[COPY] = lambda: target.copy_(next(sources))
    missing, checks = {}, []
    if copies.theirs:
        import bitsandbytes.functional as functional

        theirs = copies.turns(copies.theirs)
        contestants[PEER] = lambda: functional.dequantize_4bit(*next(theirs), out=out)
        one = launch_nf4.dequantize(copies.ours[0], torch.bfloat16)
        two = functional.dequantize_4bit(*copies.theirs[0])
        same = (one == two).float().mean().item()
        if same < 0.99:
            raise AssertionError(f"only {same:.2%} of the numbers are bitsandbytes' own")
        checks.append(f"{same:.4%} of the numbers are bitsandbytes' own, and all are the definition's")
    else:
        missing[PEER] = "not installed"
    if not torch.equal(
        launch_nf4.dequantize(copies.ours[0], torch.bfloat16), nf4.dequantize_plain(copies.ours[0], torch.bfloat16)
    ):
        raise AssertionError("the kernel's numbers are not the definition's")
    result = compare(
        f"NF4 dequantization to bfloat16, double quantized: {shape[0]} x {shape[1]}", contestants, ours=OURS, peer=PEER,
        unit="TB/s", work=copies.ours[0].nbytes + out.nbytes, repeats=15, warmup=3, device=device, missing=missing,
        limit=ceilings(device).copy_bytes_per_second / 1e12, queued=True, in_a_row=12,
    )  # fmt: skip
    result.checks += checks
    return result


def _products(shape: tuple[int, int], rows: int, device: Device) -> Comparison:
    copies = Copies(shape, torch.bfloat16, dense=True)
    x = torch.randn(rows, shape[1], dtype=torch.bfloat16, device="cuda")
    turns = {name: copies.turns(items) for name, items in ((OURS, copies.ours), (DENSE, copies.dense))}
    contestants: dict[str, Callable] = {
        OURS: lambda: launch_nf4.product(x, next(turns[OURS])),
        DENSE: lambda: F.linear(x, next(turns[DENSE])),
    }
    missing = {}
    outputs = [launch_nf4.product(x, copies.ours[0])]
    if copies.theirs:
        import bitsandbytes

        theirs = copies.turns([(codes.t(), state) for codes, state in copies.theirs])

        def peer(pair=None) -> Tensor:
            codes, state = pair or next(theirs)
            return bitsandbytes.matmul_4bit(x, codes, quant_state=state)

        with torch.no_grad():
            outputs.append(peer((copies.theirs[0][0].t(), copies.theirs[0][1])))
        contestants[PEER] = torch.no_grad()(peer)
    else:
        missing[PEER] = "not installed"
    exact = F.linear(x.double(), nf4.dequantize_plain(copies.ours[0]).double())
    errors = [((out.double() - exact).abs().max() / exact.abs().max()).item() for out in outputs]
    if max(errors) > 0.02:
        raise AssertionError(f"products are off by {max(errors):.3%} of the range")
    result = compare(
        f"NF4 product of {rows} rows: {shape[0]} x {shape[1]}", contestants, ours=OURS, peer=PEER, repeats=15, warmup=3,
        device=device, missing=missing, queued=True, in_a_row=12,
        limit=copies.ours[0].nbytes / ceilings(device).copy_bytes_per_second,
    )  # fmt: skip
    result.checks.append(
        "largest error of the range " + " and ".join(f"{e:.2%}" for e in errors) + " (ours, then theirs)"
    )
    return result


def _step(quantized: bool, small: bool) -> Comparison:
    """A training step of rank 16 on all linear layers, on the shapes of Llama 1B: ours beside PEFT's."""
    ours, peer = ("effnlp_lab QLoRA", "PEFT with bitsandbytes") if quantized else ("effnlp_lab LoRA", "PEFT LoRA")
    needs = ("peft", "bitsandbytes") if quantized else ("peft",)
    makers = {ours: lambda: _our_model(quantized, small)}
    missing = {}
    if all(importlib.util.find_spec(name) for name in needs):
        makers[peer] = lambda: _their_model(quantized, small)
    else:
        missing[peer] = "not installed"
    seconds, notes, losses = {}, [], []
    for name, make in makers.items():
        times, resting, peak, loss = measure_step(make, small)
        seconds[name] = times
        losses.append(loss)
        notes.append(f"{name}: {resting / 1e9:.2f} GB at rest, {peak / 1e9:.2f} GB at the peak of a step")
    rows, length = (2, 128) if small else (BATCH, LENGTH)
    kind = "QLoRA" if quantized else "LoRA"
    title = f"{kind} training step, Llama 1B shapes, rank {RANK}, {rows} x {length} tokens, bfloat16"
    result = Comparison(title, seconds, ours=ours, peer=peer, missing=missing, notes=notes)
    if len(losses) == 2:
        if abs(losses[0] - losses[1]) > 0.02 * losses[1]:
            raise AssertionError(f"the losses of the first step differ: {losses}")
        result.checks.append(f"losses of the first step: {losses[0]:.4f} and {losses[1]:.4f}")
    return result


def measure_step(make: Callable[[], nn.Module], small: bool, steps: int = 5) -> tuple[list[float], int, int, float]:
    """Seconds of steps after two to warm up, bytes at rest, bytes at the peak, and the loss of the first step."""
    _free()
    before = torch.cuda.memory_allocated()
    model = make()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    torch.manual_seed(1)
    ids = torch.randint(5, 31000, (2, 128) if small else (BATCH, LENGTH), device="cuda")

    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    first = step()
    step()
    resting = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times, resting, torch.cuda.max_memory_allocated() - before, first


def _llama(small: bool) -> LlamaForCausalLM:
    """Llama 3.2 1B with a vocabulary of 32,000, random weights, the same at every call."""
    hidden, layers, inner = (512, 2, 1536) if small else (2048, 16, 8192)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256, max_position_embeddings=LENGTH,
        attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).train()


def _our_model(quantized: bool, small: bool) -> nn.Module:
    model = _llama(small)
    if quantized:
        adapters.quantize_model(model)
    adapters.add_adapter(model, adapters.LoRAConfig(targets=TARGETS, r=RANK, alpha=2 * RANK))
    return model


def _their_model(quantized: bool, small: bool) -> nn.Module:
    import peft

    model = _llama(small)
    if quantized:
        _quantize_model_theirs(model)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def _quantize_model_theirs(model: nn.Module) -> None:
    """What transformers does for load_in_4bit with double quantization and bfloat16 products."""
    import bitsandbytes

    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    for name, linear in found:
        new = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16,
            compress_statistics=True, quant_type="nf4", device="meta",
        )  # fmt: skip
        weight = linear.weight.detach().cpu()
        new.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4")
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.to("cuda"))
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
