"""Fused linear distillation losses beside liger-kernel's, forward and backward, in time and memory; then students.

The losses are at 8,192 tokens and a vocabulary of 128,256 in bfloat16. The students have two of the eight layers of
course-base's width and train on the course text for the same number of steps: from scratch, from the teacher's layers,
and distilled, with what each costs.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from effnlp_lab import distillation as room
from effnlp_lab import training
from effnlp_lab.course.models import load_model, load_tokenizer
from effnlp_lab.course.text import load_text
from effnlp_lab.device import Device, ceilings
from effnlp_lab.notebook.bench import Comparison, compare

NEEDS = "cuda"
OURS, PEER = "effnlp_lab fused", "liger fused"
LIGER_CHUNKED, WHOLE = "liger chunked, compiled", "PyTorch, whole logits"
ROWS, VOCABULARY, WIDTHS = 8192, 128_256, (2048, 4096)
LOSSES = {"JSD": ("jsd", 0.5), "forward KL": ("forward_kl", 0.0)}
SOME = 128
"""Rows whose gradients are compared with float64."""
STEPS, BATCH, LENGTH = 600, 64, 256


def run(device: Device, folder: Path) -> Iterator[Comparison]:
    """Both losses at both widths, then the students (small sizes where EFFNLP_FAST asks for them)."""
    small = os.environ.get("EFFNLP_FAST", "").strip().lower() in ("1", "true")
    for width in (256,) if small else WIDTHS:
        for name in LOSSES:
            yield losses(name, 512 if small else ROWS, width, 4000 if small else VOCABULARY, device)
            free()
    yield students(device, steps=20 if small else STEPS)


def inputs(rows: int, width: int, vocabulary: int) -> list[Tensor]:
    """Hidden states and weights of a student and of a teacher that it has come near to, in bfloat16."""
    torch.manual_seed(width)
    hidden, weight = torch.randn(rows, width, device="cuda"), torch.randn(vocabulary, width, device="cuda") / width**0.5
    found = [2 * hidden, weight]
    found += [2 * hidden + 0.5 * torch.randn_like(hidden), weight + 0.1 * torch.randn_like(weight) / width**0.5]
    return [x.bfloat16() for x in found]


def contestants(name: str, student: list[Tensor], teacher: list[Tensor],
                labels: Tensor) -> tuple[dict[str, Callable], dict[str, str]]:  # fmt: skip
    """Each gives the loss at temperature 1, with its graph; and who is missing."""
    kind, beta = LOSSES[name]
    fused = {"jsd": lambda: room.fused_linear_jsd(*student, *teacher, beta=beta),
             "forward_kl": lambda: room.fused_linear_kl(*student, *teacher)}[kind]  # fmt: skip
    found: dict[str, Callable] = {OURS: fused}
    if not importlib.util.find_spec("liger_kernel"):
        return found, {PEER: "not installed"}
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    peer = LigerFusedLinearJSD(jsd_beta=beta)
    chunked = LigerFusedLinearJSDLoss(0.0, 1.0, beta)
    found[PEER] = lambda: peer(*student, *teacher, None)
    found[LIGER_CHUNKED] = lambda: chunked(*student, *teacher, labels)

    def whole():
        logits = [x @ w.T for x, w in (student, teacher)]
        return room.jensen_shannon(*logits, beta=beta)

    found[WHOLE] = whole
    return found, {}


def losses(name: str, rows: int, width: int, vocabulary: int, device: Device) -> Comparison:
    """Forward and backward, to the gradients of the student's hidden states and weight."""
    hidden, weight, *teacher = inputs(rows, width, vocabulary)
    student = [hidden.requires_grad_(), weight.requires_grad_()]
    labels = torch.randint(0, vocabulary, (rows,), device="cuda")
    calls, missing = contestants(name, student, teacher, labels)
    usable: dict[str, Callable] = {}
    gradients: dict[str, tuple] = {}
    peaks: dict[str, int] = {}
    for who, call in calls.items():
        both = step_of(call, student)
        try:
            both()  # compiles, and opens libraries
            free()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss, to_hidden, to_weight = both()
            peaks[who] = torch.cuda.max_memory_allocated() - before
        except Exception as error:  # a peer that does not run here is named, and the others go on
            missing[who] = (str(error).splitlines() or [type(error).__name__])[0][:200]
            free()
            continue
        usable[who], gradients[who] = both, (float(loss), to_hidden[:SOME].cpu())
        del loss, to_hidden, to_weight
    operations = 8.0 * rows * width * vocabulary
    missing = {who: why for who, why in missing.items() if who not in usable}
    result = compare(
        f"{name} of two linear layers, forward and backward: {rows} tokens, hidden {width}, vocabulary {vocabulary}",
        usable, ours=OURS, peer=PEER, unit="TFLOP/s", work=operations, repeats=9, warmup=2, device=device,
        missing=missing, limit=ceilings(device).matmul_flops_per_second / 1e12,
    )  # fmt: skip
    result.notes += [f"{who}: {result.median(who) * 1e3:.1f} ms, peak {peaks[who] / 2**30:.2f} GiB" for who in usable]
    result.checks += verify(gradients, student, teacher, LOSSES[name][1])
    if PEER in usable:
        word = "no more" if peaks[OURS] <= peaks[PEER] else "MORE"
        result.notes.append(f"Ours takes {word} memory than liger fused ({peaks[OURS] / peaks[PEER]:.2f} times).")
    result.notes.append("Operations count the four products alone: logits of both, two gradients of the student.")
    return result


def step_of(call: Callable, student: list[Tensor]) -> Callable:
    def both():
        loss = call()
        return loss.detach(), *torch.autograd.grad(loss, student)

    return both


