"""Hostile submissions get what they deserve and harm nothing, and each defence is what stops those that it is for.

A submission in hostile/ answers one exercise; most answer it rightly exactly when the attack worked (HARM). Every one
is graded with all defences, and once more without those that its header names: then it has its way.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import pytest
from effnlp_grading.connection import Connection
from effnlp_grading.limits import DEFENCES, Limits
from effnlp_grading.mutants import open_bench, refused_answers
from effnlp_grading.preprocessors import write_verdicts
from effnlp_grading.proctor import Graded, Proctor
from effnlp_grading.records import Seeds
from effnlp_grading.repair import repair
from effnlp_grading.sandbox import Sandbox, sandbox_error
from effnlp_grading.verdicts import ReadVerdicts
from nbgrader.utils import determine_grade

from effnlp_lab import exercises
from effnlp_lab.master import read_master, solution_source

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = {path.stem: path.read_text() for path in sorted(Path(__file__).with_name("hostile").glob("*.py"))}
LABS = {"count_pairs": "01_tokenization", "best_match": "00_start_here", "merge_partials": "06_flash_attention"}
ROOM = frozenset({"network", "files", "environment", "masks"})  # what bubblewrap's room holds
TIGHT = Limits(memory=256 << 20, scratch=16 << 20, reply=8 << 20, cell_seconds=10.0, case_seconds=0.5, grace=0.5)
PATIENT = Limits(memory=1 << 30, case_seconds=8.0)
SECRET = "a-secret-of-the-instructor"
TAIL = """

if "count_pairs" not in globals():
    def count_pairs(words, counts):
        return right(words, counts) if HARM else {}
"""
NEIGHBOUR = "merge_pair"

_closed = sandbox_error()
pytestmark = pytest.mark.skipif(_closed is not None, reason=f"NO SANDBOX HERE, and none of these was tried: {_closed}")


@dataclass
class Hall:
    """Sandboxes that are kept warm for all of these tests, and the instructor's machine as an attacker sees it."""

    course: Path
    port: int
    called: list[str] = field(default_factory=list)
    sandboxes: dict[tuple[str, frozenset[str]], Sandbox] = field(default_factory=dict)

    def sandbox(self, lab: str, without: frozenset[str] = frozenset()) -> Sandbox:
        """A sandbox with all defences but some. Those of a session are changed in place: the warm parent serves all."""
        key = (lab, without & ROOM)
        if key not in self.sandboxes:
            self.sandboxes[key] = Sandbox(lab, defences=DEFENCES - (ROOM if without & ROOM else set()))
        found = self.sandboxes[key]
        found.defences = (DEFENCES - ROOM if without & ROOM else DEFENCES) - without
        return found


@pytest.fixture(scope="module")
def hall() -> Iterator[Hall]:
    os.environ["EFFNLP_TEST_SECRET"] = SECRET
    course = Path(tempfile.mkdtemp(prefix="effnlp-hostile-", dir="/var/tmp"))  # /tmp is private in every sandbox
    _furnish(course)
    with socket.create_server(("127.0.0.1", 0)) as server:
        made = Hall(course, server.getsockname()[1])
        threading.Thread(target=_answer_calls, args=(server, made.called), daemon=True).start()
        try:
            yield made
        finally:
            del os.environ["EFFNLP_TEST_SECRET"]
            for sandbox in made.sandboxes.values():
                sandbox.close()
            shutil.rmtree(course)


def _answer_calls(server: socket.socket, called: list[str]) -> None:
    with contextlib.suppress(OSError):
        while True:
            server.accept()[0].close()
            called.append("")


