"""Bytes counted into the periods of a data cap, and whether a site may work now.

A site that may not, because it is outside its hours or its data cap is used, leaves politely after
the round and comes back by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec

from swarmtrain_peer.allowance import DataCap, Hours
from swarmtrain_peer.events import EventLog
from swarmtrain_peer.site import Site, write_private
from swarmtrain_protocols.errors import CheckpointError, ConfigError, DiskFull

NEAR_SHARE = 0.8
"""Of a data cap: from there on people are told."""
RESERVE_SHARE = 0.01
"""Of a data cap: kept for leaving, at least."""
SAVE_SHARE = 0.005
"""Of a data cap: a process that is killed forgets no more than this."""
ROUNDS_KEPT = 8


class Used(msgspec.Struct):
    """What one period has taken so far; kept in the site's ``traffic.json``."""

    begins: str = ""
    """The day on which it began."""
    nbytes: int = 0
    told: bool = False
    """People were told that it is near."""
    spent: bool = False
    """The next round might not fit: nothing more in this period."""


class Meter:
    """Counts bytes of all links into periods, across restarts. Not thread-safe."""

    def __init__(self, path: Path, cap: DataCap) -> None:
        self.cap = cap
        self._path = path
        self.used = self._load()
        self._total = 0
        self._saved_bytes = self.used.nbytes
        self._at_round: int | None = None
        self._rounds: list[int] = []

    def _load(self) -> Used:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Used)
        except FileNotFoundError:
            return Used()
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            why = f"{error}: how much of the data cap is used is not known"
            raise ConfigError(str(self._path), why, "remove the file") from None

    def count(self, now: datetime, total_bytes: int) -> None:
        """This process has moved ``total_bytes`` so far, at ``now``."""
        begins = self.cap.begins(now).date().isoformat()
        if begins > self.used.begins:  # never back: a clock that is set back renews no cap
            self.used = Used(begins)
            self._saved_bytes = 0
        self.used.nbytes += total_bytes - self._total
        self._total = total_bytes

    def round_done(self) -> None:
        """A round is over: what was counted since the one before is what one takes."""
        if self._at_round is not None:
            self._rounds = [*self._rounds, self._total - self._at_round][-ROUNDS_KEPT:]
        self._at_round = self._total

    @property
    def reserve_bytes(self) -> int:
        """What is left for the round that is under way and for leaving."""
        return max(int(RESERVE_SHARE * self.cap.nbytes), max(self._rounds, default=0))

    def is_near(self) -> bool:
        """True once per period, when most of the cap is used."""
        if not self.cap.nbytes or self.used.told:
            return False
        self.used.told = self.used.nbytes >= NEAR_SHARE * self.cap.nbytes
        return self.used.told

    def is_spent(self) -> bool:
        """Whether another round might not fit; it stays so for the period."""
        if self.cap.nbytes and self.used.nbytes + self.reserve_bytes >= self.cap.nbytes:
            self.used.spent = True
        return bool(self.cap.nbytes) and self.used.spent

    def due(self) -> bool:
        """Whether enough was counted since the last save."""
        return self.used.nbytes - self._saved_bytes >= SAVE_SHARE * self.cap.nbytes

    def save(self) -> None:
        """Write what is used; a full disk raises ``DiskFull``."""
        write_private(self._path, msgspec.json.encode(self.used))
        self._saved_bytes = self.used.nbytes


@dataclass(frozen=True, slots=True)
class Rest:
    """A site does not work now, and until when."""

    reason: str
    until: datetime

    @property
    def sentence(self) -> str:
        return f"{self.reason}: resting until {self.until:%Y-%m-%d %H:%M}"


def resting(hours: Hours, meter: Meter, now: datetime) -> Rest | None:
    """Whether a site may not work at ``now``; it counts nothing."""
    cap, used = meter.cap, meter.used
    if cap.nbytes and used.spent and used.begins == cap.begins(now).date().isoformat():
        return Rest(f"the data cap of this {cap.period} is used", hours.opens_at(cap.ends(now)))
    if not hours.is_open(now):
        return Rest("outside its hours", hours.opens_at(now))
    return None


def rest_of(site: Site, now: datetime) -> Rest | None:
    """As ``resting``, of the settings and files of ``site``.

    Raises:
        ConfigError: one of them is damaged.
    """
    config = site.config()
    meter = Meter(site.traffic_path, DataCap.parse(config.data_cap))
    return resting(Hours.parse(config.hours), meter, now)


class Watch:
    """One process's eye on its hours and its data cap; it is told the time and the bytes."""

    def __init__(self, site: Site, events: EventLog) -> None:
        config = site.config()
        self._hours = Hours.parse(config.hours)
        self._meter = Meter(site.traffic_path, DataCap.parse(config.data_cap))
        self._events = events

    def look(self, now: datetime, total_bytes: int) -> Rest | None:
        """Count, tell what there is to tell; a ``Rest`` says that it is time to leave."""
        meter = self._meter
        meter.count(now, total_bytes)
        figures = {
            "used_bytes": meter.used.nbytes,
            "cap_bytes": meter.cap.nbytes,
            "period": meter.cap.period,
        }
        if meter.is_near():
            self._events.emit("data_cap_near", **figures)
        before = meter.used.spent
        if meter.is_spent() and not before:
            self._events.emit("data_cap_reached", **figures)
            self.save()
        elif meter.due():
            self.save()
        return resting(self._hours, meter, now)

    def round_done(self) -> None:
        """A round of the run is over."""
        self._meter.round_done()

    def ended(self, now: datetime, total_bytes: int) -> None:
        """The process is about to end: its last bytes are counted, too."""
        self._meter.count(now, total_bytes)
        self.save()

    def save(self) -> None:
        """Make what is used outlive the process, where there is a cap."""
        if not self._meter.cap.nbytes:
            return
        try:
            self._meter.save()
        except (DiskFull, CheckpointError) as error:
            self._events.emit("disk_full", what="traffic", reason=str(error))
