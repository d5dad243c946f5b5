"""The leader's side of all rounds: close the set, open, choose, decide. Spec 08.

Volatile on purpose: a new leader starts empty and everybody repeats what it needs. Every decision
is an entry of the log; what is kept here only says when to write the next one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterable, Mapping

from swarmtrain_protocols import entries as e
from swarmtrain_protocols.core import Effect, Emit, PeerId
from swarmtrain_protocols.identity import verify_ed25519
from swarmtrain_protocols.ledger import ZERO_HASH, ChannelState, Ledger
from swarmtrain_protocols.memo import Memo
from swarmtrain_protocols.messages import rounds as m
from swarmtrain_protocols.messages.common import RoundKey
from swarmtrain_protocols.messages.member import StateReport
from swarmtrain_protocols.rounds import clip
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.lobby import Lobbies, Lobby, Newest
from swarmtrain_protocols.rounds.loss import LossWatch
from swarmtrain_protocols.rounds.owners import Owners
from swarmtrain_protocols.rounds.pace import OverlapChoice
from swarmtrain_protocols.rounds.phases import Decider, Phase
from swarmtrain_protocols.rounds.pinning import NO_MAJORITY, Pins
from swarmtrain_protocols.rounds.plan import plan_parts
from swarmtrain_protocols.rounds.policy import RoundPolicy, policy_at
from swarmtrain_protocols.rounds.unlike import discount_of, lateness
from swarmtrain_protocols.rounds.waiting import waited_for
from swarmtrain_protocols.schedule import mode_at
from swarmtrain_protocols.suspension import trusted

ATTEMPT_BASE_S = 40.0
RECHECK_S = 0.1

_TOLD_HONESTLY = (
    *("stale_generation", "not_a_member", "not_an_owner", "base_from_the_future", "stale_claim"),
)
"""Refusals that an honest member causes whose news is older or newer than the leader's: it computes
a part because a former leader said so, or was declared lost and does not know yet."""


class RoundLeader:
    """Active on the node that leads the log; ``propose`` appends, False if it cannot now."""

    def __init__(
        self,
        *,
        me: PeerId,
        rng: random.Random,
        ledger: Ledger,
        out: list[Effect],
        policy: RoundPolicy,
        propose: Callable[[float, e.EntryBody], bool],
        connected: Callable[[], list[PeerId]],
        verify: Callable[[bytes, bytes, bytes, bytes], bool] = verify_ed25519,
    ) -> None:
        self.ledger = ledger
        self.policy = policy
        self._founded = policy
        self.active = False
        self.waits = False
        """Whether somebody is waited for; ``waited`` says who."""
        self.decider: Decider | None = None
        self._me = me
        self._rng = rng
        self._out = out
        self._propose = propose
        self._connected = connected
        self._newest: Newest = {}
        self._lobbies = Lobbies(policy, 0.0, self._newest)
        self._phases: dict[str, Phase] = {}
        self._leaving: dict[bytes, None] = {}
        self._now = 0.0
        self._loss = LossWatch()
        self._pins = Pins(ledger)
        self._resumed_at = -1
        self._choice = OverlapChoice(policy.measure_overlap)
        self._owners = Owners(me=me, out=out, propose=propose, verify=verify)
        self._here: Memo[dict[bytes, None]] = Memo()

    def activate(self, now: float, active: bool) -> None:
        """Leadership of the log begins or ends; everything volatile is dropped."""
        self.active = active
        self._lobbies = Lobbies(self.policy, now, self._newest)
        self._phases.clear()
        self._leaving.clear()
        self._loss = LossWatch()
        self._pins = Pins(self.ledger)
        self._choice = OverlapChoice(self.policy.measure_overlap)
        if active:
            self.reconcile(now)

    def leaving(self, member: PeerId) -> None:
        """Do not wait for this member any more."""
        self._leaving[member] = None

    def returned(self, member: PeerId) -> None:
        """The member asks to be in again."""
        self._leaving.pop(member, None)

    def here(self) -> list[bytes]:
        """Members with a link to the leader, the leader included, in member order."""
        return list(self._there())

    def _there(self) -> dict[bytes, None]:
        ledger, linked = self.ledger, tuple(self._connected())
        asked, members = (ledger, ledger.index, linked), ledger.members.keys()
        return self._here.of(asked, lambda: dict.fromkeys(sorted({*linked, self._me} & members)))

    def present(self) -> list[bytes]:
        """Those of them that are not about to leave: whom the next attempt may count on."""
        return [k for k in self._there() if k not in self._leaving]

    # -- messages --------------------------------------------------------------------------

    def receive(self, now: float, peer: PeerId, message: object) -> None:
        if not self.active:
            return
        if isinstance(message, m.Ready) and self.ledger.stepwise(message.channel):
            self._fault(peer, "unknown_channel")
        elif isinstance(message, m.Ready):
            self._told(peer, self._lobbies.announced(now, self.ledger, peer, message))
        elif isinstance(message, m.Withdraw):
            self._lobbies.withdrawn(peer, message)
            if message.channel in self._phases:
                self._phases[message.channel].lost(peer, message)
        elif isinstance(message, StateReport):
            self._lobbies.reported(self.ledger, peer, message)
        elif isinstance(message, m.PartsHeld):
            phase = self._phase_of(message.key)
            if phase is not None:  # else late, or not known yet here: it is repeated
                self._told(peer, self._owners.held(now, phase, peer, message))
        elif isinstance(message, m.Complaint):
            phase = self._phase_of(message.key)
            if phase is not None:
                run = self.ledger.run
                self._told(peer, self._owners.complained(phase, peer, message, run))
        elif isinstance(message, m.Holding):
            phase = self._phase_of(message.key)
            if phase is not None and peer in phase.opened.holders:
                phase.holding[peer] = message
                phase.parted.pop(peer, None)
        self.step(now)

    def _told(self, peer: bytes, code: str) -> None:
        if code:
            self._fault(peer, code)

    def _fault(self, peer: bytes, code: str) -> None:
        """Say what is wrong with what ``peer`` said; nobody is accused of what may be honest."""
        if code in _TOLD_HONESTLY:
            notice = fx.Notice("message_ignored", {"peer": peer.hex(), "reason": code})
        else:
            notice = fx.Notice("peer_fault", {"peer": peer.hex(), "fault": code})
        self._out.append(Emit(notice))

    def _phase_of(self, key: RoundKey) -> Phase | None:
        phase = self._phases.get(key.channel)
        return phase if phase is not None and phase.key == key else None

    def connected(self, peer: PeerId) -> None:
        """A link to ``peer`` is up: what it was told of open attempts may be lost."""
        for phase in self._phases.values():
            self._owners.tell_again(phase, peer)

    def disconnected(self, now: float, peer: PeerId) -> None:
        for key in [k for k in self._newest if k[1] == peer]:
            del self._newest[key]  # nothing that was under way on that link comes any more
        if self.active:
            for phase in self._phases.values():
                phase.parted[peer] = None
            self._lobbies.disconnected(peer)
            self.step(now)

    # -- following the ledger --------------------------------------------------------------

    def reconcile(self, now: float) -> None:
        """The ledger moved: forget phases that are over, take up the one that is open."""
        if not self.active:
            return
        self.policy = self._lobbies.policy = policy_at(self._founded, self.ledger)
        self._lobbies.reconcile(self.ledger)
        for member in [k for k in self._leaving if k not in self.ledger.members]:
            del self._leaving[member]
        for name in [n for n in self._phases if n not in self.ledger.channels]:
            del self._phases[name]
        for name, channel in self.ledger.channels.items():
            phase = self._phases.get(name)
            if phase is not None and (channel.open is None or channel.open.key != phase.key):
                self._close(now, channel, phase)
                phase = None
            if channel.open is not None and phase is None:
                lobby, opened = self._lobbies.room(name), channel.open
                phase = Phase(opened.key, opened, now, now + self._timeout(channel))
                phase.weighs = self.ledger.weighs(name)
                turn = lobby.turns.plan(opened, lobby.rates, self._hidden(opened.key.round))
                phase.patient, phase.hopeless = turn
                self._phases[name] = phase
                lobby.proposed_open = None
                self._choice.opened(channel.open.key, lobby.listed(channel.open))
                lobby.first_ready = now if lobby.ready else math.inf
                lobby.half_ready, lobby.opened_at = math.inf, now
        self.step(now)

    def _close(self, now: float, channel: ChannelState, phase: Phase) -> None:
        del self._phases[channel.name]
        lobby = self._lobbies.room(channel.name)
        lobby.decided_at = now
        outcome = channel.outcome(phase.key.round)
        if outcome is None or outcome.attempt != phase.key.attempt:
            return
        lobby.committed(now)
        lobby.turns.decided(phase.opened, (member for member, _, _ in outcome.contributors))
        for member, holding in phase.holding.items():
            if holding.root != outcome.root:
                self._fault(member, "wrong_result")

    def _timeout(self, channel: ChannelState) -> float:
        """Seconds a phase of an attempt may take: by size, and longer after each failure.

        A link that breaks is noticed sooner; this bounds what is connected and slow. The base is
        four hops of a link that is five seconds away, twice over.
        """
        if self.policy.round_timeout_s:
            return self.policy.round_timeout_s
        once = ATTEMPT_BASE_S + channel.values * 4 / (1024 * 1024)
        return float(once * 2 ** min(channel.attempt, 3))

    # -- deciding --------------------------------------------------------------------------

    def step(self, now: float) -> None:
        self._now = now
        if not self.active:
            self.waits = False
            return
        here = self._there()
        for phase in list(self._phases.values()):
            self._push(now, phase, here)
        self.waits = bool(self._phases)
        if self.ledger.ended:
            return  # what is open is decided, nothing is opened any more
        if self.ledger.paused == NO_MAJORITY:
            self._go_on(now)
        present = self.present()
        for name in list(self._lobbies.rooms):
            if name not in self._phases:
                self._maybe_open(now, name, present)
        self.waits = self.waits or self._lobbies.half_ready()
        for body in (
            self._loss.check(now, self.ledger, self._reports_of(present)),
            self._choice.proposal(self.ledger),
        ):
            if body is not None:
                self._propose(now, body)

    def reports(self, channel: str) -> list[tuple[bytes, StateReport]]:
        """Where members with a link stand in a state channel, in member order."""
        room = self._lobbies.rooms.get(channel)
        known = room.reports if room is not None else {}
        return [(k, known[k]) for k in self.here() if k in known]

    def waited(self, now: float) -> list[PeerId]:
        """Others whose word, bytes or announcement the open attempts and the next ones need."""
        here = self._phases, self._lobbies, self.present()
        return waited_for(now, self._me, self.ledger, *here) if self.waits else []

    def _reports_of(self, present: list[bytes]) -> dict[str, Iterable[StateReport]]:
        return {name: lobby.standing(present) for name, lobby in self._lobbies.rooms.items()}

    def _maybe_open(self, now: float, name: str, present: list[bytes]) -> None:
        lobby = self._lobbies.rooms[name]
        if not lobby.ready or self.ledger.paused:
            return
        key = self.ledger.next_key(name)
        if key is None or lobby.proposed_open == key:
            return
        if name.startswith("train/"):  # whoever calls in a group waits for an answer
            present = self._lobbies.usable(self.ledger, name, present)
        self._lobbies.drop_stale(self.ledger, lobby, key.round)
        ready = lobby.agreeing(present)
        if not ready:
            return
        expected, quorum = self._lobbies.expected(now, self.ledger, name, present)
        complete = all(k in lobby.ready for k in expected) and len(ready) >= quorum
        self._lobbies.note_half(now, name, expected)
        grace_over = now >= self._lobbies.grace_over_at(name, self._hidden(key.round))
        enough = len(ready) >= (1 if name.startswith("group/") else quorum)
        if not complete and not (grace_over and enough):
            return
        body = self._opening(now, key, lobby, ready, present)
        if body is not None and self._propose(now, body):
            lobby.proposed_open = key

    def _opening(
        self, now: float, key: RoundKey, lobby: Lobby, ready: list[bytes], present: list[bytes]
    ) -> e.RoundOpened | None:
        first = lobby.ready[ready[0]]
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
        contributors = tuple(self._contributor(key, lobby.ready[k], k) for k in ready)
        receivers = len({*ready, *holders})
        parts = self.parts(first.values, ready, present, key.round, lobby.rates, receivers)
        pace_s = lobby.paces.pace_s() if key.channel.startswith("train/") else 0.0
        return e.RoundOpened(
            key, contributors, parts, holders, first.values, first.codec, gather, state_hash, pace_s
        )

    def _contributor(self, key: RoundKey, said: m.Ready, member: bytes) -> e.Contributor:
        """As it is listed; a late one, or one of several phases, has its discount beside it."""
        discount = 1.0
        if key.channel.startswith("train/"):
            late = lateness(key.round, said.base_round, self._hidden(key.round))
            discount = discount_of(late, said.age)
        weight = said.samples, said.base_round, said.claims, discount
        return e.Contributor(member, said.root, *weight)

    def _hidden(self, round_number: int) -> bool:
        """Whether the exchange of a round runs behind the next phase of its trainers."""
        policy = self.policy
        return mode_at(policy.overlap, policy.measure_overlap, self.ledger, round_number) != "off"

    def parts(
        self,
        values: int,
        preferred: list[bytes],
        present: list[bytes],
        round_number: int,
        rates: Mapping[bytes, float] | None = None,
        receivers: int = 0,
    ) -> tuple[e.Part, ...]:
        """A part table: reachable ones of ``preferred`` own it, else any reachable member."""
        reachable = [k for k in present if self.ledger.members[k].reachable]
        reachable = trusted(self.ledger, reachable)
        owners = [k for k in reachable if k in preferred] or reachable or [self._me]
        chunk_values = self.policy.chunk_values
        return plan_parts(values, owners, self._me, round_number, chunk_values, rates, receivers)

    def standing(self, now: float, channel: str) -> tuple[tuple[bytes, ...], bytes] | None:
        """(holders, state hash) before the next round: present members that are in step."""
        known = self.ledger.channels[channel]
        key = RoundKey(self.ledger.generation, channel, known.round, known.attempt)
        return self._pin(now, key, self._lobbies.room(channel), self.present())

    def _pin(
        self, now: float, key: RoundKey, lobby: Lobby, present: list[bytes]
    ) -> tuple[tuple[bytes, ...], bytes] | None:
        """(holders, state hash) by majority of the state holders that are in step."""
        found = self._pins.standing(now, key.channel, key.round, lobby.reports, present)
        if found is None and not self.ledger.paused and self._pins.tied(key.channel):
            self._propose(now, e.Paused(NO_MAJORITY))
        return found

    def _go_on(self, now: float) -> None:
        """A run that stands still because its states differed goes on once most are equal."""
        names = [channel.name for channel in self.ledger.train_channels()]
        found = [name for name in names if self.standing(now, name) is not None]
        split = [name for name in names if name not in found and self._pins.is_split(name)]
        if not found or split or self._resumed_at == self.ledger.index:
            return
        if self._propose(now, e.Resumed(NO_MAJORITY)):
            self._resumed_at = self.ledger.index

    # -- an open attempt -------------------------------------------------------------------

    def _push(self, now: float, phase: Phase, present: Collection[bytes]) -> None:
        channel = self.ledger.channels[phase.key.channel]
        if channel.chosen is not None and phase.proposed == "set":
            phase.proposed = ""
        lost = self._owners.look(now, phase, self.ledger, present, list(self._leaving))
        if lost:
            self._abort(now, phase, lost)
        elif channel.chosen is None:
            self._gather(now, phase, present)
        else:
            self._decide(now, phase, present)

    def _gather(self, now: float, phase: Phase, present: Collection[bytes]) -> None:
        if phase.proposed:
            return
        delivered, complete = phase.delivered()
        delivered = [i for i in delivered if i not in phase.refused]
        wanted = [
            i
            for i, c in enumerate(phase.opened.contributors)
            if c.member in present and i not in phase.refused and i not in phase.hopeless
        ]
        phase.note_half(now, len(delivered), len(wanted), self._hidden(phase.key.round))
        late = now >= min(phase.deadline, phase.close_at)
        here = delivered or not wanted
        if not (complete and here and set(delivered).issuperset(wanted)) and not late:
            return
        group = phase.key.channel.startswith("group/")
        minimum = 1 if group else min(self.policy.min_peers, len(phase.opened.contributors))
        minimum = max(minimum, 1)
        possible = len(phase.opened.contributors) - len(phase.refused)  # those taken back: never
        listed = [phase.opened.contributors[i] for i in delivered]
        weight = sum(item.samples * item.discount for item in listed)
        if len(delivered) < minimum <= possible and now < phase.deadline:
            return
        if len(delivered) < minimum or not weight > 0:
            self._abort(now, phase, "contributions did not arrive")
            return
        norms, kept = phase.norms(delivered), self.ledger.channels[phase.key.channel].norms
        coefficients = clip.coefficients(phase.opened, delivered, norms, kept)
        if self._propose(now, e.RoundSet(phase.key, coefficients, tuple(norms))):
            phase.proposed = "set"
            phase.deadline = now + self._timeout(self.ledger.channels[phase.key.channel])

    def _decide(self, now: float, phase: Phase, present: Collection[bytes]) -> None:
        if phase.proposed in ("commit", "abort"):
            return
        holders = phase.opened.holders
        need = len(holders) if len(holders) <= 2 else len(holders) // 2 + 1
        must_sync = len(holders) < 3 and not phase.key.channel.startswith("group/")
        votes: dict[bytes, list[bytes]] = {}
        for member in sorted(phase.holding):
            holding = phase.holding[member]
            if holding.durable or not must_sync:
                votes.setdefault(holding.root, []).append(member)
        best = max((len(members) for members in votes.values()), default=0)
        if best >= need:
            root = next(r for r, members in votes.items() if len(members) == best)
            self._commit(now, phase, root, tuple(votes[root]))
            return
        if self._fixed(phase) and not phase.holding and phase.undeliverable(present):
            self._abort(now, phase, "a contributor is lost")
            return
        silent = [k for k in holders if k not in phase.holding]
        if best + len(silent) < need:
            differ = "results differ" if len(votes) > 1 else "a result is not on disk"
            self._abort(now, phase, differ)
            return
        chosen = self.ledger.channels[phase.key.channel].chosen
        lost = ""
        if best + sum(k in present for k in silent) < need:
            lost = "too many holders lost"
        elif chosen and not phase.result_here(present) and phase.broken(present, chosen):
            lost = "a chosen contribution is lost"
        phase.lost_since = min(phase.lost_since, now) if lost else math.inf
        if lost and now >= phase.lost_since + self.policy.lost_grace_s:
            self._abort(now, phase, lost)
            return
        if now >= phase.deadline:
            self._abort(now, phase, "holders did not report in time")

    def _fixed(self, phase: Phase) -> bool:
        """The set was fixed before anything was delivered, and the outcome is somebody else's."""
        return self.decider is not None and self.ledger.stepwise(phase.key.channel)

    def _commit(self, now: float, phase: Phase, root: bytes, held_by: tuple[bytes, ...]) -> None:
        if self.decider is not None and self._fixed(phase):
            norms = [phase.holding[k].square_norm for k in held_by]
            norm = next((n for n in norms if 0.0 <= n < math.inf), 0.0)
            self.decider.committable(now, phase.key, root, held_by, norm)
        elif self._propose(now, e.RoundCommitted(phase.key, root, held_by)):
            phase.proposed = "commit"

    def _abort(self, now: float, phase: Phase, reason: str) -> None:
        if self.decider is not None and self._fixed(phase):
            self.decider.cannot(now, phase.key, reason)
            return
        if phase.proposed != "abort" and self._propose(now, e.RoundAborted(phase.key, reason)):
            phase.proposed = "abort"

    # -- time ------------------------------------------------------------------------------

    def deadline(self) -> float:
        if not self.active:
            return math.inf
        times = []
        if not self.ledger.ended:
            times += [self._loss.deadline(), self._pins.deadline(self._now)]
            for name, lobby in self._lobbies.rooms.items():
                if lobby.ready and name not in self._phases and lobby.proposed_open is None:
                    key = self.ledger.next_key(name)
                    hidden = key is not None and self._hidden(key.round)
                    times.append(self._lobbies.grace_over_at(name, hidden))
                    if self._now < self._lobbies.complete_at:
                        times.append(self._lobbies.complete_at)
        for phase in self._phases.values():
            if phase.proposed not in ("commit", "abort"):
                times += [phase.deadline, phase.lost_since + self.policy.lost_grace_s]
                times.append(self._owners.deadline(phase))
                if not phase.proposed and self.ledger.channels[phase.key.channel].chosen is None:
                    times.append(phase.close_at)
        # What is due already waits for somebody else (a link, a state report): look again soon.
        return min((max(t, self._now + RECHECK_S) for t in times), default=math.inf)
