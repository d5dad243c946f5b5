"""When a site may work, and how many bytes it may move: ``--hours`` and ``--data-cap``, parsed.

Local time, as its owner reads it off the wall: that of the time zone of ``now``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta

from swarmtrain_protocols.errors import ConfigError

DAY = timedelta(days=1)

_CLOCK = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)\Z")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?B)/(day|week|month)\Z")
_SCALE = {"": 0, "k": 1, "M": 2, "G": 3, "T": 4}


def _minutes(text: str) -> int | None:
    match = _CLOCK.match(text.strip())
    return None if match is None else 60 * int(match[1]) + int(match[2])


def _midnight(now: datetime) -> datetime:
    return now.replace(hour=0, minute=0, second=0, microsecond=0)


@dataclass(frozen=True, slots=True)
class Hours:
    """Windows of a day in minutes since midnight, (begin, end); an end below its begin is after
    midnight. None: always.
    """

    windows: tuple[tuple[int, int], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Hours:
        """From ``22:00-06:00`` or several, comma separated; empty: always.

        Raises:
            ConfigError: anything else.
        """
        windows = []
        for part in text.split(",") if text.strip() else []:
            begin, dash, end = part.partition("-")
            times = _minutes(begin), _minutes(end)
            if not dash or times[0] is None or times[1] is None or times[0] == times[1]:
                todo = "write 22:00-06:00, or several with commas between them"
                raise ConfigError(f"hours = {text!r:.80}", "not windows of a day", todo)
            windows.append((times[0], times[1]))
        return cls(tuple(windows))

    def is_open(self, now: datetime) -> bool:
        """Whether ``now`` lies in a window; its begin does, its end does not."""
        at = 60 * now.hour + now.minute
        inside = (
            begin <= at < end if begin < end else at >= begin or at < end
            for begin, end in self.windows
        )
        return not self.windows or any(inside)

    def opens_at(self, now: datetime) -> datetime:
        """``now`` if a window is open, else when the next one begins."""
        if self.is_open(now):
            return now
        midnight = _midnight(now)
        begins = [midnight + timedelta(minutes=begin) for begin, _ in self.windows]
        return min(begin if begin > now else begin + DAY for begin in begins)


@dataclass(frozen=True, slots=True)
class DataCap:
    """Bytes that may go over all links of a site, both ways, per ``period``; 0: any number."""

    nbytes: int = 0
    period: str = "month"

    @classmethod
    def parse(cls, text: str) -> DataCap:
        """From ``50GB/month``, ``2GB/day`` or ``500MiB/week``; empty: no cap.

        Raises:
            ConfigError: anything else.
        """
        if not text.strip():
            return cls()
        match = _SIZE.match(text.strip())
        nbytes = 0
        if match is not None:
            base = 1024 if match[3] == "iB" else 1000
            nbytes = int(float(match[1]) * base ** _SCALE[match[2]])
        if match is None or not nbytes:
            todo = "write 50GB/month, 10GB/week or 2GB/day"
            raise ConfigError(f"data_cap = {text!r:.80}", "not a size per day, week or month", todo)
        return cls(nbytes, match[4])

    def begins(self, now: datetime) -> datetime:
        """When the period of ``now`` began: midnight, of Monday, of the first of the month."""
        midnight = _midnight(now)
        if self.period == "week":
            return midnight - timedelta(days=midnight.weekday())
        return midnight.replace(day=1) if self.period == "month" else midnight

    def ends(self, now: datetime) -> datetime:
        """When the next period begins."""
        days = {"day": 1, "week": 7, "month": 32}[self.period]
        return self.begins(self.begins(now) + timedelta(days=days))
