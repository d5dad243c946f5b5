"""What each kind of fault does to a world; ``faults`` lists the kinds, ``aims`` the triggers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from swarmtrain_protocols.testing.aims import Aim, Plays, nobody_plays, victim_of
from swarmtrain_protocols.testing.draws import Stream
from swarmtrain_protocols.testing.faults import FLAP_S, Fault

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Host
    from swarmtrain_protocols.testing.world import World

LINK_KINDS = ("slow", "lossy", "duplicate", "reorder", "tail", "noisy")
NEEDS_A_PROCESS = frozenset(
    "crash power vanish pause sleep slowdisk slownode diskfull flip drift jump wall".split()
)


class Trouble:
    """Carries out schedules. ``plays`` says who has which role; worlds without roles leave it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.plays: Plays = nobody_plays
        self.aims: list[Aim] = []
        self.spoilt: dict[str, list[str]] = {}
        """By host: what bits have flipped on its disk or in its memory; files and channels."""
        self.may_flip: Callable[[World, Host], bool] = lambda world, host: False
        self.flipped: dict[tuple[str, str], int] = {}
        """(host, channel): the round of the state in which a bit has flipped and is not mended."""
        self._luck: dict[str, Stream] = {}

    # --- when ------------------------------------------------------------------------------------

    def begin(self, item: Fault) -> None:
        """The time of a fault has come."""
        if self.world.healed:
            return
        self.world.trace.record(self.world.now, item.a, "fault " + item.kind)
        if item.kind.startswith("aim-"):
            self.aims.append(Aim.of(item))
            return
        names = item.a.split(",")
        if len(names) > 1 or item.kind == "split":
            self.world.seen["fault:" + item.kind] += 1
            self._cut_for(self._pairs(names), item.duration_s)
            return
        host = victim_of(item.a, self.world.hosts, None, self.plays)
        if host is not None:
            self._strike(item.kind, host, item)

    def hit(self, actor: Host, label: str) -> None:
        """``actor`` has just done what ``label`` says: does a fault wait for that?"""
        for aim in list(self.aims):
            if not aim.wants(actor, label, self.plays):
                continue
            aim.left -= 1
            if aim.left > 0:
                continue
            self.aims.remove(aim)
            host = victim_of(aim.fault.a, self.world.hosts, actor, self.plays)
            if host is not None:
                self.world.seen[f"aim:{aim.fault.a}:{aim.label}"] += 1
                self.fire(aim.fault, host)

    def fire(self, item: Fault, host: Host) -> None:
        """An aimed fault has met its moment, and ``host`` is whom it strikes."""
        self.world.seen["fault:" + item.kind] += 1
        self.world.seen[f"aim:{item.b}"] += 1
        kind = item.kind.removeprefix("aim-")
        self._strike("isolate" if kind == "cut" else kind, host, item, quiet=True)

    # --- what ------------------------------------------------------------------------------------

    def _strike(self, kind: str, host: Host, item: Fault, *, quiet: bool = False) -> None:
        if kind in NEEDS_A_PROCESS and not host.running:
            return
        if not quiet:
            self.world.seen["fault:" + kind] += 1
        world, duration_s = self.world, item.duration_s
        if kind in {"crash", "power", "vanish"}:
            self._kill(kind, host, duration_s)
        elif kind in {"pause", "sleep"}:
            self._pause(host, duration_s, asleep=kind == "sleep")
        elif kind in {"cut", "cut1"}:
            pairs = [(item.a, item.b), (item.b, item.a)]
            self._cut_for(pairs[: 1 if kind == "cut1" else 2], duration_s)
        elif kind == "isolate":
            self._cut_for(self._pairs([host.name]), duration_s)
        elif kind == "flap":
            self._flap(self._pairs([host.name]), host.name, world.now + duration_s)
        elif kind in LINK_KINDS:
            world.network.trouble(kind, host.name, +1)
            world.after(duration_s, None, self._link_is_well, kind, host.name)
        elif kind == "slowdisk":
            host.slow_disk_until = world.now + duration_s
        elif kind == "slownode":
            host.slow_until = world.now + duration_s
        elif kind == "diskfull":
            host.disk.full_until = world.now + duration_s
        elif kind in {"wall", "drift", "jump"}:
            self._clock(kind, host, item)
        else:
            self._spoil(kind, host)

    def _kill(self, kind: str, host: Host, duration_s: float) -> None:
        vanishes = kind == "vanish"
        self.world.crash(
            host.name,
            restart_s=None if vanishes else duration_s,
            silent=kind != "crash",
            unsynced=kind != "power",
        )

    def _pause(self, host: Host, duration_s: float, *, asleep: bool) -> None:
        host.paused_until = self.world.now + duration_s
        self.world.trace.record(self.world.now, host.name, "pause")
        if asleep:
            host.clock.local_s(self.world.now)
            host.clock.jump(-duration_s)
            host.asleep_until = host.paused_until
        self.world.network.paused(host, host.paused_until)

    def _clock(self, kind: str, host: Host, item: Fault) -> None:
        now = self.world.now
        if kind == "wall":
            host.clock.set_wall(float(item.b))
            host.tell_wall()
            return
        if kind == "jump":
            host.clock.jump(item.duration_s)
        else:
            host.clock.run_at(now, float(item.b))
            self.world.after(item.duration_s, None, self._clock_is_well, host)
        host.retime()

    def _clock_is_well(self, host: Host) -> None:
        host.clock.run_at(self.world.now, 1.0)
        host.retime()

    def _spoil(self, kind: str, host: Host) -> None:
        """One bit flips, in a stored file or in memory; a node without a state has none to flip."""
        assert kind in {"rot", "flip", "misstep"}, kind
        luck = self._stream(kind, host.name)
        if kind == "rot":
            what = host.disk.rot(luck)
        elif self.may_flip(self.world, host):
            what = host.node.flip_bit(luck, unseen=kind == "misstep")
            if what:
                self.flipped[host.name, what] = host.node.plane.states[what].round
        else:
            return
        if what:
            self.world.trace.record(self.world.now, host.name, kind, what.encode())
            self.world.seen["spoilt:" + kind] += 1
            self.spoilt.setdefault(host.name, []).append(what)

    # --- links -----------------------------------------------------------------------------------

    def _pairs(self, names: Sequence[str]) -> list[tuple[str, str]]:
        others = [name for name in self.world.hosts if name not in names]
        inside = [name for name in self.world.hosts if name in names]
        return [pair for a in inside for b in others for pair in ((a, b), (b, a))]

    def _cut_for(self, pairs: Sequence[tuple[str, str]], duration_s: float) -> None:
        for a, b in pairs:
            self.world.network.cut(a, b)
        self.world.after(duration_s, None, self._mend, pairs)

    def _mend(self, pairs: Sequence[tuple[str, str]]) -> None:
        if not self.world.healed:
            for a, b in pairs:
                self.world.network.mend(a, b)

    def _flap(self, pairs: Sequence[tuple[str, str]], name: str, until_s: float) -> None:
        if self.world.healed or self.world.now >= until_s:
            return
        luck = self._stream("flap", name)
        down_s, up_s = luck.between(*FLAP_S), luck.between(*FLAP_S)
        self._cut_for(pairs, min(down_s, until_s - self.world.now))
        self.world.after(down_s + up_s, None, self._flap, pairs, name, until_s)

    def _link_is_well(self, kind: str, name: str) -> None:
        if not self.world.healed:
            self.world.network.trouble(kind, name, -1)

    def _stream(self, purpose: str, name: str) -> Stream:
        return self._luck.setdefault(purpose + name, Stream(self.world.seed, name, purpose))
