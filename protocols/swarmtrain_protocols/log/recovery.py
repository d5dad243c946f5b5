"""A new beginning: the founder replaces a log whose stewards are lost for good (spec 04 §2.8).

The log is cut at what one surviving site has verified. What stands there, the ledger without the
old stewards, becomes a snapshot that one steward signs and the founder vouches for. Nothing of the
old log fits behind it: generation, chain and steward digest are new, and indices and terms begin
far beyond any that the lost stewards may have reached, so that neither ever goes back at a site.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import blake3
import msgspec

from swarmtrain_protocols import limits
from swarmtrain_protocols.errors import CheckpointError, LocalProtocolError, PeerFault
from swarmtrain_protocols.identity import Keyring
from swarmtrain_protocols.log.anchor import DOMAIN, content_hash, digest, heir_of, statement
from swarmtrain_protocols.log.certificate import (
    SnapshotBody,
    SnapshotFile,
    Trust,
    encode_snapshot_body,
    encode_snapshot_file,
    endorsed,
)
from swarmtrain_protocols.log.entrylog import EntryLog
from swarmtrain_protocols.log.events import LogTimeouts
from swarmtrain_protocols.log.records import (
    EntriesRecord,
    SnapshotRecord,
    VoteRecord,
    encode_record,
)
from swarmtrain_protocols.log.state import LogState
from swarmtrain_protocols.messages.log import Deed, Recovery, SnapshotCertificate

Restart = Callable[[EntryLog, int, int], tuple[bytes, Sequence[bytes], Sequence[Deed]]]
"""(log, generation, index) to the new ledger with that entry applied, the keys that may vote in
the new log beside its steward, and the deeds that lead to the founder of now."""


@dataclass(frozen=True, slots=True)
class Restarted:
    """A recovered log: ``record`` replaces everything on the disk of its steward."""

    recovery: Recovery
    record: bytes
    cut: int
    """Index of the last entry that was kept."""
    dropped: int
    """Entries behind it that no certificate covered."""


def read_log(trust: Trust, records: Iterable[bytes]) -> EntryLog:
    """The log in durable records.

    Raises:
        CheckpointError: they cannot be read, or hold no entry that is certified.
    """
    state = LogState(trust, random.Random(0), 0.0, LogTimeouts())
    try:
        state.load(records)
    except PeerFault as fault:
        raise CheckpointError("the log on disk is damaged", str(fault)) from fault
    if state.log.commit < 0:
        raise CheckpointError("there is no log on this disk", "no entry of it is certified")
    return state.log


def _generation(log: EntryLog, steward: bytes) -> int:
    """A generation beyond all that the old log may have reached.

    Two recoveries of one log at different sites get different ones (but for one chance in 500), so
    that the greater one is adopted everywhere.
    """
    step = limits.RECOVERY_GENERATIONS
    mark = blake3.blake3(steward + log.at(log.commit).chain_hash).digest()
    return (log.generation // step + 1) * step + int.from_bytes(mark[:8], "little") % (step // 2)


def recover(
    trust: Trust, records: Iterable[bytes], keys: Sequence[Keyring], restart: Restart
) -> Restarted:
    """Begin the log again with this site as its only steward.

    Args:
        trust: run, founder and the keyring of the site whose log this is.
        records: what was durable there.
        keys: among them the key of the founder of now.
        restart: makes the new ledger.

    Raises:
        CheckpointError: the log on disk cannot be read.
        LocalProtocolError: none of the keys is that of the founder of now.
        PeerFault: ``bad_deed``: the ledger on this disk was handed over by nobody.
    """
    log = read_log(trust, records)
    generation = _generation(log, trust.keyring.peer_id)
    index = log.commit + limits.RECOVERY_GAP
    term = log.last.term + limits.RECOVERY_GAP
    ledger, others, handed = restart(log, generation, index)
    deeds = tuple(handed)
    heir = heir_of(trust.run, trust.founder, trust.keyring.verify, deeds)
    founder = next((key for key in keys if key.peer_id == heir), None)
    if founder is None:
        since = f", since it was handed over {len(deeds)} times" if deeds else ""
        raise LocalProtocolError("recovery refused", f"its founder is {heir.hex()[:16]}{since}")
    steward = trust.keyring.peer_id
    capable = tuple(sorted({*others, steward}))
    content = content_hash(capable, ledger)
    unsigned = Recovery(generation, term, index, steward, content, bytes(64), deeds)
    signature = founder.sign(DOMAIN, statement(trust.run, unsigned))
    recovery = msgspec.structs.replace(unsigned, signature=signature)
    chain_hash = digest(trust.run, recovery)
    body, body_hash = encode_snapshot_body(
        SnapshotBody(index, term, chain_hash, generation, capable, ledger)
    )
    view = trust.recovered(recovery)
    vote = trust.sign_snapshot(view, term, index, chain_hash, body_hash)
    certificate = SnapshotCertificate(
        generation, term, index, chain_hash, view.digest, body_hash, endorsed({steward: vote})
    )
    file = encode_snapshot_file(SnapshotFile(log.genesis, (), body, certificate, recovery))
    tail = EntriesRecord(index + 1, (), ())
    record = encode_record(SnapshotRecord(VoteRecord(term, b""), file, tail))
    return Restarted(recovery, record, log.commit, log.last_index - log.commit)
