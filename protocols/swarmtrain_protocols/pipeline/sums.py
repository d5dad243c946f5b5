"""What the accumulators of a site hold, and how a worker takes part in the close of a step.

Spec 11 §2.3 and §2.4. Invariant: the accumulator of a hop is the sum of the gradients of exactly
the micro-batches in its have-set. Taking one out means recomputing it and subtracting.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Effect, Emit, PeerId, Send
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.messages import pipeline as m
from swarmtrain_protocols.messages.pipeline import HopRequest, StepKey, Tensor
from swarmtrain_protocols.pipeline import claims as cl
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.book import stage_channel, step_key
from swarmtrain_protocols.pipeline.hops import hops_of, stage_of
from swarmtrain_protocols.pipeline.requests import skipped_hop
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.member import Offer, RoundMember

FROZEN_S_MAX = 300.0
"""A leader that closes a step says more within this time, or a new one asks again."""

ANSWER_AGAIN_S = 5.0
"""Frozen and told nothing, a worker says again what it has: its answer, or the word to go on, may
be lost."""

Ground = tuple[int, int, int]
"""(generation, step, era): what have-sets belong to."""
NOWHERE: Ground = (-1, -1, -1)
"""Of a computation whose accumulator has been cleared behind it."""


@dataclass(slots=True)
class Claim:
    """A micro-batch in an accumulator: what to recompute it from, and what was answered."""

    peer: PeerId
    request: HopRequest
    skipped: int
    output: Tensor | None
    loss: float

    def same_tensors(self, request: HopRequest) -> bool:
        """Asked again with the very same bytes, the same answer will do."""
        mine = self.request
        return (mine.inputs.root, mine.gradient.root, mine.path) == (
            request.inputs.root,
            request.gradient.root,
            request.path,
        )


@dataclass(slots=True)
class _Plan:
    """What this worker owns of a planned step, by stage and hop."""

    key: StepKey
    digest: bytes
    shares: dict[int, dict[int, int]]
    asked: dict[int, None] = field(default_factory=dict)
    ready: dict[int, m.StepReady] = field(default_factory=dict)


class Sums:
    """Have-sets of all stages served here.

    Args:
        member: takes the encoded sums as contributions to the rounds of the stages.
        next_job: numbers computations.
    """

    def __init__(
        self,
        *,
        me: PeerId,
        ledger: Ledger,
        out: list[Effect],
        member: RoundMember,
        scatter_codec: str,
        next_job: Callable[[], int],
    ) -> None:
        self.ledger = ledger
        self.leader: PeerId | None = None
        self.life = 0
        """Of the trainer: counts those that were lost."""
        self._me = me
        self._out = out
        self._member = member
        self._codec = scatter_codec
        self._next_job = next_job
        self._have: dict[int, dict[int, Claim]] = {}
        self._cached = 0
        self._adding: dict[int, tuple[Ground, int, int]] = {}
        self._undoing: dict[int, tuple[Ground, int, int]] = {}
        self._ground: Ground = (0, 0, 0)
        self._key = StepKey(0, 0, 0)
        self._frozen: int | None = None
        self._frozen_at = math.inf
        self._again_at = math.inf
        self._owing = False
        self._early: m.CloseQuery | None = None
        self._plan: _Plan | None = None
        self._handing: dict[int, int] = {}

    @property
    def _blocks(self) -> int:
        return self.ledger.pipeline.blocks

    # -- have-sets -------------------------------------------------------------------------

    def have(self, hop: int) -> list[int]:
        """Micro-batches whose gradient at ``hop`` is in the accumulator, ascending."""
        return sorted(self._have.get(hop, {}))

    def claim(self, hop: int, k: int) -> Claim | None:
        """The micro-batch ``k`` in the accumulator of ``hop``."""
        return self._have.get(hop, {}).get(k)

    def stages(self) -> list[int]:
        """Stages whose accumulators hold anything, or are about to."""
        hops = [hop for hop, claims in self._have.items() if claims]
        hops += [hop for ground, hop, _ in self._adding.values() if ground == self._ground]
        return sorted({stage_of(hop, self._blocks) for hop in hops})

    def adder(self, hop: int, k: int) -> int | None:
        """The job that accumulates ``k`` at ``hop`` at this moment."""
        slot = (self._ground, hop, k)
        return next((job for job, mine in self._adding.items() if mine == slot), None)

    def begin(self, job: int, request: HopRequest) -> None:
        """``job`` accumulates from now on."""
        self._adding[job] = (self._ground, request.id.hop, request.id.micro_batch)

    def added(
        self, job: int, peer: PeerId, request: HopRequest, output: Tensor, loss: float
    ) -> None:
        """``job`` has accumulated."""
        ground, hop, k = self._adding.pop(job)
        if ground != self._ground:
            return  # what it was added to has been cleared since
        skipped = skipped_hop(request, self._blocks)
        self._have.setdefault(hop, {})[k] = Claim(peer, request, skipped, output, loss)
        self._cached += len(output.data)
        if self._cached > limits.HOP_REPLIES_CACHED_BYTES_MAX:
            for claims in self._have.values():
                for claim in claims.values():
                    claim.output = None  # asked again it is recomputed, and not accumulated
            self._cached = 0
        self._answer()

    def not_added(self, job: int) -> None:
        """``job`` has failed, and the accumulator is as it was."""
        if self._adding.pop(job, None) is not None:
            self._answer()

    def lost(self) -> None:
        """The trainer process is gone with its accumulators; what is encoded is still here."""
        self.life += 1
        self._have.clear()
        self._adding.clear()
        self._undoing.clear()
        self._handing.clear()
        self._cached = 0
        plan = self._plan
        if plan is not None and any(stage not in plan.ready for stage in plan.shares):
            self._void()

    # -- following the ledger --------------------------------------------------------------

    @property
    def closing(self) -> bool:
        """No backward of this step is taken at the moment."""
        return self._frozen is not None or self.ledger.pipeline.closed is not None

    def holds_back(self, request: HopRequest) -> bool:
        """The request has to wait until the set of the step is decided."""
        return request.kind == "backward" and self.closing

    def takes(self, stage: int) -> bool:
        """Gradients of the stage are wanted."""
        return True

    def reconcile(self, now: float) -> bool:
        """True if what was accumulated belongs to the past: it has been cleared."""
        state, key = self.ledger.pipeline, step_key(self.ledger)
        ground = (key.generation, key.step, state.era)
        moved = ground != self._ground
        if moved:
            self._clear()
            self._ground = ground
        if key != self._key:
            self._key = key
            self.thaw()
        early, self._early = self._early, None
        if early is not None and early.key >= key:
            self._queried(now, early)
        return moved

    def _clear(self) -> None:
        stages = self.stages()
        if stages:
            self._out.append(px.ClearGradients(tuple(stages), self.life))
        self._have.clear()
        self._cached = 0
        for stage in range(len(self.ledger.pipeline.stages)):
            offer = self._member.undecided(stage_channel(stage))
            if offer is not None and offer.pledged and offer.bound is None:
                self._member.retract(stage_channel(stage))

    def thaw(self) -> None:
        """Backwards are taken again; what was planned is void."""
        self._frozen, self._frozen_at, self._owing = None, math.inf, False
        self._again_at = math.inf
        self._plan = None

    def tick(self, now: float) -> None:
        if self._frozen_at + FROZEN_S_MAX <= now:
            self.thaw()
        elif self._again_at <= now:
            self._again_at = now + ANSWER_AGAIN_S
            self._owing = self._plan is None
            self._answer()

    def deadline(self) -> float:
        return min(self._frozen_at + FROZEN_S_MAX, self._again_at)

    # -- the leader asks -------------------------------------------------------------------

    def receive(self, now: float, peer: PeerId, message: object) -> None:
        """CloseQuery, Reopen, StepPlan."""
        if peer != self.leader:
            return  # of a leader that is no more: what it says is void
        if isinstance(message, m.CloseQuery):
            self._queried(now, message)
        elif isinstance(message, m.Reopen):
            if (message.key, message.query) == (self._key, self._frozen):
                self.thaw()
        elif isinstance(message, m.StepPlan):
            self._planned(now, peer, message)

    def _queried(self, now: float, query: m.CloseQuery) -> None:
        if query.key != self._key:
            self._early = query if query.key > self._key else self._early
            return
        if self.ledger.pipeline.closed is not None:
            return
        if query.query != self._frozen:
            self._freeze(now, query.query)
        elif self._plan is not None:
            return  # said twice: the plan that was made of the answer is here
        self._owing = True
        self._answer()

    def _freeze(self, now: float, query: int) -> None:
        self._frozen, self._frozen_at, self._again_at = query, now, now + ANSWER_AGAIN_S
        self._plan = None

    def _claims(self) -> cl.Claims:
        found: cl.Claims = {}
        for hop in sorted(self._have):
            for k, claim in self._have[hop].items():
                slot = (hop, claim.skipped)
                found[slot] = found.get(slot, 0) | 1 << k
        return found

    def _quiet(self) -> bool:
        """Nothing changes the accumulators of this step at the moment."""
        changing = [*self._adding.values(), *self._undoing.values()]
        return all(ground != self._ground for ground, _, _ in changing)

    def _answer(self) -> None:
        """Say what the accumulators hold, once nothing changes them any more."""
        if not self._owing or self._frozen is None or self.leader is None or not self._quiet():
            return
        self._owing = False
        claims = cl.encode_claims(self._claims())
        self._out.append(Send(self.leader, m.CloseAnswer(self._key, self._frozen, claims)))

    def _void(self) -> None:
        """The plan asks for what is not here: the leader hears it, and asks everybody again."""
        self._plan = None
        self._owing = True
        self._answer()

    # -- the plan --------------------------------------------------------------------------

    def _planned(self, now: float, peer: PeerId, plan: m.StepPlan) -> None:
        if plan.key != self._key or self.ledger.pipeline.closed is not None:
            return
        digest = cl.plan_digest(plan)
        if self._plan is not None and self._plan.digest == digest:
            for ready in self._plan.ready.values():
                self._out.append(Send(peer, ready))
            return
        mine = cl.owned(plan, self._me, self._blocks)
        if mine is None:
            fields: dict[str, object] = {"peer": peer.hex(), "fault": "bad_plan"}
            self._out.append(Emit(fx.Notice("peer_fault", fields)))
            return
        lacking = any(self.claim(h, k) is None for h in mine for k in cl.numbers_of(mine[h]))
        if plan.query != self._frozen or lacking or not self._quiet():
            self._freeze(now, plan.query)
            self._void()
            return
        self._plan = _Plan(plan.key, digest, cl.by_stage(mine, self._blocks))
        for stage in self._plan.shares:
            self._undo(stage, self._plan.shares[stage])
            self._hand_over(stage)

    def _undo(self, stage: int, shares: dict[int, int]) -> None:
        """Take out what others own, and what is not in the set."""
        for hop in hops_of(stage, self._blocks):
            for k, claim in sorted(self._have.get(hop, {}).items()):
                if not shares.get(hop, 0) >> k & 1:
                    job = self._next_job()
                    self._undoing[job] = (self._ground, hop, k)
                    self._out.append(px.Undo(job, claim.request, stage, claim.peer, self.life))

    def undone(self, job: int) -> bool:
        """``job`` has taken a gradient out; False: it is none of those."""
        if job not in self._undoing:
            return False
        ground, hop, k = self._undoing.pop(job)
        if ground == self._ground:
            del self._have[hop][k]
            self._hand_over(stage_of(hop, self._blocks))
            self._answer()
        return True

    def undo_failed(self, job: int, reason: str) -> bool:
        """What cannot be taken out spoils the sum: the whole stage begins anew."""
        if job not in self._undoing:
            return False
        ground, hop, _ = self._undoing.pop(job)
        if ground == self._ground:
            stage = stage_of(hop, self._blocks)
            why = f"a gradient of stage {stage} could not be taken out: {reason}"
            fields: dict[str, object] = {"what": "gradients dropped", "why": why}
            self._out.append(Emit(fx.Notice("fallback", fields)))
            self.drop(stage)
        return True

    def drop(self, stage: int) -> None:
        """The sum of a stage is not what it should be: nothing of it is claimed any more."""
        hops = hops_of(stage, self._blocks)
        for hop in hops:
            self._have.pop(hop, None)
        for jobs in (self._undoing, self._adding):
            for job in [j for j, (_, hop, _) in jobs.items() if hop in hops]:
                jobs[job] = (NOWHERE, *jobs[job][1:])
        self._out.append(px.ClearGradients((stage,), self.life))
        if self._frozen is not None:
            self._void()

    def _hand_over(self, stage: int) -> None:
        plan = self._plan
        if plan is None or stage not in plan.shares or stage in plan.asked:
            return
        hops = hops_of(stage, self._blocks)
        if any(g == self._ground and hop in hops for g, hop, _ in self._undoing.values()):
            return
        plan.asked[stage] = None
        self._handing[stage] = self._handing.get(stage, 0) + 1
        self._out.append(px.HandOver(stage, plan.key, self._codec, self.life))

    def handed_over(self, now: float, stage: int, key: StepKey, root: bytes) -> None:
        """The shell's answer to ``HandOver``: the encoded sum has this root."""
        outstanding = self._handing.pop(stage, 0) - 1
        if outstanding > 0:
            self._handing[stage] = outstanding  # a later one was asked for, and replaces it
            return
        plan, channel = self._plan, stage_channel(stage)
        if outstanding < 0 or plan is None or plan.key != key or stage not in plan.asked:
            pledged = self._member.undecided(channel)
            if pledged is None or pledged.root != root:
                self._out.append(fx.ReleaseContribution(channel, root))
            return
        owned = sum(mask.bit_count() for mask in plan.shares[stage].values())
        values = self.ledger.channels[channel].values
        self._member.pledge(Offer(channel, root, values, self._codec, float(owned), key.step, 0))
        ready = m.StepReady(key, plan.digest, stage, root, owned)
        plan.ready[stage] = ready
        if self.leader is not None:
            self._out.append(Send(self.leader, ready))
