"""Mutants are what a hand-made table says, the check judges them, and the list of equivalents keeps its rules."""

import ast
import bisect
import ctypes
import inspect
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import types
from dataclasses import replace

import psutil
import pytest
import toy

from effnlp_lab import exercises, mutate
from effnlp_lab.errors import EffnlpError, UsageError
from effnlp_lab.exercises.reference import Case
from effnlp_lab.master import Cell, solution_source
from effnlp_lab.mutation.forks import in_children
from effnlp_lab.mutation.listing import read_listing
from effnlp_lab.mutation.make import Mutant, make, mutants_of
from effnlp_lab.mutation.trial import FIRST_SEED, Trial

# One line and, by hand, every mutant that it has.
LINES = {
    "y = a + b": ["y = a - b", "y = a", "y = b"],
    "y = a - b": ["y = a + b", "y = a"],
    "y = x * s": ["y = x / s", "y = x", "y = s"],
    "y = x / s": ["y = x * s", "y = x"],
    "y = x // n": ["y = x / n", "y = x"],
    "y = x % n": ["y = x // n", "y = x"],
    "y = x ** n": ["y = x * n", "y = x"],
    "y = x << n": ["y = x >> n"],
    "y = m & k": ["y = m | k", "y = m", "y = k"],
    "y = a @ b": [],
    "y = 2 * x": ["y = 2 / x", "y = x", "y = 3 * x", "y = 0 * x"],
    "y = (a + b) * s": ["y = (a + b) / s", "y = (a + b)", "y = s", "y = (a - b) * s", "y = (a) * s", "y = (b) * s"],
    "y = '%d' % n": ["y = '' % n"],
    "y = a < b": ["y = a <= b", "y = a >= b"],
    "y = a >= b": ["y = a > b", "y = a < b"],
    "y = a == b": ["y = a != b"],
    "y = a is b": ["y = a is not b"],
    "y = a not in b": ["y = a in b"],
    "y = 0 <= a < b": ["y = 0 < a < b", "y = 0 > a < b", "y = 0 <= a <= b", "y = 0 <= a >= b", "y = 1 <= a < b",
                       "y = -1 <= a < b"],
    "y = a and b": ["y = a or b", "y = a", "y = b"],
    "y = a or b or c": ["y = a and b and c", "y = b or c", "y = a or c", "y = a or b"],
    "y = not a": ["y = a"],
    "y = -a": ["y = a"],
    "y = ~a": ["y = a"],
    "y = 3": ["y = 4", "y = 2", "y = 0"],
    "y = 1": ["y = 2", "y = 0"],
    "y = 0": ["y = 1", "y = -1"],
    "y = -1": ["y = 1", "y = 0", "y = -2"],
    "y = 0.5": ["y = 1.0", "y = 0.0"],
    "y = 1e-6": ["y = 1e-05", "y = 0.0"],
    "y = 1e9": ["y = 0.0"],
    "y = 0.0": ["y = 1.0"],
    "y = True": ["y = False"],
    "y = None": [],
    "y = 'a'": ["y = ''"],
    "y = b''": ["y = b'X'"],
    "y = f'{a + 1}'": [],
    "y = float('-inf')": ["y = 0.0"],
    "y = -float('inf')": ["y = float('inf')", "y = -0.0"],
    "y = math.inf": ["y = 0.0"],
    "y = torch.float32": ["y = torch.float16", "y = torch.float64"],
    "y = tl.float16": ["y = tl.float32"],
    "y = range(n)": ["y = range(n + 1)", "y = range(n - 1)", "y = range(1, n)"],
    "y = range(a, n + 1)": ["y = range(a + 1, n + 1)", "y = range(a - 1, n + 1)", "y = range(a, n + 2)",
                            "y = range(a, n)", "y = range(n + 1, a)", "y = range(a, n - 1)"],
    "y = tl.arange(0, B)": ["y = tl.arange(B, 0)", "y = tl.arange(1, B)", "y = tl.arange(-1, B)"],
    "y = x[a:b]": ["y = x[a + 1:b]", "y = x[a - 1:b]", "y = x[a:b + 1]", "y = x[a:b - 1]"],
    "y = x[1:]": ["y = x[1:-1]", "y = x[2:]", "y = x[0:]"],
    "y = x[:n]": ["y = x[:n + 1]", "y = x[:n - 1]", "y = x[1:n]"],
    "y = x[::2]": ["y = x[1::2]", "y = x[::3]", "y = x[::1]", "y = x[::0]"],
    "y = x[::-1]": ["y = x[::1]", "y = x[::0]", "y = x[::-2]"],
    "y = x[i]": ["y = x[i + 1]", "y = x[i - 1]"],
    "y = x[i + 1]": ["y = x[i + 2]", "y = x[i]", "y = x[i - 1]"],
    "y = x[0, j]": ["y = x[0, j + 1]", "y = x[0, j - 1]", "y = x[1, j]", "y = x[-1, j]"],
    "y = x[:, None]": [],
    "y = x[a & b]": ["y = x[a | b]", "y = x[a]", "y = x[b]"],
    "y = kernel[grid](x)": [],
    "y = max(a, b)": ["y = min(a, b)"],
    "y = x.amin(d)": ["y = x.amax(d)"],
    "y = all(a)": ["y = any(a)"],
    "y = tl.exp2(a)": ["y = tl.exp(a)"],
    "y = f(a, b)": ["y = f(b, a)"],
    "y = f(a, b, c)": ["y = f(b, a, c)", "y = f(a, c, b)"],
    "y = f(a, a)": [],
    "y = f(*a, b)": [],
    "y = torch.maximum(a, b)": ["y = torch.minimum(a, b)"],
    "y = torch.mul(a, b)": [],
    "y = x.transpose(a, b)": [],
    "y = f(a, k=b)": ["y = f(a)"],
    "y = zip(a, b, strict=True)": ["y = zip(b, a, strict=True)"],
    "y = torch.empty(n, device=d)": [],
    "y = run(x, num_warps=4)": [],
    "y = x.float()": ["y = x"],
    "y = x.to(z.device)": [],
    "y = x.to(z)": ["y = x"],
    "y = a if c else b": ["y = a if True else b", "y = a if False else b"],
    "y = [a for a in b if c]": ["y = [a for a in b if True]", "y = [a for a in b if False]"],
    "y = einsum('bqd,bkd->bqk', q, k)": ["y = einsum('', q, k)", "y = einsum('bqd,bkd->bkq', q, k)",
                                         "y = einsum(q, 'bqd,bkd->bqk', k)", "y = einsum('bqd,bkd->bqk', k, q)"],
    "y = rearrange(x, 'b (h d) -> b h d')": ["y = rearrange('b (h d) -> b h d', x)", "y = rearrange(x, '')",
                                             "y = rearrange(x, 'b (h d) -> b d h')"],
    "x += y": ["x -= y", "x = y", "pass"],
    "x |= y": ["x &= y", "x = y", "pass"],
    "x[i] = y": ["pass", "x[i + 1] = y", "x[i - 1] = y"],
    "y: int = n": [],
    "y: 'list[int, 2]' = n": [],
    "print(a + 1)": [],
    "f(a)": ["pass"],
    "'a text'": [],
    "assert a < 3, 4": [],
    "raise ValueError(f'{a} is', 3)": ["pass"],
    "del x[i]": ["pass", "del x[i + 1]", "del x[i - 1]"],
    "del x": [],
}  # fmt: skip

