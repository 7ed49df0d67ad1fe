"""How a released lab begins: a badge that opens it in Colab, and a first cell that sees to it that the kit is there.

In pyproject.toml at the course's root, the repository that students open labs from:

[tool.effnlp]
repository = "https://github.com/OWNER/NAME"      # or "", for none
branch = "main"
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from effnlp_lab.errors import UsageError
from effnlp_lab.settings import settings_of

BADGE, FIRST = "open-in-colab", "the-kit"  # the ids of the two cells
COLAB = "https://colab.research.google.com"
_ADDRESS = re.compile(r"https://[\w.~:/-]+")
_GITHUB = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?")

# Names of the cell stay inside its function: what a student writes must not lean on a cell that grading does not run.
_SOURCE = '''\
# Run this cell first. It says what this machine can do; on Colab it installs the course's kit before that.
def find_the_kit():
    import importlib.metadata
    import importlib.util
    import subprocess
    import sys
    import tempfile
    from pathlib import Path

    if importlib.util.find_spec("effnlp_lab"):
        return
    if "google.colab" not in sys.modules:
        raise ImportError(
{elsewhere})
    # Colab's own versions of these fit its driver and each other: pip has to keep them.
    here = {{each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}}
    kept = [f"{{name}}=={{here[name]}}" for name in ("torch", "triton", "numpy") if name in here]
    print("Installing the course's kit (a minute or two) ...")
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "kept.txt")
        constraints.write_text("\\n".join(kept))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
        done = subprocess.run([*pip, {requirement}], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-2000:])
        raise ImportError("pip could not install the course's kit: its words stand above. It has to keep "
                          + ", ".join(kept))
    importlib.invalidate_caches()


find_the_kit()
import effnlp_lab

effnlp_lab.ready()'''
_WITHOUT_ADDRESS = '''\
# Run this cell first. It says what this machine can do.
def find_the_kit():
    import importlib.util
    import sys

    if importlib.util.find_spec("effnlp_lab"):
        return
    if "google.colab" in sys.modules:
        raise ImportError(
{colab})
    raise ImportError(
{elsewhere})


find_the_kit()
import effnlp_lab

effnlp_lab.ready()'''


@dataclass(frozen=True)
class Repository:
    """Where students open labs from: an https address ("" for nowhere) and a branch."""

    address: str = ""
    branch: str = "main"

    def badge(self, path: str) -> str:
        """Markdown of a link that opens the notebook at `path` in Colab; "" where Colab cannot, off GitHub."""
        found = _GITHUB.fullmatch(self.address)
        if not found:
            return ""
        return (f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]"
                f"({COLAB}/github/{found.group(1)}/blob/{self.branch}/{path})")  # fmt: skip


def repository_of(root: Path) -> Repository:
    """The setting of the course at `root`. Raises UsageError for what is no https address or no branch."""
    settings = settings_of(root)
    address, branch = settings.get("repository", ""), settings.get("branch", "main")
    if not isinstance(address, str) or (address and not _ADDRESS.fullmatch(address)):
        raise UsageError(f"{root / 'pyproject.toml'}: repository = {address!r} is no address: expected "
                         '"https://github.com/OWNER/NAME", or "" for none.')  # fmt: skip
    if not isinstance(branch, str) or not re.fullmatch(r"[\w./-]+", branch):
        raise UsageError(f"{root / 'pyproject.toml'}: branch = {branch!r} is no branch's name: expected \"main\", say.")
    return Repository(address.rstrip("/"), branch)


def open_anywhere(notebook: NotebookNode, root: Path, path: str) -> NotebookNode:
    """Put both cells into the release at `path` of the course at `root`: the badge on top, the other before all code.

    The first cell is tagged as a demo: grading does not run it.
    """
    repository = repository_of(root)
    place = next((n for n, cell in enumerate(notebook.cells) if cell.cell_type == "code"), len(notebook.cells))
    first = nbformat.v4.new_code_cell(first_source(repository), id=FIRST, metadata=NotebookNode(tags=["demo"]))
    notebook.cells.insert(place, first)
    if badge := repository.badge(path):
        notebook.cells.insert(0, nbformat.v4.new_markdown_cell(badge, id=BADGE))
    return notebook


def first_source(repository: Repository) -> str:
    """The first code cell of every released lab."""
    fetch = f"git clone {repository.address}, then in its folder" if repository.address else "in the course's folder"
    elsewhere = (f"The course's kit is not installed here. In a terminal: {fetch} "
                 "run pip install -c constraints.txt -e '.[notebooks]'; then restart this kernel.")  # fmt: skip
    if repository.address:
        requirement = f'"git+{repository.address}@{repository.branch}"'
        return _SOURCE.format(elsewhere=_spelled(elsewhere), requirement=requirement)
    colab = ("The course's kit is not installed here, and the course names no repository to install it from: ask for "
             "its address A, run %pip install git+A, then this cell again.")  # fmt: skip
    return _WITHOUT_ADDRESS.format(elsewhere=_spelled(elsewhere), colab=_spelled(colab))


def _spelled(text: str) -> str:
    """A text without quotation marks and backslashes as Python spells it, in lines of which none is long."""
    lines = textwrap.wrap(text, 100, drop_whitespace=False, break_long_words=False, break_on_hyphens=False)
    return "\n".join(f'            "{line}"' for line in lines)
