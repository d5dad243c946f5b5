"""Which chunks of a corpus to ask whom for. Sans-I/O (spec 12-corpus.md).

Holders are found by asking for the descriptor, which is small and proves itself: who serves it has
the corpus. Missing chunks are then fetched in ranges from several holders at once. Whoever fails
gives its ranges back; whoever sent bytes that do not match is not asked again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from swarmtrain_protocols import limits
from swarmtrain_protocols.core import CancelFetch, Effect, Emit, Fetch, PeerId
from swarmtrain_protocols.corpus import Descriptor, parse_descriptor
from swarmtrain_protocols.errors import LocalProtocolError, PeerFault

PROBES_MAX = 4
DONORS_MAX = 4
RANGES_PER_DONOR = 2
RANGE_CHUNKS_MAX = 16
RANGE_TARGET_S = 4.0
"""A range is as long as its donor sends in that time: it costs little when the donor vanishes."""
FIRST_RATE_BYTES_PER_S = 64 * 1024.0
BASE_TIMEOUT_S = 20.0
SLOWDOWN_MAX = 4.0
"""A range may take that many times longer than its donor's measured rate promises."""
AGAIN_S_MIN, AGAIN_S_MAX = 2.0, 60.0
"""How soon somebody who has failed is asked again; doubled by every failure."""


@dataclass(frozen=True, slots=True)
class Prepare:
    """The descriptor is known: make room for the body. Answer ``prepared`` or ``abandon``."""

    descriptor: Descriptor


@dataclass(frozen=True, slots=True)
class Finish:
    """All chunks are in place. Answer ``finished`` or ``restart``."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The pinned hash names something that is no corpus: no member can help."""

    reason: str


@dataclass(slots=True)
class _Flight:
    """A fetch under way; ``count`` 0: of the descriptor."""

    peer: PeerId
    first: int
    count: int
    nbytes: int
    begin_s: float
    deadline_s: float


