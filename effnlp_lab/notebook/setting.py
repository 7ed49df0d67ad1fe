"""The state of one running notebook: which lab, on what device, whose variant, and what was checked so far."""

from __future__ import annotations

import ast
import inspect
import os
import textwrap
from dataclasses import dataclass, field

from effnlp_lab import exercises
from effnlp_lab.device import Device, resolve
from effnlp_lab.exercises.spec import Exercise, Lab


@dataclass
class Setting:
    """What `start` settles for the notebook that calls it."""

    lab: str | None = None
    device: Device | None = None
    scores: dict[str, float] = field(default_factory=dict)


current = Setting()


def start(lab: str, device: str = "auto", fast: str | bool = "auto") -> Device:
    """Begin a lab: settle the device, register the `%%demo` cell magic, and say what we run on."""
    current.lab = exercises.lab(lab).name
    current.device = resolve(device, fast)
    current.scores.clear()
    _register_demo()
    print(f"Lab {exercises.lab(lab).number}, {exercises.lab(lab).title}. {current.device.describe()}")
    return current.device


def ready() -> None:
    """Say that the kit is here, on what a lab will run, and what that can do."""
    from effnlp_lab import __version__

    found = resolve()
    print(f"The kit is here, version {__version__}. {found.describe()}\n{found.can()}")


def device() -> Device:
    """The device of the running notebook (settled on first use when no lab was started)."""
    if current.device is None:
        current.device = resolve()
    return current.device


def student() -> str | None:
    """Who the notebook belongs to, for variants: EFFNLP_STUDENT, or nobody (the public variant)."""
    return os.environ.get("EFFNLP_STUDENT") or None


def variant_of(exercise: Exercise) -> dict[str, str]:
    """The running student's variant of an exercise. The course's key comes from EFFNLP_VARIANT_KEY."""
    lab, key = exercises.find(exercise.name)[0], os.environ.get("EFFNLP_VARIANT_KEY", "")
    return dict(lab.variant_of(exercise.name, student(), key))


def variant(exercise: str) -> None:
    """Say in the notebook which rule holds for this student."""
    spec = exercises.find(exercise)[1]
    for name, value in variant_of(spec).items():
        print(spec.in_words({name: value}))


def standing(lab: Lab) -> str:
    """The points of the lab's checks since it was started: each exercise counts as its last check found it."""
    worth = [e for e in lab.exercises if e.points and e.twin_of is None]
    scores = [current.scores.get(e.name, 0.0) for e in worth]
    if not worth:
        return ""
    whole = sum(score >= e.points for score, e in zip(scores, worth, strict=True))
    line = (f"Lab {lab.number}: {round(sum(scores), 2):g} of {lab.checked_points:g} points so far, "
            f"{whole} of {len(worth)} exercise{'' if len(worth) == 1 else 's'} whole.")
    rest = [what for what, there in (("Predictions", lab.predictions), ("what you write", lab.written)) if there]
    if whole < len(worth) or not (rest and lab.graded):
        return line
    told = " and ".join(rest)
    return f"{line} {told[0].upper()}{told[1:]} {'are' if lab.predictions else 'is'} graded after you hand in."


def predicted(name: str, *numbers: float | None) -> None:
    """Note a prediction. How close it was is told after grading: by then the measurement has told it anyway."""
    if os.environ.get("EFFNLP_GRADING"):
        return
    if any(number is None for number in numbers):
        print("Write your prediction into the cell above before you go on: it is graded by how close it is.")
    else:
        print(f"Noted: {', '.join(map(str, numbers))}. Leave it as it is, whatever the measurement says.")


def unsolved(name: str, space: dict) -> bool:
    """Whether the exercise's function is still a blank in `space` (or was never defined)."""
    answer = space.get(name)
    if answer is None:
        return True
    # a notebook's classes have no source of their own for inspect, their methods do
    pieces = list(vars(answer).values()) if isinstance(answer, type) else [getattr(answer, "fn", answer)]
    return any(map(_is_blank, pieces))


def _is_blank(function: object) -> bool:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return False
    return any(isinstance(node, ast.Raise) and "NotImplementedError" in ast.dump(node) for node in ast.walk(tree))


def demo(line: str, cell: str) -> None:
    """`%%demo exercise ...`: run the cell once these exercises are solved, and say so while they are not."""
    from IPython import get_ipython

    shell = get_ipython()
    blank = []
    for name in line.split():
        spec = exercises.find(name)[1]
        twins = [e.name for e in exercises.find(name)[0].exercises if e.twin_of == spec.name]
        if all(unsolved(n, shell.user_ns) for n in (name, *twins)):
            blank.append(name)
    if blank:
        print(f"Solve {_listed(blank)} first, then run this cell again: it uses your answer.")
        return
    outcome = shell.run_cell(cell)
    if not outcome.success:
        raise DemoFailed from outcome.error_in_exec


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


class DemoFailed(Exception):
    """The cell under %%demo raised; its own traceback stands above."""

    def _render_traceback_(self) -> list[str]:
        return ["The demo cell stopped: the error stands above."]


def _register_demo() -> None:
    try:
        from IPython import get_ipython
    except ImportError:
        return
    shell = get_ipython()
    if shell is not None:
        shell.register_magic_function(demo, magic_kind="cell")
