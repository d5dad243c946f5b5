"""Equipment for tests of rounds: named peers, ledgers made of entries, a swarm in one process.

The network is a queue: nothing is lost, delayed or reordered unless a test says so. Fetches copy
chunks from the provider's data plane. Signatures are keyed hashes (``testing.keyring``).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from swarmtrain_protocols import entries as e
from swarmtrain_protocols import messages
from swarmtrain_protocols.codecs.base import F32
from swarmtrain_protocols.core import Effect, Emit, Fetch, PeerId, Persist, Probe, Send
from swarmtrain_protocols.dataplane import DataPlane
from swarmtrain_protocols.errors import LocalProtocolError, PeerFault
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.manifest import RunKeys, make_genesis, make_manifest
from swarmtrain_protocols.membership import SiteConfig
from swarmtrain_protocols.messages.common import RoundKey
from swarmtrain_protocols.messages.member import Propose
from swarmtrain_protocols.node import NodeCore
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.member import Offer
from swarmtrain_protocols.state import CanonicalState
from swarmtrain_protocols.testing.keyring import FakeKeyring, peer_id_of
from swarmtrain_protocols.tickets import Capability, sign_capability

TRAIN = "train/0/0"
GROUP = "group/g"
VALUES = 20
CHUNK = 8
"""Values per chunk: three chunks, the last one short."""
WALL_S = 1e9
FOUNDER = FakeKeyring("founder")

# Names in member order, so that a test can speak of "the first member".
NAMES = sorted("abcdefgh", key=peer_id_of)
RINGS = [FakeKeyring(name) for name in NAMES]
IDS = [ring.peer_id for ring in RINGS]
A, B, C, D, E = IDS[:5]
RUN = b"r" * 32


def hash_of(text: str) -> bytes:
    """A readable stand-in for a hash, 32 bytes."""
    return text.encode().ljust(32, b".")


def joined(peer: bytes, **changes: Any) -> e.MemberJoined:
    site: dict[str, Any] = {
        "name": peer.hex()[:4],
        "addresses": ("127.0.0.1:1",),
        "trains": True,
        "holds_state": True,
        "may_vote": True,
        "reachable": True,
    }
    return e.MemberJoined(member=peer, **{**site, **changes})


def defined(values: int = VALUES, root: bytes | None = None) -> e.ModelDefined:
    layout = (e.ChannelLayout(TRAIN, values),)
    return e.ModelDefined(bytes(32), layout, (root or hash_of("state 0"),), A)


class Log:
    """A ledger and the entries that made it."""

    def __init__(self, *members: bytes, model: bool = True) -> None:
        self.ledger = Ledger()
        self.add(e.Genesis(RUN, FOUNDER.peer_id, A, bytes(64)))
        for member in members:
            self.add(joined(member))
        if model:
            self.add(defined())

    def add(self, body: e.EntryBody) -> bool:
        return self.ledger.apply(self.ledger.index + 1, body)

    def open(self, contributors: Iterable[bytes], **changes: Any) -> e.RoundOpened:
        """Log the next attempt of ``TRAIN`` (or of ``channel``) and return its entry."""
        body = opening(self.ledger, contributors, **changes)
        assert self.add(body)
        return body

    def choose(self, opened: e.RoundOpened, *indices: int) -> e.RoundSet:
        chosen = indices or tuple(range(len(opened.contributors)))
        weights = tuple(e.Coefficient(i, float(np.float32(1 / len(chosen)))) for i in chosen)
        body = e.RoundSet(opened.key, weights)
        assert self.add(body)
        return body

    def commit(self, opened: e.RoundOpened, root: bytes) -> e.RoundCommitted:
        body = e.RoundCommitted(opened.key, root, opened.holders)
        assert self.add(body)
        return body


def opening(
    ledger: Ledger,
    contributors: Iterable[bytes],
    *,
    channel: str = TRAIN,
    owners: Iterable[bytes] = (A, B),
    holders: Iterable[bytes] | None = None,
    roots: dict[bytes, bytes] | None = None,
) -> e.RoundOpened:
    people = sorted(contributors)
    key = ledger.next_key(channel)
    assert key is not None
    who, known = list(owners), ledger.channels.get(channel)
    values = known.values if known is not None else VALUES
    chunks, first, parts = -(-values // CHUNK), 0, []
    for index, owner in enumerate(who):
        count = chunks // len(who) + (index < chunks % len(who))
        parts.append(e.Part(first, count, owner, who[(index + 1) % len(who)]))
        first += count
    listed = tuple(
        e.Contributor(p, (roots or {}).get(p, hash_of(f"given {p.hex()[:8]}")), 4.0, key.round)
        for p in people
    )
    state_hash = hash_of(f"state {key.round}") if channel.startswith("train/") else bytes(32)
    return e.RoundOpened(
        key,
        listed,
        tuple(parts),
        tuple(sorted(holders if holders is not None else people)),
        values,
        "fp32",
        "fp32",
        state_hash,
    )


def events(effects: Iterable[Effect], kind: type) -> list[Any]:
    return [x.event for x in effects if isinstance(x, Emit) and isinstance(x.event, kind)]


def sent(effects: Iterable[Effect], kind: type) -> list[tuple[PeerId, Any]]:
    """(receiver, message) of the messages of one kind."""
    return [
        (x.peer, x.message) for x in effects if isinstance(x, Send) and isinstance(x.message, kind)
    ]


def faults(effects: Iterable[Effect]) -> list[tuple[str, bytes]]:
    """(code, peer) of the faults that were told."""
    told = [x for x in events(effects, fx.Notice) if x.name == "peer_fault"]
    return [(x.fields["fault"], bytes.fromhex(x.fields["peer"])) for x in told]


def ignored(effects: Iterable[Effect]) -> list[tuple[str, bytes]]:
    """(reason, peer) of messages that counted for nothing and that nobody is blamed for."""
    told = [x for x in events(effects, fx.Notice) if x.name == "message_ignored"]
    return [(x.fields["reason"], bytes.fromhex(x.fields["peer"])) for x in told]


def of_kind(effects: Iterable[Effect], kind: type) -> list[Any]:
    return [x for x in effects if isinstance(x, kind)]


def take(out: list[Effect]) -> list[Effect]:
    """Everything in a core's list of effects, which is empty afterwards."""
    taken = list(out)
    out.clear()
    return taken


