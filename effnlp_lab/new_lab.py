"""`effnlp new-lab`: a lab of one exercise that passes every check, to be written further from there.

The skeleton has what every lab has: an exercise with parts, a variant, known mistakes and hints, two predictions, a
question with its rubric, a demo with a plot, a cell that nbval compares, right answers and the list of mutants.
"""

from __future__ import annotations

import builtins
import keyword
import os
import re
import subprocess
import sys
from pathlib import Path
from string import Template

from effnlp_lab.build import ROOT
from effnlp_lab.errors import UsageError
from effnlp_lab.new_lab_texts import ANSWERS, DRIVE, MASTER, MUTANTS, REFERENCE, ROOM, SPEC

NAME = re.compile(r"[0-9]{2}_[a-z][a-z0-9]*(_[a-z0-9]+)*")


def main(name: str, title: str = "", room: bool = False, execute: bool = True, root: Path = ROOT) -> int:
    """Write the lab `name` into the checkout at `root`, build it, and say what to do next. Returns 0 or 1.

    room: make a room, effnlp_lab/<name without its number>/, too. Raises UsageError for a name that cannot be a lab's
    and for a number, a title or a room that is taken; nothing is written then.
    """
    if not (root / "solutions").is_dir():
        raise UsageError("`effnlp new-lab` works in a checkout of the course: there is no solutions/ folder here.")
    refuse(name, room, root)
    title = " ".join(title.split()) or name.partition("_")[2].replace("_", " ").capitalize()
    if not title.isprintable() or set(title) & set('"\\{}$'):
        raise UsageError(f"The title {title!r} cannot be used: leave out quotation marks, braces, $ and backslashes.")
    for path, text in texts(name, title, room).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, "utf-8")
        print(f"wrote {path}")
    command = [sys.executable, "-m", "effnlp_lab", "build", name, *(["--execute"] if execute else [])]
    paths = [str(root), str(root / "grading"), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(dict.fromkeys(paths)))
    code = subprocess.call(command, cwd=root, env=environment)
    if code:
        return 1
    if (root / "docs" / "labs").is_dir():
        subprocess.call([sys.executable, "-m", "effnlp_lab", "docs"], cwd=root, env=environment)
    print(f"Lab {name} is there, and not graded yet. To be written further (docs/labs.md):\n"
          f"  solutions/{name}/{name[3:]}.py\n  effnlp_lab/exercises/{name}/\n  docs/labs/{name}.md\n"
          "Add a row to the table in README.md, and set graded=True once it has four core exercises. What to check it\n"
          f"with: `effnlp audit {name[:2]}`, `effnlp mutate {name[:2]}`.")  # fmt: skip
    return 0


def refuse(name: str, room: bool, root: Path) -> None:
    """Raise UsageError, with what to do, where `name` cannot be a new lab of the checkout at `root`."""
    if not NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name for a lab: expected two digits and words in small letters, such as "
                         "10_mixture_of_experts.")
    number, _, word = name.partition("_")
    if keyword.iskeyword(word) or hasattr(builtins, word):
        raise UsageError(f"{word!r} is a word of Python's: choose another name for the lab.")
    folders = [*root.glob("effnlp_lab/exercises/[0-9]*"), *root.glob("solutions/[0-9]*"), *root.glob("labs/[0-9]*")]
    taken = sorted({folder.name for folder in folders})
    for other in taken:
        if other[:2] == number:
            free = next((f"{n:02d}" for n in range(100) if f"{n:02d}" not in {one[:2] for one in taken}), "no number")
            raise UsageError(f"The number {number} is taken by {other}: {free} is free.")
        if other[3:] == word:
            raise UsageError(f"There is a lab called {word!r} already, {other}: choose another name.")
    if room and (root / "effnlp_lab" / word).exists():
        raise UsageError(f"There is an effnlp_lab/{word}/ already: choose another name, or leave out --room.")
    for path in texts(name, "", room):
        if (root / path).exists():
            raise UsageError(f"{path} is there already: move it away, or choose another name.")


def texts(name: str, title: str, room: bool) -> dict[str, str]:
    """The files of the skeleton: path from the root -> text."""
    number, _, word = name.partition("_")
    exercise = f"{word}_shares"
    known = {
        "name": name, "number": number, "word": word, "title": title, "exercise": exercise,
        "room": repr(word) if room else "None",
        "forbidden": f'("effnlp_lab.{word}",)' if room else "()",
    }  # fmt: skip
    known["reference_class"] = "".join(part.capitalize() for part in exercise.split("_"))
    folder = f"effnlp_lab/exercises/{name}"
    made = {
        f"{folder}/__init__.py": "", f"{folder}/spec.py": SPEC, f"{folder}/drive.py": DRIVE,
        f"{folder}/reference.py": REFERENCE, f"solutions/{name}/{word}.py": MASTER,
        f"tests/answers/{name}.py": ANSWERS, f"tests/mutants/{name}.toml": MUTANTS,
    }  # fmt: skip
    if room:
        made[f"effnlp_lab/{word}/__init__.py"] = ROOM
    return {path: Template(text).substitute(known) for path, text in made.items()}
