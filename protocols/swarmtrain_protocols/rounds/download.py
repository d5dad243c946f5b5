"""One blob from several donors at once: whom to ask for which chunks, and whom to drop. Spec 10.

Ranges are as long as their donor sends in a few seconds, by what it sent before, so that one which
vanishes costs little. Every range has a deadline from the measured rate. When nothing is left to
ask for, a donor that is done takes over what another one is late with: nobody can hold up the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import Effect, Emit, PeerId
from swarmtrain_protocols.errors import LocalProtocolError
from swarmtrain_protocols.rounds import effects as fx
from swarmtrain_protocols.rounds.fetches import Fetches

RANGE_CHUNKS_MAX = 16
RANGES_PER_DONOR = 2
RANGE_TARGET_S = 4.0
FIRST_RATE_BYTES_PER_S = 512 * 1024.0
"""Of a donor that has sent nothing yet: decides on the length of its first ranges alone."""
BASE_TIMEOUT_S = 20.0
SLOWDOWN_MAX = 4.0
"""A range may take that many times longer than its donor's measured rate promises."""
TAKEOVER_S = 5.0
TAKEOVER_FACTOR = 3.0
"""Late at the end: that many times what the one who takes over would need, and some seconds."""
REST_S_MIN, REST_S_MAX = 2.0, 60.0
"""For how long a donor that has failed is asked only if there is no other; doubled each time."""

Purpose = fx.WholeResult | fx.Snapshot
ARRIVED, FAILED = "arrived", "failed"


class Donors:
    """What this node knows of those it has fetched from: measured rates, and who failed lately."""

    def __init__(self) -> None:
        self._rates: dict[PeerId, float] = {}
        self._failures: dict[PeerId, int] = {}
        self._rest_until: dict[PeerId, float] = {}
        self._liars: dict[tuple[PeerId, bytes], None] = {}

    def rate(self, peer: PeerId) -> float | None:
        """Bytes per second, None before anything has come."""
        return self._rates.get(peer)

    def sent(self, peer: PeerId, nbytes: int, took_s: float) -> None:
        """A range has come in full; of too few bytes to say how fast if ``nbytes`` is 0."""
        rate = nbytes / max(1e-3, took_s)
        known = self._rates.get(peer)
        if nbytes:
            self._put(self._rates, peer, rate if known is None else (known + rate) / 2)
        self._failures.pop(peer, None)
        self._rest_until.pop(peer, None)

    def failed(self, now: float, peer: PeerId, *, slow: bool = False) -> None:
        """A range has not come; ``slow``: though there was time enough."""
        count = self._failures.get(peer, 0) + 1
        self._put(self._failures, peer, count)
        rest_s = min(REST_S_MAX, REST_S_MIN * 2.0 ** min(count - 1, 8))
        self._put(self._rest_until, peer, now + rest_s)
        if slow and peer in self._rates:
            self._rates[peer] = max(1.0, self._rates[peer] / 2)

    def rests(self, now: float, peer: PeerId) -> bool:
        """It has failed lately."""
        return self._rest_until.get(peer, -math.inf) > now

    def lied(self, peer: PeerId, root: bytes) -> None:
        """It sent bytes that do not belong to ``root``: it is never asked for them again."""
        self._put(self._liars, (peer, root), None)

    def is_liar(self, peer: PeerId, root: bytes) -> bool:
        return (peer, root) in self._liars

    @staticmethod
    def _put(table: dict, key: object, value: object) -> None:  # type: ignore[type-arg]
        table.pop(key, None)
        table[key] = value
        while len(table) > limits.MEMBERS_MAX:
            del table[next(iter(table))]


@dataclass(slots=True)
class _Flight:
    """A range under way."""

    donor: PeerId
    first: int
    count: int
    begin_s: float


