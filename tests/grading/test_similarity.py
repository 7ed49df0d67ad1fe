"""Similarity: planted copies rank above all that was written independently, and the page shows both sides."""

from __future__ import annotations

import ast
import itertools
import random
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import nbformat
import pytest
from effnlp_grading import sample_class
from effnlp_grading.cli import main
from effnlp_grading.course import Course
from effnlp_grading.similarity import Author, Likeness, answers_in, compare
from effnlp_grading.trees import fragments_of

from effnlp_lab import exercises
from effnlp_lab.audit import independent_answers
from effnlp_lab.errors import UsageError
from effnlp_lab.mutation.make import make

ROOT = Path(__file__).resolve().parents[2]
LABS = exercises.lab_names()
Answers = Mapping[str, str]


class Renamed(ast.NodeTransformer):
    """Every name that the code binds itself gets another."""

    def __init__(self, tree: ast.Module, keep: str) -> None:
        bound = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
        bound |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
        bound |= {n.name for n in tree.body if isinstance(n, ast.FunctionDef)} - {keep}
        self.names = {name: f"zz_{place}" for place, name in enumerate(sorted(bound))}

    def visit_Name(self, node):
        return ast.copy_location(ast.Name(self.names.get(node.id, node.id), node.ctx), node)

    def visit_arg(self, node):
        return ast.arg(self.names.get(node.arg, node.arg), None)

    def visit_FunctionDef(self, node):
        node.name = self.names.get(node.name, node.name)
        return self.generic_visit(node)