def _furnish(course: Path) -> None:
    """Solutions, a gradebook, a submission and a home, open to everybody: what only the sandbox keeps apart."""
    files = {"solutions/answer.py": "### BEGIN SOLUTION", "home/.ssh/id": "a private key",
             "grading/submitted/somebody/answer.ipynb": "somebody's answer"}
    for name, text in files.items():
        (course / name).parent.mkdir(parents=True, exist_ok=True)
        (course / name).write_text(text)
    with sqlite3.connect(course / "grading" / "gradebook.db") as book:
        book.execute("create table grade (points real)")
        book.execute("insert into grade values (2.0)")
    for path in (course, *course.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)


def header(name: str, key: str, default: str = "") -> str:
    found = re.search(rf"^# {key}: (.*)$", HOSTILE[name], re.MULTILINE)
    return found.group(1) if found else default


def submission(hall: Hall, name: str) -> nbformat.NotebookNode:
    """The released notebook's first cells with the attack in its exercise and a right answer in the next one."""
    exercise = header(name, "exercise", "count_pairs")
    lab = exercises.lab(LABS[exercise])
    master = read_master(ROOT / "solutions" / lab.name / f"{lab.notebook}.py")
    source = HOSTILE[name].replace("@COURSE@", str(hall.course)).replace("@PORT@", str(hall.port))
    source = source.replace("@SOLUTION@", str(hall.course / "solutions" / "answer.py"))
    right = {e: solution_source(master.exercise_cell(e)) for e in (exercise, NEIGHBOUR) if e in
             {one.name for one in lab.exercises}}
    if exercise == "count_pairs":
        source = right[exercise].replace("def count_pairs", "def right") + "\n\n" + source + TAIL
    notebook = nbformat.read(ROOT / "labs" / lab.name / f"{lab.notebook}.ipynb", as_version=4)
    kept = []
    for cell in notebook.cells:
        grade_id = cell.metadata.get("nbgrader", {}).get("grade_id", "")
        if grade_id == exercise:
            cell.source = source
        elif grade_id in right:
            cell.source = right[grade_id]
        if cell.cell_type == "code" and (cell.metadata.get("nbgrader", {}).get("locked") and "test_" not in grade_id
                                         or grade_id.removeprefix("test_") in (exercise, NEIGHBOUR)):
            kept.append(cell)
    notebook.cells = kept
    return notebook


def grade(hall: Hall, name: str, without: frozenset[str] = frozenset(), limits: Limits = TIGHT,
          notebook: nbformat.NotebookNode | None = None) -> Graded:
    exercise = header(name, "exercise", "count_pairs")
    if exercise != "count_pairs" or header(name, "slow"):
        limits = PATIENT
    proctor = Proctor(hall.sandbox(LABS[exercise], without), Seeds(b"key"), limits)
    return proctor.grade(notebook or submission(hall, name), "student")


def points(graded: Graded, exercise: str = "count_pairs") -> float:
    return graded.verdicts[exercise]["score"]


DESERVED = {"best_match": 0.5}  # its values are right
SPECIAL = {"leaves_a_note", "ends_its_process", "ends_its_process_at_once", "crashes_in_native_code",
           "raises_what_stops_a_kernel", "writes_to_the_socket", "prints_a_score", "patches_check",
           "patches_comparisons", "kills_all_it_can", "sends_too_much", "shows_terabytes", "equals_everything"}
PLAIN = sorted(set(HOSTILE) - SPECIAL)


@pytest.mark.parametrize("name", PLAIN)
def test_gets_what_it_deserves(hall, name):
    """With all defences the attack earns nothing, and the exercise after it keeps its points."""
    exercise = header(name, "exercise", "count_pairs")
    graded = grade(hall, name)
    assert points(graded, exercise) <= DESERVED.get(exercise, 0.0), graded.verdicts[exercise]["sentence"]
    if exercise == "count_pairs" and "kit" not in header(name, "defence"):
        assert points(graded, NEIGHBOUR) == 1.5
    assert hall.called == [] or name != "opens_a_connection"


