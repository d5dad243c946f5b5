"""The time of one peer process: one that stands still with it, and one that is the run's.

Cores measure silence and deadlines in ``now``. A laptop that sleeps, or a process that is stopped,
would wake up to find everybody silent for minutes, and say so. So time in which this process did
not run is no time for its cores: whatever they wait for gets the rest of its time. Expiries go by
wall clocks, which run on; see ``wallclock``.
"""

from __future__ import annotations

from collections.abc import Callable

from swarmtrain_peer import host
from swarmtrain_peer.events import EventLog
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.silence import ASLEEP_S
from swarmtrain_protocols.wallclock import WallClock

SET_S_MIN = 1.0
"""A wall clock that jumps by more than this was set."""
TOLD_S = 60.0
"""A clock that is off by about as much as was told is not told again."""


class Timekeeper:
    """``look`` is to be called several times a second once the process serves.

    ``changed`` hears (now, wall clock) whenever the run's wall clock is another than before.
    """

    def __init__(
        self,
        events: EventLog,
        *,
        mono_s: Callable[[], float] = host.mono_s,
        wall_s: Callable[[], float] = host.wall_s,
    ) -> None:
        self._events = events
        self._mono_s = mono_s
        self._wall_s = wall_s
        self._watched = False
        self._seen_s = mono_s()
        self._slept_s = 0.0
        self._untold_s = 0.0
        self._told_off_s = 0.0
        self.changed: Callable[[float, float], object] = lambda now, wall_s: None
        self.wall = WallClock(self._seen_s, wall_s())
        self._said_s = self.wall.wall_s(self._seen_s) - self._seen_s

    def now(self) -> float:
        """Monotonic seconds in which this process ran."""
        seen_s = self._mono_s()
        gap_s, self._seen_s = seen_s - self._seen_s, seen_s
        if self._watched and gap_s > ASLEEP_S:
            self._slept_s += gap_s
            self._untold_s += gap_s
            self.wall.slept(gap_s)
        return seen_s - self._slept_s

    def wall_s(self) -> float:
        """The run's wall clock, Unix seconds."""
        return self.wall.wall_s(self.now())

    def connected(self, peer: PeerId, wall_s: float) -> None:
        """A link is up, and its hello told the other side's clock."""
        self.wall.told(self.now(), peer, wall_s)

    def disconnected(self, peer: PeerId) -> None:
        self.wall.forget(peer)

    def look(self) -> float:
        """Notice what has happened to the clocks; returns ``now``."""
        now = self.now()
        self._watched = True
        if self._untold_s:
            self._events.emit("stood_still", slept_s=round(self._untold_s, 3))
            self._untold_s = 0.0
        own_s = self._wall_s()
        if abs(self.wall.wall_s(now) - self.wall.off_s - own_s) > SET_S_MIN:
            self.wall.anchored(now, own_s)
        off_s = self.wall.off_s
        if abs(off_s - self._told_off_s) > TOLD_S or (self._told_off_s and not off_s):
            self._told_off_s = off_s
            self._events.emit("clock_off", off_s=round(off_s, 1))
        offset_s = self.wall.wall_s(now) - now
        if abs(offset_s - self._said_s) > SET_S_MIN:
            self._said_s = offset_s
            self.changed(now, now + offset_s)
        return now
