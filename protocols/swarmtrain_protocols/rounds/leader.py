"""The leader's side of all rounds: close the set, open, choose, decide. Spec 08.

Volatile on purpose: a new leader starts empty and everybody repeats what it needs. Every decision
is an entry of the log; what is kept here only says when to write the next one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Effect, Emit, PeerId, Send
from swarmtrain_protocols.ledger import ZERO_HASH, ChannelState, Ledger
from swarmtrain_protocols.messages import rounds as m
from swarmtrain_protocols.messages.common import RoundKey
from swarmtrain_protocols.messages.member import StateReport
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.loss import LossWatch
from swarmtrain_protocols.rounds.plan import coefficients_of, plan_parts
from swarmtrain_protocols.rounds.policy import RoundPolicy

RECHECK_S = 0.1
REPORT_WAIT_S = 2.0
"""A new leader knows of nobody's state; links come up and reports follow within moments."""


@dataclass(slots=True)
class _Phase:
    """What the leader knows of the attempt that is open in one channel."""

    key: RoundKey
    opened: e.RoundOpened
    started: float
    deadline: float
    held: dict[int, dict[bytes, tuple[int, ...]]] = field(default_factory=dict)
    refused: dict[int, None] = field(default_factory=dict)
    deputies: dict[int, bytes] = field(default_factory=dict)
    holding: dict[bytes, tuple[bytes, bool]] = field(default_factory=dict)
    lost_since: float = math.inf
    proposed: str = ""


@dataclass(slots=True)
class _Lobby:
    """Contributions that wait for the next attempt in one channel."""

    ready: dict[bytes, m.Ready] = field(default_factory=dict)
    first_ready: float = math.inf
    callers: dict[bytes, None] = field(default_factory=dict)
    reports: dict[bytes, StateReport] = field(default_factory=dict)
    interval_s: float = 0.0
    last_commit: float = math.nan
    proposed_open: RoundKey | None = None


