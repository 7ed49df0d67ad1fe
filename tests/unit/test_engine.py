"""Every way in which an answer can be wrong has its own sentence, and the notebook goes on."""

import dataclasses
import math
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import toy

from effnlp_lab.exercises.reference import Case
from effnlp_lab.exercises.spec import Written
from effnlp_lab.notebook import report, setting
from effnlp_lab.notebook.check import check, verdict_of
from effnlp_lab.notebook.driver import answer_case
from effnlp_lab.notebook.judge import _judge_response, answer_from_source, judge
from effnlp_lab.notebook.limits import TimedOut, time_limit


@pytest.fixture(autouse=True)
def toy_lab(monkeypatch):
    toy.install(monkeypatch)
    monkeypatch.delenv("EFFNLP_STUDENT", raising=False)


def verdict(body, exercise="softmax", seed=1):
    source = body if body.lstrip().startswith(("def ", "class ", "@")) else f"def softmax(x):\n    {body}\n"
    return verdict_of(exercise, answer_from_source("99_toy", exercise, source), seed=seed)


def test_a_right_answer_earns_everything():
    v = verdict(toy.RIGHT)
    assert (v.state, v.score, v.mistakes) == ("correct", 4.0, [])
    assert type(v.score) is float
    assert [c.state for c in v.cases][-1] == "not run here"


@pytest.mark.parametrize(
    ("body", "state", "words"),
    [
        ("raise NotImplementedError()", "not attempted", "blank is still there"),
        ("return None", "incorrect", "is None"),
        ("pass", "incorrect", "is a return missing"),
        ("return x.sum(-1)", "incorrect", "has shape"),
        ("return x.tolist()", "incorrect", "is a list"),
        ("return x.double().exp() / x.double().exp().sum(-1, keepdim=True)", "incorrect", "dtype float64"),
        ("return x * float('nan')", "incorrect", "NaN"),
        ("return x / 0 + 1 / (x * 0)", "incorrect", "infinite|NaN"),
        ("return x.numpy()", "incorrect", "numpy.ndarray"),
        ("return (i for i in x)", "incorrect", "generator"),
        ("return x", "incorrect", "off by"),
        (
            "x -= x.amax(-1, keepdim=True); e = x.exp(); return e / e.sum(-1, keepdim=True)",
            "incorrect",
            "changes its input `x`",
        ),
        ("while True: pass", "timed out", "had not finished"),
        ("time.sleep(60)", "timed out", "had not finished"),
        ("return x + undefined", "crashed", "NameError"),
        ("sys.exit(0)", "crashed", "SystemExit"),
        ("raise KeyError('no')", "crashed", "KeyError"),
        ("return softmax(x)", "crashed", "RecursionError"),
        ("return torch.softmax(x, -1)", "incorrect", "would answer for you"),
        ("return x.softmax(-1)", "incorrect", "would answer for you"),
        ("return torch.ops.aten._softmax(x, -1, False)", "incorrect", "would answer for you"),
        ("return getattr(torch, 'soft' + 'max')(x, -1)", "incorrect", "would answer for you"),
        ("import scipy; return x", "incorrect", "would answer for you"),
        ("from torch.nn import functional as F; return F.softmax(x, -1)", "incorrect", "would answer for you"),
    ],
)
def test_each_failing_has_its_sentence(body, state, words):
    import re

    v = verdict(body)
    assert v.state == state
    assert re.search(words, v.sentence), v.sentence
    assert v.score < 4.0 and math.isfinite(v.score)


def test_a_loop_that_swallows_exceptions_is_stopped():
    v = verdict(
        "def softmax(x):\n    while True:\n        try:\n            x.exp()\n"
        "        except Exception:\n            pass\n"
    )
    assert v.state == "timed out"


def test_a_name_of_ones_own_hides_a_forbidden_module():
    """`scipy` is the notebook's import here, and a parameter of the answer's, which a comprehension uses as well."""
    import scipy

    body = """
def softmax(x):
    def shifted(scipy):
        return [x - scipy for _ in range(1)][0]
    e = shifted(x.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)
"""
    for source, state in ((body, "correct"), (body.replace("def shifted(scipy)", "def shifted(other)"), "incorrect")):
        answer = answer_from_source("99_toy", "softmax", source)
        answer.__globals__["scipy"] = scipy
        v = verdict_of("softmax", answer, seed=1)
        assert v.state == state, v.sentence
    assert "would answer for you" in v.sentence


