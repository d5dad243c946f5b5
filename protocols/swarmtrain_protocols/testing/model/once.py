"""A contribution counts once (08 §2.2 rule 1, §2.3, §2.8 rule 5), however late it is announced.

Members make contributions one after the other, announce them to whoever leads, and have each back
as counted or not. The bytes are left out: an open attempt is committed with any part of what it
lists, or aborted. Announcements stay in a link for as long as it is up, and arrive late, twice, out
of order or never. The log is one sequence; leadership moves between two sites that both remember
what they were told, as processes do that lose an election and win the next one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from swarmtrain_protocols.testing.model.explore import Step

OPENED, COMMITTED, ABORTED = 1, 2, 3
NAMES = ("", "opened", "committed", "aborted")
WAITS, RETURNED, COUNTED = 0, 1, 2
WORDS = ("waits", "returned", "counted")
(N, LEAD, BREAKS, CRASHES, BAD, HEAD) = range(6)
APPLIED, MADE, BOUND, CARDS = range(4)
"""Places within a member: entries applied, contributions made, whether the newest is listed; then
for each contribution its base round and what its maker was told."""
SITES = 2

MESSAGES = (
    "",
    "a contribution is counted twice",
    "a contribution is counted that its maker has back",
    "a maker is told that a contribution counts which does not",
)

GUARDS = {
    "seen": "an announcement counts for nothing if its maker had not seen its newest listing",
    "any": "that goes for any contribution of the maker, not only for the listed one",
    "newest": "one that comes after a newer one of its maker counts for nothing",
    "taken out": "what an attempt lists no longer waits",
    "undecided": "a member keeps a listed contribution until the log decides",
    "age": "the leader takes nothing that is too old, by the rule by which members take it back",
}
"""What the specification demands; each can be taken away, and the checker must notice."""


@dataclass(frozen=True)
class Config:
    """``cards``: contributions of each member; ``attempts``: how many are opened."""

    name: str
    members: int = 2
    cards: int = 2
    attempts: int = 3
    breaks: int = 1
    crashes: int = 0
    age: int = 1
    without: tuple[str, ...] = ()


class Once:
    """Satisfies ``explore.Model``."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.people = range(config.members)
        self.sites = range(SITES)
        self.size = CARDS + 2 * config.cards
        self.first = [HEAD + m * self.size for m in self.people]
        self.waiting = HEAD + config.members * self.size
        """Per site and member: the contribution that waits there, and the newest ``seen`` + 1."""
        self.room = 2 * config.attempts
        self.spoken = self.waiting + 2 * SITES * config.members
        """Per site, member and contribution: with which ``seen`` it was announced, as bits."""
        self.log = self.spoken + 2 * SITES * config.members * config.cards
        self.width = 1 + config.members
        """Of an entry: its kind, and per member the contribution (0: none)."""
        self.without = dict.fromkeys(config.without)

    # -- explore.Model ---------------------------------------------------------------------------

    def begin(self) -> bytes:
        state = bytearray(self.log + self.room * self.width)
        state[BREAKS], state[CRASHES] = self.config.breaks, self.config.crashes
        return bytes(state)

    def steps(self, state: bytes) -> Iterator[Step]:
        for m in self.people:
            yield from self._member(state, m)
            yield from self._trouble(state, m)
        yield from self._arrivals(state)
        yield from self._decide(state)
        other = bytearray(state)
        other[LEAD] = 1 - state[LEAD]
        for m in self.people:  # a new leadership begins with nothing that waits
            other[self._at_site(other[LEAD], m)] = 0
        yield f"elect {other[LEAD]}", True, bytes(other)

    def broken(self, state: bytes) -> str:
        return MESSAGES[state[BAD]]

    def settled(self, state: bytes) -> bool:
        """Every contribution that was made has one outcome, or the attempts are used up."""
        if state[N] == self.room:
            return True
        return all(
            state[at + APPLIED] == state[N] and (not made or state[at + CARDS + 2 * made - 1])
            for at in self.first
            for made in [state[at + MADE]]
        )

    def show(self, state: bytes) -> str:
        log = []
        for i in range(state[N]):
            kind, *cards = self._entry(state, i)
            log.append(f"{NAMES[kind]}({','.join(map(str, cards))})")
        people = []
        for m in self.people:
            at = self.first[m]
            made = state[at + MADE]
            told = WORDS[state[at + CARDS + 2 * made - 1]] if made else "-"
            people.append(f"{m} at {state[at + APPLIED]}, contribution {made} {told}")
        rooms = [[state[self._at_site(x, m)] for m in self.people] for x in self.sites]
        return f"leader {state[LEAD]} log [{' '.join(log)}]; {'; '.join(people)}; waiting {rooms}"

    # -- the log ---------------------------------------------------------------------------------

    def _entry(self, state: bytes | bytearray, index: int) -> bytes:
        at = self.log + index * self.width
        return bytes(state[at : at + self.width])

    def _open(self, state: bytes | bytearray, count: int) -> bytes:
        """The entry that has opened an attempt which the first ``count`` entries leave open."""
        last = self._entry(state, count - 1) if count else b"\0"
        return last if last[0] == OPENED else b""

    def _round(self, state: bytes | bytearray, count: int) -> int:
        return sum(self._entry(state, i)[0] == COMMITTED for i in range(count))

    def _listed(self, state: bytes, m: int) -> tuple[int, int]:
        """(index, contribution) of the newest entry that lists the member."""
        for i in range(state[N] - 1, -1, -1):
            entry = self._entry(state, i)
            if entry[0] == OPENED and entry[1 + m]:
                return i, entry[1 + m]
        return -1, 0

    def _log(self, state: bytes, kind: int, cards: bytes) -> bytes:
        after = bytearray(state)
        at = self.log + state[N] * self.width
        after[at : at + self.width] = bytes([kind]) + cards
        after[N] += 1
        for m in self.people:
            place = self._at_site(state[LEAD], m)
            if kind == OPENED and after[place] == cards[m] and "taken out" not in self.without:
                after[place] = 0
            if kind == COMMITTED and cards[m]:
                told = state[self.first[m] + CARDS + 2 * cards[m] - 1]
                before = [self._entry(state, i) for i in range(state[N])]
                if any(e[0] == COMMITTED and e[1 + m] == cards[m] for e in before):
                    after[BAD] = 1
                elif told == RETURNED:
                    after[BAD] = 2
        return bytes(after)

    # -- the leader ------------------------------------------------------------------------------

    def _at_site(self, site: int, m: int) -> int:
        return self.waiting + 2 * (site * self.config.members + m)

    def _words(self, site: int, m: int, card: int) -> int:
        where = (site * self.config.members + m) * self.config.cards + card - 1
        return self.spoken + 2 * where

    def _decide(self, state: bytes) -> Iterator[Step]:
        opened = self._open(state, state[N])
        if opened:
            yield "abort", False, self._log(state, ABORTED, bytes(self.config.members))
            for kept in self._subsets(opened[1:]):
                yield f"commit {list(kept)}", False, self._log(state, COMMITTED, kept)
        elif state[N] < self.room:
            number, waits = self._round(state, state[N]), bytearray()
            for m in self.people:
                card = state[self._at_site(state[LEAD], m)]
                base = state[self.first[m] + CARDS + 2 * card - 2] if card else 0
                old = number - base > self.config.age and "age" not in self.without
                waits.append(0 if old else card)
            for listed in self._subsets(bytes(waits)):
                yield f"open {list(listed)}", False, self._log(state, OPENED, listed)

    def _subsets(self, cards: bytes) -> list[bytes]:
        """All that is left of ``cards`` if some are left out; never nothing."""
        found = [b""]
        for card in cards:
            found = [kept + bytes([c]) for kept in found for c in sorted({0, card})]
        return [kept for kept in found if any(kept)]

    def _arrivals(self, state: bytes) -> Iterator[Step]:
        """Any announcement to the leader that is still in its link."""
        site = state[LEAD]
        for m in self.people:
            index, listed = self._listed(state, m)
            place = self._at_site(site, m)
            for card in range(1, self.config.cards + 1):
                words = self._words(site, m, card)
                said = state[words] | state[words + 1] << 8
                for seen in range(self.room + 1):
                    if not said >> seen & 1:
                        continue
                    if seen + 1 < state[place + 1] and "newest" not in self.without:
                        continue
                    before = seen <= index and "seen" not in self.without
                    if before and (card == listed or "any" not in self.without):
                        continue
                    after = bytearray(state)
                    after[place], after[place + 1] = card, seen + 1
                    if after != state:
                        yield f"hear of {card} from {m} (seen {seen})", False, bytes(after)

    # -- members ---------------------------------------------------------------------------------

    def _member(self, state: bytes, m: int) -> Iterator[Step]:
        at = self.first[m]
        made, applied = state[at + MADE], state[at + APPLIED]
        told = state[at + CARDS + 2 * made - 1] if made else RETURNED
        if applied < state[N]:
            yield f"apply at {m}", False, self._apply(state, m)
        if told != WAITS and made < self.config.cards:
            after = bytearray(state)
            after[at + MADE] += 1
            after[at + BOUND] = 0
            after[at + CARDS + 2 * made] = self._round(state, applied)
            yield f"make {made + 1} at {m}", False, bytes(after)
        if told == WAITS and not state[at + BOUND]:
            for site in self.sites:
                words = self._words(site, m, made)
                after = bytearray(state)
                after[words + applied // 8] |= 1 << applied % 8
                if after != state:
                    yield f"announce {made} of {m} to {site}", False, bytes(after)
        if told == WAITS and state[at + BOUND] and "undecided" in self.without:
            after = bytearray(state)
            after[at + CARDS + 2 * made - 1], after[at + BOUND] = RETURNED, 0
            yield f"take back {made} of {m}", False, bytes(after)

    def _apply(self, state: bytes, m: int) -> bytes:
        after, at = bytearray(state), self.first[m]
        kind, *cards = self._entry(state, state[at + APPLIED])
        after[at + APPLIED] += 1
        made = state[at + MADE]
        place = at + CARDS + 2 * made - 1
        if not made or state[place] != WAITS:
            return bytes(after)
        if kind == OPENED and cards[m] == made:
            after[at + BOUND] = 1
        elif kind != OPENED and state[at + BOUND]:
            after[at + BOUND] = 0
            after[place] = COUNTED if kind == COMMITTED and cards[m] else RETURNED
            if after[place] == COUNTED and cards[m] != made:
                after[BAD] = 3
        age = self._round(after, after[at + APPLIED]) - state[place - 1]
        if after[place] == WAITS and not after[at + BOUND] and age > self.config.age:
            after[place] = RETURNED
        return bytes(after)

    # -- trouble ---------------------------------------------------------------------------------

    def _trouble(self, state: bytes, m: int) -> Iterator[Step]:
        if state[BREAKS]:
            for site in self.sites:
                after = bytearray(state)
                after[BREAKS] -= 1
                self._cut(after, site, m)
                yield f"break link of {m} and {site}", True, bytes(after)
        if state[CRASHES]:
            after = bytearray(state)
            after[CRASHES] -= 1
            at, made = self.first[m], state[self.first[m] + MADE]
            for site in self.sites:
                self._cut(after, site, m)
            if made and state[at + CARDS + 2 * made - 1] == WAITS:
                after[at + CARDS + 2 * made - 1] = COUNTED  # nobody is left to be told anything
            after[at + BOUND] = 0
            yield f"crash {m}", True, bytes(after)

    def _cut(self, state: bytearray, site: int, m: int) -> None:
        """Nothing that was on the way over this link comes any more, and both ends know."""
        for card in range(1, self.config.cards + 1):
            words = self._words(site, m, card)
            state[words] = state[words + 1] = 0
        place = self._at_site(site, m)
        state[place] = state[place + 1] = 0


__all__ = ["GUARDS", "Config", "Once"]
