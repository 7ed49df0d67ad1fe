"""Distillation losses beside torch's kl_div in float64 and liger-kernel; the fused and the chunked ones beside them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from effnlp_lab import distillation as room
from effnlp_lab.distillation.fused_linear import _chunk_rows, _over
from effnlp_lab.distillation.rows import loss_rows_plain
from effnlp_lab.errors import UsageError
from effnlp_lab.notebook.meter import Meter

KINDS = (
    ("forward_kl", 0.5),
    ("reverse_kl", 0.5),
    ("jsd", 0.5),
    ("jsd", 0.1),
    ("jsd", 0.0),
    ("jsd", 1.0),
    ("none", 0.5),
)


def logits(rows=23, vocabulary=57, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    return [spread * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) for _ in range(2)]


def some_labels(rows, vocabulary, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    return labels.masked_fill(torch.rand(rows, generator=generator) < 0.3, -100)


def by_torch(kind, beta, student, teacher, labels, temperature):
    """Mean over rows that count, by torch's own functions."""
    rows = labels != -100
    q, p = ((x[rows] / temperature).log_softmax(-1) for x in (student, teacher))
    if kind == "none":
        return F.cross_entropy(student, labels)
    if kind == "forward_kl" or (kind, beta) == ("jsd", 0):
        return temperature**2 * F.kl_div(q, p, reduction="batchmean", log_target=True)
    if kind == "reverse_kl" or (kind, beta) == ("jsd", 1):
        return temperature**2 * F.kl_div(p, q, reduction="batchmean", log_target=True)
    m = (beta * p.exp() + (1 - beta) * q.exp()).log()
    parts = [F.kl_div(m, x, reduction="batchmean", log_target=True) for x in (p, q)]
    return temperature**2 * (beta * parts[0] + (1 - beta) * parts[1])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_definitions_are_torchs(kind, beta, temperature):
    student, teacher = logits()
    labels = some_labels(*student.shape)
    call = {"forward_kl": room.forward_kl, "reverse_kl": room.reverse_kl}.get(kind)
    if kind == "none":
        ours = room.cross_entropy(student, labels)
    elif call:
        ours = call(student, teacher, labels, temperature=temperature)
    else:
        ours = room.jensen_shannon(student, teacher, labels, beta=beta, temperature=temperature)
    torch.testing.assert_close(ours, by_torch(kind, beta, student, teacher, labels, temperature), rtol=1e-12, atol=0)


def test_cosine_is_torchs_embedding_loss():
    a, b = torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(room.hidden_cosine(a, b), F.cosine_embedding_loss(a, b, torch.ones(9)))
    labels = torch.tensor([1, -100] * 4 + [2])
    expected = F.cosine_embedding_loss(a[::2], b[::2], torch.ones(5))
    torch.testing.assert_close(room.hidden_cosine(a, b, labels), expected)


def test_the_gradient_keeps_its_size_under_temperature():
    """With T^2 the gradient tends to (z_student - z_teacher) / vocabulary, centred (Hinton et al. 2015, equation 4)."""
    student, teacher = (x - x.mean(-1, keepdim=True) for x in logits(rows=4, spread=1.0))
    student.requires_grad_()
    room.forward_kl(student, teacher, temperature=1e4).backward()
    expected = (student - teacher).detach() / (student.shape[1] * student.shape[0])
    torch.testing.assert_close(student.grad, expected, rtol=1e-2, atol=1e-5)


def test_what_the_teacher_never_says_adds_nothing():
    student, teacher = logits()
    teacher[:, 5:] = -torch.inf
    assert math.isfinite(room.forward_kl(student, teacher)) and math.isfinite(room.jensen_shannon(student, teacher))


def linear(dtype=torch.float32, rows=23, hidden=12, other=20, vocabulary=57, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, hidden), (vocabulary, hidden), (rows, other), (vocabulary, other))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * 0.7 for shape in shapes]


def exact(kind, beta, tensors, labels, temperature, soft, hard, factor):
    """Loss and gradients by autograd in float64."""
    x, w, tx, tw = (t.double() for t in tensors)
    x.requires_grad_(), w.requires_grad_()
    student, teacher = x @ w.T, tx @ tw.T
    loss = hard * by_torch("none", beta, student, teacher, labels, 1)
    if kind != "none":
        loss = loss + soft * by_torch(kind, beta, student, teacher, labels, temperature)
    return loss.detach(), *torch.autograd.grad(loss * factor, (x, w))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize(("backend", "dtype"), [("torch", torch.float64), ("torch", torch.float32),
                                                ("triton", torch.float32), ("triton", torch.float16)])  # fmt: skip
