"""Variants: the public solution fails under every other one, and says why; nobody has the public one throughout."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest

from effnlp_lab import exercises
from effnlp_lab.audit import Trial, independent_answers, trials
from effnlp_lab.exercises.spec import Exercise, Lab
from effnlp_lab.notebook.driver import answer_case
from effnlp_lab.notebook.judge import Verdict, answer_from_source, judge

LABS = exercises.lab_names()
STUDENTS = [f"student{n}@example.org" for n in range(200)]
VARIANTS = [
    pytest.param(lab, exercise, variant, id=f"{lab[:2]}-{exercise.name}-{'-'.join(variant.values())}")
    for lab in LABS
    for exercise in exercises.lab(lab).exercises
    if exercise.kind == "core" and exercise.variants
    for variant in exercise.all_variants()[1:]
]


def core_with_variants(lab: Lab) -> list[Exercise]:
    return [e for e in lab.exercises if e.kind == "core" and e.variants]


@cache
def trials_of(lab: str) -> list[Trial]:
    return list(trials(lab))


def judged(lab: str, exercise: Exercise, source: str, variant: dict[str, str]) -> Verdict:
    answer = answer_from_source(lab, exercise.name, source)
    return judge(exercise, lab, lambda request: answer_case(request, answer), seed=77, variant=variant)


@pytest.mark.parametrize("name", LABS)
def test_every_lab_has_a_variant_in_a_core_exercise(name):
    lab = exercises.lab(name)
    chosen = core_with_variants(lab)
    assert chosen
    for exercise in chosen:
        values = [value for values in exercise.variants.values() for value in values]
        assert len(set(values)) == len(values), "a value's sentence is found by the value"
        assert set(exercise.variant_text) == set(values)
    if lab.graded:
        combined = 1
        for exercise in chosen:
            combined *= len(exercise.all_variants())
        assert combined >= 4, "last year's answer would be this year's too often"


@pytest.mark.parametrize(("lab", "exercise", "variant"), VARIANTS)
def test_public_solution_fails_under_another_variant_and_says_whose_it_is(lab, exercise, variant):
    public = next(t.source for t in trials_of(lab) if t.exercise.name == exercise.name and t.name == "solution")
    verdict = judged(lab, exercise, public, variant)
    assert verdict.state == "incorrect" and verdict.score < exercise.points
    (sentence,) = verdict.mistakes
    assert sentence.startswith("This is the answer to the variant that is published (")
    assert sentence.endswith(exercise.in_words(variant))


@pytest.mark.parametrize(("lab", "exercise", "variant"), VARIANTS)
def test_every_variant_has_a_right_answer(lab, exercise, variant):
    """That it passes is tested with all right answers, in test_exercises."""
    (answer,) = [t for t in trials_of(lab) if t.exercise.name == exercise.name and t.variant == variant]
    assert answer.right


@pytest.mark.parametrize("name", LABS)
def test_no_student_of_a_course_with_a_key_has_the_public_variant_of_a_whole_lab(name):
    lab = exercises.lab(name)
    chosen = core_with_variants(lab)
    drawn = Counter()
    for student in STUDENTS:
        mine = [tuple(lab.variant_of(e.name, student, "key").items()) for e in chosen]
        drawn[tuple(mine)] += 1
        assert mine != [tuple(e.public_variant().items()) for e in chosen]
        assert mine == [tuple(lab.variant_of(e.name, student, "key").items()) for e in chosen]
    combined = 1
    for exercise in chosen:
        combined *= len(exercise.all_variants())
    assert len(drawn) == combined - 1 and max(drawn.values()) <= 3 * len(STUDENTS) / (combined - 1)
    assert all(lab.variant_of(e.name, None, "key") == e.public_variant() for e in chosen)
    other = [[lab.variant_of(e.name, s, "last year's") for e in chosen] for s in STUDENTS]
    assert combined == 2 or other != [[lab.variant_of(e.name, s, "key") for e in chosen] for s in STUDENTS]


def test_answer_of_another_student_is_named_too():
    """Under the public variant as well, where no known mistake explains it."""
    lab, exercise = exercises.find("decode_bpe")
    source = independent_answers(lab.name)[1]["decode_bpe"]["invalid=escape"]
    (sentence,) = judged(lab.name, exercise, source, exercise.public_variant()).mistakes
    assert sentence.startswith("This is the answer to the variant that another student has (invalid = escape)")
