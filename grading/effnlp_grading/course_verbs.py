"""The verbs of `effnlp` around grading: `collect`, `return`, `export`, `regrade`, and `grade --estimate`.

Exit codes: 0 ok, 1 something was left out (and said), 2 wrong usage.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effnlp_lab.errors import UsageError

OneLab = Annotated[str, typer.Argument(metavar="LAB", help="A lab, such as 01_tokenization or 01.")]
OnDevice = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
RosterFile = Annotated[Path | None, typer.Option("--roster", help="Who is in the course.",
                                                 show_default="grading/roster.csv")]
WorksheetFile = Annotated[Path | None, typer.Option("--worksheet", help="A table of students (and times): Moodle's "
                                                                        "grading worksheet.")]
Platform = Annotated[str | None, typer.Option("--lms", help="canvas, moodle or brightspace.")]


def add_to(app: typer.Typer) -> None:
    """Give these verbs to the command line."""
    app.command("collect")(collect_verb)
    app.command("return")(return_verb)
    app.command("export")(export_verb)
    app.command("regrade")(regrade_verb)
    app.command("report")(report_verb)
    app.command("forget")(forget_verb)


def collect_verb(
    lab: OneLab,
    zips: Annotated[list[Path], typer.Option("--zip", help="What the platform handed out: a zip, a folder or a "
                                                           "notebook. May be given several times.")],
    roster: RosterFile = None,
    worksheet: WorksheetFile = None,
    student: Annotated[str | None, typer.Option(help="Whose it is, where the names do not say.")] = None,
) -> None:
    """Take what Canvas, Moodle or Brightspace handed out, repair it, and put it where it is graded.

    The latest attempt counts; every one is kept in grading/attempts/. Says what it could not place, and why.
    """
    from effnlp_grading.collect import collect

    course, name = _course(lab)
    done = collect(course, name, zips, roster=roster, worksheet=worksheet, student=student)
    for sentence in done.said:
        print(sentence)
    for sentence in done.not_placed:
        print(f"Not placed: {sentence}")
    print(f"{name}: {len(done.placed)} placed, {len(done.unchanged)} as before, {len(done.not_placed)} not placed; "
          f"every attempt is in {course.root / 'grading' / 'attempts' / name}")
    raise typer.Exit(1 if done.not_placed else 0)


def return_verb(
    lab: OneLab,
    platform: Platform = None,
    out: Annotated[Path | None, typer.Option(help="Where to write.", show_default="grading/returned")] = None,
    roster: RosterFile = None,
    worksheet: WorksheetFile = None,
) -> None:
    """Write each student's feedback and verdicts in the shape in which the platform takes them back."""
    from effnlp_grading.handback import hand_back, summary
    from effnlp_grading.teams import finish

    course, name = _course(lab)
    finish(course, name, print)
    done = hand_back(course, name, out or course.root / "grading" / "returned", platform=platform, roster=roster,
                     worksheet=worksheet)
    for sentence in [*done.said, *summary(done)]:
        print(sentence)


def export_verb(
    lab: OneLab,
    platform: Annotated[str, typer.Option("--lms", help="canvas, moodle or brightspace.")],
    out: Annotated[Path | None, typer.Option(help="The file to write.",
                                             show_default="grading/returned/LAB_LMS.csv")] = None,
    column: Annotated[str | None, typer.Option(help="What the platform calls the assignment; for Canvas with its id: "
                                                    "'Lab 1 (4711)'.", show_default="the lab's title")] = None,
    zero: Annotated[bool, typer.Option("--zero", help="0 for who has no grade, in place of nothing.")] = False,
    roster: RosterFile = None,
    worksheet: WorksheetFile = None,
) -> None:
    """Write a lab's points, after late penalties, as a CSV file that the platform imports."""
    from effnlp_grading.export import export
    from effnlp_grading.teams import finish

    course, name = _course(lab)
    path = out or course.root / "grading" / "returned" / f"{name}_{platform}.csv"
    finish(course, name, print)
    count, said = export(course, name, platform, path, column=column, zero=zero, worksheet=worksheet, roster=roster)
    for sentence in said:
        print(sentence)
    print(f"{name}: {count} grades for {platform}: {path}")