def verify(found: dict[str, tuple], student: list[Tensor], teacher: list[Tensor], beta: float) -> list[str]:
    """Everyone's loss, and gradient of the first hidden states, beside float64. Raises AssertionError if ours is off.

    Where student and teacher are close, the gradient is a small difference: logits in bfloat16 cost it some percent.
    """
    loss, gradient = exact(student, teacher, beta)
    lines, apart = [], {}
    for who, (value, to_hidden) in found.items():
        apart[who] = ((to_hidden.double() - gradient).norm() / gradient.norm()).item()
        lines.append(f"{who}: loss {abs(value - loss) / loss:.1e} and gradient {apart[who]:.1e} from float64's")
    if abs(found[OURS][0] - loss) > 1e-3 * loss or apart[OURS] > max(0.01, apart.get(PEER, 0)):
        raise AssertionError("; ".join(lines))
    return lines


def exact(student: list[Tensor], teacher: list[Tensor], beta: float) -> tuple[float, Tensor]:
    """The loss, and its gradient to the first SOME hidden states, in float64."""
    rows, total, gradient = len(student[0]), 0.0, None
    weights = [pair[1].detach().double() for pair in (student, teacher)]
    for first in range(0, rows, SOME):
        hidden = [pair[0].detach()[first : first + SOME].double() for pair in (student, teacher)]
        hidden[0].requires_grad_(first == 0)
        q, p = ((x @ w.T).log_softmax(-1) for x, w in zip(hidden, weights, strict=True))
        if beta == 0:
            loss = F.kl_div(q, p, reduction="sum", log_target=True)
        else:
            m = torch.logaddexp(p + math.log(beta), q + math.log(1 - beta))
            parts = [F.kl_div(m, x, reduction="sum", log_target=True) for x in (p, q)]
            loss = beta * parts[0] + (1 - beta) * parts[1]
        if first == 0:
            (gradient,) = torch.autograd.grad(loss / rows, hidden[:1])
        total += loss.item()
    return total / rows, gradient.cpu()


def students(device: Device, steps: int) -> Comparison:
    """Held-out losses of two-layer students after the same steps on the same batches."""
    teacher = load_model("course-base", device=device, dtype=torch.float32)
    data = token_rows("course-train", (steps + 1) * BATCH * LENGTH, LENGTH)
    held_out = [{"input_ids": x} for x in token_rows("course-heldout", 128 * LENGTH, LENGTH).split(32)]
    from_layers = lambda: room.student_from_layers(teacher, 2)  # noqa: E731
    kinds = {
        "from scratch": (lambda: scratch(teacher), None),
        "from the teacher's layers": (from_layers, None),
        "distilled": (lambda: scratch(teacher), room.LossSettings("forward_kl")),
        "distilled, from layers": (from_layers, room.LossSettings("forward_kl")),
    }
    seconds, notes, final = {}, [], {}
    for name, (make, settings) in kinds.items():
        torch.manual_seed(0)
        started = time.perf_counter()
        student, result = train(make(), teacher, settings, data, held_out, steps)
        torch.cuda.synchronize()
        seconds[name], final[name] = [time.perf_counter() - started], result.evaluations[steps]
        cost = room.training_flops(student, teacher if settings else None, steps * BATCH * LENGTH)
        points = ", ".join(f"{loss:.3f} at {step}" for step, loss in sorted(result.evaluations.items()))
        notes.append(f"{name}: held-out loss {points}; {sum(cost.values()) / 1e15:.2f} PFLOP, the teacher's "
                     f"{cost['teacher'] / 1e15:.2f} among them")  # fmt: skip
    made = Comparison(f"Students of two layers, {steps} steps of {BATCH * LENGTH} tokens", seconds,
                      ours="distilled", peer="from scratch")  # fmt: skip
    ahead = final["from scratch"] - final["distilled"]
    told = made.checks if ahead > 0 else made.notes
    told.append(f"distilled is {ahead:+.3f} nats a token {'better' if ahead > 0 else 'NOT better'} than from scratch "
                "after the same steps, from the same weights")  # fmt: skip
    made.notes += notes
    return made


def scratch(teacher):
    """A student of the same shape with new weights."""
    shape = room.student_from_layers(teacher, 2)
    torch.manual_seed(1)
    return type(teacher)(shape.config).to(shape.device, shape.dtype)


def train(student, teacher, settings, data: Tensor, held_out: list, steps: int):
    """All students see the same batches in the same order."""
    student.requires_grad_(True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    options = {
        "steps": steps, "schedule": training.cosine_with_warmup(max(1, steps // 20), steps), "autocast": torch.bfloat16,
        "held_out": held_out, "evaluate_every": max(1, steps // 4), "progress": False, "log_every": 100,
    }  # fmt: skip
    batches = [{"input_ids": x} for x in data[: steps * BATCH].split(BATCH)]
    if settings is None:
        trainer = training.Trainer(student, batches, optimizer, **options)
    else:
        trainer = room.DistillationTrainer(student, teacher, batches, optimizer, settings=settings, **options)
    return student, trainer.run()


def token_rows(name: str, tokens: int, length: int) -> Tensor:
    """The first tokens of a course text as rows int64 [rows, length], documents end to end; repeated if it is short."""
    tokenizer = load_tokenizer()
    ids: list[int] = []
    texts = iter(load_text(name).texts())
    while len(ids) < tokens and (several := list(itertools.islice(texts, 500))):
        for one in tokenizer(several)["input_ids"]:
            ids += [*one, tokenizer.eos_token_id]
    found = torch.tensor(ids[:tokens])
    found = found.repeat(-(-tokens // len(found)))[:tokens]
    return found[: len(found) // length * length].view(-1, length)


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
