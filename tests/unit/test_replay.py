"""Without a GPU a step is what it was."""

from __future__ import annotations

import torch

from effnlp_lab.notebook.replay import Replayed


def test_on_a_cpu_every_call_is_the_step_itself():
    seen = []
    step = Replayed(lambda x, y: seen.append((x, y)))
    given = [(torch.ones(2), torch.zeros(3)) for _ in range(6)]
    for pair in given:
        step(*pair)
    for got, pair in zip(seen, given, strict=True):
        assert all(ours is theirs for ours, theirs in zip(got, pair, strict=True))
    assert len(seen) == 6 and step.refused == ""