def test_prints_and_warnings_are_kept_out_and_told(capfd):
    v = verdict("""
def softmax(x):
    print("y" * 1_000_000)
    warnings.warn("careful")
    os.write(2, b"from below")
    sys.stderr.write("oh")
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)
""")
    assert v.state == "correct"
    told = " ".join(v.notes)
    assert "1,000,001 characters" in told
    assert "careful" in told and "from below" in told and "stderr" in told
    seen = capfd.readouterr()
    assert seen.out == "" and seen.err == ""


def test_partial_credit_by_parts():
    v = verdict(toy.MISTAKES["no maximum"])
    assert (v.state, v.score) == ("incorrect", 3.0)
    assert v.mistakes == ["e^x overflows unless the maximum is taken off first."]


def test_the_mistake_is_named():
    v = verdict(toy.MISTAKES["wrong axis"])
    assert v.mistakes == ["Softmax runs over the last axis."]
    assert "Softmax runs over the last axis." in report.text(v)
    assert "Softmax runs over the last axis." in report.markup(v)


def test_an_unknown_slip_is_not_given_a_known_name():
    assert verdict("return x.cos()").mistakes == []


def test_right_but_over_budget():
    v = verdict("""
def softmax(x):
    waste = [x.exp() for _ in range(20)]
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)
""")
    assert v.state == "over budget"
    assert "bytes at its peak" in v.sentence
    assert v.score == 3.0


def test_a_view_of_the_input_is_told():
    v = verdict_of("count", answer_from_source("99_toy", "count", "def count(items):\n    return items\n"), seed=1)
    assert v.state == "incorrect"
    assert any("shares memory with its input `items`" in n for n in v.notes)


COUNT = "def count(items):\n    return {i: items.count(i) for i in items}\n"


def test_who_was_given_no_tensor_may_return_one_from_anywhere():
    response = {"status": "ok", "observed": {"devices": ["cpu"]}, "outputs": {"a": 2}}
    case = Case("two", {"items": ["a", "a"]})
    state = _judge_response(toy.COUNT, toy.Count(), case, dict(case.inputs), response, {"zero": "kept"},
                            "cuda", 1.0, False)  # fmt: skip
    assert state[0] == "correct"
    case = Case("one", {"x": torch.ones(1, 1)})
    response["outputs"] = torch.ones(1, 1)
    state = _judge_response(toy.SOFTMAX, toy.Softmax(), case, dict(case.inputs), response, {}, "cuda", 1.0,
                            False)  # fmt: skip
    assert state[0] == "incorrect" and "make new tensors with device=x.device" in state[1]


def test_a_variant_refuses_the_public_answer_and_says_why(monkeypatch):
    spec = toy.COUNT
    student = next(s for s in (f"s{i}" for i in range(50)) if spec.variant_of(s)["zero"] == "dropped")
    monkeypatch.setenv("EFFNLP_STUDENT", student)
    v = verdict(COUNT, "count")
    assert v.state == "incorrect"
    assert v.mistakes == [
        "This is the answer to the variant that is published (zero = kept), and yours is another. Your zero: dropped."
    ]
    assert verdict("def count(items):\n    return {i: items.count(i) for i in items if i}\n", "count").score == 1.0
    monkeypatch.delenv("EFFNLP_STUDENT")
    assert verdict(COUNT, "count").score == 1.0


def test_check_shows_and_returns_a_plain_float(capsys):
    score = check("softmax", answer_from_source("99_toy", "softmax", toy.RIGHT))
    assert type(score) is float and score == 4.0
    assert "softmax: correct, 4 of 4 points" in capsys.readouterr().out


