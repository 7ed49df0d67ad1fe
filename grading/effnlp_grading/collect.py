"""`effnlp collect`: what a learning platform handed out, repaired and put where it is graded.

Every notebook that comes is kept for good, as it came, in grading/attempts/LAB/STUDENT/; the latest one, repaired, is
put into grading/submitted/STUDENT/LAB/ with nbgrader's timestamp.txt. The same zip twice changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from effnlp_grading.course import Course
from effnlp_grading.lms import Finder, HandIn, Worksheet, read_name
from effnlp_grading.plan import CHECK
from effnlp_grading.repair import Places, RepairError, plain, read_submission, repair
from effnlp_grading.roster import Roster, Teams, into_gradebook, roster_of, teams_of
from effnlp_grading.times import as_stored
from effnlp_grading.unpack import Found, LeftOut, files_in
from effnlp_lab import exercises
from effnlp_lab.errors import UsageError

SHOWN = 3  # sentences on one notebook
ENOUGH = 0.5  # of a release's answers: with fewer, and others that it does not have, a notebook is of another release


@dataclass(frozen=True)
class Attempt:
    """A notebook that was handed in, as its JSON beside it says. Times are seconds since 1970, in UTC.

    time: when it was handed in, if that is known; seen: when the file was written into what was handed out.
    """

    student: str
    lab: str
    platform: str
    path: str
    prefix: str
    user: str
    digest: str
    time: int | None = None
    seen: int | None = None
    late: bool = False
    number: int = 0
    copy: int = 0
    filled: int = 0
    mended: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Names its files: the same for the same bytes at the same place of an export."""
        where = hashlib.sha256(f"{self.platform}/{self.path}".encode()).hexdigest()
        return f"{self.digest[:12]}-{where[:8]}"

    @property
    def order(self) -> tuple:
        """The last one counts: by time; in one second by filled blanks, the platform's number, name and content."""
        return (self.second, self.filled, self.number, self.copy, self.path, self.digest)

    @property
    def second(self) -> int:
        return self.time if self.time is not None else self.seen or 0


@dataclass
class Collected:
    """What came of collecting: who was placed, what could not be, and what else a person may want to know."""

    lab: str
    placed: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    not_placed: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


def attempts_folder(course: Course, lab: str) -> Path:
    return course.root / "grading" / "attempts" / lab


def attempts_of(course: Course, lab: str, student: str) -> list[Attempt]:
    """Every attempt of a student that is kept, the one that counts last."""
    found = []
    for path in sorted((attempts_folder(course, lab) / student).glob("*.json")):
        told = json.loads(path.read_text("utf-8"))
        found.append(Attempt(**{**told, "mended": tuple(told.get("mended", ()))}))
    return sorted(found, key=lambda one: one.order)


def collect(course: Course, lab: str, sources: Sequence[Path], *, roster: Path | None = None,
            worksheet: Path | None = None, student: str | None = None) -> Collected:
    """Collect a lab from zips, folders or notebooks. Raises UsageError where none of it can be begun.

    roster: instead of grading/roster.csv; worksheet: a table of times; student: whose a bare notebook is.
    """
    people = roster_of(course, roster)
    teams = teams_of(course, people)
    if not people.students:
        raise UsageError("There is no roster: write grading/roster.csv with the columns id, name, email and, where "
                         "known, canvas_id, brightspace_id, moodle_id.")
    if student is not None and student not in people.students:
        raise UsageError(f"{student} is not in the roster: expected one of its ids.")
    for source in sources:
        if not source.exists():
            raise UsageError(f"There is no file {source}: name the zip, the folder or the notebook that was handed "
                             "out.")
    done = Collected(lab, said=[*people.problems, *teams.problems])
    collector = _Collector(course, lab, people, teams, Worksheet(worksheet) if worksheet else None, done)
    for source in sources:
        collector.take_all(files_in(source), student)
    collector.place()
    if course.is_released(lab):
        into_gradebook(course, people)
    else:
        done.said.append(f"The gradebook does not know {lab} yet: run `nbgrader generate_assignment {lab}` before "
                         "grading.")
    return done