class CorpusDownload:
    """One download. The shell drains effects and answers with the methods they name.

    Args:
        root: the pinned hash, 32 bytes.
        rng: picks whom to ask.
        candidates: members that may be asked, this one left out.
        first_ticket: tickets count downwards from here (those of the node count upwards from 1).
    """

    def __init__(
        self,
        *,
        now: float,
        root: bytes,
        rng: random.Random,
        candidates: Callable[[], Sequence[PeerId]],
        first_ticket: int = -1,
    ) -> None:
        self.root = root
        self.descriptor: Descriptor | None = None
        self.have_bytes = 0
        self.asked: dict[PeerId, int] = {}
        """Who was asked, with how often it has failed in a row."""
        self.alone_since_s = now
        """Since when no holder is known; infinity while one is."""
        self._rng = rng
        self._candidates = candidates
        self._next_ticket = first_ticket
        self._rates: dict[PeerId, float] = {}  # of donors, bytes per second; 0: not measured yet
        self._again_s: dict[PeerId, float] = {}
        self._banned: dict[PeerId, None] = {}
        self._flights: dict[int, _Flight] = {}
        self._todo: list[tuple[int, int]] = []
        self._ready = False
        self._over = False
        self._look_s = now
        self._out: list[Effect] = []

    @property
    def donors(self) -> list[PeerId]:
        """Who is known to have the corpus, in the order of their answers."""
        return list(self._rates)

    # -- answers of the shell ------------------------------------------------------------------

    def fetched(self, now: float, ticket: int, data: bytes = b"") -> None:
        """A fetch is complete and matches its root; ``data`` is the descriptor, if it was that."""
        flight = self._flights.pop(ticket, None)
        if flight is None or self._over:
            return
        self.asked[flight.peer] = 0
        if flight.count:
            self.have_bytes += flight.nbytes
            self._measure(now, flight)
        else:
            self._rates[flight.peer] = 0.0
            self.alone_since_s = math.inf
            if self.descriptor is None:
                self._describe(data)
        self._step(now)

    def fetch_failed(self, now: float, ticket: int, reason: str) -> None:
        """A fetch ended without all of its chunks; ``corrupt`` means never again."""
        flight = self._flights.pop(ticket, None)
        if flight is None or self._over:
            return
        if flight.count:
            self._todo.append((flight.first, flight.count))
        failures = self.asked.get(flight.peer, 0) + 1
        self.asked[flight.peer] = failures
        self._again_s[flight.peer] = now + min(AGAIN_S_MAX, AGAIN_S_MIN * 2 ** min(failures, 8))
        self._rates.pop(flight.peer, None)
        if not self._rates and self.alone_since_s == math.inf:
            self.alone_since_s = now
        if reason == "corrupt":
            self._banned[flight.peer] = None
        self._step(now)

    def prepared(self, now: float, have: Iterable[int]) -> None:
        """There is room; chunks ``have`` are in place from an earlier life."""
        descriptor = self.descriptor
        if descriptor is None or self._ready:
            raise LocalProtocolError("nothing was to be prepared")
        self._ready = True
        there = sorted(set(have))
        self.have_bytes = sum(descriptor.chunk_nbytes(index) for index in there)
        begin = 0
        for index in (*there, descriptor.chunks):
            if index > begin:
                self._todo.append((begin, index - begin))
            begin = index + 1
        self._step(now)

    def restart(self, now: float) -> None:
        """What was in place proved wrong as a whole: fetch all of it again."""
        assert self.descriptor is not None
        self._ready = False
        self._over = False
        self._out.append(Prepare(self.descriptor))
        self._step(now)

    def abandon(self) -> None:
        """Stop: nothing will be asked for any more."""
        self._over = True
        for ticket in list(self._flights):
            self._out.append(CancelFetch(ticket))
        self._flights.clear()

    # -- time ----------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Give up what is late, look for more holders."""
        if self._over:
            return
        late = [t for t, flight in self._flights.items() if flight.deadline_s <= now]
        for ticket in late:
            self._out.append(CancelFetch(ticket))
            self.fetch_failed(now, ticket, "timeout")
        self._step(now)

    def deadline(self) -> float:
        """When ``tick`` is wanted."""
        if self._over:
            return math.inf
        return min([self._look_s, *(flight.deadline_s for flight in self._flights.values())])

    def drain(self) -> list[Effect]:
        effects, self._out = self._out, []
        return effects

    # -- inside --------------------------------------------------------------------------------

    def _measure(self, now: float, flight: _Flight) -> None:
        rate, known = flight.nbytes / max(1e-3, now - flight.begin_s), self._rates.get(flight.peer)
        if known is not None:
            self._rates[flight.peer] = (known + rate) / 2 if known else rate

    def _rate(self, peer: PeerId) -> float:
        return self._rates.get(peer) or FIRST_RATE_BYTES_PER_S

    def _describe(self, data: bytes) -> None:
        try:
            self.descriptor = parse_descriptor(data)
        except PeerFault as fault:
            self.abandon()
            self._out.append(Emit(Refused(f"{fault.code}: {fault.why}")))
            return
        self._out.append(Prepare(self.descriptor))

    def _step(self, now: float) -> None:
        if self._over:
            return
        if self._ready and not self._todo and not any(f.count for f in self._flights.values()):
            self.abandon()
            self._out.append(Finish())
            return
        self._look(now)
        if self._ready:
            for donor in self.donors:
                while self._todo and self._load(donor) < RANGES_PER_DONOR:
                    self._ask(now, donor)

    def _load(self, donor: PeerId) -> int:
        return sum(1 for f in self._flights.values() if f.peer == donor and f.count)

    def _look(self, now: float) -> None:
        """Ask some members that are not known to be holders for the descriptor."""
        busy = [flight.peer for flight in self._flights.values() if not flight.count]
        room = min(PROBES_MAX - len(busy), DONORS_MAX - len(self._rates) - len(busy))
        strangers = [
            peer
            for peer in self._candidates()
            if peer not in self._banned and peer not in self._rates and peer not in busy
        ]
        due = [peer for peer in strangers if self._again_s.get(peer, now) <= now]
        self._rng.shuffle(due)
        for peer in due[: max(0, room)]:
            self.asked.setdefault(peer, 0)
            self._send(now, peer, 0, 0, 0)
        later = [self._again_s[peer] for peer in strangers if self._again_s.get(peer, now) > now]
        self._look_s = min([now + AGAIN_S_MIN, *later])

    def _ask(self, now: float, donor: PeerId) -> None:
        assert self.descriptor is not None
        first, count = self._todo.pop()
        chunk = limits.CORPUS_CHUNK_BYTES
        wanted = int(self._rate(donor) * RANGE_TARGET_S) // chunk
        taken = min(count, max(1, min(wanted, RANGE_CHUNKS_MAX)))
        if taken < count:
            self._todo.append((first + taken, count - taken))
        nbytes = sum(self.descriptor.chunk_nbytes(i) for i in range(first, first + taken))
        self._send(now, donor, first, taken, nbytes)

    def _send(self, now: float, peer: PeerId, first: int, count: int, nbytes: int) -> None:
        ticket = self._next_ticket
        self._next_ticket -= 1
        coming = nbytes + sum(f.nbytes for f in self._flights.values() if f.peer == peer)
        deadline = now + BASE_TIMEOUT_S + SLOWDOWN_MAX * coming / self._rate(peer)
        self._flights[ticket] = _Flight(peer, first, count, nbytes, now, deadline)
        if count:
            assert self.descriptor is not None
            self._out.append(Fetch(ticket, peer, self.descriptor.root, first, count, "body"))
        else:
            self._out.append(Fetch(ticket, peer, self.root, 0, 1, "descriptor"))