def regrade_verb(
    lab: OneLab,
    exercise: Annotated[str, typer.Argument(help="The exercise to judge again.")],
    students: Annotated[str, typer.Option(help="Only these, separated by commas.", show_default="everybody")] = "",
    allow_lower: Annotated[bool, typer.Option("--allow-lower", help="Let points fall.")] = False,
    device: OnDevice = "auto",
    jobs: Annotated[int | None, typer.Option(help="Submissions at once.", show_default="by cores, GPUs")] = None,
    scheduler: Annotated[str | None, typer.Option(help="A Dask cluster.", show_default="this machine")] = None,
    sandbox: Annotated[bool, typer.Option("--sandbox/--no-sandbox", help="Wall off students' code.")] = True,
) -> None:
    """Judge one exercise again for the class, after its check was mended, and print the difference.

    Keeps graders' own points, and lowers nobody's without --allow-lower. May be stopped: the same command goes on.
    """
    from effnlp_grading.class_report import write_class_report
    from effnlp_grading.preprocessors import wants_sandbox
    from effnlp_grading.progress import progress
    from effnlp_grading.regrade import regrade, table

    course, name = _course(lab)
    chosen = [student.strip() for student in students.split(",") if student.strip()]
    with progress(len(chosen or course.students(name)), f"regrading {name} {exercise}") as show:
        changes = regrade(course, name, exercise, students=chosen, allow_lower=allow_lower, device=device, jobs=jobs,
                          scheduler=scheduler, confined=sandbox and wants_sandbox(), show=show, say=print)
    for line in table(changes):
        print(line)
    print(f"The class: {write_class_report(course, name, {})}")
    raise typer.Exit(1 if any(one.before is None for one in changes) else 0)


def report_verb(
    lab: OneLab,
    pseudonyms: Annotated[bool, typer.Option("--pseudonyms", help="Name nobody: a page and points.csv with "
                                                                  "pseudonyms.")] = False,
    who: Annotated[str | None, typer.Option(help="Only say whose pseudonym this is.")] = None,
) -> None:
    """Write the page on the class again, from what was graded."""
    from effnlp_grading.class_report import write_class_report
    from effnlp_grading.pseudonyms import Pseudonyms

    course, name = _course(lab)
    grades = course.grades(name)
    if not grades:
        raise UsageError(f"No submission of {name} is graded: run `effnlp grade {name}` first.")
    names = Pseudonyms.of_course(course) if pseudonyms or who else None
    if who:
        found = [student for student in grades if names.of(student) == who]
        if not found:
            raise UsageError(f"{who} is the pseudonym of nobody with a grade in {name}.")
        print(found[0])
    else:
        print(f"{name}: {len(grades)} students: {write_class_report(course, name, {}, names)}")


def forget_verb(
    older_than: Annotated[float | None, typer.Option(min=0, metavar="DAYS", help="Records untouched for so long.",
                                                     show_default="keep_days in pyproject.toml")] = None,
    student: Annotated[str | None, typer.Option(help="Only this student's, of any age.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete records of students that are older than the course keeps them; says which, and asks."""
    from effnlp_grading.course import find_course
    from effnlp_grading.forget import chosen, forget, in_words

    course = find_course()
    some = chosen(course, older_than, student)
    if not some:
        print("There is nothing to forget.")
        return
    for sentence in in_words(course, some):
        print(sentence)
    try:
        agreed = yes or typer.confirm("Delete all of this for good?")
    except typer.Abort:
        agreed = False
    if not agreed:
        print("Nothing was deleted.")
        raise typer.Exit(1)
    forget(course, some)
    print("It is deleted.")


def main_estimate(lab: str, device: str, jobs: int | None, size: int | None, force: bool) -> int:
    """Print what grading a lab will take; return 0."""
    from effnlp_grading.estimate import estimate, sentences

    course, name = _course(lab)
    if size is None and not course.students(name):
        raise UsageError(f"There is no submission of {name}: name the size of the class with --size.")
    for sentence in sentences(estimate(course, name, device=device, jobs=jobs, size=size, force=force)):
        print(sentence)
    return 0


def _course(lab: str) -> tuple:
    from effnlp_grading.course import find_course
    from effnlp_lab.cli import match_lab

    return find_course(), match_lab(lab)


