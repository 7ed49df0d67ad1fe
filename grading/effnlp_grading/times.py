"""Times of hand-ins: read in the course's time zone, kept in UTC.

EFFNLP_TIMEZONE names the zone (such as Europe/Berlin) of dates that come without one; this machine's, where it is not
set.
"""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime, tzinfo

from effnlp_lab.errors import UsageError

_RUN_TOGETHER = re.compile(r"\b(\d{1,2})(\d{2})\s*([ap])\.?m\b\.?", re.IGNORECASE)
_RUN_TOGETHER_24 = re.compile(r"(?<=\d{4} )(\d{2})(\d{2})$")


def zone() -> tzinfo:
    """The course's time zone. Raises UsageError for a name that no zone has."""
    from dateutil.tz import gettz, tzlocal

    name = os.environ.get("EFFNLP_TIMEZONE", "").strip()
    if not name:
        return tzlocal()
    found = gettz(name)
    if found is None:
        raise UsageError(f"EFFNLP_TIMEZONE is {name!r}, which is no time zone: expected a name such as Europe/Berlin.")
    return found


def read_time(text: str) -> datetime | None:
    """A date and time as a learning platform or a person writes it, in UTC; None for what is no date.

    File names have no colons: `926 PM` is 9:26 PM.
    """
    from dateutil import parser

    text = _RUN_TOGETHER.sub(r"\1:\2 \3m", text.strip())
    text = _RUN_TOGETHER_24.sub(r"\1:\2", text)
    if not re.search(r"\d{4}", text):
        return None
    try:
        found = parser.parse(text, default=datetime(2000, 1, 1), tzinfos={"UTC": UTC})
    except (ValueError, OverflowError):
        return None
    return in_utc(found)


def in_utc(when: datetime) -> datetime:
    """The same moment in UTC, to the second; a time without a zone is the course's."""
    return (when if when.tzinfo else when.replace(tzinfo=zone())).astimezone(UTC).replace(microsecond=0)


def as_stored(when: datetime) -> str:
    """As nbgrader's timestamp.txt has it."""
    return f"{when.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
