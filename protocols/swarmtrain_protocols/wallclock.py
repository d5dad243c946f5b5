"""What time it is for the run: this machine's wall clock, unless most others say it is off.

Nothing is ordered by wall clocks. They matter where something expires: records of the DHT, tickets.
A machine whose clock is off by hours would refuse everybody's records and be refused itself. So
each site tells its clock in the hello of a link, and a site goes by the median of all that it is
linked to and itself: a minority, however wrong or hostile, does not move it.
"""

from __future__ import annotations

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import PeerId

OFF_S_MIN = 30.0
"""Smaller differences are left alone: they are as long as it takes to make a link."""


class WallClock:
    """``now`` is the monotonic time of the cores, all else Unix seconds.

    Args:
        wall_s: this machine's wall clock at ``now``.
    """

    def __init__(self, now: float, wall_s: float) -> None:
        self._offset_s = wall_s - now
        self._theirs: dict[PeerId, float] = {}

    @property
    def off_s(self) -> float:
        """By how much this machine's clock is behind that of most others; 0: it is not off."""
        near = 1  # this machine itself
        for offset in self._theirs.values():
            near += abs(offset - self._offset_s) < OFF_S_MIN
        if 2 * near > len(self._theirs) + 1:
            return 0.0  # most are near, and the median is one of them
        differences = sorted([0.0, *(offset - self._offset_s for offset in self._theirs.values())])
        middle = differences[(len(differences) - 1) // 2 : len(differences) // 2 + 1]
        off_s = min(middle, key=abs)
        return off_s if abs(off_s) >= OFF_S_MIN else 0.0

    def wall_s(self, now: float) -> float:
        """The run's wall clock."""
        return now + self._offset_s + self.off_s

    def anchored(self, now: float, wall_s: float) -> None:
        """This machine's clock was read again: it may have been set, or have slept."""
        self._offset_s = wall_s - now

    def told(self, now: float, peer: PeerId, wall_s: float) -> None:
        """A peer has told its clock; 0: it has not."""
        self._theirs.pop(peer, None)
        if wall_s > 0:
            self._theirs[peer] = wall_s - now
        while len(self._theirs) > limits.MEMBERS_MAX:
            del self._theirs[next(iter(self._theirs))]

    def forget(self, peer: PeerId) -> None:
        self._theirs.pop(peer, None)

    def slept(self, seconds: float) -> None:
        """The monotonic time stood still for so long, and nobody else's clock did."""
        self._offset_s += seconds
        for peer in self._theirs:
            self._theirs[peer] += seconds
