"""A leader of steps with the leader of rounds beside it; everything else is said by the test.

Member A leads and serves nothing; B and C serve all stages; D drives. Proposals are logged when the
test says so.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import Effect, PeerId
from swarmtrain_protocols.messages import pipeline as m
from swarmtrain_protocols.messages import rounds as rm
from swarmtrain_protocols.messages.common import RoundKey
from swarmtrain_protocols.messages.member import StateReport
from swarmtrain_protocols.pipeline import claims as cl
from swarmtrain_protocols.pipeline.book import stage_channel, step_key
from swarmtrain_protocols.pipeline.step_policy import StepPolicy
from swarmtrain_protocols.pipeline.steps import StepLeader
from swarmtrain_protocols.rounds.leader import RoundLeader
from swarmtrain_protocols.rounds.policy import RoundPolicy
from tests.protocols.pipeline.stage_kit import StageLog, state_hash
from tests.protocols.rounds_kit import CHUNK, A, B, C, D, hash_of, sent, take

BLOCKS = 2
HOPS = tuple(range(BLOCKS + 2))
COUNT = 4
"""Micro-batches of a step."""
TTL_S = 3.0
LATE_S = 50.0
ROUND_S = 8.0
WORKERS = (B, C)
DRIVER = D
POLICY = StepPolicy(COUNT, 0.5, 1.0, lease_ttl_s=TTL_S, step_timeout_s=LATE_S)


class Podium:
    """The leader of a pipeline of two block stages."""

    def __init__(self, *, policy: StepPolicy = POLICY, ready: bool = True, skip: int = 0) -> None:
        self.log = StageLog(A, B, C, D, blocks=BLOCKS)
        for worker in WORKERS:
            self.log.assign(worker, 0, 1, 2)
        self.out: list[Effect] = []
        self.links = [PeerId(x) for x in (B, C, D)]
        self.proposed: list[e.EntryBody] = []
        self.refusing = False
        self.rounds = RoundLeader(
            me=PeerId(A),
            rng=random.Random(1),
            ledger=self.log.ledger,
            out=self.out,
            policy=RoundPolicy("fp32", "fp32", round_timeout_s=ROUND_S, chunk_values=CHUNK),
            propose=self.propose,
            connected=lambda: self.links,
        )
        self.steps = StepLeader(
            me=PeerId(A),
            ledger=self.log.ledger,
            out=self.out,
            policy=policy,
            propose=self.propose,
            connected=lambda: self.links,
            rounds=self.rounds,
            valve=lambda: skip,
        )
        self.now = 0.0
        self.rounds.activate(0.0, True)
        self.steps.activate(0.0, True)
        if ready:
            self.begin()

    def begin(self) -> None:
        """Everybody is in step, the first look has found nothing, and leases may be given."""
        self.in_step(*WORKERS)
        self.tick(0.1)
        self.answer_all({})
        self.tick(TTL_S)
        self.take()

    # -- around it -------------------------------------------------------------------------

    def propose(self, now: float, body: e.EntryBody) -> bool:
        if not self.refusing:
            self.proposed.append(body)
        return not self.refusing

    def commit(self) -> list[e.EntryBody]:
        """Everything that was proposed reaches the ledger."""
        bodies, self.proposed = self.proposed, []
        for body in bodies:
            self.log.ok(body)
        self.reconcile()
        return bodies

    def log_entry(self, body: e.EntryBody) -> None:
        self.log.ok(body)
        self.reconcile()

    def reconcile(self) -> None:
        self.rounds.reconcile(self.now)
        self.steps.reconcile(self.now)

    def tick(self, now: float) -> None:
        self.now = now
        self.rounds.step(now)
        self.steps.step(now)

    def say(self, peer: bytes, message: object) -> None:
        kinds = (rm.PartsHeld, rm.Holding, rm.Withdraw, rm.Ready, StateReport)
        core: RoundLeader | StepLeader = self.rounds if isinstance(message, kinds) else self.steps
        core.receive(self.now, PeerId(peer), message)

    def gone(self, peer: bytes) -> None:
        self.links.remove(PeerId(peer))
        self.rounds.disconnected(self.now, PeerId(peer))
        self.steps.disconnected(self.now, PeerId(peer))

    def back(self, peer: bytes) -> None:
        self.links.append(PeerId(peer))

    def in_step(self, *peers: bytes, **hashes: bytes) -> None:
        """Holders report the state before the step in progress."""
        step = self.log.ledger.pipeline.step
        for peer in peers:
            for stage in range(BLOCKS + 1):
                root = hashes.get(f"stage{stage}", state_hash(stage, step))
                name = stage_channel(stage)
                generation = self.log.ledger.generation
                self.say(peer, StateReport(generation, name, step, root, True, True))

    def take(self) -> list[Effect]:
        return take(self.out)

    def sent(self, kind: type) -> list[tuple[PeerId, Any]]:
        return sent(self.out, kind)

    # -- drivers ---------------------------------------------------------------------------

    def ask(self, room: int, *working: int, peer: bytes = DRIVER) -> list[m.Lease]:
        """A driver asks; what it is told."""
        self.take()
        key = step_key(self.log.ledger)
        self.say(peer, m.LeaseRequest(key.generation, key.step, room, working))
        return [lease for to, lease in self.sent(m.Lease) if to == peer]

    def done(self, *numbers: int, peer: bytes = DRIVER, loss: float = 2.0, **more: Any) -> None:
        key = step_key(self.log.ledger)
        for number in numbers:
            self.say(peer, m.MicroBatchDone(key.generation, key.step, number, loss, **more))

    def drive(self, *numbers: int) -> None:
        """The driver gets all and finishes some."""
        self.ask(COUNT)
        self.done(*numbers)

    # -- workers ---------------------------------------------------------------------------

    def query(self) -> int:
        """The number of the latest query."""
        return int(self.sent(m.CloseQuery)[-1][1].query)

    def answer(self, peer: bytes, have: dict[int, Iterable[int]], *, number: int = -1) -> None:
        claims: cl.Claims = {(hop, 0): cl.mask_of(numbers) for hop, numbers in have.items()}
        query = self.query() if number < 0 else number
        answer = m.CloseAnswer(step_key(self.log.ledger), query, cl.encode_claims(claims))
        self.say(peer, answer)

    def answer_all(self, have: dict[bytes, dict[int, Iterable[int]]]) -> None:
        number = self.query()
        for worker in WORKERS:
            self.answer(worker, have.get(worker, {}), number=number)

    def plan(self) -> m.StepPlan:
        """The latest plan; all its owners got the same."""
        plans = [plan for _, plan in self.sent(m.StepPlan)]
        assert all(plan == plans[-1] for plan in plans[-len(plans[-1].members) :])
        return plans[-1]

    def ready(self, peer: bytes, **changes: Any) -> None:
        """An owner has encoded what it owns of every stage."""
        plan = self.plan()
        shares = cl.by_stage(cl.owned(plan, peer, BLOCKS) or {}, BLOCKS)
        for stage, hops in shares.items():
            fields: dict[str, Any] = {
                "key": plan.key,
                "digest": cl.plan_digest(plan),
                "stage": stage,
                "root": hash_of(f"sum {stage} {peer.hex()[:4]}"),
                "owned": sum(mask.bit_count() for mask in hops.values()),
            }
            self.say(peer, m.StepReady(**{**fields, **changes}))

    def ready_all(self) -> None:
        for member in self.plan().members:
            self.ready(member)

    def close(self, have: dict[bytes, dict[int, Iterable[int]]] | None = None) -> e.StepClosed:
        """From an open step to one that is closed; every worker has everything by default."""
        everything = {hop: range(COUNT) for hop in HOPS}
        self.drive(*range(COUNT))
        self.answer_all(have or dict.fromkeys(WORKERS, everything))
        self.ready_all()
        (body,) = self.commit()
        assert isinstance(body, e.StepClosed)
        return body

    # -- rounds of the stages --------------------------------------------------------------

    def key(self, stage: int) -> RoundKey:
        key = step_key(self.log.ledger)
        return RoundKey(key.generation, stage_channel(stage), key.step, key.attempt)

    def hold(self, peer: bytes, stage: int, *, norm: float = 0.0, root: str = "result") -> None:
        self.say(peer, rm.Holding(self.key(stage), hash_of(f"{root} {stage}"), True, norm))

    def hold_all(self, norms: tuple[float, ...] = (0.0, 0.0, 0.0)) -> None:
        for stage, norm in enumerate(norms):
            for worker in WORKERS:
                self.hold(worker, stage, norm=norm)
