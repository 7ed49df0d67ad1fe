"""Products with 4- and 3-bit weights beside cuBLAS and tinygemm; GPTQ's time beside the paper's; perplexity by bits.

Products rotate copies of the weights that are together larger than the L2 cache, as a model's layers are. GPTQ is timed
on layers of OPT's shapes with random weights and the Hessians of 128 sequences of 2048 tokens; the perplexities are
those of course-base on held-out modules of Python's library.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from effnlp_lab import quantization as room
from effnlp_lab.device import Device, ceilings
from effnlp_lab.notebook.bench import Comparison, compare

NEEDS = "cuda"
OURS = "effnlp_lab int4"
CUBLAS, TINYGEMM = "cuBLAS bf16", "torch tinygemm int4"
SHAPES = ((4096, 4096), (11008, 4096), (8192, 8192), (28672, 8192))
INPUTS = (1, 4, 16, 64, 256, 2048)
ROTATED = 200 << 20
"""Bytes of weights that a contestant goes through: four times the L2 cache of an H100."""
OPT = {"OPT-1.3B": (2048, 24), "OPT-2.7B": (2560, 32), "OPT-6.7B": (4096, 32), "OPT-13B": (5120, 40)}
PAPER = {"OPT-13B": 20.9 * 60}
"""Seconds on one A100, from the runtimes of Frantar et al. 2022; the model's own passes included."""


def run(device: Device, folder: Path) -> list[Comparison]:
    """Products, GPTQ, perplexity, latency (small sizes where EFFNLP_FAST asks for them)."""
    small = os.environ.get("EFFNLP_FAST", "").strip().lower() in ("1", "true")
    made = []
    for shape in SHAPES[:1] if small else SHAPES:
        made += products(*shape, INPUTS[:3] if small else INPUTS, device)
        torch.cuda.empty_cache()
    made.append(one_layer(device, 1024 if small else 4096))
    for name in list(OPT)[:1] if small else OPT:
        made.append(opt_layers(name, tokens=4096 if small else 128 * 2048))
        torch.cuda.empty_cache()
    made.append(perplexities(device, bits=(4,) if small else (8, 4, 3, 2), sequences=8 if small else 128))
    return [*made, latency(device, layers=2 if small else 8)]


def turns(calls: list[Callable[[], Tensor]]) -> Callable[[], Tensor]:
    """Each call takes the next copy of the weights."""
    endless = itertools.cycle(calls)
    return lambda: next(endless)()


