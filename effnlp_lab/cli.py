"""The command `effnlp`. A verb is a function below; what it needs is imported when it is called.

Exit codes: 0 ok, 1 a check failed, 2 wrong usage or a missing piece of the environment.
"""

from __future__ import annotations

import difflib
import importlib
import signal
import sys
import threading
from collections.abc import Iterable, Sequence
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from effnlp_lab.errors import EffnlpError, UsageError

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(
    name="effnlp",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Efficient NLP Lab: check this machine, build, execute, test and grade the labs.",
    epilog="A lab may be named in full (01_tokenization), by its number (01) or by its title (tokenization).",
)

Labs = Annotated[list[str] | None, typer.Argument(metavar="LABS", help="Labs; all of them when none is named.")]
OneLab = Annotated[str, typer.Argument(metavar="LAB", help="A lab, such as 01_tokenization or 01.")]
OnDevice = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what this machine has, what is missing, and how to get it."""
    _finish(_load("effnlp_lab.doctor").main(as_json))


@app.command()
def build(
    labs: Labs = None,
    check: Annotated[bool, typer.Option("--check", help="Change nothing; fail where something is stale.")] = False,
    execute: Annotated[bool, typer.Option("--execute", help="Run the solutions and keep their outputs.")] = False,
    device: OnDevice = "auto",
    jobs: Annotated[int | None, typer.Option(help="Notebooks at once.", show_default="by cores, memory, GPUs")] = None,
) -> None:
    """Build labs/ and solutions/*.ipynb from the masters, solutions/*/*.py."""
    _finish(_load("effnlp_lab.build").main(match_labs(labs or ()), check, execute, device, jobs))


@app.command("new-lab")
def new_lab(
    name: Annotated[str, typer.Argument(metavar="NN_NAME", help="Such as 10_mixture_of_experts.")],
    title: Annotated[str, typer.Option(help="The lab's title.", show_default="from its name")] = "",
    room: Annotated[bool, typer.Option("--room", help="Make a room for the technique, effnlp_lab/NAME/, too.")] = False,
    execute: Annotated[bool, typer.Option("--execute/--no-execute", help="Run the solution and keep outputs.")] = True,
) -> None:
    """Write the skeleton of a lab, which passes every check from the start."""
    _finish(_load("effnlp_lab.new_lab").main(name, title, room, execute))


@app.command()
def docs(
    check: Annotated[bool, typer.Option("--check", help="Change nothing; fail where something is stale.")] = False,
) -> None:
    """Write what the specs say into docs/labs/, the pages to read before a lab."""
    _finish(_load("effnlp_lab.pages").main(check))


@app.command()
def run(
    labs: Labs = None,
    device: OnDevice = "auto",
    fast: Annotated[bool | None, typer.Option("--fast/--full", help="Problem sizes.", show_default="auto")] = None,
    jobs: Annotated[int | None, typer.Option(help="Notebooks at once.", show_default="by cores, memory, GPUs")] = None,
    student: Annotated[bool, typer.Option("--student/--solutions", help="Run labs/ or solutions/.")] = False,
    timeout: Annotated[float | None, typer.Option(help="Seconds for one notebook.", show_default="900 or 3600")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to put what was executed.", show_default="build/run")] = None,
) -> None:
    """Execute notebooks headlessly; name the cell where one failed, died or hung."""
    names = match_labs(labs or ())
    size = "auto" if fast is None else str(int(fast))
    _finish(_load("effnlp_lab.runner").run_cli(names, device, size, jobs, student, timeout, out))


@app.command(context_settings=PASS_ON)
def test(context: typer.Context, device: OnDevice = "auto") -> None:
    """Run the whole test suite, every notebook included; further arguments go to pytest.

    With --device cuda: the GPU tests and every notebook, and a skipped test is a failure.
    """
    _finish(_load("effnlp_lab.runner").run_tests(device, context.args))


@app.command()
def audit(
    labs: Labs = None,
    seeds: Annotated[int, typer.Option(help="Random seeds to try each answer on.")] = 20,
    split: Annotated[bool, typer.Option("--split", help="Run answers in a process of their own.")] = False,
    exercise: Annotated[str | None, typer.Option(help="Only this exercise.")] = None,
    right: Annotated[bool, typer.Option("--right", help="Only the right answers.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at once.")] = 1,
    device: OnDevice = "auto",
) -> None:
    """Hold the checks against right answers, blanks and known mistakes."""
    _finish(_load("effnlp_lab.audit").main(match_labs(labs or ()), seeds, split, device, exercise, right, jobs))


@app.command()
def mutate(
    lab: OneLab,
    exercise: Annotated[str | None, typer.Option(help="Only this exercise.")] = None,
    sample: Annotated[int | None, typer.Option(help="At most so many mutants.", show_default="all")] = None,
    jobs: Annotated[int | None, typer.Option(help="Mutants at once; with --sandbox exercises.")] = None,
    sandbox: Annotated[bool, typer.Option("--sandbox", help="Grade them the way submissions are graded.")] = False,
    device: Annotated[str, typer.Option(help="With --sandbox: cpu or cuda.")] = "cpu",
) -> None:
    """Change the solutions in small ways and list the changes that no check notices."""
    if sandbox:
        given = [("--exercise", exercise), ("--sample", sample), ("--device", device), ("--jobs", jobs)]
        _grading("mutate", [lab, *(part for name, value in given if value is not None for part in (name, str(value)))])
    _finish(_load("effnlp_lab.mutate").main(match_lab(lab), exercise, sample, jobs))


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAMES", help="Benchmarks; all by default.")] = None,
    device: OnDevice = "auto",
    out: Annotated[Path | None, typer.Option(help="Where to write.", show_default="benchmarks")] = None,
    book: Annotated[bool, typer.Option("--book", help="Measure nothing; gather what was measured.")] = False,
) -> None:
    """Time the reference implementations beside the libraries one would otherwise use."""
    _finish(_load("effnlp_lab.notebook.bench").main(list(names or ()), device, None, out, book))


@app.command()
def gpu(
    only: Annotated[list[str] | None, typer.Option(help="A part (tests, notebooks, grading, bench) or a step; may be "
                                                        "given again.", show_default="all")] = None,
    force: Annotated[bool, typer.Option("--force", help="Run again what is done.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where to work and report.", show_default="build/gpu")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Only name the steps.")] = False,
    record: Annotated[bool, typer.Option("--record", help="Only write what was measured into benchmarks/.")] = False,
    recorded: Annotated[bool, typer.Option("--recorded", help="What is recorded there counts as done.")] = False,
) -> None:
    """Run everything that needs a GPU and write one report; what is done on this tree and card is not repeated."""
    _finish(_load("effnlp_lab.gpurun.main").main(only or (), force, out, listed, record, recorded))


@app.command("train-course-models")
def train_course_models(
    device: OnDevice = "auto",
    folder: Annotated[Path, typer.Option(help="Where to work, and to go on.")] = Path("build/course-models"),
    size: Annotated[str, typer.Option(help="full (ten minutes on an H100) or tiny (a trial on any CPU).")] = "full",
    seconds: Annotated[float | None, typer.Option(help="Of training in all; in a sweep, of each candidate.")] = None,
    sweep: Annotated[str | None, typer.Option(help="Try settings for a short time each: base or draft.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Such as base.learning_rate=0.003.")] = None,
) -> None:
    """Train the models that every lab shares, from Python source on this machine.

    May be stopped at any moment: the same command goes on from there.
    """
    _finish(_load("effnlp_lab.course.recipe.run").main(device, folder, size, seconds, sweep, settings or ()))


@app.command(context_settings=PASS_ON | {"help_option_names": []})
def grade(context: typer.Context) -> None:
    """Grade the submissions of a lab: `effnlp grade LAB`, `effnlp grade --help`."""
    _grading("grade", context.args)


@app.command(context_settings=PASS_ON | {"help_option_names": []})
def demo(context: typer.Context) -> None:
    """Grade a class of made-up students, from release to feedback."""
    _grading("demo", context.args)


@app.command(context_settings=PASS_ON | {"help_option_names": []})
def similarity(context: typer.Context) -> None:
    """Rank submissions of a lab that are alike: `effnlp similarity LAB`."""
    _grading("similarity", context.args)


@app.command(context_settings=PASS_ON | {"help_option_names": []})
def release(context: typer.Context) -> None:
    """Write a repository for students: `effnlp release --student-repo OUT`."""
    _grading("release", context.args)


@app.command(context_settings=PASS_ON | {"help_option_names": []})
def defend(context: typer.Context) -> None:
    """Make a quiz from a student's own accepted code, and grade it: `effnlp defend STUDENT`."""
    _grading("defend", context.args)


