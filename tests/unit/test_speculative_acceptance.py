"""Accepting and rejecting: algorithm 1 of Leviathan et al. 2023 written out token by token, chi-square, transformers'
own warpers, and figures that the paper and scipy give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from effnlp_lab import speculative as room
from effnlp_lab.errors import UsageError
from effnlp_lab.speculative import acceptance
from effnlp_lab.speculative.early_exit import p_value

FALSE_ALARM = 1e-6


def distributions(*shape, seed=0, sparse=0.0):
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(shape, generator=generator) ** 3
    p = p * (torch.rand(shape, generator=generator) >= sparse)
    p[..., 0] += 1e-3
    return p / p.sum(-1, keepdim=True)


def draw(weights, uniform):
    """The first index whose cumulative weight exceeds uniform * total."""
    sums = np.cumsum(np.asarray(weights, dtype=np.float64))
    return int(np.flatnonzero(sums > uniform * sums[-1])[0])


def algorithm_1(p, q, drafts, r, last):
    """One row, as the paper has it; p, q, r in NumPy float32, as given."""
    gamma = len(drafts)
    n = min([i for i in range(gamma) if r[i] > p[i][drafts[i]] / q[i][drafts[i]]] + [gamma])
    rest = p[n] if n == gamma else np.maximum(0, p[n] - q[n])
    return n, draw(rest, last), min(n + 1, gamma)


@pytest.mark.parametrize("sparse", [0.0, 0.5])
@pytest.mark.parametrize(("gamma", "vocabulary"), [(1, 2), (3, 5), (6, 40)])
def test_given_its_uniforms_a_step_is_the_algorithm(gamma, vocabulary, sparse):
    batch = 300
    p, q = distributions(batch, gamma + 1, vocabulary, sparse=sparse), distributions(batch, gamma, vocabulary, seed=1)
    q = 0.8 * p[:, :gamma] + 0.2 * q
    generator = torch.Generator().manual_seed(2)
    draws, r = torch.rand(2, batch, gamma, generator=generator)
    last = torch.rand(batch, generator=generator)
    drafts = room.sample_from(q, draws)
    ours = room.verify_drafts(p, q, drafts, r, last)
    seen = set()
    for row in range(batch):
        assert drafts[row].tolist() == [draw(q[row, i].numpy(), float(draws[row, i])) for i in range(gamma)]
        expected = algorithm_1(p[row].numpy(), q[row].numpy(), drafts[row].tolist(), r[row].numpy(), float(last[row]))
        assert (int(ours.accepted[row]), int(ours.token[row]), int(ours.tested[row])) == expected
        seen.add(expected[0])
    assert seen == set(range(gamma + 1))  # every outcome occurred


def test_rows_with_fewer_drafts_and_drafts_that_are_certain():
    batch, gamma, vocabulary = 400, 4, 6
    p = distributions(batch, gamma + 1, vocabulary)
    generator = torch.Generator().manual_seed(3)
    drafts = torch.randint(0, vocabulary, (batch, gamma), generator=generator)
    counts = torch.randint(0, gamma + 1, (batch,), generator=generator)
    r, last = torch.rand(batch, gamma, generator=generator), torch.rand(batch, generator=generator)
    certain = torch.nn.functional.one_hot(drafts, vocabulary).float()
    ours = room.verify_drafts(p, None, drafts, r, last, counts)
    for row, count in enumerate(counts.tolist()):
        one = [x[row, :count].numpy() for x in (certain, drafts, r)]
        expected = algorithm_1(p[row, : count + 1].numpy(), one[0], one[1].tolist(), one[2], float(last[row]))
        assert (int(ours.accepted[row]), int(ours.token[row]), int(ours.tested[row])) == expected
    best = p.argmax(-1)
    greedy = room.verify_greedy(best, drafts, counts)
    onehot = torch.nn.functional.one_hot(best, vocabulary).float()
    again = room.verify_drafts(onehot, None, drafts, r, last, counts)
    assert all(torch.equal(a, b) for a, b in zip(greedy, again, strict=True))


def test_edges():
    p = torch.tensor([[[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]]).repeat(4, 1, 1)
    drafts = torch.tensor([[0], [2], [0], [1]])
    r = torch.tensor([[1 - 2**-24], [0.0], [0.0], [0.5]])
    # q equal to p: nothing is rejected, whatever the uniform; a token of probability zero never is accepted.
    q = p[:, :1].clone()
    q[1] = torch.tensor([0.0, 0.0, 1.0])
    ours = room.verify_drafts(p, q, drafts, r, torch.full((4,), 1 - 2**-24))
    assert ours.accepted.tolist() == [1, 0, 1, 1] and ours.token.tolist() == [2, 1, 2, 2]
    torch.testing.assert_close(room.adjusted_distribution(p[0, 0], p[0, 0]), p[0, 0])
    adjusted = room.adjusted_distribution(torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.4, 0.4]))
    assert adjusted.tolist() == [1, 0, 0]
    none = room.verify_drafts(p[:, :1], None, drafts[:, :0], r[:, :0], torch.tensor([0.1, 0.4, 0.6, 0.99]))
    assert none.accepted.tolist() == [0] * 4 and none.token.tolist() == [0, 0, 1, 1] and none.tested.tolist() == [0] * 4


def pairs(count, seed=5, gamma=2, vocabulary=4):
    """The first two tokens that steps give, from fixed p and q, where q depends on what was drafted before."""
    first_p, first_q = distributions(vocabulary), distributions(vocabulary, seed=1)
    second_p, second_q = distributions(vocabulary, vocabulary, seed=2), distributions(vocabulary, vocabulary, seed=3)
    third = distributions(vocabulary, seed=4)
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(count, 2 * gamma + 2, generator=generator)
    one = room.sample_from(first_q.expand(count, -1), u[:, 0])
    two = room.sample_from(second_q[one], u[:, 1])
    q = torch.stack([first_q.expand(count, -1), second_q[one]], 1)
    p = torch.stack([first_p.expand(count, -1), second_p[one], third.expand(count, -1)], 1)
    made = room.verify_drafts(p, q, torch.stack([one, two], 1), u[:, 2:4], u[:, 4])
    tokens = torch.stack([one, two], 1)
    tokens = torch.where(torch.arange(2) == made.accepted[:, None], made.token[:, None], tokens)
    after = room.sample_from(second_p[tokens[:, 0]], u[:, 5])  # where a step gave one token, the target gives the next
    second = torch.where(made.accepted == 0, after, tokens[:, 1])
    observed = torch.bincount(tokens[:, 0] * vocabulary + second, minlength=vocabulary**2)
    expected = (first_p[:, None] * second_p).flatten().double()
    return stats.chisquare(observed.numpy(), (count * expected / expected.sum()).numpy()).pvalue


def test_two_tokens_have_the_targets_distribution():
    assert pairs(200_000) > FALSE_ALARM


def test_the_chi_square_sees_known_mistakes(monkeypatch):
    monkeypatch.setattr(acceptance, "_rest", lambda p, q: p)  # a replacement drawn from p
    assert pairs(200_000) < FALSE_ALARM
    monkeypatch.undo()
    leading = acceptance._leading
    monkeypatch.setattr(acceptance, "_leading", lambda kept, counts: leading(~kept, counts))  # the inequality reversed
    assert pairs(200_000) < FALSE_ALARM


def test_acceptance_rate_is_one_minus_total_variation():
    """Corollary 3.6 of Leviathan et al. 2023: sum min(p, q)."""
    p, q = distributions(8), distributions(8, seed=1)
    count = 300_000
    u = torch.rand(count, 3, generator=torch.Generator().manual_seed(4))
    drafts = room.sample_from(q.expand(count, -1), u[:, 0])[:, None]
    both = p.expand(count, 2, -1)
    made = room.verify_drafts(both, q.expand(count, 1, -1), drafts, u[:, 1:2], u[:, 2])
    expected = float(torch.minimum(p, q).sum())
    assert stats.binomtest(int(made.accepted.sum()), count, expected).pvalue > FALSE_ALARM


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.8), (7, 0.6), (100, 0.05), (1, 1.0)])
def test_probabilities_are_transformers_own(temperature, top_k, top_p):
    logits = 2 * torch.randn(50, 33, generator=torch.Generator().manual_seed(0))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    expected = warpers(None, logits).softmax(-1)
    ours = room.Sampling(temperature, top_k, top_p).probabilities(logits.view(5, 10, 33)).view(50, 33)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(ours > 0, expected > 0)


def test_sampling_from_weights():
    weights = torch.tensor([0.0, 2.0, 0.0, 1.0, 1.0, 0.0])
    uniforms = torch.tensor([0.0, 0.4999, 0.5, 0.7499, 0.75, 1 - 2**-24])
    assert room.sample_from(weights.expand(6, -1), uniforms).tolist() == [1, 1, 3, 3, 4, 4]
    for bad in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(UsageError):
            room.Sampling(**bad)


def test_expected_tokens_and_speed():
    """Leviathan et al. 2023, table 1: operations and speed with c and c' of 0, and the table of results inverted."""
    table = ((0.6, 2, 1.53, 1.96), (0.7, 3, 1.58, 2.53), (0.8, 2, 1.23, 2.44), (0.8, 5, 1.63, 3.69),
             (0.9, 2, 1.11, 2.71), (0.9, 10, 1.60, 6.86))  # fmt: skip
    for alpha, gamma, operations, speed in table:
        assert room.speedup(alpha, gamma, 0.0) == pytest.approx(speed, abs=0.006)
        assert room.expected_operations(alpha, gamma, 0.0) == pytest.approx(operations, abs=0.006)
    assert room.expected_tokens(1.0, 4) == 5 and room.expected_tokens(0.0, 4) == 1 and room.expected_tokens(0.3, 0) == 1
    for alpha, gamma, c in ((0.75, 7, 0.02), (0.4, 3, 0.3)):
        assert room.implied_cost_ratio(room.speedup(alpha, gamma, c), alpha, gamma) == pytest.approx(c)
    best = room.best_gamma(0.8, 0.1, 30)
    assert all(room.speedup(0.8, best, 0.1) >= room.speedup(0.8, gamma, 0.1) for gamma in range(31))
    assert room.best_gamma(0.3, 0.5) == 0 and room.best_gamma(1.0, 0.1, 9) == 9
    for call in (lambda: room.expected_tokens(1.1, 3), lambda: room.speedup(0.5, 3, -1),
                 lambda: room.expected_tokens(0.5, -1), lambda: room.implied_cost_ratio(2.0, 0.5, 0)):  # fmt: skip
        with pytest.raises(UsageError):
            call()


