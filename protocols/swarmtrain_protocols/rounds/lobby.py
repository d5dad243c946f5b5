"""The leader's waiting rooms: announced contributions, and where state holders stand. Spec 08.

One room per channel. Everything in it was said by others, so everything is bounded, and what the
ledger makes void (a new generation, members that left) is dropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from swarmtrain_protocols import limits
from swarmtrain_protocols.codecs import CODEC_NAMES
from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.entries import RoundOpened
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.memo import Memo, Noted
from swarmtrain_protocols.messages import rounds as m
from swarmtrain_protocols.messages.common import RoundKey
from swarmtrain_protocols.messages.member import StateReport
from swarmtrain_protocols.rounds.policy import RoundPolicy
from swarmtrain_protocols.rounds.turns import Turns
from swarmtrain_protocols.rounds.unlike import Paces, half_of, opening_grace_s, patience_s
from swarmtrain_protocols.suspension import is_suspended, trusted

REPORT_WAIT_S = 2.0
"""A new leader knows of nobody's state; links come up and reports follow within moments."""


@dataclass(slots=True)
class Lobby:
    """What waits for the next attempt in one channel."""

    ready: Noted[bytes, m.Ready] = field(default_factory=Noted)
    first_ready: float = math.inf
    half_ready: float = math.inf
    """When half of the expected were ready."""
    opened_at: float = -math.inf
    decided_at: float = -math.inf
    """When the last attempt was opened and decided, as this leader saw it."""
    paces: Paces = field(default_factory=Paces)
    turns: Turns = field(default_factory=Turns)
    rates: dict[bytes, float] = field(default_factory=dict)
    """Bytes per second, the lower one of up and down, of members that have said both."""
    callers: dict[bytes, None] = field(default_factory=dict)
    reports: Noted[bytes, StateReport] = field(default_factory=Noted)
    interval_s: float = 0.0
    last_commit: float = math.nan
    proposed_open: RoundKey | None = None
    agreed: Memo[list[bytes]] = field(default_factory=Memo)
    expected: Memo[tuple[list[bytes], int]] = field(default_factory=Memo)
    stand: Memo[list[StateReport]] = field(default_factory=Memo)
    fresh: tuple[object, ...] = ()
    """Of what (the ledger, its index, a round, changes of ``ready``) nothing is stale."""
    vetted: dict[bytes, m.Ready] = field(default_factory=dict)
    """Announcements that are not stale by that ledger, index and round."""

    def agreeing(self, present: list[bytes]) -> list[bytes]:
        """Present members whose contributions can be summed: the shape that most have."""
        found = self.agreed.of(
            (tuple(present), self.ready.changes), lambda: self._agreeing(present)
        )
        return list(found)

    def _agreeing(self, present: list[bytes]) -> list[bytes]:
        there = set(present)
        shapes: dict[tuple[int, str], list[bytes]] = {}
        for member in sorted(k for k in self.ready if k in there):
            said = self.ready[member]
            shapes.setdefault((said.values, said.codec), []).append(member)
        return max(shapes.values(), key=len, default=[])  # ties: that of the lowest member

    def standing(self, present: list[bytes]) -> list[StateReport]:
        """What present members have reported, in their order; not to be changed."""
        reports = self.reports
        asked = (tuple(present), reports.changes)
        return self.stand.of(asked, lambda: [reports[k] for k in present if k in reports])

    def fits(self, member: bytes) -> bool:
        """Whether what a member has announced can be summed with what most have."""
        mine = self.ready[member]
        if all(r.values == mine.values and r.codec == mine.codec for r in self.ready.values()):
            return True
        return member in self._agreeing(list(self.ready))

    def listed(self, opened: RoundOpened) -> list[m.Ready]:
        """Take out and return the announcements that an attempt was opened with."""
        said = []
        for item in opened.contributors:
            known = self.ready.get(item.member)
            if known is not None and known.root == item.root:
                said.append(self.ready.pop(item.member))
        return said

    def committed(self, now: float) -> None:
        """A round was committed: measure how far rounds are apart."""
        if not math.isnan(self.last_commit):
            gap = now - self.last_commit
            self.interval_s = 0.7 * (self.interval_s or gap) + 0.3 * gap
        self.last_commit = now


