"""A swarm of hundreds for an hour: ``python -m swarmtrain_protocols.testing.hour``.

Every member is the whole core of a peer (log, rounds, membership, DHT) with real codecs and tiny
tensors, in the simulator's world, on one processor. Members are lost at random, half of them
without a word, as a machine that loses its power, the leader at least once; each is replaced by a
newcomer whose ticket names three members of that moment. All checkers of rounds watch at every
event: a fork, a wrong sum or a contribution that counts twice ends the run.

Inner steps take about two minutes, as over the internet (DiLoCo's rounds are minutes long), which
makes some thirty rounds in the hour. Messages are encoded, decoded and compared as in all
simulations; what goes to many receivers as one object, once.

Prints one JSON object, and exits with 1 if a bar is missed: lookups of living members' addresses in
the DHT that find them, members that were ready and in no round for two phases, members whose state
is not the log's when it is over.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial

import msgspec

from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.dht.events import DhtFailed, DhtFound
from swarmtrain_protocols.entries import decode_body
from swarmtrain_protocols.finder import address_key
from swarmtrain_protocols.log import entrylog
from swarmtrain_protocols.manifest import RunKeys, make_manifest
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.testing.checks.rounds import RoundsAreRight
from swarmtrain_protocols.testing.draws import Stream, exponential
from swarmtrain_protocols.testing.host import Host
from swarmtrain_protocols.testing.keyring import FakeKeyring, peer_id_of
from swarmtrain_protocols.testing.network import NetworkModel, address_of
from swarmtrain_protocols.testing.site import Site, SitePart, SwarmSpec
from swarmtrain_protocols.testing.truth import Truth
from swarmtrain_protocols.testing.world import Context, Violation, World
from swarmtrain_protocols.tickets import Capability, sign_capability

LOOKUPS_MIN = 0.99
WINDOWS_MAX = 2.0
SETTLED_S = 60.0
"""Members and their records are looked for from so long after the joining on."""
LOOKUP_S_MAX = 60.0
TELL_S = 60.0
CHANNEL = "train/0/0"
WEATHER = NetworkModel(latency_s=(0.01, 0.08), rate_bytes_per_s=1e7, sync_s=(0.0005, 0.01))
EVENTS_MAX = 200_000_000
ENTRIES_SHARED = 1024


def lighten() -> None:
    """Make this process fit for hundreds of sites. What they do is the same; nothing undoes it.

    Python looks for cycles no more: there are tens of millions of objects, nearly all of which stay
    and hardly one is in a cycle. An entry of the log is decoded once for all sites: it does not
    change, and the opening of a round of hundreds was most of the memory.
    """
    gc.disable()
    vars(entrylog)["decode_body"] = lru_cache(ENTRIES_SHARED)(decode_body)


@dataclass(frozen=True)
class Options:
    """``churn``: share of the members lost per hour. ``phase_s``: how long inner steps take."""

    members: int = 300
    churn: float = 0.3
    seconds: float = 3600.0
    grow_s: float = 300.0
    phase_s: tuple[float, float] = (110.0, 130.0)
    lookup_every_s: float = 1.5
    values: int = 40
    seed: int = 0


class Member(Site):
    """A site that tells the harness how its lookups and contributions went."""

    def __init__(self, hour: Hour, part: SitePart, ctx: Context) -> None:
        super().__init__(ctx, hour.spec, part, hour.truth)
        self._hour = hour

    def emitted(self, now: float, event: object) -> None:
        super().emitted(now, event)
        if isinstance(event, DhtFound | DhtFailed):
            self._hour.answered(self.ctx.name, event)
        elif isinstance(event, fx.ContributionDecided) and event.outcome == "committed":
            self._hour.counted(self.ctx.name)

    def _hand_over(self, now: float, channel: str) -> None:
        super()._hand_over(now, channel)
        if self.core.member.undecided(channel) is not None:
            self._hour.ready_since.setdefault(self.ctx.name, self._hour.world.now)


@dataclass
class Tally:
    """What is counted. Times in virtual seconds."""

    lookups: int = 0
    found: int = 0
    lookup_s: list[float] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    """From being ready to being counted in a committed round."""
    late: list[str] = field(default_factory=list)
    lost: int = 0
    leaders_lost: int = 0
    joined: int = 0


class Hour:
    """The world, its members, what befalls them, and what is counted."""

    def __init__(self, options: Options, tell: Callable[[str], None] = lambda text: None) -> None:
        self.options = options
        self._tell = tell
        self.tally = Tally()
        self.ready_since: dict[str, float] = {}
        self.since: dict[str, float] = {}
        """When each living host was started."""
        founder = FakeKeyring("founder")
        keys = RunKeys(codec_scatter="int8", codec_gather="int8")
        manifest = make_manifest(keys, founder.peer_id, options.seed.to_bytes(16, "little"))
        ticket = Capability(b"ticket-1", manifest.run_id, role="trainer", vote=True)
        self.spec = SwarmSpec(
            manifest=manifest,
            capability=sign_capability(founder, ticket),
            founder_site="m0",
            layout=((CHANNEL, options.values),),
            chunk_values=16,
            phase_s=options.phase_s,
            work_s=(0.001, 0.01),
            checkpoint_every=4,
        )
        self.world = World(options.seed, model=WEATHER, strict_addresses=True)
        self.world.events_max = EVENTS_MAX
        self.truth = Truth({}, {}, ("m0",), self.world.seen)
        self.rounds = RoundsAreRight(self.truth, keys, self.spec.chunk_values)
        self.world.watch(self.rounds)
        self._luck = Stream(options.seed, "hour")
        self._asked: dict[tuple[str, int], tuple[str, float]] = {}
        self._leader_falls_at = options.grow_s + options.seconds / 4

    # --- members --------------------------------------------------------------------------------

    def add(self, start_s: float) -> None:
        """A member that starts at ``start_s`` of the world's time."""
        name = f"m{len(self.truth.parts)}"
        part = SitePart(name)
        self.truth.parts[name] = part
        self.truth.names[peer_id_of(name)] = name
        self.world.add(name, partial(Member, self, part), start_s=start_s)
        self.since[name] = start_s
        self.tally.joined += 1

    def living(self, for_s: float = 0.0) -> list[Host]:
        """Hosts that have been there for so long."""
        until = self.world.now - for_s
        return [self.world.hosts[name] for name, at in self.since.items() if at <= until]

    def leader(self) -> Host | None:
        for host in self.living():
            node = host.node
            if isinstance(node, Member) and node.core.log.is_leader:
                return host
        return None

    def _lose(self, host: Host) -> None:
        """One is gone for good; somebody else comes, with a ticket of today."""
        tally, luck = self.tally, self._luck
        tally.lost += 1
        tally.leaders_lost += host is self.leader()
        self._still_waits(host.name)
        del self.since[host.name]
        self.world.crash(host.name, restart_s=None, silent=luck.chance(0.5))
        doors = self.living(SETTLED_S) or self.living()
        picked = [doors[luck.integer(len(doors))].name for _ in range(3)]
        self.truth.ticket_sites = tuple(dict.fromkeys(picked))
        self.add(self.world.now + luck.between(5.0, 60.0))

    def counted(self, name: str) -> None:
        """A contribution of this member is in a committed round."""
        self._still_waits(name)

    def _still_waits(self, name: str) -> None:
        since = self.ready_since.pop(name, None)
        if since is None:
            return
        wait_s = self.world.now - since
        self.tally.waits_s.append(wait_s)
        if wait_s > WINDOWS_MAX * self.options.phase_s[1]:
            self.tally.late.append(f"{name}: ready at {since:.0f}, {wait_s:.0f} s")

    # --- lookups --------------------------------------------------------------------------------

    def _look(self) -> None:
        """A member looks up the addresses of another one."""
        there = self.living(SETTLED_S)
        if len(there) < 2:
            return
        asker = there[self._luck.integer(len(there))]
        wanted = there[self._luck.integer(len(there))]
        node = asker.node
        if asker is wanted or not isinstance(node, Member):
            return
        self.tally.lookups += 1
        handle = node.core.dht_get(asker.local_now(), address_key(wanted.peer))
        self._asked[asker.name, handle] = (wanted.name, self.world.now)
        asker.settle()

    def answered(self, name: str, event: DhtFound | DhtFailed) -> None:
        wanted, since = self._asked.pop((name, event.handle), ("", 0.0))
        if not wanted:
            return
        if wanted not in self.since or name not in self.since:
            self.tally.lookups -= 1  # whoever asked or was looked for has died meanwhile
            return
        right = (PeerId(peer_id_of(wanted)), (address_of(wanted),))
        records = event.records if isinstance(event, DhtFound) else ()
        found = any(
            (r.publisher, msgspec.msgpack.decode(r.value, type=tuple[str, ...])) == right
            for r in records
        )
        self.tally.lookup_s.append(self.world.now - since)
        self.tally.found += found and self.world.now - since <= LOOKUP_S_MAX

    # --- the hour -------------------------------------------------------------------------------

    def grow(self) -> None:
        """All members start, one after another."""
        count = self.options.members
        for number in range(count):
            self.add(self.options.grow_s * 0.8 * number / count)
        self.world.run(self.options.grow_s)

    def run(self, until_s: float) -> None:
        """Let time pass, with its losses and lookups."""
        options, world = self.options, self.world
        pause_s = 3600.0 / max(1e-9, options.members * options.churn)
        loss_at = world.now + exponential(self._luck.uniform(), pause_s)
        look_at = tell_at = world.now
        while world.now < until_s:
            world.run(min(until_s, loss_at, look_at, self._leader_falls_at))
            if world.now >= look_at:
                look_at += options.lookup_every_s
                self._look()
            if world.now >= tell_at:
                tell_at += TELL_S
                self._tell(
                    f"{world.now:.0f} s: {len(self.living())} members, "
                    f"{len(self.rounds.committed)} rounds, "
                    f"{self.tally.found} of {self.tally.lookups} found, "
                    f"{self.tally.lost} lost, {world.trace.events} events\n"
                )
            if world.now >= loss_at:
                loss_at += exponential(self._luck.uniform(), pause_s)
                there = self.living()
                self._lose(there[self._luck.integer(len(there))])
            if world.now >= self._leader_falls_at:
                leader = self.leader()
                self._leader_falls_at = float("inf") if leader is not None else world.now + 1.0
                if leader is not None:
                    self._lose(leader)

    def finish(self) -> None:
        """Open lookups may end; whoever still waits has waited until now."""
        self.world.run(self.world.now + LOOKUP_S_MAX)
        for host in self.living():
            self._still_waits(host.name)

    def behind(self) -> list[str]:
        """Members of a while that are more than a round behind the log."""
        newest = len(self.rounds.states[CHANNEL]) - 1
        found = []
        for host in self.living(WINDOWS_MAX * self.options.phase_s[1]):
            state = host.node.plane.states.get(CHANNEL) if host.node is not None else None
            if state is None or state.round < newest - 1:
                found.append(f"{host.name}: {'no state' if state is None else state.round}")
        return found

    # --- figures --------------------------------------------------------------------------------

    def figures(self, fork: str) -> dict[str, object]:
        """All that is printed."""
        tally, rounds = self.tally, self.rounds
        waits = sorted(tally.waits_s) or [0.0]
        took = sorted(tally.lookup_s) or [0.0]
        sets = [len(item.coefficients) for item in rounds.chosen.values()]
        seen = self.world.seen.items()
        sent = {k.removeprefix("send:"): n for k, n in seen if k.startswith("send:")}
        return {
            "options": asdict(self.options),
            "lookups": tally.lookups,
            "lookups_found": tally.found,
            "lookups_share": round(tally.found / max(1, tally.lookups), 5),
            "lookup_s_median": round(statistics.median(took), 3),
            "lookup_s_p95": round(took[int(0.95 * (len(took) - 1))], 3),
            "rounds_committed": len(rounds.committed),
            "attempts_aborted": rounds.aborted,
            "contributions_counted": len(rounds.counted),
            "set_size_median": statistics.median(sets) if sets else 0,
            "windows_waited_max": round(waits[-1] / self.options.phase_s[1], 3),
            "windows_waited_median": round(statistics.median(waits) / self.options.phase_s[1], 3),
            "late": tally.late,
            "members_lost": tally.lost,
            "leaders_lost": tally.leaders_lost,
            "members_joined": tally.joined,
            "behind": self.behind() if not fork else [],
            "fork": fork,
            "messages": sum(sent.values()),
            "messages_by_kind": dict(sorted(sent.items(), key=lambda item: (-item[1], item[0]))),
            "events": self.world.trace.events,
            "simulated_s": round(self.world.now),
            "trace": self.world.trace.digest(),
        }


