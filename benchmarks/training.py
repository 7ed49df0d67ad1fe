"""8-bit AdamW beside bitsandbytes and torch's fused AdamW, and the memory of a training step, predicted and measured.

The optimizers update the tensors of OPT-1.3B. Rates count what an 8-bit step has to move: parameter and both states
read and written, gradient read. The ladder trains a model of that shape, random weights, a fresh model at each rung.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, OPTConfig

from effnlp_lab import training
from effnlp_lab.device import Device, ceilings
from effnlp_lab.notebook.bench import Comparison, compare
from effnlp_lab.training.blockwise import dynamic_map
from effnlp_lab.training.memory_model import MemoryPrediction, TrainingSetup

NEEDS = "cuda"
OURS = "effnlp_lab 8-bit"
PEER = "bitsandbytes 8-bit"
FUSED = "torch fused, 32-bit"
QUEUED = 0.15
"""Seconds that the GPU is kept busy while the host starts a step: bitsandbytes launches a kernel for every tensor."""
TIE = 64 * 2**-24
"""Two codes are as near to a value as each other when its distances to them differ by no more than this part of it.

Float32 rounds by 2^-24. A value is squared, scaled and divided by its block's largest: some nine roundings. Its place
among 128 to 256 cells, a number as large as the cells' number, costs as much as 18 more at the small end of a decade.
Such an error moves a value twice as far from one code as it seems to be from the other.
"""
ROWS, LENGTH = 16, 512
# One saving after another: what each rung changes in the one above it.
LADDER: dict[str, dict] = {
    "vanilla": {"batch": ROWS, "optimizer": "adamw_fused"},
    "+ accumulation": {"batch": ROWS // 4, "accumulation": 4},
    "+ checkpointing": {"checkpointing": True},
    "+ bf16 autocast": {"autocast": torch.bfloat16},
    "+ 8-bit AdamW": {"optimizer": "adamw8bit"},
}


def run(device: Device, folder: Path) -> list[Comparison]:
    """The optimizers on bfloat16 and float32 parameters, then the ladder (small sizes where EFFNLP_FAST asks)."""
    small = os.environ.get("EFFNLP_FAST", "").strip().lower() in ("1", "true")
    config = opt_shape(small)
    made = []
    for dtype in (torch.bfloat16, torch.float32):
        made += _optimizers(config, dtype, device)
        _free()
    return [*made, _ladder(config, device)]


def opt_shape(small: bool = False) -> OPTConfig:
    """OPT-1.3B, or a hundredth of it."""
    hidden, layers, heads = (512, 4, 8) if small else (2048, 24, 32)
    return OPTConfig(
        hidden_size=hidden, word_embed_proj_dim=hidden, ffn_dim=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, vocab_size=50272, max_position_embeddings=2048, attn_implementation="sdpa",
    )  # fmt: skip


def _optimizers(config: OPTConfig, dtype: torch.dtype, device: Device) -> list[Comparison]:
    """A step as a program waits for it, the host's part included, and the GPU's time alone."""
    parameters = [
        torch.nn.Parameter(torch.randn(shape, device="cuda", dtype=dtype) * 0.02)
        for shape in training.ModelShape.from_config(config).tensors()
    ]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    options = {"lr": 1e-5, "weight_decay": 0.1}
    makers: dict[str, Callable] = {OURS: lambda: training.AdamW8bit(parameters, **options)}
    missing = {}
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes

        makers[PEER] = lambda: bitsandbytes.optim.AdamW8bit(parameters, **options)
    else:
        missing[PEER] = "not installed"
    makers[FUSED] = lambda: torch.optim.AdamW(parameters, fused=True, **options)
    optimizers = {name: make() for name, make in makers.items()}
    checks = []
    for name in (OURS, PEER):  # both from the same gradients and empty states, before any timing
        if name in optimizers:
            optimizers[name].step()
    if PEER in optimizers:
        checks.append(_verify(parameters, optimizers[OURS], optimizers[PEER]))
    numbers = sum(parameter.numel() for parameter in parameters)
    moved = numbers * (3 * dtype.itemsize + 4 + 16 / 256)
    made = []
    for queued, what in ((False, "a step of the program"), (QUEUED, "the kernels of a step")):
        made.append(compare(
            f"AdamW, {what}, {str(dtype)[6:]} parameters: {len(parameters)} tensors, {numbers / 1e9:.2f}B numbers",
            {name: optimizer.step for name, optimizer in optimizers.items()}, ours=OURS, peer=PEER, unit="TB/s",
            work=moved, repeats=15, warmup=5, device=device, missing=missing,
            limit=ceilings(device).copy_bytes_per_second / 1e12, queued=queued,
        ))  # fmt: skip
        made[-1].checks += checks
        made[-1].notes.append(f"Rates count {moved / numbers:.2f} bytes a number; torch's 32-bit states move more.")
    return made


def _verify(parameters: Iterable[torch.Tensor], ours, theirs) -> str:
    """The codes of both states after one step from zero, where each state is a multiple of the gradient or its square.

    They may differ where a value lies as near to one code as to the other, and where bitsandbytes keeps the sign of
    what is nearest to zero: anything else raises AssertionError.
    """
    different, total, furthest = 0, 0, 0.0
    for parameter in parameters:
        state, other = ours.state[parameter], theirs.state[parameter]
        gradient = parameter.grad.double()
        for mine, name, values in (("exp_avg", "state1", gradient), ("exp_avg_sq", "state2", gradient**2)):
            if other[name].dtype != torch.uint8:
                continue
            count, gap = differing(state[mine].flatten(), other[name].flatten(), values.flatten(), mine == "exp_avg")
            different, total, furthest = different + count, total + gradient.numel(), max(furthest, gap)
    return (f"of {total:,} codes of both states {different / total:.3%} are not bitsandbytes' own: each a tie between "
            f"two codes (to {furthest:.1e} of the value at worst), or a negative number nearest to zero")


def differing(ours: torch.Tensor, theirs: torch.Tensor, values: torch.Tensor, signed: bool,
              tie: float = TIE) -> tuple[int, float]:  # fmt: skip
    """How many codes differ, all of them ties or signed zeros, and the furthest from a tie, in parts of the value.

    values: float64, encoded in blocks of 256. Raises AssertionError for codes that differ otherwise.
    """
    blocks = torch.nn.functional.pad(values, (0, -len(values) % 256)).unflatten(0, (-1, 256))
    scaled = (blocks / blocks.abs().amax(1, keepdim=True)).flatten()[: len(values)]
    where = (ours != theirs).nonzero()[:, 0]
    ours, theirs, scaled = ours[where], theirs[where], scaled[where]
    levels = dynamic_map(signed, values.device).double()
    gap = ((levels[ours.long()] - scaled).abs() - (levels[theirs.long()] - scaled).abs()).abs()
    signed_zero = signed & (ours == 127) & (theirs == 126) & torch.signbit(scaled)
    wrong = ~(gap <= tie * scaled.abs()) & ~signed_zero  # what is no number is no tie
    if wrong.any():
        raise AssertionError(f"{wrong.sum()} codes differ from bitsandbytes' and are no ties.")
    parts = (gap / scaled.abs())[~signed_zero & (scaled != 0)]
    return len(where), parts.max().item() if len(parts) else 0.0


def _ladder(config: OPTConfig, device: Device) -> Comparison:
    seconds, notes, checks, changes = {}, [], [], {"length": LENGTH}
    tokens = ROWS * LENGTH
    for name, change in LADDER.items():
        changes |= change
        setup = TrainingSetup(**changes)
        prediction = training.predict_memory(config, setup)
        peak, times = measure_step(config, setup)
        seconds[name] = times
        notes.append(describe(name, prediction, peak))
        checks.append(prediction.peak / peak)
    worst = max(checks, key=lambda ratio: abs(ratio - 1))
    result = Comparison(
        f"A training step down the ladder: {training.ModelShape.from_config(config).parameters / 1e9:.2f}B parameters, "
        f"{ROWS} rows of {LENGTH} tokens",
        seconds, ours="+ 8-bit AdamW", peer="vanilla",
    )  # fmt: skip
    result.notes = [*notes, f"Each rung adds to the one above it; all take the same {tokens:,} tokens a step."]
    if abs(worst - 1) > 0.1:
        result.notes.append(f"NOT within a tenth: the prediction is {worst:.2f} times the measured peak at worst.")
    else:
        result.checks.append(f"every predicted peak is within {abs(worst - 1):.1%} of the measured one")
    return result


def describe(name: str, prediction: MemoryPrediction, peak: int) -> str:
    """One line: predicted beside measured, and what the peak is made of."""
    parts = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in prediction.components.items() if size > 5e6)
    ratio = prediction.peak / peak
    return (
        f"{name}: predicted {prediction.peak / 1e9:.2f} GB, measured {peak / 1e9:.2f} GB ({ratio:.3f}), at "
        f"{prediction.moment} ({parts})"
    )


def measure_step(config: OPTConfig, setup: TrainingSetup, steps: int = 3) -> tuple[int, list[float]]:
    """The peak of allocated bytes and the seconds of steps of a fresh model on the GPU, after one to warm up."""
    _free()
    before = torch.cuda.memory_allocated()
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=setup.weights).train()
    if setup.checkpointing:
        training.checkpoint_layers(model)
    optimizer = OPTIMIZERS[setup.optimizer](model.parameters())
    size = (setup.accumulation, setup.batch, setup.length)
    batches = [{"input_ids": ids} for ids in torch.randint(5, config.vocab_size, size, device="cuda")]

    def loss(one, batch):
        with torch.autocast("cuda", dtype=setup.autocast or torch.bfloat16, enabled=setup.autocast is not None):
            return training.causal_lm_loss(one, batch)

    def step() -> None:
        optimizer.zero_grad()
        totals = training.accumulate(model, batches, loss)
        training.divide_gradients(model.parameters(), totals.count)
        optimizer.step()
        torch.cuda.synchronize()

    step()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return torch.cuda.max_memory_allocated() - before, times


OPTIMIZERS: dict[str, Callable] = {
    "adamw": torch.optim.AdamW,
    "adamw_fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "adamw8bit": training.AdamW8bit,
    "adafactor": training.Adafactor,
    "came": training.CAME,
    "lion": training.Lion,
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
}


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
