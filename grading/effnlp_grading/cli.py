"""The instructor's verbs of `effnlp`: `grade` and `demo`.

Exit codes: 0 ok, 1 something was not graded (or the demonstration went wrong), 2 wrong usage.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from effnlp_grading.progress import progress
from effnlp_lab.errors import UsageError

app = typer.Typer(name="effnlp", add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)

Jobs = Annotated[int | None, typer.Option(help="Submissions at once.", show_default="by cores, memory, GPUs")]
OnDevice = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]


@app.command("grade")
def grade_verb(
    lab: Annotated[str, typer.Argument(metavar="LAB", help="A lab, such as 01_tokenization or 01.")],
    students: Annotated[str, typer.Option(help="Only these, separated by commas.", show_default="everybody")] = "",
    device: OnDevice = "auto",
    jobs: Jobs = None,
    force: Annotated[bool, typer.Option("--force", help="Grade again what has not changed.")] = False,
) -> None:
    """Autograde the submissions of a lab in grading/submitted/ and write feedback pages, with nbgrader."""
    names = [name.strip() for name in students.split(",") if name.strip()]
    raise typer.Exit(main_grade(lab, names, device, jobs, force))


@app.command("demo")
def demo_verb(
    device: OnDevice = "auto",
    jobs: Jobs = None,
    out: Annotated[Path | None, typer.Option(help="Where to work and report.", show_default="build")] = None,
) -> None:
    """Execute the first labs, grade a class of made-up students, and write build/report/index.html."""
    raise typer.Exit(main_demo(device, jobs, out))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code. Raises EffnlpError with one sentence for what the user got wrong."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="effnlp")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 2
    return 0


def main_grade(lab: str, students: Sequence[str] = (), device: str = "auto", jobs: int | None = None,
               force: bool = False) -> int:
    """Grade a lab's submissions, print a table, and return 0 when every one is graded, else 1."""
    from effnlp_grading.course import find_course
    from effnlp_grading.grade import grade
    from effnlp_lab.cli import match_lab

    course, name = find_course(), match_lab(lab)
    present = course.students(name)
    absent = sorted(set(students) - set(present))
    if absent or not present:
        who = f" of {', '.join(absent)}" if absent else ""
        raise UsageError(f"There is no submission of {name}{who}: expected "
                         f"{course.submission('STUDENT', name).relative_to(course.root)} in {course.root}.")
    chosen = [student for student in present if not students or student in students]
    pairs = [(name, student) for student in chosen]
    with progress(len(chosen), f"grading {name}") as show:
        results = grade(course, pairs, device=device, jobs=jobs, force=force, show=show)
    _print_table(results)
    lost = [result for result in results if result.state == "not graded"]
    for result in lost:
        log = course.log(result.student, name)
        print(f"{result.student}: not graded: {result.message}{f' (log: {log})' if log.is_file() else ''}")
    pages = course.root / "grading" / "feedback"
    print(f"{len(results) - len(lost)} of {len(results)} graded; feedback pages in {pages}")
    return 1 if lost else 0


def main_demo(device: str = "auto", jobs: int | None = None, out: Path | None = None) -> int:
    """See `effnlp_grading.demo`."""
    from effnlp_grading import demo

    return demo.main(device, jobs, out)


def _print_table(results: Sequence) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("student", "state", "points", "of"):
        table.add_column(column, justify="right" if column in ("points", "of") else "left")
    for result in results:
        points = ("", "") if result.grade is None else (f"{result.grade.score:g}", f"{result.grade.max_score:g}")
        table.add_row(result.student, result.state, *points)
    Console().print(table)
