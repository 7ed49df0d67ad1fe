"""Quizzes on somebody's own code: one right answer to each question, held against the mutants themselves."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import nbformat
import pytest
import torch
from effnlp_grading import quiz, sample_class
from effnlp_grading.cli import main
from effnlp_grading.course import Course
from effnlp_grading.plan import digest_of, steps_of
from effnlp_grading.preprocessors import record_path
from effnlp_grading.quiz import Accepted, Question, make_quiz
from effnlp_grading.records import Record
from effnlp_grading.similarity import answers_in

from effnlp_lab import exercises
from effnlp_lab.errors import UsageError
from effnlp_lab.exercises.reference import Rng
from effnlp_lab.exercises.spec import Exercise
from effnlp_lab.mutation.forks import in_children
from effnlp_lab.notebook import judge
from effnlp_lab.notebook.driver import answer_case
from effnlp_lab.notebook.judge import answer_from_source

ROOT = Path(__file__).resolve().parents[2]
LABS = exercises.lab_names()
EVERYTHING = os.environ.get("EFFNLP_DEFEND") == "all"  # every exercise of every lab, for a long evening
LAB = "01_tokenization"
ENDLESS = ("merge_pair", "largest_batch")  # many of their mutants never end, which takes its time


class Forked:
    """Runs code in forked children of this process: what a test may do with code that the kit wrote."""

    def __init__(self, lab: str, exercise: str, folder: Path) -> None:
        self.lab, self.exercise, self.folder, self.warm = lab, exercise, folder, False
        torch.set_num_threads(1)  # a forked child has none of its parent's threads

    def run(self, source: str, requests: Sequence[tuple[bytes, float]], fresh: bool = False) -> list[bytes | str]:
        def work() -> list[str]:
            try:
                answer = answer_from_source(self.lab, self.exercise, source)
            except Exception as error:
                return [f"-does not even run: {error}"] * len(requests)
            found = []
            for request, _ in requests:
                found.append(answer_case(request, answer))
                if quiz.no_end(found[-1]):
                    break
            return ["+" + response.hex() for response in found]

        if not self.warm:  # the code as it is comes first; what it imports is there in the children then
            work()
            self.warm = True
        [(_, told)] = in_children([work], 1, 3.0, self.folder)
        if not isinstance(told, list):
            return [] if "hung" in told else ["ended its process"] * len(requests)
        return [bytes.fromhex(one[1:]) if one[0] == "+" else one[1:] for one in told]


def solutions(lab: str) -> dict[str, str]:
    path = ROOT / "solutions" / lab / f"{exercises.lab(lab).notebook}.ipynb"
    return answers_in(path.read_bytes(), exercises.lab(lab))


def blanks_of(lab: str) -> dict[str, str]:
    return {name: texts["blank"] for name, texts in exercises.sources(lab)["exercises"].items()}


def held(question: Question, lab: str) -> list[bool]:
    """For each option, whether the check accepts what it does there: drawn and judged anew, without the quiz's code."""
    exercise = exercises.lab(lab).exercise(question.exercise)
    found = []
    for option in question.options:
        reference = exercises.reference_of(exercise.name)
        (case,) = [c for c in reference.cases(Rng(question.seed), question.variant)
                   if c.name == question.case or not question.case and option.text.startswith(f"{c.name}: ")]
        answer = answer_from_source(lab, exercise.name, option.source)
        request = judge.make_request(exercise, lab, case.inputs, seed=question.seed, device="cpu", seconds=2.0)
        response = judge.read_response(answer_case(request, answer))
        state, _ = judge.response_verdict(exercise, reference, case, response, question.variant)
        found.append(state == "correct")
    return found


def assert_one_right(question: Question, lab: str) -> None:
    assert len(question.options) == quiz.OPTIONS == len({option.text for option in question.options})
    assert question.why and question.options[question.right].text
    sound = held(question, lab)
    if question.kind == "what happens":  # what really happens is wrong; what does not is another text
        assert not sound[question.right]
        assert len({option.source for option in question.options}) == quiz.OPTIONS
    else:
        assert sound == [number != question.right for number in range(quiz.OPTIONS)]


