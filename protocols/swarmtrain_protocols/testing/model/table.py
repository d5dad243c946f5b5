"""What the model of a round knows: its guards, its configurations, the layout of a state, the log.

The steps are in ``decision.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

OPENED, SET, COMMITTED, ABORTED, REWOUND = 1, 2, 3, 4, 5
NAMES = ("", "opened", "set", "committed", "aborted", "rewound")
DOWN, UP, GONE = 0, 1, 2

GUARDS = {
    "holders": "commit without holders: one report is enough",
    "durable": "with two holders, reports of bytes that are not synced count",
    "first": "the ledger lets a later decision replace an earlier one",
    "early": "a new leader acts before its first entry is certified",
    "certified": "a leader applies its own entries before they are certified",
    "chosen": "computers sum all that they have, and not the set that is logged",
    "everywhere": "the set is of what any part's computer has, not every one's, and lacking "
    "contributions are left out of a sum",
    "key": "reports about an attempt count for the next one",
    "root": "a member applies the result it has, whatever root was committed",
    "catch-up": "a result is never fetched by its committed root",
    "deadline": "an attempt has no deadline",
    "link": "what somebody held whose link broke counts as held, so that only a deadline helps",
    "deputy": "nobody takes over the part of an owner that is gone, and no deadline helps",
}
"""What the specification demands; each can be taken away, and the checker must notice."""

MESSAGES = (
    "",
    "two members have adopted different outcomes of the round",
    "a result was adopted that is not the sum of the agreed set in every part",
)


class View(NamedTuple):
    """What a prefix of the log says. Masks have a bit for each member."""

    attempt: int
    contributors: int
    holders: int
    chosen: int
    committed: tuple[int, int] | None
    """(attempt, root) if the round is committed."""
    rewound: bool


@dataclass(frozen=True)
class Config:
    """A small swarm. ``without``: guards that are taken away."""

    name: str
    members: int = 3
    holders: int = 0b111
    parts: int = 1
    crashes: int = 1
    vanishing: int = 0
    moves: int = 1
    """How often another leader is elected though the last one lives."""
    suspicions: int = 0
    """How often an owner that works is taken for a silent one."""
    attempts: int = 2
    """How many attempts the slowest member may be behind."""
    volatile: bool = False
    """Whether a result is reported before it is synced, and then once more."""
    patient: bool = False
    """Count a deadline as a fault: show states in which nothing else helps."""
    without: tuple[str, ...] = ()


HEAD = 15
(N, LEAD, KIND, WHAT, OLD, OLD_KIND, OLD_WHAT) = range(7)
(CRASHES, MOVES, VANISHING, SUSPICIONS, LOST, BAD, EVER, EVER_ROOT) = range(7, 15)
"""Places in the state: entries in the log, the leader and its proposal, a former leader and its
proposal, what may still go wrong, who has lost bytes since the opening, what was ever adopted."""
ALIVE, APPLIED, OWN, STATE, STATE_ROOT, DISK, DISK_ROOT, HELD, HELD_ROOT, SYNCED, BYTES = range(11)
"""Places within a member: up or not, entries applied, the attempt whose contribution is here, the
state (attempt + 1, root), the synced result, what it has reported to hold, whether synced; then for
each part what it has fetched, its result, what it has reported to have fetched."""


class Table:
    """A state is a row of bytes: a head, the current attempt's parts, members, the log."""

    def __init__(self, config: Config) -> None:
        self.config = config
        n, parts = config.members, config.parts
        self.people = range(n)
        self.parts = range(parts)
        self.majority = n // 2 + 1
        self.asked = HEAD
        """Per part: the current leader's deputy, and everybody who was ever told to take over."""
        self.size = BYTES + 3 * parts
        self.first = [HEAD + 2 * parts + m * self.size for m in self.people]
        self.log = HEAD + 2 * parts + n * self.size
        self.room = 3 * config.attempts + 4
        self.without = dict.fromkeys(config.without)
        self._view = lru_cache(maxsize=None)(self._fold)

    def begin(self) -> bytes:
        state = bytearray(self.log + 2 * self.room)
        state[CRASHES], state[MOVES] = self.config.crashes, self.config.moves
        state[VANISHING], state[LEAD] = self.config.vanishing, 1
        state[SUSPICIONS] = self.config.suspicions
        for m in self.people:
            state[self.first[m] + ALIVE] = UP
        return bytes(state)

    def show(self, state: bytes) -> str:
        log = []
        for i in range(state[N]):
            kind, what = state[self.log + 2 * i], state[self.log + 2 * i + 1]
            log.append(f"{NAMES[kind & 15]}.{kind >> 4}({what:b})")
        people = []
        for m in self.people:
            at = self.first[m]
            held = "".join(
                f" p{p}:{state[at + BYTES + 3 * p]:b}/{state[at + BYTES + 3 * p + 1]:b}"
                for p in self.parts
            )
            alive = "down up gone".split()[state[at + ALIVE]]
            state_at = f"{state[at + STATE]}:{state[at + STATE_ROOT]:b}"
            people.append(f"{m} {alive} at {state[at + APPLIED]}{held} state {state_at}")
        return f"leader {state[LEAD] - 1} log [{' '.join(log)}] " + "; ".join(people)

    # -- the log ---------------------------------------------------------------------------------

    def view(self, state: bytes | bytearray, count: int) -> View:
        return self._view(bytes(state[self.log : self.log + 2 * count]))

    def _fold(self, log: bytes) -> View:
        attempt, opened, chosen = 0, 0, 0
        committed, rewound = None, False
        for place in range(0, len(log), 2):
            kind, key, what = log[place] & 15, log[place] >> 4, log[place + 1]
            open_now = opened and key == attempt and committed is None
            if kind == OPENED and key == attempt and not opened and committed is None:
                opened, chosen = what, 0
            elif kind == SET and open_now and not chosen:
                chosen = what
            elif kind == COMMITTED and open_now and chosen:
                committed = attempt, what
            elif kind == COMMITTED and "first" in self.without and opened:
                committed = key, what
            elif kind == ABORTED and open_now:
                attempt, opened, chosen = attempt + 1, 0, 0
            elif kind == ABORTED and "first" in self.without and committed:
                attempt, opened, chosen, committed = attempt + 1, 0, 0, None
            elif kind == REWOUND:
                rewound = True
        return View(attempt, opened & 15, opened >> 4, chosen, committed, rewound)

    def _append(self, state: bytearray, kind: int, what: int) -> None:
        """An entry is certified."""
        place = self.log + 2 * state[N]
        before = self.view(state, state[N])
        state[place], state[place + 1] = kind, what
        state[N] += 1
        after = self.view(state, state[N])
        if after.contributors and not before.contributors:
            self._opened(state, after)

    def _opened(self, state: bytearray, view: View) -> None:
        """An attempt begins: its contributions are made, what was said of others is void."""
        state[LOST] = 0
        for p in self.parts:
            state[self.asked + 2 * p] = state[self.asked + 2 * p + 1] = 0
        for m in self.people:
            at = self.first[m]
            if view.contributors >> m & 1 and state[at + ALIVE] == UP:
                state[at + OWN] = view.attempt + 1
            if "key" not in self.without:
                state[at + HELD] = state[at + HELD_ROOT] = state[at + SYNCED] = 0
            for p in self.parts:
                state[at + BYTES + 3 * p + 2] = 0

    def _cut(self, state: bytearray) -> bytes:
        """Begin the numbers anew once everybody has seen that nothing is open or decided."""
        view = self.view(state, state[N])
        idle = state[N] and not view.contributors and view.committed is None
        for m in self.people:
            at = self.first[m]
            if state[at + ALIVE] == UP and state[at + APPLIED] < state[N]:
                return bytes(state)
        if not idle or view.rewound or state[KIND]:
            return bytes(state)
        state[self.log :] = bytes(2 * self.room)
        state[N] = 0
        state[OLD_KIND] = state[OLD_WHAT] = 0
        for m in self.people:
            at = self.first[m]
            state[at + APPLIED] = state[at + OWN] = 0
            for place in (DISK, DISK_ROOT, HELD, HELD_ROOT, SYNCED):
                state[at + place] = 0  # of attempts that were aborted
        return bytes(state)

    # -- who does what, and who has what ---------------------------------------------------------

    def _enough(self, state: bytes) -> bool:
        return sum(state[at + ALIVE] == UP for at in self.first) >= self.majority

    def _owner(self, view: View, p: int, turn: int = 0) -> int:
        """The owner of a part, or (``turn`` 1) its deputy."""
        owners = [m for m in self.people if view.contributors >> m & 1]
        return owners[(p + turn) % len(owners)]

    def _computer(self, state: bytes, view: View, p: int) -> int:
        deputy = state[self.asked + 2 * p]
        return deputy - 1 if deputy else self._owner(view, p)

    def _computes(self, state: bytes | bytearray, m: int, view: View, p: int) -> bool:
        told = bool(state[self.asked + 2 * p + 1] >> m & 1)
        return told or m == self._owner(view, p)

    def _up(self, state: bytes | bytearray, m: int) -> bool:
        return state[self.first[m] + ALIVE] == UP

    def _has_own(self, state: bytes, m: int, attempt: int) -> bool:
        return self._up(state, m) and state[self.first[m] + OWN] == attempt + 1

    def _stored(self, state: bytes | bytearray, m: int) -> int:
        """The root of the result whose parts are all here, or 0."""
        root = 0
        for p in self.parts:
            part = state[self.first[m] + BYTES + 3 * p + 1]
            if not part:
                return 0
            root |= part << 4 * p
        return root

    def _part(self, state: bytes, x: int, attempt: int, p: int) -> int:
        """The result of a part as ``x`` can serve it, or 0."""
        at = self.first[x]
        if state[at + ALIVE] != UP:
            return 0
        view = self.view(state, state[at + APPLIED])
        if view.committed is None and view.contributors and view.attempt == attempt:
            return state[at + BYTES + 3 * p + 1]
        return state[at + STATE_ROOT] >> 4 * p & 15 if state[at + STATE] == attempt + 1 else 0

    def _has_result(self, state: bytes, x: int, attempt: int, root: int) -> bool:
        at, wanted = self.first[x], (attempt + 1, root)
        if state[at + ALIVE] == GONE:
            return False
        on_disk = (state[at + DISK], state[at + DISK_ROOT]) == wanted
        if state[at + ALIVE] == DOWN:
            return on_disk
        view = self.view(state, state[at + APPLIED])
        same = view.committed is None and view.attempt == attempt and bool(view.contributors)
        held = (state[at + STATE], state[at + STATE_ROOT]) == wanted
        return on_disk or held or (same and self._stored(state, x) == root)

    def _somebody_has(self, state: bytes, view: View, *, dead: bool) -> bool:
        assert view.committed is not None
        return any(
            self._has_result(state, x, *view.committed)
            for x in self.people
            if dead or self._up(state, x)
        )

    def _all_lost(self, state: bytes, view: View) -> bool:
        """Everybody who will ever be back is here, and nobody has the committed result."""
        there = [at for at in self.first if state[at + ALIVE] != GONE]
        if any((state[at + ALIVE], state[at + APPLIED]) != (UP, state[N]) for at in there):
            return False
        return not self._somebody_has(state, view, dead=False)


def need(holders: int) -> int:
    """How many of the holders must report (08 §2.2, rule 10)."""
    count = holders.bit_count()
    return count if count <= 2 else count // 2 + 1
