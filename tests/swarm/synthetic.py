"""A trainer without a model: seeded pseudo-gradients, handed over as fast as rounds are decided.

``python -m tests.swarm.synthetic SITE_FOLDER OPTIONS`` is the same as a process, to be killed. What
it hands over is a function of (key, sequence number), and its weight tells the number, so that a
reader of the log can recompute every committed round.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from swarmtrain_peer.control import ControlClient, ControlClosed, ControlTimeout
from swarmtrain_peer.shm import Decision, HandoverInfo, TrainerSide
from swarmtrain_peer.site import Site
from swarmtrain_protocols.errors import SwarmError
from swarmtrain_protocols.state import CanonicalState

F32 = NDArray[np.float32]
Document = dict[str, Any]

CHANNEL = "train/0/0"
SCHEMA_HASH = bytes(range(32))
VALUES = 300_000
"""Two chunks, the second one short."""
CALL_S = 30.0
DECISION_S = 60.0
POLL_S = 0.002


def theta0(n: int) -> F32:
    """Initial parameters f32[n] of every synthetic run."""
    return np.random.default_rng(7).standard_normal(n, np.float32)


def delta(key: int, seq: int, n: int) -> F32:
    """The pseudo-gradient f32[n] of hand-over ``seq`` of the trainer with this key."""
    return np.random.default_rng([key, seq]).standard_normal(n, np.float32)


def samples_of(seq: int) -> float:
    """A weight that tells the sequence number: at most 1 % apart, exact in binary."""
    return 1.0 + seq / 8192


def seq_of(samples: float) -> int:
    return round((samples - 1.0) * 8192)


class Oracle:
    """The run as one process would compute it: fp32 arithmetic in member order, nothing shared
    with the code under test but the definition of the state hash."""

    def __init__(self, n: int, lr: float = 0.5, beta: float = 0.75) -> None:
        self.theta = theta0(n)
        self.momentum = np.zeros(n, np.float32)
        self.round = 0
        self._lr, self._beta = np.float32(lr), np.float32(beta)

    def step(self, contributions: list[tuple[float, F32]]) -> None:
        """One committed round: (samples, Δ f32[n]) in member order."""
        total = sum(samples for samples, _ in contributions)
        mean = np.zeros_like(self.theta)
        for samples, values in contributions:
            mean += np.float32(samples / total) * values
        self.momentum = self._beta * self.momentum + mean
        self.theta = self.theta - self._lr * (mean + self._beta * self.momentum)
        self.round += 1

    def state_hash(self) -> str:
        state = CanonicalState(CHANNEL, self.round, self.theta, {"momentum": self.momentum})
        return state.root().hex()


@dataclass(slots=True)
class Told:
    """One decision as the trainer heard it. ``waited_s``: from hand-over to decision."""

    seq: int
    outcome: str
    coefficient: float
    round: int
    waited_s: float


@dataclass(slots=True)
class Plan:
    """What a synthetic trainer does. ``phase_s`` stands for its inner steps."""

    key: int = 1
    values: int = VALUES
    phase_s: float = 0.0
    rounds_max: int = 0
    seq_max: int = 0
    """Hand over nothing with a higher number; θ⁰ has the first. 0: no end."""
    decision_s: float = DECISION_S
    """How long an answer or a decision may take."""
    first: int | None = None
    """Number hand-overs on from here, through all lives of the peer process; None: with each
    mapping from 1, as its sequence numbers."""
    say: bool = False
    """Print a line at every stage of a hand-over, for whoever wants to kill in between."""


@dataclass(slots=True)
class Trainer:
    """Attaches to the peer process of ``site``, and again whenever that comes back."""

    site: Site
    plan: Plan
    told: list[Told] = field(default_factory=list)
    attachments: list[Document] = field(default_factory=list)
    failure: BaseException | None = None
    handed: int = 0
    """Hand-overs so far, of this trainer."""
    stopped: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _pause: threading.Event = field(default_factory=threading.Event)

    def start(self) -> Trainer:
        self._thread = threading.Thread(target=self._run, name="synthetic", daemon=True)
        self._thread.start()
        return self

    def pause(self, paused: bool) -> None:
        """Do not begin another hand-over, or do so again."""
        if paused:
            self._pause.set()
        else:
            self._pause.clear()

    def close(self) -> None:
        """Vanish without a goodbye: a trainer that says it is done would end the run."""
        self.stopped.set()
        if self._thread is not None:
            self._thread.join(CALL_S)

    def _run(self) -> None:
        try:
            self.train()
        except BaseException as error:
            self.failure = error
            raise

    def train(self) -> None:
        """Until stopped, told to stop, or done with ``rounds_max`` rounds."""
        while not self.stopped.is_set():
            try:
                with self.site.connect() as client:
                    if self._session(client):
                        return
            except (ControlClosed, ControlTimeout):
                self.stopped.wait(0.05)

    def _say(self, stage: str) -> None:
        if self.plan.say:
            sys.stdout.write(stage + "\n")
            sys.stdout.flush()

    def _session(self, client: ControlClient) -> bool:
        """Train through one connection; true if there is nothing left to do."""
        plan = self.plan
        self._say("attaching")
        args = {
            "schema_hash": SCHEMA_HASH.hex(),
            "layout": [[CHANNEL, plan.values]],
            "rank": 0,
            "pid": os.getpid(),
            "device": "none",
            "again": bool(self.attachments),
            "in_flight": {},
        }
        answer = client.call("attach", args, self.plan.decision_s)
        side = TrainerSide.open(Path(answer["shm"]), SCHEMA_HASH)
        self.attachments.append(answer)
        if answer["need_theta0"]:
            self._define(client, side)
        self._say(f"attached {answer['shm']}")
        while not self.stopped.is_set() and side.should_stop() is None:
            if client.closed:
                raise ControlClosed("the peer process went away", "while training")
            round_ = side.published_round(CHANNEL)
            if plan.rounds_max and round_ is not None and round_ >= plan.rounds_max:
                client.call("finished", {}, CALL_S)
                return True
            done = 0 < plan.seq_max < side.next_seq(CHANNEL)
            if done or self._pause.is_set() or round_ is None or not side.may_write(CHANNEL):
                self.stopped.wait(POLL_S)
                continue
            self.stopped.wait(plan.phase_s)
            self._hand_over(client, side, round_)
        if side.should_stop() is not None:
            client.call("detach", {}, CALL_S)
        return True

    def _define(self, client: ControlClient, side: TrainerSide) -> None:
        seq = side.next_seq(CHANNEL)
        ((_, slot),) = side.begin(CHANNEL, seq)
        slot[:] = theta0(self.plan.values)
        side.commit(CHANNEL, HandoverInfo(seq, 0, 0.0, 0))
        client.call("define", {"seqs": {CHANNEL: seq}}, self.plan.decision_s)

    def _hand_over(self, client: ControlClient, side: TrainerSide, base_round: int) -> None:
        plan = self.plan
        seq = side.next_seq(CHANNEL)
        self.handed += 1
        number = seq if plan.first is None else plan.first + self.handed
        values = delta(plan.key, number, plan.values)
        self._say(f"begin {seq}")
        ((_, slot),) = side.begin(CHANNEL, seq)
        for first in range(0, values.size, 16384):  # a kill can fall between any two of these
            slot[first : first + 16384] = values[first : first + 16384]
        self._say(f"written {seq}")
        samples = samples_of(number)
        side.commit(CHANNEL, HandoverInfo(seq, base_round, samples, 1))
        self._say(f"complete {seq}")
        started = time.monotonic()
        args = {
            "channel": CHANNEL,
            "seq": seq,
            "samples": samples,
            "base_round": base_round,
            "steps": 1,
            "age": 0,
            "loss": None,
            "phase_s": plan.phase_s,
            "blocked_s": 0.0,
        }
        try:
            client.call("handover", args, self.plan.decision_s)
        except (ControlClosed, ControlTimeout):
            raise
        except SwarmError as error:
            self.told.append(Told(seq, f"refused: {error}", 0.0, -1, 0.0))
            return
        self._say(f"handed {seq}")
        decision = self._wait_decision(client, side, seq)
        if decision is not None:
            waited_s = time.monotonic() - started
            self.told.append(
                Told(seq, decision.outcome, decision.coefficient, decision.round, waited_s)
            )
            self._say(f"told {seq} {decision.outcome}")

    def _wait_decision(self, client: ControlClient, side: TrainerSide, seq: int) -> Decision | None:
        deadline_s = time.monotonic() + self.plan.decision_s
        while not self.stopped.is_set() and side.should_stop() is None:
            found = side.decision(CHANNEL)
            if found is not None and found.seq == seq:
                return found
            if client.closed:
                raise ControlClosed("the peer process went away", "while a round was undecided")
            assert time.monotonic() < deadline_s, f"hand-over {seq} was never decided"
            self.stopped.wait(POLL_S)
        return None


def read_theta(trainer: Trainer, n: int = VALUES) -> tuple[int, F32]:
    """(round, θ f32[n]) as the shared memory of the newest attachment shows it."""
    side = TrainerSide.open(Path(trainer.attachments[-1]["shm"]), SCHEMA_HASH)
    out = np.empty(n, np.float32)
    round_ = side.theta(CHANNEL, out)
    assert round_ is not None
    return round_, out


def main(arguments: list[str]) -> int:
    """Serve as a trainer process: SITE_FOLDER and the plan as JSON."""
    plan = msgspec.json.decode(arguments[1], type=Plan)
    Trainer(Site(Path(arguments[0])), plan).train()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
