"""The instructor's verbs of `effnlp`: `grade` and `demo`.

Exit codes: 0 ok, 1 something was not graded (or the demonstration went wrong), 2 wrong usage.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from effnlp_grading import course_verbs
from effnlp_grading.progress import progress
from effnlp_lab.errors import UsageError

app = typer.Typer(name="effnlp", add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)

Jobs = Annotated[int | None, typer.Option(help="Submissions at once.", show_default="by cores, memory, GPUs")]
OnDevice = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
course_verbs.add_to(app)


@app.command("grade")
def grade_verb(
    lab: Annotated[str, typer.Argument(metavar="LAB", help="A lab, such as 01_tokenization or 01.")],
    students: Annotated[str, typer.Option(help="Only these, separated by commas.", show_default="everybody")] = "",
    device: OnDevice = "auto",
    jobs: Jobs = None,
    force: Annotated[bool, typer.Option("--force", help="Grade again what has not changed.")] = False,
    scheduler: Annotated[str | None, typer.Option(help="A Dask cluster.", show_default="this machine")] = None,
    gradebook: Annotated[str | None, typer.Option(help="Its URL.", show_default="grading/gradebook.db")] = None,
    sandbox: Annotated[bool, typer.Option("--sandbox/--no-sandbox", help="Wall off students' code.")] = True,
    estimate: Annotated[bool, typer.Option("--estimate", help="Only say what it will take.")] = False,
    size: Annotated[int | None, typer.Option(min=0, help="With --estimate: a class of this size.",
                                             show_default="what is not graded")] = None,
) -> None:
    """Grade the submissions of a lab in grading/submitted/: gradebook, feedback pages, and a report on the class.

    May be stopped at any moment: the same command goes on from there.
    """
    names = [name.strip() for name in students.split(",") if name.strip()]
    if gradebook:
        os.environ["EFFNLP_GRADEBOOK"] = gradebook
    if estimate:
        raise typer.Exit(course_verbs.main_estimate(lab, device, jobs, size, force))
    confined = sandbox and os.environ.get("EFFNLP_SANDBOX", "1") != "0"
    raise typer.Exit(main_grade(lab, names, device, jobs, force, scheduler, confined))


@app.command("replay")
def replay_verb(
    verdicts: Annotated[Path, typer.Argument(help="The verdicts that were returned, or grading/verdicts/LAB/"
                                                  "STUDENT.jsonl.")],
    notebook: Annotated[Path | None, typer.Argument(help="The notebook that was judged.",
                                                    show_default="the lab's in labs/")] = None,
    exercise: Annotated[str | None, typer.Option(help="Only this exercise.")] = None,
) -> None:
    """Judge answers again on the very cases of a verdict, on this machine, and say whether it comes out the same."""
    from effnlp_grading.replay import main as replay

    raise typer.Exit(replay(verdicts, notebook, exercise))


@app.command("submit")
def submit_verb(
    notebook: Annotated[Path, typer.Argument(help="The notebook that you want to hand in.")],
    lab: Annotated[str | None, typer.Option(help="Its lab.", show_default="what the notebook says")] = None,
    out: Annotated[Path | None, typer.Option(help="Write a repaired copy into this folder, named as hand-in "
                                                  "expects.")] = None,
    device: OnDevice = "auto",
) -> None:
    """Check a submission before it is handed in, and say what the grader will say.

    Its cells run on this machine without a sandbox. Exit code 0: it can be handed in; 1: something has to be put right.
    """
    from effnlp_grading.submit import main as submit
    from effnlp_lab.cli import match_lab

    raise typer.Exit(submit(notebook, match_lab(lab) if lab else None, out, device))


@app.command("repair")
def repair_verb(
    submission: Annotated[Path, typer.Argument(help="A submitted notebook.")],
    lab: Annotated[str | None, typer.Option(help="Its lab.", show_default="by the notebook's name")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write it.", show_default="over the old one")] = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing.")] = False,
) -> None:
    """Rebuild a submission from the release: what an editor lost, doubled or moved. Says what it did and cannot do."""
    raise typer.Exit(main_repair(submission, lab, out, check))


@app.command("mutate")
def mutate_verb(
    lab: Annotated[str, typer.Argument(metavar="LAB", help="A lab, such as 01_tokenization or 01.")],
    exercise: Annotated[str | None, typer.Option(help="Only this exercise.")] = None,
    sample: Annotated[int | None, typer.Option(help="At most so many mutants an exercise.", show_default="all")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    jobs: Annotated[int, typer.Option(min=1, help="Exercises at once.")] = 1,
) -> None:
    """Grade right answers and mutants of a lab's solutions in the sandbox, as submissions are graded."""
    from effnlp_grading.mutants import main as mutate
    from effnlp_lab.cli import match_lab

    raise typer.Exit(mutate(match_lab(lab), exercise, sample, device, jobs))