class Download:
    """Chunks of one blob.

    Args:
        total: chunks of the blob.
        chunk_nbytes: bytes of one, all but the first and the last alike.
        ended: called once, with (now, ``arrived`` or ``failed``); not after ``cancel``.
    """

    def __init__(
        self,
        purpose: Purpose,
        *,
        total: int,
        chunk_nbytes: int,
        book: Donors,
        fetches: Fetches,
        out: list[Effect],
        ended: Callable[[float, str], None],
    ) -> None:
        self.purpose = purpose
        self.total = total
        self.donors: list[PeerId] = []
        """Who is asked, in the order of their coming."""
        self.used: dict[PeerId, int] = {}
        """Who has sent how many chunks."""
        self.here = 0
        """Chunks that were here before."""
        self.begin_s = math.nan
        self.ready = False
        self._chunk_nbytes = chunk_nbytes
        self._book = book
        self._fetches = fetches
        self._out = out
        self._ended = ended
        self._over = False
        self._todo: list[tuple[int, int]] = []
        self._flying: dict[int, _Flight] = {}
        self._asking_hashes: dict[int, PeerId] = {}
        self._hashes_todo: list[tuple[int, int]] = []
        self._hashed: Callable[[float], None] = lambda now: None

    # -- what the caller says --------------------------------------------------------------

    def start(self, now: float, have: Iterable[int] = ()) -> None:
        """There is room for the chunks; those of ``have`` are in place already."""
        assert not self.ready
        self.ready, self.begin_s = True, now
        there = sorted(set(have))
        self.here = len(there)
        begin = 0
        for index in (*there, self.total):
            if not begin <= index <= self.total:
                raise LocalProtocolError(f"chunk {index} of {self.total}")
            if index > begin:
                self._todo.append((begin, index - begin))
            begin = index + 1
        self._todo.reverse()
        self._pump(now)

    def ask_hashes(self, now: float, done: Callable[[float], None]) -> None:
        """First get the leaf hashes of all chunks, then call ``done``: they are the shell's."""
        assert not self.ready and isinstance(self.purpose, fx.Snapshot)
        step = limits.CHUNKS_PER_FETCH_MAX
        pieces = [(first, min(step, self.total - first)) for first in range(0, self.total, step)]
        self._hashes_todo = pieces[::-1]
        self._hashed = done
        self._pump(now)

    def add_donor(self, now: float, peer: PeerId) -> None:
        """Somebody else has the blob."""
        known = peer in self.donors
        if self._over or known or self._book.is_liar(peer, self.purpose.root):
            return
        self.donors.append(peer)
        if self.ready or self._hashes_todo:
            self._pump(now)

    def cancel(self) -> None:
        """Nothing is needed of it any more."""
        self._over = True
        for ticket in [*self._flying, *self._asking_hashes]:
            self._fetches.cancel(ticket)
        self._flying.clear()
        self._asking_hashes.clear()

    # -- time ------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Let a donor that is done take over from one that is late."""
        due = self._takeover()
        if due is None or due[0] > now:
            return
        _, ticket, donor = due
        flight = self._flying.pop(ticket)
        self._fetches.cancel(ticket)
        self._book.failed(now, flight.donor, slow=True)
        self._drop(flight.donor, "slow")
        self._fetch(now, donor, flight.first, flight.count)
        self._pump(now)

    def deadline(self) -> float:
        due = self._takeover()
        return math.inf if due is None else due[0]

    def _takeover(self) -> tuple[float, int, PeerId] | None:
        """(when, ticket, by whom) of the next range that another donor would take over."""
        if self._over or self._todo or not self._flying:
            return None
        idle = [p for p in self.donors if not self._load(p)]
        if not idle:
            return None
        fastest = max(idle, key=self._rate)
        # All that is in flight may share one bottleneck: the way into this node.
        coming = sum(flight.count for flight in self._flying.values()) * self._chunk_nbytes
        patience_s = TAKEOVER_S + TAKEOVER_FACTOR * coming / self._rate(fastest)
        oldest = min(self._flying, key=lambda ticket: self._flying[ticket].begin_s)
        return self._flying[oldest].begin_s + patience_s, oldest, fastest

    # -- inside ----------------------------------------------------------------------------

    def _rate(self, peer: PeerId) -> float:
        return self._book.rate(peer) or FIRST_RATE_BYTES_PER_S

    def _load(self, donor: PeerId) -> int:
        return sum(1 for flight in self._flying.values() if flight.donor == donor)

    def _pump(self, now: float) -> None:
        if self._over:
            return
        if not self.ready:
            self._pump_hashes(now)
            return
        rested = [p for p in self.donors if not self._book.rests(now, p)]
        for donor in rested or self.donors:
            while self._todo and self._load(donor) < RANGES_PER_DONOR:
                first, count = self._take(donor)
                self._fetch(now, donor, first, count)
        if not self._flying:
            self._end(now, FAILED if self._todo else ARRIVED)  # the last donor failed once

    def _pump_hashes(self, now: float) -> None:
        while self._hashes_todo and self.donors and not self._asking_hashes:
            first, count = self._hashes_todo[-1]
            self._fetch_hashes(now, self.donors[0], first, count)
        if self._hashes_todo and not self._asking_hashes:
            self._end(now, FAILED)

    def _fetch_hashes(self, now: float, donor: PeerId, first: int, count: int) -> None:
        def done(at: float, reason: str | None) -> None:
            del self._asking_hashes[ticket]
            if self._over:
                return
            if reason is not None:
                self._failed(at, donor, reason)
            else:
                self._hashes_todo.pop()
                if not self._hashes_todo:
                    self._hashed(at)
                    return
            self._pump(at)

        assert isinstance(self.purpose, fx.Snapshot)
        purpose, root = fx.SnapshotLeaves(self.purpose), self.purpose.root
        start = self._fetches.start
        ticket = start(now, donor, root, first, count, purpose, done, BASE_TIMEOUT_S)
        self._asking_hashes[ticket] = donor

    def _take(self, donor: PeerId) -> tuple[int, int]:
        """The next range to ask ``donor`` for."""
        first, count = self._todo.pop()
        wanted = int(self._rate(donor) * RANGE_TARGET_S) // self._chunk_nbytes
        taken = min(count, max(1, min(wanted, RANGE_CHUNKS_MAX)))
        if taken < count:
            self._todo.append((first + taken, count - taken))
        return first, taken

    def _timeout_s(self, donor: PeerId, count: int) -> float:
        flying = sum(flight.count for flight in self._flying.values() if flight.donor == donor)
        coming = (count + flying) * self._chunk_nbytes
        longest_s = coming / limits.FETCH_RATE_BYTES_PER_S_MIN
        rate = self._book.rate(donor)
        return BASE_TIMEOUT_S + (longest_s if rate is None else
                                 min(longest_s, SLOWDOWN_MAX * coming / rate))  # fmt: skip

    def _fetch(self, now: float, donor: PeerId, first: int, count: int) -> None:
        def done(at: float, reason: str | None) -> None:
            self._fetched(at, ticket, reason)

        timeout_s, root = self._timeout_s(donor, count), self.purpose.root
        start = self._fetches.start
        ticket = start(now, donor, root, first, count, self.purpose, done, timeout_s)
        self._flying[ticket] = _Flight(donor, first, count, now)

    def _fetched(self, now: float, ticket: int, reason: str | None) -> None:
        flight = self._flying.pop(ticket)
        if self._over:
            return
        if reason is None:
            # Two ranges share the donor's uplink: together they took as long as the longer one.
            others = RANGES_PER_DONOR if self._load(flight.donor) else 1
            nbytes = self._measured_chunks(flight) * self._chunk_nbytes * others
            self._book.sent(flight.donor, nbytes, now - flight.begin_s)
            self.used[flight.donor] = self.used.get(flight.donor, 0) + flight.count
        else:
            self._todo.append((flight.first, flight.count))
            self._failed(now, flight.donor, reason)
        self._pump(now)

    def _measured_chunks(self, flight: _Flight) -> int:
        """Chunks of a range, less the header of a snapshot: it is a few bytes, and comes at once.

        Taken for a chunk it made its donor look twenty times as fast as it was, and the donor got
        all the rest to send.
        """
        header = flight.first == 0 and isinstance(self.purpose, fx.Snapshot)
        return flight.count - header

    def _failed(self, now: float, donor: PeerId, reason: str) -> None:
        """It is asked for nothing more in this download; what it was asked for may still come."""
        if reason == "corrupt":
            self._book.lied(donor, self.purpose.root)
            fields: dict[str, object] = {"peer": donor.hex(), "fault": "corrupt_chunk"}
            self._out.append(Emit(fx.Notice("peer_fault", fields)))
        self._book.failed(now, donor, slow=reason == "timeout")
        self._drop(donor, reason)

    def _drop(self, donor: PeerId, reason: str) -> None:
        if donor not in self.donors:
            return
        self.donors.remove(donor)
        if reason.startswith("refused") or reason in ("unknown", "busy", "released"):
            return  # it has none, or no time: no fault of anybody's
        fields: dict[str, object] = {
            "peer": donor.hex(),
            "reason": reason,
            "channel": self.purpose.channel,
            "round": self.purpose.round,
        }
        self._out.append(Emit(fx.Notice("donor_dropped", fields)))

    def _end(self, now: float, how: str) -> None:
        self.cancel()
        self._ended(now, how)
