"""A tiny deterministic world for the log core: network, disks, crashes, and an oracle that watches.

Messages are delayed, reordered, dropped, doubled and cut off by partitions. A disk takes its time;
what was not yet durable when a site crashes is lost, and what should have waited for it never
happened. The oracle sees every event of every site and asserts Raft's safety properties
(Ongaro 2014, figure 3.2) as they happen.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import blake3
import msgspec

from swarmtrain_protocols.core import Emit, PeerId, Persist, Send
from swarmtrain_protocols.entries import EntryBody, Genesis, MemberJoined, Paused, encode_body
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.identity import Keyring, signed_bytes
from swarmtrain_protocols.log.certificate import Trust
from swarmtrain_protocols.log.core import LogCore
from swarmtrain_protocols.log.entrylog import EntryLog
from swarmtrain_protocols.log.events import (
    Committed,
    Conflict,
    LeaderChanged,
    LedgerDiverged,
    LogTimeouts,
    SnapshotLoaded,
    Superseded,
)
from swarmtrain_protocols.log.recovery import Restarted, recover
from swarmtrain_protocols.manifest import make_genesis
from swarmtrain_protocols.messages import Message, decode, encode
from swarmtrain_protocols.messages.log import Deed

RUN = b"R" * 32
TIMEOUTS = LogTimeouts(election_s=1.0, heartbeat_s=0.25)


class KeyedHash:
    """A keyring without curves: the public key is the secret, so only honest sites use it."""

    def __init__(self, name: str) -> None:
        self._id = PeerId(blake3.blake3(name.encode()).digest())

    @property
    def peer_id(self) -> PeerId:
        return self._id

    def sign(self, domain: bytes, payload: bytes) -> bytes:
        return blake3.blake3(signed_bytes(domain, payload), key=self._id).digest(64)

    def verify(self, peer: bytes, domain: bytes, payload: bytes, signature: bytes) -> bool:
        expected = blake3.blake3(signed_bytes(domain, payload), key=peer).digest(64)
        return expected == signature


FOUNDER = KeyedHash("founder")


def joined(peer: bytes, *, may_vote: bool = True) -> MemberJoined:
    return MemberJoined(
        member=peer,
        name=peer.hex()[:8],
        addresses=(),
        trains=False,
        holds_state=False,
        may_vote=may_vote,
        reachable=True,
    )


class Ledger:
    """Stands in for the real one: a count and a hash over everything applied."""

    def __init__(self) -> None:
        self.index = -1
        self.digest = bytes(32)

    def apply(self, index: int, term: int, body: EntryBody) -> None:
        assert index == self.index + 1, f"entry {index} after {self.index}"
        self.index = index
        self.digest = blake3.blake3(self.digest + encode_body(body)).digest()

    def snapshot(self) -> bytes:
        return msgspec.msgpack.encode([self.index, self.digest])

    def load(self, index: int, data: bytes) -> None:
        self.index, self.digest = msgspec.msgpack.decode(data)
        assert self.index == index


class Oracle:
    """What every site did so far in one log, and whether it may.

    A log that the founder began again is another one, whose first entry has index ``first``.
    """

    def __init__(self, first: int = 0, digest: bytes = bytes(32)) -> None:
        self.first = first
        self.before = digest
        self.truth: list[tuple[int, bytes]] = []
        self.digests: list[bytes] = []
        self.leaders: dict[int, str] = {}
        self.hashes: dict[tuple[int, int], bytes] = {}
        self.seen: Counter[str] = Counter()
        self.first_term: list[int] = []

    def committed(self, site: Site, index: int, term: int, body: EntryBody) -> None:
        """State machine safety: one entry per index, for ever."""
        item = (term, encode_body(body))
        place = index - self.first
        if place == len(self.truth):
            self.truth.append(item)
            previous = self.digests[-1] if self.digests else self.before
            self.digests.append(blake3.blake3(previous + item[1]).digest())
        assert 0 <= place < len(self.truth), f"{site.name} emits {index} of {self.end}"
        assert self.truth[place] == item, f"{site.name} has another entry {index}"

    @property
    def end(self) -> int:
        """Index of the next entry."""
        return self.first + len(self.truth)

    def digest_at(self, index: int) -> bytes:
        """What the ledger hashes to with entry ``index`` applied."""
        return self.before if index == self.first - 1 else self.digests[index - self.first]

    def loaded(self, site: Site, index: int, data: bytes) -> None:
        assert msgspec.msgpack.decode(data) == [index, self.digest_at(index)], site.name

    def leads(self, site: Site, term: int, log: Any) -> None:
        """Election safety and leader completeness."""
        if self.leaders.get(term) == site.name:
            return
        assert term not in self.leaders, f"term {term}: {self.leaders[term]} and {site.name}"
        self.leaders[term] = site.name
        self.seen["elected"] += 1
        assert log.last_index >= self.end - 1, f"{site.name} leads without a commit"
        for index in range(max(self.first, log.first), self.end):
            entry = log.entry(index)
            known = self.truth[index - self.first]
            assert (entry.term, entry.data) == known, f"{site.name} lacks {index}"

    def matches(self, log: Any) -> None:
        """Log matching: equal (index, term) means equal logs up to there."""
        for entry in log.entries:
            known = self.hashes.setdefault((entry.index, entry.term), entry.chain_hash)
            assert known == entry.chain_hash, f"two logs at {entry.index}, term {entry.term}"


class Site:
    """One machine: a disk that survives, and at times a core that runs."""

    def __init__(self, world: World, name: str, keyring: Keyring) -> None:
        self.world = world
        self.name = name
        self.keyring = keyring
        self.id = keyring.peer_id
        self.disk: list[bytes] = []
        self.core: LogCore | None = None
        self.ledger = Ledger()
        self.shown = Ledger()
        self.queue: list[Any] = []
        self.busy = False
        self.life = 0
        self.wake = float("inf")
        self.genesis: Genesis | None = None
        self.events: list[object] = []
        self.forget: Callable[[bytes], bool] = lambda record: False

    def start(self) -> None:
        assert self.core is None
        self.life += 1
        self.ledger, self.shown, self.queue, self.busy = Ledger(), Ledger(), [], False
        w = self.world
        self.core = LogCore(
            run=RUN,
            founder=w.founder.peer_id,
            keyring=self.keyring,
            rng=random.Random(w.rng.random()),
            now=w.now,
            records=list(self.disk),
            genesis=self.genesis,
            snapshot_of=self.ledger.snapshot,
            timeouts=TIMEOUTS,
            compact_every=w.compact_every,
        )
        others = [s for s in w.sites.values() if s is not self]
        self.core.set_stewards_known(w.now, [s.id for s in others[: w.hints]])
        for other in others:
            if other.core is not None:
                self.core.connected(w.now, other.id)
                other.call(lambda core: core.connected(w.now, self.id))
        self.after()

    def crash(self) -> None:
        """Stop. A write under way may or may not have made it to the disk."""
        w = self.world
        if self.busy and isinstance(self.queue[0], Persist) and w.rng.random() < 0.5:
            self._write(self.queue[0])
        self.core, self.queue, self.busy, self.wake = None, [], False, float("inf")
        w.oracle.seen["crash"] += 1
        for other in w.sites.values():
            if other.core is not None and w.rng.random() < 0.8:
                w.at(w.now + w.rng.random() * 0.05, self._broken, other, other.life)

    def _broken(self, other: Site, life: int) -> None:
        if other.life == life:
            other.call(lambda core: core.disconnected(self.world.now, self.id))

    def call(self, act: Callable[[LogCore], object]) -> None:
        if self.core is not None:
            act(self.core)
            self.after()

    def after(self) -> None:
        """Drain, apply, and carry out what the disk does not hold up."""
        core, w = self.core, self.world
        assert core is not None
        for effect in core.drain():
            if isinstance(effect, Emit):
                self.apply(effect.event)
            self.queue.append(effect)
        if core.is_leader:
            w.oracle_at(core._s.log.base.index).leads(self, core.term, core._s.log)
        if not self.busy:
            self.carry_out()
        due = max(core.deadline(), w.now)
        if due < self.wake:
            self.wake = due
            w.at(due, self._tick, self.life, due)

    def _tick(self, life: int, due: float) -> None:
        if self.life == life and self.core is not None and self.wake == due:
            self.wake = float("inf")
            self.call(lambda core: core.tick(self.world.now))

    def apply(self, event: object) -> None:
        if isinstance(event, Committed):
            for entry in event.entries:
                self.ledger.apply(entry.index, entry.term, entry.body)
        elif isinstance(event, SnapshotLoaded):
            self.ledger.load(event.index, event.data)

    def carry_out(self) -> None:
        w = self.world
        while self.queue:
            effect = self.queue[0]
            if isinstance(effect, Persist):
                self.busy = True
                w.at(w.now + w.disk_s(), self._durable, self.life)
                return
            self.queue.pop(0)
            if isinstance(effect, Send):
                w.send(self, effect.peer, effect.message)
            else:
                self.show(effect.event)

    def _durable(self, life: int) -> None:
        if self.life != life or self.core is None:
            return
        self._write(self.queue.pop(0))
        self.busy = False
        self.carry_out()

    def _write(self, effect: Persist) -> None:
        if self.forget(effect.record):
            return
        if effect.reset:
            self.disk.clear()
            self.world.oracle.seen["compacted"] += 1
        self.disk.append(effect.record)

    def recover(self) -> Restarted:
        """The founder begins the log again with what is on this disk; this site is its steward."""
        w = self.world
        if self.core is not None:
            self.crash()
        made = recover(self.trust(), self.disk, [w.founder], self._restart)
        w.oracles[made.recovery.index >> 20] = Oracle(made.recovery.index + 1, self._recovered)
        w.oracle.seen["recovered"] += 1
        self.disk = [made.record]
        return made

    def trust(self) -> Trust:
        return Trust(RUN, self.world.founder.peer_id, self.keyring)

    def _restart(
        self, log: EntryLog, generation: int, index: int
    ) -> tuple[bytes, list[bytes], list[Deed]]:
        ledger = Ledger()
        if log.snapshot is not None:
            ledger.load(log.snapshot.body.index, log.snapshot.body.ledger)
        for at in range(ledger.index + 1, log.commit + 1):
            entry = log.entry(at)
            ledger.apply(at, entry.term, entry.body)
        view = log.committed_view
        assert view is not None
        self._recovered, ledger.index = ledger.digest, index
        others = [p for p in sorted(view.capable) if not view.has_voter(p)]
        return ledger.snapshot(), others, []

    def show(self, event: object) -> None:
        w = self.world
        if isinstance(event, Committed):
            for entry in event.entries:
                self.shown.apply(entry.index, entry.term, entry.body)
                oracle = w.oracle_at(entry.index)
                oracle.committed(self, entry.index, entry.term, entry.body)
        elif isinstance(event, SnapshotLoaded):
            self.shown.load(event.index, event.data)
            w.oracle_at(event.index).loaded(self, event.index, event.data)
            w.oracle.seen["snapshot loaded"] += 1
        elif isinstance(event, Superseded):
            w.oracle.seen["superseded"] += 1
        else:
            self.events.append(event)
            assert not isinstance(event, Conflict | LedgerDiverged), event
            assert not isinstance(event, PeerFault), f"{self.name}: {event}"
            assert isinstance(event, LeaderChanged)


class World:
    """Sites, links and time."""

    def __init__(
        self,
        seed: int,
        names: str,
        *,
        compact_every: int = 16,
        hints: int = 2,
        keyrings: Callable[[str], Keyring] = KeyedHash,
        founder: Keyring = FOUNDER,
    ) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.compact_every = compact_every
        self.hints = hints
        self.founder = founder
        self.oracle = Oracle()
        self.oracles = {0: self.oracle}
        """By epoch: a log that was begun again has indices beyond the next multiple of 2^20."""
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self.drop = self.double = 0.0
        self.latency_s = 0.02
        self.disk_max_s = 0.004
        self.cut: set[tuple[str, str]] = set()
        self.sent: Counter[str] = Counter()
        self.proposed = 0
        self.sites = {name: Site(self, name, keyrings(name)) for name in names}
        self.by_id = {site.id: site for site in self.sites.values()}
        first = self.sites[names[0]]
        first.genesis = make_genesis(founder, RUN, first.id)

    # --- time ------------------------------------------------------------------------------------

    def at(self, when: float, act: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._heap, (when, next(self._order), act, arguments))

    def run(self, duration_s: float, until: Callable[[], bool] | None = None) -> bool:
        """Let time pass; True as soon as ``until`` holds."""
        end = self.now + duration_s
        while self._heap and self._heap[0][0] <= end:
            if until is not None and until():
                return True
            when, _, act, arguments = heapq.heappop(self._heap)
            self.now = max(self.now, when)
            act(*arguments)
        self.now = end
        return until is not None and until()

    def oracle_at(self, index: int) -> Oracle:
        """The oracle of the log that has this index."""
        return self.oracles[max(index, 0) >> 20]

    @property
    def newest(self) -> Oracle:
        return self.oracles[max(self.oracles)]

    # --- the network -----------------------------------------------------------------------------

    def disk_s(self) -> float:
        return self.rng.random() * self.disk_max_s

    def send(self, source: Site, to: PeerId, message: Message) -> None:
        target = self.by_id[to]
        self.sent[type(message).__name__] += 1
        if (source.name, target.name) in self.cut or self.rng.random() < self.drop:
            return
        data = encode(message)
        for _ in range(2 if self.rng.random() < self.double else 1):
            delay = 0.001 + self.rng.random() * self.latency_s
            self.at(self.now + delay, self._deliver, source, target, target.life, data)

    def _deliver(self, source: Site, target: Site, life: int, data: bytes) -> None:
        if target.core is None or (source.name, target.name) in self.cut:
            return
        if target.life == life:
            message = decode(data)
            target.call(lambda core: core.receive(self.now, source.id, message))

    def split(self, *groups: str) -> None:
        """Cut every link between two groups."""
        self.cut = {(a, b) for g, h in itertools.permutations(groups, 2) for a in g for b in h}

    # --- people ----------------------------------------------------------------------------------

    def start(self, names: str) -> None:
        for name in names:
            self.sites[name].start()

    def leader(self) -> Site | None:
        """The newest leader that runs, if any."""
        found = [s for s in self.sites.values() if s.core is not None and s.core.is_leader]
        return max(found, key=lambda s: s.core.term if s.core else 0, default=None)

    def propose(self, site: Site | None = None, body: EntryBody | None = None) -> bool:
        site = site or self.leader()
        if site is None or site.core is None or not site.core.is_leader:
            return False
        self.proposed += 1
        chosen = body or Paused(f"entry {self.proposed}")
        site.call(lambda core: core.propose(self.now, chosen))
        return True

    def admit(self, names: str) -> None:
        """Log that these sites joined and may vote."""
        for name in names:
            assert self.propose(body=joined(self.sites[name].id))

    def vote_with(self, names: str) -> None:
        leader = self.leader()
        assert leader is not None
        voters = tuple(self.sites[name].id for name in names)
        leader.call(lambda core: core.change_voters(self.now, voters))

    def set_in_force(self, names: str) -> bool:
        wanted = tuple(sorted(self.sites[name].id for name in names))
        live = [s.core for s in self.sites.values() if s.core is not None]
        return all(core.voters == wanted and not core._s.log.committed_view.joint for core in live)

    def caught_up(self) -> bool:
        """Every running site shows everything that anybody ever showed."""
        live = [s for s in self.sites.values() if s.core is not None]
        return all(s.shown.index == self.newest.end - 1 for s in live)

    def check(self) -> None:
        for site in self.sites.values():
            if site.core is not None:
                log, index = site.core._s.log, site.shown.index
                if not site.queue:  # what waits for the disk may still be as if it never was
                    self.oracle_at(log.base.index).matches(log)
                if index >= 0:
                    assert site.shown.digest == self.oracle_at(index).digest_at(index)

    def settled(self, names: str) -> World:
        """Found the run, start everybody, and let ``names`` vote."""
        self.start("".join(self.sites))
        self.admit("".join(n for n in self.sites if self.sites[n].genesis is None))
        if len(names) > 1:
            self.vote_with(names)
        assert self.run(10.0, lambda: self.set_in_force(names) and self.caught_up()), "settle"
        return self


def instant(names: str = "a", *, compact_every: int = 16) -> World:
    """A world whose disks take no time: effects of a turn are carried out within it."""
    world = World(1, names, compact_every=compact_every)
    world.disk_max_s = 0.0
    return world
