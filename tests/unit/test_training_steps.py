"""Accumulation beside the full batch, checkpointing beside torch's, the loss scaler beside torch.amp's, schedules."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from effnlp_lab import training
from effnlp_lab.errors import UsageError

VOCABULARY = 40


class Small(nn.Module):
    """Logits of a next token from this one; float64 where gradients are to be equal to rounding."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embed, self.drop, self.head = nn.Embedding(VOCABULARY, 16), nn.Dropout(dropout), nn.Linear(16, VOCABULARY)

    def forward(self, input_ids):
        return self.head(self.drop(torch.tanh(self.embed(input_ids))))


def gradients(model):
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


# Accumulation.


def masked_batch(rows, length, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    lengths = torch.randint(2, length + 1, (rows, 1), generator=generator)
    labels = ids.masked_fill(torch.arange(length) >= lengths, -100)
    return {"input_ids": ids, "labels": labels, "note": "kept"}


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 7), size=st.integers(1, 8), length=st.integers(2, 12), seed=st.integers(0, 2**32))
def test_accumulated_gradients_are_those_of_the_full_batch(rows, size, length, seed):
    torch.manual_seed(0)
    model, batch = Small().double(), masked_batch(rows, length, seed)
    # The oracle: PyTorch's own mean over the whole batch.
    logits = model(batch["input_ids"])[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    weight = 0.25
    totals = training.accumulate(model, training.split_batch(batch, size), double_loss, weight=weight)
    training.divide_gradients(model.parameters(), totals.count * weight)
    assert totals.mean.item() == pytest.approx(loss.item())
    for ours, theirs in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def double_loss(model, batch):
    """causal_lm_loss works in float32; here rounding must not hide an error."""
    logits, labels = model(batch["input_ids"]), batch["labels"]
    target = labels[:, 1:].flatten()
    total = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), target, ignore_index=-100, reduction="sum")
    return total, (target != -100).sum()


def test_the_loss_of_a_language_model_is_that_of_transformers():
    torch.manual_seed(0)
    model = llama().eval()
    ids = torch.randint(0, VOCABULARY, (3, 9))
    labels = ids.clone()
    labels[0, 4:] = -100
    mask = (labels != -100).long()
    total, count = training.causal_lm_loss(model, {"input_ids": ids, "labels": labels, "attention_mask": mask})
    theirs = model(input_ids=ids, labels=labels, attention_mask=mask).loss
    assert (total / count).item() == pytest.approx(theirs.item(), rel=1e-6)
    again, same_count = training.causal_lm_loss(model, {"input_ids": ids, "attention_mask": mask})
    assert torch.equal(again, total) and int(count) == int(same_count) == 3 + 8 + 8


def test_every_graph_is_freed_by_its_own_backward():
    """The peak of four micro-batches is that of one, not of four."""
    from effnlp_lab.notebook.meter import measure

    model = Small()
    batches = training.split_batch({"input_ids": torch.randint(0, VOCABULARY, (64, 32))}, 16)
    training.accumulate(model, batches)
    one, four = (measure(training.accumulate, model, batches[:n])[1].peak_bytes for n in (1, 4))
    assert four < 1.2 * one


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: training.accumulate(Small(), []), "no micro-batch"),
        (lambda: training.causal_lm_loss(Small(), {"ids": torch.ones(1)}), "needs 'input_ids'.*has ids"),
        (lambda: training.split_batch({"a": torch.ones(2)}, 0), "micro_batch_size is 0"),
        (lambda: training.split_batch({"a": 1}, 1), "no tensor with rows"),
        (lambda: training.split_batch({"a": torch.ones(2), "b": torch.ones(3)}, 1), "a has 2, b has 3"),
    ],
)
def test_bad_batches_get_a_sentence(call, said):
    with pytest.raises(UsageError, match=said):
        call()


# Checkpointing.


def llama(**changes):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": VOCABULARY}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.2}
    return LlamaForCausalLM(LlamaConfig(**sizes | changes))


def opt():
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 3, "dropout": 0.2}
    return OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=4, vocab_size=VOCABULARY, max_position_embeddings=64))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("make", [llama, opt])
