"""The optimizers beside torch's, transformers' and bitsandbytes', CAME beside its paper in float64."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnlp_lab import training
from effnlp_lab.errors import UsageError
from effnlp_lab.training import adamw8bit
from effnlp_lab.training.blockwise import BLOCK, block_count, dequantize_blockwise, dynamic_map, quantize_blockwise

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes has Linux wheels only")
SHAPES = ((7, 33), (65, 80), (50,), (4, 3, 9), (1, 5))


def parameters(dtype=torch.float32, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def run(optimizer, steps=5, seed=1):
    """The same gradients for every optimizer; the parameters afterwards."""
    generator = torch.Generator().manual_seed(seed)
    several = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(steps):
        for parameter in several:
            gradient = torch.randn(parameter.shape, generator=generator) * 10 ** torch.randn((), generator=generator)
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return [p.detach().clone() for p in several]


def same(ours, theirs, rtol=1e-5, atol=1e-6):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


ADAFACTOR = [
    {},
    {"warmup_init": True},
    {"lr": 1e-2, "scale_parameter": False},
    {"lr": 1e-2, "beta1": 0.9, "weight_decay": 0.1},
    {"clip_threshold": 0.3, "decay_rate": -0.5, "eps": (1e-20, 1e-2)},
]


@pytest.mark.parametrize("options", ADAFACTOR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adafactor_is_that_of_transformers(options, dtype):
    from transformers.optimization import Adafactor

    theirs = Adafactor(parameters(dtype), relative_step="lr" not in options, **options)
    ours = training.Adafactor(parameters(dtype), **options)
    same(run(ours), run(theirs), rtol=1e-5 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("options", [{}, {"lr": 1e-2, "weight_decay": 0.5, "betas": (0.8, 0.95)}])
def test_lion_is_that_of_bitsandbytes(options):
    options = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0} | options
    same(run(training.Lion(parameters(), **options)), run(bitsandbytes.optim.Lion32bit(parameters(), **options)))


def came_of_the_paper(weights, gradients, lr, betas, eps, clip, decay):
    """Luo et al. 2023, algorithm 2, for one matrix, in float64, as written: sums and not means, U = (u - m)^2."""
    n, m = weights.shape
    row, column, unsure_row, unsure_column = (torch.zeros(k, dtype=torch.float64) for k in (n, m, n, m))
    momentum = torch.zeros(n, m, dtype=torch.float64)
    weights = weights.double()
    for gradient in gradients:
        squares = gradient.double() ** 2 + eps[0]
        row = betas[1] * row + (1 - betas[1]) * squares.sum(1)
        column = betas[1] * column + (1 - betas[1]) * squares.sum(0)
        update = gradient.double() / torch.sqrt(torch.outer(row, column) / row.sum())
        update = update / max(1.0, (update.norm() / (n * m) ** 0.5 / clip).item())
        momentum = betas[0] * momentum + (1 - betas[0]) * update
        unsure = (update - momentum) ** 2 + eps[1]
        unsure_row = betas[2] * unsure_row + (1 - betas[2]) * unsure.sum(1)
        unsure_column = betas[2] * unsure_column + (1 - betas[2]) * unsure.sum(0)
        step = momentum / torch.sqrt(torch.outer(unsure_row, unsure_column) / unsure_row.sum())
        weights = weights * (1 - lr * decay) - lr * step
    return weights


def test_came_is_that_of_the_paper():
    options = {"lr": 1e-3, "betas": (0.9, 0.99, 0.999), "eps": (1e-30, 1e-16)}
    generator = torch.Generator().manual_seed(2)
    weight = torch.nn.Parameter(torch.randn(30, 17, generator=generator))
    gradients = [torch.randn(30, 17, generator=generator) for _ in range(6)]
    expected = came_of_the_paper(weight.detach().clone(), gradients, **options, clip=0.7, decay=0.1)
    optimizer = training.CAME([weight], **options, clip_threshold=0.7, weight_decay=0.1)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-4, atol=1e-5)


# The 8-bit code.


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_that_of_bitsandbytes(signed):
    assert torch.equal(dynamic_map(signed), bitsandbytes.functional.create_dynamic_map(signed=signed))


def bitsandbytes_codes(x, signed):
    """bitsandbytes' definition: its float64 path searches the nearest value; its float32 path on a CPU only nearly."""
    code = bitsandbytes.functional.create_dynamic_map(signed=signed)
    return torch.ops.bitsandbytes.quantize_blockwise(x.double(), code, BLOCK)