def test_each_check_tells_the_points_so_far(capsys, monkeypatch):
    """Every exercise counts as its last check found it, and a lab that is started again has none."""
    monkeypatch.setattr(setting, "current", setting.Setting())
    setting.start("99_toy", device="cpu")
    told = []
    for name, source in (("softmax", toy.MISTAKES["no maximum"]), ("count", COUNT), ("softmax", toy.RIGHT),
                         ("softmax", toy.MISTAKES["wrong axis"])):
        check(name, answer_from_source("99_toy", name, source))
        told.append(capsys.readouterr().out.splitlines()[-1])
    assert told == ["Lab 99: 3 of 5 points so far, 0 of 2 exercises whole.",
                    "Lab 99: 4 of 5 points so far, 1 of 2 exercises whole.",
                    "Lab 99: 5 of 5 points so far, 2 of 2 exercises whole.",
                    "Lab 99: 1 of 5 points so far, 1 of 2 exercises whole."]
    setting.start("99_toy", device="cpu")
    assert setting.standing(toy.LAB) == "Lab 99: 0 of 5 points so far, 0 of 2 exercises whole."


def test_points_so_far_are_those_of_the_checks(monkeypatch):
    """Badges and twins add nothing; what is graded later is said once the checks are whole."""
    lab = dataclasses.replace(
        toy.LAB, written=(Written("why"),),
        exercises=(*toy.LAB.exercises, dataclasses.replace(toy.COUNT, name="badge", points=0.0),
                   dataclasses.replace(toy.COUNT, name="count_torch", twin_of="count")))  # fmt: skip
    monkeypatch.setattr(setting.current, "scores", {"softmax": 4.0, "count": 1.0, "badge": 0.0, "count_torch": 1.0})
    assert setting.standing(lab) == ("Lab 99: 5 of 5 points so far, 2 of 2 exercises whole. What you write is graded "
                                     "after you hand in.")


def test_points_so_far_are_in_the_block_and_not_in_the_graders():
    v = verdict(toy.RIGHT)
    assert "<div>Lab 99: 4 &lt; 5</div>" in report.markup(v, "Lab 99: 4 < 5")
    assert "Lab" not in report.markup(v) and "Lab" not in report.text(v)


def test_what_is_no_function_is_refused():
    with pytest.raises(ValueError, match="needs your function"):
        check("softmax", torch.ones(2))


def test_a_response_that_cannot_be_read_is_a_verdict():
    for garbage in (b"", b"\x00" * 7, b"\xff" * 64, b"\x02" + b"\x00" * 7 + b"{}"):
        v = judge(toy.SOFTMAX, "99_toy", lambda request, g=garbage: g, seed=3)
        assert v.state == "crashed" and v.score == 0.0


def test_the_same_seed_gives_the_same_cases():
    answer = answer_from_source("99_toy", "softmax", "def softmax(x):\n    return x\n")
    first, second = (judge(toy.SOFTMAX, "99_toy", lambda r: answer_case(r, answer), seed=7) for _ in range(2))
    assert first.first_failure.details == second.first_failure.details
    assert first.sentence == second.sentence


def test_a_blank_that_only_some_cases_meet_leaves_the_others_their_points():
    blank = "    if x.abs().max() > 100:\n        raise NotImplementedError()\n"
    v = verdict(toy.RIGHT.replace("(x):\n", f"(x):\n{blank}"))
    assert (v.state, v.sentence) == ("incorrect", "A blank that this case needs is still there.")
    assert 0 < v.score < v.points and v.mistakes == []


@pytest.mark.parametrize("inside_a_thread", [False, True])
def test_a_process_without_a_core_is_given_time(inside_a_thread):
    """Waiting stands for a machine so busy that the answer hardly runs; work counts at once."""

    def run(body):
        try:
            with time_limit(0.5):
                body()
        except TimedOut:
            return "timed out"
        return "in time"

    def wait(seconds):
        for _ in range(round(100 * seconds)):
            time.sleep(0.01)

    def work():
        end = time.process_time() + 60
        while time.process_time() < end:
            pass

    def results():
        return [run(lambda: wait(0.9)), run(work), run(lambda: wait(9))]

    if not inside_a_thread:
        assert results() == ["in time", "timed out", "timed out"]
        return
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(results).result() == ["in time", "timed out", "timed out"]
