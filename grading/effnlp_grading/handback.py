"""`effnlp return`: feedback for each student, in the shape in which a learning platform takes it back.

Each student gets the feedback page and the verdicts, with which `effnlp replay` shows every failing case again. The
names are those under which the platform handed the notebook out: it finds the student by them.

- Canvas ("Upload submissions"): a zip of files that begin with the notebook's `name_user_file_`.
- Moodle ("Upload multiple feedback files in a zip"): a zip of the students' folders.
- Brightspace ("Add feedback files"): a zip of the students' folders, with index.html.
"""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from effnlp_grading.collect import Attempt, attempts_folder, attempts_of
from effnlp_grading.course import Course
from effnlp_grading.lms import PLATFORMS, Worksheet
from effnlp_grading.preprocessors import record_path
from effnlp_grading.records import read_record
from effnlp_grading.roster import Roster, Student, Teams, roster_of, teams_of
from effnlp_lab.errors import UsageError

STAFF_ONLY = ("look", "sandbox")  # of a verdict


@dataclass
class Returned:
    """Files to upload, by platform ("" for a folder a student), students in them, and what a person should know."""

    files: dict[str, Path] = field(default_factory=dict)
    students: dict[str, list[str]] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)


def hand_back(course: Course, lab: str, out: Path, *, platform: str | None = None, worksheet: Path | None = None,
              roster: Path | None = None) -> Returned:
    """Write a lab's feedback under `out`: a zip for each platform that hand-ins came from, or for `platform` alone.

    Whoever has no hand-in of a platform gets a folder in OUT/by_hand/. worksheet: Moodle's grading worksheet, which
    tells the folders of team-mates who did not hand in themselves.
    """
    if platform not in (None, *PLATFORMS):
        raise UsageError(f"There is no platform {platform!r}: expected {', '.join(PLATFORMS)}.")
    people = roster_of(course, roster)
    giver = _Giver(course, lab, people, teams_of(course, people), Worksheet(worksheet) if worksheet else None)
    done = Returned()
    graded = [student for student in sorted(course.grades(lab)) if course.feedback(student, lab).is_file()]
    if not graded:
        raise UsageError(f"No submission of {lab} is graded: run `effnlp grade {lab}` first.")
    parcels: dict[str, dict[str, bytes]] = {}
    for student in graded:
        name, prefix = giver.address(student, platform)
        contents = giver.contents(student)
        if not name:
            prefix = f"{student}/"
            done.said.append(f"{student} has no hand-in of {platform or 'a platform'} to answer to: the feedback is in "
                             f"{out / 'by_hand' / student}.")
        parcels.setdefault(name, {}).update({f"{prefix}{file}": data for file, data in contents.items()})
        done.students.setdefault(name, []).append(student)
    if "brightspace" in parcels and (index := attempts_folder(course, lab) / "index.html").is_file():
        parcels["brightspace"]["index.html"] = index.read_bytes()
    for name, files in sorted(parcels.items()):
        done.files[name] = _write_zip(out / f"{lab}_{name}.zip", files) if name else _write_folder(
            out / "by_hand", files)
    return done


@dataclass
class _Giver:
    course: Course
    lab: str
    roster: Roster
    teams: Teams
    worksheet: Worksheet | None

    def address(self, student: str, platform: str | None) -> tuple[str, str]:
        """The platform that a student's feedback goes to, and what its name begins with there; ("", "") for none."""
        team = self.teams.of(student, self.lab)
        mine = [one for one in attempts_of(self.course, self.lab, student) if self._fits(one, platform)]
        if mine:
            return mine[-1].platform, _beginning(mine[-1])
        if (platform in (None, "moodle")) and self.worksheet and (row := self.worksheet.row_of(student, self.roster)):
            number = row.get("identifier", "").rpartition(" ")[2]
            if number.isdigit():
                name = row.get("full name") or self.roster.students.get(student, Student(student)).spoken
                return "moodle", f"{name.replace('_', ' ')}_{number}_assignsubmission_file/"
        for other in team.members if team else ():
            theirs = [one for one in attempts_of(self.course, self.lab, other) if self._fits(one, platform)]
            if theirs and self._is_groups(theirs[-1]):
                return theirs[-1].platform, _beginning(theirs[-1])
        return "", ""

    def _fits(self, one: Attempt, platform: str | None) -> bool:
        return bool(one.prefix) and platform in (None, one.platform)

    def _is_groups(self, one: Attempt) -> bool:
        """Whether the platform handed in for a group: its feedback reaches all of them."""
        name = Path(one.prefix.rstrip("/")).name.split("_")[0]
        return self.teams.named(name, self.lab) is not None

    def contents(self, student: str) -> dict[str, bytes]:
        """The files of one student: name -> bytes."""
        team = self.teams.of(student, self.lab)
        graded = team.first if team and not self.course.submission(student, self.lab).is_file() else student
        files = {f"feedback_{self.lab}.html": self.course.feedback(student, self.lab).read_bytes()}
        verdicts = read_record(record_path(self.course.root / "grading", self.lab, graded))
        if verdicts:
            lines = [json.dumps({name: value for name, value in one.items() if name not in STAFF_ONLY})
                     for one in verdicts]
            files[f"verdicts_{self.lab}.jsonl"] = ("\n".join(lines) + "\n").encode()
        return files


def _beginning(one: Attempt) -> str:
    return one.prefix if one.platform == "canvas" or one.prefix.endswith(("_", "- ", "/")) and not _is_folder(one) \
        else f"{one.prefix.rstrip('/')}/"


def _is_folder(one: Attempt) -> bool:
    """Whether the platform gave each student a folder."""
    return one.prefix in Path(one.path).parts[:-1]


def _write_zip(path: Path, files: dict[str, bytes]) -> Path:
    """A zip with these files; the same files make the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    other = path.with_name(f".{path.name}.{os.getpid()}")
    with zipfile.ZipFile(other, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name, (2000, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
    other.replace(path)
    return path


def _write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def summary(done: Returned) -> list[str]:
    """A line for each file to upload."""
    return [f"{name or 'by hand'}: {len(done.students[name])} students: {path}" for name, path in
            sorted(done.files.items())]


