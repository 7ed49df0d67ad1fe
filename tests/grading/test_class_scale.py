"""A class graded in parallel: killed and gone on with, its workers killed, its gradebook in PostgreSQL."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from bs4 import BeautifulSoup
from classes import LAB, SIZE, copy_course, make_course
from effnlp_grading.autograde import grade_class
from effnlp_grading.class_report import write_class_report
from effnlp_grading.course import Course, environment_with_kit
from effnlp_grading.preprocessors import record_path, wants_sandbox
from effnlp_grading.records import read_record
from effnlp_grading.sandbox import sandbox_error

from effnlp_lab import exercises

pytestmark = [pytest.mark.xdist_group("class scale")]
if sandbox_error() is not None and wants_sandbox():
    pytestmark.append(pytest.mark.skip(reason=f"NO SANDBOX HERE: {sandbox_error()}"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Course:
    """A class graded from beginning to end, in one process, after a copy of it was laid aside."""
    folder = tmp_path_factory.mktemp("scale")
    course = make_course(folder / "undisturbed")
    copy_course(course, folder / "disturbed")
    results = grade_class(course, [(LAB, student) for student in course.students(LAB)], device="cpu", jobs=1)
    assert [r.state for r in results] == ["graded"] * SIZE, [r.message for r in results]
    return course


def gradebook(course: Course) -> dict[str, dict]:
    return {student: grade.exercises for student, grade in course.grades(LAB).items()}


def test_killed_half_way_and_resumed_is_as_if_undisturbed(undisturbed):
    """SIGKILL to the whole session; then the same command. No verdict is lost, and none is made twice."""
    course = Course(undisturbed.root.parent / "disturbed")
    shutil.copy(undisturbed.root / "grading" / "seed_key", course.root / "grading")  # the same course: the same seeds
    command = [sys.executable, "-m", "effnlp_lab", "grade", LAB, "--device", "cpu", "--jobs", "2"]
    _kill_after(command, course, SIZE // 3)
    half = {student: read_record(record_path(course.root / "grading", LAB, student)) for student in
            course.students(LAB)}
    done = sum(bool(verdicts) for verdicts in half.values())
    assert SIZE // 3 <= done < SIZE, "it was killed too late to show anything"
    command[-1] = "1"
    again = subprocess.run(command, cwd=course.root, env=environment_with_kit(), capture_output=True, text=True,
                           check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{SIZE} of {SIZE} graded" in again.stdout and "s left)" in again.stdout
    assert gradebook(course) == gradebook(undisturbed)
    for student, before in half.items():
        after = read_record(record_path(course.root / "grading", LAB, student))
        assert after[: len(before)] == before and len(after) == len({v["exercise"] for v in after})


def _kill_after(command: list[str], course: Course, count: int) -> None:
    """Start grading, and kill it once verdicts on `count` submissions are on disk."""
    folder = record_path(course.root / "grading", LAB, "x").parent
    with (course.root / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=course.root, env=environment_with_kit(), stdout=log, stderr=log,
                                   start_new_session=True)
        while sum("finished" in path.read_text() for path in folder.glob("*.jsonl")) < count:
            assert process.poll() is None, (course.root / "log").read_text()
            time.sleep(0.02)
        process.kill()
        process.wait()


def test_nothing_is_left_running_after_a_kill(undisturbed):
    """Warm parents and sessions end when what started them is gone."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        left = [pid for pid in psutil.pids() if _is_orphan(pid)]
        if not left:
            return
        time.sleep(0.5)
    pytest.fail(f"processes {left} outlived the grader")


def _is_orphan(pid: int) -> bool:
    """Whether a process is of a sandbox, and none of its ancestors is anything else."""
    try:
        process = psutil.Process(pid)
        line = [process, *(p for p in process.parents() if p.pid != 1)]
        return all(any("effnlp_inside.warm" in word for word in p.cmdline()) for p in line)
    except psutil.Error:
        return False


def test_killed_worker_is_replaced(undisturbed, tmp_path):
    """On a cluster by its address, one of whose workers is killed in the middle."""
    from distributed import Client, LocalCluster

    course = copy_course(undisturbed, tmp_path / "course")
    students = course.students(LAB)[:4]
    killed = []
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit=0,
                      silence_logs=50) as cluster, Client(cluster) as client:
        workers = client.run(os.getpid)

        def show(result) -> None:
            if not killed:
                killed.append(next(iter(workers.values())))
                os.kill(killed[0], signal.SIGKILL)

        results = grade_class(course, [(LAB, s) for s in students], device="cpu", force=True, show=show,
                              scheduler=cluster.scheduler_address)
    assert killed and [r.state for r in results] == ["graded"] * 4
    assert {s: g for s, g in gradebook(course).items() if s in students} == {
        s: g for s, g in gradebook(undisturbed).items() if s in students}


