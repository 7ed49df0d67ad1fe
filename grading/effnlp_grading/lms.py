"""What learning platforms call the files that they hand out, and whose they are.

- Canvas: `lovelaceada_LATE_4711_90210_tokenization-1.ipynb`: the sortable name in small letters, LATE where it is, the
  user's id, the file's id, the student's own name for it. No time. (`ContentZipper` of canvas-lms.)
- Moodle: a folder `Ada Lovelace_4711_assignsubmission_file`, before 4.1 with `_` at its end, or, without folders, the
  same before each file's name. The number is the participant's in this one assignment. Text typed online is in
  `..._onlinetext/onlinetext.html`. No time: the grading worksheet has it. (`mod_assign\\downloader`.)
- Brightspace: a folder `4711-90210 - Ada Lovelace - Sep 24, 2026 926 PM`, or the same before each file's name; the
  first number is the user's. Some sites put the student's number before the name. `index.html` lists them all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PurePosixPath

from effnlp_grading.roster import Roster, Student, Teams, read_table
from effnlp_grading.times import read_time
from effnlp_lab.errors import UsageError

PLATFORMS = ("canvas", "moodle", "brightspace")
_CANVAS = re.compile(r"(?P<name>.+?)(?P<late>_late)?_(?P<user>\d{1,19})_(?P<number>\d{1,19})_(?P<file>.+)",
                     re.IGNORECASE | re.DOTALL)
_ANONYMOUS = re.compile(r"(late_)?anon_\w+?_\d+_.+", re.IGNORECASE)
_MOODLE = re.compile(r"(?P<name>.+?)(?:_(?P<user>\d{1,19}))?_assignsubmission_(?P<plugin>file|onlinetext)"
                     r"(?:_(?P<file>.*))?", re.DOTALL)
_BRIGHTSPACE = re.compile(r"(?P<user>\d{1,19})-(?P<number>\d{1,19}) ?- (?P<rest>.+)", re.DOTALL)
_COPY = re.compile(r"(?:-| \()(\d{1,4})\)?$")  # `lab-1.ipynb` of Canvas, `lab (1).ipynb` of a browser


@dataclass(frozen=True)
class HandIn:
    """One file as it was handed in. `time` is None where the platform does not tell it; `prefix` names the person's
    part of the path, which feedback takes back; `number` grows with every upload where there is one."""

    platform: str
    path: PurePosixPath
    name: str = ""
    user: str = ""
    prefix: str = ""
    time: datetime | None = None
    late: bool = False
    number: int = 0
    copy: int = 0
    text_only: bool = False
    anonymous: bool = False
    others: tuple[str, ...] = field(default=())

    @property
    def who(self) -> str:
        """For people to read."""
        return self.name or self.user or self.path.as_posix()


def read_name(path: PurePosixPath) -> HandIn:
    """What the path of a file says about it. A path of no platform's is of platform "folder"."""
    copy = _COPY.search(path.stem)
    told = {"path": path, "copy": int(copy.group(1)) if copy else 0}
    for part in path.parts:
        if found := _MOODLE.fullmatch(part):
            return HandIn("moodle", name=found["name"], user=found["user"] or "",
                          prefix=part.removesuffix(found["file"] or ""), text_only=found["plugin"] == "onlinetext",
                          **told)
        if found := _BRIGHTSPACE.fullmatch(part):
            return _brightspace(found, part, told)
        if _ANONYMOUS.fullmatch(part):
            return HandIn("canvas", anonymous=True, name=part, prefix=part, **told)
        if found := _CANVAS.fullmatch(part):
            prefix = part.removesuffix(found["file"])
            return HandIn("canvas", name=found["name"], user=found["user"], late=bool(found["late"]), prefix=prefix,
                          number=int(found["number"]), text_only=found["file"] in ("text.html", "link.html"), **told)
    if re.search(r"_\d+_(text|link)\.html$", path.name):
        return HandIn("canvas", name=path.name, text_only=True, **told)
    return HandIn("folder", others=tuple(path.parts[:-1]) + (path.stem,), **told)


def _brightspace(found: re.Match, part: str, told: Mapping) -> HandIn:
    """The pieces after the numbers: the student's number on some sites, the name, the time, the file's name."""
    pieces = [piece.strip() for piece in re.split(r"\s*- ", found["rest"])]
    place, time = next(((k, when) for k in range(len(pieces) - 1, 0, -1) if (when := read_time(pieces[k]))),
                       (None, None))
    is_file = part == told["path"].name
    before = pieces[:place] if place is not None else pieces[:-1] if is_file and len(pieces) > 1 else pieces
    prefix = part.removesuffix(pieces[-1]) if is_file else part
    numbers = [piece for piece in before if re.search(r"\d", piece)]
    names = [piece for piece in before if piece not in numbers] or before
    return HandIn("brightspace", name=" ".join(names), user=found["user"], prefix=prefix, time=time,
                  number=0, others=tuple(numbers), **told)