class Reordered(ast.NodeTransformer):
    """Neighbouring statements that need nothing of each other, functions and methods trade places; so do operands."""

    def generic_visit(self, node):
        super().generic_visit(node)
        for name in ("body", "orelse"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                for place in range(0, len(block) - 1):
                    if _independent(block[place], block[place + 1]):
                        block[place], block[place + 1] = block[place + 1], block[place]
        return node

    def visit_BinOp(self, node):
        self.generic_visit(node)
        if isinstance(node.op, (ast.Add, ast.Mult)):
            node.left, node.right = node.right, node.left
        return node


def _independent(one: ast.stmt, other: ast.stmt) -> bool:
    if isinstance(one, (ast.FunctionDef, ast.ClassDef)) and isinstance(other, (ast.FunctionDef, ast.ClassDef)):
        return not one.decorator_list + other.decorator_list
    if not (isinstance(one, ast.Assign) and isinstance(other, ast.Assign)):
        return False
    names = [{n.id for n in ast.walk(s) if isinstance(n, ast.Name)} for s in (one, other)]
    stored = [{n.id for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
              for s in (one, other)]
    return not (stored[0] & names[1] or stored[1] & names[0])


def renamed(name: str, source: str) -> str:
    tree = ast.parse(source)
    return ast.unparse(ast.fix_missing_locations(Renamed(tree, name).visit(tree)))


def reordered(name: str, source: str) -> str:
    return ast.unparse(ast.fix_missing_locations(Reordered().visit(ast.parse(source))))


def reformatted(name: str, source: str) -> str:
    lines = ast.unparse(ast.parse(source)).replace("    ", "  ").splitlines()
    return "\n".join(f"{line}  # step {n}" if line and n % 2 and not line.endswith('"') else line
                     for n, line in enumerate(lines))


def all_three(name: str, source: str) -> str:
    return reformatted(name, reordered(name, renamed(name, source)))


def slightly_changed(name: str, source: str) -> str:
    """Renamed, and one operation another: what people do who want to be on the safe side."""
    tree = ast.parse(source)
    places = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and type(n.value) is int]
    places += [n for n in ast.walk(tree) if isinstance(n, (ast.Attribute, ast.keyword))]
    for node in places[:1]:
        node.__dict__.update({"value": node.value + 1} if isinstance(node, ast.Constant) else {"attr": "x", "arg": "x"})
    return renamed(name, ast.unparse(tree))


CHANGES = (renamed, reordered, reformatted, all_three, slightly_changed)


def written(lab: str) -> dict[str, dict[str, str]]:
    """Name -> answers to a lab's exercises: the solution, and the independent answers, each a whole submission."""
    solved = ROOT / "solutions" / lab / f"{exercises.lab(lab).notebook}.ipynb"
    answers = independent_answers(lab)[0]
    return {"solution": answers_in(solved.read_bytes(), exercises.lab(lab)),
            **{f"answer {n}": {name: sources[n - 1] for name, sources in answers.items()} for n in (1, 2)}}


def blanks_of(lab: str) -> dict[str, str]:
    return {name: texts["blank"] for name, texts in exercises.sources(lab)["exercises"].items()}


def changed(answers: Answers, change: Callable[[str, str], str]) -> dict[str, str]:
    return {name: change(name, source) for name, source in answers.items()}


def planted(lab: str) -> tuple[list[Author], set[frozenset[str]], set[frozenset[str]]]:
    """A class, its pairs that are copies, and its pairs that are not."""
    own = written(lab)
    sources = list(own)
    groups = {name: name for name in own}
    everybody = dict(own)
    for number, change in enumerate(CHANGES):
        source = sources[(number + int(lab[:2])) % len(sources)]
        everybody[change.__name__] = changed(own[source], change)
        groups[change.__name__] = source
    half = dict(itertools.islice(own["answer 2"].items(), 3))  # three exercises of somebody else's
    everybody["half a copy"] = {**own["solution"], **changed(half, renamed)}
    authors = [Author(name, "class", answers) for name, answers in everybody.items()]
    pairs = [frozenset(pair) for pair in itertools.combinations(groups, 2)]
    copies = {pair for pair in pairs if len({groups[name] for name in pair}) == 1}
    return authors, copies | {frozenset(("half a copy", "answer 2"))}, set(pairs) - copies


def scores_of(pairs: list[Likeness]) -> dict[frozenset[str], float]:
    return {frozenset((pair.one.name, pair.other.name)): pair.score for pair in pairs}


def test_every_planted_copy_ranks_above_every_independent_pair():
    submissions, copied, independent = 0, [], []
    for lab in LABS:
        authors, copies, others = planted(lab)
        submissions += len(authors)
        scores = scores_of(compare(authors, blanks_of(lab), most=10_000))
        copied += [(scores[pair], lab, sorted(pair)) for pair in copies]
        independent += [(scores[pair], lab, sorted(pair)) for pair in others]
    assert submissions >= 40 and len(copied) >= 40 and len(independent) >= 40
    assert min(copied) > max(independent), (sorted(copied)[:5], sorted(independent)[-5:])
    assert min(score for score, _, pair in copied if not set(pair) & {"slightly_changed", "half a copy"}) > 0.8


def test_an_answer_adapted_to_another_variant_is_like_the_one_it_came_from():
    """The likeness of what differs by a rule that a student's name chose."""
    for lab, exercise in (("03_accumulation_checkpointing", "scaled_step"), ("04_lora_qlora", "LoRALinear"),
                          ("09_distillation", "divergence")):
        answers, variants = independent_answers(lab)
        adapted = renamed(exercise, next(iter(variants[exercise].values())))
        authors = [Author(str(n), "class", {exercise: source}) for n, source in enumerate(answers[exercise])]
        pairs = compare([*authors, Author("adapted", "class", {exercise: adapted})], blanks_of(lab))
        assert "adapted" in (pairs[0].one.name, pairs[0].other.name) and pairs[0].score > 2 * pairs[1].score


@pytest.mark.parametrize("change", CHANGES[:4])
def test_what_does_not_count_changes_no_fragment(change):
    source = '''
def train(words: list[list[int]], *, size: int = 3) -> list:
    """What it does."""
    a = len(words)
    b = {w[0]: 1 for w in words if w}
    while a + size > 2 and b:  # a comment
        a -= 1
        b.setdefault(a * size, []).append(-a)
    return sorted(b.items(), key=lambda pair: (pair[1], pair[0]))
'''
    assert fragments_of(change("train", source)).counts == fragments_of(source).counts
    other = source.replace("a -= 1", "a -= 2")
    assert fragments_of(other).counts != fragments_of(source).counts


def test_what_is_given_and_what_everybody_writes_weigh_nothing():
    given = "def f(x):\n    first = [len(i) + 3 for i in sorted(x, key=len) if i]\n    raise NotImplementedError()\n"
    body = "    return {i: first.count(i) * 2 for i in set(first)}\n"
    solved = given.replace("    raise NotImplementedError()\n", body)
    two = [Author("a", "class", {"f": solved}), Author("b", "class", {"f": solved})]
    assert compare([Author(n, "class", {"f": given}) for n in "ab"], {"f": given})[0].score == 0.0
    alone = compare(two, {"f": given})[0].score
    assert 0.1 < alone < compare(two, {})[0].score
    crowd = [Author(f"c{n}", "class", {"f": solved}) for n in range(20)]
    assert compare([*two, *crowd], {"f": given})[0].score < alone / 5


def test_code_that_is_not_python_is_like_nobodys():
    authors = [Author("a", "class", {"f": "def f(:"}), Author("b", "class", {"f": "def f(:"})]
    assert compare(authors, {})[0].score == 0.0


def test_two_hundred_students_within_half_a_minute():
    own, random_ = written("01_tokenization"), random.Random(0)
    mutants = {name: make(name, source) for name, source in own["solution"].items()}
    authors = [Author(f"s{number}", "class", {n: random_.choice(m).source for n, m in mutants.items()})
               for number in range(200)]
    begin = time.process_time()
    assert len(compare(authors, blanks_of("01_tokenization"), most=30_000)) == 200 * 199 // 2
    assert time.process_time() - begin < 30


@pytest.fixture
def course(tmp_path, master, monkeypatch) -> Course:
    """Two who solved alike, one blank, and one of last year, in a course that is not graded."""
    course = Course(tmp_path / "course")
    shutil.copytree(ROOT / "labs" / "01_tokenization", course.root / "labs" / "01_tokenization")
    (course.root / "grading").mkdir()
    shutil.copy(ROOT / "grading" / "nbgrader_config.py", course.root / "grading")
    own = written("01_tokenization")
    submit(course.submission("ada", "01_tokenization"), own["answer 1"])
    submit(course.submission("ben", "01_tokenization"), changed(own["answer 1"], all_three))
    submit(course.submission("cem", "01_tokenization"), own["answer 2"])
    submit(course.submission("dot", "01_tokenization"), {})
    submit(course.root / "2023" / "eve" / "01_tokenization" / "old.ipynb", changed(own["answer 2"], renamed))
    monkeypatch.chdir(course.root)
    return course


def submit(path: Path, answers: Answers) -> None:
    release = nbformat.read(ROOT / "labs" / "01_tokenization" / "tokenization.ipynb", as_version=4)
    notebook = sample_class.submission(release, answers)
    path.parent.mkdir(parents=True)
    nbformat.write(notebook, path)


def test_the_class_past_years_and_the_kit(course, capsys):
    assert main(["similarity", "01", "--past", "2023"]) == 0
    said = capsys.readouterr().out
    assert "never" not in said and "no verdict" in said
    page = (course.root / "grading" / "reports" / "01_tokenization" / "similarity.html").read_text("utf-8")
    first, second = page.index("ada and ben"), page.index("cem and 2023/eve")
    assert 0 < first < second or 0 < second < first
    assert "<mark>" in page and "A score is no verdict" in page
    assert page.index("ada and ben") < page.index("and the kit, ")


def test_the_public_solution_and_the_kits_own_rooms_are_known(course, capsys):
    shutil.copytree(ROOT / "solutions" / "01_tokenization", course.root / "solutions" / "01_tokenization")
    room = (ROOT / "effnlp_lab" / "tokenization" / "plain.py").read_text("utf-8")
    merge = next(ast.get_source_segment(room, n) for n in ast.parse(room).body if getattr(n, "name", "") == "merge")
    copied = changed(written("01_tokenization")["solution"], all_three) | {"merge_pair": merge.replace(
        "def merge(", "def merge_pair(")}
    submit(course.submission("fay", "01_tokenization"), copied)
    assert main(["similarity", "01"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "fay" in line]
    assert any("the public" in line for line in lines)
    page = (course.root / "grading" / "reports" / "01_tokenization" / "similarity.html").read_text("utf-8")
    assert "fay and the kit, tokenization/plain.py: merge" in page


@pytest.mark.parametrize(("arguments", "words"), [
    (["02"], "no submission of 02_streaming_datasets"),
    (["01", "--past", "nowhere"], "There is no folder nowhere"),
    (["01", "--past", "labs"], "holds no notebook with an answer to 01_tokenization"),
    (["1o"], "There is no lab '1o'"),
])
def test_what_cannot_be_compared_is_one_sentence(course, arguments, words):
    with pytest.raises(UsageError, match=words) as refusal:
        main(["similarity", *arguments])
    assert "\n" not in str(refusal.value)


def test_damaged_submissions_are_named_and_the_rest_goes_on(course, capsys):
    course.submission("ben", "01_tokenization").write_text("no notebook")
    path = course.submission("cem", "01_tokenization")
    path.write_text(path.read_text("utf-8").replace("def count_pairs(", "def count_pairs(("))
    assert main(["similarity", "01"]) == 0
    said = capsys.readouterr().out
    assert "ben: not compared: ben is not a notebook" in said and "cem: count_pairs is not Python" in said


def test_answers_are_found_without_metadata():
    lab = exercises.lab("01_tokenization")
    cells = [nbformat.v4.new_code_cell("def helper(x):\n    return x"),
             nbformat.v4.new_code_cell("import os\ndef count_pairs(words, counts):\n    return {}"),
             nbformat.v4.new_markdown_cell("def merge_pair")]
    data = nbformat.writes(nbformat.v4.new_notebook(cells=cells)).encode()
    assert set(answers_in(data, lab)) == {"count_pairs", "cells of one's own"}
