"""The clocks of one simulated machine: a monotonic one and a wall clock, as wrong as can be."""

from __future__ import annotations

from swarmtrain_protocols.testing.draws import Stream

OFFSET_S_MAX = 1e5
DRIFT_MAX = 2e-4
WALL_START_S = 1_800_000_000.0
WALL_SKEW_S_MAX = 20.0


class HostClock:
    """Both clocks as functions of the world's time; the monotonic one never goes back."""

    def __init__(self, luck: Stream) -> None:
        self._local_s = luck.between(0.0, OFFSET_S_MAX)
        self._usual = 1.0 + luck.between(-DRIFT_MAX, DRIFT_MAX)
        self._wall_skew_s = luck.between(-WALL_SKEW_S_MAX, WALL_SKEW_S_MAX)
        self._world_s = 0.0
        self._rate = self._usual
        self._last_s = 0.0

    def local_s(self, world_s: float) -> float:
        """The monotonic clock; each machine has its own zero and drift."""
        self._last_s = max(self._last_s, self._at(world_s))
        return self._last_s

    def reach(self, local_s: float) -> None:
        """A timer for ``local_s`` fires now: the clock shows at least that."""
        self._last_s = max(self._last_s, local_s)

    def world_s(self, local_s: float) -> float:
        """When the monotonic clock will show ``local_s``, if nothing happens to it."""
        return self._world_s + (local_s - self._local_s) / self._rate

    def wall_s(self, world_s: float) -> float:
        """The wall clock, Unix seconds."""
        return WALL_START_S + world_s + self._wall_skew_s

    def run_at(self, world_s: float, factor: float) -> None:
        """From now on ``factor`` times as fast as usual."""
        self._local_s, self._world_s = self._at(world_s), world_s
        self._rate = self._usual * factor

    def jump(self, seconds: float) -> None:
        """The monotonic clock moves ahead; by less than nothing: it stands still for that long."""
        self._local_s += seconds

    def set_wall(self, seconds: float) -> None:
        """Somebody, or a time server, sets the wall clock by so much."""
        self._wall_skew_s += seconds

    def _at(self, world_s: float) -> float:
        return self._local_s + (world_s - self._world_s) * self._rate
