"""Random fault schedules for the log core, and how they must end."""

from __future__ import annotations

from collections.abc import Callable

from swarmtrain_protocols.errors import CheckpointError, LocalProtocolError
from tests.protocols.log_world import World

SETS = ("a", "b", "abc", "bcd", "acd", "cde", "abcde")
CREWS = {
    3: ("abcdef", SETS),
    5: ("abcdefg", ("abc", "abcde", "bcdef", "cdefg", "acdeg", "a")),
    7: ("abcdefghi", ("abcdefg", "cdefghi", "bcdefgh", "abcde", "efghi", "abc", "a")),
}
"""Sites and steward sets, by the size of the set that a schedule begins with."""


class Chaos:
    """One schedule: ``duration_s`` of faults, then healing, then everybody must agree.

    ``recovers``: at times the founder begins the log again from the disk of some site.
    """

    def __init__(
        self, seed: int, *, duration_s: float = 12.0, crew: int = 3, recovers: bool = False
    ) -> None:
        names, self.sets = CREWS[crew]
        self.crew = crew
        self.world = w = World(seed, names, compact_every=8)
        rng = w.rng
        w.drop = rng.choice([0.0, 0.0, 0.05, 0.2])
        w.double = rng.choice([0.0, 0.1])
        w.latency_s = rng.choice([0.01, 0.05, 0.3])
        w.disk_max_s = rng.choice([0.0, 0.005, 0.1])
        self.seen = w.oracle.seen
        self._end = duration_s
        acts: list[tuple[Callable[[], None], float]] = [
            (self.propose, 10.0),
            (self.crash, rng.choice([0.0, 1.0, 3.0])),
            (self.crash_leader, rng.choice([0.0, 1.0])),
            (self.restart, 3.0),
            (self.partition, rng.choice([0.0, 1.0])),
            (self.isolate_leader, rng.choice([0.0, 1.0])),
            (self.heal, 1.0),
            (self.change, rng.choice([0.0, 1.0, 3.0])),
            (self.hand_over, rng.choice([0.0, 0.5])),
            (self.break_link, 0.5),
        ]
        if recovers:
            acts += [(self.recover, 0.7), (self.admit, 3.0)]
        self._acts = [act for act, _ in acts]
        self._weights = [weight for _, weight in acts]

    def run(self) -> World:
        w = self.world
        names = "".join(w.sites)
        w.start(names[:-1])
        w.admit(names[1:])
        w.run(w.rng.random())
        if w.rng.random() < 0.8:
            self._vote_with(names[: self.crew])
        while w.now < self._end:
            w.run(w.rng.random() * 0.3)
            w.rng.choices(self._acts, self._weights)[0]()
            w.check()
        self.mend()
        return w

    def mend(self) -> None:
        """Safety held so far; now liveness: all is well, so there is progress."""
        w = self.world
        w.drop = w.double = 0.0
        w.latency_s = 0.02
        w.cut = set()
        for site in w.sites.values():
            if site.core is None:
                site.start()
        w.run(0.1)  # what was still to be said of links that broke
        for site in w.sites.values():
            for other in w.sites.values():
                if other is not site and site.core and other.id not in site.core._s.links:
                    site.call(lambda core, peer=other.id: core.connected(w.now, peer))
        assert w.run(30.0, self._ready), f"no leader after healing, {self._states()}"
        assert w.propose()
        assert w.run(15.0, lambda: self._ready() and w.caught_up()), f"behind: {self._states()}"
        w.check()

    def _ready(self) -> bool:
        leader = self.world.leader()
        return leader is not None and leader.core is not None and leader.core.ready

    def _states(self) -> list[str]:
        return [
            f"{s.name}: {s.core._s.role} of term {s.core.term}, commit {s.core.commit_index} "
            f"of {s.core.last_index}, shown {s.shown.index}"
            for s in self.world.sites.values()
            if s.core is not None
        ]

    # --- what may happen -------------------------------------------------------------------------

    def propose(self) -> None:
        for _ in range(self.world.rng.choice([1, 1, 5])):
            for site in self.world.sites.values():  # also those that lead no more
                if site.core is not None and site.core.is_leader:
                    self.world.propose(site)

    def crash(self) -> None:
        running = [s for s in self.world.sites.values() if s.core is not None]
        if running:
            self.world.rng.choice(running).crash()

    def crash_leader(self) -> None:
        leader = self.world.leader()
        if leader is not None:
            leader.crash()
            self.seen["leader crashed"] += 1

    def restart(self) -> None:
        stopped = [s for s in self.world.sites.values() if s.core is None]
        if stopped:
            self.world.rng.choice(stopped).start()

    def partition(self) -> None:
        names = list(self.world.sites)
        self.world.rng.shuffle(names)
        at = self.world.rng.randrange(1, len(names))
        self.world.split("".join(names[:at]), "".join(names[at:]))
        self.seen["partition"] += 1

    def isolate_leader(self) -> None:
        leader = self.world.leader()
        if leader is not None:
            rest = "".join(n for n in self.world.sites if n != leader.name)
            self.world.split(leader.name, rest)
            if self.world.rng.random() < 0.3:  # it hears others, nobody hears it
                self.world.cut = {(a, b) for a, b in self.world.cut if a == leader.name}
            self.seen["leader isolated"] += 1

    def heal(self) -> None:
        self.world.cut = set()

    def break_link(self) -> None:
        first, second = self.world.rng.sample(list(self.world.sites.values()), 2)
        first.call(lambda core: core.disconnected(self.world.now, second.id))
        second.call(lambda core: core.disconnected(self.world.now, first.id))

    def change(self) -> None:
        self._vote_with(self.world.rng.choice(self.sets))

    def admit(self) -> None:
        """Whoever lost its grant in a new beginning gets it again."""
        if self.world.leader() is not None:
            self.world.admit("".join(self.world.sites))

    def recover(self) -> None:
        """From a site that has the newest log, often one that others have left behind."""
        w = self.world
        able = [s for s in w.sites.values() if s.shown.index >= w.newest.first and s.disk]
        site = w.rng.choice(able) if able else None
        try:
            if site is not None:
                site.recover()
                site.start()
        except CheckpointError:
            self.seen["nothing to recover"] += 1

    def _vote_with(self, names: str) -> None:
        leader = self.world.leader()
        if leader is None or leader.core is None or leader.core._s.log.view.joint:
            return
        try:
            self.world.vote_with(names)
        except LocalProtocolError:
            self.seen["change refused"] += 1  # grants not logged yet, or a change under way
        else:
            self.seen["change asked"] += 1

    def hand_over(self) -> None:
        leader = self.world.leader()
        if leader is None or leader.core is None or leader.core._s.alone:
            return
        leader.call(lambda core: core.hand_over(self.world.now))
        self.seen["hand over"] += 1
