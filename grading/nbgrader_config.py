"""nbgrader's configuration of the course. It holds for commands typed at the root of the course and in grading/.

The folders: masters and solved notebooks in solutions/, releases in labs/, and everything about students (submissions,
graded notebooks, feedback, the gradebook) under grading/, which git ignores. The course is the folder above this one,
wherever this file is copied to.
"""

import os
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

c = get_config()  # noqa: F821  (traitlets puts it here)

GRADING = Path(__file__).resolve().parent
COURSE = GRADING.parent


def _first_in(variable: str, folder: Path) -> None:
    """Put a folder first in a search path of the environment, which nbgrader's kernels and commands inherit."""
    folders = [f for f in os.environ.get(variable, "").split(os.pathsep) if f]
    if str(folder) not in folders:
        os.environ[variable] = os.pathsep.join([str(folder), *folders])


# nbgrader calls `alembic` by its name, kernels import effnlp_lab, and nbgrader imports effnlp_grading: all three work
# without an activated environment or an installed package.
_first_in("PATH", Path(sys.executable).parent)
_checkout = next((folder for folder in GRADING.parents if (folder / "effnlp_lab" / "__init__.py").is_file()), None)
if _checkout:
    _first_in("PYTHONPATH", _checkout)
elif find_spec("effnlp_lab"):  # a course outside the checkout: the package is on the path
    _checkout = Path(find_spec("effnlp_lab").origin).parents[1]
if _checkout:
    sys.path += [str(folder) for folder in (_checkout, _checkout / "grading") if str(folder) not in sys.path]

# nbgrader 0.9 under SQLAlchemy 2.1 says this at every submission; nothing is lost.
warnings.filterwarnings("ignore", message="Object of type <Submitted.* not in session")

c.CourseDirectory.root = str(COURSE)
c.CourseDirectory.course_id = "efficient_nlp"
c.CourseDirectory.source_directory = "solutions"
c.CourseDirectory.release_directory = "labs"
c.CourseDirectory.submitted_directory = "grading/submitted"
c.CourseDirectory.autograded_directory = "grading/autograded"
c.CourseDirectory.feedback_directory = "grading/feedback"
c.CourseDirectory.solution_directory = "grading/solution"
c.CourseDirectory.source_with_tests_directory = "grading/source_with_tests"
c.ZipCollectApp.downloaded_directory = "grading/downloaded"
c.CourseDirectory.db_url = os.environ.get("EFFNLP_GRADEBOOK") or f"sqlite:///{GRADING / 'gradebook.db'}"
c.ExportPlugin.to = str(GRADING / "grades.csv")

# nbgrader copies what lies beside a solved notebook into the release: masters, answers and receipts stay here.
c.CourseDirectory.ignore = [
    ".ipynb_checkpoints", "__pycache__", "*.pyc", "feedback", "receipts", "*.py", "*.toml", "*.json", "*.jsonl",
    "*.log", "*.html", "*.png", "*.svg",
]

# The release is generated: making it again replaces it. The stub is effnlp_lab.blanks.STUB (a test compares them;
# importing it here would import torch at every command).
c.GenerateAssignment.force = True
c.ClearSolutions.code_stub = {"python": 'raise NotImplementedError("your answer goes here")'}
c.ClearSolutions.text_stub = "*Write your answer here.*"
c.OpenAnywhere.course = str(COURSE if (COURSE / "pyproject.toml").is_file() else _checkout or COURSE)
c.GenerateAssignment.preprocessors = [
    "nbgrader.preprocessors.IncludeHeaderFooter",
    "nbgrader.preprocessors.InstantiateTests",
    "nbgrader.preprocessors.LockCells",
    "nbgrader.preprocessors.ClearSolutions",
    "nbgrader.preprocessors.ClearOutput",
    "nbgrader.preprocessors.CheckCellMetadata",
    "nbgrader.preprocessors.ComputeChecksums",
    "nbgrader.preprocessors.SaveCells",
    "nbgrader.preprocessors.ClearHiddenTests",
    "nbgrader.preprocessors.ClearMarkScheme",
    "nbgrader.preprocessors.ComputeChecksums",
    "nbgrader.preprocessors.CheckCellMetadata",
    "effnlp_grading.opening.OpenAnywhere",  # the badge and the first cell, as `effnlp build` has them
]

# Nothing of a submission runs in this process or in a kernel: the proctor runs its cells in a sandbox, judges its
# answers here, and writes verdict and report into each check's cell, which are then read strictly. Cells tagged `demo`
# are not run. `c.GradeInProctor.sandbox = False` (or EFFNLP_SANDBOX=0) grades without a sandbox: students' code can
# then do all that you can.
c.RepairFromRelease.course = str(COURSE)
c.GradeInProctor.course = str(COURSE)
c.ExecutePreprocessor.skip_cells_with_tag = "demo"
c.GenerateFeedback.exporter_class = "effnlp_grading.feedback.FeedbackExporter"
c.LimitOutput.max_lines = 300
c.LimitOutput.max_traceback = 60
c.Autograde.sanitize_preprocessors = [
    "effnlp_grading.preprocessors.RepairFromRelease",
    "nbgrader.preprocessors.ClearOutput",
    "nbgrader.preprocessors.DeduplicateIds",
    "nbgrader.preprocessors.OverwriteKernelspec",
    "nbgrader.preprocessors.OverwriteCells",
    "nbgrader.preprocessors.CheckCellMetadata",
]
c.Autograde.autograde_preprocessors = [
    "effnlp_grading.preprocessors.GradeInProctor",
    "effnlp_grading.verdicts.ReadVerdicts",
    "nbgrader.preprocessors.IgnorePattern",
    "nbconvert.preprocessors.ClearMetadataPreprocessor",
    "nbgrader.preprocessors.LimitOutput",
    "nbgrader.preprocessors.SaveAutoGrades",
    "nbgrader.preprocessors.AssignLatePenalties",
    "nbgrader.preprocessors.CheckCellMetadata",
]

# Late days: each student has so many in the course; a day beyond costs this share of a lab's points. Nothing is late
# in a lab without a due date (`nbgrader db assignment add LAB --duedate "2026-10-01 23:59 CET"`).
c.AssignLatePenalties.plugin_class = "effnlp_grading.late.LateDays"
c.LateDays.budget = 3
c.LateDays.per_day = 0.1
c.LateDays.grace_minutes = 15

# How labs go out and come in on a JupyterHub: nbgrader's exchange, a folder that all users share, or ngshare, a service
# for a hub without one (`pip install ngshare_exchange`; EFFNLP_NGSHARE is its address, or `auto` on Kubernetes).
if os.environ.get("EFFNLP_EXCHANGE"):
    c.Exchange.root = os.environ["EFFNLP_EXCHANGE"]
if os.environ.get("EFFNLP_NGSHARE"):
    try:
        from ngshare_exchange import configureExchange
    except ImportError as error:
        from effnlp_lab.errors import UsageError

        raise UsageError("EFFNLP_NGSHARE is set and ngshare_exchange is not installed: `pip install ngshare_exchange`."
                         ) from error
    address = os.environ["EFFNLP_NGSHARE"]
    configureExchange(c, None if address == "auto" else address)

# A check that was deleted from a submission is put back, so that it is graded like the others.
c.OverwriteCells.add_missing_cells = True
