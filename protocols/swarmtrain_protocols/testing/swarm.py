"""A whole swarm in the simulator: sites with real cores, real codecs and tiny tensors.

``run_swarm(seed)`` is one schedule: build the swarm of the seed, let trouble happen, heal, and
demand that everybody gets on. Safety is checked at every event, liveness within ``LIVENESS_S`` of
healing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from swarmtrain_protocols.entries import (
    Genesis,
    MemberJoined,
    ModelDefined,
    RoundCommitted,
    StewardsChanged,
)
from swarmtrain_protocols.manifest import RunKeys, make_manifest
from swarmtrain_protocols.testing.checks.base import Checker, settle_within
from swarmtrain_protocols.testing.checks.rounds import RoundsAreRight
from swarmtrain_protocols.testing.draws import Stream
from swarmtrain_protocols.testing.faults import MORE_KINDS, PLAIN_KINDS, Fault, Plan, generate
from swarmtrain_protocols.testing.flips import FlipsAreNamed, may_flip
from swarmtrain_protocols.testing.keyring import FakeKeyring, peer_id_of
from swarmtrain_protocols.testing.network import NetworkModel
from swarmtrain_protocols.testing.roles import plays
from swarmtrain_protocols.testing.site import Site, SitePart, SwarmSpec
from swarmtrain_protocols.testing.truth import Truth
from swarmtrain_protocols.testing.world import Context, Node, Violation, World
from swarmtrain_protocols.tickets import Capability, sign_capability

T = TypeVar("T", bound=Truth)
P = TypeVar("P", bound=SitePart)

TROUBLE_FROM_S = 5.0
TROUBLE_UNTIL_S = 22.0
HEAL_AT_S = 26.0
LIVENESS_S = 60.0
ROUNDS_AFTER_HEALING = 2

TRIGGERS = (
    *("persist", "synced", "fetch"),
    *("send:ready", "send:held", "send:result", "send:holding", "send:state"),
    *("do:BeginAttempt", "do:ReducePart", "do:StoreResult", "do:ApplyResult"),
    *("do:InstallSnapshot", "do:CompleteResult", "emit:LedgerChanged", "emit:StateAdvanced"),
)
AIMS = (
    *(("@leader", "append:RoundOpened"), ("@leader", "append:RoundSet")),
    *(("@leader", "append:RoundCommitted"), ("@leader", "persist:entries#3")),
    *(("@owner0", "send:result"), ("@owner0", "send:result#2"), ("@owner1", "fetched")),
    *(("@deputy0", "receive:takeover"), ("@steward", "persist:vote"), ("@steward", "send:vote")),
    *(("@leader", "@steward/send:appended"), ("@leader", "@member/send:holding#2")),
    *(("@actor", "*/entry:RoundSet#2"), ("@actor", "*/do:InstallSnapshot")),
)
"""Faults at a state: the leader as it commits, an owner that has told half of the members, …"""


@dataclass
class Outcome:
    """What came of one schedule. ``violation`` is the class of the first violation, or ''."""

    seed: int
    schedule: list[Fault]
    violation: str = ""
    text: str = ""
    tail: list[str] = field(default_factory=list)
    trace: str = ""
    seen: Counter[str] = field(default_factory=Counter)
    committed: int = 0
    aborted: int = 0
    simulated_s: float = 0.0
    recovery_s: float = 0.0


@dataclass
class Swarm:
    """A built world and the checker that knows the truth about it."""

    world: World
    truth: Truth
    rounds: RoundsAreRight
    spec: SwarmSpec

    def site(self, name: str) -> Site | None:
        node = self.world.hosts[name].node
        return node if isinstance(node, Site) else None


def spec_of(seed: int) -> tuple[SwarmSpec, tuple[SitePart, ...]]:
    """The swarm of a seed: three to five sites, one or two channels, one of three codecs."""
    luck = Stream(seed, "swarm")

    def pick(*values: float) -> float:
        return values[luck.integer(len(values))]

    count = 3 + luck.integer(3)
    codec = ("int8", "fp32", "bf16")[luck.integer(3)]
    names = "abcde"[:count]
    parts = [SitePart(name) for name in names]
    if count > 3 and luck.chance(0.3):  # a seed: no trainer, with or without state
        parts[-1] = SitePart(names[-1], trains=False, holds_state=luck.chance(0.5))
    if count > 3 and luck.chance(0.3):  # behind NAT
        parts[-2] = SitePart(names[-2], reachable=False, votes=luck.chance(0.5))
    shout = Stream(seed, "loud")
    if shout.chance(0.3):
        parts[0] = replace(parts[0], loud=shout.between(3.0, 100.0))
    # The order of these draws stays: seeds that once found a defect are replayed for ever.
    times = {"round_timeout_s": pick(4.0, 8.0), "grace_s": pick(1.0, 3.0)}
    layout = (("train/0/0", 40), ("train/0/1", 21)) if luck.chance(0.3) else (("train/0/0", 40),)
    groups = luck.chance(0.3)
    outer = {"overlap": "eager", "outer_lr": pick(0.7, 1.0), "outer_momentum": pick(0.0, 0.9)}
    named = Stream(seed, "outer")
    given = {name: value for name, value in outer.items() if named.chance(0.3)}  # else by the log
    founder = FakeKeyring("founder")
    manifest = make_manifest(
        RunKeys(codec_scatter=codec, codec_gather=codec, **times, **given),  # type: ignore[arg-type]
        founder.peer_id,
        seed.to_bytes(16, "little"),
    )
    capability = sign_capability(
        founder, Capability(b"ticket-1", manifest.run_id, role="trainer", vote=True)
    )
    spec = SwarmSpec(
        manifest=manifest,
        capability=capability,
        founder_site="a",
        layout=layout,
        chunk_values=16,
        phase_s=(0.5, pick(1.0, 2.5)),
        work_s=(0.001, pick(0.005, 0.1)),
        checkpoint_every=1 + luck.integer(6),
        group_every_s=3.0 if groups else 0.0,
        group_callers=0,
    )
    return spec, tuple(parts)


def build(seed: int, *, model: NetworkModel | None = None) -> Swarm:
    """The world of a seed, its sites started one after another, its checkers watching."""
    return assemble(seed, *spec_of(seed), model=model, within_s=8.0)


def assemble(
    seed: int,
    spec: SwarmSpec,
    parts: Sequence[SitePart],
    *,
    model: NetworkModel | None,
    within_s: float,
) -> Swarm:
    """A world of these sites, with everything that watches and aims at them."""
    world = World(seed, model=model, strict_addresses=True)
    truth = truth_of(Truth, world, parts)
    rounds = RoundsAreRight(truth, spec.manifest.keys, spec.chunk_values)

    def make(part: SitePart, ctx: Context) -> Site:
        return Site(ctx, spec, part, truth)

    start_sites(world, seed, spec.founder_site, parts, make, within_s=within_s)
    world.watch(rounds, FlipsAreNamed(rounds.states))
    world.trouble.may_flip = may_flip
    return Swarm(world, truth, rounds, spec)


def truth_of(kind: type[T], world: World, parts: Sequence[SitePart]) -> T:
    """What the checkers know of a swarm whose tickets lead to its first two sites."""
    return kind(
        parts={part.name: part for part in parts},
        names={peer_id_of(part.name): part.name for part in parts},
        ticket_sites=("a", "b"),
        seen=world.seen,
    )


def start_sites(
    world: World,
    seed: int,
    founder: str,
    parts: Sequence[P],
    make: Callable[[P, Context], Node],
    *,
    within_s: float,
) -> None:
    """Have the founder start at once and the others one after another, as the seed says."""
    luck = Stream(seed, "starts")
    world.trouble.plays = plays
    for part in parts:
        if not part.reachable:
            world.network.unreachable.append(part.name)
        start_s = 0.0 if part.name == founder else luck.between(0.0, within_s)
        world.add(part.name, partial(make, part), start_s=start_s)


def play(
    world: World, outcome: Outcome, checkers: Sequence[Checker], trouble: Callable[[], None]
) -> None:
    """Let the schedule of ``outcome`` happen to a built world and note how that ends.

    ``trouble`` lets time pass, heals, and asks for liveness.
    """
    world.watch(*checkers)
    world.plan(outcome.schedule)
    try:
        trouble()
    except Violation as broken:
        outcome.violation, outcome.text = broken.kind, str(broken)
        outcome.tail = world.trace.tail(60)
    outcome.trace = world.trace.digest()
    outcome.seen = world.seen
    outcome.simulated_s = world.now


def plan_of(seed: int) -> Plan:
    """What may go wrong in the swarm of a seed."""
    _, parts = spec_of(seed)
    names = tuple(part.name for part in parts)
    return Plan(
        names,
        start_s=TROUBLE_FROM_S,
        end_s=TROUBLE_UNTIL_S,
        count=(2, 12),
        kinds=PLAIN_KINDS,
        triggers=TRIGGERS,
        vanish_max=1 if len(names) > 3 else 0,
        vanishable=names,
        more=(*MORE_KINDS, "diskfull", "rot", "flip"),
        aims=AIMS,
    )


def run_swarm(seed: int, schedule: Sequence[Fault] | None = None, *checkers: Checker) -> Outcome:
    """One schedule from beginning to end; the schedule is that of the seed unless given."""
    faults = list(schedule) if schedule is not None else generate(seed, plan_of(seed))
    return run_built(build(seed), faults, *checkers)


def run_built(
    swarm: Swarm, faults: Sequence[Fault], *checkers: Checker, heal_at_s: float = HEAL_AT_S
) -> Outcome:
    """A schedule on a swarm that was built."""
    outcome = Outcome(swarm.world.seed, list(faults))

    def trouble() -> None:
        swarm.world.run(heal_at_s)
        if not excused(swarm):
            outcome.recovery_s = settle_within(
                swarm.world, LIVENESS_S, _Recovered(swarm), lambda: describe(swarm)
            )

    play(swarm.world, outcome, checkers, trouble)
    outcome.committed = len(swarm.rounds.committed)
    outcome.aborted = swarm.rounds.aborted
    return outcome


def excused(swarm: Swarm) -> bool:
    """A majority of the stewards, or of the holders of a channel's newest state, is gone for good.

    The run cannot go on then, and nobody promised that it would (DESIGN §4, §5). Any smaller loss
    must cost nothing, for a commit waits until a majority of the holders has the bytes (of one or
    two holders, all).
    """
    lost = [host.peer for host in swarm.world.hosts.values() if host.vanished]
    if not lost:
        return False
    voters: tuple[bytes, ...] = ()
    holders: dict[str, tuple[bytes, ...]] = {}
    for index in sorted(swarm.rounds.bodies):
        body = swarm.rounds.bodies[index]
        if isinstance(body, Genesis):
            voters = (body.steward,)
        elif isinstance(body, StewardsChanged):
            voters = body.voters
        elif isinstance(body, ModelDefined):
            holders.update((item.channel, (body.author,)) for item in body.layout)
        elif isinstance(body, RoundCommitted) and body.key.channel in swarm.rounds.states:
            holders[body.key.channel] = swarm.rounds.opened[body.key].holders
    excuse = 2 * _count(voters, lost) >= len(voters)
    for people in holders.values():
        need = len(people) if len(people) <= 2 else len(people) // 2 + 1
        excuse = excuse or _count(people, lost) >= need
    swarm.world.seen["excused"] += excuse
    return excuse


def stranded(swarm: Swarm) -> tuple[str, ...]:
    """Sites that were never let in and whose tickets name nobody who could do it any more.

    One address of a live member is enough to join; of these sites nothing is promised.
    """
    hosts = swarm.world.hosts
    bodies = swarm.rounds.bodies.values()
    joined = [body.member for body in bodies if isinstance(body, MemberJoined)]
    joined += [body.steward for body in bodies if isinstance(body, Genesis)]
    doors = [
        name
        for name in swarm.truth.ticket_sites
        if not hosts[name].vanished and hosts[name].peer in joined
    ]
    found = tuple(
        name
        for name, host in hosts.items()
        if not host.vanished and host.peer not in joined and not any(d != name for d in doors)
    )
    if found:
        swarm.world.seen["stranded"] += len(found)
    return found


def _count(people: Sequence[bytes], lost: Sequence[bytes]) -> int:
    return sum(peer in lost for peer in people)


class _Recovered:
    """Everybody alive is a member, holds the state of a round committed after healing, and, if it
    trains, has contributed to one since: nobody is left behind but the ``stranded``.
    """

    def __init__(self, swarm: Swarm) -> None:
        self.swarm = swarm
        self.target: dict[str, int] = {}
        for channel, _ in swarm.spec.layout:
            done = [r for c, r in swarm.rounds.committed if c == channel]
            self.target[channel] = max(done, default=-1) + 1 + ROUNDS_AFTER_HEALING
        self.served = dict(swarm.rounds.served)
        self.stranded = stranded(swarm)

    def __call__(self) -> bool:
        for name, host in self.swarm.world.hosts.items():
            if host.vanished or name in self.stranded:
                continue
            site = self.swarm.site(name)
            if site is None or not site.core.joiner.is_member:
                return False
            served = self.swarm.rounds.served.get(host.peer, 0)
            if site.part.trains and served <= self.served.get(host.peer, 0):
                return False
            if site.part.holds_state and any(
                channel not in site.plane.states or site.plane.states[channel].round < least
                for channel, least in self.target.items()
            ):
                return False
        return True


def describe(swarm: Swarm) -> str:
    """Where every site stands, for the report of a run that does not finish."""
    lines = []
    for name, host in swarm.world.hosts.items():
        site = swarm.site(name)
        if site is None:
            lines.append(f"{name}: vanished={host.vanished}")
            continue
        core = site.core
        tracks = {
            c: (t.round, t.busy, t.state_hash is not None) for c, t in core.catchup.tracks.items()
        }
        opened = {
            c.name: (c.round, c.attempt, c.open is not None, c.chosen is not None)
            for c in core.ledger.channels.values()
        }
        names = swarm.truth.names
        leader = names.get(core.log.leader or b"", "-")
        voters = "".join(names[v] for v in core.ledger.voters)
        links = "".join(names[p] for p in core.linked())
        lines.append(
            f"{name}: index={core.ledger.index} leader={leader} leads={core.log.is_leader} "
            f"member={core.joiner.is_member} voters={voters} links={links} tracks={tracks} "
            f"rounds={opened}"
        )
    return "\n  ".join(["", *lines])
