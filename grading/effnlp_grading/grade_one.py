"""Grade one submission and write its feedback page, in a process of its own: `python grade_one.py COURSE LAB STUDENT`.

What nbgrader says goes to the standard streams. Exits with 0 when the submission is graded, else with 1.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path


def main(course: str, lab: str, student: str) -> int:
    from nbgrader.converters import Autograde, GenerateFeedback
    from nbgrader.converters.base import NbGraderException
    from nbgrader.coursedir import CourseDirectory
    from traitlets.config.loader import PyFileConfigLoader

    logging.basicConfig(level=logging.WARNING, format="[%(levelname)s] %(message)s")
    config = PyFileConfigLoader("nbgrader_config.py", path=str(Path(course) / "grading")).load_config()
    folder = CourseDirectory(config=config)
    folder.assignment_id, folder.student_id = lab, student
    if folder.db_url.startswith("sqlite:"):
        folder.db_url += "?timeout=120"  # others write to the same gradebook: wait for them
    for step in (Autograde, GenerateFeedback):
        try:
            step(coursedir=folder, config=config, force=True).start()
        except NbGraderException as error:
            print(error)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