def test_shapes_that_are_refused():
    p, q = distributions(2, 4, 5), distributions(2, 3, 5)
    drafts, r, last = torch.zeros(2, 3, dtype=torch.long), torch.rand(2, 3), torch.rand(2)
    for arguments, message in (
        ((p[:, :3], q, drafts, r, last), "gamma \\+ 1 distributions"),
        ((p, q[:, :2], drafts, r, last), "q has shape"),
        ((p, q, drafts, r[:, :2], last), "uniforms have shapes"),
    ):
        with pytest.raises(UsageError, match=message):
            room.verify_drafts(*arguments)


def test_adaptive_gamma_follows_the_acceptance():
    gamma = room.AdaptiveGamma(0.1, most=8, start=4)
    for _ in range(100):
        gamma.update(gamma.gamma, gamma.gamma)
    assert gamma.gamma == 8
    for _ in range(200):
        gamma.update(0, 1)
    assert gamma.gamma == 1 and gamma.acceptance_rate < 0.1
    gamma.reset()
    assert gamma.gamma == 4
    with pytest.raises(UsageError, match="start is 9"):
        room.AdaptiveGamma(0.1, most=8, start=9)


# CALM's threshold.


def test_p_values_are_the_bounds():
    for mean, count, delta in ((0.02, 100, 0.1), (0.0, 50, 0.05), (0.08, 400, 0.1), (0.3, 20, 0.5)):
        entropy = stats.entropy([mean, 1 - mean], [delta, 1 - delta])
        bentkus = np.e * stats.binom.cdf(np.ceil(count * mean - 1e-9), count, delta)
        assert p_value(mean, count, delta) == pytest.approx(min(1, np.exp(-count * entropy), bentkus), rel=1e-9)
    assert p_value(0.2, 100, 0.1) == 1.0