def chosen(lab: str) -> list[Exercise]:
    everything = [e for e in exercises.lab(lab).exercises if not e.needs_gpu]
    quick = [e for e in everything if e.kind == "core" and not e.needs_triton and e.name not in ENDLESS]
    return everything if EVERYTHING else quick[1:3]


@pytest.mark.parametrize("lab", LABS)
def test_every_question_on_a_solution_has_one_right_answer(lab, tmp_path, monkeypatch):
    if not EVERYTHING:
        monkeypatch.setattr(quiz, "MUTANTS", 10)
        monkeypatch.setattr(quiz, "CASES", 5)
    solved, asked = solutions(lab), []
    for exercise in chosen(lab):
        accepted = Accepted(exercise, solved[exercise.name], exercise.public_variant())
        made = make_quiz(lab, [accepted], blanks_of(lab), lambda one: Forked(lab, one.exercise.name, tmp_path), seed=5,
                         count=6 if EVERYTHING else 1)
        for question in made:
            assert_one_right(question, lab)
        asked += made
        if asked and not EVERYTHING:
            break
    assert asked


def test_questions_are_of_all_kinds_and_on_several_exercises(tmp_path, monkeypatch):
    monkeypatch.setattr(quiz, "MUTANTS", 10)
    solved, names = solutions(LAB), ("count_pairs", "train_bpe", "decode_bpe")
    chosen = [exercises.find(name)[1] for name in names]
    accepted = [Accepted(exercise, solved[exercise.name], exercise.public_variant()) for exercise in chosen]
    questions = make_quiz(LAB, accepted, blanks_of(LAB), lambda one: Forked(LAB, one.exercise.name, tmp_path), seed=4,
                          count=4)
    assert len(questions) == 4 and {q.kind for q in questions} == set(quiz.KINDS)
    assert {q.exercise for q in questions} == set(names)
    assert len({q.right for q in questions}) > 1
    for question in questions:
        assert_one_right(question, LAB)


def test_the_same_seed_gives_the_same_quiz(tmp_path, monkeypatch):
    monkeypatch.setattr(quiz, "MUTANTS", 5)
    monkeypatch.setattr(quiz, "CASES", 5)
    accepted = [Accepted(exercises.find("count_pairs")[1], solutions(LAB)["count_pairs"], {})]
    first, second = (make_quiz(LAB, accepted, blanks_of(LAB), lambda one: Forked(LAB, "count_pairs", tmp_path), seed, 1)
                     for seed in (6, 6))
    assert first and [q.to_json() for q in first] == [q.to_json() for q in second]


def test_code_in_which_nothing_shows_gives_no_question(tmp_path):
    exercise = exercises.find("count_pairs")[1]
    source = "def count_pairs(words, counts):\n    return _counted(words, counts)\n"

    class Deaf(Forked):
        def run(self, source, requests, fresh=False):
            return super().run(solutions(LAB)["count_pairs"], requests)

    made = make_quiz(LAB, [Accepted(exercise, source, {})], {}, lambda one: Deaf(LAB, "count_pairs", tmp_path), seed=1)
    assert made == []


@pytest.fixture
def course(tmp_path, monkeypatch) -> Course:
    """ada solved two exercises and was graded, ben nothing, cem was not graded."""
    course = Course(tmp_path / "course")
    shutil.copytree(ROOT / "labs" / LAB, course.root / "labs" / LAB)
    (course.root / "grading").mkdir()
    shutil.copy(ROOT / "grading" / "nbgrader_config.py", course.root / "grading")
    monkeypatch.chdir(course.root)
    monkeypatch.setenv("EFFNLP_SEED", "7")
    solved = {name: source for name, source in solutions(LAB).items() if name in ("count_pairs", "merge_pair")}
    for student, written in (("ada", solved), ("ben", {}), ("cem", solved)):
        submit(course, student, written, judged=student != "cem")
    return course