Newest = dict[tuple[str, PeerId], int]
"""By channel and member: the highest ``seen`` that it announced with since its link is up."""


class Lobbies:
    """All rooms of one leadership, which began at ``now``.

    Args:
        newest: outlives a leadership, since an announcement may come after the next one began.
    """

    def __init__(self, policy: RoundPolicy, now: float, newest: Newest | None = None) -> None:
        self.policy = policy
        self._newest: Newest = {} if newest is None else newest
        self.complete_at = now + REPORT_WAIT_S
        self.rooms: dict[str, Lobby] = {}
        self._generation = -1

    def room(self, channel: str) -> Lobby:
        """The room of a channel that the ledger knows."""
        return self.rooms.setdefault(channel, Lobby())

    # -- messages --------------------------------------------------------------------------

    def announced(self, now: float, ledger: Ledger, peer: PeerId, message: m.Ready) -> str:
        """Take in an announcement; returns a stable code if something is wrong with it.

        ``bad_shape`` of a group call: it waits, but cannot be summed with what others announced.
        """
        fault = self._refusal(ledger, peer, message)
        if fault:
            return fault
        if self._is_old(ledger, peer, message):
            return ""  # said by somebody who had not seen yet that it was listed
        if message.channel not in self.rooms:
            mine = sum(peer in lobby.ready for lobby in self.rooms.values())
            if mine >= limits.GROUPS_PER_MEMBER_MAX or not self._has_room(ledger):
                return "flood"
        self._newest[message.channel, peer] = message.seen
        lobby = self.room(message.channel)
        if not lobby.ready:
            lobby.first_ready = now
        if lobby.ready.get(peer) != message:  # most of it is said again and again
            lobby.ready[peer] = message
        lobby.callers[peer] = None
        lobby.paces.said(peer, message.phase_s)
        lobby.rates[peer] = min(
            (r for r in (message.up_bytes_per_s, message.down_bytes_per_s) if r > 0), default=0.0
        )
        return "" if lobby.fits(peer) else "bad_shape"

    def _is_old(self, ledger: Ledger, peer: PeerId, message: m.Ready) -> bool:
        """The log has listed its sender since, or another one of it has come that was said later.

        Either this very contribution is listed, or an older one that its maker has back. Roots say
        nothing: a member may well contribute equal values twice.
        """
        if message.seen < self._newest.get((message.channel, peer), 0):
            return True
        channel = ledger.channels.get(message.channel)
        index, _ = channel.listed.get(peer, (-1, b"")) if channel is not None else (-1, b"")
        return message.seen < index

    def _has_room(self, ledger: Ledger) -> bool:
        """Forget rooms that nobody waits in and the ledger does not know."""
        if len(self.rooms) >= 2 * limits.CHANNELS_MAX:
            for name in [n for n, r in self.rooms.items() if not r.ready]:
                if name not in ledger.channels:
                    del self.rooms[name]
                    for key in [k for k in self._newest if k[0] == name]:
                        del self._newest[key]
        return len(self.rooms) < 2 * limits.CHANNELS_MAX

    def _refusal(self, ledger: Ledger, peer: PeerId, message: m.Ready) -> str:
        if message.generation != ledger.generation:
            return "stale_generation"
        if peer not in ledger.members:
            return "not_a_member"
        if not 0 <= message.samples <= limits.SAMPLES_MAX:  # not a number fails it too
            return "bad_weight"
        if not 0 < message.values <= limits.VALUES_PER_CHANNEL_MAX:
            return "bad_shape"
        if message.codec not in CODEC_NAMES:
            return "bad_codec"
        channel = ledger.channels.get(message.channel)
        if message.channel.startswith("train/"):
            if channel is None:
                return "unknown_channel"
            if ledger.members[peer].role != "trainer":
                return "may_not_train"
            if message.values != channel.values:
                return "bad_shape"
            if message.codec != self.policy.scatter_codec:
                return "bad_codec"
            if message.base_round > channel.round:
                return "base_from_the_future"
        elif not message.channel.startswith("group/"):
            return "unknown_channel"
        return ledger.refusal(peer, message.channel, message.claims, message.samples)

    def withdrawn(self, peer: PeerId, message: m.Withdraw) -> None:
        lobby = self.rooms.get(message.channel)
        known = lobby.ready.get(peer) if lobby is not None else None
        if lobby is not None and known is not None and known.root == message.root:
            del lobby.ready[peer]

    def reported(self, ledger: Ledger, peer: PeerId, message: StateReport) -> None:
        """Where a member stands; only members and state channels of the ledger count."""
        channel = ledger.channels.get(message.channel)
        known = channel is not None and channel.holds_state
        known = known and peer in ledger.members and ledger.follows(peer, message.channel)
        if message.generation == ledger.generation and known:
            reports = self.room(message.channel).reports
            if reports.get(peer) != message:
                reports[peer] = message

    def disconnected(self, peer: PeerId) -> None:
        for lobby in self.rooms.values():
            lobby.ready.pop(peer, None)
            lobby.reports.pop(peer, None)

    # -- following the ledger --------------------------------------------------------------

    def reconcile(self, ledger: Ledger) -> None:
        """Drop what the ledger has made void."""
        if ledger.generation != self._generation:
            # What was announced in an older generation is with its trainers again.
            self._generation = ledger.generation
            for name, lobby in self.rooms.items():
                if name.startswith("train/"):
                    lobby.ready.clear()
                    lobby.reports.clear()
        for name, lobby in self.rooms.items():
            for member in [k for k in lobby.reports if not ledger.follows(k, name)]:
                del lobby.reports[member]
            if ledger.paused:
                lobby.proposed_open = None  # an opening behind the pause is ignored by everybody
            lobby.paces.keep(ledger.members)
            lobby.turns.keep(ledger.members)
            for table in (lobby.callers, lobby.rates):
                for member in [k for k in table if k not in ledger.members]:
                    del table[member]

    def drop_stale(self, ledger: Ledger, lobby: Lobby, number: int) -> None:
        """Forget announcements that the log has made too old, or whose data it has counted."""
        if lobby.fresh == (ledger, ledger.index, number, lobby.ready.changes):
            return
        if lobby.fresh[:3] != (ledger, ledger.index, number):
            lobby.vetted.clear()
        for member, ready in list(lobby.ready.items()):
            if lobby.vetted.get(member) is ready:
                continue
            void = number - ready.base_round > self.policy.max_base_age_rounds
            if ledger.refusal(member, ready.channel, ready.claims, ready.samples):
                void = True
            if ready.channel.startswith("train/") and void:
                del lobby.ready[member]  # the member returns it to its trainer by the same rule
            else:
                lobby.vetted[member] = ready
        lobby.fresh = (ledger, ledger.index, number, lobby.ready.changes)

    # -- whom to wait for ------------------------------------------------------------------

    def expected(
        self, now: float, ledger: Ledger, name: str, present: list[bytes]
    ) -> tuple[list[bytes], int]:
        """Whose contribution is worth waiting for, and how many are needed at least."""
        lobby = self.rooms[name]
        if name.startswith("group/"):
            wanted = max((r.expect for r in lobby.ready.values()), default=0)
            callers = [k for k in lobby.callers if k in present]
            if wanted:
                # Fewer once others have left: nobody waits for more members than there are.
                return callers, min(wanted, len(ledger.members))
            channel = ledger.channels.get(name)
            if channel is None:
                return present, len(present)  # the first round waits out the grace time
            past = {member for item in channel.history for member, _, _ in item.contributors}
            return [k for k in present if k in past or k in lobby.ready], 1
        number = ledger.channels[name].round
        early, reports = now < self.complete_at, lobby.reports.changes
        trainers, quorum = lobby.expected.of(
            (ledger, ledger.index, number, early, tuple(present), reports),
            lambda: self._trainers(now, ledger, name, number, present),
        )
        return list(trainers), quorum

    def _trainers(
        self, now: float, ledger: Ledger, name: str, number: int, present: list[bytes]
    ) -> tuple[list[bytes], int]:
        """See ``expected``, for a channel of the trainers."""
        lobby = self.rooms[name]
        trainers = [
            k
            for k in present
            if ledger.members[k].trains
            and ledger.follows(k, name)
            and self._at_work(now, lobby, k, number)
        ]
        return trainers, self._quorum(ledger, name, number)

    def _quorum(self, ledger: Ledger, name: str, number: int) -> int:
        first = self.policy.start_peers if number == 0 else 1
        quorum = max(self.policy.min_peers, first)
        if ledger.pipeline.stages:
            # Of a stage nobody else can contribute.
            quorum = min(quorum, max(1, sum(ledger.follows(k, name) for k in ledger.members)))
        return quorum

    def usable(self, ledger: Ledger, name: str, present: list[bytes]) -> list[bytes]:
        """Present members without the suspended, if others are enough for rounds of ``name``.

        A suspension is over after some committed rounds: there must be some.
        """
        if not ledger.suspended:
            return present
        others = sum(
            member.trains and ledger.follows(k, name) and not is_suspended(ledger, k)
            for k, member in ledger.members.items()
        )
        enough = others >= self._quorum(ledger, name, ledger.channels[name].round)
        return trusted(ledger, present) if enough else present

    def note_half(self, now: float, name: str, expected: list[bytes]) -> None:
        """Remember since when half of those who are worth waiting for are ready."""
        lobby = self.rooms[name]
        if sum(k in lobby.ready for k in expected) < half_of(len(expected)):
            lobby.half_ready = math.inf
        else:
            lobby.half_ready = min(lobby.half_ready, now)

    def half_ready(self) -> bool:
        """In some room half are ready, and the others are waited for."""
        return any(lobby.ready and lobby.half_ready < math.inf for lobby in self.rooms.values())

    def waited(
        self, now: float, ledger: Ledger, name: str, present: list[bytes]
    ) -> dict[bytes, None]:
        """Who is waited for, once half are ready; of a group's callers all are."""
        lobby = self.rooms[name]
        if not lobby.ready or lobby.half_ready == math.inf or name not in ledger.channels:
            return {}
        expected, _ = self.expected(now, ledger, name, present)
        return dict.fromkeys(k for k in expected if k not in lobby.ready)

    def grace_over_at(self, name: str, hidden: bool) -> float:
        """When fewer than expected will do: the faster half sets the pace, if one is known.

        Not before the others can be ready: members whose phases are as long, and begin at other
        times, would be left out in turns.
        """
        lobby = self.rooms[name]
        pace_s = lobby.paces.pace_s()
        if name.startswith("group/") or self.policy.grace_s or not pace_s:
            return lobby.first_ready + self.grace_s(name)
        grace_s = opening_grace_s(pace_s, hidden)
        others = lobby.opened_at if hidden else lobby.decided_at + grace_s
        return max(
            min(lobby.first_ready + patience_s(pace_s), lobby.half_ready + grace_s),
            others + pace_s,
        )

    def grace_s(self, name: str) -> float:
        """Seconds from the first announcement after which fewer than expected will do."""
        lobby = self.rooms[name]
        if name.startswith("group/"):
            expecting = any(r.expect for r in lobby.ready.values())
            return self.policy.expect_grace_s if expecting else self.policy.group_grace_s
        if self.policy.grace_s:
            return self.policy.grace_s
        return min(60.0, max(5.0, lobby.interval_s))

    def _at_work(self, now: float, lobby: Lobby, member: bytes, number: int) -> bool:
        report = lobby.reports.get(member)
        if report is None:
            return now < self.complete_at
        # Whoever was in step a round ago is applying the result at this moment.
        return report.ready and report.trains and number - 1 <= report.round <= number