def products(rows: int, columns: int, inputs: tuple[int, ...], device: Device) -> list[Comparison]:
    """One comparison for each number of input rows; all contestants multiply the same weights, group 128."""
    torch.manual_seed(rows)
    weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) / columns**0.5
    four, three = (room.round_to_nearest(weight, bits, 128, scale_dtype=torch.float16) for bits in (4, 3))
    packed = {OURS: room.pack(four), "effnlp_lab int3": room.pack(three)}
    dense = four.dequantize(torch.bfloat16)
    tiny = tinygemm_weights(four)

    def copies(size: int) -> int:
        return -(-ROTATED // size) + 1

    ours = {name: [clone(one) for _ in range(copies(one.nbytes()))] for name, one in packed.items()}
    theirs = [dense.clone() for _ in range(copies(dense.numel() * 2))]
    tinies = [tuple(part.clone() for part in tiny) for _ in range(copies(rows * columns // 2))]
    made = []
    for count in inputs:
        x = torch.randn(count, columns, device="cuda", dtype=torch.bfloat16)
        calls = {
            name: turns([lambda w=w, x=x: room.quantized_matmul(x, w) for w in several])
            for name, several in ours.items()
        }
        calls[CUBLAS] = turns([lambda w=w, x=x: F.linear(x, w) for w in theirs])
        calls[TINYGEMM] = turns([
            lambda w=w, x=x: torch.ops.aten._weight_int4pack_mm(x, w[0], 128, w[1]) for w in tinies
        ])  # fmt: skip
        one = compare(
            f"Product: {count} rows of {columns}, weights {rows}x{columns} in groups of 128", calls, ours=OURS,
            peer=CUBLAS, device=device, repeats=15, warmup=3, queued=True, in_a_row=12,
            limit=packed[OURS].nbytes() / ceilings(device).copy_bytes_per_second,
        )  # fmt: skip
        exact = x.double() @ four.dequantize(torch.float64).T
        for name in (OURS, CUBLAS, TINYGEMM):
            difference = ((calls[name]().double() - exact).norm() / exact.norm()).item()
            if not difference < 0.02:  # tinygemm rounds scales and zeros to bfloat16
                raise AssertionError(f"{name} differs from float64 by {difference:.2%}")
            one.checks.append(f"{name} within {difference:.1e} of float64, by norm")
        one.notes.append("The hardware's limit: int4 codes and scales read once, at copy bandwidth.")
        made.append(one)
    return made


def clone(weight: room.PackedWeight) -> room.PackedWeight:
    return room.PackedWeight(
        tuple(plane.clone() for plane in weight.planes), weight.scale.clone(), weight.zero.clone(), weight.bits,
        weight.group_size, weight.columns,
    )  # fmt: skip


def tinygemm_weights(quantized: room.QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Our codes for torch's kernel, whose weights are (code - 8) * scale + zero."""
    codes = (quantized.codes[:, ::2] << 4) | quantized.codes[:, 1::2]
    words = torch.ops.aten._convert_weight_to_int4pack(codes.contiguous(), 8)
    scale = quantized.scale.float()
    zero = (8 - quantized.zero.float()) * scale
    return words, torch.stack([scale.T, zero.T], dim=2).to(torch.bfloat16).contiguous()


def hessian_of(columns: int, tokens: int) -> room.Hessian:
    """Of correlated inputs, in bfloat16 as a model's are."""
    found, mix = room.Hessian(columns), torch.randn(columns // 4, columns, device="cuda", dtype=torch.bfloat16)
    for start in range(0, tokens, 16384):
        hidden = torch.randn(min(16384, tokens - start), columns // 4, device="cuda", dtype=torch.bfloat16)
        found.add(hidden @ mix / columns**0.5 + 0.1 * torch.randn(len(hidden), columns, device="cuda").bfloat16())
    return found


def one_layer(device: Device, size: int) -> Comparison:
    """A square layer: the fused column kernel beside the same loop in PyTorch."""
    torch.manual_seed(0)
    weight, hessian = torch.randn(size, size, device="cuda"), hessian_of(size, 16384).matrix
    calls = {
        "effnlp_lab fused": lambda: room.gptq_quantize(weight, hessian, 4, 128),
        "the loop in PyTorch": lambda: room.gptq_quantize(weight, hessian, 4, 128, fused=False),
    }
    found = compare(f"GPTQ of a {size}x{size} layer, 4 bits, group 128, its Hessian given", calls,
                    ours="effnlp_lab fused", peer="the loop in PyTorch", device=device, repeats=5,
                    warmup=1)  # fmt: skip
    fused, plain = (call().codes for call in calls.values())
    found.checks.append(f"{(fused == plain).float().mean().item():.4%} of the codes are the same")
    return found


def opt_layers(name: str, tokens: int) -> Comparison:
    """All layers of a model of OPT's shape: the time of one layer, Hessians included, times their number."""
    hidden, layers = OPT[name]
    shapes = {"attention": [(hidden, hidden)] * 3, "output": [(hidden, hidden)], "fc1": [(4 * hidden, hidden)],
              "fc2": [(hidden, 4 * hidden)]}  # fmt: skip
    times = []
    for repeat in range(3):
        torch.manual_seed(repeat)
        weights = {key: [torch.randn(shape, device="cuda") for shape in several] for key, several in shapes.items()}
        torch.cuda.synchronize()
        start = time.perf_counter()
        for several in weights.values():
            matrix = hessian_of(several[0].shape[1], tokens).matrix
            factor = room.inverse_factor(matrix)
            for weight in several:
                room.gptq_quantize(weight, matrix, 4, 128, factor=factor)
            del matrix, factor
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * layers)
        del weights
    seconds = {"effnlp_lab": times} | ({"paper, A100": [PAPER[name]]} if name in PAPER else {})
    missing = {} if name in PAPER else {"paper, A100": "not in its table"}
    notes = [f"One layer of {statistics.median(times) / layers:.2f} s, times {layers}; {tokens} calibration tokens.",
             "Ours makes its inputs and their Hessians; the model's own passes, which the paper counts, are not in it."]
    return Comparison(f"GPTQ of all layers of {name}", seconds, "effnlp_lab", "paper, A100", missing=missing,
                      notes=notes)  # fmt: skip


def course_tokens(documents, count: int) -> Tensor:
    from effnlp_lab.course.models import load_tokenizer

    tokenizer, found = load_tokenizer(), []
    for document in documents:
        found += tokenizer(document.text, verbose=False).input_ids
        if len(found) >= count:
            break
    return torch.tensor(found[:count])


def perplexities(device: Device, bits: tuple[int, ...], sequences: int) -> Comparison:
    """course-base after round to nearest and after GPTQ, groups of 64; the times are those of quantizing."""
    from effnlp_lab.course.models import load_model
    from effnlp_lab.course.text import heldout_documents, train_documents

    text = course_tokens(heldout_documents(), 200_000)
    pieces = room.calibration_sequences(course_tokens(train_documents(), 500_000), sequences, 512)
    notes = [f"Perplexity at 16 bits: {room.perplexity(load_model(device=device), text):.3f}."]
    seconds: dict[str, list[float]] = {"gptq": [], "rtn": []}
    for count, method in itertools.product(bits, ("rtn", "gptq")):
        model = load_model(device=device)
        start = time.perf_counter()
        room.quantize_model(model, pieces, method=method, bits=count, group_size=64, progress=False)
        torch.cuda.synchronize()
        seconds[method].append(time.perf_counter() - start)
        notes.append(f"Perplexity at {count} bits, {method}: {room.perplexity(model, text):.3f}.")
    return Comparison("course-base quantized, groups of 64", seconds, "gptq", "rtn", notes=notes)


def latency(device: Device, layers: int) -> Comparison:
    """One token through layers of Llama-7B's shape, as CUDA graphs: what is left is the GPU's time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=4096, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers,
                         num_attention_heads=32, num_key_value_heads=32)  # fmt: skip
    calls, sizes = {}, []
    for bits in (16, 4, 3):
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        if bits < 16:
            room.quantize_model(model, method="rtn", bits=bits, progress=False)
        calls[f"{bits} bits"] = graphed(model)
        tensors = itertools.chain(model.parameters(), model.buffers())
        sizes.append(f"{bits} bits: {sum(t.numel() * t.element_size() for t in tensors) / 1e9:.2f} GB of weights.")
    made = compare(f"One token through {layers} layers of Llama-7B's shape", calls, ours="4 bits", peer="16 bits",
                   device=device, repeats=31, warmup=5, queued=True)  # fmt: skip
    made.notes += sizes
    return made


@torch.no_grad()
def graphed(model: torch.nn.Module) -> Callable[[], None]:
    """The forward pass of one token, captured."""
    ids = torch.zeros(1, 1, dtype=torch.int64, device="cuda")
    positions = torch.zeros(1, 1, dtype=torch.int64, device="cuda")

    def forward() -> Tensor:
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()

    def replay() -> Tensor:
        graph.replay()
        return out

    replay.uses = model, ids, positions  # the graph knows their addresses only
    return replay
