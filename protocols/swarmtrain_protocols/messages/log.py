"""Messages of the replicated log (Raft with certificates). Owned by the log core; see spec 04."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from swarmtrain_protocols import limits
from swarmtrain_protocols.messages.common import Count, Hash, Key, Reason, Signature

_Entry = Annotated[bytes, Meta(max_length=limits.ENTRY_BYTES_MAX)]
_Leader = Annotated[bytes, Meta(max_length=32)]
_OptionalSignature = Annotated[bytes, Meta(max_length=64)]


Pulse = tuple[Count, Count]
"""(term, number): a leader counts up while it has a majority. Whoever hears no newer one through
its source, however chatty that source is, is not connected to the leader."""


class WireEntry(msgspec.Struct, frozen=True, array_like=True):
    """One entry without its index, which its place in the message gives."""

    term: Count
    body: _Entry


WireEntries = Annotated[tuple[WireEntry, ...], Meta(max_length=limits.ENTRIES_PER_APPEND_MAX)]


class Endorsement(msgspec.Struct, frozen=True, array_like=True):
    """One steward's signature over a statement."""

    signer: Key
    signature: Signature


Endorsements = Annotated[tuple[Endorsement, ...], Meta(max_length=2 * limits.VOTERS_MAX)]


class Certificate(msgspec.Struct, frozen=True, array_like=True):
    """A majority of the stewards in force at ``index`` hold the log up to ``chain_hash``.

    ``stewards`` is the digest over all changes of the steward set up to ``index``.
    """

    generation: Count
    term: Count
    index: Count
    chain_hash: Hash
    stewards: Hash
    endorsements: Endorsements


class SnapshotCertificate(msgspec.Struct, frozen=True, array_like=True):
    """A majority of the stewards in force at ``index`` derived the snapshot with this hash."""

    generation: Count
    term: Count
    index: Count
    chain_hash: Hash
    stewards: Hash
    snapshot_hash: Hash
    endorsements: Endorsements


class Deed(msgspec.Struct, frozen=True, array_like=True):
    """A founder's word that the run is another key's from here on (spec 05 §2.3)."""

    heir: Key
    signature: Signature


Deeds = Annotated[tuple[Deed, ...], Meta(max_length=limits.HANDOVERS_MAX)]
"""From the key that founded the run to the one that gives its orders now."""


class Recovery(msgspec.Struct, frozen=True, array_like=True):
    """The founder's word that the log begins again, without the stewards it had (spec 04 §2.8).

    Entry ``index`` and those before it are replaced by a snapshot whose grants and ledger hash to
    ``content``; ``steward`` alone votes from there on, in ``generation``, from ``term`` on.
    ``deeds`` prove that whoever signed it is the founder's heir, if the run was handed over.
    """

    generation: Count
    term: Count
    index: Count
    steward: Key
    content: Hash
    signature: Signature
    deeds: Deeds = ()


class SnapshotVote(msgspec.Struct, frozen=True, array_like=True):
    """A steward's signature over its own snapshot at ``index``."""

    index: Count
    snapshot_hash: Hash
    signature: Signature


class VoteRequest(msgspec.Struct, frozen=True, tag="vote?"):
    """Asks for a vote in ``term``; ``pre`` only asks whether one would be given.

    ``forced`` says that the leader itself handed over, so hearing from it is no reason to refuse.
    """

    generation: Count
    term: Count
    pre: bool
    forced: bool
    last_index: Count
    last_term: Count


class VoteReply(msgspec.Struct, frozen=True, tag="vote"):
    """``term`` is the voter's own, or the one asked about if ``granted``."""

    generation: Count
    term: Count
    pre: bool
    granted: bool


class Append(msgspec.Struct, frozen=True, tag="append"):
    """Leader to steward: entries from ``start`` on, which follow the chain hash ``prev_hash``.

    ``first`` is the oldest index that the leader still has as an entry.
    """

    generation: Count
    term: Count
    first: Count
    start: Count
    prev_hash: Hash
    entries: WireEntries = ()
    certificate: Certificate | None = None
    snapshot: SnapshotCertificate | None = None
    pulse: Pulse = (0, 0)


class AppendReply(msgspec.Struct, frozen=True, tag="appended"):
    """``index``: the last one that matches if ``ok``, else where the leader should try after.

    ``signature`` covers the statement at ``index``; empty unless that entry is of ``term``.
    """

    generation: Count
    term: Count
    ok: bool
    index: Count
    commit: Count
    base: Count
    signature: _OptionalSignature = b""
    snapshot: SnapshotVote | None = None


class HandOver(msgspec.Struct, frozen=True, tag="handover"):
    """The leader of ``term`` asks the receiver to stand for election at once."""

    generation: Count
    term: Count


class Subscribe(msgspec.Struct, frozen=True, tag="subscribe"):
    """Asks for committed entries from ``start`` on, now and as they come.

    Entries below ``verified`` are verified here (0: none); those up to ``start`` were received.
    """

    generation: Count
    start: Count
    verified: Count


class Unsubscribe(msgspec.Struct, frozen=True, tag="unsubscribe"):
    """No more updates, please."""


class Unserved(msgspec.Struct, frozen=True, tag="unserved"):
    """The receiver cannot be served here; ask another."""

    reason: Reason


class Update(msgspec.Struct, frozen=True, tag="update"):
    """Committed entries from ``start`` on; without entries it is a sign of life.

    ``length`` is the number of committed entries at the sender. With ``more`` the sender waits for
    the next ``Subscribe``. ``leader`` is empty if unknown and only a hint, as is ``leader_term``.
    ``pulse`` is the newest (term, number) of a leader's pulse that reached the sender.
    """

    generation: Count
    leader_term: Count
    leader: _Leader
    pulse: Pulse
    start: Count
    length: Count
    more: bool = False
    entries: WireEntries = ()
    certificate: Certificate | None = None
    snapshot: SnapshotCertificate | None = None


class Recovered(msgspec.Struct, frozen=True, tag="recovered"):
    """Answer to whatever comes from a log that the founder has replaced: here is the proof."""

    recovery: Recovery


class SnapshotWanted(msgspec.Struct, frozen=True, tag="snapshot?"):
    """Asks for the pieces of the snapshot at ``index`` from ``offset`` on."""

    index: Count
    offset: Count


class SnapshotPiece(msgspec.Struct, frozen=True, tag="snapshot"):
    """Bytes from ``offset`` of the snapshot file of ``nbytes`` bytes at ``index``."""

    index: Count
    nbytes: Annotated[int, Meta(ge=1, le=limits.SNAPSHOT_BYTES_MAX)]
    offset: Count
    data: Annotated[bytes, Meta(max_length=limits.SNAPSHOT_PIECE_BYTES)]