def run_hour(hour: Hour) -> dict[str, object]:
    """One swarm from its first member to the figures; ``missed`` lists bars that were missed."""
    options = hour.options
    fork = ""
    try:
        hour.grow()
        hour.run(options.grow_s + options.seconds)
        hour.finish()
    except Violation as broken:
        fork = str(broken)[:2000]
    figures = hour.figures(fork)
    missed = [name for name in ("fork", "late", "behind") if figures[name]]
    if not hour.tally.lookups or hour.tally.found < LOOKUPS_MIN * hour.tally.lookups:
        missed.append("lookups")
    if not hour.rounds.committed:
        missed.append("rounds")
    return {**figures, "missed": missed}


def main(argv: Sequence[str] | None = None, leave: Callable[[int], None] | None = None) -> int:
    """The command line; returns the exit status.

    ``leave`` ends the process with it while the world still stands: the system takes memory back at
    once, Python takes gigabytes apart object by object.
    """
    parser = argparse.ArgumentParser(prog="hour", description="A swarm of hundreds for an hour.")
    usual = Options()
    parser.add_argument("--members", type=int, default=usual.members)
    parser.add_argument("--churn", type=float, default=usual.churn, help="share lost per hour")
    parser.add_argument("--seconds", type=float, default=usual.seconds)
    parser.add_argument("--grow", type=float, default=usual.grow_s, help="seconds to grow")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    options = Options(given.members, given.churn, given.seconds, given.grow, seed=given.seed)

    def tell(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()

    hour = Hour(options, tell)
    figures = run_hour(hour)
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")
    sys.stdout.flush()
    status = int(bool(figures["missed"]))
    if leave is not None:
        leave(status)
    return status


if __name__ == "__main__":
    lighten()
    sys.exit(main())
