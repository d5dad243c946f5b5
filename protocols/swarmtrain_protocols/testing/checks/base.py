"""Observers of a world: always, after healing, sometimes.

They see all hosts at once and are no part of any protocol. A checker that cannot fail is worthless:
each has a planted bug that it finds (``tests/mutants``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Host
    from swarmtrain_protocols.testing.world import World


class Checker:
    """Base of all checkers; a subclass overrides what it needs and calls ``world.violation``."""

    def always(self, world: World, host: Host) -> None:
        """After each call into ``host``'s node."""

    def emitted(self, world: World, host: Host, event: object) -> None:
        """``host``'s node has emitted ``event``."""

    def crashed(self, world: World, host: Host) -> None:
        """``host`` has just lost everything that was not durable."""

    def booted(self, world: World, host: Host) -> None:
        """``host`` has (re)started."""

    def healed(self, world: World) -> None:
        """All trouble is over; what was open must be decided within a bounded time."""

    def finish(self, world: World) -> None:
        """The run is over."""


class Always(Checker):
    """A predicate that must hold after each event; it returns what is wrong, or ''."""

    def __init__(self, kind: str, wrong: Callable[[World], str]) -> None:
        self._kind = kind
        self._wrong = wrong

    def always(self, world: World, host: Host) -> None:
        text = self._wrong(world)
        if text:
            world.violation(self._kind, text)


def settle_within(
    world: World, limit_s: float, done: Callable[[], bool], describe: Callable[[], str]
) -> float:
    """Heal the world now; ``done()`` must become true within ``limit_s``. Seconds it took.

    Raises:
        Violation: ``liveness`` if it did not.
    """
    start_s = world.now
    world.heal()
    for checker in world.checkers:
        checker.healed(world)
    if not done() and not world.run(start_s + limit_s, done):
        world.violation("liveness", f"not done {limit_s} s after healing: {describe()}")
    for checker in world.checkers:
        checker.finish(world)
    return world.now - start_s


SOMETIMES_SHARE = 0.01
"""Of the schedules: what fires in fewer is as good as never tested."""


def missing(
    runs: Sequence[Mapping[str, int]], wanted: Sequence[str], share: float = SOMETIMES_SHARE
) -> list[str]:
    """Which "sometimes" points fired in fewer than ``share`` of the runs (at least once each)."""
    fired: Counter[str] = Counter()
    for seen in runs:
        for name in seen:
            if seen[name]:
                fired[name] += 1
    least = max(1, math.ceil(share * len(runs)))
    return [f"{name}: {fired[name]}/{len(runs)}" for name in wanted if fired[name] < least]
