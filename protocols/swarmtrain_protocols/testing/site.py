"""One simulated site: a ``NodeCore``, a ``DataPlane`` and a trainer without a model.

It does what the peer process does (``swarmtrain_peer.driver``) without an operating system: data
work takes simulated time, results and states go through the simulated disk, and after a crash the
site is rebuilt from what that disk holds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import Connect, Effect, PeerId, earliest
from swarmtrain_protocols.dataplane import DataPlane
from swarmtrain_protocols.errors import LocalProtocolError, PeerFault, StateSpoilt
from swarmtrain_protocols.manifest import Manifest, make_genesis
from swarmtrain_protocols.membership import SiteConfig
from swarmtrain_protocols.merkle import Blob, leaf_hash
from swarmtrain_protocols.messages import Message
from swarmtrain_protocols.messages.member import Propose
from swarmtrain_protocols.node import NodeCore
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.member import Offer
from swarmtrain_protocols.state import CanonicalState
from swarmtrain_protocols.testing.draws import Stream
from swarmtrain_protocols.testing.keyring import FakeKeyring
from swarmtrain_protocols.testing.network import address_of
from swarmtrain_protocols.testing.site_disk import SiteDisk
from swarmtrain_protocols.testing.truth import Truth
from swarmtrain_protocols.wallclock import WallClock

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Completion, Context

SNAPSHOTS_KEPT = 3
REDIAL_S = 2.0


@dataclass(frozen=True)
class SwarmSpec:
    """A swarm of tiny tensors, equal for all its sites.

    ``layout``: values per state channel. ``group_every_s``: mean pause between two calls of an
    all-reduce in the group channel (0: no groups). ``work_s``: seconds of data work (low, high).
    """

    manifest: Manifest
    capability: bytes
    founder_site: str
    layout: tuple[tuple[str, int], ...]
    chunk_values: int
    phase_s: tuple[float, float]
    work_s: tuple[float, float]
    checkpoint_every: int = 1
    group_every_s: float = 0.0
    group_callers: int = 0
    group_values: int = 24


@dataclass(frozen=True)
class SitePart:
    """What differs between the sites of a swarm."""

    name: str
    trains: bool = True
    holds_state: bool = True
    votes: bool = True
    reachable: bool = True
    loud: float = 1.0
    """Factor on what its trainer hands over."""


class Site:
    """Satisfies ``testing.host.Node``."""

    def __init__(self, ctx: Context, spec: SwarmSpec, part: SitePart, truth: Truth) -> None:
        self.ctx = ctx
        self.spec = spec
        self.part = part
        self.truth = truth
        self.plane = DataPlane(keys=spec.manifest.keys, chunk_values=spec.chunk_values)
        self._luck = Stream(ctx.rng.getrandbits(60), "site", ctx.name)
        self._numbers = np.random.default_rng(ctx.rng.getrandbits(60))
        self._extra: list[Effect] = []
        self._snapshots: dict[str, list[bytes]] = {}
        self.disk = SiteDisk(ctx.disk, self.plane, truth.seen)
        self._wall = WallClock(ctx.now, ctx.wall_s)
        self._links = 0
        self._redial_at = ctx.now
        self._model_at = math.inf
        self._phase_at: dict[str, float] = {}
        self._phase_s: dict[str, float] = {}
        self._group_at = math.inf
        self._stopping = False
        found = ctx.name == spec.founder_site and not ctx.records
        self.core = NodeCore(
            site=SiteConfig(
                name=ctx.name,
                addresses=(address_of(ctx.name),) if part.reachable else (),
                trains=part.trains,
                holds_state=part.holds_state,
                votes=part.votes,
                reachable=part.reachable,
                capability=spec.capability,
            ),
            manifest=spec.manifest,
            keyring=ctx.keyring,
            rng=random.Random(ctx.rng.getrandbits(64)),
            now=ctx.now,
            wall_s=ctx.wall_s,
            records=ctx.records,
            genesis=self._genesis() if found else None,
            chunk_values=spec.chunk_values,
        )
        self._restore(ctx.now)
        self.core.set_training(ctx.now, part.trains)
        if part.trains:
            for channel, _ in spec.layout:
                self._phase_at[channel] = ctx.now + self._luck.between(*spec.phase_s)
            self._model_at = ctx.now + 0.5
        if spec.group_every_s:
            self._group_at = ctx.now + self._luck.between(0.0, spec.group_every_s)

    def _genesis(self) -> e.Genesis:
        founder = FakeKeyring("founder")
        return make_genesis(founder, self.spec.manifest.run_id, self.ctx.peer)

    # --- restart ---------------------------------------------------------------------------------

    def _restore(self, now: float) -> None:
        """Load states and results from the disk, as the peer process does when it starts."""
        for state in self.disk.load():
            self.plane.states[state.channel] = state
            for saved in self.disk.results_after(state):
                self.plane.adopt_result(Blob.of(saved.chunks), saved.values, saved.codec)
                self.core.stored_earlier(saved.channel, saved.round, saved.root)
            self._adopt(now, state)

    def _adopt(self, now: float, state: CanonicalState) -> None:
        """A state that was loaded or made here, not computed from results."""
        self.plane.states[state.channel] = state
        self._serve_snapshot(state.channel)
        self.core.restore(now, state.channel, state.round, state.root())

    def _serve_snapshot(self, channel: str) -> None:
        state = self.plane.states[channel]
        blob = state.blob()
        self.plane.register(blob)
        kept = self._snapshots.setdefault(channel, [])
        kept.append(blob.root)
        offers = self.core.catchup.snapshots.setdefault(channel, [])
        offers.append((state.round, blob.root))
        while len(kept) > SNAPSHOTS_KEPT:
            self.plane.drop(kept.pop(0))
            offers.pop(0)

    # --- core.Core and links ---------------------------------------------------------------------

    def receive(self, now: float, peer: PeerId, message: Message) -> None:
        try:
            self.core.receive(now, peer, message)
        except PeerFault as fault:  # the driver counts it and goes on
            self.truth.seen["fault-raised:" + fault.code] += 1

    def tick(self, now: float) -> None:
        self.core.tick(now)
        if now >= self._redial_at:
            self._redial_at = now + REDIAL_S
            if not self.core.joiner.is_member or self.core.log.leader is None:
                self._dial_ticket()
        if now >= self._model_at:
            self._model_at = now + 1.0
            self._define_model(now)
        for channel in self._phase_at:
            if now >= self._phase_at[channel]:
                self._boundary(now, channel)
        if now >= self._group_at:
            self._group_at = now + self.spec.group_every_s * self._luck.between(0.5, 1.5)
            self._call_group(now)

    def _boundary(self, now: float, channel: str) -> None:
        """A phase of the trainer is over, and the next one begins."""
        length_s = self._luck.between(*self.spec.phase_s)
        self._phase_at[channel] = now + length_s
        self._hand_over(now, channel)
        self._phase_s[channel] = length_s

    def _dial_ticket(self) -> None:
        """The ticket names the founding site and one more."""
        for name in self.truth.ticket_sites:
            if name != self.ctx.name:
                peer = self.ctx.peers[name]
                self._extra.append(Connect(peer, (address_of(name),)))

    def deadline(self) -> float:
        own_at = earliest(self._redial_at, self._model_at, self._group_at)
        for at in self._phase_at.values():
            own_at = earliest(own_at, at)
        return earliest(self.core.deadline(), own_at)

    def drain(self) -> list[Effect]:
        extra, self._extra = self._extra, []
        return [*self.core.drain(), *extra]

    def connected(self, now: float, peer: PeerId) -> None:
        self._links += 1
        name = self.truth.name_of(peer)
        reachable = self.truth.parts[name].reachable
        self.core.connected(now, peer, (address_of(name),) if reachable else ())

    def answered(self, now: float, peer: PeerId, rtt_s: float) -> bool:
        return self.core.answered(now, peer, rtt_s)

    def disconnected(self, now: float, peer: PeerId) -> None:
        self._links -= 1
        self._wall.forget(peer)
        self.core.disconnected(now, peer)

    def wall_told(self, now: float, peer: PeerId, wall_s: float) -> None:
        """The hello of a link tells the other side's wall clock."""
        self._wall.told(now, peer, wall_s)
        self.core.dht.set_wall(now, self._wall.wall_s(now))

    def wall_set(self, now: float, wall_s: float) -> None:
        """This machine's wall clock was set; the run's is that of most."""
        self._wall.anchored(now, wall_s)
        self.core.dht.set_wall(now, self._wall.wall_s(now))

    def flip_bit(self, luck: Stream, unseen: bool) -> str:
        """One bit of a state that is in step here is another; its channel, or ''.

        ``unseen``: it has flipped within the step, so that the state's own hash is of no help.
        """
        names = [name for name in sorted(self.plane.states) if self.core.catchup.in_step(name)]
        if not names:
            return ""
        channel = names[luck.integer(len(names))]
        theta = self.plane.states[channel].theta.view(np.uint32)
        theta[luck.integer(theta.size)] ^= np.uint32(1 << luck.integer(23))
        if unseen:
            self.plane.states[channel].hash_again()
        return channel

    # --- trainer ---------------------------------------------------------------------------------

    def emitted(self, now: float, event: object) -> None:
        """The layer above sees an event."""

    def _define_model(self, now: float) -> None:
        """The first trainer that finds no model in the log makes its own weights the model."""
        ledger = self.core.ledger
        if ledger.model is not None:
            self._model_at = math.inf
            return
        if not self.core.joiner.is_member or self.core.log.leader is None:
            return
        if not self.plane.states:
            for channel, values in self.spec.layout:
                theta = self._numbers.normal(0.0, 0.1, values).astype(np.float32)
                state = CanonicalState.first(channel, theta, chunk_values=self.spec.chunk_values)
                self.truth.models[channel, state.root()] = theta.copy()
                self.disk.save(state, sync=True)  # weights come first, then the entry
                self._adopt(now, state)
        states = [self.plane.states[channel] for channel, _ in self.spec.layout]
        if all(state.round == 0 for state in states):
            layout = tuple(e.ChannelLayout(c, n) for c, n in self.spec.layout)
            roots = tuple(state.root() for state in states)
            body = e.ModelDefined(bytes(32), layout, roots, self.ctx.peer)
            self.core.propose(now, Propose(e.encode_body(body)))

    def _hand_over(self, now: float, channel: str) -> None:
        """A boundary of the trainer: a fresh pseudo-gradient from its view of the state."""
        core = self.core
        state = self.plane.states.get(channel)
        if state is None or core.ledger.model is None or not core.joiner.is_member:
            return
        if core.member.undecided(channel) is not None or core.ledger.ended:
            return
        if not core.catchup.in_step(channel):
            return
        spread = 0.01 * self.part.loud
        values = self._numbers.normal(0.0, spread, state.theta.size).astype(np.float32)
        samples = float(1 + self._luck.integer(64))
        codec = core.policy.scatter_codec
        self._offer(now, channel, values, codec, samples, state.round, 0)

    def _call_group(self, now: float) -> None:
        channel = "group/g"
        if self.core.member.undecided(channel) is not None or not self.core.joiner.is_member:
            return
        values = self._numbers.normal(0.0, 1.0, self.spec.group_values).astype(np.float32)
        expect = self.spec.group_callers
        self._offer(now, channel, values, "fp32", 1.0, 0, expect)

    def _offer(
        self,
        now: float,
        channel: str,
        values: np.ndarray[tuple[int], np.dtype[np.float32]],
        codec: str,
        samples: float,
        base_round: int,
        expect: int,
        age: int = 0,
    ) -> bytes:
        blob = self.plane.encode(values, codec)
        made = samples, values.size, codec, base_round, age
        self.truth.offered(self.ctx.peer, channel, blob, *made)
        phase_s = self._phase_s.get(channel, 0.0)
        offer = Offer(channel, blob.root, values.size, codec, samples, base_round, expect, phase_s)
        offer.age = age
        self.core.contribute(now, offer)
        return blob.root

    # --- data plane ------------------------------------------------------------------------------

    def provide(self, root: bytes) -> Blob | None:
        found = self.plane.provide(root)
        if found is not None:
            return found
        return self.disk.served(root)

    def accept(self, purpose: object, first: int, chunks: list[bytes]) -> None:
        if isinstance(purpose, fx.SnapshotLeaves):
            self.plane.expect(purpose, first, chunks)
            return
        try:
            places = self.plane.destinations(purpose, first, len(chunks))
        except LocalProtocolError:
            return  # released meanwhile; the core does not wait for the answer
        for place, chunk in zip(places, chunks, strict=True):
            place[:] = chunk
        if isinstance(purpose, fx.Snapshot) and (found := self.plane.incoming(purpose)):
            found.proven(first, [leaf_hash(chunk) for chunk in chunks])
        self.plane.accept(purpose)

    def fetched(self, now: float, ticket: int) -> None:
        self.core.fetched(now, ticket)

    def fetch_failed(self, now: float, ticket: int, reason: str) -> None:
        self.core.fetch_failed(now, ticket, reason)

    def execute(self, now: float, effect: Effect) -> list[Completion]:
        """Data-plane effects, as ``swarmtrain_peer.driver`` does them."""
        if isinstance(effect, fx.BeginAttempt):
            self.plane.begin(effect.opened)
        elif isinstance(effect, fx.ReleaseAttempt):
            self.plane.release_attempt(effect.key)
        elif isinstance(effect, fx.ReleaseContribution):
            self.plane.drop(effect.root)
        elif isinstance(effect, fx.DropState):
            self._drop_state(effect.channel)
        elif isinstance(effect, fx.MeasurePart):
            return [self._later(lambda at: self._measure(at, effect))]
        elif isinstance(effect, fx.ReducePart):
            return [self._later(lambda at: self._reduce(at, effect))]
        elif isinstance(effect, fx.StoreResult):
            return [self._later(lambda at: self._store(at, effect))]
        elif isinstance(effect, fx.ApplyResult):
            return [self._later(lambda at: self._apply(at, effect))]
        elif isinstance(effect, fx.PrepareSnapshot):
            return [(0.0, lambda at: self._prepare(at, effect.snapshot))]
        elif isinstance(effect, fx.InstallSnapshot):
            return [self._later(lambda at: self._install(at, effect))]
        elif isinstance(effect, fx.CompleteResult):
            return [self._later(lambda at: self._complete(at, effect))]
        else:
            raise AssertionError(f"unknown effect {effect!r}")
        return []

    def _drop_state(self, channel: str) -> None:
        self.plane.drop_state(channel)
        for root in self._snapshots.pop(channel, []):
            self.plane.drop(root)
        self.core.catchup.snapshots.pop(channel, None)
        self.disk.drop(channel)

    def _later(self, call: Callable[[float], None]) -> Completion:
        return self._luck.between(*self.spec.work_s), call

    def _measure(self, now: float, effect: fx.MeasurePart) -> None:
        try:
            square = self.plane.measure(effect.key, effect.part, effect.index)
        except LocalProtocolError:
            self.truth.seen["measure-after-release"] += 1
            return
        self.core.measured(now, effect, square)

    def _reduce(self, now: float, effect: fx.ReducePart) -> None:
        try:
            root = self.plane.reduce(effect.key, effect.part, effect.chosen)
        except LocalProtocolError:
            self.truth.seen["reduce-after-release"] += 1
            return
        self.core.reduced(now, effect.key, effect.part, root)

    def _store(self, now: float, effect: fx.StoreResult) -> None:
        try:
            blob = self.plane.assemble(effect.key)
        except LocalProtocolError:
            self.truth.seen["store-after-release"] += 1
            return
        channel = effect.key.channel
        durable = channel.startswith("train/")
        if durable:
            values = self.core.ledger.channels[channel].values
            durable = self._save_result(channel, effect.key.round, blob, values)
        stepwise = self.plane.rules.stepwise(channel)
        norm = self.plane.square_norm(blob.root) if stepwise else 0.0
        self.core.stored(now, effect.key, blob.root, durable, norm)

    def _save_result(self, channel: str, round_number: int, blob: Blob, values: int) -> bool:
        codec = self.plane.result_codec(blob.root)
        return self.disk.save_result(channel, round_number, blob, values, codec)

    def _apply(self, now: float, effect: fx.ApplyResult) -> None:
        try:
            round_number, state_hash = self.plane.apply(effect)
        except StateSpoilt as spoilt:
            self.core.install_failed(now, effect.channel, str(spoilt), spoilt=True)
            return
        self._moved(now, effect.channel, round_number, state_hash, False)

    def _prepare(self, now: float, snapshot: fx.Snapshot) -> None:
        have, compare = self.plane.prepare(snapshot)
        self.truth.seen["prepared:some-here"] += bool(have)
        self.core.catchup.prepared(now, snapshot.channel, snapshot.root, have, compare)

    def _install(self, now: float, effect: fx.InstallSnapshot) -> None:
        channel = effect.snapshot.channel
        try:
            round_number, state_hash = self.plane.install(effect.snapshot)
        except PeerFault as fault:
            self.core.install_failed(now, channel, str(fault))
            return
        self._moved(now, channel, round_number, state_hash, True)

    def _moved(
        self, now: float, channel: str, round_number: int, state_hash: bytes, installed: bool
    ) -> None:
        if installed or self.disk.due(channel, round_number, self.spec.checkpoint_every):
            synced = self._luck.chance(0.7)  # else a crash may find the older one
            self.disk.save(self.plane.states[channel], sync=synced)
        self._serve_snapshot(channel)
        self.core.applied(now, channel, round_number, state_hash)

    def _complete(self, now: float, effect: fx.CompleteResult) -> None:
        result = effect.result
        try:
            blob = self.plane.complete(result)
        except PeerFault as fault:
            self.core.install_failed(now, result.channel, str(fault))
            return
        self._save_result(result.channel, result.round, blob, result.values)
        self.core.completed(now, result)
