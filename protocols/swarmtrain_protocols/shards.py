"""The data of a run, dealt in shards: who trains what, and what counts. Spec 13.

Samples stand at *positions* 0, 1, 2, … without end: epoch ``e`` of a data set of N samples is the
positions e·N to (e + 1)·N - 1, and ``order.py`` says which sample stands where. An epoch is cut
into shards. ``DataState`` is part of the ledger: members hold leases of shards, dealt by a rule
that everybody evaluates alike, so that a lease costs no byte of the log. A contribution claims the
positions that are in it; they count when the round that contains it commits, and only if they are
the next ones of shards that its member holds. So each position counts once in its epoch, and none
is passed over, whatever becomes of members and rounds.

``LeaseBook`` is the trainer's side: what it may train on next, and what it has to claim.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

import msgspec

from swarmtrain_protocols import limits
from swarmtrain_protocols.messages.common import Span

Spans = tuple[Span, ...]


class Mark(msgspec.Struct, array_like=True):
    """What had been counted before ``round`` of the counting channel: a rewind goes back to it."""

    round: int
    next: int
    counted: int
    open: dict[int, int]


class DataState(msgspec.Struct):
    """Leases and progress; a part of ``ledger.Ledger``.

    ``shards``: of an epoch; 0: the data of this run are not dealt. ``phase_samples``: what a member
    is expected to train on between two contributions until it has shown. ``samples``: of an epoch;
    0: not defined yet. ``next``: the first shard that nobody ever held, counted over all epochs.
    ``leases``: by member, shard → its first position that does not count yet. ``free``: the same of
    shards that lost their holder. ``claimed``: what an open attempt lists, by member. ``pace``: by
    member, samples of its latest contribution that counted. ``active``: by member, the round in
    which it last had one, or began to be dealt shards.
    """

    shards: int = 0
    phase_samples: int = 0
    samples: int = 0
    digest: bytes = b""
    next: int = 0
    counted: int = 0
    round: int = 0
    leases: dict[bytes, dict[int, int]] = {}
    free: dict[int, int] = {}
    claimed: dict[bytes, Spans] = {}
    pace: dict[bytes, int] = {}
    active: dict[bytes, int] = {}
    marks: list[Mark] = []

    @property
    def dealt(self) -> bool:
        """Whether shards are dealt: the run has them, and the data are defined."""
        return self.samples > 0

    def first(self, shard: int) -> int:
        """The first position of a shard; that of the next one is where it ends."""
        epoch, index = divmod(shard, self.shards)
        return epoch * self.samples + index * self.samples // self.shards

    def shard_of(self, position: int) -> int:
        """The shard that a position is in."""
        epoch, index = divmod(position, self.samples)
        shard = epoch * self.shards + index * self.shards // self.samples
        while self.first(shard + 1) <= position:
            shard += 1
        return shard

    def accepts(self, samples: int) -> bool:
        """Whether data of so many samples can be dealt in this run."""
        return self.shards > 0 and 0 < samples <= limits.SAMPLES_PER_EPOCH_MAX

    # -- entries ---------------------------------------------------------------------------

    def define(self, samples: int, digest: bytes, round_number: int) -> bool:
        """The data are known; False if they were already, or are not dealt in this run."""
        if self.samples or not self.accepts(samples):
            return False
        self.shards = min(self.shards, samples)
        self.samples, self.digest, self.round = samples, digest, round_number
        self.marks = [Mark(round_number, 0, 0, {})]
        return True

    def refusal(self, member: bytes, spans: Spans, samples: float) -> str:
        """Why a contribution of ``member`` that claims ``spans`` cannot be listed, or ""."""
        if not self.dealt:
            return "bad_claim" if spans else ""
        if not _ascending(spans):
            return "bad_claim"
        if samples > sum(span.count for span in spans):
            return "bad_claim"  # it says that it weighs more than what it was trained on
        held = self.leases.get(member, {})
        for shard, first, _ in self._pieces(spans):
            if held.get(shard) != first:
                return "stale_claim"
        return ""

    def _pieces(self, spans: Spans) -> Iterator[tuple[int, int, int]]:
        """(shard, first, stop) of claimed positions, cut at the borders of shards."""
        for span in spans:
            first, stop = span.first, span.first + span.count
            while first < stop:
                shard = self.shard_of(first)
                end = min(stop, self.first(shard + 1))
                yield shard, first, end
                first = end

    def opened(self, claims: Iterable[tuple[bytes, Spans]]) -> None:
        """An attempt lists contributions with these claims."""
        if self.dealt:
            self.claimed = {member: spans for member, spans in claims if spans}

    def decided(self, counted: Collection[bytes], round_number: int) -> None:
        """The open attempt is over; of its contributors those in ``counted`` are in the result.

        ``round_number``: the next round of the counting channel.
        """
        chosen = frozenset(counted)
        for member in self.claimed:
            if member in chosen:
                self._count(member, self.claimed[member], round_number)
        self.claimed = {}
        if self.dealt and round_number > self.round:
            self.round = round_number
            self._mark()

    def _count(self, member: bytes, spans: Spans, round_number: int) -> None:
        held = self.leases.get(member, {})
        for shard, first, stop in self._pieces(spans):
            assert held.get(shard) == first, "an attempt is opened only with claims that fit"
            if stop == self.first(shard + 1):
                del held[shard]
            else:
                held[shard] = stop
        self.pace[member] = sum(span.count for span in spans)
        self.counted += self.pace[member]
        self.active[member] = round_number

    def _mark(self) -> None:
        held = [item for lease in self.leases.values() for item in lease.items()]
        mark = Mark(self.round, self.next, self.counted, dict(sorted([*held, *self.free.items()])))
        self.marks.append(mark)
        records = sum(1 + len(one.open) for one in self.marks)
        while records > limits.SHARD_MARK_RECORDS_MAX and len(self.marks) > 2:
            # Old ones become fewer, new ones stay: every other one of the older half goes.
            half = len(self.marks) // 2 + 1
            self.marks = self.marks[:half:2] + self.marks[half:]
            records = sum(1 + len(one.open) for one in self.marks)

    def rewound(self, round_number: int) -> None:
        """The counting channel goes back to ``round_number``: what came after it is trained again.

        Without a mark of that very round, from the one before it: rather twice than never.
        """
        if not self.dealt:
            return
        earlier = [one for one in self.marks if one.round <= round_number]
        self.marks = earlier or [Mark(round_number, 0, 0, {})]
        mark = self.marks[-1]
        self.next, self.counted, self.round = mark.next, mark.counted, round_number
        self.leases, self.claimed, self.free = {}, {}, dict(mark.open)
        self.active = dict.fromkeys(self.active, round_number)

    # -- dealing ---------------------------------------------------------------------------

    def deal(self, trainers: Sequence[bytes]) -> None:
        """Take back what is idle or orphaned, and give out what is needed.

        Args:
            trainers: members that train, in member order.
        """
        if not self.dealt:
            return
        known = frozenset(trainers)
        for member in list(self.leases):
            # What an open attempt lists stays where it is until that attempt is decided.
            if member not in self.claimed and (member not in known or self._rests(member)):
                self.free.update(self.leases.pop(member))
        for member in [one for one in self.active if one not in known]:
            del self.active[member]
            self.pace.pop(member, None)
        self.free = dict(sorted(self.free.items()))
        for member in trainers:
            self.active.setdefault(member, self.round)
            if self.pace.get(member) != 0:
                pace = max(self.phase_samples, self.pace.get(member, 0))
                self._supply(member, limits.SHARD_LEASE_PHASES * pace)
            elif not self.leases.get(member):
                self.leases[member] = {self.next: self.first(self.next)}
                self.next += 1

    def _rests(self, member: bytes) -> bool:
        """Nothing of it counted for so long that whatever it trains on is too old to be taken.

        From then on it gets a single shard at a time, until something of it counts.
        """
        if self.round - self.active.get(member, self.round) <= limits.SHARD_IDLE_ROUNDS:
            return False
        self.active[member], self.pace[member] = self.round, 0
        return True

    def _supply(self, member: bytes, wanted: int) -> None:
        """Shards until ``wanted`` samples are left to train on: those that were begun come first.

        As much as keeps it busy while its contributions are on their way.
        """
        held = self.leases.setdefault(member, {})
        left = sum(self.first(shard + 1) - done for shard, done in held.items())
        while left < wanted and len(held) < limits.SHARD_LEASES_MAX:
            if self.free:
                shard = next(iter(self.free))
                done = self.free.pop(shard)
            else:
                shard, done = self.next, self.first(self.next)
                self.next += 1
            held[shard] = done
            left += self.first(shard + 1) - done

    # -- for people and trainers -----------------------------------------------------------

    def held(self, member: bytes) -> Spans:
        """Positions in the leases of ``member`` that do not count yet."""
        found = self.leases.get(member, {}).items()
        return joined(Span(done, self.first(shard + 1) - done) for shard, done in found)

    def epoch(self) -> tuple[int, int]:
        """The oldest epoch that is not finished, and how many of its shards are."""
        open_ = [shard for lease in self.leases.values() for shard in lease] + list(self.free)
        epoch = min([self.next, *open_]) // self.shards if self.shards else 0
        begun = min(self.next, (epoch + 1) * self.shards) - epoch * self.shards
        return epoch, begun - sum(shard // self.shards == epoch for shard in open_)


def data_state(shards: int, phase_samples: int) -> DataState:
    """That of a run in which nothing has happened.

    Args:
        shards: of an epoch, 0: none. phase_samples: of one trainer between two hand-overs.
    """
    return DataState(shards=shards, phase_samples=phase_samples)


def _ascending(spans: Spans) -> bool:
    """Spans that are not empty, not too many, and in order."""
    end = 0
    for span in spans:
        if span.count < 1 or span.first < end:
            return False
        end = span.first + span.count
    return len(spans) <= limits.CLAIM_SPANS_MAX


def joined(spans: Iterable[Span]) -> Spans:
    """Ascending spans, with those that touch made one.

    Raises:
        AssertionError: two of them overlap.
    """
    out: list[Span] = []
    for span in sorted(spans, key=lambda one: one.first):
        last = out[-1] if out else Span(0, 0)
        assert span.first >= last.first + last.count, "a position is taken twice"
        if out and last.first + last.count == span.first:
            out[-1] = Span(last.first, last.count + span.count)
        else:
            out.append(span)
    return tuple(out)


def without(spans: Iterable[Span], taken: Iterable[Span]) -> Spans:
    """``spans`` less the positions in ``taken``."""
    left = list(spans)
    for gone in taken:
        stop = gone.first + gone.count
        cut: list[Span] = []
        for span in left:
            end = span.first + span.count
            if gone.first > span.first:
                cut.append(Span(span.first, min(end, gone.first) - span.first))
            if stop < end:
                begin = max(stop, span.first)
                cut.append(Span(begin, end - begin))
        left = [span for span in cut if span.count > 0]
    return joined(left)


class LeaseBook:
    """What a trainer may train on, and what its next contribution has to claim. Not thread-safe.

    ``update`` comes whenever the peer process has news; ``take`` before a step, ``boundary`` at a
    hand-over, ``decided`` once for it, ``dropped`` whenever progress is thrown away.
    """

    def __init__(self) -> None:
        self._generation = -1
        self._round = -1
        self._held: Spans = ()
        self._listed: Spans = ()
        self._fresh: Spans = ()
        """Trained on since the last boundary."""
        self._flying: Spans = ()
        """In the hand-over that is not decided."""
        self._queued: Spans = ()
        """In progress that goes into the next hand-over again."""
        self._settled: list[tuple[int, Spans]] = []
        """Counted, and maybe unknown to the newest update: (round from which on it knows, what)."""
        self._void = False
        self._flying_void = False
        """The hand-over that is not decided claims what an older generation dealt."""

    def update(self, generation: int, round_number: int, held: Spans, listed: Spans = ()) -> None:
        """What the log says now.

        Args:
            round_number: the next round of the counting channel.
            held: as ``DataState.held``.
            listed: of these, what an open attempt lists, maybe of an earlier life of this trainer.
        """
        if generation != self._generation:
            # Rounds were taken back, and with them what they counted.
            self._void = self._void or bool(self._fresh or self._queued)
            self._flying_void = self._flying_void or bool(self._flying)
            self._fresh = self._flying = self._queued = ()
            self._settled.clear()
        self._generation, self._round = generation, round_number
        self._held, self._listed = held, listed
        self._settled = [one for one in self._settled if one[0] > round_number]

    def available(self) -> Spans:
        """Positions to train on next, in order."""
        taken = [*self._fresh, *self._flying, *self._queued, *self._listed]
        for _, spans in self._settled:
            taken += spans
        return without(self._held, taken)

    @property
    def waiting(self) -> int:
        """Samples that the next hand-over will claim."""
        return sum(span.count for span in (*self._fresh, *self._queued))

    @property
    def full(self) -> bool:
        """As many pieces as a hand-over may claim are in it: it is time for one."""
        pieces = len(joined([*self._queued, *self._fresh]))
        return pieces >= limits.CLAIM_SPANS_MAX - 1

    def take(self, count: int) -> list[int]:
        """The next positions, which are trained on now: at most ``count``, fewer if all is out."""
        taken: list[Span] = []
        for span in self.available():
            if count and len(joined([*self._queued, *self._fresh, *taken])) < (
                limits.CLAIM_SPANS_MAX - 1
            ):
                some = min(count, span.count)
                taken.append(Span(span.first, some))
                count -= some
        self._fresh = joined([*self._fresh, *taken])
        return [p for span in taken for p in range(span.first, span.first + span.count)]

    def boundary(self) -> Spans | None:
        """What the hand-over claims that is made now.

        None: its positions are somebody else's by now. The progress must be dropped.
        """
        assert not self._flying, "one hand-over at a time"
        claims = joined([*self._queued, *self._fresh])
        if self._void or without(claims, self._held):
            return None
        self._flying, self._queued, self._fresh = claims, (), ()
        return claims

    def decided(self, counted: bool, round_number: int) -> None:
        """The hand-over is decided.

        Args:
            counted: it is in the result of a round; else its progress goes into the next one.
            round_number: a round at which every ledger knows of it.
        """
        flying, self._flying = self._flying, ()
        if self._flying_void:
            self._flying_void, self._void = False, self._void or not counted
        elif not counted:
            self._queued = joined([*self._queued, *flying])
        elif round_number > self._round:
            self._settled.append((round_number, flying))

    def dropped(self, *, fresh_only: bool = False) -> None:
        """Private progress is thrown away: its positions are to be trained on again.

        ``fresh_only``: what was trained since the last boundary. A hand-over that is on its way
        stays.
        """
        self._fresh = ()
        if not fresh_only:
            self._queued, self._void = (), False


__all__ = ["DataState", "LeaseBook", "Mark", "Span", "Spans", "data_state", "joined", "without"]