@pytest.mark.parametrize("name", PLAIN)
def test_only_its_defence_stops_it(hall, name):
    """Without the defences that its header names, and with all others, it earns full points."""
    exercise = header(name, "exercise", "count_pairs")
    defences = frozenset(header(name, "defence").split(", "))
    assert defences <= DEFENCES
    graded = grade(hall, name, without=defences)
    assert points(graded, exercise) == exercises.find(exercise)[1].points, graded.verdicts[exercise]["sentence"]


def test_right_answers_fit_at_real_size(hall):
    """Those, too, that hold one block at a time and keep a number of each."""
    with open_bench(LABS["best_match"], sandbox=hall.sandbox(LABS["best_match"])) as bench:
        assert refused_answers(bench, exercises.find("best_match")[1]) == []


def test_there_are_enough_of_them():
    assert len(HOSTILE) + 4 >= 25
    assert {name for name in HOSTILE if not header(name, "defence")} == set()


@pytest.mark.parametrize("name", ["ends_its_process", "ends_its_process_at_once", "crashes_in_native_code",
                                  "writes_to_the_socket"])
def test_a_dead_session_costs_its_exercise_alone(hall, name):
    graded = grade(hall, name)
    assert points(graded) == 0.0 and points(graded, NEIGHBOUR) == 1.5
    graded = grade(hall, name, without=frozenset({"restart"}))
    assert points(graded) == 0.0 and points(graded, NEIGHBOUR) == 0.0


def test_third_exercise_kills_the_session_and_all_others_keep_their_points(hall):
    lab = exercises.lab("01_tokenization")
    master = read_master(ROOT / "solutions" / lab.name / f"{lab.notebook}.py")
    notebook = nbformat.read(ROOT / "labs" / lab.name / f"{lab.notebook}.ipynb", as_version=4)
    for cell in notebook.cells:
        name = cell.metadata.get("nbgrader", {}).get("grade_id")
        if name in {e.name for e in lab.exercises}:
            cell.source = solution_source(master.exercise_cell(name))
            if name == lab.exercises[2].name:
                cell.source += f"\n\n\ndef {name}(*inputs):\n    import os\n    os._exit(1)"
    graded = Proctor(hall.sandbox(lab.name), Seeds(b"key")).grade(notebook, "student")
    lost = {name: v["score"] for name, v in graded.verdicts.items() if v["score"] != lab.exercise(name).points}
    assert lost == {lab.exercises[2].name: 0.0, **{n: s for n, s in lost.items() if n in ("train_bpe", "encode_bpe")}}
    assert graded.verdicts[lab.exercises[2].name]["state"] == "crashed"


def test_exceptions_that_stop_a_kernel_stop_nothing(hall):
    graded = grade(hall, "raises_what_stops_a_kernel")
    assert points(graded) == 0.0 and points(graded, NEIGHBOUR) == 1.5
    assert "KeyboardInterrupt" in graded.verdicts["count_pairs"]["sentence"]


def test_notes_reach_nobody(hall):
    for without, found in ((frozenset(), 0.0), (frozenset({"scratch"}), 1.0)):
        first, second = (grade(hall, "leaves_a_note", without=without) for _ in range(2))
        assert points(second) == found and points(first) == 0.0


def test_other_sessions_cannot_be_killed(hall):
    for without, alive in ((frozenset(), True), (frozenset({"spaces"}), False)):
        sandbox = hall.sandbox("01_tokenization", without)
        parent = sandbox.warm_parent
        neighbour = Connection(sandbox, TIGHT)
        grade(hall, "kills_all_it_can", without=without)
        assert neighbour.alive() is alive
        neighbour.end()
        assert not alive or parent in (None, sandbox.warm_parent), "the warm parent was killed"


def test_replies_are_limited(hall):
    sentence = grade(hall, "sends_too_much").verdicts["count_pairs"]["sentence"]
    assert "sent the grader a reply of" in sentence and "at most 8,388,608" in sentence
    sentence = grade(hall, "sends_too_much", without=frozenset({"frames"})).verdicts["count_pairs"]["sentence"]
    assert "sent the grader" not in sentence