def test_layers_of_a_model_give_bit_equal_gradients_with_dropout(make, autocast):
    torch.manual_seed(0)
    model = make().train()
    ours = copy.deepcopy(model)
    assert training.checkpoint_layers(ours) == 3
    assert training.checkpoint_layers(ours) == 3  # twice is once
    ids, found = torch.randint(0, VOCABULARY, (2, 11)), []
    for one in (model, ours):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            total, _ = training.causal_lm_loss(one, {"input_ids": ids})
        total.backward()
        found.append([total.detach(), *gradients(one), torch.rand(1)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    ours.eval()
    assert not ours(input_ids=ids).logits.grad_fn.name().startswith("_Checkpoint")
    training.checkpoint_layers(ours, enabled=False)
    assert not any("forward" in vars(module) for module in ours.modules())


class Block(nn.Module):
    """Takes and returns nested things, uses keywords, dropout, an argument that needs no gradient and one unused."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.linear, self.drop = nn.Linear(6, 6), nn.Dropout(0.5)

    def forward(self, pair, mask, *, scale, unused=None, name="x"):
        self.calls += 1
        left, right = pair["left"], pair["right"][0]
        hidden = self.drop(self.linear(left)) * scale + right
        return {"hidden": (hidden, [hidden.detach().sum()]), "name": name, "mask": mask, "left": left, "none": None}


@pytest.mark.parametrize("keep", [True, False])
def test_nested_arguments_and_results(keep):
    torch.manual_seed(0)
    block, found = Block(), []
    tensors = [torch.randn(3, 6, requires_grad=True) for _ in range(2)] + [torch.tensor(2.0, requires_grad=True)]
    for way in ("plain", "ours", "torch"):
        left, right, scale = (t.detach().clone().requires_grad_() for t in tensors)
        mask, unused = torch.arange(3), torch.ones(2, requires_grad=True)
        torch.manual_seed(5)
        if not keep:
            block.drop.p = 0.0
        arguments = ({"left": left, "right": (right,)}, mask)
        keywords = {"scale": scale, "unused": unused, "name": "y"}
        calls = block.calls
        if way == "plain":
            out = block(*arguments, **keywords)
        elif way == "ours":
            out = training.checkpoint(block, *arguments, keep_random_state=keep, **keywords)
        else:
            out = torch.utils.checkpoint.checkpoint(
                block, *arguments, use_reentrant=False, preserve_rng_state=keep, **keywords
            )
        hidden, (total,) = out["hidden"]
        assert out["name"] == "y" and out["none"] is None and torch.equal(out["mask"], mask)
        assert torch.equal(out["left"], left) and not out["mask"].is_floating_point()
        block.zero_grad()
        (hidden.square().sum() + 3 * out["left"].sum()).backward()
        assert block.calls - calls == (1 if way == "plain" else 2) and unused.grad is None
        found.append([hidden.detach(), left.grad, right.grad, scale.grad, *gradients(block), torch.rand(1)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_gradients_arrive_where_no_argument_needs_one():
    """The first layer of a model: its input is data, its weights learn."""
    linear, x = nn.Linear(4, 4), torch.randn(2, 4)
    training.checkpoint(linear, x).sum().backward()
    assert linear.weight.grad is not None and x.grad is None
    with torch.no_grad():
        assert not training.checkpoint(linear, x).requires_grad


@pytest.mark.parametrize("layers", [1, 2, 7, 16])
def test_segments(layers):
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Tanh()) for _ in range(layers)]
    x, found = torch.randn(5, 8, requires_grad=True), []
    for run in (lambda: training.checkpoint_sequential(blocks, x), lambda: nn.Sequential(*blocks)(x)):
        x.grad = None
        torch.manual_seed(2)
        nn.Sequential(*blocks).zero_grad()
        run().square().sum().backward()
        found.append([x.grad, *gradients(nn.Sequential(*blocks))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert training.sqrt_segments(layers) == round(math.sqrt(layers))


def test_sqrt_segments_hold_the_least():
    """The meter's peak over the numbers of segments: least at the square root, or one beside it."""
    from effnlp_lab.notebook.meter import measure

    blocks, x = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(16)], torch.randn(4000, 8)

    def peak(segments):
        def step():
            training.checkpoint_sequential(blocks, x, segments).sum().backward()

        step()
        return measure(step)[1].peak_bytes

    peaks = {segments: peak(segments) for segments in (1, 2, 4, 8, 16)}
    assert min(peaks, key=peaks.get) in (4, 8) and peaks[4] < 0.6 * min(peaks[1], peaks[16] * 2)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: training.checkpoint_layers(nn.Linear(2, 2)), "no nn.ModuleList"),
        (lambda: training.checkpoint_sequential([torch.tanh], torch.ones(1), 2), "cannot be cut in 2"),
        (lambda: training.sqrt_segments(0), "0 layers"),
    ],
)
def test_what_cannot_be_checkpointed_gets_a_sentence(call, said):
    with pytest.raises(UsageError, match=said):
        call()


# The loss scaler.


