"""Pseudonyms: names for students that only who has the course's key can trace back, the same in every report."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Iterable

from effnlp_grading.course import Course
from effnlp_grading.records import key_of
from effnlp_grading.roster import roster_of


class Pseudonyms:
    """The pseudonyms of a course: a keyed hash (HMAC-SHA256) of each id. `people` adds names to what `hide` knows."""

    def __init__(self, key: bytes, people: Iterable[tuple[str, ...]] = ()) -> None:
        self._key = key
        self._known = {word: self.of(student[0]) for student in people for word in student if word}

    @classmethod
    def of_course(cls, course: Course) -> Pseudonyms:
        """With the key in grading/pseudonym_key, made when there is none, and the roster's names and addresses."""
        people = [(one.id, one.name, one.spoken, one.sortable, one.email) for one in roster_of(course)]
        return cls(key_of(course.root / "grading", "pseudonym_key"), people)

    def of(self, student: str) -> str:
        """Such as p-7k2mq4zc."""
        told = hmac.new(self._key, student.encode(), hashlib.sha256).digest()
        return f"p-{base64.b32encode(told)[:8].decode().lower()}"

    def hide(self, text: str, students: Iterable[str] = ()) -> str:
        """A sentence with pseudonyms for the ids, names and addresses of students."""
        known = self._known | {student: self.of(student) for student in students}
        for word in sorted(known, key=len, reverse=True):
            text = re.sub(rf"(?<![\w.@-]){re.escape(word)}(?![\w@-])", known[word], text)
        return text