def test_fused_beside_autograd(backend, dtype, kind, beta, temperature):
    """Chunks of unequal size, padding, a hard loss beside the soft one, a factor from what comes after."""
    rows, chunk = (23, 10) if backend == "torch" else (5, 3)  # the interpreter takes its time for each row
    tensors, labels = linear(dtype, rows), some_labels(rows, 57, seed=3)
    assert 0 < (labels == -100).sum() < rows
    soft, hard = 0.6, 0.4
    student = [t.clone().requires_grad_() for t in tensors[:2]]
    settings = room.LossSettings(kind, beta=beta, temperature=temperature, weight_soft=soft, weight_hard=hard)
    loss = room.chunked_linear_loss(
        tuple(student), tuple(tensors[2:]), labels, settings, chunk_rows=chunk, backend=backend
    )
    (1.5 * loss).backward()
    expected = exact(kind, beta, tensors, labels, temperature, soft, hard, 1.5)
    relative = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 3e-3}[dtype]
    for ours, theirs in zip((loss, student[0].grad, student[1].grad), expected, strict=True):
        assert (ours.double() - theirs).norm() <= relative * theirs.norm(), (ours, theirs)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_three_functions_and_sums(backend):
    x, w, tx, tw = linear(rows=5)
    labels = some_labels(5, 57, seed=3)
    count = (labels != -100).sum()
    for made, plain in (
        (room.fused_linear_jsd(x, w, tx, tw, labels, beta=0.3, backend=backend),
         room.jensen_shannon(x @ w.T, tx @ tw.T, labels, beta=0.3)),
        (room.fused_linear_kl(x, w, tx, tw, temperature=2.0, squared_temperature=False, backend=backend),
         room.forward_kl(x @ w.T, tx @ tw.T, temperature=2.0, squared_temperature=False)),
        (room.fused_linear_kl(x, w, tx, tw, reverse=True, backend=backend), room.reverse_kl(x @ w.T, tx @ tw.T)),
        (room.fused_linear_cross_entropy(x, w, labels, backend=backend), F.cross_entropy(x @ w.T, labels)),
        (room.fused_linear_cross_entropy(x, w, labels, reduction="sum", backend=backend) / count,
         F.cross_entropy(x @ w.T, labels)),
    ):  # fmt: skip
        torch.testing.assert_close(made, plain, rtol=1e-5, atol=1e-6)


def test_a_gradient_over_its_logits():
    """float32 logits and a float16 gradient in the same memory: each row's gradient begins where the row begins."""
    from effnlp_lab.distillation import kernel_rows

    student, teacher = (x.float() for x in logits(rows=5, vocabulary=10_000))
    labels, settings = some_labels(5, 10_000), room.LossSettings("jsd", beta=0.3, weight_hard=0.2)
    labels[0], labels[1] = 9_999, -100
    scale, expected = torch.tensor(3.0), torch.empty(5, 10_000)
    losses, plain = torch.empty(5), torch.empty(5)
    loss_rows_plain(student, teacher, labels, scale, plain, expected, settings)
    gradient = _over(student, torch.float16)
    assert gradient.data_ptr() == student.data_ptr() and gradient.stride() == (20_000, 1)
    kernel_rows.loss_rows(student, teacher, labels, scale, losses, gradient, settings)
    torch.testing.assert_close(losses, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.float(), expected, rtol=2e-3, atol=1e-6)