@app.command(context_settings=PASS_ON | {"help_option_names": []})
def replay(context: typer.Context) -> None:
    """Show a kept verdict again on this machine: `effnlp replay VERDICTS [NOTEBOOK]`."""
    _grading("replay", context.args)


@app.command(context_settings=PASS_ON | {"help_option_names": []})
def submit(context: typer.Context) -> None:
    """Check a submission before it is handed in, and say what the grader will say: `effnlp submit NOTEBOOK`."""
    _grading("submit", context.args)


@app.command(context_settings=PASS_ON | {"help_option_names": []})
def repair(context: typer.Context) -> None:
    """Rebuild a damaged submission from the release: `effnlp repair SUBMISSION`."""
    _grading("repair", context.args)


@app.command(context_settings=PASS_ON | {"help_option_names": []})
def collect(context: typer.Context) -> None:
    """Take what a learning platform handed out: `effnlp collect LAB --zip FILE`."""
    _grading("collect", context.args)


@app.command("return", context_settings=PASS_ON | {"help_option_names": []})
def return_(context: typer.Context) -> None:
    """Write feedback in the shape in which a learning platform takes it: `effnlp return LAB`."""
    _grading("return", context.args)


@app.command(context_settings=PASS_ON | {"help_option_names": []})
def export(context: typer.Context) -> None:
    """Write points as a file that a learning platform imports: `effnlp export LAB --lms NAME`."""
    _grading("export", context.args)


