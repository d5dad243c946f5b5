"""Generation in a run without stages: every trainer has the whole model, as the one hop 0.

Whoever asks sends an errand of one hop to a member that trains, its own trainer first; any other
one does as well, for all have the same weights. A member answers within ``generate_share`` of its
trainer's time and refuses what would have to wait for long, so that work spreads over the swarm.
Spec 11 §2.10.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Connect, Effect, Emit, PeerId, Send, earliest
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.messages import pipeline as m
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.book import stage_channel
from swarmtrain_protocols.pipeline.errands import Errands
from swarmtrain_protocols.pipeline.requests import trouble
from swarmtrain_protocols.pipeline.workqueue import WorkQueue
from swarmtrain_protocols.rounds import effects as fx

WHOLE = 0
"""The hop, and the stage, that is the whole model."""
PATH = (WHOLE,)
CHANNEL = stage_channel(WHOLE)
ANSWER_TIMEOUT_S = 15.0
"""A trainer answers between two of its steps."""
STUCK_S = 4 * ANSWER_TIMEOUT_S
"""A trainer that says nothing for so long has forgotten the job."""
CONNECT_AGAIN_S = 5.0


class WholeModel:
    """Asks for logits, and has them computed here.

    Args:
        share: of the trainer's time.
        connected: peers with a live link.
        in_step: whether the state of a channel here is the one that the log says.
    """

    def __init__(
        self,
        *,
        me: PeerId,
        ledger: Ledger,
        out: list[Effect],
        share: float,
        connected: Callable[[], list[PeerId]],
        in_step: Callable[[str], bool],
    ) -> None:
        self._me = me
        self._ledger = ledger
        self._out = out
        self._connected = connected
        self._in_step = in_step
        self._answers = False
        self._jobs = 0
        self._running: dict[int, tuple[PeerId, m.HopRequest]] = {}
        self._began = 0.0
        self._queue = WorkQueue(share, limits.ERRANDS_MAX, self._deferred)
        self._queue.occupied(math.inf)  # by training, which does not come this way
        self._asked: dict[PeerId, float] = {}
        self.errands = Errands(
            ledger=ledger,
            out=out,
            stages=0,
            workers=self.workers,
            version=self.version,
            stage_generation=lambda stage: self._ledger.pipeline.era,
            hop_timeout_s=lambda hop: ANSWER_TIMEOUT_S,
        )

    @property
    def ledger(self) -> Ledger:
        return self._ledger

    @ledger.setter
    def ledger(self, ledger: Ledger) -> None:
        self._ledger = self.errands.ledger = ledger

    def version(self) -> int:
        """Rounds that the log has committed (of the first fragment)."""
        channel = self._ledger.channels.get(CHANNEL)
        return channel.round if channel is not None else 0

    def workers(self, hop: int) -> list[PeerId]:
        """Whom to ask, the best first: this site if its trainer answers, then others that train."""
        linked = dict.fromkeys(self._connected())
        members = self._ledger.ordered_members()
        others = [PeerId(one.id) for one in members if one.trains and one.id in linked]
        return [self._me, *others] if self._answers else others

    # -- what is asked here ----------------------------------------------------------------

    def set_answers(self, now: float, answers: bool) -> None:
        """The trainer of this site computes logits (or is gone: all that it was asked failed)."""
        self._answers = answers
        if not answers:
            for peer, request in self._running.values():
                self._refuse(peer, request, "failed", "the trainer is lost")
            self._running.clear()
        self._proceed(now)

    def receive(self, now: float, peer: PeerId, message: object) -> None:
        """A request, or the answer to one of this node's own."""
        if isinstance(message, m.HopRequest):
            self._requested(now, peer, message)
        elif isinstance(message, m.HopReply | m.HopRefused):
            self.errands.receive(now, peer, message)

    def _requested(self, now: float, peer: PeerId, request: m.HopRequest) -> None:
        if peer not in self._ledger.members or _malformed(request):
            fault = "bad_hop" if peer in self._ledger.members else "not_a_member"
            self._out.append(Emit(fx.Notice("peer_fault", {"peer": peer.hex(), "fault": fault})))
            self._refuse(peer, request, "malformed", "a request for logits has one hop, and tokens")
            return
        refused = self._trouble(request)
        said_twice = self._queue.has(peer, request) or (peer, request) in self._running.values()
        if refused is None and not said_twice:
            refused = self._queue.admit(now, peer, request)
        if refused is not None:
            self._refuse(peer, request, *refused)
        self._proceed(now)

    def _deferred(self, peer: PeerId, share: float) -> None:
        self._out.append(Emit(fx.Notice("generate_deferred", {"peer": peer.hex(), "share": share})))

    def _trouble(self, request: m.HopRequest) -> tuple[str, str] | None:
        if not self._answers:
            return "not_ready", "no trainer here computes logits"
        return trouble(request, self._ledger, 0, (WHOLE,), self._in_step)

    def _refuse(self, peer: PeerId, request: m.HopRequest, code: str, reason: str) -> None:
        self._out.append(Send(peer, m.HopRefused(request.id, code, reason[:256])))

    def _proceed(self, now: float) -> None:
        for job in self._queue.remove(lambda one: self._trouble(one.request) is not None):
            refused = self._trouble(job.request)
            assert refused is not None
            self._refuse(job.peer, job.request, *refused)
        while not self._running and (taken := self._queue.take(now)) is not None:
            self._jobs += 1
            self._began, request = now, taken.request
            self._running[self._jobs] = taken.peer, request
            self._out.append(
                px.Compute(
                    self._jobs,
                    taken.peer,
                    WHOLE,
                    WHOLE,
                    "generate",
                    request.version,
                    request.id.micro_batch,
                    m.EMPTY,
                    m.EMPTY,
                    request.tokens,
                    False,
                )
            )

    def computed(self, now: float, job: int, output: m.Tensor, service_s: float) -> None:
        """The shell's answer to ``Compute``: logits, by the weights of ``Compute.step``."""
        found = self._running.pop(job, None)
        if found is not None:
            peer, request = found
            self._queue.spent(now, request, service_s)
            waiting = len(self._queue)
            reply = m.HopReply(request.id, output, 0.0, waiting, service_s)
            self._out.append(Send(peer, reply))
        self._proceed(now)

    def compute_failed(self, now: float, job: int, code: str, reason: str) -> None:
        """The other answer. ``code`` as in ``HopRefused``: the trainer may be a round ahead."""
        found = self._running.pop(job, None)
        if found is not None:
            self._refuse(*found, code, reason)
        self._proceed(now)

    # -- what happens around it ------------------------------------------------------------

    def reconcile(self, now: float) -> None:
        """The ledger moved, or a state arrived."""
        self.errands.reconcile(now)
        self._proceed(now)

    def disconnected(self, now: float, peer: PeerId) -> None:
        self._queue.remove(lambda job: job.peer == peer)
        self.errands.disconnected(now, peer)

    def tick(self, now: float) -> None:
        self.errands.tick(now)
        for job in [*self._running] if now >= self._began + STUCK_S else []:
            self.compute_failed(now, job, "failed", "the trainer does not answer")
        self._proceed(now)
        self.connect(now)

    def connect(self, now: float) -> None:
        """Who asks, and only looks otherwise, needs links to those that train."""
        if not self.errands.busy:
            self._asked.clear()
            return
        linked = dict.fromkeys(self._connected())
        for member in self._ledger.ordered_members():
            peer = PeerId(member.id)
            if not member.trains or peer == self._me or peer in linked:
                self._asked.pop(peer, None)
            elif now >= self._asked.get(peer, now):
                self._asked[peer] = now + CONNECT_AGAIN_S
                self._out.append(Connect(peer))

    def deadline(self) -> float:
        waits = self._began + STUCK_S if self._running else self._queue.next_at()
        own = min(self._asked.values()) if self._asked else math.inf
        return earliest(self.errands.deadline(), waits, own)


def _malformed(request: m.HopRequest) -> bool:
    identity = request.id
    return (
        request.kind != "generate"
        or request.path != PATH
        or (identity.hop, identity.backward) != (WHOLE, False)
        or (request.inputs, request.gradient) != (m.EMPTY, m.EMPTY)
        or not request.tokens
    )
