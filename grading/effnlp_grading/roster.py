"""Who is in the course: grading/roster.csv, and grading/teams.csv.

roster.csv has a row a student and the columns id, name, email and, as far as they are known, canvas_id, brightspace_id,
moodle_id (Moodle's "ID number") and login. An id that two rows share is nobody's: what is handed in under it waits for
a person, and everybody else goes on. teams.csv has the columns team, student and, where teams differ by lab, lab.
"""

from __future__ import annotations

import csv
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from effnlp_grading.course import Course
from effnlp_lab.errors import UsageError

IDS = ("canvas_id", "brightspace_id", "moodle_id", "login")
_LETTERS = str.maketrans({"ø": "o", "ł": "l", "đ": "d", "æ": "ae", "œ": "oe", "ı": "i"})  # which NFKD keeps
_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,127}")


@dataclass(frozen=True)
class Student:
    """A row of the roster. `ids` maps names of IDS to the student's id there."""

    id: str
    name: str = ""
    email: str = ""
    ids: Mapping[str, str] = field(default_factory=dict)

    @property
    def sortable(self) -> str:
        """Family name first, as Canvas sorts: `Lovelace, Ada`."""
        if "," in self.name or " " not in self.name:
            return self.name or self.id
        given, _, family = self.name.rpartition(" ")
        return f"{family}, {given}"

    @property
    def spoken(self) -> str:
        """Given name first: `Ada Lovelace`."""
        family, comma, given = self.name.partition(",")
        return f"{given.strip()} {family.strip()}" if comma else self.name or self.id


class Roster:
    """Students by every name they go by. `problems` has a sentence for each row that cannot be used."""

    def __init__(self, students: Iterable[Student], problems: Iterable[str] = ()) -> None:
        self.students = {student.id: student for student in students}
        self.problems = list(problems)
        self._by: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        for student in self.students.values():
            for column, value in (("id", student.id), ("email", student.email), *student.ids.items()):
                if value:
                    self._by[column][value.casefold()].add(student.id)
            for name in _ways_to_write(student.name):
                self._by["name"][name].add(student.id)

    def find(self, column: str, value: str) -> list[Student]:
        """Students whose `column` (id, name, email or one of IDS) is `value`; names in any order of their words."""
        key = squashed(value) if column == "name" else value.strip().casefold()
        return [self.students[one] for one in sorted(self._by[column].get(key, ()))] if key else []

    def __iter__(self) -> Iterator[Student]:
        return iter(self.students.values())


def squashed(name: str) -> str:
    """A name as its letters and digits alone, without accents and capitals."""
    plain = unicodedata.normalize("NFKD", name).casefold().translate(_LETTERS)
    return "".join(c for c in plain if c.isalnum())


def _ways_to_write(name: str) -> set[str]:
    words = name.replace(",", " ").split()
    return {squashed("".join(words[k:] + words[:k])) for k in range(len(words))} - {""}


def roster_of(course: Course, path: Path | None = None) -> Roster:
    """The roster in `path`, in grading/roster.csv, or, where there is none, of the gradebook's students."""
    path = path or course.root / "grading" / "roster.csv"
    return read_roster(path) if path.is_file() else Roster(_of_gradebook(course))


def read_roster(path: Path) -> Roster:
    """Read roster.csv. Raises UsageError for a file that is no roster; single rows end up in `problems`."""
    rows = read_table(path, ("id",), "id, name, email")
    found: list[tuple[int, Student]] = []
    problems = []
    for line, row in rows:
        student = Student(row["id"], row.get("name", ""), row.get("email", ""),
                          {column: row[column] for column in IDS if row.get(column)})
        if not _SAFE.fullmatch(student.id):
            problems.append(f"{path.name}, line {line}: {student.id!r} cannot be an id: expected letters, digits, and "
                            "any of _ . @ - between them.")
        elif any(student == other for _, other in found):
            problems.append(f"{path.name}, line {line}: {student.id} is there twice, word for word: it counts once.")
        else:
            found.append((line, student))
    unusable: set[int] = set()
    for column in ("id", "email", *IDS):
        lines = defaultdict(list)
        for line, student in found:
            value = getattr(student, column) if column in ("id", "email") else student.ids.get(column, "")
            if value:
                lines[value.casefold()].append(line)
        for value, shared in lines.items():
            if len(shared) > 1:
                unusable.update(shared)
                problems.append(f"{path.name}, lines {', '.join(map(str, shared))}: {column} {value} is given to "
                                f"{len(shared)} students: none of them is used until it is mended.")
    return Roster([student for line, student in found if line not in unusable], problems)


@dataclass(frozen=True)
class Team:
    """Students with one grade. The first one listed stands for all: the team is graded under that id and variant."""

    name: str
    members: tuple[str, ...]
    lab: str = ""

    @property
    def first(self) -> str:
        return self.members[0]