# Functions, and the mutants of some operators only: operator -> the changed lines, stripped.
FUNCTIONS = [
    (
        """
        def f(x, n):
            x = g(x)
            y = h(x)
            y = k(y)
            z, x = y, x
            for i in n:
                i = x
            w = [v for v in x]
            v = x
            return v
        """,
        "drop-assign",
        ["pass"] * 3,  # x (a parameter), y the second time, i (the loop's): z, w and v would be undefined
    ),
    ("def f(x):\n    if x:\n        g()\n        return 1\n    return 2\n", "drop-return", ["pass"]),
    ("def f(x):\n    if x: g(); return 1\n    return 2\n", "drop-return", ["if x: g(); pass"]),
    ("def f(a, b):\n    return a, b, b\n", "return-swap", ["return (b, a, b)"]),
    ("def f(a):\n    while a:\n        if a: break\n", "break-continue", ["if a: continue"]),
    ("def f(a):\n    for b in a:\n        continue\n", "continue-break", ["break"]),
    ("def f(a):\n    while a:\n        g()\n", "test-false", ["while False:"]),
    ("def f(a):\n    while True:\n        g()\n", "test-false", []),
    ("def f(a):\n    if a:\n        g()\n    elif b:\n        h()\n", "test-true", ["if True:", "elif True:"]),
    ("def f(a):\n    if a:\n        g()\n", "drop-call", []),  # the same as `if False`
    ("def f(a, n=2):\n    return a\n", "const-plus", ["def f(a, n=3):"]),
    ("@g(2)\ndef f(a: 3) -> 4:\n    '''5'''\n", "const-plus", []),
]