def submit(course: Course, student: str, written: dict[str, str], judged: bool) -> None:
    lab = exercises.lab(LAB)
    notebook = sample_class.submission(nbformat.read(course.root / "labs" / LAB / "tokenization.ipynb", 4), written)
    path = course.submission(student, LAB)
    path.parent.mkdir(parents=True)
    nbformat.write(notebook, path)
    if judged:
        record = Record(record_path(course.root / "grading", LAB, student), digest_of(steps_of(notebook, lab)))
        for exercise in lab.exercises:
            state = "correct" if exercise.name in written else "not attempted"
            record.keep({"exercise": exercise.name, "lab": LAB, "state": state, "variant": {}, "score": 0.0})


def test_quiz_is_made_in_the_sandbox_and_graded(course, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(quiz, "MUTANTS", 7)
    monkeypatch.setattr(quiz, "CASES", 5)
    assert main(["defend", "ada", "--questions", "2"]) == 0
    folder = course.root / "grading" / "defences" / LAB / "ada" / "1"
    assert "quiz.html" in capsys.readouterr().out
    key = json.loads((folder / "key.json").read_text("utf-8"))
    page = (folder / "quiz.html").read_text("utf-8")
    assert len(key["questions"]) == 2 and page.count("<fieldset>") == 2 and page.count('type="radio"') == 8
    assert key["quiz"] in page and not any(question["why"] in page for question in key["questions"])
    for told in key["questions"]:
        options = [quiz.Option(**option) for option in told["options"]]
        assert_one_right(dataclasses.replace(Question(**{**told, "options": options})), LAB)
    letters = ["abcd"[question["right"]] for question in key["questions"]]
    wrong = "abcd"[(key["questions"][1]["right"] + 1) % 4]
    for second, right in ((letters[1], 2), (wrong, 1), (None, 1)):
        answers = {"1": letters[0].upper()} | ({"2": second} if second else {})
        (tmp_path / "answers.json").write_text(json.dumps({"quiz": key["quiz"], "answers": answers}))
        assert main(["defend", "ada", "--grade", str(tmp_path / "answers.json")]) == 0
        assert f"ada: {right} of 2 right." in capsys.readouterr().out
    assert json.loads((folder / "result.json").read_text("utf-8"))["right"] == 1


@pytest.mark.parametrize(("arguments", "words"), [
    (["adda"], "There is no student 'adda' in .*: did you mean ada"),
    (["../ada"], "There is no student"),
    (["ben"], "ben has no accepted exercise in 01_tokenization"),
    (["cem"], "01_tokenization of cem is not graded: run `effnlp grade 01 --students cem`"),
    (["ada", "--lab", "02"], "ada has no submission of 02_streaming_datasets"),
    (["ada", "--grade", "nowhere.json"], "There is no file nowhere.json"),
    (["ada", "--grade", "labs/01_tokenization/tokenization.ipynb"], "holds no answers"),
    (["ada", "--grade", "grading/nbgrader_config.py"], "is not JSON"),
    (["ada", "--grade", "other.json"], "answers the quiz '06-1-beef', which was not made for ada"),
])
def test_what_cannot_be_defended_is_one_sentence(course, arguments, words):
    (course.root / "other.json").write_text('{"quiz": "06-1-beef", "answers": {}}')
    with pytest.raises(UsageError, match=words) as refusal:
        main(["defend", *arguments])
    assert "\n" not in str(refusal.value)


def test_a_submission_that_changed_since_is_refused(course):
    path = course.submission("ada", LAB)
    path.write_text(path.read_text("utf-8").replace("def count_pairs(", "def  count_pairs("))
    with pytest.raises(UsageError, match="has changed since it was graded"):
        main(["defend", "ada"])