def test_the_scaler_is_that_of_torch():
    """Forty steps, some with gradients that overflow, with clipping in between: same scale, weights and skips."""
    torch.manual_seed(0)
    model = Small()
    twin = copy.deepcopy(model)
    settings = {"growth_interval": 3}
    ours, theirs = training.LossScaler(2.0**10, **settings), torch.amp.GradScaler("cpu", init_scale=2.0**10, **settings)
    pairs = [(model, ours), (twin, theirs)]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m, _ in pairs]
    skipped = 0
    for step in range(40):
        ids = torch.randint(0, VOCABULARY, (2, 6))
        norms = []
        for (one, scaler), optimizer in zip(pairs, optimizers, strict=True):
            optimizer.zero_grad()
            loss = one(ids).square().mean()
            scaler.scale(loss).backward()
            if step % 7 == 3:
                one.head.bias.grad[1] = math.inf if step % 2 else math.nan
            scaler.unscale_(optimizer)
            norms.append(nn.utils.clip_grad_norm_(one.parameters(), 0.1))
            stepped = scaler.step(optimizer)
            scaler.update()
            skipped += scaler is ours and not stepped
        assert ours.factor == theirs.get_scale()
        torch.testing.assert_close(*norms, equal_nan=True)
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert skipped == ours.skipped == 6
    again = training.LossScaler()
    again.load_state_dict(ours.state_dict())
    assert again.state_dict() == ours.state_dict()


def test_the_scaler_keeps_small_gradients():
    """1e-8 is zero in float16, and not after scaling: the reason for it."""
    x = torch.tensor(1e-4, dtype=torch.float32, requires_grad=True)

    def gradient(scaler):
        x.grad = None
        small = x.half() * 1e-4  # its gradient runs through float16
        loss = small.float() * 1e-5
        (scaler.scale(loss) if scaler else loss).backward()
        return x.grad.item() / (scaler.factor if scaler else 1)

    assert gradient(None) == 0 and gradient(training.LossScaler()) == pytest.approx(1e-9, rel=0.01)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda s, o: training.LossScaler(0), "initial_scale is 0"),
        (lambda s, o: training.LossScaler(growth=1), "growth is 1"),
        (lambda s, o: training.LossScaler(growth_interval=0), "growth_interval is 0"),
        (lambda s, o: s.update(), r"update\(\) comes after step"),
        (lambda s, o: s.unscale_(o), "no gradient to unscale"),
    ],
)
def test_misuse_of_the_scaler_gets_a_sentence(call, said):
    with pytest.raises(UsageError, match=said):
        call(training.LossScaler(), torch.optim.SGD([nn.Parameter(torch.ones(2))]))


def test_unscaling_twice_and_float16_parameters_get_a_sentence():
    weight = nn.Parameter(torch.ones(2))
    scaler, optimizer = training.LossScaler(), torch.optim.SGD([weight])
    weight.grad = torch.ones(2)
    scaler.unscale_(optimizer)
    with pytest.raises(UsageError, match="already called"):
        scaler.unscale_(optimizer)
    half = nn.Parameter(torch.ones(2, dtype=torch.float16))
    half.grad = torch.ones(2, dtype=torch.float16)
    with pytest.raises(UsageError, match="float16 parameter"):
        training.LossScaler().unscale_(torch.optim.SGD([half]))


def test_what_stays_in_float32():
    """A CPU leaves fewer operations in float32 than a GPU; products are never among them, the loss always is."""
    found = training.full_precision_operations("cpu", torch.bfloat16)
    assert found["cross_entropy"] and not found["linear"] and not found["bmm"]


# Schedules.


def test_schedules_beside_those_of_transformers():
    from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

    def theirs(make, **options):
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
        schedule, rates = make(optimizer, **options), []
        for _ in range(50):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step(), schedule.step()
        return rates

    cosine = theirs(get_cosine_schedule_with_warmup, num_warmup_steps=10, num_training_steps=40)
    constant = theirs(get_constant_schedule_with_warmup, num_warmup_steps=10)
    ours, plain = training.cosine_with_warmup(10, 40), training.constant_with_warmup(10)
    for step in range(41):  # afterwards theirs rises again
        rising = step < 10  # theirs spends its first step at 0; ours is one step ahead until the top
        assert ours(step) == pytest.approx(cosine[step + rising], abs=1e-9)
        assert plain(step) == pytest.approx(constant[step + rising])


def test_warmup_stable_decay():
    factor = training.warmup_stable_decay(10, 100, 20, final=0.1)
    assert [factor(s) for s in (0, 9, 10, 79, 80)] == [0.1, 1, 1, 1, 1] and factor(100) == factor(500) == 0.1
    assert factor(85) == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(0.25)))
    assert training.warmup_stable_decay(0, 10, 0)(9) == 1
    assert training.cosine_with_warmup(0, 10, final=0.3)(10) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: training.cosine_with_warmup(10, 10), "leaves nothing of 10"),
        (lambda: training.cosine_with_warmup(-1, 10), "warmup is -1"),
        (lambda: training.warmup_stable_decay(5, 10, 6), "do not fit in a run of 10"),
        (lambda: training.warmup_stable_decay(1, 10, 6, final=2), "final is 2: expected from 0 to 1"),
    ],
)
def test_schedules_that_cannot_be_get_a_sentence(call, said):
    with pytest.raises(UsageError, match=said):
        call()
