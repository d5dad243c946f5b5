"""The host's side of a stage's loss: collect inputs, try candidates, ask for the best. Spec 11.

Candidates are weights that the lost stage could go on with: an older state, averages and copies of
its neighbours, near-identities, fresh ones (``candidates`` has the arithmetic, the shell does it).
Each one is put in place at this node and scored: the mean loss of held-out micro-batches that go
through all stages, with this node for the lost one. The least loss is chosen; all losses go into
STAGE_RECOVERED, with the hashes of what the candidates were made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import Effect, Emit, PeerId, Send
from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.messages.member import Propose
from swarmtrain_protocols.pipeline import effects as px
from swarmtrain_protocols.pipeline.book import KEPT, stage_channel
from swarmtrain_protocols.pipeline.collect import Collector
from swarmtrain_protocols.pipeline.errands import ErrandDone, ErrandFailed, Errands
from swarmtrain_protocols.pipeline.hops import ENDS, hops_of, plain_path
from swarmtrain_protocols.rounds import effects as fx

CALIBRATION_BATCHES = 8
COLLECT_S = 120.0
"""For the states of the neighbours, and for the catch-up to find an older state of the stage."""
TRIAL_S = 120.0
"""For one micro-batch to go through all stages."""
AGAIN_S = 2.0
UNSCORED = -1.0
"""Stands for the loss of a candidate that could not be scored."""
PREFERENCE = (
    "snapshot",
    "average-plain",
    "average-uniform",
    "copy-left",
    "copy-right",
    "near-identity-0.1",
    "near-identity-0",
    "average-squared",
    "fresh",
)
"""Which candidate to take if none could be scored."""
COPIES = ("copy-left", "copy-right")
"""Come last but one for the first and the last block stage, unless the run swaps stages: what these
do, no other stage has learnt (CheckFree+)."""


def use_of(stage: int) -> str:
    """What the states of neighbours are fetched for."""
    return f"rebuild/{stage}"


@dataclass(slots=True)
class _Work:
    """The rebuild of one stage. ``phase``: wait, collect, build, try, score, propose."""

    stage: int
    era: int
    round: int
    since: float
    phase: str = "wait"
    beside: dict[str, int] = field(default_factory=dict)
    """Stages whose states are inputs: ``left`` and ``right``."""
    collecting: dict[str, str] = field(default_factory=dict)
    inputs: list[px.CandidateInput] = field(default_factory=list)
    batches: tuple[bytes, ...] | None = None
    names: tuple[str, ...] = ()
    roots: dict[str, bytes] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    at: int = 0
    away: list[int] = field(default_factory=list)
    """Other stages that were lost when the first candidate was tried: its path leaves them out."""
    errands: dict[int, None] = field(default_factory=dict)
    heard: list[float] = field(default_factory=list)
    choice: e.StageRecovered | None = None
    again_at: float = math.inf
    """When to say the choice again, or to begin anew with the first candidate."""


class Rebuilder:
    """All stages that this node is the host of.

    Args:
        held: (round, state hash) of this node's own state of a channel, None without one.
        fetching: the catch-up of a channel is downloading.
        swapped: of the run's keys.
    """

    def __init__(
        self,
        *,
        me: PeerId,
        ledger: Ledger,
        out: list[Effect],
        collector: Collector,
        errands: Errands,
        connected: Callable[[], list[PeerId]],
        held: Callable[[str], tuple[int, bytes] | None],
        fetching: Callable[[str], bool],
        swapped: bool = False,
    ) -> None:
        self.ledger = ledger
        self.leader: PeerId | None = None
        self.trainer = False
        self._me = me
        self._out = out
        self._collector = collector
        self._errands = errands
        self._connected = connected
        self._held = held
        self._fetching = fetching
        self._swapped = swapped
        self._works: dict[int, _Work] = {}

    @property
    def busy(self) -> bool:
        """This node rebuilds a stage."""
        return bool(self._works)

    def on_trial(self, stage: int) -> bool:
        """A candidate stands in the module of ``stage``: hops of kind ``evaluate`` may use it."""
        work = self._works.get(stage)
        return work is not None and work.phase == "score"

    # -- following the ledger --------------------------------------------------------------

    def reconcile(self, now: float) -> None:
        state = self.ledger.pipeline
        for stage, work in list(self._works.items()):
            known, channel = state.stages[stage], self.ledger.channels[stage_channel(stage)]
            moved = known.host and channel.round != work.round  # a round that was open is committed
            if known.host != self._me or work.era != state.era or moved:
                self._settle(work)
            elif work.phase in ("try", "score") and work.away != self._away(stage):
                # Losses of different paths cannot be compared.
                self._cancel(work)
                work.phase, work.at, work.away = "try", 0, self._away(stage)
                self._try(now, work)
        for stage in state.lost():
            if state.stages[stage].host == self._me and stage not in self._works:
                channel = self.ledger.channels[stage_channel(stage)]
                self._works[stage] = _Work(stage, state.era, channel.round, now)
        self.tick(now)

    def _settle(self, work: _Work) -> None:
        """It is over: this node's choice stands in the log, or somebody else's does."""
        channel = self.ledger.channels[stage_channel(work.stage)]
        known = self.ledger.pipeline.stages[work.stage]
        choice, recovered = work.choice, not known.host and channel.start_round == work.round
        self._cancel(work)
        del self._works[work.stage]
        if choice is not None and recovered and channel.start_hash == choice.root:
            name = choice.candidates[choice.choice]
            if name != KEPT:
                adopt = px.AdoptCandidate(work.stage, name, work.round, choice.root)
                self._out.append(adopt)
        self._out.append(px.DropCandidates(work.stage))

    def _cancel(self, work: _Work) -> None:
        """Nothing that is under way is waited for."""
        for channel in work.collecting:
            self._collector.cancel(channel, use_of(work.stage))
        for handle in work.errands:
            self._errands.cancel(handle)
        work.collecting.clear()
        work.errands.clear()

    # -- time --------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        for work in list(self._works.values()):
            self._kept(now, work)
            if work.phase == "wait" and self._may_begin(work):
                self._collect(now, work)
            if work.phase == "collect" and self._collected(now, work):
                self._build(work)
            if now >= work.again_at:
                work.again_at = math.inf
                (self._say if work.phase == "propose" else self._try)(now, work)

    def deadline(self) -> float:
        times = [w.again_at for w in self._works.values()]
        times += [w.since + COLLECT_S for w in self._works.values() if w.phase == "collect"]
        return min(times, default=math.inf)

    def trainer_changed(self, now: float, present: bool) -> None:
        """A trainer computes here (again), or not any more: trials begin anew with the next."""
        self.trainer = present
        for work in self._works.values():
            if not present and work.phase in ("try", "score"):
                self._cancel(work)
                work.phase = "try"
            elif present and work.phase == "try":
                self._try(now, work)

    # -- the state itself ----------------------------------------------------------------------

    def _kept(self, now: float, work: _Work) -> None:
        """The catch-up has found the very state, here or at somebody who came back."""
        held = self._held(stage_channel(work.stage))
        if held is None or held[0] != work.round or work.phase == "propose":
            return
        self._cancel(work)
        self._choose(now, work, (KEPT,), (UNSCORED,), 0, (held[1],), held[1])

    # -- inputs ----------------------------------------------------------------------------

    def _may_begin(self, work: _Work) -> bool:
        """Blocks can be scored once there are ends to score them with."""
        return work.stage == ENDS or ENDS not in self.ledger.pipeline.lost()

    def _collect(self, now: float, work: _Work) -> None:
        work.phase, work.since = "collect", now
        self._out.append(px.NeedCalibration(work.stage, CALIBRATION_BATCHES))
        work.beside = self._neighbours(work.stage)
        for what, stage in work.beside.items():
            self._input(now, work, what, stage)

    def _neighbours(self, stage: int) -> dict[str, int]:
        """The nearest block stages on both sides that are not lost; the ends have none."""
        state = self.ledger.pipeline
        alive = [s for s in range(1, state.blocks + 1) if not state.stages[s].host]
        left = [s for s in alive if s < stage]
        right = [s for s in alive if s > stage]
        found = {"left": left[-1]} if left else {}
        if right and stage != ENDS:
            found["right"] = right[0]
        return found

    def _input(self, now: float, work: _Work, what: str, stage: int) -> None:
        name = stage_channel(stage)
        if self._own(work, what, name):
            return
        serving = [PeerId(k) for k in self.ledger.pipeline.serving(stage)]
        others = [k for k in self._connected() if k not in serving]

        def done(at: float, snapshot: fx.Snapshot | None) -> None:
            if self._works.get(work.stage) is not work or work.collecting.pop(name, None) is None:
                return
            if snapshot is not None:
                work.inputs.append(px.CandidateInput(what, snapshot, False))
            self.tick(at)

        work.collecting[name] = what
        use, ask = use_of(work.stage), [*serving, *others]
        self._collector.start(now, name, use, ask, done, timeout_s=COLLECT_S)

    def _own(self, work: _Work, what: str, channel: str) -> bool:
        held = self._held(channel)
        if held is None:
            return False
        values = self.ledger.channels[channel].values
        snapshot = fx.Snapshot(channel, held[0], held[1], values)
        work.inputs.append(px.CandidateInput(what, snapshot, True))
        return True

    def _collected(self, now: float, work: _Work) -> bool:
        if now >= work.since + COLLECT_S:
            return True
        busy = bool(work.collecting) or self._fetching(stage_channel(work.stage))
        return not busy and work.batches is not None

    def _build(self, work: _Work) -> None:
        self._cancel(work)
        self._own(work, "snapshot", stage_channel(work.stage))
        work.inputs.sort(key=lambda item: item.what)
        work.phase = "build"
        stages = self.ledger.pipeline.stages
        norms = {what: math.sqrt(stages[s].square_norm) for what, s in work.beside.items()}
        both = norms.get("left", 0.0), norms.get("right", 0.0)
        self._out.append(px.BuildCandidates(work.stage, tuple(work.inputs), both))

    # -- answers of the shell --------------------------------------------------------------

    def calibration(self, now: float, stage: int, batches: Sequence[bytes]) -> None:
        """The answer to ``NeedCalibration``."""
        work = self._works.get(stage)
        if work is not None and work.batches is None:
            work.batches = tuple(batches[:CALIBRATION_BATCHES])
            self.tick(now)

    def candidates_built(self, now: float, stage: int, names: Sequence[str]) -> None:
        """The answer to ``BuildCandidates``."""
        work = self._works.get(stage)
        if work is None or work.phase != "build":
            return
        assert names, "fresh weights are always possible"
        work.names = tuple(names)
        work.phase, work.away = "try", self._away(stage)
        self._try(now, work)

    def _away(self, stage: int) -> list[int]:
        return [s for s in self.ledger.pipeline.lost() if s != stage]

    def candidate_ready(self, now: float, stage: int, name: str, root: bytes) -> None:
        """The answer to ``TryCandidate``."""
        work = self._trying(stage, name)
        if work is None:
            return
        work.roots[name] = root
        work.phase = "score"
        work.heard.clear()
        blocks = self.ledger.pipeline.blocks
        path = tuple(h for h in plain_path(blocks) if h not in work.away)
        pinned = dict.fromkeys(hops_of(stage, blocks), self._me)
        for tokens in work.batches or ():
            try:
                handle = self._errands.start(
                    now,
                    "evaluate",
                    tokens,
                    path,
                    timeout_s=TRIAL_S,
                    pinned=pinned,
                    done=self._evaluated,
                )
            except LocalProtocolError as error:
                self._scored(now, work, str(error))
                return
            work.errands[handle] = None
        if not work.errands:
            self._scored(now, work, "there is no held-out data here")

    def candidate_failed(self, now: float, stage: int, name: str, reason: str) -> None:
        """``TryCandidate`` could not be done."""
        work = self._trying(stage, name)
        if work is not None:
            self._scored(now, work, reason)

    def _trying(self, stage: int, name: str) -> _Work | None:
        work = self._works.get(stage)
        if work is None or work.phase != "try" or not self.trainer:
            return None
        return work if work.names[work.at] == name else None

    # -- scoring -----------------------------------------------------------------------------

    def _try(self, now: float, work: _Work) -> None:
        if self.trainer:
            self._out.append(px.TryCandidate(work.stage, work.names[work.at], work.round))

    def _evaluated(self, now: float, event: ErrandDone | ErrandFailed) -> None:
        work = next((w for w in self._works.values() if event.handle in w.errands), None)
        if work is None:
            return
        del work.errands[event.handle]
        if isinstance(event, ErrandFailed) or not math.isfinite(event.loss):
            reason = event.reason if isinstance(event, ErrandFailed) else "the loss is not finite"
            self._scored(now, work, reason)
            return
        work.heard.append(event.loss)
        if not work.errands:
            self._scored(now, work, "")

    def _scored(self, now: float, work: _Work, trouble: str) -> None:
        """One candidate is done; ``trouble``: why it has no loss."""
        self._cancel(work)
        name = work.names[work.at]
        if trouble:
            work.losses[name] = UNSCORED
            fields: dict[str, object] = {
                "what": f"candidate {name} of stage {work.stage} without a loss",
                "why": trouble,
            }
            self._out.append(Emit(fx.Notice("fallback", fields)))
        else:
            work.losses[name] = math.fsum(work.heard) / len(work.heard)
        work.at += 1
        work.phase = "try"
        if work.at < len(work.names):
            self._try(now, work)
        else:
            self._decide(now, work)

    def _decide(self, now: float, work: _Work) -> None:
        able = [n for n in work.names if n in work.roots]
        scored = [n for n in able if work.losses[n] != UNSCORED]
        if scored:
            best = min(scored, key=lambda n: (work.losses[n], work.names.index(n)))
        elif able:
            best = min(able, key=lambda n: self._rank(work.stage, n))
        else:
            work.at, work.again_at = 0, now + AGAIN_S  # the trainer has its troubles
            return
        hashes = tuple(item.snapshot.root for item in work.inputs)
        losses = tuple(work.losses[n] for n in work.names)
        root = work.roots[best]
        self._choose(now, work, work.names, losses, work.names.index(best), hashes, root)

    def _rank(self, stage: int, name: str) -> tuple[bool, int, str]:
        """Of a candidate without a loss; the least is taken."""
        known = PREFERENCE.index(name) if name in PREFERENCE else len(PREFERENCE)
        edge = stage in (1, self.ledger.pipeline.blocks) and not self._swapped
        return edge and name in (*COPIES, "fresh"), known, name

    def _choose(
        self,
        now: float,
        work: _Work,
        names: tuple[str, ...],
        losses: tuple[float, ...],
        choice: int,
        inputs: tuple[bytes, ...],
        root: bytes,
    ) -> None:
        work.phase = "propose"
        work.choice = e.StageRecovered(
            work.stage, work.round, self._me, names, losses, choice, inputs, root
        )
        self._say(now, work)

    def _say(self, now: float, work: _Work) -> None:
        """Ask for the entry, again and again until the log has one."""
        work.again_at = now + AGAIN_S
        if self.leader is not None and work.choice is not None:
            self._out.append(Send(self.leader, Propose(e.encode_body(work.choice))))