@app.command(context_settings=PASS_ON | {"help_option_names": []})
def regrade(context: typer.Context) -> None:
    """Judge one exercise again for the class: `effnlp regrade LAB EXERCISE`."""
    _grading("regrade", context.args)


@app.command(context_settings=PASS_ON | {"help_option_names": []})
def report(context: typer.Context) -> None:
    """Write the page on a class again, with names or with pseudonyms: `effnlp report LAB`."""
    _grading("report", context.args)


@app.command(context_settings=PASS_ON | {"help_option_names": []})
def forget(context: typer.Context) -> None:
    """Delete records of students that are older than the course keeps them: `effnlp forget`."""
    _grading("forget", context.args)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. An error of ours is one sentence, never a traceback."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        app(args=None if arguments is None else list(arguments), prog_name="effnlp")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 2
    except EffnlpError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def known_labs() -> list[str]:
    """The names of all labs: those with exercises in this package, and those in this course."""
    from effnlp_lab.runner import course_root

    packaged = Path(__file__).resolve().parent.glob("exercises/[0-9][0-9]_*")
    try:
        root = course_root()
        here = [*root.glob("solutions/[0-9][0-9]_*"), *root.glob("labs/[0-9][0-9]_*")]
    except UsageError:
        here = []
    return sorted({folder.name for folder in [*packaged, *here] if folder.is_dir()})


def match_lab(word: str, names: Iterable[str] | None = None) -> str:
    """The lab that a word names: in full, by number or by title. Raises UsageError with the nearest names."""
    labs = known_labs() if names is None else list(names)
    word = word.strip().rstrip("/").rsplit("/", 1)[-1].removesuffix(".ipynb").lower()
    for lab in labs:
        number, _, title = lab.partition("_")
        if word in (lab, number, title) or (word.isdigit() and int(word) == int(number)):
            return lab
    titles = {lab.partition("_")[2]: lab for lab in labs}
    near = difflib.get_close_matches(word, [*labs, *titles], n=3, cutoff=0.7)
    nearest = list(dict.fromkeys(titles.get(name, name) for name in near))
    if nearest:
        raise UsageError(f"There is no lab {word!r}: did you mean {' or '.join(nearest)}?")
    raise UsageError(f"There is no lab {word!r}: expected one of {', '.join(labs) or '(there are no labs here)'}.")


def match_labs(words: Iterable[str], names: Iterable[str] | None = None) -> list[str]:
    """`match_lab` for several words, each lab once, in order."""
    return list(dict.fromkeys(match_lab(word, names) for word in words))


def _load(module: str) -> ModuleType:
    """Import what a verb needs; a package that is not installed is one sentence."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module + ".").startswith(error.name + "."):
            raise UsageError(f"This installation has no {module}: use a complete checkout or wheel.") from error
        raise UsageError(
            f"The package {error.name} is not installed: run `pip install 'effnlp-lab[notebooks,grading]'`, "
            "or see `effnlp doctor`."
        ) from error


def _grading(verb: str, arguments: Sequence[str]) -> None:
    """Hand a verb to the grading package: the installed one, or the one in this source tree's grading/."""
    if util.find_spec("effnlp_grading") is None:
        sys.path.append(str(Path(__file__).resolve().parent.parent / "grading"))
    _finish(_load("effnlp_grading.cli").main([verb, *arguments]))


def _finish(code: int | None) -> None:
    raise typer.Exit(code or 0)


def _terminate(*_: object) -> None:
    sys.exit(143)  # an exception, so that what was started is ended too
