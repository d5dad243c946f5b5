"""The replicated log (spec 04 §2.2, §2.3, §2.7): leaders come and go, one decision is certified.

Three stewards or more, entries ``no-op``, ``committed`` and ``aborted``; each leader wants one of
the two decisions in the log and cannot know which one an earlier leader wanted. Messages are what
was ever said: a vote request, a vote, an ``append`` of any beginning of a leader's log, a
signature. Any of them may arrive at any time, twice or never. A site that crashes loses what is not
synced and its role. Pre-votes and time-outs only say when an election begins; here one may begin at
any time.

A certificate exists as soon as enough have signed, whether the leader has put it together or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from swarmtrain_protocols.testing.model.explore import Step

FOLLOWER, CANDIDATE, LEADER = 0, 1, 2
NOTHING, COMMITTED, ABORTED = 0, 1, 2
WORDS = ("no-op", "committed", "aborted")
CRASHES = 0
TERM, VOTED, ROLE, LENGTH, SYNCED, LOG = range(6)
"""Places within a steward: its term, whom it voted for (+ 1), entries, how many are synced."""

GUARDS = {
    "majority": "a certificate needs a majority of the stewards",
    "current": "signatures are for entries of the current term only",
    "vote": "a vote is durable before it is told",
    "newest": "a vote goes only to a candidate whose log is not behind",
    "term": "nothing is taken from a leader of an older term",
    "synced": "a steward signs for what is durable",
}
"""What the specification demands; each can be taken away, and the checker must notice."""


@dataclass(frozen=True)
class Config:
    """``terms``: how many elections there may be; ``entries``: the longest log."""

    name: str
    stewards: int = 3
    terms: int = 3
    entries: int = 3
    crashes: int = 1
    without: tuple[str, ...] = ()


class Consensus:
    """Satisfies ``explore.Model``."""

    def __init__(self, config: Config) -> None:
        self.config = config
        n, longest = config.stewards, config.entries
        self.people = range(n)
        self.size = LOG + longest
        self.first = [1 + m * self.size for m in self.people]
        self.said = 1 + n * self.size
        """Per term, what was said in it: per steward the last entry it stood with (term + 1,
        length) and who voted for it; the leader's log; per steward the places it signed for."""
        self.width = 3 * n + 1 + longest + n
        self.without = dict.fromkeys(config.without)
        self.majority = n // 2 + 1

    # -- explore.Model ---------------------------------------------------------------------------

    def begin(self) -> bytes:
        """Steward 0 has been elected in the first term."""
        state = bytearray(self.said + self.width * self.config.terms)
        state[CRASHES] = self.config.crashes
        for m in self.people:
            at = self.first[m]
            state[at + TERM], state[at + VOTED] = 1, 1
        state[self.first[0] + ROLE] = LEADER
        self._append(state, 0, NOTHING)
        return bytes(state)

    def steps(self, state: bytes) -> Iterator[Step]:
        for m in self.people:
            yield from self._stand(state, m)
            yield from self._grant(state, m)
            yield from self._propose(state, m)
            yield from self._accept(state, m)
            if state[CRASHES]:
                yield f"crash {m}", True, self._crash(state, m)

    def broken(self, state: bytes) -> str:
        """One leader in a term, and all certificates of one log."""
        for term in range(1, self.config.terms + 1):
            at = self._of_term(term)
            won = [state[at + 3 * m + 2].bit_count() >= self.majority for m in self.people]
            if sum(won) + (term == 1) > 1:
                return "two leaders are elected in one term"
        longest = b""
        for log in self._certified(state):
            common = min(len(log), len(longest))
            if log[:common] != longest[:common]:
                return "two certificates are of different logs"
            longest = max(longest, log, key=len)
        return ""

    def settled(self, state: bytes) -> bool:
        """A decision is certified, or all terms that this configuration has are used up."""
        if any(state[at + TERM] == self.config.terms for at in self.first):
            return True
        return any(entry & 3 for log in self._certified(state) for entry in log)

    def show(self, state: bytes) -> str:
        people = []
        for m in self.people:
            at = self.first[m]
            log = self._text(state[at + LOG : at + LOG + state[at + LENGTH]])
            role = "follows stands leads".split()[state[at + ROLE]]
            people.append(f"{m} {role} in {state[at + TERM]}{log}")
        done = [self._text(log) for log in self._certified(state)]
        return "; ".join(people) + (f"; certified{max(done, key=len)}" if done else "")

    @staticmethod
    def _text(log: bytes) -> str:
        return " [" + " ".join(f"{entry >> 2}:{WORDS[entry & 3]}" for entry in log) + "]"

    # -- what was said ---------------------------------------------------------------------------

    def _of_term(self, term: int) -> int:
        return self.said + self.width * (term - 1)

    def _leader_log(self, state: bytes | bytearray, term: int) -> bytes:
        at = self._of_term(term) + 3 * self.config.stewards
        return bytes(state[at + 1 : at + 1 + state[at]])

    def _signatures(self, term: int) -> int:
        return self._of_term(term) + 3 * self.config.stewards + 1 + self.config.entries

    def _certified(self, state: bytes) -> list[bytes]:
        """The beginnings of leaders' logs that enough stewards have signed."""
        found = []
        least = self.majority - ("majority" in self.without)
        for term in range(1, self.config.terms + 1):
            log, at = self._leader_log(state, term), self._signatures(term)
            for count in range(len(log), 0, -1):
                if sum(state[at + m] >> count & 1 for m in self.people) >= least:
                    found.append(log[:count])
                    break
        return found

    # -- elections -------------------------------------------------------------------------------

    def _stand(self, state: bytes, m: int) -> Iterator[Step]:
        at = self.first[m]
        term = state[at + TERM] + 1
        if state[at + ROLE] == LEADER or term > self.config.terms:
            return
        after = bytearray(state)
        after[at + TERM], after[at + VOTED], after[at + ROLE] = term, m + 1, CANDIDATE
        place = self._of_term(term) + 3 * m
        after[place], after[place + 1] = self._last(state, m)[0] + 1, state[at + LENGTH]
        after[place + 2] = 1 << m
        yield f"stand {m}", False, bytes(after)

    def _last(self, state: bytes, m: int) -> tuple[int, int]:
        """(term of the last entry, length) of a steward's log."""
        at = self.first[m]
        length = state[at + LENGTH]
        return (state[at + LOG + length - 1] >> 2 if length else 0), length

    def _grant(self, state: bytes, m: int) -> Iterator[Step]:
        """Answer a request that was ever sent; the vote that makes a majority makes a leader."""
        at = self.first[m]
        for term in range(max(1, state[at + TERM]), self.config.terms + 1):
            for other in self.people:
                place = self._of_term(term) + 3 * other
                if other == m or not state[place] or state[place + 2] >> m & 1:
                    continue
                free = term > state[at + TERM] or state[at + VOTED] in (0, other + 1)
                last = state[place] - 1, state[place + 1]
                fresh = last >= self._last(state, m) or "newest" in self.without
                if not free or not fresh:
                    continue
                after = bytearray(state)
                after[at + TERM], after[at + VOTED], after[at + ROLE] = term, other + 1, FOLLOWER
                after[place + 2] |= 1 << m
                self._count(after, other, term, after[place + 2])
                yield f"vote of {m} for {other}", False, bytes(after)

    def _count(self, state: bytearray, m: int, term: int, votes: int) -> None:
        at = self.first[m]
        still = state[at + TERM] == term and state[at + ROLE] == CANDIDATE
        if still and votes.bit_count() >= self.majority:
            state[at + ROLE] = LEADER
            self._append(state, m, NOTHING)

    # -- entries ---------------------------------------------------------------------------------

    def _append(self, state: bytearray, m: int, body: int) -> None:
        """The leader's log grows; its own disk comes later."""
        at = self.first[m]
        length, term = state[at + LENGTH], state[at + TERM]
        if length == self.config.entries:
            return
        state[at + LOG + length] = term << 2 | body
        state[at + LENGTH] = length + 1
        place = self._of_term(term) + 3 * self.config.stewards
        state[place] = length + 1
        state[place + 1 : place + 2 + length] = state[at + LOG : at + LOG + length + 1]

    def _propose(self, state: bytes, m: int) -> Iterator[Step]:
        at = self.first[m]
        if state[at + ROLE] != LEADER:
            return
        length, term = state[at + LENGTH], state[at + TERM]
        log = state[at + LOG : at + LOG + length]
        if not any(entry & 3 and entry >> 2 == term for entry in log):
            for body in (COMMITTED, ABORTED) if length < self.config.entries else ():
                after = bytearray(state)
                self._append(after, m, body)
                yield f"append {WORDS[body]} at {m}", False, bytes(after)
        place = self._signatures(term) + m
        if log and log[-1] >> 2 == term and not state[place] >> length & 1:
            after = bytearray(state)
            after[place] |= 1 << length
            after[at + SYNCED] = 0 if "synced" in self.without else length
            yield f"sign {length} at {m}", False, bytes(after)

    def _accept(self, state: bytes, m: int) -> Iterator[Step]:
        """Take any beginning of the log of a leader, as of any time."""
        at = self.first[m]
        for term in range(1, self.config.terms + 1):
            if term < state[at + TERM] and "term" not in self.without:
                continue
            if state[at + ROLE] == LEADER and term <= state[at + TERM]:
                continue
            whole = self._leader_log(state, term)
            for count in range(1, len(whole) + 1):
                after = bytearray(state)
                self._take(after, m, term, whole[:count])
                if after != state:
                    yield f"accept {count} of term {term} at {m}", False, bytes(after)

    def _take(self, state: bytearray, m: int, term: int, given: bytes) -> None:
        at, count = self.first[m], len(given)
        mine = bytes(state[at + LOG : at + LOG + state[at + LENGTH]])
        if term > state[at + TERM]:
            state[at + TERM], state[at + VOTED] = term, 0
        state[at + ROLE] = FOLLOWER
        common = min(count, len(mine))
        differs = mine[:common] != given[:common]
        if differs or len(mine) < count:
            room = self.config.entries - len(given)
            state[at + LOG : at + LOG + self.config.entries] = given + bytes(room)
            state[at + LENGTH] = count
        if "synced" not in self.without:
            state[at + SYNCED] = state[at + LENGTH]
        if given[-1] >> 2 == term or "current" in self.without:
            state[self._signatures(term) + m] |= 1 << count

    def _crash(self, state: bytes, m: int) -> bytes:
        after, at = bytearray(state), self.first[m]
        after[CRASHES] -= 1
        after[at + ROLE] = FOLLOWER
        length = after[at + SYNCED]
        after[at + LOG + length : at + LOG + self.config.entries] = bytes(
            self.config.entries - length
        )
        after[at + LENGTH] = length
        if "vote" in self.without:
            after[at + VOTED] = 0
        return bytes(after)


__all__ = ["GUARDS", "Config", "Consensus"]
