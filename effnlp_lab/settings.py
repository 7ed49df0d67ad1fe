"""What a course sets for itself: the table [tool.effnlp] of pyproject.toml at its root."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from effnlp_lab.errors import UsageError


def settings_of(root: Path) -> dict[str, Any]:
    """The settings of the course at `root`, {} where it has none. Raises UsageError for a file that is not TOML."""
    path = root / "pyproject.toml"
    try:
        tool = tomllib.loads(path.read_text("utf-8")).get("tool", {}) if path.is_file() else {}
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}.") from error
    return tool.get("effnlp", {})
