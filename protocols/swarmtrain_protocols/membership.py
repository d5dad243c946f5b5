"""Entering, staying, leaving; and what the leader does about members. Spec 05.

The leader turns join and leave requests into entries, notices members whose link stays broken,
keeps as many stewards as the run should have, and ends the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

from swarmtrain_protocols import entries as e
from swarmtrain_protocols import limits
from swarmtrain_protocols.access import Refusal, refusal
from swarmtrain_protocols.changes import changed_at, front
from swarmtrain_protocols.core import Connect, Effect, Emit, PeerId, Send
from swarmtrain_protocols.errors import NotAuthorised
from swarmtrain_protocols.ledger import Ledger
from swarmtrain_protocols.memo import Memo
from swarmtrain_protocols.messages import member as mm
from swarmtrain_protocols.node_events import JoinFailed
from swarmtrain_protocols.orders import EVICTED
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.stewards import choose
from swarmtrain_protocols.tickets import Capability

JOIN_RETRY_S = 1.0
LOST_AFTER_S = 30.0
LOST_PATIENCE_MAX = 4.0
ASKED_MAX = 8


@dataclass(frozen=True, slots=True)
class SiteConfig:
    """What this node tells others about itself."""

    name: str
    addresses: tuple[str, ...]
    trains: bool
    holds_state: bool
    votes: bool
    reachable: bool
    capability: bytes
    life: bytes = b""
    """Names this process among all that ever serve the site; empty: they are not told apart."""


class Joiner:
    """Asks for membership until the ledger shows it as wanted."""

    def __init__(self, me: PeerId, site: SiteConfig, ledger: Ledger, out: list[Effect]) -> None:
        self.ledger = ledger
        self.site = site
        self.leader: PeerId | None = None
        self.refused = ""
        self._me = me
        self._out = out
        self._next_try = 0.0
        self._leaving = ""
        self._at_once = False
        self._registered = -1
        self._hint: PeerId | None = None
        self._asked: list[PeerId] = []
        self._turn = 0
        self._satisfied: Memo[bool] = Memo()

    @property
    def is_member(self) -> bool:
        return self._me in self.ledger.members

    def satisfied(self) -> bool:
        """The ledger says about this node what it wants it to say."""
        asked = (self.ledger, self.ledger.index, self.site, self._leaving)
        return self._satisfied.of(asked, self._as_wanted)

    def _as_wanted(self) -> bool:
        known = self.ledger.members.get(self._me)
        if self._leaving:
            return known is None
        if known is not None and known.life == self.site.life:
            self._registered = known.joined_index
        return (
            known is not None
            and known.life == self.site.life
            and known.addresses == self.site.addresses
            and known.trains == self.site.trains
            and known.holds_state == self.site.holds_state
            and known.reachable == self.site.reachable
            and known.name == self.site.name
        )

    def leave(self, now: float, reason: str, at_once: bool = False) -> None:
        """Ask to be let go, again and again until the ledger no longer lists this node."""
        self._leaving, self._at_once = reason or "leave", at_once
        self._next_try = now

    @property
    def registered(self) -> bool:
        """The log has listed this very process."""
        return self.satisfied() or self._registered >= 0

    def replaced(self) -> bool:
        """Another process has registered with this identity after this one had."""
        known = self.ledger.members.get(self._me)
        return (
            known is not None
            and known.life != self.site.life
            and known.joined_index > self._registered >= 0
        )

    def turned_out(self, body: e.MemberLeft | e.MemberBanned) -> None:
        """Somebody is no member any more: by order it may be this site, which then asks no more.

        What befell an earlier process of this site is history, and may have been taken back since.
        """
        if body.member != self._me or self.refused or self._leaving or self._registered < 0:
            return
        banned = isinstance(body, e.MemberBanned)
        if banned or body.reason.startswith(EVICTED):
            self._refused("banned" if banned else EVICTED, body.reason)

    def _refused(self, code: str, reason: str) -> None:
        self.refused = code
        self._out.append(Emit(JoinFailed(code, reason)))

    def request(self) -> mm.JoinRequest:
        site = self.site
        return mm.JoinRequest(
            site.name,
            site.addresses,
            site.capability,
            site.trains,
            site.holds_state,
            site.votes,
            site.reachable,
            site.life,
        )

    def step(self, now: float, linked: Collection[PeerId]) -> None:
        """Send the request to the leader, or to anybody who may know it."""
        if self.satisfied() or self.refused or now < self._next_try:
            return
        if self.replaced():
            self._refused("duplicate", "another process has registered with this identity")
            return
        target = self.leader or self._hint
        if target is not None and target != self._me and target not in linked:
            self._out.append(Connect(target))
            target = None
        if target is None and linked:
            self._turn += 1  # whoever was asked last may know as little as this node
            target = list(linked)[self._turn % len(linked)]
        if self.leader == self._me:
            target = self._me
        self._next_try = now + JOIN_RETRY_S
        if target is None:
            return
        if target not in self._asked:
            self._asked = [*self._asked[1 - ASKED_MAX :], target]
        if self._leaving:
            self._out.append(Send(target, mm.LeaveRequest(self._leaving, self._at_once)))
        else:
            self._out.append(Send(target, self.request()))

    def leader_changed(self, now: float, leader: PeerId | None) -> None:
        """What the last leader was asked may be lost with it."""
        self.leader = leader
        self._next_try = min(self._next_try, now)

    def linked(self, now: float) -> None:
        """A new link: somebody to ask at once."""
        self._next_try = min(self._next_try, now)

    def asked(self, peer: PeerId) -> bool:
        """A recent request went to ``peer``, and what it asked for is not granted yet."""
        return peer in self._asked and not self.satisfied()

    def redirected(self, now: float, message: mm.Redirect) -> None:
        if self._hint is not None and len(message.leader) != 32:
            self._hint = None  # it does not know either; ask the others
        if len(message.leader) == 32 and message.leader != self._me:
            self._hint = PeerId(message.leader)
            self._out.append(Connect(self._hint, message.addresses))
            self._next_try = min(self._next_try, now + 0.1)

    def deadline(self) -> float:
        return math.inf if self.satisfied() or self.refused else self._next_try


def _beyond(role: str, request: mm.JoinRequest) -> Refusal | None:
    """What a ticket of this role does not let its bearer do."""
    if role != "trainer" and request.trains:
        return Refusal("role", f"the ticket is for the role {role}, which does not train")
    if role == "observer" and request.holds_state:
        return Refusal("role", "the ticket is for the role observer, which holds no state")
    return None


class Shepherd:
    """The leader's duties towards members. Active while this node leads the log."""

    def __init__(
        self,
        *,
        me: PeerId,
        ledger: Ledger,
        out: list[Effect],
        propose: Callable[[float, e.EntryBody], bool],
        change_voters: Callable[[float, tuple[PeerId, ...]], bool],
        check_capability: Callable[[float, bytes], Capability],
        linked: Callable[[], list[PeerId]],
        max_rounds: int,
        stewards: int = 0,
        patience: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.ledger = ledger
        self.active = False
        self._me = me
        self._out = out
        self._propose = propose
        self._change_voters = change_voters
        self._check = check_capability
        self._linked = linked
        self._max_rounds = max_rounds
        self._stewards = stewards
        self._patience = patience
        self._missing: dict[bytes, float] = {}
        self._leaving: dict[bytes, str] = {}
        self._ordered: dict[bytes, e.EntryBody] = {}
        self._finished: dict[bytes, None] = {}
        self._asked_index: dict[bytes, int] = {}
        self._asked_voters: tuple[PeerId, ...] = ()
        self._ending = False
        self._target: Memo[tuple[PeerId, ...]] = Memo()

    def activate(self, now: float, active: bool) -> None:
        self.active = active
        self._missing.clear()
        self._leaving.clear()
        self._ordered.clear()
        self._finished.clear()
        self._asked_index.clear()
        self._asked_voters = ()
        self._ending = False

    # -- requests -----------------------------------------------------------------------------

    def join(self, now: float, peer: PeerId, request: mm.JoinRequest) -> None:
        """Admit a bearer of a valid capability; a member that returns with it is updated."""
        genesis = peer == self.ledger.genesis_steward
        ticket, vote, uses, role = b"", genesis, 0, "trainer"
        if peer not in self.ledger.banned and (not genesis or request.capability):
            try:
                capability = self._check(now, request.capability)
            except NotAuthorised as error:
                if not genesis and peer not in self.ledger.members:
                    code = "expired" if "expired" in error.why else "not_authorised"
                    self._refuse(peer, code, error.why or error.what)
                    return
                vote, role = self.ledger.may_vote(peer), self._role(peer)
            else:
                ticket, vote = capability.id, genesis or capability.vote
                uses, role = capability.uses, capability.role
        no = refusal(self.ledger, peer, ticket, uses) or _beyond(role, request)
        if no is not None:
            self._refuse(peer, *no)
            return
        if peer not in self.ledger.members and len(self.ledger.members) >= limits.MEMBERS_MAX:
            self._refuse(peer, "full", f"the run has {limits.MEMBERS_MAX} members")
            return
        body = e.MemberJoined(
            peer,
            request.name,
            request.addresses,
            request.trains,
            request.holds_state,
            vote and request.votes and role != "observer",
            request.reachable,
            ticket,
            uses,
            role,
            request.life,
        )
        if peer in self._ordered:
            return  # on its way out
        self._leaving.pop(peer, None)
        self._finished.pop(peer, None)
        if self._is_known(body):
            return  # the request was sent again before the log's answer arrived
        if self._asked_index.get(peer) != self.ledger.index:
            self._propose(now, body)
            self._asked_index[peer] = self.ledger.index

    def _role(self, peer: PeerId) -> str:
        known = self.ledger.members.get(peer)
        return known.role if known is not None else "trainer"

    def _is_known(self, body: e.MemberJoined) -> bool:
        known = self.ledger.members.get(body.member)
        return known is not None and (
            (known.name, known.addresses, known.trains, known.holds_state, known.reachable)
            == (body.name, body.addresses, body.trains, body.holds_state, body.reachable)
            and known.life == body.life
            and (known.may_vote or not body.may_vote)
        )

    def _refuse(self, peer: PeerId, code: str, reason: str) -> None:
        self._out.append(Send(peer, mm.JoinRefused(code, reason[:256])))
        fields: dict[str, object] = {"peer": peer.hex(), "reason": f"{code}: {reason}"}
        self._out.append(Emit(fx.Notice("join_refused", fields)))

    def leave(self, now: float, peer: PeerId, reason: str, at_once: bool = False) -> None:
        """A member asks to be let go: after what counts on it, or at once."""
        self._leaving[peer] = reason or "leave"
        if at_once and peer not in self.ledger.voters:
            self._propose(now, e.MemberLeft(peer, self._leaving.pop(peer)))
        self.step(now)

    def turn_out(self, now: float, order: e.MemberLeft | e.MemberBanned) -> None:
        """The founder wants a steward out: others take its vote first."""
        self._leaving[order.member] = order.reason
        self._ordered[order.member] = order
        self.step(now)

    def finished(self, now: float, peer: PeerId, done: bool) -> None:
        if done:
            self._finished[peer] = None
        else:
            self._finished.pop(peer, None)
        self.step(now)

    # -- duties -------------------------------------------------------------------------------

    def step(self, now: float) -> None:
        if not self.active:
            return
        linked = self._linked()
        self._watch(now, linked)
        self._let_go(now)
        self._fit_voters(now, linked)
        self._maybe_end(now, linked)

    def _watch(self, now: float, linked: list[PeerId]) -> None:
        for key in list(self._missing):
            if key not in self.ledger.members:
                del self._missing[key]
        for key in [k for k in self._finished if k not in self.ledger.members]:
            del self._finished[key]
        for key in [k for k, at in self._asked_index.items() if at != self.ledger.index]:
            del self._asked_index[key]  # never asked again at an index that is past
        there = {*linked, self._me}
        if not self._missing and there.issuperset(self.ledger.members):
            return
        for member in self.ledger.ordered_members():
            if member.id in there:
                self._missing.pop(member.id, None)
                continue
            if member.id not in self._missing:
                self._out.append(Connect(PeerId(member.id)))  # it may be unable to dial this node
            since = self._missing.setdefault(member.id, now)
            if now >= since + self._lost_after_s():
                self._missing[member.id] = now
                self._propose(now, e.MemberLeft(member.id, "lost"))

    def _let_go(self, now: float) -> None:
        """Log a leave once no open attempt counts on the member and it votes no more."""
        for peer in list(self._leaving):
            if peer not in self.ledger.members:
                del self._leaving[peer]
                continue
            if self._busy(peer) or (peer in self.ledger.voters and len(self.ledger.members) > 1):
                continue
            body = self._ordered.get(peer) or e.MemberLeft(peer, self._leaving[peer])
            if self._propose(now, body):
                del self._leaving[peer]
                self._ordered.pop(peer, None)

    def _busy(self, peer: bytes) -> bool:
        """An open attempt counts on this member: its contribution, its parts or its state."""
        for channel in self.ledger.channels.values():
            opened = channel.open
            if opened is None:
                continue
            people = [c.member for c in opened.contributors] + list(opened.holders)
            people += [k for part in opened.parts for k in (part.owner, part.deputy)]
            if peer in people:
                return True
        return False

    def _fit_voters(self, now: float, linked: list[PeerId]) -> None:
        """Aim for the best steward set there is, see ``stewards``."""
        if self.ledger.joint:
            return
        ledger, leaving = self.ledger, list(self._leaving)

        def chosen() -> tuple[PeerId, ...]:
            asked = self._stewards
            return choose(ledger, me=self._me, linked=linked, leaving=leaving, asked=asked)

        target = self._target.of((ledger, ledger.index, tuple(linked), leaving), chosen)
        if not target or target == tuple(sorted(self.ledger.voters)):
            self._asked_voters = ()
            return
        if target != self._asked_voters and self._change_voters(now, target):
            self._asked_voters = target

    def _maybe_end(self, now: float, linked: list[PeerId]) -> None:
        if self.ledger.ended or self._ending:
            return
        train = self.ledger.train_channels()
        if not train or any(c.open is not None for c in train):
            return
        changed = changed_at(self.ledger, front(self.ledger))
        planned = changed.get("max_rounds", self._max_rounds)
        if planned and all(c.round >= planned for c in train):
            self._end(now, "max_rounds")
            return
        if not self._finished:
            return
        here = {*linked, self._me}
        trainers = [m.id for m in self.ledger.ordered_members() if m.trains and m.id in here]
        if trainers and all(t in self._finished for t in trainers):
            self._end(now, "all trainers finished")

    def _end(self, now: float, reason: str) -> None:
        self._ending = self._propose(now, e.RunEnded(reason))

    def deadline(self) -> float:
        if not self.active:
            return math.inf
        patience_s = self._lost_after_s()
        return min((since + patience_s for since in self._missing.values()), default=math.inf)

    def _lost_after_s(self) -> float:
        """How long a member may be without a link: longer where delays were measured as long."""
        return LOST_AFTER_S * min(max(self._patience(), 1.0), LOST_PATIENCE_MAX)
