"""Fused distillation losses compiled: beside float64 and liger-kernel, their memory and time; a student that learns."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from effnlp_lab import distillation as room
from effnlp_lab.distillation import fused_linear
from effnlp_lab.distillation.rows import loss_rows_plain
from effnlp_lab.notebook.bench import timed

ROOT = Path(__file__).parents[2]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KINDS = (("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("none", 0.5))


def benchmark():
    """benchmarks/distillation.py, which measures what is measured here too."""
    spec = importlib.util.spec_from_file_location("benchmark_distillation", ROOT / "benchmarks" / "distillation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def linear(dtype, rows, vocabulary, hidden=256, other=320, apart=0.3, seed=0):
    """A student and a teacher that it has come near to; labels, some of them left out."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, device="cuda", generator=generator)

    hidden_states, weight = 2 * normal(rows, hidden), normal(vocabulary, hidden) / hidden**0.5
    wide = torch.nn.functional.pad
    states = wide(hidden_states, (0, other - hidden)) + apart * normal(rows, other)
    labels = torch.randint(0, vocabulary, (rows,), device="cuda", generator=generator)
    labels[torch.rand(rows, device="cuda", generator=generator) < 0.2] = -100
    teacher_weight = wide(weight, (0, other - hidden)) + 0.1 * normal(vocabulary, other) / other**0.5
    return [x.to(dtype) for x in (hidden_states, weight, states, teacher_weight)], labels


def definition(tensors, labels, settings, dtype):
    """Loss and gradients by autograd on whole logits, everything in `dtype` but the softmax."""
    x, w, tx, tw = (t.to(dtype) for t in tensors)
    x.requires_grad_(), w.requires_grad_()
    student, loss = x @ w.T, 0.0
    if settings.kind != "none":
        how = {"temperature": settings.temperature}
        call = {"forward_kl": room.forward_kl, "reverse_kl": room.reverse_kl}.get(settings.kind)
        teacher = tx @ tw.T
        soft = call(student, teacher, labels, **how) if call else room.jensen_shannon(
            student, teacher, labels, beta=settings.beta, **how)  # fmt: skip
        loss = settings.weight_soft * soft
    if settings.weight_hard:
        loss = loss + settings.weight_hard * room.cross_entropy(student, labels)
    return loss.detach(), *torch.autograd.grad(loss, (x, w))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_beside_float64(dtype, kind, beta, temperature):
    """No further from float64 than twice what whole logits in the same dtype are, and a rounding."""
    settings = room.LossSettings(kind, beta=beta, temperature=temperature, weight_hard=1.0 if kind == "none" else 0.3)
    for rows, vocabulary, chunk in ((300, 4096, 128), (70, 32_003, 33), (257, 1000, None)):
        tensors, labels = linear(DTYPES[dtype], rows, vocabulary)
        student = [t.clone().requires_grad_() for t in tensors[:2]]
        loss = room.chunked_linear_loss(tuple(student), tuple(tensors[2:]), labels, settings, chunk_rows=chunk)
        loss.backward()
        exact = definition(tensors, labels, settings, torch.float64)
        plain = definition(tensors, labels, settings, DTYPES[dtype])
        for ours, theirs, right in zip((loss, student[0].grad, student[1].grad), plain, exact, strict=True):
            allowed = 2 * (theirs.double() - right).norm() + 2 * torch.finfo(DTYPES[dtype]).eps * right.norm()
            assert (ours.double() - right).norm() <= allowed, (rows, vocabulary)