# --- a swarm in one process ----------------------------------------------------------------------


@dataclass
class Peer:
    """One node with its data plane and everything that it told."""

    name: str
    node: NodeCore
    data: DataPlane
    records: list[bytes] = field(default_factory=list)
    told: list[object] = field(default_factory=list)

    def told_of(self, kind: type) -> list[Any]:
        return [x for x in self.told if isinstance(x, kind)]

    @property
    def id(self) -> PeerId:
        return self.node.me


class Net:
    """``cut`` holds pairs that lose what they say to each other; ``lose`` drops single messages."""

    def __init__(self, count: int, **keys: Any) -> None:
        fields = {
            "codec_scatter": "fp32",
            "codec_gather": "fp32",
            "grace_s": 1.0,
            "outer_lr": 1.0,
            "outer_momentum": 0.0,
            **keys,
        }
        self.manifest = make_manifest(RunKeys(**fields), FOUNDER.peer_id, b"n" * 16)
        self.now = 0.0
        self.queue: deque[Callable[[], None]] = deque()
        self.lose: Callable[[bytes, bytes, messages.Message], bool] = lambda *_: False
        self.log: list[tuple[bytes, bytes, messages.Message]] = []
        self.down: set[bytes] = set()
        self.peers: dict[bytes, Peer] = {}
        for index in range(count):
            self.start(index)

    def capability(self, **changes: Any) -> bytes:
        fields: dict[str, Any] = {"id": b"ticket-1", "run": self.manifest.run_id, "vote": True}
        return sign_capability(FOUNDER, Capability(**{**fields, **changes}))

    def start(self, index: int, *, records: Iterable[bytes] = (), **site: Any) -> Peer:
        """Start (or restart) a peer and link it with everybody."""
        ring = RINGS[index]
        config: dict[str, Any] = {
            "name": NAMES[index],
            "addresses": (f"127.0.0.1:{1000 + index}",),
            "trains": True,
            "holds_state": True,
            "votes": True,
            "reachable": True,
            "capability": self.capability(),
        }
        old = list(records)
        node = NodeCore(
            site=SiteConfig(**{**config, **site}),
            manifest=self.manifest,
            keyring=ring,
            rng=random.Random(index),
            now=self.now,
            wall_s=WALL_S + self.now,
            records=old,
            genesis=make_genesis(FOUNDER, self.manifest.run_id, ring.peer_id)
            if index == 0 and not old
            else None,
            chunk_values=CHUNK,
        )
        data = DataPlane(chunk_values=CHUNK)
        peer = Peer(NAMES[index], node, data, old)
        self.down.discard(ring.peer_id)
        self.peers[ring.peer_id] = peer
        self.carry_out(peer)
        for other in list(self.peers.values()):
            if other is not peer and other.id not in self.down:
                self.link(peer.id, other.id)
        return peer

    def __getitem__(self, index: int) -> Peer:
        return self.peers[IDS[index]]

    def link(self, one: bytes, two: bytes) -> None:
        for here, there in ((one, two), (two, one)):
            node = self.peers[here].node
            node.connected(self.now, PeerId(there), ("127.0.0.1:1",))
            self.carry_out(self.peers[here])
        self.settle()

    def unlink(self, one: bytes, two: bytes) -> None:
        for here, there in ((one, two), (two, one)):
            if here not in self.down:
                self.peers[here].node.disconnected(self.now, PeerId(there))
                self.carry_out(self.peers[here])

    def kill(self, index: int) -> None:
        victim = IDS[index]
        self.down.add(victim)
        for other in list(self.peers):
            if other not in self.down:
                self.unlink(other, victim)

    def carry_out(self, peer: Peer) -> None:
        while effects := peer.node.drain():
            for effect in effects:
                self._carry_out(peer, effect)

    def _carry_out(self, peer: Peer, effect: Effect) -> None:
        node, data = peer.node, peer.data
        if isinstance(effect, Send):
            self.deliver(peer.id, effect.peer, effect.message)
        elif isinstance(effect, Persist):
            if effect.reset:
                peer.records.clear()
            peer.records.append(effect.record)
        elif isinstance(effect, Emit):
            peer.told.append(effect.event)
        elif isinstance(effect, Fetch):
            self._fetch(peer, effect)
        elif isinstance(effect, Probe):
            self.queue.append(partial(self._answer, peer, effect.peer))
        elif isinstance(effect, fx.BeginAttempt):
            data.begin(effect.opened)
        elif isinstance(effect, fx.MeasurePart):
            square = data.measure(effect.key, effect.part, effect.index)
            node.measured(self.now, effect, square)
        elif isinstance(effect, fx.ReducePart):
            try:
                root = data.reduce(effect.key, effect.part, effect.chosen)
            except PeerFault:
                return  # no legal sum: there will be no result from here
            node.reduced(self.now, effect.key, effect.part, root)
        elif isinstance(effect, fx.StoreResult):
            node.stored(self.now, effect.key, data.assemble(effect.key).root, True)
        elif isinstance(effect, fx.ApplyResult):
            moved = data.apply(effect)
            self._serve(peer, effect.channel)
            node.applied(self.now, effect.channel, *moved)
        elif isinstance(effect, fx.PrepareSnapshot):
            self.queue.append(partial(self._prepare, peer, effect.snapshot))
        elif isinstance(effect, fx.InstallSnapshot):
            moved = data.install(effect.snapshot)
            self._serve(peer, effect.snapshot.channel)
            node.applied(self.now, effect.snapshot.channel, *moved)
        elif isinstance(effect, fx.CompleteResult):
            data.complete(effect.result)
            node.completed(self.now, effect.result)
        elif isinstance(effect, fx.ReleaseAttempt):
            data.release_attempt(effect.key)
        elif isinstance(effect, fx.ReleaseContribution):
            data.drop(effect.root)

    def _answer(self, peer: Peer, asked: PeerId) -> None:
        if asked not in self.down and asked in peer.node.linked() and peer.id not in self.down:
            peer.node.answered(self.now, asked, 0.0)
            self.carry_out(peer)

    def deliver(self, sender: bytes, to: bytes, message: messages.Message) -> None:
        """Put a message on the wire, by its bytes."""
        decoded = messages.decode(messages.encode(message))
        self.log.append((sender, to, decoded))

        def arrive() -> None:
            linked = to in self.peers and sender in self.peers[to].node.linked()
            if to in self.down or sender in self.down or not linked:
                return
            self.peers[to].node.receive(self.now, PeerId(sender), decoded)
            self.carry_out(self.peers[to])

        if not self.lose(sender, to, decoded):
            self.queue.append(arrive)

    def _prepare(self, peer: Peer, snapshot: fx.Snapshot) -> None:
        have, compare = peer.data.prepare(snapshot)
        peer.node.catchup.prepared(self.now, snapshot.channel, snapshot.root, have, compare)
        peer.node.tick(self.now)
        self.carry_out(peer)

    def _fetch_leaves(self, peer: Peer, effect: Fetch, snapshot: fx.Snapshot) -> None:
        """The hashes of a snapshot's chunks, without the chunks."""

        def answer() -> None:
            blob = self.peers[effect.peer].data.provide(effect.root)
            if blob is None or {effect.peer, peer.id} & self.down:
                peer.node.fetch_failed(self.now, effect.ticket, "unknown")
            else:
                incoming = peer.data.incoming(snapshot)
                assert incoming is not None
                incoming.expect(effect.first, blob.leaves[effect.first :][: effect.count])
                peer.node.fetched(self.now, effect.ticket)
            self.carry_out(peer)

        self.queue.append(answer)

    def _fetch(self, peer: Peer, effect: Fetch) -> None:
        if isinstance(effect.purpose, fx.SnapshotLeaves):
            self._fetch_leaves(peer, effect, effect.purpose.snapshot)
            return
        try:
            places = peer.data.destinations(effect.purpose, effect.first, effect.count)
        except LocalProtocolError:
            return
        provider = self.peers[effect.peer]
        blob = provider.data.provide(effect.root)

        def answer() -> None:
            gone = {effect.peer, peer.id} & self.down or effect.peer not in peer.node.linked()
            if gone or blob is None:
                peer.node.fetch_failed(self.now, effect.ticket, "unknown")
            else:
                for place, chunk in zip(places, blob.chunks[effect.first :], strict=False):
                    place[:] = chunk
                if isinstance(effect.purpose, fx.Snapshot):
                    arrived = peer.data.incoming(effect.purpose)
                    leaves = blob.leaves[effect.first :][: effect.count]
                    if arrived is not None:
                        arrived.proven(effect.first, leaves)
                try:
                    peer.data.accept(effect.purpose)
                except PeerFault:
                    peer.node.fetch_failed(self.now, effect.ticket, "invalid")
                except LocalProtocolError:
                    return
                else:
                    peer.node.fetched(self.now, effect.ticket)
            self.carry_out(peer)

        self.queue.append(answer)

    def settle(self) -> None:
        """Deliver everything that is on its way, and what follows from it."""
        for _ in range(100_000):
            if not self.queue:
                return
            self.queue.popleft()()
        raise AssertionError("the swarm never comes to rest")

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        self.settle()
        for _ in range(100_000):
            alive = [p for p in self.peers.values() if p.id not in self.down]
            due = min(p.node.deadline() for p in alive)
            if due > end:
                self.now = end
                return
            self.now = max(self.now + 1e-3, due)
            for peer in alive:
                if peer.node.deadline() <= self.now:
                    peer.node.tick(self.now)
                    self.carry_out(peer)
            self.settle()
        raise AssertionError("deadlines spin")

    # -- a trained model ------------------------------------------------------------------------

    def model(self) -> F32:
        """Everybody joins, peer 0 makes the model, everybody has it; returns θ⁰."""
        self.run(5.0)
        peer, theta = self[0], np.arange(VALUES, dtype=np.float32)
        state = CanonicalState.first(TRAIN, theta.copy(), chunk_values=CHUNK)
        peer.data.states[TRAIN] = state
        self._serve(peer, TRAIN)
        body = e.ModelDefined(bytes(32), (e.ChannelLayout(TRAIN, VALUES),), (state.root(),), A)
        peer.node.propose(self.now, Propose(e.encode_body(body)))
        peer.node.restore(self.now, TRAIN, 0, state.root())
        self.carry_out(peer)
        self.run(3.0)
        for other in self.peers.values():
            other.node.set_training(self.now, True)
            self.carry_out(other)
        self.settle()
        return theta

    def _serve(self, peer: Peer, channel: str) -> None:
        blob = peer.data.states[channel].blob()
        peer.data.register(blob)
        offers = peer.node.catchup.snapshots.setdefault(channel, [])
        offers.append((peer.data.states[channel].round, blob.root))

    def contribute(self, index: int, values: F32, channel: str = TRAIN, **changes: Any) -> bytes:
        """Hand over fp32 values; returns the root of the contribution."""
        peer = self[index]
        blob = peer.data.encode(values, "fp32")
        state = peer.data.states.get(channel)
        fields: dict[str, Any] = {
            "samples": 4.0,
            "base_round": state.round if state is not None else 0,
            "expect": 0,
        }
        offer = Offer(channel, blob.root, values.size, "fp32", **{**fields, **changes})
        peer.node.contribute(self.now, offer)
        self.carry_out(peer)
        return blob.root

    def leader(self) -> Peer:
        (found,) = (
            p for p in self.peers.values() if p.node.leader.active and p.id not in self.down
        )
        return found


def full(value: float) -> F32:
    return np.full(VALUES, value, np.float32)


def key(round_number: int = 0, attempt: int = 0, channel: str = TRAIN) -> RoundKey:
    return RoundKey(0, channel, round_number, attempt)
