"""Members that differ, in the simulator: one computes slowly, one has a slow uplink (08 §2.8).

``run_unlike(seed)`` is one schedule with trouble, as ``swarm.run_swarm`` is. ``rounds_in`` lets
such a swarm work in calm weather: what the slow ones cost the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.codecs.base import F32
from swarmtrain_protocols.manifest import RunKeys, make_manifest
from swarmtrain_protocols.node_events import LedgerChanged
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.testing.checks.base import settle_within
from swarmtrain_protocols.testing.checks.rounds import RoundsAreRight
from swarmtrain_protocols.testing.draws import Stream
from swarmtrain_protocols.testing.faults import MORE_KINDS, PLAIN_KINDS, Fault, Plan, generate
from swarmtrain_protocols.testing.keyring import FakeKeyring
from swarmtrain_protocols.testing.network import NetworkModel
from swarmtrain_protocols.testing.site import Site, SitePart, SwarmSpec
from swarmtrain_protocols.testing.swarm import (
    AIMS,
    TRIGGERS,
    Outcome,
    Swarm,
    _Recovered,
    describe,
    excused,
    play,
    start_sites,
    truth_of,
)
from swarmtrain_protocols.testing.truth import Truth
from swarmtrain_protocols.testing.world import Context, World
from swarmtrain_protocols.tickets import Capability, sign_capability

if TYPE_CHECKING:
    from swarmtrain_protocols.testing.host import Host

CHANNEL = "train/0/0"
VALUES, CHUNK = 320, 16
STEPS, SAMPLES_PER_STEP = 20, 4.0
STEP_S = 0.5
"""A phase of 10 s, of which an exchange among like members takes 6 %."""
RATE_BYTES_PER_S = 3200.0
HEAL_AT_S = 90.0
LIVENESS_S = 200.0


@dataclass(frozen=True)
class UnlikePart(SitePart):
    """``slowness``: of each inner step. ``up_share``: of the uplink that the others have.

    ``adapts``: it does as many steps as fit. ``tells``: it says what its links carry.
    """

    slowness: float = 1.0
    up_share: float = 1.0
    adapts: bool = True
    tells: bool = True


@dataclass(frozen=True)
class Progress:
    """Phases of one trainer: their numbers, their displacement f32[n] and their samples."""

    phases: tuple[int, ...]
    values: F32
    samples: float


class UnlikeTruth(Truth):
    """Also which phases are in each contribution, by its root; numbers are unique in a swarm."""

    phases: dict[bytes, tuple[int, ...]]
    begun: int


class UnlikeSite(Site):
    """A trainer that does as many steps as fit, in mode ``off`` or ``eager``.

    What is returned to it goes along with the next contribution, as the overlay does it.
    """

    part: UnlikePart

    def __init__(self, ctx: Context, spec: SwarmSpec, part: UnlikePart, truth: UnlikeTruth) -> None:
        self._steps = 0
        self._base = -1
        self._waits = False
        self._known = truth
        self.handed: list[int] = []
        self.dropped: list[int] = []
        self.flying: tuple[bytes, Progress] | None = None
        self.returned: Progress | None = None
        super().__init__(ctx, spec, part, truth)
        if part.tells:
            up = RATE_BYTES_PER_S * part.up_share
            self.core.member.pace.bytes_per_s = up, RATE_BYTES_PER_S
        self._step_s = STEP_S * part.slowness

    def _due(self) -> int:
        """As many of its steps as take a phase of the faster half."""
        channel = self.core.ledger.channels.get(CHANNEL)
        if channel is None or not channel.phase_s or not self.part.adapts:
            return STEPS
        return min(2 * STEPS, max(1, round(channel.phase_s / self._step_s)))

    def _boundary(self, now: float, channel: str) -> None:
        """One inner step is over, or the trainer looks whether its last round is decided."""
        self._phase_at[channel] = now + self._step_s * self._luck.between(0.95, 1.05)
        state = self.plane.states.get(channel)
        undecided = self.core.member.undecided(channel) is not None
        if state is None or self.core.ledger.model is None or self.core.ledger.ended:
            return
        if not self.core.catchup.in_step(channel):
            return
        if self._waits:
            self._waits = undecided
            if not undecided:  # the next phase begins with the theta that was waited for
                self._base, self._steps = state.round, 0
            self._phase_at[channel] = now + (0.05 if undecided else self._step_s)
            return
        if self._base < 0 or state.round - self._base > self.core.policy.max_base_age_rounds:
            if self._base >= 0 and self.returned is not None:  # all progress since is too old
                self.dropped += self.returned.phases
                self.returned = None
            self._base, self._steps = state.round, 0
            return
        self._steps += 1
        if self._steps < self._due() or undecided or not self.core.joiner.is_member:
            return
        self._phase_s[channel] = STEPS * self._step_s
        spread = 0.01 * self.part.loud
        self._give(now, channel, self._numbers.normal(0.0, spread, state.theta.size))
        self._waits = self.spec.manifest.keys.overlap == "off"
        self._base, self._steps = (-1 if self._waits else state.round), 0

    def _give(self, now: float, channel: str, fresh: npt.NDArray[np.float64]) -> None:
        """Offer this phase, and what earlier ones left."""
        self._known.begun += 1
        self.handed.append(self._known.begun)
        old, samples = self.returned, SAMPLES_PER_STEP * self._steps
        values: F32 = fresh.astype(np.float32)
        phases: tuple[int, ...] = (self._known.begun,)
        if old is not None:
            values, samples = values + old.values, samples + old.samples
            phases = (*old.phases, *phases)
        self.returned = None
        codec, age = self.core.policy.scatter_codec, len(phases) - 1
        root = self._offer(now, channel, values, codec, samples, self._base, 0, age)
        self.flying = root, Progress(phases, values, samples)
        self._known.phases[root] = phases

    def emitted(self, now: float, event: object) -> None:
        super().emitted(now, event)
        if isinstance(event, fx.ContributionDecided) and self.flying is not None:
            root, given = self.flying
            if event.root == root:
                counted = event.outcome == "committed" and event.coefficient > 0
                self.flying, self.returned = None, None if counted else given
                self.truth.seen["returned"] += not counted


class UnlikeAreRight(RoundsAreRight):
    """AR1 to AR6 with late contributions; UL1: what is declared is so; UL2: samples count once;
    UL3: no phase is in two committed rounds, and none that its trainer still waits for is lost.
    """

    def __init__(self, truth: UnlikeTruth, keys: RunKeys, chunk_values: int) -> None:
        super().__init__(truth, keys, chunk_values)
        self.known = truth
        self.phases: dict[int, tuple[int, ...]] = {}
        """Phases that are in each committed round."""
        self.progress = {0: 0.0}
        """Samples of all sets before a round, by the entries."""
        self.samples: dict[bytes, float] = {}

    def first(
        self, world: World, host: Host, index: int, body: e.EntryBody, accepted: bool
    ) -> None:
        super().first(world, host, index, body, accepted)
        if accepted and isinstance(body, e.RoundOpened):
            self._declared(world, body)
        elif accepted and isinstance(body, e.RoundCommitted):
            self._count(world, body)
        elif accepted and isinstance(body, e.Rewound):
            number = body.rounds[body.channels.index(CHANNEL)]
            self.phases = {k: found for k, found in self.phases.items() if k < number}

    def _declared(self, world: World, body: e.RoundOpened) -> None:
        usual = 0 if self.mode(body.key.round) == "off" else 1
        for item in body.contributors:
            if item.base_round != self.truth.contributions[item.root].base_round:
                world.violation("UL1", f"{body.key} lists another base than {item} was made from")
            late = max(0, body.key.round - item.base_round - usual)
            phases = len(self.known.phases[item.root])
            if not math.isclose(item.discount, (1 + late) ** -0.5 / phases, rel_tol=1e-12):
                world.violation("UL1", f"{body.key}: {item}, {late} rounds late, {phases} phases")

    def _count(self, world: World, body: e.RoundCommitted) -> None:
        opened, total = self.opened[body.key], self.progress[body.key.round]
        before = {phase for found in self.phases.values() for phase in found}
        inside: list[int] = []
        for chosen in self.chosen[body.key].coefficients:
            item = opened.contributors[chosen.index]
            total += item.samples
            inside += self.known.phases[item.root]
            self.samples[item.member] = self.samples.get(item.member, 0.0) + item.samples
        twice = sorted(before.intersection(inside))
        if twice:
            world.violation("UL3", f"{body.key} counts phases {twice} again")
        self.phases[body.key.round] = tuple(inside)
        self.progress[body.key.round + 1] = total

    def lost(self, site: UnlikeSite) -> list[int]:
        """Phases of a site that are neither counted nor on their way, nor dropped by it."""
        known = {phase for found in self.phases.values() for phase in found}
        for here in (site.flying[1] if site.flying else None, site.returned):
            known.update(here.phases if here else ())
        return [phase for phase in site.handed if phase not in known.union(site.dropped)]

    def emitted(self, world: World, host: Host, event: object) -> None:
        super().emitted(world, host, event)
        if isinstance(event, LedgerChanged) and host.node is not None:
            channel = host.node.core.ledger.channels.get(CHANNEL)
            right = self.progress.get(channel.round) if channel is not None else None
            if channel is not None and right is not None and channel.samples != right:
                world.violation("UL2", f"{host.name} counts {channel.samples}, right: {right}")


ALIKE = tuple(UnlikePart(name) for name in "abcd")
UNLIKE = (*ALIKE[:2], UnlikePart("c", slowness=5.0), UnlikePart("d", up_share=0.1))
"""Four members, of which two are slow in one way each."""


def spec_of(overlap: str, seed: int) -> SwarmSpec:
    """A run of tiny tensors whose deadlines are all measured."""
    founder = FakeKeyring("founder")
    keys = RunKeys(
        codec_scatter="fp32",
        codec_gather="fp32",
        overlap=overlap,
        inner_steps=STEPS,
        start_peers=4,
        outer_lr=0.5,
        outer_momentum=0.5,
    )
    manifest = make_manifest(keys, founder.peer_id, seed.to_bytes(16, "little"))
    grant = Capability(b"ticket-1", manifest.run_id, role="trainer", vote=True)
    return SwarmSpec(
        manifest=manifest,
        capability=sign_capability(founder, grant),
        founder_site="a",
        layout=((CHANNEL, VALUES),),
        chunk_values=CHUNK,
        phase_s=(STEP_S, STEP_S),
        work_s=(0.001, 0.02),
        checkpoint_every=5,
    )


def build(seed: int, overlap: str, parts: Sequence[UnlikePart] = UNLIKE) -> Swarm:
    """The world of a seed, its sites started one after another, its checker watching."""
    spec = spec_of(overlap, seed)
    world = World(seed, model=NetworkModel(rate_bytes_per_s=RATE_BYTES_PER_S))
    world.transfers.up_share = {part.name: part.up_share for part in parts}
    truth = truth_of(UnlikeTruth, world, parts)
    truth.phases, truth.begun = {}, 0
    rounds = UnlikeAreRight(truth, spec.manifest.keys, spec.chunk_values)

    def make(part: UnlikePart, ctx: Context) -> UnlikeSite:
        return UnlikeSite(ctx, spec, part, truth)

    start_sites(world, seed, spec.founder_site, parts, make, within_s=4.0)
    world.watch(rounds)
    return Swarm(world, truth, rounds, spec)


def rounds_in(
    seed: int, overlap: str, seconds: float, parts: Sequence[UnlikePart]
) -> tuple[int, dict[str, float]]:
    """Rounds committed in the ``seconds`` after the third, and samples that count, by site.

    Raises:
        Violation: a checker objects.
    """
    swarm = build(seed, overlap, parts)
    checker = swarm.rounds
    assert isinstance(checker, UnlikeAreRight)
    swarm.world.run(300.0, lambda: len(checker.committed) >= 3)
    before = dict(checker.samples)
    first = len(checker.committed)
    swarm.world.run(swarm.world.now + seconds)
    for host in swarm.world.hosts.values():
        site = host.node
        assert isinstance(site, UnlikeSite)
        if lost := checker.lost(site):
            swarm.world.violation("UL3", f"phases {lost} of {host.name} are nowhere")
    gained = {
        name: checker.samples.get(host.peer, 0.0) - before.get(host.peer, 0.0)
        for name, host in swarm.world.hosts.items()
    }
    return len(checker.committed) - first, gained


def run_unlike(seed: int, schedule: Sequence[Fault] | None = None) -> Outcome:
    """One schedule with trouble, from beginning to end."""
    luck = Stream(seed, "unlike")
    overlap = ("off", "eager")[luck.integer(2)]
    swarm = build(seed, overlap)
    names = tuple(swarm.world.hosts)
    plan = Plan(
        names,
        start_s=30.0,
        end_s=HEAL_AT_S - 5.0,
        count=(1, 6),
        kinds=PLAIN_KINDS,
        triggers=TRIGGERS,
        vanish_max=0,
        vanishable=names,
        more=(*MORE_KINDS, "diskfull", "rot"),
        aims=AIMS,
    )
    faults = list(schedule) if schedule is not None else generate(seed, plan)
    outcome = Outcome(seed, faults)

    def trouble() -> None:
        swarm.world.run(HEAL_AT_S)
        if not excused(swarm):
            outcome.recovery_s = settle_within(
                swarm.world, LIVENESS_S, _Recovered(swarm), lambda: describe(swarm)
            )

    play(swarm.world, outcome, (), trouble)
    outcome.committed = len(swarm.rounds.committed)
    outcome.aborted = swarm.rounds.aborted
    return outcome