@pytest.mark.parametrize("logits", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_the_kernel_beside_its_twin(kind, beta, logits):
    """Every column of long rows, the gradient over the logits themselves, and nothing written beside them."""
    from effnlp_lab.distillation import kernel_rows

    settings = room.LossSettings(kind, beta=beta, temperature=1.5, weight_hard=0.4)
    for vocabulary in (17, 4096, 50_257, 128_256):
        generator = torch.Generator("cuda").manual_seed(vocabulary)
        teacher = 3 * torch.randn(9, vocabulary, device="cuda", generator=generator)
        around = torch.full((11, vocabulary), 7.0, device="cuda", dtype=logits)
        around[1:10] = teacher + torch.randn(9, vocabulary, device="cuda", generator=generator)
        student, teacher = around[1:10], teacher.to(logits)
        labels = torch.randint(0, vocabulary, (9,), device="cuda", generator=generator)
        labels[4], labels[5] = -100, vocabulary - 1
        scale, expected = (
            torch.tensor(2.5, device="cuda"),
            torch.empty(9, vocabulary, device="cuda", dtype=torch.float64),
        )
        found, losses = (torch.empty(9, device="cuda", dtype=d) for d in (torch.float64, torch.float32))
        loss_rows_plain(student.double(), teacher.double(), labels, scale, found, expected, settings)
        gradient = fused_linear._over(student, torch.bfloat16)
        kernel_rows.loss_rows(student, teacher, labels, scale, losses, gradient, settings)
        torch.testing.assert_close(losses.double(), found, rtol=2e-5, atol=2e-5)
        allowed = 2**-8 * expected.abs() + 1e-5 * expected.abs().amax(1, keepdim=True)
        assert ((gradient.double() - expected).abs() <= allowed).all(), vocabulary
        assert (around[0] == 7).all() and (around[10] == 7).all()


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_beside_liger(beta):
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    fused = pytest.importorskip("liger_kernel.transformers.fused_linear_jsd")
    tensors, labels = linear(torch.bfloat16, 512, 8192)

    def gradients(call):
        student = [t.clone().requires_grad_() for t in tensors[:2]]
        loss = call(*student, *tensors[2:], labels)
        return loss.detach(), *torch.autograd.grad(loss, student)

    for ours, theirs in (
        (lambda *a: room.fused_linear_jsd(*a, beta=beta, temperature=2.0, squared_temperature=False),
         fused.LigerFusedLinearJSD(jsd_beta=beta, temperature=2.0)),
        (lambda *a: room.fused_linear_jsd(*a, beta=beta, temperature=2.0, squared_temperature=False, weight_soft=0.7,
                                          weight_hard=0.3),
         chunked.LigerFusedLinearJSDLoss(0.3, 0.7, beta, temperature=2.0, compiled=False)),
    ):  # fmt: skip
        for a, b in zip(gradients(ours), gradients(theirs), strict=True):
            assert (a.float() - b.float()).norm() <= 0.02 * b.float().norm()


def test_nothing_waits_for_the_device():
    tensors, labels = linear(torch.bfloat16, 512, 4096)
    student = [t.clone().requires_grad_() for t in tensors[:2]]
    room.fused_linear_jsd(*student, *tensors[2:], labels).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (1.5 * room.fused_linear_jsd(*student, *tensors[2:], labels, chunk_rows=128)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_factor_from_what_comes_after():
    tensors, labels = linear(torch.float32, 100, 999)
    found = []
    for factor in (1.0, 1.5):
        student = [t.clone().requires_grad_() for t in tensors[:2]]
        (factor * room.fused_linear_kl(*student, *tensors[2:], labels)).backward()
        found.append([t.grad for t in student])
    for one, more in zip(*found, strict=True):
        torch.testing.assert_close(1.5 * one, more)


@pytest.mark.alone
@pytest.mark.parametrize("width", [2048, 4096])
@pytest.mark.parametrize("name", ["JSD", "forward KL"])
def test_ahead_of_liger_in_time_at_no_more_memory(name, width):
    pytest.importorskip("liger_kernel")
    from effnlp_lab.device import resolve

    bench = benchmark()
    hidden, weight, *teacher = bench.inputs(bench.ROWS, width, bench.VOCABULARY)
    student = [hidden.requires_grad_(), weight.requires_grad_()]
    calls, _ = bench.contestants(name, student, teacher, torch.zeros(bench.ROWS, dtype=torch.long, device="cuda"))
    times, peaks = {}, {}
    for who in (bench.OURS, bench.PEER):
        both = bench.step_of(calls[who], student)
        both()
        bench.free()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        peaks[who] = torch.cuda.max_memory_allocated() - before
        times[who] = sorted(timed(both, resolve("cuda")) for _ in range(7))[3]
    assert times[bench.OURS] < times[bench.PEER], times
    assert peaks[bench.OURS] <= peaks[bench.PEER], peaks


@pytest.mark.alone
def test_a_distilled_student_beats_the_same_one_from_scratch():
    """The same weights, batches and steps; held-out text."""
    from effnlp_lab.course.models import load_model

    bench, steps = benchmark(), 300
    teacher = load_model("course-base", device="cuda", dtype=torch.float32)
    data = bench.token_rows("course-train", steps * bench.BATCH * bench.LENGTH, bench.LENGTH)
    held_out = [{"input_ids": x} for x in bench.token_rows("course-heldout", 64 * bench.LENGTH, bench.LENGTH).split(32)]
    found = {}
    for settings in (None, room.LossSettings("forward_kl")):
        torch.manual_seed(0)
        _, result = bench.train(bench.scratch(teacher), teacher, settings, data, held_out, steps)
        found[settings is not None] = result.evaluations[steps]
    assert found[True] < found[False] - 0.01, found