def test_the_calibrated_threshold_keeps_its_promise():
    """Losses whose risk is above delta below some threshold: the chosen one is there in at most epsilon of all runs."""
    thresholds = [0.9, 0.8, 0.7, 0.6, 0.5]
    risks = torch.tensor([0.01, 0.03, 0.06, 0.1001, 0.2])
    delta, epsilon, runs = 0.1, 0.2, 3000
    generator = torch.Generator().manual_seed(0)
    broken, bold = 0, 0
    for _ in range(runs):
        losses = (torch.rand(100, 5, generator=generator) < risks).float()
        chosen = room.calibrate_threshold(thresholds, losses, delta=delta, epsilon=epsilon)
        broken += chosen is not None and chosen <= 0.6
        bold += chosen in (0.8, 0.7)
    assert stats.binomtest(broken, runs, epsilon, alternative="greater").pvalue > FALSE_ALARM
    assert bold > runs / 2  # and it does not keep it by never leaving early


def test_calibration_stops_at_the_first_failure():
    losses = torch.zeros(200, 3)
    losses[:, 1] = 1.0
    assert room.calibrate_threshold([0.9, 0.8, 0.7], losses, delta=0.1, epsilon=0.05) == 0.9
    assert room.calibrate_threshold([0.9], losses[:5, :1], delta=0.1, epsilon=0.05) is None
    for arguments, message in (
        (([0.8, 0.9, 0.7], losses), "must fall"), (([0.9, 0.8], losses), "2 thresholds"),
        (([0.9, 0.8, 0.7], losses + 1), r"\[0, 1\]"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            room.calibrate_threshold(*arguments, delta=0.1, epsilon=0.05)
