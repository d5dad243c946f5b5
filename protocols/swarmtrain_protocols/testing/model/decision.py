"""The decision of one round (spec 08 §2.1 to §2.5), on a log that is one sequence (spec 04).

That the log is one sequence whatever its leaders do is the business of ``consensus.py``; here an
entry is certified in one step, by the leader of the newest term and while a majority of the
stewards is up. What a former leader has proposed may be in its successor's log or not, and a former
leader that has not noticed goes on proposing and appointing deputies.

Messages are statements that stay for ever once they were made (Lamport's way): whoever acts may
have heard any of them, late, twice, in any order or not at all. Bytes are fetched from whoever is
up and has them. A crash takes what is not synced; who vanishes takes its disk too.

A round is tried again until it is committed. When everybody has seen an attempt aborted, the log is
cut and its numbers begin anew, so that the number of states is finite and that of attempts is not.
"""

from __future__ import annotations

from collections.abc import Iterator

from swarmtrain_protocols.testing.model.explore import Step
from swarmtrain_protocols.testing.model.table import (
    ABORTED,
    ALIVE,
    APPLIED,
    BAD,
    BYTES,
    COMMITTED,
    CRASHES,
    DISK,
    DISK_ROOT,
    DOWN,
    EVER,
    EVER_ROOT,
    GONE,
    GUARDS,
    HELD,
    HELD_ROOT,
    KIND,
    LEAD,
    LOST,
    MESSAGES,
    MOVES,
    NAMES,
    OLD,
    OLD_KIND,
    OLD_WHAT,
    OPENED,
    OWN,
    REWOUND,
    SET,
    STATE,
    STATE_ROOT,
    SUSPICIONS,
    SYNCED,
    UP,
    VANISHING,
    WHAT,
    Config,
    N,
    Table,
    View,
    need,
)