@pytest.mark.parametrize("signed", [True, False])
@settings(max_examples=15, deadline=None)
@given(numbers=st.integers(1, 1500), spread=st.floats(0, 4), seed=st.integers(0, 2**32))
def test_codes_are_those_of_bitsandbytes(signed, numbers, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numbers, generator=generator) * torch.exp(spread * torch.randn(numbers, generator=generator))
    x = x if signed else x.square()
    codes, absmax = quantize_blockwise(x, signed)
    their_codes, their_absmax = bitsandbytes_codes(x, signed)
    assert torch.equal(absmax, their_absmax)
    ties = (codes != their_codes.view_as(codes)).nonzero().flatten()
    assert ties.numel() <= 1 + numbers // 500  # a quotient that is rounded the other way, beside a boundary
    ours = dequantize_blockwise(codes, absmax, signed)
    theirs = dequantize_blockwise(their_codes.view_as(codes), absmax, signed)
    assert torch.allclose((ours - x).abs()[ties], (theirs - x).abs()[ties], rtol=1e-3)
    code = bitsandbytes.functional.create_dynamic_map(signed=signed)
    assert torch.equal(theirs, bitsandbytes.functional.dequantize_blockwise(
        their_codes.view_as(codes), absmax=absmax, code=code, blocksize=BLOCK))  # fmt: skip


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_comes_back_and_zero_stays_zero(signed):
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(quantize_blockwise(dynamic_map(signed) * 1.0, signed)[0], codes)
    codes, absmax = quantize_blockwise(torch.zeros(300), signed)
    assert not dequantize_blockwise(codes, absmax, signed).any()


# 8-bit AdamW.


def test_small_tensors_are_torch_adamw():
    options = {"lr": 1e-2, "weight_decay": 0.1}
    ours = training.AdamW8bit(parameters(shapes=((63, 65), (9,))), **options)  # 4095 numbers, and 9
    same(run(ours), run(torch.optim.AdamW(parameters(shapes=((63, 65), (9,))), **options)))
    assert all(state["exp_avg"].dtype == torch.float32 for state in ours.state.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_tensors_are_bitsandbytes_adamw8bit(dtype):
    """Its update on the CPU, with its codes made by the definition and not by its table."""
    (p,), (q,) = parameters(dtype, ((70, 90),)), parameters(dtype, ((70, 90),))
    ours = training.AdamW8bit([p], lr=1e-2, weight_decay=0.1)
    theirs = bitsandbytes.optim.AdamW8bit([q], lr=1e-2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(3)
    p.grad = torch.randn(p.shape, generator=generator).to(dtype)
    q.grad = p.grad.clone()
    ours.step(), theirs.step()
    state, their_state = ours.state[p], theirs.state[q]
    torch.testing.assert_close(state["absmax"], their_state["absmax1"])
    torch.testing.assert_close(state["absmax_sq"], their_state["absmax2"])
    average, square = p.grad.float() * 0.1, p.grad.float() ** 2 * 0.001
    for codes, values, signed in ((state["exp_avg"], average, True), (state["exp_avg_sq"], square, False)):
        their_codes = bitsandbytes_codes(values, signed)[0].view_as(codes)
        assert (codes != their_codes).float().mean() < 0.002
    torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5 if dtype == torch.float32 else 0.01, atol=1e-5)


def test_eight_bit_stays_near_32_bit():
    """On a smooth problem: after 60 steps both are at the same loss."""
    generator = torch.Generator().manual_seed(4)
    target = torch.randn(80, 80, generator=generator)
    losses = []
    for make in (training.AdamW8bit, torch.optim.AdamW):
        weight = torch.nn.Parameter(torch.zeros(80, 80))
        optimizer = make([weight], lr=0.03)
        for _ in range(60):
            optimizer.zero_grad()
            loss = (weight - target).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.25) and losses[0] < 0.1 * target.square().mean().item()


