"""One channel of a trainer: phases of inner steps, what was handed over, and what became of it.

A phase ends at a *boundary*: every ``inner_steps`` steps or as many as fit (``tempo``), at a
fragment's own offset. Then the pseudo-gradient goes into shared memory and training goes on, as the
overlap mode says:

- ``off``: wait for the decision and start from the new θ; with ``delay`` (streaming) take it up
  only so many steps later, mixed with what was trained meanwhile: x ← mix·x + (1 - mix)·θ.
- ``delayed`` and ``eager``: go straight on. If the previous hand-over is undecided at a boundary,
  the phase grows, up to ``extra_steps_max`` steps, and then waits.

Every wait has a deadline, after which training goes on. A hand-over whose outcome nobody can tell
is treated as aborted: its progress goes into the next one (``Overlay`` keeps it).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from swarmtrain.training.flat import Flat
from swarmtrain.training.phaserules import Rules
from swarmtrain.training.port import Document, Notify, Port, Session
from swarmtrain.training.tempo import Tempo
from swarmtrain_peer.shm import Decision, HandoverInfo
from swarmtrain_protocols.changes import InnerStep
from swarmtrain_protocols.errors import Diverged, LocalProtocolError
from swarmtrain_protocols.overlap import Mode, Overlay
from swarmtrain_protocols.schedule import OuterStep
from swarmtrain_protocols.shards import LeaseBook

F32 = NDArray[np.float32]

PASSES_MAX = 256
"""Momentum that decayed this often is nothing; more need not be counted."""
NON_FINITE_MAX = 3
"""Phases in a row that end in NaN or infinity before training counts as diverged."""


@dataclass(slots=True)
class InFlight:
    """A hand-over that waits for its outcome; ``args`` are those of its call."""

    seq: int
    args: Document

    @property
    def content(self) -> tuple[float, int]:
        """Samples of all phases in it, and how many phases that are."""
        fresh, carried = float(self.args["samples"]), float(self.args["carried"])
        samples = fresh + carried
        return samples, int(self.args["age"]) + 1 if samples else 0


NOTHING = (0.0, 0)


class Phase:
    """One channel. All methods run on the training thread.

    ``x`` and ``theta`` are scratch vectors f32[n], shared by the phases of a trainer.
    """

    def __init__(
        self,
        channel: str,
        flat: Flat,
        rules: Rules,
        first_steps: int,
        scratch: tuple[F32, F32],
        tempo: Tempo | None = None,
    ) -> None:
        n = flat.values(channel)
        self.channel = channel
        self.rules = rules
        self.tempo = tempo or Tempo(rules.inner_steps)
        self.inner: InnerStep | None = None
        """What holds in the phase of now, once the peer process has said it."""
        self.steps = 0
        self.samples = 0.0
        self.base_round = 0
        self.boundaries = 0
        self.non_finite = 0
        self.in_flight: InFlight | None = None
        self.book: LeaseBook | None = None
        """Which data are in what is handed over, if they are dealt (spec 13)."""
        self._flat = flat
        self._x, self._theta = scratch[0][:n], scratch[1][:n]
        self._due = first_steps
        self._limit = first_steps + rules.extra_steps_max
        self._adopt_at = -1
        self._seq = 0
        self._session = 0
        self._shm = ""
        self._momentum_round = 0
        self._weight = 1.0
        self._returned = NOTHING
        """Samples and phases in the progress that goes along with the next hand-over."""
        self._overlay: Overlay | None = None

    @property
    def overlay(self) -> Overlay:
        assert self._overlay is not None, "start comes first"
        return self._overlay

    def write_theta0(self, session: Session) -> int:
        """Put this trainer's own parameters into the hand-over slot; its sequence number."""
        self._seq = max(self._seq + 1, session.side.next_seq(self.channel))
        ((_, slot),) = session.side.begin(self.channel, self._seq)
        self._flat.read(self.channel, slot)
        session.side.commit(self.channel, HandoverInfo(self._seq, 0, 0.0, 0))
        return self._seq

    def start(self, session: Session, members: int) -> bool:
        """Begin from the published θ; false if there is none yet."""
        if session.side.theta(self.channel, self._theta) is None:
            return False
        self._new_overlay(session)
        self._weight = 1.0 / max(1, members)
        first = self._due
        self._restart(session)
        self._due, self._limit = first, first + self.rules.extra_steps_max
        return True

    def _new_overlay(self, session: Session) -> None:
        rules = self.rules
        if self._overlay is None:
            slot = session.side.channel(self.channel).handover
            n = self._flat.values(self.channel)
            self._overlay = Overlay(rules.mode, n, rules.lr, rules.beta, delta=slot)
        self._session, self._shm = session.number, str(session.side.path)

    def _restart(self, session: Session) -> None:
        """Drop all private progress and take up θ."""
        round_ = session.side.theta(self.channel, self._theta)
        assert round_ is not None
        if self.book is not None:
            if self.in_flight is not None:
                self.book.decided(False, round_)  # nobody asks any more what becomes of it
            self.book.dropped()
        self.overlay.start(self._theta, self._x)
        self._flat.write(self.channel, self._x)
        self._retune(session, round_)
        self._begin_phase(round_)
        self._momentum_round = round_
        self.in_flight, self._returned = None, NOTHING

    def _begin_phase(self, round_: int) -> None:
        if not self._flat.exact(self.channel):
            # The model rounds what is written; progress counts from what it really holds.
            self._flat.read(self.channel, self.overlay.base)
        self.base_round = round_
        self.steps, self.samples = 0, 0.0
        self.retime()

    def _retune(self, session: Session, round_: int) -> None:
        """Run keys may change in flight: they are those of the round that θ is of."""
        inner = session.side.inner.get(self.channel)
        if inner is None or inner == self.inner:
            return
        self.inner = inner
        extra = int(inner.inner_steps * inner.max_extra_steps_factor)
        self.rules = replace(self.rules, inner_steps=inner.inner_steps, extra_steps_max=extra)
        self.tempo.retune(round_, inner.inner_steps)

    def retime(self) -> None:
        """The phase that begins has as many steps as the tempo says by now."""
        if self.steps == 0:
            self._due = self.tempo.steps
            extra = self.rules.extra_steps_max * self._due // self.rules.inner_steps
            self._limit = self._due + extra

    @property
    def done_share(self) -> float:
        """How much of the phase is done, 1 at its boundary."""
        return self.steps / self._due

    def after_step(self, port: Port, notify: Notify, samples: float, extra: Document) -> None:
        """Count one inner step and do what is due. ``extra`` goes into the hand-over call."""
        self.steps += 1
        self.samples += samples
        session = port.session
        if session is None or not self._adopt(session, port, notify):
            return
        if self._adopt_at >= 0:
            self._streamed(session, port, notify)
        if self.steps < self._due and not self.tempo.is_over(self.steps, extra["step_s"]):
            return
        if self.in_flight is not None and not self._settle(session, port, notify):
            return
        self._boundary(session, port, notify, extra)

    @property
    def diverged(self) -> Diverged | None:
        """Set once too many phases in a row have ended in numbers that are none."""
        if self.non_finite < NON_FINITE_MAX:
            return None
        return Diverged(
            "training diverged",
            f"{self.non_finite} phases in a row ended in NaN or infinity",
            "lower the inner learning rate",
        )

    def hurry(self) -> None:
        """Let the coming step be the last one before the hand-over."""
        self._due = min(self._due, self.steps + 1)

    def hand_over_early(self, port: Port, notify: Notify, extra: Document) -> None:
        """Nothing is left to train on: hand over what there is, unless a hand-over is undecided."""
        session, book = port.session, self.book
        if session is None or book is None or not self._adopt(session, port, notify):
            return
        if not self._poll(session) or not book.waiting:
            return
        if self._adopt_at >= 0:
            self._take_theta(session, self.rules.mix)
        if not self._returned[1]:
            self.samples = self.samples or float(book.waiting)
        self._boundary(session, port, notify, extra)

    def settled(self, session: Session) -> bool:
        """Whether nothing is undecided; takes up the decision if it is there."""
        return self._poll(session) if session.number == self._session else self.in_flight is None

    def _streamed(self, session: Session, port: Port, notify: Notify) -> None:
        """Streaming: take up θ once ``delay`` steps have gone by since the boundary."""
        if self.steps < self._adopt_at:
            return
        if self._decided(session, port, notify, wait=True):
            self._take_theta(session, self.rules.mix)
        else:
            self._adopt_at = self.steps + self.rules.inner_steps

    def _settle(self, session: Session, port: Port, notify: Notify) -> bool:
        """At a boundary: whether the previous hand-over is decided, waiting if it must."""
        must_wait = self.steps >= self._limit
        if not self._decided(session, port, notify, wait=must_wait):
            if must_wait:
                self._limit = self.steps + self.rules.inner_steps
            return False
        return True

    def _decided(self, session: Session, port: Port, notify: Notify, *, wait: bool) -> bool:
        """Whether nothing is undecided any more. A wait ends early if the peer process is away."""
        if self._poll(session):
            return True
        if wait:
            ended = port.wait_until(
                lambda: self._poll(session) or self._hopeless(session, port), self.rules.wait_s_max
            )
            if self.in_flight is not None and session.side.should_stop() is None:
                notify("round_overdue", {"channel": self.channel, "timeout": not ended})
        return self.in_flight is None

    def _hopeless(self, session: Session, port: Port) -> bool:
        away = port.session is not session or not session.peer_beats()
        return away or session.side.should_stop() is not None

    def _poll(self, session: Session) -> bool:
        """Take up the decision if it is there; true if nothing is undecided."""
        if self.in_flight is None:
            return True
        seq = self.in_flight.seq
        if session.refused.get(self.channel) == seq:
            self._apply(Decision(seq, "aborted", 0.0, self._momentum_round))
            return True
        found = session.side.decision(self.channel)
        if found is None or found.seq != seq:
            return False
        shown = session.side.published_round(self.channel)
        if found.outcome != "aborted" and (shown is None or shown < found.round):
            return False  # the decision is about a θ that is not shown yet
        self._apply(found)
        return True

    def _apply(self, decision: Decision) -> None:
        assert self.in_flight is not None
        counted = decision.outcome == "committed" and decision.coefficient > 0
        self._returned = NOTHING if counted else self.in_flight.content
        if self.book is not None:
            self.book.decided(counted, decision.round)
        if decision.outcome == "aborted":
            self.overlay.decided(None)
        else:
            # Rounds that were committed without this trainer, before the one that was decided.
            self._pass_rounds(decision.round - 1)
            committed = decision.outcome == "committed"
            self.overlay.decided(decision.coefficient if committed else 0.0)
            self._momentum_round = max(self._momentum_round, decision.round)
            if committed and decision.coefficient > 0:
                self._weight = decision.coefficient
        self.in_flight = None

    def _pass_rounds(self, round_: int) -> None:
        for _ in range(min(PASSES_MAX, round_ - self._momentum_round)):
            self.overlay.passed()
        self._momentum_round = max(self._momentum_round, round_)

    def _drop(self, session: Session, notify: Notify, round_: int, why: str) -> None:
        """Throw progress away that nobody would take: its base is too old, or its data are lost."""
        fields = {"channel": self.channel, "base_round": self.base_round, "round": round_}
        notify("progress_dropped", {**fields, "steps": self.steps, "why": why})
        self._restart(session)

    def _boundary(self, session: Session, port: Port, notify: Notify, extra: Document) -> None:
        side = session.side
        if not side.may_write(self.channel):
            return  # an earlier trainer's hand-over is still being read; the next step asks again
        try:
            found = side.theta_and_step(self.channel, self._theta)
        except LocalProtocolError:
            return  # θ changed under every try; the next step asks again
        if found is None:
            return
        round_, step = found
        if round_ < self._momentum_round or round_ - self.base_round > self.rules.max_base_age:
            self._drop(session, notify, round_, "its base")
            return
        claims = () if self.book is None else self.book.boundary()
        if claims is None:  # what it was trained on is somebody else's by now
            self._drop(session, notify, round_, "its data")
            return
        samples, carried, age = self._content(sum(span.count for span in claims))
        self._pass_rounds(round_)
        self._retune(session, round_)
        if step is not None:
            self._switch(step, notify)
        seq = self._seq = max(self._seq + 1, side.next_seq(self.channel))
        self._flat.read(self.channel, self._x)
        side.begin(self.channel, seq)
        self.overlay.boundary(self._theta, self._x, self._weight)
        if not np.isfinite(np.dot(self.overlay.delta, self.overlay.delta)):
            self.non_finite += 1
            notify("non_finite", {"channel": self.channel, "times": self.non_finite})
            if self.book is not None:
                self.book.decided(False, round_)
            self._restart(session)
            return
        self.non_finite = 0
        args = {
            **extra,
            "channel": self.channel,
            "seq": seq,
            "samples": samples,
            "carried": carried,
            "base_round": self.base_round,
            "steps": self.steps,
            "age": age,
            "claims": [[span.first, span.count] for span in claims],
        }
        info = HandoverInfo(seq, self.base_round, samples + carried, self.steps)
        side.commit(self.channel, info)
        self.in_flight = InFlight(seq, args)
        self.boundaries += 1
        port.send(session, "handover", args)
        self._go_on(session, port, notify, round_)

    def _content(self, claimed: int) -> tuple[float, float, int]:
        """Samples of this phase and of earlier ones that go along; how many of the latter.

        No more than are ``claimed`` of data that are dealt. With nothing new in it, what was
        returned weighs what it weighed.
        """
        fresh, (carried, phases) = self.samples, self._returned
        if self.book is not None:
            fresh = min(fresh, float(claimed))
            carried = min(carried, claimed - fresh)
        return fresh, carried, phases if fresh > 0 else max(0, phases - 1)

    def _switch(self, step: OuterStep, notify: Notify) -> None:
        """This boundary's round has its own mode and outer step, the same at every member."""
        before = self.overlay.mode
        self.overlay.switch(cast(Mode, step.overlap), step.lr, step.momentum)
        if self.overlay.mode != before:
            notify("overlap_switched", {"channel": self.channel, "overlap": step.overlap})

    def _go_on(self, session: Session, port: Port, notify: Notify, round_: int) -> None:
        if self.overlay.mode != "off":
            self._flat.write(self.channel, self._x)
            self._begin_phase(round_)
            return
        # What is trained from here on, if anything is, counts from where the hand-over left off.
        np.copyto(self.overlay.base, self._x)
        self._begin_phase(self.base_round)
        if self.rules.delay:
            self._adopt_at = self.rules.delay
        elif self._decided(session, port, notify, wait=True):
            self._take_theta(session, 0.0)

    def _take_theta(self, session: Session, mix: float) -> None:
        """Mode off, decided: go on from θ, while streaming mixed with x unless it is re-queued."""
        self._adopt_at = -1
        round_ = session.side.theta(self.channel, self._theta)
        assert round_ is not None
        self._retune(session, round_)
        kept = mix > 0 and not self.overlay.requeued
        if kept:
            self._flat.read(self.channel, self._x)
            own = self._x * np.float32(mix)
        self.overlay.new_base(self._theta, self._x)
        if kept:
            self._x *= np.float32(1 - mix)
            self._x += own
        self._flat.write(self.channel, self._x)
        if self.rules.delay:  # the phase goes on, with what was kept of it
            self.base_round = round_
            self.samples = self.samples if kept else 0.0
            if self.book is not None and not kept:
                self.book.dropped(fresh_only=True)
        else:
            self._begin_phase(round_)

    def _adopt(self, session: Session, port: Port, notify: Notify) -> bool:
        """Go over to the session of now; false if it has no θ yet."""
        if session.number == self._session:
            return True
        shown = session.side.published_round(self.channel)
        known = session.attached.outcomes.get(self.channel)
        if shown is None or (known is not None and shown < known.round):
            return False
        path = str(session.side.path)
        if path == self._shm:
            if self.in_flight is not None:
                port.send(session, "handover", self.in_flight.args)
        else:
            self._settle_lost(session, notify)
            slot = session.side.channel(self.channel).handover
            np.copyto(slot, self.overlay.delta)
            self.overlay.delta = slot
        self._session, self._shm = session.number, path
        return True

    def _settle_lost(self, session: Session, notify: Notify) -> None:
        """The peer process that had the hand-over is gone: ask its successor, else re-queue."""
        if self.in_flight is None:
            return
        known = session.attached.outcomes.get(self.channel)
        seq = self.in_flight.seq
        if known is not None and known.seq == seq:
            self._apply(Decision(seq, known.outcome, known.coefficient, known.round))
        else:
            notify("handover_requeued", {"channel": self.channel, "handover": seq})
            self._apply(Decision(seq, "aborted", 0.0, self._momentum_round))


def first_boundary(fragment: int, fragments: int, inner_steps: int) -> int:
    """Steps before the first boundary of a fragment: boundaries are spread over a phase."""
    return max(1, (fragment + 1) * inner_steps // fragments)
