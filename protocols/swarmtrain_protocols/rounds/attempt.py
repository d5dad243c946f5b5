"""What one member does in one attempt: fetch parts it owns, compute them, collect all results.

Spec 08. The attempt knows roots and indices; values stay in the data plane.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import msgspec

from swarmtrain_protocols import limits
from swarmtrain_protocols.channels import Outcome
from swarmtrain_protocols.core import Connect, Effect, Emit, PeerId, Send
from swarmtrain_protocols.entries import RoundOpened, RoundSet
from swarmtrain_protocols.identity import Keyring
from swarmtrain_protocols.messages import rounds as m
from swarmtrain_protocols.messages.common import RoundKey
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.fetches import Fetches

PART_DOMAIN = b"part"
RETRY_FIRST_S = 0.05
RETRY_MAX_S = 2.0
ASK_FIRST_S = 1.0
ASK_DOUBLED_MAX = 3
ASK_OWNERS_MAX = 8
ASK_OTHERS = 2
"""Receivers that are asked besides the owners: an owner may have died after it had told others."""


def part_statement(run: bytes, key: RoundKey, part: int, root: bytes) -> bytes:
    """The bytes that an owner signs for a part's result."""
    return run + msgspec.msgpack.encode((key, part, root))


@dataclass(slots=True)
class _Wanted:
    """One thing to fetch, with its sources in order and the time of the next try."""

    purpose: fx.ContributionPart | fx.ResultPart
    sources: list[PeerId]
    tries: int = 0
    next_try: float = 0.0
    ticket: int | None = None


