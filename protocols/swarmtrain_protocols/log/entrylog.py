"""The entries a site holds: a verified prefix, perhaps an unproven tail, and the certificates.

Pure bookkeeping: nothing here knows about time, peers or disks. Positions are log indices; the
log holds the entries after its *base*, the position of entry -1 or of a snapshot.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from swarmtrain_protocols import limits
from swarmtrain_protocols.entries import EntryBody, Genesis, StewardsChanged, decode_body
from swarmtrain_protocols.errors import PeerFault
from swarmtrain_protocols.log.certificate import Link, Snapshot, SnapshotFile, Trust
from swarmtrain_protocols.log.view import View, chained
from swarmtrain_protocols.messages.log import Certificate, Recovery, WireEntry


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry with what follows from everything before it."""

    index: int
    term: int
    data: bytes
    body: EntryBody
    chain_hash: bytes
    view: View

    @property
    def wire(self) -> WireEntry:
        return WireEntry(self.term, self.data)


@dataclass(frozen=True, slots=True)
class Base:
    """The position before the first entry held. ``view`` is None only before genesis."""

    index: int
    term: int
    chain_hash: bytes
    view: View | None


Position = Entry | Base


class EntryLog:
    """Entries ``first … last``, of which those up to ``commit`` are certified."""

    def __init__(self, trust: Trust) -> None:
        self.trust = trust
        self.base = Base(-1, 0, trust.run, None)
        self.entries: list[Entry] = []
        self.commit = -1
        self.certificates: dict[int, Certificate] = {}
        self.latest: Certificate | None = None
        self.links: list[Link] = []
        self.genesis = b""
        self.snapshot: Snapshot | None = None
        self.recovery: Recovery | None = None
        """What this log began with, if the founder had to begin it again."""

    # --- reading ---------------------------------------------------------------------------------

    @property
    def first(self) -> int:
        return self.base.index + 1

    @property
    def last(self) -> Position:
        return self.entries[-1] if self.entries else self.base

    @property
    def last_index(self) -> int:
        return self.base.index + len(self.entries)

    def holds(self, index: int) -> bool:
        """True if ``index`` is the base or an entry held."""
        return self.base.index <= index <= self.last_index

    def at(self, index: int) -> Position:
        assert self.holds(index), (index, self.base.index, self.last_index)
        return self.base if index == self.base.index else self.entries[index - self.first]

    def entry(self, index: int) -> Entry:
        found = self.at(index)
        assert isinstance(found, Entry)
        return found

    @property
    def view(self) -> View | None:
        """The view of the newest entry, certified or not: what elections and leaders go by."""
        return self.last.view

    @property
    def committed_view(self) -> View | None:
        return self.at(self.commit).view

    @property
    def generation(self) -> int:
        view = self.committed_view
        return 0 if view is None else view.generation

    @property
    def epoch(self) -> int:
        """Generation of the recovery that this log began with, 0 without one."""
        return 0 if self.recovery is None else self.recovery.generation

    def slice(self, start: int, upto: int) -> tuple[WireEntry, ...]:
        """Entries ``start … upto`` as far as one message carries them."""
        batch: list[WireEntry] = []
        room = limits.LOG_BATCH_BYTES
        for index in range(start, min(upto, start + limits.ENTRIES_PER_APPEND_MAX - 1) + 1):
            entry = self.entry(index)
            room -= len(entry.data)
            if room < 0:
                break
            batch.append(entry.wire)
        return tuple(batch)

    def changes_uncommitted(self) -> list[int]:
        """Where the steward set changes in what is held but not certified."""
        tail = self.entries[self.commit + 1 - self.first :]
        return [entry.index for entry in tail if isinstance(entry.body, StewardsChanged)]

    def changes(self) -> list[int]:
        """Where the steward set changes, since genesis."""
        return [link.index for link in self.links] + self.changes_uncommitted()

    # --- growing ---------------------------------------------------------------------------------

    def follow(self, previous: Position, item: WireEntry) -> Entry:
        """The entry that ``item`` is after ``previous``; nothing is stored.

        Raises:
            PeerFault: ``malformed``, ``bad_genesis`` or ``bad_stewards``.
        """
        index = previous.index + 1
        if previous.view is None:
            body: EntryBody
            body, view = self.trust.genesis(item.body)
        else:
            body = decode_body(item.body)
            if item.term < previous.term:
                raise PeerFault("malformed", f"terms go backwards at {index}")
            view = previous.view.after(index, item.term, item.body, body)
        chain_hash = chained(previous.chain_hash, index, item.term, item.body)
        return Entry(index, item.term, item.body, body, chain_hash, view)

    def append(self, entry: Entry) -> None:
        assert entry.index == self.last_index + 1, (entry.index, self.last_index)
        if isinstance(entry.body, Genesis):
            self.genesis = entry.data
        self.entries.append(entry)

    def truncate(self, index: int) -> None:
        """Forget the entries from ``index`` on; certified ones never."""
        assert index > self.commit, (index, self.commit)
        del self.entries[index - self.first :]

    # --- certificates ----------------------------------------------------------------------------

    def commit_to(self, certificate: Certificate) -> None:
        """Record a certificate that was checked against this log."""
        upto = certificate.index
        assert self.commit < upto <= self.last_index, (self.commit, upto, self.last_index)
        assert self.entry(upto).chain_hash == certificate.chain_hash
        for index in range(self.commit + 1, upto + 1):
            entry = self.entry(index)
            if isinstance(entry.body, StewardsChanged):
                self.links.append(Link(index, entry.wire, certificate))
        self.commit = upto
        self.certificates[upto] = certificate
        self.latest = certificate

    def one_change_at_most(self, entries: Iterable[Entry]) -> bool:
        """One certificate may commit one change of the set, or the new set would prove itself."""
        return sum(1 for entry in entries if isinstance(entry.body, StewardsChanged)) <= 1

    def certificate_for(self, verified: int, upto: int) -> Certificate | None:
        """The newest certificate in ``(verified, upto]`` that a site verified so far can use."""
        if self.latest is None or upto <= verified:
            return None
        changes = [link.index for link in self.links if link.index > verified]
        if len(changes) > 1:
            upto = min(upto, changes[1] - 1)
        if verified < self.latest.index <= upto:
            return self.latest
        best: Certificate | None = None
        linked = {link.certificate.index: link.certificate for link in self.links}
        for index, certificate in (*self.certificates.items(), *linked.items()):
            if verified < index <= upto and (best is None or index > best.index):
                best = certificate
        return best

    # --- compaction ------------------------------------------------------------------------------

    def compact(self, snapshot: Snapshot, keep_from: int) -> None:
        """Adopt a snapshot of this very log; entries before ``keep_from`` are dropped."""
        body = snapshot.body
        assert self.holds(body.index) and self.at(body.index).chain_hash == body.chain_hash
        assert keep_from - 1 <= body.index <= self.commit
        self.snapshot = snapshot
        before = self.at(max(keep_from - 1, self.base.index))
        self.entries = self.entries[before.index + 1 - self.first :]
        self.base = Base(before.index, before.term, before.chain_hash, before.view)
        for index in [i for i in self.certificates if i <= before.index]:
            del self.certificates[index]

    def install(self, snapshot: Snapshot) -> None:
        """Make a checked snapshot the base. A matching tail stays: it may have been signed."""
        body, file = snapshot.body, snapshot.file
        same = file.recovery == self.recovery
        assert body.index > self.commit or not same
        matches = (
            same and self.holds(body.index) and self.at(body.index).chain_hash == body.chain_hash
        )
        tail = self.entries[body.index + 1 - self.first :] if matches else []
        self.base = Base(body.index, body.term, body.chain_hash, snapshot.view)
        self.entries = tail
        self.commit = body.index
        self.certificates, self.latest = {}, None
        self.links, self.genesis, self.recovery = list(file.links), file.genesis, file.recovery
        self.snapshot = snapshot

    def snapshot_file(self, snapshot: Snapshot) -> SnapshotFile:
        """The file of ``snapshot`` with the links up to it."""
        links = tuple(link for link in self.links if link.index <= snapshot.body.index)
        return SnapshotFile(
            self.genesis, links, snapshot.file.body, snapshot.file.certificate, self.recovery
        )
