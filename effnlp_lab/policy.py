"""What a lab says on coding assistants: one of three policies, from one setting of the course.

In pyproject.toml at the course's root, for all labs or one by one:

[tool.effnlp]
assistants = "explain"                                       # "none", "explain" or "disclose"
assistants = { default = "explain", 01_tokenization = "none" }
"""

from __future__ import annotations

from pathlib import Path

from effnlp_lab.errors import UsageError
from effnlp_lab.settings import settings_of

PLACE = "{assistants}"  # where a master's prose states the policy
DEFAULT = "explain"
POLICIES = {
    "none": (
        "**Coding assistants: none.** Please work on this lab without one, completion in your editor included. Your "
        "course, your group and the documentation may explain whatever you like; the lines are yours."
    ),
    "explain": (
        "**Coding assistants: to explain, not to write.** You may ask one to explain a concept, an equation, an error "
        "message, a function or a line of the given code, and to make plots prettier. Please write the blanks "
        "yourself, and let no assistant see them before their checks pass."
    ),
    "disclose": (
        "**Coding assistants: allowed, and disclosed.** You may use one for anything in this lab. Add a cell at the "
        "end that says which one, for which blanks, and what you changed in what it gave you. You answer for every "
        "line that you hand in, and may be asked to explain it."
    ),
}


def policy_of(root: Path, lab: str) -> str:
    """The policy of a lab in the course at `root`. Raises UsageError for a setting that names none of the three."""
    chosen = settings_of(root).get("assistants", DEFAULT)
    if isinstance(chosen, dict):
        chosen = chosen.get(lab, chosen.get("default", DEFAULT))
    if chosen not in POLICIES:
        raise UsageError(f"{root / 'pyproject.toml'}: assistants = {chosen!r} is no policy on coding assistants: "
                         f"expected {', '.join(POLICIES)}.")
    return chosen


def stated(prose: str, policy: str) -> str:
    """Prose with the policy in its place."""
    return prose.replace(PLACE, POLICIES[policy])