@app.command("similarity")
def similarity_verb(
    lab: Annotated[str, typer.Argument(metavar="LAB", help="A lab, such as 01_tokenization or 01.")],
    past: Annotated[list[Path] | None, typer.Option(help="Another year's submissions; may be given again.")] = None,
    most: Annotated[int, typer.Option(help="So many pairs on the page.")] = 50,
) -> None:
    """Rank answers that are alike, in the class, with the kit and with past years. For human eyes: never a verdict."""
    from effnlp_grading.course import find_course
    from effnlp_grading.similarity import main as similarity
    from effnlp_lab.cli import match_lab

    similarity(find_course(), match_lab(lab), past or (), most)


@app.command("release")
def release_verb(
    student_repo: Annotated[Path, typer.Option("--student-repo", metavar="OUT", help="Where to write it.")],
) -> None:
    """Write a repository for students: labs and kit, without masters, solutions and the instructor's tools."""
    from effnlp_grading.course import find_course
    from effnlp_grading.release import main as release

    raise typer.Exit(release(find_course(), student_repo))


@app.command("defend")
def defend_verb(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="Whose code: a folder in grading/submitted/.")],
    lab: Annotated[str | None, typer.Option(help="Of which lab.", show_default="the latest with accepted code")] = None,
    questions: Annotated[int, typer.Option(min=1, max=20, help="How many.")] = 5,
    grade: Annotated[Path | None, typer.Option(help="Grade the answers.json that came back.")] = None,
    sandbox: Annotated[bool, typer.Option("--sandbox/--no-sandbox", help="Wall off students' code.")] = True,
) -> None:
    """Make a ten-minute quiz from small changes of a student's own accepted code, and grade it."""
    from effnlp_grading import defend
    from effnlp_grading.course import find_course
    from effnlp_lab.cli import match_lab

    if grade is not None:
        defend.grade_quiz(find_course(), student, grade)
        return
    confined = sandbox and os.environ.get("EFFNLP_SANDBOX", "1") != "0"
    defend.main(find_course(), student, match_lab(lab) if lab else None, questions, confined)


@app.command("demo")
def demo_verb(
    device: OnDevice = "auto",
    jobs: Jobs = None,
    out: Annotated[Path | None, typer.Option(help="Where to work and report.", show_default="build")] = None,
    hand_in: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Only write what Canvas would hand out of a "
                                                                        "made-up class, and its roster.")] = None,
    size: Annotated[int, typer.Option(min=1, help="With --hand-in: of so many students.")] = 30,
    lab: Annotated[str, typer.Option(help="With --hand-in: of this lab.")] = "01",
) -> None:
    """Execute the first labs, grade a class of made-up students, and write build/report/index.html."""
    raise typer.Exit(main_demo(device, jobs, out) if hand_in is None else main_hand_in(hand_in, size, lab))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code. Raises EffnlpError with one sentence for what the user got wrong."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="effnlp")
    except ImportError as error:
        if not str(error.name).startswith(("effnlp_grading", "effnlp_lab")):
            if not isinstance(error, ModuleNotFoundError):
                raise
            raise UsageError(f"The package {error.name} is not installed: run `pip install "
                             "'effnlp-lab[notebooks,grading]'`, or see `effnlp doctor`.") from error
        raise UsageError(f"`effnlp {' '.join(arguments or ())}` is the instructor's, and this is a student's "
                         f"repository: use a complete checkout ({error}).") from error
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 2
    return 0