class _Collector:
    def __init__(self, course: Course, lab: str, roster: Roster, teams: Teams, worksheet: Worksheet | None,
                 done: Collected) -> None:
        self.course, self.lab, self.roster, self.teams, self.done = course, lab, roster, teams, done
        self.worksheet = worksheet
        self.finder = Finder(roster, teams, lab, worksheet)
        self.spec = exercises.lab(lab)
        self.release = _release(course, lab)
        self.taken: dict[str, list[Attempt]] = defaultdict(list)
        self.due = _due(course, lab)
        self.untimed = 0

    def take_all(self, files: Iterable[Found | LeftOut], student: str | None) -> None:
        """Keep every notebook that is somebody's; say of every other one why it is not."""
        texts: dict[str, HandIn] = {}
        notebooks = set()
        for one in files:
            if isinstance(one, LeftOut):
                self.done.not_placed.append(f"{one.path}: {one.why}.")
            elif one.path.name.lower() == "index.html":
                _keep(attempts_folder(self.course, self.lab) / "index.html", one.data)
            elif one.path.suffix.lower() == ".ipynb":
                name = read_name(one.path)
                notebooks.add(name.who)
                self._take(one, name, student)
            elif (name := read_name(one.path)).text_only:
                texts[name.who] = name
        for who, name in texts.items():
            if who not in notebooks:
                self.done.not_placed.append(f"{name.path}: {who} typed text or a link and handed in no notebook.")

    def _take(self, one: Found, name: HandIn, student: str | None) -> None:
        whose, why = (student, "") if student else self.finder.find(name)
        if not whose:
            self.done.not_placed.append(f"{one.path}: {why}.")
            return
        time = name.time
        if self.worksheet and (row := self.worksheet.of(name) or self.worksheet.row_of(whose, self.roster)):
            time = self.worksheet.time(row) or time
        attempt = Attempt(whose, self.lab, name.platform, str(one.path), name.prefix, name.user,
                          hashlib.sha256(one.data).hexdigest(), _seconds(time), _seconds(one.written), name.late,
                          name.number, name.copy)
        self._keep(attempt, one.data)

    def _keep(self, attempt: Attempt, data: bytes) -> None:
        """Repair a notebook and put it among the student's attempts, as it came; or say why it is none."""
        folder = attempts_folder(self.course, self.lab) / attempt.student
        path = Path(attempt.path)
        try:
            notebook = read_submission(data, attempt.path)
            self._refuse_other(notebook, attempt.path)
            whole = repair(notebook, self.release, attempt.path)
        except RepairError as error:
            _keep(folder / "refused" / f"{attempt.key}.ipynb", data)
            self.done.not_placed.append(f"{attempt.student}: {error}")
            return
        text = nbformat.writes(whole.notebook) + "\n"
        blanks = {cell.metadata.nbgrader.grade_id: plain(cell.source) for cell in self.release.cells
                  if _is_answer(cell)}
        filled = sum(plain(cell.source) != blanks[cell.metadata.nbgrader.grade_id] for cell in whole.notebook.cells
                     if _is_answer(cell))
        said = whole.sentences
        if path.stem != self.spec.notebook and attempt.platform != "canvas":
            said = [f"It was named {path.name}, and its content is that of {self.lab}.", *said]
        attempt = replace(attempt, filled=filled, mended=tuple(said))
        before = next((old for old in attempts_of(self.course, self.lab, attempt.student) if old.key == attempt.key),
                      None)
        if before is not None:  # the same file again: later exports may know more of it
            attempt = replace(attempt, time=attempt.time if attempt.time is not None else before.time,
                              seen=max(filter(None, (attempt.seen, before.seen)), default=None))
        _keep(folder / f"{attempt.key}.ipynb", data)
        _keep(folder / f"{attempt.key}.repaired", text.encode())
        _write(folder / f"{attempt.key}.json", json.dumps(asdict(attempt), indent=1).encode())
        self.taken[attempt.student].append(attempt)

    def _refuse_other(self, notebook: NotebookNode, name: str) -> None:
        """Raise RepairError for a notebook of another lab, or of another release of this one."""
        mine = answers_in(notebook, self.release)
        wanted = {cell.metadata.nbgrader.grade_id for cell in self.release.cells if _is_answer(cell)}
        if len(mine) >= ENOUGH * len(wanted):
            return
        for lab in exercises.lab_names():
            if lab != self.lab and (path := self.course.root / "labs" / lab).is_dir():
                other = answers_in(notebook, _release(self.course, path.name))
                if len(other) > len(mine):
                    raise RepairError(f"{name} is a notebook of {lab}, and {self.lab} is collected: hand it in there.")
        there = {str(cell.metadata["nbgrader"].get("grade_id")) for cell in notebook.cells if _is_answer(cell)}
        strange = there - wanted
        if strange and len(strange) > len(mine):
            raise RepairError(f"{name} is of another release of {self.lab}: it has {', '.join(sorted(strange)[:3])}, "
                              f"which this release has not, and lacks {', '.join(sorted(wanted - mine)[:3])}.")

    def place(self) -> None:
        """Put the attempt that counts into grading/submitted, for everybody of whom something came."""
        units: dict[str, tuple[str, ...]] = {}
        for student in self.taken:
            team = self.teams.of(student, self.lab)
            units[team.first if team else student] = team.members if team else (student,)
        for first, members in sorted(units.items()):
            for member in members:
                self._adopt(member, aside=member != first)
            attempts = sorted((one for member in members for one in attempts_of(self.course, self.lab, member)),
                              key=lambda one: one.order)
            self._place(first, members, attempts)
        if self.untimed:
            self.done.said.append(f"Moodle does not say when {self.untimed} of these were handed in: they count as in "
                                  "time; its grading worksheet (--worksheet) tells.")

    def _adopt(self, student: str, aside: bool) -> None:
        """Keep, as an attempt, what stands in grading/submitted and did not come from here. Nothing is lost."""
        path = self.course.submission(student, self.lab)
        if not path.is_file():
            return
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if digest not in _lines(self._placed(student)):
            stamp = _stamp(path.parent)
            self._keep(Attempt(student, self.lab, "folder", f"submitted/{student}/{self.lab}/{path.name}", "", "",
                               digest, stamp, int(path.stat().st_mtime)), data)
        if aside:
            where = attempts_folder(self.course, self.lab) / student / f"submitted-{path.stat().st_mtime_ns}"
            shutil.move(path.parent, where)
            self.done.said.append(f"{student} hands in with a team now: what {student} had handed in alone is in "
                                  f"{where.relative_to(self.course.root)}.")

    def _place(self, student: str, members: tuple[str, ...], attempts: list[Attempt]) -> None:
        if not attempts:
            return
        last = attempts[-1]
        self._tell(student, members, attempts)
        folder = self.course.submission(student, self.lab).parent
        text = (attempts_folder(self.course, self.lab) / last.student / f"{last.key}.repaired").read_bytes()
        path = self.course.submission(student, self.lab)
        if path.is_file() and path.read_bytes() == text:
            self.done.unchanged.append(student)
        else:
            with self._placed(student).open("a", encoding="utf-8") as file:  # first, so that it is known as ours
                file.write(hashlib.sha256(text).hexdigest() + "\n")
            _write(path, text)
            self.done.placed.append(student)
        stamp = self._timestamp(last)
        if stamp is not None:
            _write(folder / "timestamp.txt", as_stored(stamp).encode())

    def _placed(self, student: str) -> Path:
        """The digests of all that was put into grading/submitted for a student."""
        path = attempts_folder(self.course, self.lab) / student / "placed"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _tell(self, student: str, members: tuple[str, ...], attempts: list[Attempt]) -> None:
        last, mine = attempts[-1], {one.key for member in members for one in self.taken.get(member, ())}
        if len(attempts) > 1:
            others = ", ".join(one.path for one in attempts[:-1])
            tie = [one for one in attempts[:-1] if one.second == last.second]
            rule = (" (handed in at the same second: the one with more blanks filled in counts, then the platform's "
                    "larger number, then the name that comes last)") if tie else ""
            self.done.said.append(f"{student}: {len(attempts)} attempts: {last.path} counts, {others} "
                                  f"{'is' if len(attempts) == 2 else 'are'} kept{rule}.")
        if last.key in mine:
            more = len(last.mended) - SHOWN
            self.done.said += [f"{student}: {sentence}" for sentence in last.mended[:SHOWN]]
            self.done.said += [f"{student}: {more} more like it were mended."] * (more > 0)
        if last.platform == "moodle" and last.time is None and last.key in mine:
            self.untimed += 1
        if last.late and last.time is None:
            told = "counted as within the first day" if self.due else "the gradebook has no due date to count from"
            self.done.said.append(f"{student}: {last.platform} says that it is late and not by how much: {told}; a "
                                  "table of times (--worksheet) makes it exact.")

    def _timestamp(self, one: Attempt) -> datetime | None:
        """When it counts as handed in. Where a platform tells no time, what it does not call late was on time."""
        if one.time is not None:
            return datetime.fromtimestamp(one.time, UTC)
        if one.late:
            return self.due + timedelta(hours=1) if self.due else None
        seen = datetime.fromtimestamp(one.seen, UTC) if one.seen else None
        if one.platform == "folder" or not self.due:
            return seen
        return min(seen, self.due) if seen else self.due