class Arena:
    """Tensors laid out in one storage, so that the interpreter, which is given the table, knows all their addresses.

    Where kernels are compiled and not interpreted, the storage is on the GPU.
    """

    def __init__(self):
        from effnlp_lab.training.kernel_adamw8bit import adamw8bit_kernel

        self.device = "cpu" if type(adamw8bit_kernel).__name__ == "InterpretedFunction" else "cuda"
        self.bytes = torch.zeros(2**21, dtype=torch.uint8, device=self.device)
        self.used = 0

    def put(self, tensor, shift=0):
        start = -(-self.used // 64) * 64 + shift
        self.used = start + tensor.numel() * tensor.element_size()
        place = self.bytes[start : self.used].view(tensor.dtype).view(tensor.shape)
        return place.copy_(tensor)


def zero_state(count):
    codes, scales = torch.zeros(count, dtype=torch.uint8), torch.zeros(block_count(count))
    return {"exp_avg": codes, "exp_avg_sq": codes.clone(), "absmax": scales, "absmax_sq": scales.clone()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_is_the_plain_update(dtype):
    """Whole chunks, ragged ends, tensors at odd addresses, numbers of every magnitude."""
    pytest.importorskip("triton", reason="Triton has Linux wheels only")
    from effnlp_lab.training import kernel_adamw8bit as kernel

    arena, generator, counts = Arena(), torch.Generator().manual_seed(5), (5000, 4096, 4097)
    shifts = (0, 0, 4)

    def draw(count, spread):
        magnitudes = torch.exp(spread * torch.randn(count, generator=generator))
        return (torch.randn(count, generator=generator) * magnitudes).to(arena.device, dtype)

    plain = [draw(count, 0.5) for count in counts]
    weights = [arena.put(w, shift) for w, shift in zip(plain, shifts, strict=True)]
    plain_states = [{k: t.to(arena.device) for k, t in zero_state(count).items()} for count in counts]
    states = [{name: arena.put(t) for name, t in state.items()} for state in plain_states]
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1}
    for step in (1, 2):
        gradients = [draw(count, 2.0 if dtype == torch.float32 else 0.5) for count in counts]
        placed = [arena.put(g, shift) for g, shift in zip(gradients, shifts, strict=True)]
        scalars = adamw8bit.step_scalars(group, step)
        rows = [adamw8bit.table_row(*one) for one in zip(weights, placed, states, strict=True)]
        work = adamw8bit.work_lists([(row[-1], adamw8bit.is_aligned(row)) for row in rows])
        chunk = 256 * kernel.ROWS  # the third is not aligned; of the others the first has a rest
        expected = {False: 5000 // chunk + 4096 // chunk, True: 1 + -(-4097 // chunk)}
        assert {masked: len(programs) for masked, programs in work} == expected
        table = arena.put(torch.tensor(rows))
        for masked, programs in work:
            kernel.launch(weights[0], placed[0], table, arena.put(programs), masked, scalars)
        for weight, gradient, state in zip(plain, gradients, plain_states, strict=True):
            adamw8bit.update_plain(weight, gradient, state, scalars)
        for weight, expected, state, plain_state in zip(weights, plain, states, plain_states, strict=True):
            compare_update(weight, expected, state, plain_state)
            weight.copy_(expected)  # each step by itself: a number beside a boundary may fall on either side of it
            for name, tensor in state.items():
                tensor.copy_(plain_state[name])


def compare_update(weight, expected, state, plain_state):
    torch.testing.assert_close(weight, expected, rtol=1e-4 if weight.dtype == torch.float32 else 2e-3, atol=1e-5)
    for name in ("absmax", "absmax_sq"):
        torch.testing.assert_close(state[name], plain_state[name], rtol=1e-5, atol=0)
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        codes, right = state[name].int(), plain_state[name].int()
        assert (codes != right).float().mean() < 3e-3, name
        # One apart beside a boundary; more only where two terms cancel and rounding is all that is left.
        values = dynamic_map(signed, codes.device)
        apart = (values[codes] - values[right]).abs()
        assert ((codes - right).abs().le(1) | apart.le(2e-6)).all(), name


@pytest.mark.parametrize("signed", [True, False])
def test_the_kernels_code_is_the_nearest_value(signed):
    """Of each value, and just below and above each boundary between two: through a first step without history."""
    pytest.importorskip("triton", reason="Triton has Linux wheels only")
    from effnlp_lab.training import kernel_adamw8bit as kernel

    values = dynamic_map(signed).double()
    boundaries = (values[:-1] + values[1:]) / 2
    asked = torch.cat([values, boundaries * (1 - 2e-6), boundaries * (1 + 2e-6)])
    expected = torch.bucketize(asked, boundaries)
    blocks = asked[torch.arange(-(-asked.numel() // 255) * 255) % asked.numel()].view(-1, 255)
    blocks = torch.cat([blocks, torch.ones(len(blocks), 1, dtype=torch.float64)], 1)  # 1 is each block's largest
    expected = expected[torch.arange(blocks.shape[0] * 255) % asked.numel()].view(-1, 255)
    arena, count = Arena(), blocks.numel()
    gradient = arena.put((blocks if signed else blocks.sqrt()).float().flatten())
    weight, state = arena.put(torch.zeros(count)), {name: arena.put(t) for name, t in zero_state(count).items()}
    scalars = adamw8bit.step_scalars({"lr": 0.0, "betas": (0.0, 0.0), "eps": 1e-8, "weight_decay": 0.0}, 1)
    row = adamw8bit.table_row(weight, gradient, state)
    table = arena.put(torch.tensor([row]))
    for masked, programs in adamw8bit.work_lists([(count, True)]):
        kernel.launch(weight, gradient, table, arena.put(programs), masked, scalars)
    codes = state["exp_avg" if signed else "exp_avg_sq"].view(-1, 256)[:, :255]
    assert torch.equal(codes.long().cpu(), expected)


# What all of them must do.

ALL = {
    "adafactor": training.Adafactor,
    "adafactor with momentum": lambda p: training.Adafactor(p, lr=1e-3, beta1=0.9),
    "came": training.CAME,
    "lion": training.Lion,
    "8-bit": lambda p: training.AdamW8bit(p, min_8bit_size=100),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_a_saved_state_goes_on_exactly(name, dtype):
    straight = run(ALL[name](parameters(dtype)), steps=3)
    first = ALL[name](parameters(dtype))
    run(first, steps=3)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = ALL[name](parameters(dtype, seed=9))
    for group, other in zip(second.param_groups, first.param_groups, strict=True):
        for p, q in zip(group["params"], other["params"], strict=True):
            p.data.copy_(q)
    second.load_state_dict(torch.load(file, weights_only=True))
    for state, other in zip(second.state.values(), first.state.values(), strict=True):
        assert {k: getattr(v, "dtype", v) for k, v in state.items()} == {
            k: getattr(v, "dtype", v) for k, v in other.items()
        }
    for a, b in zip(run(first, steps=2, seed=7), run(second, steps=2, seed=7), strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(a, b.detach()) for a, b in zip(straight, first.param_groups[0]["params"], strict=True))


@pytest.mark.parametrize("name", ALL)
def test_copies_groups_and_missing_gradients(name):
    """Two groups, a parameter without a gradient, a copy of the optimizer, a parameter whose rows are not in order."""
    turned = torch.nn.Parameter(torch.randn(20, 12).t())
    idle = torch.nn.Parameter(torch.ones(3))
    optimizer = ALL[name]([{"params": [turned]}, {"params": [idle], "lr": 0.1}])
    turned.grad = torch.randn(12, 20)
    before = turned.detach().clone()
    optimizer.step()
    assert not torch.equal(turned.detach(), before) and torch.equal(idle.detach(), torch.ones(3))
    again = copy.deepcopy(optimizer)
    (copied,) = again.param_groups[0]["params"]
    copied.grad = turned.grad.clone()
    optimizer.step(), again.step()
    assert torch.equal(copied.detach(), turned.detach())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lr": -1.0}, "lr is -1"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"betas": "high"}, "betas are"),
        ({"betas": "few"}, "betas are"),
        ({"eps": "negative"}, "eps is"),
        ({"clip_threshold": 0.0}, "clip_threshold is 0"),
    ],
)
def test_numbers_out_of_range_get_a_sentence(change, said):
    kinds = {training.AdamW8bit: 2, training.Lion: 2, training.CAME: 3}
    lacking = {"betas": (training.Adafactor,), "eps": (training.Lion,)}
    lacking["clip_threshold"] = (training.AdamW8bit, training.Lion)
    bad = {"high": lambda n: (0.9,) * (n - 1) + (1.0,), "few": lambda n: (0.9,), "negative": lambda n: (-1e-8,) * 2}
    for kind, count in itertools.chain(kinds.items(), [(training.Adafactor, 0)]):
        ((name, value),) = change.items()
        if kind in lacking.get(name, ()):
            continue
        value = bad[value](count) if isinstance(value, str) else value
        with pytest.raises(UsageError, match=said):
            kind(parameters(), **{name: value})


@pytest.mark.parametrize("name", ALL)
def test_integer_parameters_and_sparse_gradients_get_a_sentence(name):
    with pytest.raises(UsageError, match="is int8"):
        ALL[name]([torch.nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)])
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = ALL[name]([weight])
    weight.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(UsageError, match="no sparse gradients"):
        optimizer.step()


def test_the_table_is_sent_again_only_when_something_moved(monkeypatch):
    pytest.importorskip("triton", reason="Triton has Linux wheels only")
    from effnlp_lab.training import kernel_adamw8bit as kernel

    several = [torch.nn.Parameter(torch.randn(n)) for n in (5000, 4096)]
    states, launches = [zero_state(p.numel()) for p in several], []
    monkeypatch.setattr(kernel, "launch", lambda p, g, table, work, masked, scalars: launches.append((table, masked)))
    table = adamw8bit.Table(several, states)

    def step():
        launches.clear()
        table.step({})
        assert [masked for _, masked in launches] == [False, True]
        for row, parameter, state in zip(launches[0][0].tolist(), several, states, strict=True):
            assert row[0] == parameter.data_ptr() and row[2] == state["exp_avg"].data_ptr()
            assert row[4:] == [state["absmax"].data_ptr(), state["absmax_sq"].data_ptr(), parameter.numel()]
        return launches[0][0]

    for parameter in several:
        parameter.grad = torch.randn_like(parameter)
    first = step()
    assert step() is first and first[1, 1] == several[1].grad.data_ptr()
    several[1].grad = torch.randn_like(several[1])
    assert step() is not first and launches[0][0][1, 1] == several[1].grad.data_ptr()
    several[0].grad = torch.randn(5000, 2)[:, 0]  # rows that are not in order are copied, anew at every step
    assert step() is not step() and launches[0][0][0, 1] != several[0].grad.data_ptr()


def test_steps_are_counted_for_each_tensor():
    """One of two gets a gradient every other step only: its bias correction is its own, as in torch's AdamW."""
    found = []
    for kind, options in ((training.AdamW8bit, {"min_8bit_size": 10**9}), (torch.optim.AdamW, {})):
        several, generator = parameters(shapes=((5, 4), (3,))), torch.Generator().manual_seed(0)
        optimizer = kind(several, lr=1e-2, weight_decay=0.01, **options)
        for step in range(6):
            for parameter in several:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            if step % 2:
                several[1].grad = None
            optimizer.step()
        found.append([p.detach() for p in several])
    same(*found)