def main_grade(lab: str, students: Sequence[str] = (), device: str = "auto", jobs: int | None = None,
               force: bool = False, scheduler: str | None = None, confined: bool = True) -> int:
    """Grade a lab's submissions, print a table, and return 0 when every one is graded, else 1."""
    from effnlp_grading.autograde import grade_class
    from effnlp_grading.class_report import write_class_report
    from effnlp_grading.course import find_course
    from effnlp_grading.estimate import keep_run
    from effnlp_grading.regrade import judged_at_other_points
    from effnlp_grading.teams import finish
    from effnlp_lab.cli import match_lab
    from effnlp_lab.device import resolve
    from effnlp_lab.runner import plan_jobs

    course, name = find_course(), match_lab(lab)
    present = course.students(name)
    absent = sorted(set(students) - set(present))
    if absent or not present:
        who = f" of {', '.join(absent)}" if absent else ""
        raise UsageError(f"There is no submission of {name}{who}: expected "
                         f"{course.submission('STUDENT', name).relative_to(course.root)} in {course.root}.")
    chosen = [student for student in present if not students or student in students]
    pairs = [(name, student) for student in chosen]
    began = time.monotonic()
    with progress(len(chosen), f"grading {name}") as show:
        results = grade_class(course, pairs, device=device, jobs=jobs, force=force, show=show, scheduler=scheduler,
                              confined=confined)
    count = sum(result.state == "graded" for result in results)
    keep_run(course, name, results, time.monotonic() - began, plan_jobs(resolve(device), count, jobs).jobs)
    finish(course, name, print)
    grades = course.grades(name)
    results = [replace(one, grade=grades.get(one.student) if one.grade else None) for one in results]
    _print_table(results)
    for result in results:
        for sentence in result.look:
            print(f"{result.student}: {sentence}")
    for sentence in judged_at_other_points(course, name, chosen):
        print(sentence)
    lost = [result for result in results if result.state == "not graded"]
    for result in lost:
        log = course.log(result.student, name)
        print(f"{result.student}: not graded: {result.message}{f' (log: {log})' if log.is_file() else ''}")
    pages = course.root / "grading" / "feedback"
    page = write_class_report(course, name, {result.student: result for result in results})
    print(f"{len(results) - len(lost)} of {len(results)} graded; feedback pages in {pages}; the class: {page}")
    return 1 if lost else 0


def main_repair(submission: Path, lab: str | None = None, out: Path | None = None, check: bool = False) -> int:
    """Repair a notebook, print what was done, and return 0 when it is whole, 1 when an answer is lost."""
    import nbformat

    from effnlp_grading.course import find_course
    from effnlp_grading.repair import repair_file
    from effnlp_lab import exercises
    from effnlp_lab.cli import match_lab

    if not submission.is_file():
        raise UsageError(f"There is no file {submission}: name a submitted notebook.")
    spec = exercises.lab(match_lab(lab or submission.stem))
    release = find_course().root / "labs" / spec.name / f"{spec.notebook}.ipynb"
    done = repair_file(submission, nbformat.read(release, as_version=4))
    for sentence in done.sentences:
        print(sentence)
    if not check:
        nbformat.write(done.notebook, out or submission)
    if done.lost:
        print(f"{submission} is not whole: {', '.join(done.lost)} cannot be given back.")
        return 1
    state = "needs no repair" if not done.sentences else "can be repaired" if check else "is whole"
    print(f"{submission} {state}.")
    return 0


def main_demo(device: str = "auto", jobs: int | None = None, out: Path | None = None) -> int:
    """See `effnlp_grading.demo`."""
    from effnlp_grading import demo

    return demo.main(device, jobs, out)


def main_hand_in(folder: Path, size: int, lab: str) -> int:
    """See `effnlp_grading.sample_class.hand_in`."""
    from effnlp_grading import sample_class
    from effnlp_grading.course import find_course
    from effnlp_lab import exercises
    from effnlp_lab.cli import match_lab
    from effnlp_lab.master import read_master

    root, spec = find_course().root, exercises.lab(match_lab(lab))
    master = read_master(root / "solutions" / spec.name / f"{spec.notebook}.py")
    download, roster = sample_class.hand_in(folder, master, root / "labs", size)
    print(f"A made-up class of {size} in {spec.name}: {download}, {roster}")
    return 0


def _print_table(results: Sequence) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("student", "state", "points", "of"):
        table.add_column(column, justify="right" if column in ("points", "of") else "left")
    for result in results:
        points = ("", "") if result.grade is None else (f"{result.grade.final:g}", f"{result.grade.max_score:g}")
        table.add_row(result.student, result.state, *points)
    Console().print(table)