def answers_in(notebook: NotebookNode, release: NotebookNode) -> set[str]:
    """Which of a release's exercises a notebook has an answer cell for."""
    places = Places(release)
    matched = {places.match(cell) for cell in notebook.cells}
    return {name for name, place in places.by_name.items() if place in matched and place not in places.written}


def _is_answer(cell: NotebookNode) -> bool:
    nbgrader = cell.metadata.get("nbgrader")
    return isinstance(nbgrader, dict) and bool(nbgrader.get("solution")) and not str(
        nbgrader.get("grade_id", "")).startswith(CHECK)


def _release(course: Course, lab: str) -> NotebookNode:
    path = course.root / "labs" / lab / f"{exercises.lab(lab).notebook}.ipynb"
    if not path.is_file():
        raise UsageError(f"{lab} is not released: expected {path}; run `nbgrader generate_assignment {lab}` first.")
    return nbformat.read(path, as_version=4)


def _due(course: Course, lab: str) -> datetime | None:
    from nbgrader.api import Gradebook, MissingEntry

    if course.db_url.startswith("sqlite:") and not course.gradebook.is_file():
        return None
    with Gradebook(course.db_url) as book:
        try:
            due = book.find_assignment(lab).duedate
        except MissingEntry:
            return None
    return due.replace(tzinfo=UTC) if due else None


def _stamp(folder: Path) -> int | None:
    from effnlp_grading.times import read_time

    path = folder / "timestamp.txt"
    return _seconds(read_time(path.read_text("utf-8", errors="replace"))) if path.is_file() else None


def _lines(path: Path) -> set[str]:
    return set(path.read_text("utf-8").split()) if path.is_file() else set()


def _seconds(when: datetime | None) -> int | None:
    return int(when.timestamp()) if when else None


def _keep(path: Path, data: bytes) -> None:
    """Write a file unless it is there already, with the same bytes."""
    if not (path.is_file() and path.read_bytes() == data):
        _write(path, data)


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    other = path.with_name(f".{path.name}.{os.getpid()}")
    other.write_bytes(data)
    other.replace(path)
