"""`effnlp audit` finds what is wrong with a check, and says the same in one process and in several."""

import pytest
import toy

from effnlp_lab import audit, exercises
from effnlp_lab.errors import UsageError


def told(**options) -> tuple[list, list[str]]:
    lines: list[str] = []
    return audit.audit("01", range(2), only="count_pairs", progress=lines.append, **options), lines


def test_several_processes_say_what_one_does():
    alone, together = told(right=True), told(right=True, jobs=2)
    assert alone == together and alone[0] == []
    assert alone[1][0] == "count_pairs: solution: as it should be on 2 seeds" and len(alone[1]) >= 3


@pytest.fixture
def toy_trials(monkeypatch):
    toy.install(monkeypatch)
    wrong = toy.RIGHT.replace("-1", "0")
    made = [
        audit.Trial(toy.SOFTMAX, "solution", toy.RIGHT),
        audit.Trial(toy.SOFTMAX, "answer 1", wrong),
        audit.Trial(toy.SOFTMAX, "mistake: none", toy.RIGHT, right=False, sentence="Nobody says this."),
        audit.Trial(toy.SOFTMAX, "mistake: unnamed", wrong, right=False, sentence="Nobody says this."),
        audit.Trial(toy.SOFTMAX, "mistake: elsewhere", toy.RIGHT, right=False, sentence="x", seen_on="cuda"),
        audit.Trial(toy.SOFTMAX, "blank", toy.RIGHT, right=False),
    ]
    monkeypatch.setattr(audit, "trials", lambda lab: made)
    audit._listed.cache_clear()
    yield
    audit._listed.cache_clear()


def test_every_fault_is_found(toy_trials):
    faults = {fault.answer: fault.sentence for fault in audit.audit("99_toy", range(1))}
    assert faults.pop("answer 1").startswith("refused: incorrect")
    assert faults.pop("mistake: none").startswith("accepted: correct")
    assert faults.pop("mistake: unnamed").startswith("rejected without its sentence")
    assert faults.pop("blank").startswith("a blank was judged correct") and not faults


def test_an_unknown_exercise_is_refused():
    with pytest.raises(UsageError, match="no exercise 'nonsense' in 01_tokenization"):
        audit.main([exercises.lab("01").name], exercise="nonsense")