def test_strides_of_zero_show_no_terabytes(hall):
    verdict = grade(hall, "shows_terabytes").verdicts["count_pairs"]
    assert verdict["score"] == 0.0 and "show more than" in verdict["sentence"]


def test_objects_that_equal_everything_equal_nothing(hall):
    verdict = grade(hall, "equals_everything").verdicts["count_pairs"]
    assert verdict["score"] == 0.0 and verdict["state"] == "incorrect"


def _forged(hall: Hall, name: str) -> nbformat.NotebookNode:
    notebook = submission(hall, name)
    for cell in notebook.cells:
        if cell.metadata.get("nbgrader", {}).get("grade"):
            cell.outputs = [nbformat.v4.new_output("execute_result", {"text/plain": "1.0"})]
    return notebook


def test_forged_outputs_are_replaced(hall):
    """nbgrader's own rule says what a cell is worth, of the cell as it came and of the cell as the grader leaves it."""
    worth = {}
    for defended in (True, False):
        notebook = _forged(hall, "prints_a_score")
        if defended:
            write_verdicts(notebook, grade(hall, "prints_a_score", notebook=notebook))
        notebook, _ = ReadVerdicts().preprocess(notebook, {})
        cell = next(c for c in notebook.cells if c.metadata.nbgrader.grade_id == "test_count_pairs")
        worth[defended] = determine_grade(cell)[0]
    assert worth == {True: 0.0, False: 1.0}


@pytest.mark.parametrize("name", ["patches_check", "patches_comparisons"])
def test_what_the_notebook_believes_of_itself_does_not_count(hall, name):
    """A grader that ran the check where the notebook runs, with the reference there, would believe it."""
    assert points(grade(hall, name)) == 0.0
    session = Connection(hall.sandbox("01_tokenization", ROOM), PATIENT)
    cells = submission(hall, name).cells
    session.run("import os; os.environ.pop('EFFNLP_GRADING', None)")
    for cell in cells[: next(i for i, c in enumerate(cells) if c.metadata.nbgrader.grade_id == "test_count_pairs")]:
        session.run(cell.source)
    said = session.run("print('points:', check('count_pairs', count_pairs))")
    session.end()
    assert "points: 1.0" in said["printed"]


def _release() -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "labs" / "01_tokenization" / "tokenization.ipynb", as_version=4)


def _checks(notebook: nbformat.NotebookNode) -> list[tuple[str, float]]:
    found = [cell.metadata.get("nbgrader", {}) for cell in notebook.cells]
    return [(one["grade_id"], one["points"]) for one in found if one.get("grade")]


def _deletes_checks(notebook):
    notebook.cells = [c for c in notebook.cells
                      if not (c.metadata.get("nbgrader", {}).get("grade") and c.cell_type == "code")]


def _doubles_checks(notebook):
    notebook.cells = [c for cell in notebook.cells for c in [cell] * (1 + bool(
        cell.metadata.get("nbgrader", {}).get("grade")))]


def _changes_points(notebook):
    for cell in notebook.cells:
        if cell.metadata.get("nbgrader", {}).get("grade"):
            cell.metadata.nbgrader.points = 100.0


def _hides_checks(notebook):
    for cell in notebook.cells:
        if cell.metadata.get("nbgrader", {}).get("grade"):
            cell.metadata.tags = ["demo"]
            cell.metadata.nbgrader.grade = False


@pytest.mark.parametrize("attack", [_deletes_checks, _doubles_checks, _changes_points, _hides_checks])
def test_checks_are_the_releases(attack):
    release, notebook = _release(), _release()
    attack(notebook)
    assert _checks(notebook) != _checks(release), "the attack does nothing: without `repair` it would show"
    done = repair(notebook, release)
    assert _checks(done.notebook) == _checks(release) and done.mended and not done.lost
    assert [c.source for c in done.notebook.cells] == [c.source for c in release.cells]
