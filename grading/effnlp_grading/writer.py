"""The one writer of a gradebook: takes what was judged through nbgrader's own steps, in this process."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from effnlp_grading.course import Course, last_words
from effnlp_grading.judging import Judged
from effnlp_grading.preprocessors import record_path
from effnlp_grading.records import Record
from effnlp_lab.errors import UsageError


class Writer:
    """Writes grades, graded notebooks and feedback pages of one course. Not for two threads or processes at a time."""

    def __init__(self, course: Course) -> None:
        from traitlets.config.loader import PyFileConfigLoader

        self.course = course
        self.config = PyFileConfigLoader("nbgrader_config.py", path=str(course.root / "grading")).load_config()
        if course.db_url.startswith("sqlite:"):
            self.config.CourseDirectory.db_url = f"{course.db_url}?timeout=120"

    def write(self, judged: Judged) -> str:
        """Put a submission's verdicts into the gradebook and write its pages; "" or why that failed."""
        path = record_path(self.course.root / "grading", judged.lab, judged.student)
        record = Record(path, judged.digest, {"student": judged.student})
        if record.done is None:  # judged where this folder cannot be seen
            for verdict in judged.verdicts.values():
                if verdict["exercise"] not in record.verdicts:
                    record.keep(verdict)
            for verdict in judged.predictions.values():
                if verdict["prediction"] not in record.predictions:
                    record.keep(verdict)
            record.finish(judged.done)
        return self.write_kept(judged.lab, judged.student)

    def write_kept(self, lab: str, student: str) -> str:
        """Put the verdicts that are on disk into the gradebook and write the pages; "" or why that failed."""
        return self._nbgrader(lab, student)

    def write_feedback(self, lab: str, student: str) -> str:
        """Write the feedback page again, from what the gradebook holds now; "" or why that failed."""
        from nbgrader.converters import GenerateFeedback

        return self._nbgrader(lab, student, (GenerateFeedback,))

    def _nbgrader(self, lab: str, student: str, steps: Sequence[type] = ()) -> str:
        from nbgrader.converters import Autograde, GenerateFeedback
        from nbgrader.converters.base import NbGraderException
        from nbgrader.coursedir import CourseDirectory

        log = self.course.log(student, lab)
        log.parent.mkdir(parents=True, exist_ok=True)
        self.course.feedback(student, lab).unlink(missing_ok=True)  # its presence says that grading came to its end
        logger = _logger(log)
        try:
            folder = CourseDirectory(config=self.config)
            folder.assignment_id, folder.student_id = lab, student
            for step in steps or (Autograde, GenerateFeedback):
                step(coursedir=folder, config=self.config, force=True, log=logger).start()
        except (NbGraderException, UsageError) as error:
            logger.error("%s", error)
            return last_words(log.read_text(errors="replace"))
        finally:
            for handler in logger.handlers[:]:
                handler.close()
                logger.removeHandler(handler)
        return ""


def _logger(path: Path) -> logging.Logger:
    logger = logging.Logger("effnlp.grading", logging.WARNING)
    handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("[%(levelname)s] %(message)s"))
    logger.addHandler(handler)
    return logger
