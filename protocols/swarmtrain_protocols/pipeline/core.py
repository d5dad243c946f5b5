"""All of a node's part in a pipeline: driver, worker, and what it does while it leads. Spec 11.

Present in every node; in a run without stages it only answers prompts (``whole.WholeModel``).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import Connect, Effect, Emit, PeerId
from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.manifest import RunKeys
from swarmtrain_protocols.messages import pipeline as m
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.assigner import Assigner
from swarmtrain_protocols.pipeline.book import stage_channel
from swarmtrain_protocols.pipeline.census import AssignPolicy
from swarmtrain_protocols.pipeline.driver import DriverCore
from swarmtrain_protocols.pipeline.envelope import View
from swarmtrain_protocols.pipeline.errands import ERRANDS_FROM, Errands
from swarmtrain_protocols.pipeline.freedriver import FreeDriver
from swarmtrain_protocols.pipeline.healing import Healing
from swarmtrain_protocols.pipeline.hops import stage_of
from swarmtrain_protocols.pipeline.localsteps import LocalPolicy
from swarmtrain_protocols.pipeline.paths import PathPlan, path_rule_of
from swarmtrain_protocols.pipeline.step_policy import step_policy_of
from swarmtrain_protocols.pipeline.steps import StepLeader
from swarmtrain_protocols.pipeline.valve import Valve
from swarmtrain_protocols.pipeline.whole import PATH, WholeModel
from swarmtrain_protocols.pipeline.worker import WorkerCore
from swarmtrain_protocols.rounds.catchup import CatchUp
from swarmtrain_protocols.rounds.leader import RoundLeader
from swarmtrain_protocols.rounds.member import RoundMember

CONNECT_AGAIN_S = 5.0

_FOR_WORKER = (m.HopRequest, m.CloseQuery, m.Reopen, m.StepPlan)
_FOR_STEPS = (m.LeaseRequest, m.MicroBatchDone, m.CloseAnswer, m.StepReady)
_FOR_DRIVER = (m.Lease, m.HopReply, m.HopRefused)


class PipelineCore:
    """Composes the cores of spec 11 for one node.

    Args:
        keys: of the run.
        member, rounds, catchup: of the node; steps run on the rounds of the stage channels.
        connected: peers with a live link.
        pump: settles the node after a call of the shell.
    """

    def __init__(
        self,
        *,
        me: PeerId,
        keys: RunKeys,
        ledger: Ledger,
        out: list[Effect],
        rng: random.Random,
        member: RoundMember,
        rounds: RoundLeader,
        catchup: CatchUp,
        connected: Callable[[], list[PeerId]],
        propose: Callable[[float, e.EntryBody], bool],
        pump: Callable[[float], None],
    ) -> None:
        self.stages = keys.stages
        self._me = me
        self._ledger = ledger
        self._out = out
        self._connected = connected
        self._pump = pump
        self._serving: dict[int, tuple[PeerId, ...]] = {}
        self._asked: dict[PeerId, float] = {}
        self._closed: e.StepClosed | None = None
        self._paths = path_rule_of(keys)
        self._catchup = catchup
        self._local = LocalPolicy.of(keys)
        self.worker = WorkerCore(
            me=me,
            ledger=ledger,
            out=out,
            member=member,
            in_step=catchup.in_step,
            on_trial=lambda stage: self.healing.host.on_trial(stage),  # noqa: PLW0108, made below
            micro_batches=ERRANDS_FROM if self._local else keys.micro_batches,
            scatter_codec=keys.codec_scatter,
            samples=keys.batch_size,
            paths=self._paths,
            generate_share=keys.generate_share,
            local=self._local,
        )
        self._make_driver(keys, rng)
        self._make_whole(keys, catchup)
        self._make_leading(keys, rounds, propose)
        self._make_healing(keys, catchup, rounds, propose)

    def _make_leading(
        self,
        keys: RunKeys,
        rounds: RoundLeader,
        propose: Callable[[float, e.EntryBody], bool],
    ) -> None:
        self.assigner = Assigner(
            me=self._me,
            ledger=self._ledger,
            out=self._out,
            policy=AssignPolicy(keys.replicas_min, keys.ends_replicas, keys.start_peers),
            propose=propose,
            connected=self._connected,
        )
        self.steps = StepLeader(
            me=self._me,
            ledger=self._ledger,
            out=self._out,
            policy=step_policy_of(keys),
            propose=propose,
            connected=self._connected,
            rounds=rounds,
            valve=Valve(self._out, self._paths.skips, self.assigner.overloaded),
        )

    def _make_whole(self, keys: RunKeys, catchup: CatchUp) -> None:
        self.whole = WholeModel(
            me=self._me,
            ledger=self._ledger,
            out=self._out,
            share=keys.generate_share,
            connected=self._connected,
            in_step=catchup.in_step,
        )

    def _make_driver(self, keys: RunKeys, rng: random.Random) -> None:
        make = DriverCore if self._local is None else FreeDriver
        self.driver: DriverCore = make(
            rng=rng,
            out=self._out,
            stages=keys.stages,
            view=self._view,
            workers=self.workers,
            version=self.version,
            paths=PathPlan(keys.stages, rule=self._paths, skip_fraction=keys.skip_fraction),
        )
        self.errands = Errands(
            ledger=self._ledger,
            out=self._out,
            stages=keys.stages,
            workers=self._best_first,
            version=self.version_of_all,
            stage_generation=lambda stage: self._ledger.pipeline.era,
            hop_timeout_s=lambda hop: self.driver.router.timeout_s((hop, False)),
        )

    def _make_healing(
        self,
        keys: RunKeys,
        catchup: CatchUp,
        rounds: RoundLeader,
        propose: Callable[[float, e.EntryBody], bool],
    ) -> None:
        self.healing = Healing(
            me=self._me,
            ledger=self._ledger,
            out=self._out,
            catchup=catchup,
            rounds=rounds,
            errands=self.errands,
            connected=self._connected,
            able=self.assigner.able,
            propose=propose,
            replicas_min=keys.replicas_min,
            swapped=keys.swapped,
            chunk_values=catchup.chunk_values,
        )

    @property
    def enabled(self) -> bool:
        """This run is a pipeline."""
        return self.stages > 0

    @property
    def ledger(self) -> Ledger:
        return self._ledger

    @ledger.setter
    def ledger(self, ledger: Ledger) -> None:
        """A snapshot has replaced the ledger."""
        self._ledger = ledger
        self.worker.ledger = self.errands.ledger = self.steps.ledger = ledger
        self.assigner.ledger = self.whole.ledger = ledger
        self.healing.adopt_ledger(ledger)

    # -- what the log says -----------------------------------------------------------------

    def _view(self) -> View | None:
        """The step in progress, or None while none can make progress."""
        ledger, state = self._ledger, self._ledger.pipeline
        if not self.enabled or stage_channel(0) not in ledger.channels:
            return None
        if ledger.ended or ledger.paused or state.lost():
            return None
        if self._local is not None and self._me not in ledger.members:
            return None  # nobody hands out leases: a driver begins once it is a member
        return View(ledger.generation, state.step, state.era, state.skip)

    def version(self, stage: int) -> int:
        """Optimizer steps (or rounds) that the log has committed for ``stage``."""
        channel = self._ledger.channels.get(stage_channel(stage))
        return channel.round if channel is not None else 0

    def version_of_all(self) -> int:
        """What every stage has reached: the run's steps, or rounds in mode ``diloco``."""
        if self._local is None:
            return self._ledger.pipeline.step
        return min((self.version(s) for s in range(self.stages + 1)), default=0)

    def workers(self, stage: int) -> tuple[PeerId, ...]:
        """Who serves ``stage`` and can be asked, in member order; this node included."""
        known = self._serving.get(stage)
        if known is None:
            linked = dict.fromkeys(self._connected())
            if self.worker.values_max:
                linked[self._me] = None
            serving = self._ledger.pipeline.serving(stage)
            members = self._ledger.members
            known = tuple(PeerId(k) for k in serving if k in linked and k in members)
            self._serving[stage] = known
        return known

    def _best_first(self, hop: int) -> list[PeerId]:
        """Workers of ``hop`` for an errand: whoever is expected to be done first, then the rest."""
        workers = list(self.workers(stage_of(hop, self.stages)))
        best = self.driver.router.choose(0.0, (hop, False), workers)
        return sorted(workers, key=lambda peer: peer != best)

    def logged(self, body: e.EntryBody) -> None:
        """An entry was accepted: steps that are over are told to the layer above."""
        state = self._ledger.pipeline
        if isinstance(body, e.StepClosed):
            self._closed = body
        elif isinstance(body, e.StepOutcome) and body.stages:
            done = px.StepDone(
                body.step, body.attempt, True, state.micro_batches, state.loss, body.reason
            )
            self._out.append(Emit(done))
        elif isinstance(body, e.StepOutcome):
            closed = self._closed
            fits = closed is not None and (closed.step, closed.attempt) == (body.step, body.attempt)
            count = closed.micro_batches if closed is not None and fits else 0
            loss = closed.loss if closed is not None and fits else 0.0
            self._out.append(
                Emit(px.StepDone(body.step, body.attempt, False, count, loss, body.reason))
            )
        elif isinstance(body, e.StageLost) and state.mode == "sync":
            why = f"stage {body.stage} is lost"
            done = px.StepDone(body.step, max(0, state.attempt - 1), False, 0, 0.0, why)
            self._out.append(Emit(done))

    # -- what the node tells ---------------------------------------------------------------

    def receive(self, now: float, peer: PeerId, message: m.HopRequest | object) -> None:
        """A message of ``messages.pipeline``."""
        if not self.enabled:
            self.whole.receive(now, peer, message)
            return
        if isinstance(message, _FOR_WORKER):
            self.worker.receive(now, peer, message)
        elif isinstance(message, _FOR_STEPS):
            self.steps.receive(now, peer, message)
        elif isinstance(message, m.WorkerReport):
            self.assigner.receive(now, peer, message)
        elif isinstance(message, m.HopReply | m.HopRefused) and (
            message.id.micro_batch >= ERRANDS_FROM
        ):
            self.errands.receive(now, peer, message)
        elif isinstance(message, _FOR_DRIVER):
            self.driver.receive(now, peer, message)

    def leader_changed(self, now: float, leader: PeerId | None) -> None:
        """Somebody else leads, or the same node in a later term."""
        if self.enabled:
            self.worker.leader = leader
            self.steps.vacancy.leader_changed(now, None if leader == self._me else leader)
            self.healing.leader_changed(leader)
            self.driver.leader_changed(now, leader)

    def announce(self, now: float) -> None:
        """Tell the leader what it may have missed."""
        if self.enabled:
            self.worker.announce(now)

    def activate(self, now: float, active: bool) -> None:
        """Leadership of the log begins or ends."""
        if self.enabled:
            self.steps.activate(now, active)
            self.assigner.activate(now, active)
            self.healing.activate(now, active)

    def reconcile(self, now: float) -> None:
        """The ledger moved, or a state arrived."""
        if not self.enabled:
            self.whole.reconcile(now)
            return
        self._serving.clear()
        self.worker.reconcile(now)
        self.steps.reconcile(now)
        self.assigner.reconcile(now)
        self.driver.reconcile(now)
        self.errands.reconcile(now)
        self.healing.reconcile(now)
        self._connect(now)

    def _connect(self, now: float) -> None:
        """A driver has links to all workers, and so has who rebuilds a stage or generates."""
        if not (self.driver.active or self.healing.host.busy or self.errands.busy):
            self._asked.clear()
            return
        linked = dict.fromkeys(self._connected())
        assigned = self._ledger.pipeline.assigned
        for peer in [p for p in self._asked if p in linked or p not in assigned]:
            del self._asked[peer]
        for member in sorted(assigned):
            peer = PeerId(member)
            due = now >= self._asked.get(peer, now)
            if peer != self._me and peer not in linked and due:
                self._asked[peer] = now + CONNECT_AGAIN_S
                self._out.append(Connect(peer))

    def connected(self, now: float, peer: PeerId) -> None:
        if self.enabled:
            self._serving.clear()
            self.steps.vacancy.connected(peer)
            self.driver.connected(now, peer)

    def disconnected(self, now: float, peer: PeerId) -> None:
        if self.enabled:
            self._serving.clear()
            self.worker.disconnected(now, peer)
            self.driver.disconnected(now, peer)
            self.errands.disconnected(now, peer)
            self.steps.vacancy.disconnected(now, peer)
            self.steps.disconnected(now, peer)
            self.assigner.disconnected(now, peer)
            self._connect(now)
        else:
            self.whole.disconnected(now, peer)

    def tick(self, now: float) -> None:
        if self.enabled:
            self.worker.tick(now)
            self.driver.tick(now)
            self.errands.tick(now)
            self.steps.step(now)
            self.assigner.step(now)
            self.healing.tick(now)
            self._connect(now)
        else:
            self.whole.tick(now)

    def deadline(self) -> float:
        if not self.enabled:
            whole_at = self.whole.deadline()
            return min([whole_at, *self._asked.values()]) if self._asked else whole_at
        leading = (self.steps, self.assigner)
        parts = (self.worker, self.driver, self.errands, *leading, self.healing)
        return min([*(part.deadline() for part in parts), *self._asked.values()])

    # -- what the shell tells --------------------------------------------------------------

    def set_worker(self, now: float, values_max: int) -> None:
        """A trainer with room for so many parameters computes stages here; 0: none (any more)."""
        self._serving.clear()
        self.worker.trainer(now, values_max)
        if self._local is not None and self._catchup.training != (values_max > 0):
            self._catchup.training = values_max > 0  # rounds wait for whoever trains
            self._catchup.announce()
        self.healing.host.trainer_changed(now, values_max > 0)
        self._pump(now)

    def set_driver(self, now: float, active: bool) -> None:
        """The run's data is here: this site may drive micro-batches, or not any more."""
        if self.enabled:
            self.driver.set_active(now, active)
            self._connect(now)
            self._pump(now)

    def computed(
        self, now: float, job: int, output: m.Tensor, loss: float, service_s: float
    ) -> None:
        """The answer to ``Compute`` or ``Undo``."""
        self.worker.computed(now, job, output, loss, service_s)
        self._pump(now)

    def compute_failed(self, now: float, job: int, reason: str) -> None:
        """``Compute`` or ``Undo`` could not be done; the accumulator is as it was."""
        self.worker.compute_failed(now, job, reason)
        self._pump(now)

    def handed_over(self, now: float, stage: int, key: m.StepKey, root: bytes) -> None:
        """The answer to ``HandOver``."""
        self.worker.handed_over(now, stage, key, root)
        self._pump(now)

    def tokens(self, now: float, step: int, micro_batch: int, tokens: bytes) -> None:
        """The answer to ``NeedTokens``."""
        self.driver.tokens(now, step, micro_batch, tokens)
        self._pump(now)

    def calibration(self, now: float, stage: int, batches: Sequence[bytes]) -> None:
        """The answer to ``NeedCalibration``."""
        self.healing.host.calibration(now, stage, batches)
        self._pump(now)

    def candidates_built(self, now: float, stage: int, names: Sequence[str]) -> None:
        """The answer to ``BuildCandidates``."""
        self.healing.host.candidates_built(now, stage, names)
        self._pump(now)

    def candidate_ready(self, now: float, stage: int, name: str, root: bytes) -> None:
        """The answer to ``TryCandidate``: its weights are in place."""
        self.healing.host.candidate_ready(now, stage, name, root)
        self._pump(now)

    def candidate_failed(self, now: float, stage: int, name: str, reason: str) -> None:
        """The other answer to ``TryCandidate``."""
        self.healing.host.candidate_failed(now, stage, name, reason)
        self._pump(now)

    def unresolved(self, now: float, peer: PeerId, message: m.HopRequest | m.HopReply) -> None:
        """The tensors of a message of ``peer`` cannot be had: it is as good as refused."""
        refusal = m.HopRefused(message.id, "unreachable", "its tensor could not be fetched")
        if isinstance(message, m.HopReply):
            self.receive(now, peer, refusal)
            self._pump(now)

    def errand(self, now: float, kind: m.Kind, tokens: bytes, *, timeout_s: float) -> int:
        """A forward pass outside of steps; ``ErrandDone`` or ``ErrandFailed`` carry the handle.

        Raises:
            LocalProtocolError: nothing but ``generate`` in a run without stages, or too many
                errands are under way.
        """
        if self.enabled:
            path = PathPlan(self.stages).path(0, lambda hop: 0.0)
            handle = self.errands.start(now, kind, tokens, path, timeout_s=timeout_s)
            self._connect(now)
        elif kind == "generate":
            handle = self.whole.errands.start(now, kind, tokens, PATH, timeout_s=timeout_s)
            self.whole.connect(now)
        else:
            raise LocalProtocolError(f"an errand of kind {kind}", "the run has no stages")
        self._pump(now)
        return handle

    def cancel_errand(self, handle: int) -> None:
        """Nobody waits for it any more."""
        (self.errands if self.enabled else self.whole.errands).cancel(handle)

    # -- what the shell of a run without stages tells ------------------------------------------

    def set_answers(self, now: float, answers: bool) -> None:
        """The trainer of this site computes logits (or not any more)."""
        self.whole.set_answers(now, answers)
        self._pump(now)

    def answered(self, now: float, job: int, output: m.Tensor, service_s: float) -> None:
        """The answer to ``Compute`` of the whole model."""
        self.whole.computed(now, job, output, service_s)
        self._pump(now)

    def not_answered(self, now: float, job: int, code: str, reason: str) -> None:
        """The other answer to ``Compute`` of the whole model."""
        self.whole.compute_failed(now, job, code, reason)
        self._pump(now)