class Finder:
    """Finds whose a hand-in is. A worksheet (Moodle's, say) tells ids and times that names of files do not."""

    def __init__(self, roster: Roster, teams: Teams, lab: str, worksheet: Worksheet | None = None) -> None:
        self.roster, self.teams, self.lab, self.worksheet = roster, teams, lab, worksheet

    def find(self, one: HandIn) -> tuple[str, str]:
        """(student, "") or ("", why it is nobody's). A team's hand-in is its first member's."""
        if one.anonymous:
            return "", "it was handed out without names: turn anonymous grading off for the download"
        found, why = self._student(one)
        if not found and (team := self.teams.named(one.name, self.lab)):
            return team.first, ""
        return found, why

    def _student(self, one: HandIn) -> tuple[str, str]:
        if one.platform == "folder":
            return self._in_folder(one)
        column = {"canvas": "canvas_id", "brightspace": "brightspace_id"}.get(one.platform)
        if column and one.user and (sure := self.roster.find(column, one.user)):
            return sure[0].id, ""
        for number in one.others:
            for sure in (self.roster.find("id", number), self.roster.find("brightspace_id", number)):
                if sure:
                    return sure[0].id, ""
        if one.platform == "moodle" and self.worksheet and (row := self.worksheet.of(one)):
            if sure := self.worksheet.student(row, self.roster):
                return sure.id, ""
        named = [student for student in self.roster.find("name", one.name)
                 if not (column and one.user and student.ids.get(column))]  # whose id there is another is somebody else
        if len(named) == 1:
            return named[0].id, ""
        if named:
            extra = f"give {column} in the roster" if column else "give Moodle's grading worksheet (--worksheet)"
            return "", f"{len(named)} students are called {one.name}: {extra}"
        number = f" ({one.platform} id {one.user})" if one.user else ""
        return "", f"{one.name}{number} is not in the roster"

    def _in_folder(self, one: HandIn) -> tuple[str, str]:
        """A folder's or a file's name that is an id, an address or a name."""
        for column in ("id", "email", "login", "name"):
            for word in one.others:
                found = self.roster.find(column, word)
                if len(found) == 1:
                    return found[0].id, ""
                if found:
                    return "", f"{len(found)} students are called {word}"
        return "", "nothing in its path is a student of the roster: name the student with --student"


class Worksheet:
    """A table with a row a student that tells when each one handed in: Moodle's grading worksheet, or one's own.

    Students are known by id, "id number", email or name; times stand under "last modified (submission)", "submitted"
    or "timestamp".
    """

    TIMES = ("last modified (submission)", "submitted", "timestamp")
    PEOPLE = {"id": "id", "student": "id", "id number": "moodle_id", "email": "email", "email address": "email",
              "full name": "name", "name": "name", "username": "login"}

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = [row for _, row in read_table(path, (), "identifier or id, and last modified (submission)")]
        columns = set(self.rows[0]) if self.rows else set()
        if not columns & {"identifier", *self.PEOPLE}:
            raise UsageError(f"{path} names no students: expected a column Identifier, ID, Email address or Full name.")

    def of(self, one: HandIn) -> dict[str, str] | None:
        """The row of a hand-in, by the participant's number."""
        wanted = [row for row in self.rows if one.user and _last_number(row.get("identifier", "")) == one.user]
        return wanted[0] if len(wanted) == 1 else None

    def student(self, row: Mapping[str, str], roster: Roster) -> Student | None:
        """The student of a row."""
        for column, kind in self.PEOPLE.items():
            if row.get(column):
                found = roster.find(kind, row[column])
                if not found and kind == "moodle_id":
                    found = roster.find("id", row[column])
                if len(found) == 1:
                    return found[0]
        return None

    def row_of(self, student: str, roster: Roster) -> dict[str, str] | None:
        """The row of a student."""
        return next((row for row in self.rows if (one := self.student(row, roster)) and one.id == student), None)

    def time(self, row: Mapping[str, str]) -> datetime | None:
        return next((when for column in self.TIMES if (when := read_time(row.get(column) or "-"))), None)


def _last_number(text: str) -> str:
    found = re.search(r"(\d+)\s*$", text)
    return found.group(1) if found else ""


