"""tests/mutants/NN_name.toml: the mutants that no check can reject, because they do what the solution does.

[[equivalent]]
id = "count_pairs:3:const-plus:1"
reason = "why its outputs are the solution's on every input"
change = "the change as `effnlp mutate` prints it"    # optional: notices an id that has come to mean another change
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from effnlp_lab.errors import UsageError
from effnlp_lab.mutation.make import Mutant


@dataclass(frozen=True)
class Equivalent:
    """One entry of the list."""

    id: str
    reason: str
    change: str | None = None


def read_listing(path: Path) -> dict[str, Equivalent]:
    """The entries by id; none where there is no file. Raises UsageError for anything that is not such a list."""
    if not path.exists():
        return {}
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path.name} is not TOML: {error}.") from error
    entries = content.pop("equivalent", [])
    if content:
        raise UsageError(f"{path.name} has {sorted(content)[0]!r}: expected [[equivalent]] entries alone.")
    found: dict[str, Equivalent] = {}
    for entry in entries:
        wrong = set(entry) - {"id", "reason", "change"}
        if wrong or not str(entry.get("id", "")).strip() or not str(entry.get("reason", "")).strip():
            raise UsageError(f"{path.name}: the entry {entry!r} needs an id and a reason, and may have a change.")
        one = Equivalent(**entry)
        if one.id in found:
            raise UsageError(f"{path.name} lists {one.id} twice: keep one.")
        found[one.id] = one
    return found


def unfit(
    listed: Mapping[str, Equivalent], mutants: Iterable[Mutant], exercises: Iterable[str], everywhere: Iterable[str]
) -> list[str]:
    """A sentence for each entry that names no mutant, or one that is another change by now.

    `mutants` are those of `exercises`; entries of the lab's other exercises (`everywhere`) are left alone.
    """
    known = {mutant.id: mutant for mutant in mutants}
    looked, all_names = set(exercises), set(everywhere)
    sentences = []
    for one in listed.values():
        exercise = one.id.partition(":")[0]
        if exercise in all_names and exercise not in looked:
            continue
        if one.id not in known:
            sentences.append(f"{one.id} is listed as equivalent, and there is no such mutant: did the solution change?")
        elif one.change is not None and one.change != known[one.id].change:
            sentences.append(f"{one.id} is listed as the change {one.change!r}, and is now {known[one.id].change!r}.")
    return sentences
