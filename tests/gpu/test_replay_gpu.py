"""Recorded steps of training beside the same steps as Python starts them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effnlp_lab.notebook.replay import WARM_UP, Replayed

STEPS = 12


def batches(seed=1, rows=8):
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(rows, 16, device="cuda", generator=generator) for _ in range(STEPS)]


def trained(model, recorded, given, extra=lambda loss: None):
    """Train a copy with a learning rate that changes; the copy, the step, and how often Python ran it."""
    model, runs = copy.deepcopy(model), []
    rate = torch.tensor(0.0, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1, capturable=True)

    def step(x):
        runs.append(1)
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), x.flip(1))
        loss.backward()
        extra(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    work = Replayed(step) if recorded else step
    for at, x in enumerate(given):
        rate.fill_(1e-2 * (1 - at / STEPS))
        work(x)
    return model, work, len(runs)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)).cuda()


def assert_same(ours, theirs):
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_recorded_steps_learn_the_same(model):
    plain, _, _ = trained(model, False, batches())
    ours, step, runs = trained(model, True, batches())
    assert step.refused == "" and runs == WARM_UP + 1
    assert_same(ours, plain)
    other, _, _ = trained(model, True, batches(seed=2))
    assert not torch.equal(other[0].weight, ours[0].weight), "the batches make no difference"


def test_a_batch_of_another_shape_is_run_as_it_is(model):
    given = batches()
    given[-3] = given[-3][:5]
    plain, _, _ = trained(model, False, given)
    ours, step, runs = trained(model, True, given)
    assert step.refused == "" and runs == WARM_UP + 2
    assert_same(ours, plain)


def test_a_step_that_asks_for_a_value_is_run_as_it_is(model):
    losses = []
    plain, _, _ = trained(model, False, batches())
    ours, step, runs = trained(model, True, batches(), extra=lambda loss: losses.append(loss.item()))
    assert step.refused == "it waits for the GPU" and runs == STEPS == len(losses)
    assert_same(ours, plain)
    torch.randn(4, device="cuda")
    test_recorded_steps_learn_the_same(model)


def test_an_error_comes_out(model):
    def step(x):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        Replayed(step)(torch.ones(2, device="cuda"))
    assert torch.cuda.get_sync_debug_mode() == 0


def test_what_fails_only_when_recorded_is_run_as_it_is(model):
    """And everything else still works after it."""
    def refuse(loss):
        if torch.cuda.is_current_stream_capturing():
            raise ValueError("not while recorded")

    plain, _, _ = trained(model, False, batches())
    ours, step, runs = trained(model, True, batches(), extra=refuse)
    assert step.refused == "ValueError: not while recorded" and runs == STEPS + 1
    assert_same(ours, plain)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.randn(4, device="cuda")
    test_recorded_steps_learn_the_same(model)