@dataclass(slots=True)
class Attempt:
    """Member-side state of one attempt."""

    key: RoundKey
    opened: RoundOpened
    me: PeerId
    run: bytes
    keyring: Keyring
    rng: random.Random
    fetches: Fetches
    out: list[Effect]
    weighs: bool = False
    """What this node sums is measured first (15)."""
    own_lost: bool = False
    """This node is listed with a contribution of an earlier life, whose bytes died with it."""
    chosen: RoundSet | None = None
    assigned: list[int] = field(default_factory=list)
    have: dict[int, list[int]] = field(default_factory=dict)
    squares: dict[tuple[int, int], float] = field(default_factory=dict)
    """By part and contributor, where it was measured."""
    reducing: list[int] = field(default_factory=list)
    in_place: dict[int, bytes] = field(default_factory=dict)
    results: dict[int, m.PartResult] = field(default_factory=dict)
    deputies: dict[int, PeerId] = field(default_factory=dict)
    wanted: list[_Wanted] = field(default_factory=list)
    store_asked: bool = False
    stored_root: bytes | None = None
    durable: bool = False
    square_norm: float = 0.0
    refused: list[int] = field(default_factory=list)
    held_changed: list[int] = field(default_factory=list)
    ask_at: float = math.inf
    """When to ask for results that nobody has announced here."""
    asked: int = 0
    spoiled: dict[int, None] = field(default_factory=dict)
    """Parts of which a signed result is not legal."""
    complains: bool = False
    again_at: float = math.inf
    """When to say again what is here: the attempt should be decided by then."""

    # -- opening ---------------------------------------------------------------------------

    @property
    def own_index(self) -> int | None:
        for index, item in enumerate(self.opened.contributors):
            if item.member == self.me:
                return index
        return None

    def receivers(self) -> list[PeerId]:
        """Everybody who needs the result: contributors and state holders, in member order."""
        people = {c.member for c in self.opened.contributors} | set(self.opened.holders)
        return [PeerId(p) for p in sorted(people)]

    @property
    def tells(self) -> bool:
        """The leader needs the word of this node: of parts, of the result or of what it lost."""
        return bool(self.assigned) or self.stored_root is not None or self.own_lost

    def begin(self, now: float) -> None:
        """The attempt was opened: connect to owners, fetch what this node has to sum."""
        self.out.append(fx.BeginAttempt(self.opened))
        owners = {p.owner for p in self.opened.parts} | {p.deputy for p in self.opened.parts}
        for owner in sorted(owners):
            if owner != self.me:
                self.out.append(Connect(PeerId(owner)))
        for index, part in enumerate(self.opened.parts):
            if part.owner == self.me:
                self.assign(now, index)

    def assign(self, now: float, part: int) -> None:
        """This node computes ``part``, as owner or as deputy."""
        if part in self.assigned:
            return
        self.assigned.append(part)
        self.have[part] = []
        for index, item in enumerate(self.opened.contributors):
            if item.member == self.me:
                if not self.own_lost:
                    self._arrived(part, index)
            else:
                purpose = fx.ContributionPart(self.key, part, index)
                self.wanted.append(_Wanted(purpose, [PeerId(item.member)]))
        self.held_changed.append(part)
        self.step(now)

    def _arrived(self, part: int, index: int) -> None:
        """The bytes of a contribution are here: it is held once it is measured."""
        if self.weighs:
            self.out.append(fx.MeasurePart(self.key, part, index))
            return
        self.have[part].append(index)
        self.held_changed.append(part)

    def measured(self, now: float, part: int, index: int, square: float) -> None:
        """The sum of the squares of a contribution's part, from the data plane."""
        if index in self.have[part]:
            return
        if not 0.0 <= square < math.inf:  # the own one: what others send was checked before
            self.refused.append(index)
        else:
            self.squares[part, index] = square
            self.have[part].append(index)
        self.held_changed.append(part)
        self.step(now)

    def take_over(self, now: float, part: int, deputy: PeerId) -> None:
        """The leader says that ``deputy`` computes ``part`` from now on."""
        if part >= len(self.opened.parts):
            return
        self.deputies[part] = deputy
        if deputy == self.me:
            self.held_changed.append(part)  # said again: this may be another leader
            self.assign(now, part)
        else:
            self.out.append(Connect(deputy))
            if part not in self.in_place:
                # Its result may have been here before this message, and was not believed.
                self.out.append(Send(deputy, m.RoundQuery(self.key)))

    def choose(self, now: float, chosen: RoundSet) -> None:
        """The set is logged: parts whose members are all here are summed."""
        self.chosen = chosen
        self.ask_at = now + ASK_FIRST_S
        self.step(now)

    # -- progress --------------------------------------------------------------------------

    def step(self, now: float) -> None:
        """Start whatever can start now."""
        for want in self.wanted:
            if want.ticket is None and want.next_try <= now:
                self._fetch(now, want)
        if self.chosen is not None:
            needed = [c.index for c in self.chosen.coefficients]
            for part in self.assigned:
                if part in self.reducing or part in self.in_place:
                    continue
                if all(index in self.have[part] for index in needed):
                    self.reducing.append(part)
                    self.out.append(fx.ReducePart(self.key, part, self.chosen))
        if len(self.in_place) == len(self.opened.parts) and not self.store_asked:
            self.store_asked = True
            self.ask_at = math.inf
            self.out.append(fx.StoreResult(self.key))
        if self.ask_at <= now:
            self.asked += 1
            self.complains = True
            self.ask_at = now + ASK_FIRST_S * 2 ** min(self.asked, ASK_DOUBLED_MAX)
            self._ask()

    def deadline(self) -> float:
        fetches = min((w.next_try for w in self.wanted if w.ticket is None), default=math.inf)
        return min(fetches, self.ask_at)

    def _ask(self) -> None:
        """What owners announced may have been lost, or said before this node was (back) here."""
        coming = {w.purpose.part for w in self.wanted if isinstance(w.purpose, fx.ResultPart)}
        silent = [
            self.deputies.get(index, PeerId(part.owner))
            for index, part in enumerate(self.opened.parts)
            if index not in self.in_place and index not in self.reducing and index not in coming
        ]
        if not silent:
            return
        others = [p for p in self.receivers() if p != self.me]
        some = self.rng.sample(others, min(len(others), ASK_OTHERS))
        people = list(dict.fromkeys(p for p in silent if p != self.me))[:ASK_OWNERS_MAX]
        for peer in dict.fromkeys([*people, *some]):
            self.out.append(Send(peer, m.RoundQuery(self.key)))

    def _fetch(self, now: float, want: _Wanted) -> None:
        peer = want.sources[want.tries % len(want.sources)]
        purpose = want.purpose
        part = self.opened.parts[purpose.part]
        if isinstance(purpose, fx.ContributionPart):
            root, first = self.opened.contributors[purpose.index].root, part.first
        else:
            root, first = self.results[purpose.part].root, 0

        def done(at: float, reason: str | None) -> None:
            self._fetched(at, want, peer, reason)

        start, elsewhere = self.fetches.start, isinstance(purpose, fx.ResultPart)
        want.ticket = start(now, peer, root, first, part.count, purpose, done, None, elsewhere)

    def _fetched(self, now: float, want: _Wanted, peer: PeerId, reason: str | None) -> None:
        want.ticket = None
        if reason is None:
            self.wanted.remove(want)
            purpose = want.purpose
            if isinstance(purpose, fx.ContributionPart):
                self._arrived(purpose.part, purpose.index)
            else:
                self.in_place[purpose.part] = self.results[purpose.part].root
            self.step(now)
            return
        if reason == "corrupt":
            self.out.append(
                Emit(fx.Notice("peer_fault", {"peer": peer.hex(), "fault": "corrupt_chunk"}))
            )
        if reason == "no_room" and isinstance(want.purpose, fx.ContributionPart):
            # Longer than this node has memory for: the set is made without it, nobody is blamed.
            self.wanted.remove(want)
            self.refused.append(want.purpose.index)
            self.held_changed.append(want.purpose.part)
            fields: dict[str, object] = {"peer": peer.hex(), "reason": "no_room"}
            self.out.append(Emit(fx.Notice("message_ignored", fields)))
            return
        if reason == "invalid" and isinstance(want.purpose, fx.ContributionPart):
            # The bytes are what was announced, and not a valid contribution: nobody can use them.
            self.wanted.remove(want)
            self.refused.append(want.purpose.index)
            self.held_changed.append(want.purpose.part)
            self._fault(peer, "invalid_contribution")
            return
        if reason == "invalid":
            # Signed, and not a legal result: whoever sent it, it is what the owner computed.
            self.wanted.remove(want)
            owner = self.results[want.purpose.part].owner
            self._fault(PeerId(owner), "invalid_result")
            self.spoiled[want.purpose.part] = None
            self.complains = True
            return
        want.tries += 1
        backoff = min(RETRY_MAX_S, RETRY_FIRST_S * 2 ** min(want.tries, 8))
        want.next_try = now + backoff * (0.5 + self.rng.random() / 2)
        if isinstance(want.purpose, fx.ResultPart):
            # Somebody else may have this part: ask around, answers add sources.
            for other in self.receivers():
                if other not in (self.me, peer):
                    self.out.append(Send(other, m.RoundQuery(self.key)))

    # -- results ---------------------------------------------------------------------------

    def reduced(self, now: float, part: int, root: bytes) -> None:
        """The data plane computed ``part``: sign it and tell everybody who needs it."""
        known = self.in_place.get(part)
        if known == root:
            return  # a fetched copy was faster
        if known is not None:
            # What was fetched is not what this node has computed: one of us is wrong. This node
            # stands by its own; the log decides.
            self._conflict(self.results[part])
        statement = part_statement(self.run, self.key, part, root)
        signature = self.keyring.sign(PART_DOMAIN, statement)
        result = m.PartResult(self.key, part, root, self.me, signature)
        self.in_place[part] = root
        self.results[part] = result
        self._forget_result_fetch(part)
        for peer in self.receivers():
            if peer != self.me:
                self.out.append(Send(peer, result))
        self.step(now)

    def part_result(self, now: float, sender: PeerId, result: m.PartResult) -> None:
        """A signed result is announced or relayed by ``sender``."""
        if result.part >= len(self.opened.parts):
            self._fault(sender, "bad_part")
            return
        part = self.opened.parts[result.part]
        allowed = (part.owner, part.deputy, self.deputies.get(result.part, part.owner))
        statement = part_statement(self.run, self.key, result.part, result.root)
        if not self.keyring.verify(result.owner, PART_DOMAIN, statement, result.signature):
            self._fault(sender, "bad_signature")
            return
        if result.owner not in allowed:
            return  # a deputy that was faster than the leader's word; it is asked again then
        known = self.results.get(result.part)
        if known is None:
            self.results[result.part] = result
        elif known.root != result.root:
            self._conflict(result)
            return
        if result.part in self.in_place:
            return
        self._want_result(now, result.part, sender, PeerId(result.owner))

    def _want_result(self, now: float, part: int, sender: PeerId, owner: PeerId) -> None:
        for want in self.wanted:
            if isinstance(want.purpose, fx.ResultPart) and want.purpose.part == part:
                if sender not in want.sources:
                    want.sources.append(sender)
                    want.next_try = now
                self.step(now)
                return
        # After a restart the owner may be this very node, which has forgotten what it computed.
        sources = [p for p in dict.fromkeys((sender, owner)) if p != self.me]
        self.wanted.append(_Wanted(fx.ResultPart(self.key, part), sources))
        self.step(now)

    def hopeful(self) -> bool:
        """A missing result is being computed, fetched or stored here."""
        computing = any(part not in self.in_place for part in self.reducing)
        fetching = any(isinstance(w.purpose, fx.ResultPart) for w in self.wanted)
        return self.store_asked or computing or fetching

    def _conflict(self, other: m.PartResult) -> None:
        """Two signed roots for one part: a lie by one owner, or a broken kernel somewhere."""
        fields: dict[str, object] = {
            "peer": other.owner.hex(),
            "fault": "conflicting_results",
            "key": str(self.key),
        }
        self.out.append(Emit(fx.Notice("peer_fault", fields)))

    def _forget_result_fetch(self, part: int) -> None:
        for want in list(self.wanted):
            if isinstance(want.purpose, fx.ResultPart) and want.purpose.part == part:
                self.wanted.remove(want)
                if want.ticket is not None:
                    self.fetches.cancel(want.ticket)

    def ask_again(self, peer: PeerId) -> None:
        """``peer`` is back: its results may have been announced while it was away."""
        if self.chosen is None:
            return
        for index, part in enumerate(self.opened.parts):
            current = self.deputies.get(index, part.owner)
            if index not in self.in_place and peer in (part.owner, part.deputy, current):
                self.out.append(Send(peer, m.RoundQuery(self.key)))
                return

    def answer_query(self, peer: PeerId) -> None:
        """Relay what is in place here to whoever asks."""
        for part in sorted(self.in_place):
            if part in self.results:
                self.out.append(Send(peer, self.results[part]))

    def _fault(self, peer: PeerId, code: str) -> None:
        self.out.append(Emit(fx.Notice("peer_fault", {"peer": peer.hex(), "fault": code})))

    # -- reports ---------------------------------------------------------------------------

    def reports(self, leader: PeerId, everything: bool) -> None:
        """Tell the leader what changed, or all there is after a change of leader."""
        parts = list(self.assigned) if everything else sorted(set(self.held_changed))
        self.held_changed.clear()
        waits = self.complains or (everything and self.spoiled)
        self.complains = False
        if waits and self.me in self.receivers():  # other owners need no results
            lacks = (i for i in range(len(self.opened.parts)) if i not in self.in_place)
            bad = [self.results[i] for i in sorted(self.spoiled) if i in self.results]
            told = tuple(bad[: limits.SPOILED_TOLD_MAX])
            self.out.append(Send(leader, m.Complaint(self.key, tuple(lacks), told)))
        for part in parts:
            refused = tuple(sorted(set(self.refused)))
            here = tuple(sorted(self.have[part]))
            squares = tuple(self.squares[part, i] for i in here) if self.weighs else ()
            self.out.append(Send(leader, m.PartsHeld(self.key, part, here, refused, squares)))
        own = self.own_index
        if everything and self.own_lost and own is not None:
            root = self.opened.contributors[own].root
            self.out.append(Send(leader, m.Withdraw(self.key.generation, self.key.channel, root)))
        if everything and self.stored_root is not None:
            holding = m.Holding(self.key, self.stored_root, self.durable, self.square_norm)
            self.out.append(Send(leader, holding))

    def cancel(self) -> None:
        """The attempt is over: no fetch goes on."""
        for want in self.wanted:
            if want.ticket is not None:
                self.fetches.cancel(want.ticket)
        self.wanted.clear()


@dataclass(slots=True)
class Closing:
    """A committed attempt whose bytes are not all here yet."""

    attempt: Attempt
    outcome: Outcome
    deadline: float
    next_query: float
