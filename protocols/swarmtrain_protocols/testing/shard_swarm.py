"""Swarms whose data are dealt in shards, in the simulator: what is claimed is what was trained on.

A trainer here keeps its own account of the positions in its progress, apart from the book that is
tested: what was aborted or left out goes into the next contribution, as the overlay does it. The
checker counts what went into committed rounds, by that account and from the log alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.manifest import make_manifest
from swarmtrain_protocols.messages.common import RoundKey
from swarmtrain_protocols.messages.member import Propose
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.member import Offer
from swarmtrain_protocols.shards import LeaseBook, Spans
from swarmtrain_protocols.testing.checks.base import settle_within
from swarmtrain_protocols.testing.checks.one_log import LogIsOne
from swarmtrain_protocols.testing.checks.rounds import RoundsAreRight
from swarmtrain_protocols.testing.faults import Fault, generate
from swarmtrain_protocols.testing.keyring import FakeKeyring
from swarmtrain_protocols.testing.site import Site, SitePart, SwarmSpec
from swarmtrain_protocols.testing.swarm import (
    HEAL_AT_S,
    Outcome,
    Swarm,
    describe,
    excused,
    plan_of,
    play,
    spec_of,
    start_sites,
    truth_of,
)
from swarmtrain_protocols.testing.truth import Truth
from swarmtrain_protocols.testing.world import Context, World
from swarmtrain_protocols.tickets import Capability, sign_capability

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Host

COUNTING = "train/0/0"
SHARDS, SAMPLES, PHASE_STEPS, BATCH = 12, 130, 2, 4
LIVENESS_S = 90.0


class DataTruth(Truth):
    """Also which positions each contribution was trained on, by its root."""

    trained: dict[bytes, tuple[int, ...]]


class DataSite(Site):
    """A site whose trainer takes what it trains on from a book of leases."""

    def __init__(self, ctx: Context, spec: SwarmSpec, part: SitePart, truth: DataTruth) -> None:
        self._book = LeaseBook()
        self._fresh: list[int] = []
        self._queued: list[int] = []
        self._flying: tuple[bytes, tuple[int, ...]] | None = None
        self._known = truth
        super().__init__(ctx, spec, part, truth)

    def tick(self, now: float) -> None:
        super().tick(now)
        core = self.core
        free = core.ledger.model is not None and not core.ledger.data.dealt
        free = free and core.joiner.is_member and core.log.leader is not None
        if free and self.part.trains and self._luck.chance(0.2):
            body = e.DataDefined(SAMPLES, bytes(32), self.ctx.peer)
            core.propose(now, Propose(e.encode_body(body)))

    def _look(self) -> None:
        """What the peer process would tell its trainer, sometimes later than it might."""
        ledger: Ledger = self.core.ledger
        if ledger.data.dealt and self._luck.chance(0.8):
            number = ledger.channels[COUNTING].round
            held = ledger.data.held(self.ctx.peer)
            listed = ledger.data.claimed.get(self.ctx.peer, ())
            self._book.update(ledger.generation, number, held, listed)

    def _hand_over(self, now: float, channel: str) -> None:
        if channel != COUNTING:
            super()._hand_over(now, channel)
            return
        core, state = self.core, self.plane.states.get(channel)
        if state is None or not core.ledger.data.dealt or not core.joiner.is_member:
            return
        if core.ledger.ended or not core.catchup.in_step(channel):
            return
        self._look()
        self._fresh += self._book.take(1 + self._luck.integer(2 * PHASE_STEPS * BATCH))
        if core.member.undecided(channel) is not None or self._flying is not None:
            return  # it trains on
        if self._luck.chance(0.03):  # progress that is not finite
            self._drop()
            return
        fresh, claims = len(self._fresh), self._book.boundary()
        if claims is None:
            self.truth.seen["data:void"] += 1
            self._drop()
            return
        content = tuple(sorted([*self._queued, *self._fresh]))
        self._queued, self._fresh = [], []
        if not content:
            self._book.decided(False, 0)
            self.truth.seen["data:starved"] += 1
            return
        # Without anything new it weighs what it weighed.
        self._announce(now, state.round, claims, content, float(fresh or len(content)))

    def _announce(
        self, now: float, round_number: int, claims: Spans, content: tuple[int, ...], fresh: float
    ) -> None:
        values = self.core.ledger.channels[COUNTING].values
        delta = self._numbers.normal(0.0, 0.01, values).astype(np.float32)
        codec = self.core.policy.scatter_codec
        blob = self.plane.encode(delta, codec)
        self.truth.offered(self.ctx.peer, COUNTING, blob, fresh, values, codec, round_number)
        self._known.trained[blob.root] = content
        self._flying = blob.root, content
        offer = Offer(COUNTING, blob.root, values, codec, fresh, round_number, 0, claims=claims)
        self.core.contribute(now, offer)

    def _drop(self) -> None:
        self._book.dropped()
        self._fresh, self._queued = [], []

    def emitted(self, now: float, event: object) -> None:
        super().emitted(now, event)
        if not isinstance(event, fx.ContributionDecided) or self._flying is None:
            return
        root, content = self._flying
        if event.root != root:
            return
        self._flying = None
        counted = event.outcome == "committed" and event.coefficient > 0
        self._book.decided(counted, event.key.round + 1)
        self.truth.seen["data:" + event.outcome] += 1
        if not counted:
            self._queued += content


class DataIsRight(LogIsOne):
    """Every position counts once: no committed result has one twice, and none is passed over."""

    def __init__(self, truth: DataTruth) -> None:
        super().__init__()
        self.truth = truth
        self.trained: Counter[int] = Counter()
        self.by_round: dict[int, Counter[int]] = {}
        self.opened: dict[RoundKey, e.RoundOpened] = {}
        self.chosen: dict[RoundKey, list[int]] = {}
        self.claim_bytes: list[int] = []
        self.looked_at = -1

    def first(
        self, world: World, host: Host, index: int, body: e.EntryBody, accepted: bool
    ) -> None:
        key = getattr(body, "key", None)
        if not accepted or (isinstance(key, RoundKey) and key.channel != COUNTING):
            return
        if isinstance(body, e.RoundOpened):
            self.opened[body.key] = body
            claims = [one.claims for one in body.contributors]
            self.claim_bytes.append(len(msgspec.msgpack.encode(claims)))
        elif isinstance(body, e.RoundSet):
            self.chosen[body.key] = [c.index for c in body.coefficients if c.value > 0]
        elif isinstance(body, e.RoundCommitted):
            self.by_round[body.key.round] = Counter(self.trained)
            self._committed(world, body.key)
        elif isinstance(body, e.Rewound):
            number = body.rounds[body.channels.index(COUNTING)]
            self.trained = Counter(self.by_round.get(number, self.trained))
            world.seen["data:rewound"] += 1

    def _committed(self, world: World, key: RoundKey) -> None:
        opened = self.opened[key]
        for index in self.chosen[key]:
            one = opened.contributors[index]
            content = self.truth.trained[one.root]
            claimed = [p for s in one.claims for p in range(s.first, s.first + s.count)]
            if claimed != list(content):
                world.violation("data-claim", f"{claimed} claimed, trained on {content}")
            self.trained.update(content)
        twice = [p for p, times in self.trained.items() if times > 1]
        if twice:
            world.violation("data-twice", f"positions {twice[:5]} in {key} and before")

    def always(self, world: World, host: Host) -> None:
        ledger = host.node.core.ledger if host.node is not None else None
        if ledger is None or not ledger.data.dealt or ledger.index + 1 != len(self.bodies):
            return
        if ledger.index == self.looked_at:
            return
        self.looked_at = ledger.index
        data = ledger.data
        ahead: list[int] = []
        for member in data.leases:
            ahead += [p for s in data.held(member) for p in range(s.first, s.first + s.count)]
        for shard, done in data.free.items():
            ahead += range(done, data.first(shard + 1))
        if sorted([*ahead, *self.trained]) != list(range(data.first(data.next))):
            world.violation("data-lost", f"{host.name}: leases and counted do not add up")
        if data.counted != self.trained.total():
            world.violation("data-count", f"{data.counted} said, {self.trained.total()} counted")


def build(seed: int) -> tuple[Swarm, DataIsRight]:
    """The swarm of a seed, with data that are dealt."""
    plain, parts = spec_of(seed)
    keys = msgspec.structs.replace(
        plain.manifest.keys, shards=SHARDS, inner_steps=PHASE_STEPS, batch_size=BATCH
    )
    founder = FakeKeyring("founder")
    manifest = make_manifest(keys, founder.peer_id, seed.to_bytes(16, "little"))
    ticket = Capability(b"ticket-1", manifest.run_id, role="trainer", vote=True)
    spec = SwarmSpec(
        manifest=manifest,
        capability=sign_capability(founder, ticket),
        founder_site=plain.founder_site,
        layout=plain.layout,
        chunk_values=plain.chunk_values,
        phase_s=plain.phase_s,
        work_s=plain.work_s,
        checkpoint_every=plain.checkpoint_every,
    )
    world = World(seed, strict_addresses=True)
    truth = truth_of(DataTruth, world, parts)
    truth.trained = {}
    rounds = RoundsAreRight(truth, manifest.keys, spec.chunk_values)
    data = DataIsRight(truth)

    def make(part: SitePart, ctx: Context) -> Site:
        return DataSite(ctx, spec, part, truth)

    start_sites(world, seed, spec.founder_site, parts, make, within_s=8.0)
    world.watch(rounds, data)
    return Swarm(world, truth, rounds, spec), data


def run_data_swarm(seed: int, schedule: Sequence[Fault] | None = None) -> Outcome:
    """One schedule; after healing everything that was begun must get done, by whoever is left."""
    faults = list(schedule) if schedule is not None else generate(seed, plan_of(seed))
    outcome = Outcome(seed, faults)
    swarm, data = build(seed)

    def trouble() -> None:
        swarm.world.run(HEAL_AT_S)
        if excused(swarm):
            return
        goal = max(data.trained, default=0) + SAMPLES
        done = partial(_complete, data, goal)
        outcome.recovery_s = settle_within(
            swarm.world, LIVENESS_S, done, lambda: _stands(swarm, data, goal)
        )

    play(swarm.world, outcome, (), trouble)
    outcome.committed = len(swarm.rounds.committed)
    outcome.seen["data:bytes"] = max(data.claim_bytes, default=0)
    outcome.seen["data:counted"] = data.trained.total()
    return outcome


def _complete(data: DataIsRight, goal: int) -> bool:
    return all(data.trained[position] == 1 for position in range(goal))


def _stands(swarm: Swarm, data: DataIsRight, goal: int) -> str:
    missing = [p for p in range(goal) if not data.trained[p]]
    sites = [site for name in swarm.world.hosts if (site := swarm.site(name)) is not None]
    data_there = [site.core.ledger.data for site in sites][:1]
    return f"missing {missing[:8]}; {data_there} {describe(swarm)}"