def changed_line(source, mutant):
    """The line at which a mutant differs from its source."""
    return next(b.strip() for a, b in zip(source.splitlines(), mutant.source.splitlines(), strict=False) if a != b)


def tree(text):
    return ast.dump(ast.parse(text))


@pytest.mark.parametrize("line", LINES, ids=str)
def test_a_line_has_exactly_its_mutants(line):
    made = [tree(m.source) for m in make("e", line + "\n")]
    assert sorted(made) == sorted(map(tree, LINES[line]))


@pytest.mark.parametrize(("source", "operator", "expected"), FUNCTIONS)
def test_a_function_has_exactly_its_mutants_of_a_kind(source, operator, expected):
    source = textwrap.dedent(source).lstrip("\n")
    made = [m for m in make("e", source) if m.id.split(":")[2] == operator]
    assert [changed_line(source, m) for m in made] == expected


@pytest.mark.parametrize("module", [bisect, textwrap])
def test_mutants_of_real_code_are_python_differ_and_leave_the_rest_alone(module):
    for function in (f for _, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == module.__name__):
        source = textwrap.dedent(inspect.getsource(function))
        mutants = make("e", source)
        assert len({m.id for m in mutants}) == len(mutants)
        dumps = {tree(m.source) for m in mutants}
        assert len(dumps) == len(mutants) and tree(source) not in dumps
        for mutant in mutants:
            compile(mutant.source, "mutant", "exec")
            before, after = source.splitlines()[: mutant.line - 1], mutant.source.splitlines()
            assert after[: mutant.line - 1] == before, mutant.id


def test_comments_layout_and_wide_characters_stay():
    source = "def f(a,\n      b):  # two lines\n    é = 'ü'; ö = a +  b  # ß\n    return (ö,\n            é)\n"
    made = {m.id: m.source for m in make("e", source)}
    assert made["e:3:arith-add-sub:1"] == source.replace("a +  b", "a - b")
    assert made["e:4:return-swap:1"].endswith("# ß\n    return (é, ö)\n")


def test_changes_keep_their_meaning_where_text_alone_would_not():
    product = next(m for m in make("e", "y = (a + b) * s * t\n") if "scale-drop:3" in m.id)
    assert tree(product.source) == tree("y = (a + b) * t")
    assert tree("y = ~(a & b)") in {tree(m.source) for m in make("e", "y = ~(a | b)\n")}


def test_ids_are_the_exercise_the_line_in_the_solution_the_operator_and_a_number():
    cell = '''
def best(items, n):
    """Doc."""
    m = 7
    ### BEGIN SOLUTION
    # a comment
    if n < 0 < n:
        return items[0]
    ### END SOLUTION
    k = 8
    ### BEGIN SOLUTION
    return k + m
    ### END SOLUTION
'''
    made = mutants_of(Cell("exercise", cell, "best"))
    assert [m.id for m in made] == [
        "best:2:test-true:1",
        "best:2:test-false:1",
        "best:2:compare-lt-le:1",
        "best:2:compare-lt-ge:1",
        "best:2:compare-lt-le:2",
        "best:2:compare-lt-ge:2",
        "best:2:const-plus:1",
        "best:2:const-minus:1",
        "best:3:const-plus:1",
        "best:3:const-minus:1",
        "best:4:arith-add-sub:1",
        "best:4:term-drop:1",
        "best:4:term-drop:2",
    ]
    above = cell.replace("m = 7", "m = 7\n    # given\n    l = m").replace('"""Doc."""', '"""Doc.\n\n    More."""')
    assert [m.id for m in mutants_of(Cell("exercise", above, "best"))] == [m.id for m in made]
    assert all("SOLUTION" not in m.source for m in made)
    solution = solution_source(Cell("exercise", cell, "best"))
    assert [solution.splitlines()[m.line - 1].strip() for m in made[-3:]] == ["return k + m"] * 3


# The toy lab, with a master on disk.