class RoundLeader:
    """Active on the node that leads the log; ``propose`` appends to the log."""

    def __init__(
        self,
        *,
        me: PeerId,
        rng: random.Random,
        ledger: Ledger,
        out: list[Effect],
        policy: RoundPolicy,
        propose: Callable[[float, e.EntryBody], None],
        connected: Callable[[], list[PeerId]],
    ) -> None:
        self.ledger = ledger
        self.policy = policy
        self.active = False
        self._me = me
        self._rng = rng
        self._out = out
        self._propose = propose
        self._connected = connected
        self._lobbies: dict[str, _Lobby] = {}
        self._phases: dict[str, _Phase] = {}
        self._leaving: dict[bytes, None] = {}
        self._now = 0.0
        self._active_since = -math.inf
        self._loss = LossWatch()

    def activate(self, now: float, active: bool) -> None:
        """Leadership of the log begins or ends; everything volatile is dropped."""
        self.active = active
        self._active_since = now
        self._lobbies.clear()
        self._phases.clear()
        self._leaving.clear()
        self._loss = LossWatch()
        if active:
            self.reconcile(now)

    def leaving(self, member: PeerId) -> None:
        """Do not wait for this member any more."""
        self._leaving[member] = None

    def returned(self, member: PeerId) -> None:
        """The member asks to be in again."""
        self._leaving.pop(member, None)

    def present(self) -> list[bytes]:
        """Members with a link to the leader, the leader included, in member order."""
        linked = {*self._connected(), self._me}
        return [k for k in sorted(self.ledger.members) if k in linked and k not in self._leaving]

    # -- messages --------------------------------------------------------------------------

    def receive(self, now: float, peer: PeerId, message: object) -> None:
        if not self.active:
            return
        if isinstance(message, m.Ready):
            self._ready(now, peer, message)
        elif isinstance(message, m.Withdraw):
            lobby = self._lobby(message.channel)
            known = lobby.ready.get(peer)
            if known is not None and known.root == message.root:
                del lobby.ready[peer]
            self._lost(peer, message)
        elif isinstance(message, StateReport):
            if message.generation == self.ledger.generation:
                self._lobby(message.channel).reports[peer] = message
        elif isinstance(message, m.PartsHeld):
            phase = self._phase_of(message.key)
            if phase is not None and message.part < len(phase.opened.parts):
                phase.held.setdefault(message.part, {})[peer] = message.contributors
                phase.refused.update(dict.fromkeys(message.refused))
        elif isinstance(message, m.Holding):
            phase = self._phase_of(message.key)
            if phase is not None and peer in phase.opened.holders:
                phase.holding[peer] = (message.root, message.durable)
        self.step(now)

    def _lost(self, peer: PeerId, message: m.Withdraw) -> None:
        """A contributor has lost the bytes that an open attempt lists: it is done without them."""
        phase = self._phases.get(message.channel)
        if phase is None or phase.key.generation != message.generation:
            return
        for index, item in enumerate(phase.opened.contributors):
            if (item.member, item.root) == (peer, message.root):
                phase.refused[index] = None

    def _lobby(self, channel: str) -> _Lobby:
        return self._lobbies.setdefault(channel, _Lobby())

    def _phase_of(self, key: RoundKey) -> _Phase | None:
        phase = self._phases.get(key.channel)
        return phase if phase is not None and phase.key == key else None

    def _ready(self, now: float, peer: PeerId, message: m.Ready) -> None:
        fault = self._refuse(peer, message)
        if fault:
            fields: dict[str, object] = {"peer": peer.hex(), "fault": fault}
            self._out.append(Emit(fx.Notice("peer_fault", fields)))
            return
        lobby = self._lobby(message.channel)
        if not lobby.ready:
            lobby.first_ready = now
        lobby.ready[peer] = message
        lobby.callers[peer] = None

    def _refuse(self, peer: PeerId, message: m.Ready) -> str:
        """A stable code if the announcement cannot be accepted."""
        if message.generation != self.ledger.generation:
            return "stale_generation"
        if peer not in self.ledger.members:
            return "not_a_member"
        if not (math.isfinite(message.samples) and message.samples >= 0):
            return "bad_weight"
        if not 0 < message.values <= limits.VALUES_PER_CHANNEL_MAX:
            return "bad_shape"
        channel = self.ledger.channels.get(message.channel)
        if message.channel.startswith("train/"):
            if channel is None:
                return "unknown_channel"
            if message.values != channel.values:
                return "bad_shape"
            if message.codec != self.policy.scatter_codec:
                return "bad_codec"
            if message.base_round > channel.round:
                return "base_from_the_future"
        elif not message.channel.startswith("group/"):
            return "unknown_channel"
        return ""

    def disconnected(self, now: float, peer: PeerId) -> None:
        if self.active:
            for lobby in self._lobbies.values():
                lobby.ready.pop(peer, None)
                lobby.reports.pop(peer, None)
            self.step(now)

    # -- following the ledger --------------------------------------------------------------

    def reconcile(self, now: float) -> None:
        """The ledger moved: forget phases that are over, take up the one that is open."""
        if not self.active:
            return
        for name, channel in self.ledger.channels.items():
            phase = self._phases.get(name)
            if phase is not None and (channel.open is None or channel.open.key != phase.key):
                self._close(now, channel, phase)
                phase = None
            if channel.open is not None and phase is None:
                self._phases[name] = _Phase(
                    channel.open.key, channel.open, now, now + self._timeout(channel)
                )
                lobby = self._lobby(name)
                lobby.proposed_open = None
                for item in channel.open.contributors:
                    known = lobby.ready.get(item.member)
                    if known is not None and known.root == item.root:
                        del lobby.ready[item.member]
                lobby.first_ready = now if lobby.ready else math.inf
        self.step(now)

    def _close(self, now: float, channel: ChannelState, phase: _Phase) -> None:
        del self._phases[channel.name]
        lobby = self._lobby(channel.name)
        if channel.outcome(phase.key.round) is not None:
            if not math.isnan(lobby.last_commit):
                gap = now - lobby.last_commit
                old = lobby.interval_s or gap
                lobby.interval_s = 0.7 * old + 0.3 * gap
            lobby.last_commit = now

    def _timeout(self, channel: ChannelState) -> float:
        """Seconds an attempt may take: measured rounds where there are any, else by size."""
        if self.policy.round_timeout_s:
            return self.policy.round_timeout_s
        return 15.0 + channel.values * 4 / (1024 * 1024)

    # -- deciding --------------------------------------------------------------------------

    def step(self, now: float) -> None:
        self._now = now
        if not self.active or self.ledger.ended:
            return
        for name in list(self._lobbies):
            if name not in self._phases:
                self._maybe_open(now, name)
        for phase in list(self._phases.values()):
            self._push(now, phase)
        rewind = self._loss.check(now, self.ledger, self._present_reports())
        if rewind is not None:
            self._propose(now, rewind)

    def _present_reports(self) -> dict[str, Iterable[StateReport]]:
        present = self.present()
        return {
            name: [lobby.reports[k] for k in present if k in lobby.reports]
            for name, lobby in self._lobbies.items()
        }

    def _maybe_open(self, now: float, name: str) -> None:
        lobby = self._lobbies[name]
        if not lobby.ready or self.ledger.paused:
            return
        channel = self.ledger.channels.get(name)
        number = channel.round if channel is not None else 0
        attempt = channel.attempt if channel is not None else 0
        key = RoundKey(self.ledger.generation, name, number, attempt)
        if lobby.proposed_open == key:
            return
        present = self.present()
        self._drop_stale(lobby, number)
        ready = [k for k in sorted(lobby.ready) if k in present]
        if not ready:
            return
        expected, quorum = self._expected(name, lobby, present, number)
        complete = all(k in lobby.ready for k in expected) and len(ready) >= quorum
        grace_over = now >= lobby.first_ready + self._grace(name, lobby)
        enough = len(ready) >= (1 if name.startswith("group/") else quorum)
        if not complete and not (grace_over and enough):
            return
        body = self._opening(now, key, lobby, ready, present)
        if body is not None:
            lobby.proposed_open = key
            self._propose(now, body)

    def _drop_stale(self, lobby: _Lobby, number: int) -> None:
        for member in list(lobby.ready):
            ready = lobby.ready[member]
            too_old = number - ready.base_round > self.policy.max_base_age_rounds
            if ready.channel.startswith("train/") and too_old:
                del lobby.ready[member]  # the member returns it to its trainer by the same rule

    def _expected(
        self, name: str, lobby: _Lobby, present: list[bytes], number: int
    ) -> tuple[list[bytes], int]:
        """Whose contribution is worth waiting for, and how many are needed at least."""
        if name.startswith("group/"):
            wanted = max((r.expect for r in lobby.ready.values()), default=0)
            callers = [k for k in lobby.callers if k in present]
            if wanted:
                # Fewer once others have left: nobody waits for more members than there are.
                return callers, min(wanted, len(self.ledger.members))
            channel = self.ledger.channels.get(name)
            if channel is None:
                return present, len(present)  # the first round waits out the grace time
            past = {member for item in channel.history for member, _, _ in item.contributors}
            return [k for k in present if k in past or k in lobby.ready], 1
        trainers = [
            k for k in present if self.ledger.members[k].trains and self._at_work(lobby, k, number)
        ]
        first = self.policy.start_peers if number == 0 else 1
        return trainers, max(self.policy.min_peers, first)

    def _at_work(self, lobby: _Lobby, member: bytes, number: int) -> bool:
        report = lobby.reports.get(member)
        if report is None:
            return self._now < self._active_since + REPORT_WAIT_S
        # Whoever was in step a round ago is applying the result at this moment.
        return report.ready and report.trains and number - 1 <= report.round <= number

    def _grace(self, name: str, lobby: _Lobby) -> float:
        if name.startswith("group/"):
            expecting = any(r.expect for r in lobby.ready.values())
            return self.policy.expect_grace_s if expecting else self.policy.group_grace_s
        if self.policy.grace_s:
            return self.policy.grace_s
        return min(60.0, max(5.0, lobby.interval_s))

    def _opening(
        self, now: float, key: RoundKey, lobby: _Lobby, ready: list[bytes], present: list[bytes]
    ) -> e.RoundOpened | None:
        first = lobby.ready[ready[0]]
        ready = [k for k in ready if lobby.ready[k].values == first.values]
        ready = [k for k in ready if lobby.ready[k].codec == first.codec]
        if not any(lobby.ready[k].samples > 0 for k in ready):
            return None
        holders, state_hash = tuple(ready), ZERO_HASH
        gather = first.codec
        if key.channel.startswith("train/"):
            pinned = self._pin(now, key, lobby, present)
            if pinned is None:
                return None
            holders, state_hash = pinned
            gather = self.policy.gather_codec
        contributors = tuple(
            e.Contributor(k, lobby.ready[k].root, lobby.ready[k].samples, lobby.ready[k].base_round)
            for k in ready
        )
        owners = [k for k in present if k in ready and self.ledger.members[k].reachable]
        owners = owners or [k for k in present if self.ledger.members[k].reachable] or [self._me]
        parts = plan_parts(first.values, owners, self._me, key.round, self.policy.chunk_values)
        return e.RoundOpened(
            key, contributors, parts, holders, first.values, first.codec, gather, state_hash
        )

    def _pin(
        self, now: float, key: RoundKey, lobby: _Lobby, present: list[bytes]
    ) -> tuple[tuple[bytes, ...], bytes] | None:
        """(holders, state hash) by majority of the state holders that are in step."""
        votes: dict[bytes, list[bytes]] = {}
        for member in present:
            report = lobby.reports.get(member)
            if report is not None and report.round == key.round and report.ready:
                votes.setdefault(report.state_hash, []).append(member)
        if not votes:
            return None
        channel = self.ledger.channels[key.channel]
        known = channel.pinned_hash(key.round)
        if known is not None:
            return (tuple(votes[known]), known) if known in votes else None
        state_hash, holders = max(votes.items(), key=lambda item: (len(item[1]), item[0]))
        total = sum(len(group) for group in votes.values())
        if 2 * len(holders) <= total:
            if not self.ledger.paused:
                self._propose(now, e.Paused("no state hash has a majority"))
            return None
        return tuple(holders), state_hash

    # -- an open attempt -------------------------------------------------------------------

    def _push(self, now: float, phase: _Phase) -> None:
        channel = self.ledger.channels[phase.key.channel]
        present = self.present()
        self._replace_lost_owners(now, phase, present)
        if channel.chosen is None:
            self._gather(now, phase, present)
        else:
            self._decide(now, phase, present)

    def _replace_lost_owners(self, now: float, phase: _Phase, present: list[bytes]) -> None:
        for index, part in enumerate(phase.opened.parts):
            current = phase.deputies.get(index, part.owner)
            if current in present or phase.proposed:
                continue
            choices = [part.deputy, *[k for k in present if self.ledger.members[k].reachable]]
            choices = [k for k in choices if k in present]
            if not choices:
                self._abort(now, phase, "owner lost, no deputy")
                return
            phase.deputies[index] = choices[0]
            message = m.TakeOver(phase.key, index, choices[0])
            people = {c.member for c in phase.opened.contributors} | set(phase.opened.holders)
            for peer in sorted(people | {choices[0]}):
                self._out.append(Send(PeerId(peer), message))
            why = f"the owner of part {index} of {phase.key} is lost"
            fields: dict[str, object] = {"what": "deputy", "why": why, "using": choices[0].hex()}
            self._out.append(Emit(fx.Notice("fallback", fields)))

    def _delivered(self, phase: _Phase) -> tuple[list[int], bool]:
        """Contributors that every part's computer has, and whether every part has a computer."""
        common = set(range(len(phase.opened.contributors)))
        complete = True
        for index, part in enumerate(phase.opened.parts):
            current = phase.deputies.get(index, part.owner)
            held = phase.held.get(index, {}).get(current)
            if held is None:
                complete = False
                common = set()
            else:
                common &= set(held)
        return sorted(common), complete

    def _gather(self, now: float, phase: _Phase, present: list[bytes]) -> None:
        if phase.proposed:
            return
        delivered, complete = self._delivered(phase)
        delivered = [i for i in delivered if i not in phase.refused]
        wanted = [
            i
            for i, c in enumerate(phase.opened.contributors)
            if c.member in present and i not in phase.refused
        ]
        late = now >= phase.deadline
        here = delivered or not wanted
        if not (complete and here and all(i in delivered for i in wanted)) and not late:
            return
        group = phase.key.channel.startswith("group/")
        minimum = 1 if group else min(self.policy.min_peers, len(phase.opened.contributors))
        samples = [phase.opened.contributors[i].samples for i in delivered]
        if len(delivered) < max(minimum, 1) or not sum(samples) > 0:
            self._abort(now, phase, "contributions did not arrive")
            return
        values = coefficients_of(samples)
        coefficients = tuple(
            e.Coefficient(i, float(np.float32(v))) for i, v in zip(delivered, values, strict=True)
        )
        phase.proposed = "set"
        phase.deadline = now + self._timeout(self.ledger.channels[phase.key.channel])
        self._propose(now, e.RoundSet(phase.key, coefficients))

    def _decide(self, now: float, phase: _Phase, present: list[bytes]) -> None:
        if phase.proposed in ("commit", "abort"):
            return
        phase.proposed = ""
        holders = phase.opened.holders
        need = len(holders) if len(holders) <= 2 else len(holders) // 2 + 1
        must_sync = len(holders) < 3 and not phase.key.channel.startswith("group/")
        votes: dict[bytes, list[bytes]] = {}
        for member in sorted(phase.holding):
            root, durable = phase.holding[member]
            if durable or not must_sync:
                votes.setdefault(root, []).append(member)
        for root, members in votes.items():
            if len(members) >= need:
                phase.proposed = "commit"
                self._propose(now, e.RoundCommitted(phase.key, root, tuple(members)))
                return
        if len(votes) > 1:
            self._abort(now, phase, "results differ")
            return
        alive = [k for k in holders if k in present or k in phase.holding]
        if len(alive) < need:
            phase.lost_since = min(phase.lost_since, now)
            if now >= phase.lost_since + self.policy.lost_grace_s:
                self._abort(now, phase, "too many holders lost")
                return
        else:
            phase.lost_since = math.inf
        if now >= phase.deadline:
            self._abort(now, phase, "holders did not report in time")

    def _abort(self, now: float, phase: _Phase, reason: str) -> None:
        if phase.proposed != "abort":
            phase.proposed = "abort"
            self._propose(now, e.RoundAborted(phase.key, reason))

    # -- time ------------------------------------------------------------------------------

    def deadline(self) -> float:
        if not self.active:
            return math.inf
        times = [self._loss.deadline()]
        for name, lobby in self._lobbies.items():
            if lobby.ready and name not in self._phases and lobby.proposed_open is None:
                times.append(lobby.first_ready + self._grace(name, lobby))
                if self._now < self._active_since + REPORT_WAIT_S:
                    times.append(self._active_since + REPORT_WAIT_S)
        for phase in self._phases.values():
            if phase.proposed not in ("commit", "abort"):
                times += [phase.deadline, phase.lost_since + self.policy.lost_grace_s]
        # What is due already waits for somebody else (a link, a state report): look again soon.
        return min((max(t, self._now + RECHECK_S) for t in times), default=math.inf)