class Decision(Table):
    """Satisfies ``explore.Model``."""

    # -- explore.Model ---------------------------------------------------------------------------

    def steps(self, state: bytes) -> Iterator[Step]:
        view = self.view(state, state[N])
        yield from self._lead(state, view)
        yield from self._elect(state)
        yield from self._follow(state)
        yield from self._trouble(state)

    def settled(self, state: bytes) -> bool:
        view = self.view(state, state[N])
        if view.rewound:
            return True
        if view.committed is None:
            return False
        attempt, root = view.committed
        for m in self.people:
            at = self.first[m]
            if state[at + ALIVE] == GONE:
                continue
            if (state[at + ALIVE], state[at + APPLIED]) != (UP, state[N]):
                return False
            if (state[at + STATE], state[at + STATE_ROOT]) != (attempt + 1, root):
                return False
        return True

    def broken(self, state: bytes) -> str:
        if state[BAD]:
            return MESSAGES[state[BAD]]
        view = self.view(state, state[N])
        if view.committed is None or view.rewound or self._somebody_has(state, view, dead=True):
            return ""
        gone = sum(1 << m for m in self.people if state[self.first[m] + ALIVE] == GONE)
        lost = (gone if view.holders.bit_count() < 3 else state[LOST] | gone) & view.holders
        if lost.bit_count() >= need(view.holders):
            return ""  # more than half of the holders lost it: a rewind, which everybody sees
        return "a committed result is held by nobody"

    # -- the leader ------------------------------------------------------------------------------

    def _lead(self, state: bytes, view: View) -> Iterator[Step]:
        leader = state[LEAD] - 1
        known = state[self.first[leader] + APPLIED] if leader >= 0 else -1
        if known == state[N] or (known >= 0 and "early" in self.without):
            view = self.view(state, known)
            if not state[KIND] and not view.rewound:
                for kind, what in self._proposals(state, view):
                    after = bytearray(state)
                    after[KIND], after[WHAT] = kind | view.attempt << 4, what
                    slow = kind == ABORTED and self.config.patient and not self._hopeless(state)
                    yield f"propose {NAMES[kind]} {what:b}", slow, bytes(after)
            yield from self._appoint(state, view)
        if state[KIND] and leader >= 0 and self._enough(state) and state[N] < self.room:
            yield "certify", False, self._certified(state, state[KIND], state[WHAT])
        yield from self._stale(state, view)

    def _certified(self, state: bytes, kind: int, what: int) -> bytes:
        after = bytearray(state)
        after[KIND] = after[WHAT] = 0
        self._append(after, kind, what)
        return self._cut(after)

    def _proposals(self, state: bytes, view: View) -> Iterator[tuple[int, int]]:
        if view.committed is not None:
            if self._all_lost(state, view):
                yield REWOUND, 0
            return
        if not view.contributors:
            here = sum(1 << m for m in self.people if state[self.first[m] + ALIVE] == UP)
            holders = here & self.config.holders
            if holders and view.attempt < self.config.attempts:
                yield OPENED, here | holders << 4
            return
        if "deadline" not in self.without and "deputy" not in self.without:
            yield ABORTED, 0
        if not view.chosen:
            if chosen := self._delivered(state, view):
                yield SET, chosen
            return
        yield from ((COMMITTED, root) for root in self._votes(state, view))

    def _delivered(self, state: bytes, view: View) -> int:
        """Contributions that every computer has said to have."""
        every, some = view.contributors, 0
        for p in self.parts:
            said = state[self.first[self._computer(state, view, p)] + BYTES + 3 * p + 2]
            every, some = every & said, some | said
        return some & view.contributors if "everywhere" in self.without else every

    def _votes(self, state: bytes, view: View) -> list[int]:
        """Roots that enough holders have reported."""
        votes: dict[int, int] = {}
        few = view.holders.bit_count() < 3 and "durable" not in self.without
        for m in self.people:
            at = self.first[m]
            mine = state[at + HELD] == view.attempt + 1 or "key" in self.without
            counts = view.holders >> m & 1 and state[at + HELD] and mine
            if counts and (state[at + SYNCED] or not few):
                votes[state[at + HELD_ROOT]] = votes.get(state[at + HELD_ROOT], 0) + 1
        least = need(view.holders) if "holders" not in self.without else 1
        return [root for root, count in votes.items() if count >= least]

    def _hopeless(self, state: bytes) -> bool:
        """Rules 9 and 12: what is missing will never come, so that no deadline is waited for.

        No contribution can be had any more; or nobody who is linked holds the result, and a chosen
        contribution is neither at a part's computer nor with its maker.
        """
        view = self.view(state, state[N])
        makers = [m for m in self.people if view.contributors >> m & 1]
        if not view.chosen:
            return not any(self._has_own(state, m, view.attempt) for m in makers)
        for m in self.people:
            said = state[self.first[m] + HELD] == view.attempt + 1
            if said and ("link" in self.without or self._holds(state, m, view)):
                return False
        for p in self.parts:
            there = state[self.first[self._computer(state, view, p)] + BYTES + 3 * p]
            missing = [m for m in makers if (view.chosen & ~there) >> m & 1]
            if any(not self._has_own(state, m, view.attempt) for m in missing):
                return True
        return False

    def _holds(self, state: bytes, m: int, view: View) -> bool:
        """Up, in this attempt, and with its whole result: it would report that on a new link."""
        mine = self.view(state, state[self.first[m] + APPLIED])
        same = self._up(state, m) and mine.attempt == view.attempt and mine.contributors
        return bool(same and self._stored(state, m))

    def _appoint(self, state: bytes, view: View) -> Iterator[Step]:
        """Rule 8: a computer whose link broke is replaced; once also one that is only suspected."""
        if not view.contributors or view.committed is not None or "deputy" in self.without:
            return
        for p in self.parts:
            now = self._computer(state, view, p)
            told = now == self._owner(view, p) or state[self.asked + 2 * p + 1] >> now & 1
            lost = state[self.first[now] + ALIVE] != UP or not told
            if not lost and not state[SUSPICIONS]:
                continue
            order = (self._owner(view, p, 1), *self.people)
            able = [m for m in order if state[self.first[m] + ALIVE] == UP]
            able = [m for m in able if m != now or lost]
            if able:
                after = bytearray(state)
                after[SUSPICIONS] -= not lost
                after[self.asked + 2 * p] = able[0] + 1
                after[self.asked + 2 * p + 1] |= 1 << able[0]
                self._touch(after, able[0])
                yield f"appoint {able[0]} for part {p}", not lost, bytes(after)

    # -- leaders that come, and one that has not noticed ------------------------------------------

    def _elect(self, state: bytes) -> Iterator[Step]:
        """A new leader: the last proposal is in its log, or not, and will never be."""
        if not self._enough(state) or (state[LEAD] and not state[MOVES]):
            return
        for m in self.people:
            if state[self.first[m] + ALIVE] != UP or state[LEAD] == m + 1:
                continue
            base = bytearray(state)
            if state[LEAD]:
                base[MOVES] -= 1
                base[OLD], base[OLD_KIND], base[OLD_WHAT] = state[LEAD], state[KIND], state[WHAT]
            if base[OLD] == m + 1:
                base[OLD] = base[OLD_KIND] = base[OLD_WHAT] = 0
            base[LEAD] = m + 1
            for p in self.parts:
                base[self.asked + 2 * p] = 0
            fault = bool(state[LEAD])
            if state[KIND] and state[N] < self.room:
                yield (
                    f"elect {m}, inherits",
                    fault,
                    self._certified(bytes(base), base[KIND], base[WHAT]),
                )
            base[KIND] = base[WHAT] = 0
            yield f"elect {m}", fault, self._cut(base)

    def _stale(self, state: bytes, view: View) -> Iterator[Step]:
        """A former leader: what it says is believed by members, what it writes by nobody."""
        former = state[OLD] - 1
        if former < 0 or state[self.first[former] + ALIVE] != UP:
            return
        after = bytearray(state)
        after[OLD] = after[OLD_KIND] = after[OLD_WHAT] = 0
        yield f"notice {former} is no leader", False, bytes(after)
        own = self.view(state, state[self.first[former] + APPLIED])
        if own.contributors and not state[OLD_KIND] and own.committed is None:
            for kind, what in self._proposals(state, own):
                after = bytearray(state)
                after[OLD_KIND], after[OLD_WHAT] = kind | own.attempt << 4, what
                yield f"stale {NAMES[kind]} by {former}", False, bytes(after)
        for p in self.parts if view.contributors and own.attempt == view.attempt else ():
            for m in self.people:
                if not state[self.asked + 2 * p + 1] >> m & 1 and self._up(state, m):
                    after = bytearray(state)
                    after[self.asked + 2 * p + 1] |= 1 << m
                    self._touch(after, m)
                    yield f"stale {former} appoints {m} for part {p}", False, bytes(after)
        if state[OLD_KIND] & 15 == COMMITTED and "certified" in self.without:
            after = bytearray(state)
            self._adopt(after, former, state[OLD_KIND] >> 4, state[OLD_WHAT])
            yield f"apply uncertified at {former}", False, bytes(after)

    # -- members ---------------------------------------------------------------------------------

    def _follow(self, state: bytes) -> Iterator[Step]:
        for m in self.people:
            at = self.first[m]
            if state[at + ALIVE] == DOWN:
                after = bytearray(state)
                after[at + ALIVE] = UP
                yield f"restart {m}", False, bytes(after)
            elif state[at + ALIVE] == UP:
                if state[at + APPLIED] < state[N]:
                    yield f"apply at {m}", False, self._apply(state, m)
                view = self.view(state, state[at + APPLIED])
                if view.committed is not None:
                    yield from self._catch_up(state, m, view)
                elif view.contributors:
                    yield from self._gather(state, m, view)
                    yield from self._results(state, m, view)
                    yield from self._sync(state, m, view)

    def _apply(self, state: bytes, m: int) -> bytes:
        """The next entry of the log."""
        after, at = bytearray(state), self.first[m]
        before = self.view(after, after[at + APPLIED])
        after[at + APPLIED] += 1
        view = self.view(after, after[at + APPLIED])
        if view.attempt != before.attempt or view.committed != before.committed:
            if view.committed is not None:
                self._decided(after, m, view.committed)
            for p in self.parts:
                after[at + BYTES + 3 * p] = after[at + BYTES + 3 * p + 1] = 0
            if after[at + OWN] == before.attempt + 1:
                after[at + OWN] = 0
        self._touch(after, m)
        return self._cut(after)

    def _decided(self, state: bytearray, m: int, committed: tuple[int, int]) -> None:
        """Adopt the committed result if it is here."""
        at = self.first[m]
        attempt, root = committed
        here = [(attempt + 1, self._stored(state, m)), (state[at + DISK], state[at + DISK_ROOT])]
        for number, mine in here:
            if mine and ("root" in self.without or (number, mine) == (attempt + 1, root)):
                self._adopt(state, m, number - 1, mine)
                return

    def _adopt(self, state: bytearray, m: int, attempt: int, root: int) -> None:
        at = self.first[m]
        state[at + STATE], state[at + STATE_ROOT] = attempt + 1, root
        if state[EVER] and (state[EVER], state[EVER_ROOT]) != (attempt + 1, root):
            state[BAD] = 1
        state[EVER], state[EVER_ROOT] = attempt + 1, root
        chosen = self.view(state, state[N]).chosen
        if any(root >> 4 * p & 15 != chosen for p in self.parts):
            state[BAD] = state[BAD] or 2

    def _touch(self, state: bytearray, m: int) -> None:
        """Do what needs nobody else: count the own contribution, sum, store, report."""
        at = self.first[m]
        view = self.view(state, state[at + APPLIED])
        if not view.contributors or view.committed is not None:
            return
        for p in self.parts:
            place = at + BYTES + 3 * p
            if not self._computes(state, m, view, p):
                continue
            if state[at + OWN] == view.attempt + 1:
                state[place] |= 1 << m & view.contributors
            state[place + 2] |= state[place]
            chosen = view.chosen
            if "everywhere" in self.without:
                chosen &= state[place]
            if chosen and not chosen & ~state[place] and not state[place + 1]:
                state[place + 1] = state[place] if "chosen" in self.without else chosen
        root = self._stored(state, m)
        if root and (state[at + HELD], state[at + HELD_ROOT]) != (view.attempt + 1, root):
            self._report(state, m, view, root, synced=not self.config.volatile)

    def _report(self, state: bytearray, m: int, view: View, root: int, *, synced: bool) -> None:
        at = self.first[m]
        state[at + HELD], state[at + HELD_ROOT] = view.attempt + 1, root
        state[at + SYNCED] = synced
        if synced:
            state[at + DISK], state[at + DISK_ROOT] = view.attempt + 1, root

    def _gather(self, state: bytes, m: int, view: View) -> Iterator[Step]:
        """Fetch contributions to a part that this member computes."""
        wanted = view.chosen or view.contributors
        for p in self.parts:
            place = self.first[m] + BYTES + 3 * p
            if state[place + 1] or not self._computes(state, m, view, p):
                continue
            for other in self.people:
                missing = wanted >> other & 1 and not state[place] >> other & 1
                if missing and other != m and self._has_own(state, other, view.attempt):
                    after = bytearray(state)
                    after[place] |= 1 << other
                    self._touch(after, m)
                    yield f"fetch part {p} of {other}'s contribution at {m}", False, bytes(after)

    def _results(self, state: bytes, m: int, view: View) -> Iterator[Step]:
        """Fetch the result of a part from whoever has it."""
        if not (view.contributors | view.holders) >> m & 1:
            return
        for p in self.parts:
            place = self.first[m] + BYTES + 3 * p + 1
            if state[place]:
                continue
            found = {self._part(state, x, view.attempt, p) for x in self.people if x != m}
            for result in sorted(found - {0}):
                after = bytearray(state)
                after[place] = result
                self._touch(after, m)
                yield f"fetch result of part {p} at {m}", False, bytes(after)

    def _sync(self, state: bytes, m: int, view: View) -> Iterator[Step]:
        """The result is on disk; it is reported anew."""
        at, root = self.first[m], self._stored(state, m)
        if not root or (state[at + DISK], state[at + DISK_ROOT]) == (view.attempt + 1, root):
            return
        after = bytearray(state)
        self._report(after, m, view, root, synced=True)
        yield f"sync at {m}", False, bytes(after)

    def _catch_up(self, state: bytes, m: int, view: View) -> Iterator[Step]:
        """After the commit: fetch the result by its root; write what is only in memory."""
        at = self.first[m]
        assert view.committed is not None
        attempt, root = view.committed
        mine = state[at + STATE], state[at + STATE_ROOT]
        if mine != (attempt + 1, root) and "catch-up" not in self.without:
            for x in self.people:
                if x != m and self._has_result(state, x, attempt, root):
                    after = bytearray(state)
                    self._adopt(after, m, attempt, root)
                    if not self.config.volatile:
                        after[at + DISK], after[at + DISK_ROOT] = attempt + 1, root
                    yield f"fetch the committed result at {m}", False, bytes(after)
                    break
        elif mine[0] and mine != (state[at + DISK], state[at + DISK_ROOT]):
            after = bytearray(state)
            after[at + DISK], after[at + DISK_ROOT] = mine
            yield f"sync at {m}", False, bytes(after)

    # -- trouble ---------------------------------------------------------------------------------

    def _trouble(self, state: bytes) -> Iterator[Step]:
        for m in self.people:
            if not self._up(state, m):
                continue
            for budget, name, how in ((CRASHES, "crash", DOWN), (VANISHING, "vanish", GONE)):
                if state[budget]:
                    after = bytearray(state)
                    after[budget] -= 1
                    self._crash(after, m, how)
                    yield f"{name} {m}", True, self._cut(after)

    def _crash(self, state: bytearray, m: int, how: int) -> None:
        """Everything that is not synced is lost; links to this member take messages with them."""
        at = self.first[m]
        state[at + ALIVE], state[at + OWN] = how, 0
        if how == GONE:
            state[at + DISK] = state[at + DISK_ROOT] = 0
        if (state[at + STATE], state[at + STATE_ROOT]) != (
            state[at + DISK],
            state[at + DISK_ROOT],
        ):
            state[at + STATE] = state[at + STATE_ROOT] = 0
        for p in self.parts:
            state[at + BYTES + 3 * p] = state[at + BYTES + 3 * p + 1] = 0
            state[self.asked + 2 * p + 1] &= ~(1 << m)
        state[LOST] |= 1 << m
        if state[LEAD] == m + 1:
            state[LEAD] = 0
        if state[OLD] == m + 1:
            state[OLD] = state[OLD_KIND] = state[OLD_WHAT] = 0


__all__ = ["GUARDS", "Config", "Decision"]