def test_class_report_is_true_and_accessible(undisturbed):
    course = undisturbed
    results = {r.student: r for r in grade_class(course, [(LAB, s) for s in course.students(LAB)], device="cpu")}
    assert {r.state for r in results.values()} == {"kept"}
    page = write_class_report(course, LAB, results)
    tree = BeautifulSoup(page.read_text("utf-8"), "html.parser")
    assert tree.html["lang"] == "en" and len(tree.select("h1")) == 1 and all(t.caption for t in tree.select("table"))
    table = next(t for t in tree.select("table") if t.caption.text.startswith("Students by points"))
    rows = {row.th.text: row for row in table.select("tbody tr")}
    grades = course.grades(LAB)
    lab = exercises.lab(LAB)
    for exercise in lab.exercises:
        full = sum(g.exercises[exercise.name][0] == exercise.points for g in grades.values())
        cells = [cell.text for cell in rows[exercise.name].select("td")]
        assert not exercise.points or int(cells[5]) == full
    with (page.parent / "canvas.csv").open() as stream:
        canvas = list(csv.reader(stream))
    assert canvas[1][-1] == f"{lab.points:g}"
    assert {row[2]: float(row[-1]) for row in canvas[2:]} == {s: round(g.score, 4) for s, g in grades.items()}
    with (page.parent / "nbgrader.csv").open() as stream:
        assert {row["student_id"] for row in csv.DictReader(stream)} >= set(grades)


def test_what_was_mended_needs_a_person(undisturbed, tmp_path):
    course = copy_course(undisturbed, tmp_path / "course")
    student = "s011"
    result = grade_class(course, [(LAB, student)], device="cpu", force=True)[0]
    assert "had lost its metadata" in result.look[0]
    page = write_class_report(course, LAB, {student: result}).read_text("utf-8")
    assert "had lost its metadata" in page
    again = grade_class(course, [(LAB, student)], device="cpu")[0]
    assert again.state == "kept"
    for later in ({student: again}, {}):  # it still does when grading goes on after a stop, and in `effnlp report`
        assert "had lost its metadata" in write_class_report(course, LAB, later).read_text("utf-8")
    shutil.copytree(course.submission(student, LAB).parent, course.submission("newcomer", LAB).parent)
    assert "newcomer</th><td>not graded yet" in write_class_report(course, LAB, {}).read_text("utf-8")
    course.submission(student, LAB).write_text("{]")
    result = grade_class(course, [(LAB, student)], device="cpu", force=True)[0]
    assert result.state == "not graded" and "is not a notebook" in result.message


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory) -> Iterator[str]:
    """The URL of a database on a server of its own, in a temporary folder."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    pytest.importorskip("psycopg2", reason="NO PSYCOPG2 HERE, and the gradebook was not tried on PostgreSQL")
    if not programs or shutil.which("setpriv") is None and os.getuid() == 0:
        pytest.skip("NO POSTGRESQL HERE, and the gradebook was not tried on it: apt-get install postgresql")
    folder = Path("/var/tmp") / f"effnlp-pg-{os.getpid()}"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.getuid() == 0 else []
    place, tools = folder / "data", programs[-1].parent

    def call(*command: object) -> None:
        subprocess.run([*become, *map(str, command)], check=True, capture_output=True, cwd=folder, timeout=120)

    try:
        call(tools / "initdb", "-D", place, "-U", "grader", "-A", "trust", "--no-sync")
        call(tools / "pg_ctl", "-D", place, "-w", "-l", folder / "log", "-o", f"-k {folder} -h '' -F", "start")
        try:
            call(tools / "createdb", "-h", folder, "-U", "grader", "gradebook")
            yield f"postgresql+psycopg2://grader@/gradebook?host={folder}"
        finally:
            call(tools / "pg_ctl", "-D", place, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_gradebook_in_postgresql(undisturbed, postgresql, monkeypatch, tmp_path):
    course = copy_course(undisturbed, tmp_path / "course")
    (course.root / "grading" / "gradebook.db").unlink()
    monkeypatch.setenv("EFFNLP_GRADEBOOK", postgresql)
    course.nbgrader("generate_assignment", LAB)
    assert course.is_released(LAB)
    students = course.students(LAB)[:3]
    results = grade_class(course, [(LAB, s) for s in students], device="cpu", jobs=1, force=True)
    assert [r.state for r in results] == ["graded"] * 3, [r.message for r in results]
    found = gradebook(course)
    assert not (course.root / "grading" / "gradebook.db").exists()
    monkeypatch.delenv("EFFNLP_GRADEBOOK")
    assert found == {s: gradebook(undisturbed)[s] for s in students}