GIVEN = toy.GIVEN
SOFTMAX = """
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)
"""
COUNT = """
    found = {}
    position = 0
    while position < len(items):
        found[items[position]] = found.get(items[position], 0) + 1
        position += 1
    return found
"""
MASTER = """# %%
{given}
# %% exercise="softmax"
def softmax(x):
    ### BEGIN SOLUTION{softmax}    ### END SOLUTION

# %% check="softmax"
check("softmax", softmax)

# %% exercise="count"
def count(items):
    ### BEGIN SOLUTION{count}    ### END SOLUTION

# %% check="count"
check("count", count)
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    toy.install(monkeypatch)
    write(tmp_path)
    return tmp_path


def write(root, softmax=SOFTMAX, count=COUNT, given=GIVEN):
    folder = root / "solutions" / "99_toy"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "toy.py").write_text(MASTER.format(given=given, softmax=softmax, count=count))


def run(root, exercise=None, sample=None, jobs=2):
    """Exit code and the JSON of a run."""
    path = root / "out.json"
    code = mutate.main("99_toy", exercise, sample, jobs, root=root, json_path=path)
    return code, json.loads(path.read_text())


def list_equivalents(root, *entries):
    path = root / "tests" / "mutants" / "99_toy.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("[[equivalent]]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in e.items())
                            for e in entries))  # fmt: skip


WEAK = ["softmax:1:minus-drop:1", "softmax:2:minus-drop:1"]  # the toy has no input of three axes: -1 is 1


def test_what_no_case_tells_apart_is_reported(root, capsys):
    code, found = run(root)
    softmax, count = found["exercises"]
    assert code == 1 and not found["ok"]
    assert [s["id"] for s in softmax["survivors"]] == WEAK and count["survivors"] == []
    assert softmax["tried"] == softmax["made"] == softmax["rejected"] + 2
    assert count["rejected"] == count["made"] > 20  # endless loops among them
    printed = capsys.readouterr().out
    assert "survived  softmax:1:minus-drop:1" in printed and "x.amax(1, keepdim=True)" in printed
    assert "-1  ->  1" in printed and "at least 97% have to be" in printed


def test_a_case_that_tells_them_apart_rejects_them(root, monkeypatch):
    class Stronger(toy.Softmax):
        def cases(self, rng, variant):
            yield from super().cases(rng, variant)
            yield Case("three axes", {"x": rng.randn(2, 3, 4)}, part="values")

    monkeypatch.setitem(exercises.reference_module("99_toy").REFERENCES, "softmax", Stronger())
    code, found = run(root, "softmax")
    assert code == 0 and found["ok"] and found["exercises"][0]["survivors"] == []


def test_a_survivor_of_one_seed_is_tried_on_others(root, monkeypatch):
    class Seldom(toy.Count):
        def cases(self, rng, variant):
            lucky = rng.int(0, 3)
            yield Case("a list", {"items": [1, 2, 1] if lucky == 0 else []})

    monkeypatch.setitem(exercises.reference_module("99_toy").REFERENCES, "count", Seldom())
    monkeypatch.setattr("effnlp_lab.mutation.trial.MORE_SEEDS", ())
    assert run(root, "count")[0] == 1
    monkeypatch.undo()
    toy.install(monkeypatch)
    monkeypatch.setitem(exercises.reference_module("99_toy").REFERENCES, "count", Seldom())
    monkeypatch.setattr("effnlp_lab.mutation.trial.MORE_SEEDS", range(12))
    assert run(root, "count")[0] == 0


def test_other_variants_are_tried_where_the_solution_solves_them(root, monkeypatch):
    class Told(toy.Count):
        def cases(self, rng, variant):
            yield Case("told", {"items": [0, 1, 1] + ([9] if variant["zero"] == "dropped" else [])})

        def expected(self, inputs, variant):
            kept = [i for i in inputs["items"] if i or 9 not in inputs["items"]]
            return {i: kept.count(i) for i in kept}

    write(root, count="\n    return {i: items.count(i) for i in items if i != 0 or 9 not in items}\n")
    monkeypatch.setitem(exercises.reference_module("99_toy").REFERENCES, "count", Told())
    survivors = {s["change"] for s in run(root, "count")[1]["exercises"][0]["survivors"]}
    assert "9  ->  10" not in survivors  # tells the variants apart: the public one alone would pass it


def test_budgets_count(root):
    write(
        root, softmax=SOFTMAX.replace("    return", "    if False:\n        x = x.expand(16, *x.shape) + 0\n    return")
    )
    found = run(root, "softmax")[1]["exercises"][0]
    assert "softmax:2:const-flip:1" not in [s["id"] for s in found["survivors"]]
    cell = "def softmax(x):\n    e = x.expand(16, *x.shape) + 0\n" + SOFTMAX.lstrip("\n")
    trial = Trial("99_toy", toy.SOFTMAX, toy.RIGHT, 1, root)
    [(_, outcome)] = trial.run([Mutant("softmax:1:hand:1", 1, "", "", cell)])
    assert outcome.rejected and "bytes at its peak" in outcome.why


def test_a_sample_is_the_same_at_every_run():
    mutants = make("e", "y = a + b * c - d\nz = x[i] + 3\n")
    first = mutate.sampled(mutants, 5, "e")
    assert first == mutate.sampled(mutants, 5, "e") and len(first) == 5
    assert [m for m in mutants if m in first] == first
    assert first != mutate.sampled(mutants, 5, "another")
    assert mutate.sampled(mutants, 1000, "e") == mutate.sampled(mutants, None, "e") == mutants


def test_a_sample_is_what_is_tried(root):
    code, found = run(root, "count", sample=4)
    assert code == 0 and found["exercises"][0]["tried"] == found["exercises"][0]["rejected"] == 4


def test_equivalents_with_a_reason_are_not_asked_for(root, monkeypatch, capsys):
    monkeypatch.setattr(mutate, "EQUIVALENT_SHARE", 0.2)
    list_equivalents(root, *({"id": i, "reason": "two axes", "change": "-1  ->  1"} for i in WEAK))
    code, found = run(root, "softmax")
    assert code == 0 and found["ok"] and found["exercises"][0]["equivalent"] == 2
    assert found["exercises"][0]["tried"] == found["exercises"][0]["rejected"] + 2
    assert run(root, "count", sample=2)[0] == 0  # entries of other exercises are no fault
    monkeypatch.setattr(mutate, "EQUIVALENT_SHARE", 0.1)
    capsys.readouterr()
    assert run(root, "softmax", sample=2)[0] == 1
    assert "2 of 16 mutants are listed as equivalent, and at most 10% may be." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"id": "softmax:1:minus-drop:7"}, "there is no such mutant"),
        ({"id": "sofmax:1:minus-drop:1"}, "there is no such mutant"),
        ({"id": WEAK[0], "change": "-1  ->  2"}, "is listed as the change '-1  ->  2', and is now '-1  ->  1'"),
        ({"id": "softmax:2:const-plus:1"}, "is listed as equivalent, and the check rejects it (some rows): "),
    ],
)
def test_entries_that_do_not_fit_are_faults(root, capsys, monkeypatch, entry, sentence):
    monkeypatch.setattr(mutate, "REJECTED_SHARE", 0.0)
    list_equivalents(root, {**entry, "reason": "none"})
    assert run(root, "softmax")[0] == 1
    assert sentence in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[[equivalent]\n", "is not TOML"),
        ("[[equal]]\nid = 'a'\n", "has 'equal'"),
        ("[[equivalent]]\nid = 'a'\n", "needs an id and a reason"),
        ("[[equivalent]]\nid = 'a'\nreason = ' '\n", "needs an id and a reason"),
        ("[[equivalent]]\nid = 'a'\nreason = 'b'\nwhy = 'c'\n", "needs an id and a reason"),
        ("[[equivalent]]\nid = 'a'\nreason = 'b'\n" * 2, "lists a twice"),
    ],
)
def test_a_list_that_cannot_be_read_is_refused(tmp_path, text, sentence):
    path = tmp_path / "list.toml"
    assert read_listing(path) == {}
    path.write_text(text)
    with pytest.raises(UsageError, match=sentence):
        read_listing(path)


def test_what_cannot_be_measured_is_said(root, monkeypatch):
    with pytest.raises(UsageError, match="no exercise 'sofmax'"):
        run(root, "sofmax")
    write(root, softmax=SOFTMAX.replace("-1", "0"))
    with pytest.raises(EffnlpError, match="rejects the solution of softmax itself.*off by"):
        run(root, "softmax")
    write(root, given="import torch\n")
    with pytest.raises(EffnlpError, match="effnlp build 99_toy"):
        run(root)


def test_beside_a_gpu_it_runs_in_a_process_without_one(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(mutate, "resolve", lambda: types.SimpleNamespace(kind="cuda"))
    name = exercises.lab_names()[0]
    assert mutate.main(name, None, 3, 2, root=tmp_path, json_path=tmp_path / "out.json") == 2
    assert "there is no such master" in capfd.readouterr().err


def test_a_check_that_raises_is_a_fault(root, monkeypatch, capsys):
    class Brittle(toy.Count):
        def verify(self, inputs, outputs, expected, variant):
            outputs[inputs["items"][0]]  # a KeyError, for some answers
            return super().verify(inputs, outputs, expected, variant)

    monkeypatch.setitem(exercises.reference_module("99_toy").REFERENCES, "count", Brittle())
    assert run(root, "count")[0] == 1
    assert "The check itself raised KeyError" in capsys.readouterr().out


@pytest.mark.parametrize("times_out_in", ["the first round", "a later round"])
def test_a_listed_mutant_that_is_only_slow_gets_more_time(root, monkeypatch, times_out_in):
    """In whichever round: on a busy machine the solution itself may be slow in one, which is then generous."""
    prepare = Trial.prepare

    def draw(self, seed, variant):
        drawn = prepare(self, seed, variant)
        generous = times_out_in == "a later round" and seed == FIRST_SEED
        return replace(drawn, limits=[4.0 if generous else 0.5] * len(drawn.limits))

    monkeypatch.setattr(Trial, "prepare", draw)
    busy = "    end = time.process_time() + 1.0\n    while time.process_time() < end:\n        pass\n"
    slow = f"import time\ndef count(items):\n{busy}    return {{i: items.count(i) for i in items}}\n"
    monkey = Mutant("count:1:hand:1", 1, "", "", slow)
    patient = type(toy.COUNT)(**{**vars(toy.COUNT), "seconds": 5.0})
    trial = Trial("99_toy", patient, COUNT_SOURCE, 1, root)
    assert next(trial.run([monkey]))[1].timed_out
    assert not next(trial.run([monkey], frozenset([monkey.id])))[1].rejected


def test_what_a_solution_imports_is_imported_once(root, monkeypatch):
    (root / "slow_to_import.py").write_text("import time\ntime.sleep(0.6)\n")
    monkeypatch.syspath_prepend(root)
    source = COUNT_SOURCE.replace("found = {}", "found = {}; import slow_to_import")
    drawn = Trial("99_toy", toy.COUNT, source, 1, root).prepare(1, toy.COUNT.public_variant())
    assert sys.modules.pop("slow_to_import") and drawn.seconds < 0.6


def test_a_change_shows_what_differs_of_long_texts():
    load = "tl.load(pointer + rows[:, None] * stride + columns, mask=(rows[:, None] < m) & (columns < n), other=0.0)"
    made = {m.id: m.change for m in make("e", f"y = {load}\n")}
    assert made["e:1:keyword-drop:2"] == "...ne] < m) & (columns < n), other=0.0)  ->  ...ne] < m) & (columns < n))"
    assert made["e:1:compare-lt-le:2"] == "columns < n  ->  columns <= n"


COUNT_SOURCE = f"def count(items):{COUNT}"


# Children.


def one(work, folder, seconds=20.0):
    [(index, result)] = in_children([work], 1, seconds, folder)
    assert index == 0
    return result


def test_a_child_answers_breaks_or_dies_alone(tmp_path):
    def raises():
        raise SystemExit("no more")

    assert one(lambda: {"where": os.getcwd()}, tmp_path) == {"where": str(tmp_path)}
    assert one(raises, tmp_path) == {"broke": "SystemExit: no more"}
    assert one(lambda: os._exit(7), tmp_path) == {"died": 7}
    assert one(lambda: ctypes.string_at(0), tmp_path) == {"died": -signal.SIGSEGV}
    assert one(lambda: len("x" * (1 << 40)), tmp_path) == {"broke": "MemoryError: "}


def test_a_child_that_hangs_is_ended_with_what_it_started(tmp_path):
    def hangs():
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
        other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (tmp_path / "pid").write_text(str(other.pid))
        time.sleep(600)

    began = time.monotonic()
    works = [hangs, *(lambda n=n: n for n in range(5))]
    results = dict(in_children(works, 2, 2.0, tmp_path))
    assert results == {0: {"hung": 2.0}, 1: 0, 2: 1, 3: 2, 4: 3, 5: 4}
    assert time.monotonic() - began < 20
    process = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE


def test_children_are_ended_when_nobody_waits_for_them(tmp_path):
    def sleeps():
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(600)

    results = in_children([lambda: 1, sleeps], 2, 60.0, tmp_path)
    assert next(results) == (0, 1)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.01)
    results.close()
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))