def test_all_labels_left_out_is_zero_and_no_nan():
    x, w, tx, tw = linear()
    x.requires_grad_()
    loss = room.fused_linear_kl(x, w, tx, tw, torch.full((23,), -100))
    loss.backward()
    assert loss == 0 and (x.grad == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_logits_far_apart(reduction):
    """Where probabilities underflow, losses and gradients are those of float64."""
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        settings, found = room.LossSettings(kind, reduction=reduction), []
        for backend, dtype in (("torch", torch.float64), ("torch", torch.float32), ("triton", torch.float32)):
            x, w, tx, tw = (t.to(dtype) for t in linear(rows=4))
            x = (30 * x).requires_grad_()
            loss = room.chunked_linear_loss((x, w), (30 * tx, tw), None, settings, backend=backend)
            found.append((loss.double(), torch.autograd.grad(loss, x)[0].double()))
        assert found[0][0] > 0.1
        for ours in found[1:]:
            torch.testing.assert_close(ours[0], found[0][0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(ours[1], found[0][1], rtol=1e-3, atol=1e-4)


def test_the_whole_logits_are_never_held():
    x, w, tx, tw = linear(rows=512, hidden=8, other=8, vocabulary=2048)
    x.requires_grad_(), w.requires_grad_()
    whole = 512 * 2048 * 4
    with Meter() as chunked:
        room.fused_linear_kl(x, w, tx, tw, chunk_rows=16).backward()
    with Meter() as plain:
        room.forward_kl(x @ w.T, tx @ tw.T).backward()
    assert chunked.usage.peak_bytes < 0.5 * whole < 2 * whole < plain.usage.peak_bytes


def test_chunks_fit_their_memory():
    assert _chunk_rows(8192, 128_256, 8) == 768
    assert _chunk_rows(100, 1000, 8) == 128 and _chunk_rows(8192, 10**9, 8) == 1
    for rows in (1, 127, 5000, 8192, 100_000):
        for vocabulary in (50, 4096, 128_256):
            assert 1 <= _chunk_rows(rows, vocabulary, 8) * vocabulary * 8 <= max(800 << 20, 128 * vocabulary * 8)


def test_gradients_that_are_not_wanted_and_autocast():
    x, w, tx, tw = linear()
    frozen = room.fused_linear_kl(x.requires_grad_(), w, tx, tw)
    frozen.backward()
    assert w.grad is None and x.grad is not None and not room.fused_linear_kl(x.detach(), w, tx, tw).requires_grad
    weight = w.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = room.fused_linear_kl(x.detach(), weight, tx, tw)
    loss.backward()
    assert weight.grad.dtype == torch.float32 and loss.dtype == torch.float32
    torch.testing.assert_close(loss, frozen, rtol=0.05, atol=0)


def test_second_backward_is_refused():
    x, w, tx, tw = linear()
    loss = room.fused_linear_kl(x.requires_grad_(), w, tx, tw)
    loss.backward(retain_graph=True)
    with pytest.raises(UsageError, match="differentiated before"):
        loss.backward()


def test_what_is_refused():
    x, w, tx, tw = linear()
    labels = torch.zeros(23, dtype=torch.long)
    for call, message in (
        (lambda: room.fused_linear_jsd(x, w, tx, tw, beta=1.5), "beta is 1.5"),
        (lambda: room.fused_linear_kl(x, w, tx, tw, temperature=0.0), "temperature is 0.0"),
        (lambda: room.fused_linear_kl(x, w, tx[:5], tw), "same rows and vocabulary"),
        (lambda: room.fused_linear_kl(x, w, tx, tw[:50]), "same rows and vocabulary"),
        (lambda: room.fused_linear_kl(x, w[:, :5], tx, tw), r"\[vocabulary, hidden\]"),
        (lambda: room.fused_linear_kl(x, w, tx, tw, weight_hard=0.5), "needs labels"),
        (lambda: room.fused_linear_cross_entropy(x, w, labels[:5]), "one of each of 23 rows"),
        (lambda: room.fused_linear_cross_entropy(x[:0], w, labels[:0]), "no rows"),
        (lambda: room.fused_linear_kl(x, w.double(), tx, tw), "of one kind"),
        (lambda: room.fused_linear_kl(x, w, tx, tw, chunk_rows=0), "chunk_rows is 0"),
        (lambda: room.fused_linear_kl(x, w, tx, tw, backend="cuda"), "backend 'cuda'"),
        (lambda: room.fused_linear_kl(*(t.double() for t in linear()), backend="triton"), "does not take"),
        (lambda: room.LossSettings("kl"), "'kl' is unknown"),
        (lambda: room.forward_kl(x, tx), "same positions"),
        (lambda: room.forward_kl(x, x, labels[:3]), "one of each position"),
        (lambda: room.hidden_cosine(x, tx), "teacher's width"),
    ):
        with pytest.raises(UsageError, match=message):
            call()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_ligers_chunked_loss(beta):
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    tensors, labels = linear(), some_labels(23, 57)
    ours = [t.clone().requires_grad_() for t in tensors[:2]]
    theirs = [t.clone().requires_grad_() for t in tensors[:2]]
    room.fused_linear_jsd(*ours, *tensors[2:], labels, beta=beta, temperature=2.0, squared_temperature=False,
                          weight_soft=0.7, weight_hard=0.3).backward()  # fmt: skip
    loss = liger.LigerFusedLinearJSDLoss(0.3, 0.7, beta, temperature=2.0, compiled=False)
    loss(theirs[0], theirs[1], tensors[2], tensors[3], labels).backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