@dataclass
class Teams:
    """The teams of a course. `problems` has a sentence for each row that cannot be used."""

    teams: list[Team] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def of(self, student: str, lab: str) -> Team | None:
        """The student's team in a lab: one of that lab before one of all labs."""
        mine = [team for team in self.teams if student in team.members and team.lab in ("", lab)]
        return max(mine, key=lambda team: bool(team.lab), default=None)

    def named(self, name: str, lab: str) -> Team | None:
        """The team of a name, as a learning platform hands in for groups."""
        mine = [team for team in self.teams if squashed(team.name) == squashed(name) and team.lab in ("", lab)]
        return max(mine, key=lambda team: bool(team.lab), default=None)

    def in_lab(self, lab: str) -> list[Team]:
        """Every team that hands in together in a lab, once."""
        students = {student for team in self.teams for student in team.members}
        found = {team.name: team for student in students if (team := self.of(student, lab))}
        return [found[name] for name in sorted(found)]

    def together_with(self, student: str) -> set[str]:
        """Everybody whose late days may depend on this student's: team-mates, and theirs."""
        found, waiting = set(), [student]
        while waiting:
            one = waiting.pop()
            if one not in found:
                found.add(one)
                waiting += [other for team in self.teams if one in team.members for other in team.members]
        return found


def teams_of(course: Course, roster: Roster | None = None) -> Teams:
    """grading/teams.csv, if there is one. With a roster, strangers are left out of their team."""
    path = course.root / "grading" / "teams.csv"
    return read_teams(path, roster) if path.is_file() else Teams()


def read_teams(path: Path, roster: Roster | None = None) -> Teams:
    """Read teams.csv. Raises UsageError for a file that is no list of teams; single rows end up in `problems`."""
    from effnlp_lab.cli import match_lab

    known = roster.students if roster is not None else {}
    members: dict[tuple[str, str], list[str]] = defaultdict(list)
    problems: list[str] = []
    taken: dict[tuple[str, str], str] = {}
    for line, row in read_table(path, ("team", "student"), "team, student"):
        where, student, team = f"{path.name}, line {line}", row["student"], row["team"]
        try:
            lab = match_lab(row["lab"]) if row.get("lab") else ""
        except UsageError as error:
            problems.append(f"{where}: {error}")
            continue
        if known and student not in known:
            problems.append(f"{where}: {student} of team {team} is not in the roster: the others of the team go on "
                            "without.")
        elif taken.get((student, lab), team) != team:
            problems.append(f"{where}: {student} is in team {taken[student, lab]} already: that counts, not {team}.")
        elif student not in members[team, lab]:
            taken[student, lab] = team
            members[team, lab].append(student)
    return Teams([Team(team, tuple(who), lab) for (team, lab), who in members.items() if who], problems)


def read_table(path: Path, columns: Sequence[str], expected: str) -> list[tuple[int, dict[str, str]]]:
    """Rows of a CSV file with their line numbers: names of columns in lower case, values without space around them.

    Raises UsageError for a file that cannot be read or lacks one of `columns`.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}): expected a CSV file in UTF-8 with the columns {expected}."
                         ) from error
    lines = text.splitlines()
    separator = ";" if lines and lines[0].count(";") > lines[0].count(",") else ","
    reader = csv.DictReader(text.splitlines(keepends=True), delimiter=separator, restval="")
    reader.fieldnames = [(name or "").strip().lower() for name in reader.fieldnames or ()]
    missing = [column for column in columns if column not in reader.fieldnames]
    if missing:
        raise UsageError(f"{path} has no column {' and '.join(missing)}: expected the columns {expected}.")
    rows = []
    for row in reader:
        clean = {name: (value or "").strip() for name, value in row.items() if isinstance(name, str)
                 and not isinstance(value, list)}
        if any(clean.get(column) for column in columns or clean):
            rows.append((reader.line_num, clean))
    return rows


def _of_gradebook(course: Course) -> list[Student]:
    from nbgrader.api import Gradebook

    if course.db_url.startswith("sqlite:") and not course.gradebook.is_file():
        return []
    with Gradebook(course.db_url) as book:
        return [Student(one.id, " ".join(filter(None, (one.first_name, one.last_name))), one.email or "",
                        dict.fromkeys(IDS[:3], one.lms_user_id) if one.lms_user_id else {}) for one in book.students]


def into_gradebook(course: Course, roster: Roster) -> None:
    """Give the gradebook the roster's students, names and addresses, where it has none."""
    from nbgrader.api import Gradebook

    with Gradebook(course.db_url) as book:
        there = {one.id: one for one in book.students}
        for student in roster:
            given, _, family = student.spoken.rpartition(" ")
            told = {"first_name": given or None, "last_name": family or None, "email": student.email or None}
            one = there.get(student.id)
            if one is None or any(getattr(one, name) != value for name, value in told.items() if value):
                book.update_or_create_student(student.id, **{name: value for name, value in told.items() if value})
