"""Every exercise of every lab: right answers pass, blanks and mistakes do not, in one process and split in two."""

import os
from functools import lru_cache
from unittest import mock

import pytest

from effnlp_lab import exercises
from effnlp_lab.audit import independent_answers, trials, try_answer
from effnlp_lab.notebook import judge
from effnlp_lab.notebook.driver import answer_case
from effnlp_lab.notebook.judge import answer_from_source
from effnlp_lab.notebook.split import SplitDriver

SEEDS = int(os.environ.get("EFFNLP_SEEDS", "4"))  # of right answers; `effnlp audit --seeds 1000` is the long run
SEEDS_OF_WRONG = 1  # and another, split in two
SEEDS_OF_TRITON = min(SEEDS, 2)  # of right answers in Triton: seconds each in its interpreter
ALL = [
    pytest.param(
        lab,
        trial,
        id=f"{lab[:2]}-{trial.exercise.name}-{trial.name}",
        marks=pytest.mark.xdist_group(f"{lab[:2]}-{trial.exercise.name}"),  # what is remembered is an exercise's
    )
    for lab in exercises.lab_names()
    for trial in trials(lab)
]
# Of the wrong answers in Triton every third; `effnlp audit --split` runs all of them.
SPLIT = [
    each for number, each in enumerate(ALL)
    if number % 3 == 0 or each.values[1].right or not each.values[1].exercise.needs_triton
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def remembered():
    """A known mistake runs once on a case, however many answers are held against what it gives there."""
    with mock.patch.object(judge, "mistaken_response", lru_cache(maxsize=400)(judge.mistaken_response)):
        yield


@pytest.fixture(scope="module")
def split():
    with SplitDriver() as driver:
        yield driver


@pytest.mark.parametrize(("lab", "trial"), ALL)
def test_in_one_process(lab, trial):
    answer = answer_from_source(lab, trial.exercise.name, trial.source)
    seeds_of_right = SEEDS_OF_TRITON if trial.exercise.needs_triton else SEEDS
    for seed in range(seeds_of_right if trial.right else SEEDS_OF_WRONG):
        assert try_answer(trial, lab, seed, lambda request: answer_case(request, answer)) is None


@pytest.mark.parametrize(("lab", "trial"), SPLIT)
def test_split_in_two(lab, trial, split):
    split.load(lab, trial.exercise.name, trial.source)
    assert try_answer(trial, lab, 101, split.ask) is None


@pytest.mark.parametrize("lab", exercises.lab_names())
def test_two_independent_answers(lab):
    answers, _ = independent_answers(lab)
    for exercise in exercises.lab(lab).exercises:
        assert len(set(answers.get(exercise.name, ()))) >= 2, f"{exercise.name} needs two independent right answers"


@pytest.mark.parametrize("lab", exercises.lab_names())
def test_names_are_unique_across_labs(lab):
    others = {e.name for other in exercises.lab_names() if other != lab for e in exercises.lab(other).exercises}
    assert not others & {e.name for e in exercises.lab(lab).exercises}


@pytest.mark.parametrize("lab", [n for n in exercises.lab_names() if exercises.lab(n).graded])
def test_core_exercises_carry_the_points_within_five_hours(lab):
    spec = exercises.lab(lab)
    core = [e for e in spec.exercises if e.kind == "core" and e.twin_of is None]
    assert 4 <= len(core) <= 6
    assert sum(e.points for e in core) == spec.checked_points
    assert all(e.points == 0 for e in spec.exercises if e.kind == "stretch" and e.twin_of is None)
    assert sum(e.minutes for e in spec.exercises if e.kind == "core" and e.twin_of is None) <= 60 * spec.hours
    assert spec.hours <= 5
