"""Who leads: Raft elections with pre-vote, leader stickiness and hand-over (Ongaro 2014, §3, §9.6).

A vote is durable before it is told. Votes are asked of, and counted over, the newest steward set
that the candidate holds; they are given by anybody who trusts the candidate's key, because a site
may have been made a voter by an entry that it has not received yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from swarmtrain_protocols.core import PeerId
from swarmtrain_protocols.log.state import CANDIDATE, FOLLOWER, LEADER, LogState
from swarmtrain_protocols.messages.log import HandOver, VoteReply, VoteRequest

_SUSPICION = 0.25
"""Part of an election timeout to wait at most when the link to the leader broke."""


class Election:
    """Election timer, votes given and votes received."""

    def __init__(self, state: LogState, won: Callable[[], None], lost: Callable[[], None]) -> None:
        self._s = state
        self._won = won
        self._lost = lost
        self._votes: dict[PeerId, bool] = {}
        self._pre = False
        self.at = math.inf
        self.rest()

    # --- time ------------------------------------------------------------------------------------

    def rest(self) -> None:
        """Start the timer again."""
        e = self._s.timeouts.election_s
        self.at = self._s.now + e + self._s.rng.random() * e

    def heard_leader(self) -> None:
        self._s.leader_heard_at = self._s.now
        self.rest()

    def suspect(self) -> None:
        """The link to the leader broke: that is news, where silence is only patience."""
        s = self._s
        s.leader_heard_at = -math.inf
        self.at = min(self.at, s.now + s.rng.random() * _SUSPICION * s.timeouts.election_s)

    def deadline(self) -> float:
        s = self._s
        return self.at if s.role != LEADER and s.votes else math.inf

    def tick(self) -> None:
        s = self._s
        if s.now >= self.deadline():
            self.campaign(pre=not s.alone)

    # --- asking ----------------------------------------------------------------------------------

    def campaign(self, *, pre: bool, forced: bool = False) -> None:
        """Ask the stewards for their votes; with ``pre`` only whether they would give them."""
        s = self._s
        view = s.log.view
        assert view is not None and s.votes and s.role != LEADER
        self._pre = pre
        self._votes = {s.me: True}
        s.role = CANDIDATE
        self.rest()
        if not pre:
            s.adopt_term(s.term + 1, s.me)
        s.set_leader(None, s.term)
        last = s.log.last
        request = VoteRequest(
            generation=view.generation,
            term=s.term + 1 if pre else s.term,
            pre=pre,
            forced=forced,
            last_index=last.index,
            last_term=last.term,
        )
        for peer in view.everyone():
            if peer != s.me:
                s.send(peer, request)
        self._count(forced)

    def on_reply(self, peer: PeerId, reply: VoteReply) -> None:
        s = self._s
        if not s.trusts(peer):
            return
        if reply.term > s.term and not (reply.pre and reply.granted):
            self._lost()
            s.adopt_term(reply.term)
            return
        asked = s.term + 1 if self._pre else s.term
        if s.role == CANDIDATE and reply.pre == self._pre and reply.granted and reply.term == asked:
            self._votes[peer] = True
            self._count(forced=False)

    def _count(self, forced: bool) -> None:
        view = self._s.log.view
        assert view is not None
        if not view.quorum(lambda peer: self._votes.get(PeerId(peer), False)):
            return
        if self._pre:
            self.campaign(pre=False, forced=forced)
        else:
            self._won()

    # --- answering -------------------------------------------------------------------------------

    def on_request(self, peer: PeerId, request: VoteRequest) -> None:
        s = self._s
        if not s.trusts(peer):
            return  # perhaps this site is behind; it catches up as a subscriber
        granted = self._would_grant(peer, request)
        if granted and not request.pre:
            if request.term > s.term:
                self._lost()
            if request.term > s.term or s.voted_for != peer:
                s.adopt_term(request.term, peer)
            self.rest()
        term = request.term if granted else s.term
        s.send(peer, VoteReply(s.log.generation, term, request.pre, granted))

    def _would_grant(self, peer: PeerId, request: VoteRequest) -> bool:
        """Raft's rule, and nobody is unseated while this site hears from a leader."""
        s = self._s
        last = s.log.last
        if request.generation < s.generation:
            return False
        if (request.last_term, request.last_index) < (last.term, last.index):
            return False
        if request.term < s.term or (request.pre and request.term == s.term):
            return False
        if request.term == s.term and s.voted_for not in (b"", peer):
            return False
        if request.forced:
            return True
        return s.role != LEADER and s.now >= s.leader_heard_at + s.timeouts.election_s

    def on_hand_over(self, peer: PeerId, message: HandOver) -> None:
        s = self._s
        if message.term == s.term and peer == s.leader and s.votes and s.role == FOLLOWER:
            self.campaign(pre=False, forced=True)
